"""x Wᵀ for a few tokens, computed as (W xᵀ)ᵀ, which is faster in float32 on a CPU of AMD.

    x: [T, in]   W: [out, in]

In this order, torch's BLAS (MKL) reads W once, at the speed of memory. On CPUs of Intel, for which
MKL is written, x Wᵀ is about as fast. The sums are as exact as those of x Wᵀ, but not the same
bits. The order is therefore used only in decoding steps: in ``Forward.decode`` of models/decode
(``use``), and in calls of a bank (several adapters over one base) with one token per row, which
include calls that decode some rows and read pieces of prompts in others. In all other calls, x Wᵀ
is bitwise what the base itself computes. A single token does not need this order, because torch
then multiplies W with a vector. In 16 bits both orders take the same time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from veneer.kernels.switch import is_on

#: the most tokens for which (W xᵀ)ᵀ is faster. With more, transposing the result takes as long as
#: the product saves
MAX_TOKENS = 64


class _State(threading.local):
    """Whether the current thread is in a block of ``use``."""

    is_used = False


STATE = _State()


@contextmanager
def use() -> Iterator[None]:
    """A context in which, for this thread, ``fused.add_product`` and the output head of
    ``models/decode/forward.py`` compute x Wᵀ as (W xᵀ)ᵀ wherever ``suits(x, W)`` is true."""
    STATE.is_used = True
    try:
        yield
    finally:
        STATE.is_used = False


@functools.cache
def is_amd() -> bool:
    """Whether the CPU is made by AMD and torch's BLAS is MKL. Only then is (W xᵀ)ᵀ faster."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in str(capabilities.get("cpu_name")) and torch.backends.mkl.is_available()


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether (W xᵀ)ᵀ is faster than x Wᵀ for x [T, in] and W [out, in], and the optimisation
    "weight_first" is turned on (``switch.py``)."""
    return (
        1 < x.shape[0] <= MAX_TOKENS
        and x.dtype is torch.float32
        and x.is_cpu
        and weight.is_contiguous()
        and is_on("weight_first")
        and is_amd()
    )


def add_product(change: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """change + x Wᵀ + bias, written to ``change`` [T, out], the low-rank term of the layer, and
    returned. x: [T, in]; the ``weight`` W: [out, in]; the product is computed as (W xᵀ)ᵀ."""
    if bias is not None:
        change += bias
    return change.add_(torch.mm(weight, x.mT).mT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, out], computed as (W xᵀ)ᵀ + bias, for x [T, in] and the ``weight`` W
    [out, in]."""
    y = torch.mm(weight, x.mT).mT.contiguous()
    return y if bias is None else y.add_(bias)
