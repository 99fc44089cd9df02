"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no config."""

from __future__ import annotations

import functools
from importlib.util import find_spec

#: torch's threads up to which a compiled loop, which runs on one, is ahead of torch's thin products on all of them
THREADS = 3


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled (the extra ``fast``)."""
    return find_spec("numba") is not None
