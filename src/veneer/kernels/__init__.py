"""The arithmetic of adapted layers, as functions of tensors and shapes without modules and
configs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

_C: Any = torch._C


def eager() -> bool:
    """Whether custom autograd functions and tensor subclasses may be used now: not under
    ``torch.compile``, ``torch.func`` or forward-mode AD. (``fused.applies`` repeats this inline,
    because a call costs time in every layer of a decoding step.)"""
    return (
        not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@functools.cache
def has_tiles() -> bool:
    """Whether the processor has matrix units (AMX). With them, one bfloat16 row is multiplied twice
    as fast as a vector; without, half as fast as in a matrix."""
    return torch.cpu._is_amx_tile_supported()
