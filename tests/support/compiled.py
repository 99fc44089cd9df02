"""Skip tests of compiled loops that cannot run on this machine."""

from __future__ import annotations

import pytest
from tests.support.extras import IN_CI

from veneer.kernels.switch import LOOPS, VARIABLE, has_numba, is_on


def needs_loop(name: str) -> pytest.MarkDecorator:
    """The mark of a test that needs the compiled loop ``name``."""
    is_missing = name in LOOPS and not has_numba()
    reason = "numba is not installed" if is_missing else f"{VARIABLE} turns {name} off"
    return pytest.mark.skipif(not is_on(name) and not (is_missing and IN_CI), reason=reason)
