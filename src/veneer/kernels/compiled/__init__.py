"""Everything that is compiled or edits what autograd saved, behind functions of tensors. All of it
can be turned off.

    VENEER_COMPILED=0                          none of it: plain torch throughout
    VENEER_COMPILED=mixed_rows,bf16_dot        these alone
    VENEER_COMPILED=1                          all of it, as without the variable

Each function below returns None where its loop is turned off, numba is missing (the extra ``fast``)
or the tensors are not ones it is for; the caller then does the same with torch. Only
``rounding_loop`` gives the same bits as torch; the others round as any product of matrices may.

Name                   What is computed, and what the loop gains over torch (one thread, rank 8)
thin_matmul            float32 products with A and B of 64 tokens or more: about half the time of torch's products
single_adapter_bf16    x ΔWᵀ of bfloat16 rows without a graph: one call in place of five
expert_rows            thin products of rows of a stack of experts: a quarter of the time of torch's, an expert each
mixed_rows             x ΔWᵀ of rows that use different adapters: one call a layer in place of ten
bf16_dot               the same two by the processor's products of bfloat16 pairs: a quarter of the instructions
round_nearest          W + ΔW rounded to bfloat16: 0.7 ns a number in place of 5 to 9
saved_inputs           no loop, but an edit of what autograd's nodes saved: a third of what a step over a frozen Llama
                       keeps is made again in backward, for a percent of the layers' time

numba takes half a second and 100 MiB to load, so that happens in the first call that uses a loop,
and a model whose layers are all narrower than ``MIN_WIDTH`` (or in float64, or on a device) never
loads it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.compiled.switch import on

# : torch's threads up to which a loop, which runs on one, is ahead of torch's thin products on all
# of them
THREADS = 3
#: tokens from which on float32 thin products are loops
MIN_TOKENS = 64
# : inputs or outputs from which on a layer's products are loops: below, torch's take as long (64 to
# 192 wide, a step of
# : 256 to 1024 tokens: 0.7 to 0.9 of the loops' time, at 128 and 1024 1.04); a run on a model that
# narrow may be over
#: before numba's loading is paid for
MIN_WIDTH = 256


def thin_products_pay() -> bool:
    """Whether loops are ahead of torch's thin products of many float32 tokens on a processor, on
    its threads of now."""
    return on("thin_matmul") and torch.get_num_threads() <= THREADS


def thin_loops(x: Tensor | None, h: Tensor | None, width: int) -> Any:
    """The functions of ``thin_matmul``, where they take less time than torch's products with x [T,
    n] and h [r, T], of which n is ``width``."""
    like: Any = h if x is None else x
    many = width >= MIN_WIDTH and like.shape[x is None] >= MIN_TOKENS
    if not many or like.dtype is not torch.float32 or not thin_products_pay():
        return None
    loops = _module("thin_matmul")
    return loops if loops.able(x, h) else None


def single_adapter_change(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
    """scale · x Aᵀ Bᵀ [T, out] in bfloat16, of x [T, in], A [r, in] and B [out, r]. No gradient."""
    if x.dtype is not torch.bfloat16 or not x.shape[0] or not on("single_adapter_bf16"):
        return None
    if torch.get_num_threads() > THREADS or max(x.shape[1], B.shape[0]) < MIN_WIDTH:
        return None
    loop = _module("single_adapter_bf16")
    return loop.change(x, A, B, scale) if loop.able(x, A, B) else None


def expert_change(x: Tensor, A: Tensor, B: Tensor, scale: float, where: Any) -> Tensor | None:
    """scale · x A_eᵀ B_eᵀ [S, out] of x [S, in], A [E, r, in] and B [E, out, r], for the segments
    of ``kernels.grouped``. No gradient."""
    loops = _experts(x, A, B, where)
    return None if loops is None else loops.change(x, A, B, scale, where)


def expert_gradients(
    x: Tensor, picks: Tensor | None, dy: Tensor, A: Tensor, B: Tensor, scale: float, where: Any, need_x: bool,
    need_factors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
    """The gradients of ``expert_change`` by x (or its rows ``picks``), A and B, given dy [S, out];
    None for those that are not needed."""
    loops = _experts(x, A, B, where)
    return (
        None
        if loops is None
        else loops.gradients(x, picks, dy, A, B, scale, where, need_x, need_factors)
    )


def _experts(x: Tensor, A: Tensor, B: Tensor, where: Any) -> Any:
    some = x.shape[0] if where is None else where.bounds
    if not some or (A.shape[-1] < MIN_WIDTH and B.shape[-2] < MIN_WIDTH):
        return None
    if not on("expert_rows") or torch.get_num_threads() > THREADS:
        return None
    loops = _module("expert_rows")
    return loops if loops.able(x, A, B) else None


def mixed_rows_loop(weight: Tensor, factors: torch.dtype) -> Any:
    """The functions ``table`` and ``change`` of ``mixed_rows``, for a layer with this weight and
    adapters of dtype ``factors``. A table of a layer's adapters is made once for all calls that use
    them."""
    if weight.device.type != "cpu" or max(weight.shape) < MIN_WIDTH or not on("mixed_rows"):
        return None
    loop = _module("mixed_rows")
    return loop if weight.dtype in loop.DTYPES and factors in loop.DTYPES else None


def row_groups(groups: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Any:
    """What ``change`` of a ``mixed_rows_loop`` takes as rows: for each group its rows and the
    weights of the adapters that they use."""
    return _module("mixed_rows").rows(groups)


def rounding_loop(old: Tensor, new: Tensor) -> Any:
    """The functions ``padded`` and ``rounded`` of ``round_nearest``, for rounding ``old`` with a
    change into ``new``, both [g, out, in]."""
    if not on("round_nearest"):
        return None
    loop = _module("round_nearest")
    return loop if loop.able(old, new) else None


@functools.cache
def _module(name: str) -> Any:
    """A file of this folder that loads numba. Cached, as an import statement in each call takes as
    long as a token."""
    return importlib.import_module(f"veneer.kernels.compiled.{name}")
