"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no config."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

#: torch's threads up to which a compiled loop, which runs on one, is ahead of torch's thin products on all of them
THREADS = 3


@functools.cache
def has_numba() -> bool:
    """Whether loops can be compiled (the extra ``fast``)."""
    return find_spec("numba") is not None


def loops_pay() -> bool:
    """Whether compiled loops are ahead of torch's thin products of many tokens, in the dtypes that they know."""
    return has_numba() and torch.get_num_threads() <= THREADS


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has matrix units (AMX): there, one bfloat16 row is multiplied twice as fast as a vector,
    and elsewhere half as fast again as a matrix."""
    return torch.cpu._is_amx_tile_supported()
