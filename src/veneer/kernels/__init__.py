"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no config."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has matrix units (AMX): there, one bfloat16 row is multiplied twice as fast as a vector,
    and elsewhere half as fast again as a matrix."""
    return torch.cpu._is_amx_tile_supported()
