"""The arithmetic of adapted layers: functions of tensors and shapes, which use no modules and no
configs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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


def without_autocast(gradients: Any) -> Any:
    """Decorator for a backward: run it without autocast, as forward ran."""

    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        # disabling autocast takes as long as a product with A or B, so test first
        if not _C._is_any_autocast_enabled():
            return gradients(ctx, *dys)
        device_type = next(dy.device.type for dy in dys if dy is not None)
        with torch.autocast(device_type, enabled=False):
            return gradients(ctx, *dys)

    return backward


def split_equally(tensors: Sequence, count: int) -> tuple[Any, ...]:
    """Split a sequence into ``count`` equal slices, such as (weights, biases, A, B)."""
    size = len(tensors) // count
    return tuple(tensors[index * size : (index + 1) * size] for index in range(count))


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has matrix units (AMX). With AMX, a product of one bfloat16 row is twice as
    fast by torch's matrix-vector kernel as by its matrix kernel; without AMX, half as fast."""
    return torch.cpu._is_amx_tile_supported()
