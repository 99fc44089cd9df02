"""The arithmetic of adapted layers: functions of tensors and shapes, which know no modules and no
configs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

_C: Any = torch._C


def is_eager() -> bool:
    """Whether custom autograd functions and tensor subclasses may be used in this call. They may
    not under ``torch.compile``, ``torch.func`` or forward-mode AD. (``fused.applies`` repeats these
    tests inline, because a function call costs time in every layer of a decoding step.)"""
    return (
        not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has matrix units (AMX). With AMX, a product of one bfloat16 row is twice as
    fast by torch's matrix-vector kernel as by its matrix kernel; without AMX, half as fast."""
    return torch.cpu._is_amx_tile_supported()
