"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no
config."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

_C: Any = torch._C


def eager() -> bool:
    """Whether functions and tensors of our own may be used now: not under ``torch.compile``,
    ``torch.func`` or forward-mode AD. (``fused.applies`` has this in line: a call is time in every
    layer of a decoding step.)"""
    return (
        not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has matrix units (AMX): there, one bfloat16 row is multiplied twice as
    fast as a vector, and elsewhere half as fast again as a matrix."""
    return torch.cpu._is_amx_tile_supported()
