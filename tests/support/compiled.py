"""Tests of compiled loops, and which of them can run here."""

from __future__ import annotations

import pytest
from tests.support.extras import IN_CI

from veneer.kernels.switch import LOOPS, VARIABLE, has_numba, is_on


def needs_loop(name: str) -> pytest.MarkDecorator:
    """For a test about one of the loops itself."""
    missing = name in LOOPS and not has_numba()
    reason = "numba is not installed" if missing else f"{VARIABLE} turns {name} off"
    return pytest.mark.skipif(not is_on(name) and not (missing and IN_CI), reason=reason)
