"""The arithmetic of adapted layers, as functions that take tensors and shapes, but no modules and
no configs."""

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
    not under ``torch.compile``, ``torch.func`` or forward-mode AD. (``fused.applies`` repeats the
    tests below inline, because a function call costs time in every layer of a decoding step.)"""
    return (
        not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def without_autocast(backward: Any) -> Any:
    """Decorator for the ``backward(ctx, *dys)`` of a custom autograd function: autocast is off
    while it runs, because the forward of these functions runs without autocast too."""

    def backward_without_autocast(ctx: Any, *dys: Tensor | None) -> Any:
        # Entering torch.autocast takes as long as a product with A or B, so it is skipped if
        # autocast is off already.
        if not _C._is_any_autocast_enabled():
            return backward(ctx, *dys)
        device_type = next(dy.device.type for dy in dys if dy is not None)
        with torch.autocast(device_type, enabled=False):
            return backward(ctx, *dys)

    return backward_without_autocast


def split_equally(tensors: Sequence, count: int) -> tuple[Any, ...]:
    """Split a sequence into ``count`` slices of equal length. Example: the tensor arguments of an
    autograd function into (weights, biases, A, B), each with one entry per layer."""
    slice_length = len(tensors) // count
    return tuple(
        tensors[index * slice_length : (index + 1) * slice_length] for index in range(count)
    )


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has matrix units (AMX). With AMX, torch's matrix-vector kernel computes the
    product of one bfloat16 row with a matrix twice as fast as torch's matrix kernel does; without
    AMX, it is half as fast as the matrix kernel."""
    return torch.cpu._is_amx_tile_supported()


@functools.cache
def onednn_supports_bfloat16() -> bool:
    """Whether oneDNN can multiply bfloat16 matrices on this CPU, for example by AVX-512. If not,
    its operations raise an error; torch's ``F.linear`` and ``addmm`` use another kernel."""
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return is_supported is not None and is_supported()
