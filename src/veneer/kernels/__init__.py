"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no config."""

from __future__ import annotations

import functools
from importlib.util import find_spec


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled (the extra ``fast``)."""
    return find_spec("numba") is not None
