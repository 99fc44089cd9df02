"""x Wᵀ of a few tokens, computed as (W xᵀ)ᵀ: as in a decoding step in float32 on a CPU of AMD.

    x: [T, in]   W: [out, in]

Torch's BLAS (MKL) then reads W once, at the speed of memory. On CPUs of Intel, for which MKL is
written, x Wᵀ is about as fast. The sums are as exact as those of x Wᵀ, but not the
same bits. It is used in the engine's decode calls (``use``), and in a bank's calls with one token a
row, to which the calls of running rows and prompts together belong. A model that is called
otherwise computes the bits of its base. One token needs no such
help: torch multiplies W with a vector. In 16 bits both orders take the same time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from veneer.kernels.switch import is_on

#: the most tokens for which this is faster. With more, transposing the result costs what the
#: product gains.
MOST_TOKENS = 64


class _State(threading.local):
    """Of each thread: whether it is in a block of ``use``."""

    is_used = False


STATE = _State()


@contextmanager
def use() -> Iterator[None]:
    """Within this block, products of this thread are computed so where that is faster."""
    STATE.is_used = True
    try:
        yield
    finally:
        STATE.is_used = False


@functools.cache
def is_amd() -> bool:
    """Whether the CPU is one of AMD and torch's BLAS is MKL."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in str(capabilities.get("cpu_name")) and torch.backends.mkl.is_available()


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this module multiplies x [T, in] and W [out, in] faster than torch, and is on."""
    return (
        1 < x.shape[0] <= MOST_TOKENS
        and x.dtype is torch.float32
        and x.is_cpu
        and weight.is_contiguous()
        and is_on("weight_first")
        and is_amd()
    )


def add_product(change: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """change [T, out] + x Wᵀ + bias, in place."""
    if bias is not None:
        change += bias
    return change.add_(torch.mm(weight, x.mT).mT)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, [T, out]."""
    y = torch.mm(weight, x.mT).mT.contiguous()
    return y if bias is None else y.add_(bias)
