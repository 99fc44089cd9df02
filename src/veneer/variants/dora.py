"""DoRA: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖ for each output row, with ΔW = alpha / rank · B @ A. Liu et
al. 2024, arXiv:2402.09353.

The layer's output is multiplied by the gain m / ‖W + ΔW‖, with a trained magnitude m [g · out] that
starts at ‖W‖, so that every gain starts at 1. As in section 4.3 of the paper, no gradient flows
through the norm.

The norm is computed from the sum W + ΔW in at least float32, also under autocast. On a CPU, a few
rows are computed at a time, which stay in the cache. Rejected: ‖W‖² + 2⟨W, ΔW⟩ + ‖ΔW‖². It is as
fast, but if ΔW cancels most of a row of W, so that a norm of ‖W‖ / 100 remains, the terms cancel
too, and the result loses four digits.

A row whose norm is zero has gain 1. Its output is 0 for every gain, and with a gain of 1, B gets a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from veneer.lowrank import LowRank
from veneer.variants._base import Base, InitContext, Parameters, Resolved, register
from veneer.variants.lora import LORA

_C: Any = torch._C

#: the bytes of W + ΔW that are computed at a time on a CPU, so that they stay in the cache
CHUNK_BYTES = 1 << 20


def init(context: InitContext) -> dict[str, Tensor]:
    """A and B as in LoRA, and ``magnitude`` [g · out], the norms of the rows of W, in at least
    float32."""
    parameters = LORA.init(context)
    return {
        **parameters,
        "magnitude": row_norms(context.base(), LowRank(parameters["A"], parameters["B"], 1.0)),
    }


def resolve(parameters: Parameters, scale: float, base: Base) -> Resolved:
    low = LowRank(parameters["A"], parameters["B"], scale)
    # A quantised weight can be dequantised in blocks of rows (``pieces``), so that the whole dense
    # weight is never in memory.
    read_pieces: Any = getattr(base, "pieces", None)
    if read_pieces is None or low.B.is_cpu or torch.compiler.is_compiling():
        norms = row_norms(base(), low)
    else:
        norms = _norms_of_pieces(read_pieces(), low)
    return low, gain_of(parameters["magnitude"], norms)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """The gain m / ‖W + ΔW‖ of each output row, [g · out], from ``magnitude`` m and ``norms``
    ‖W + ΔW‖, each [g · out]. It is 1 where the norm is 0."""
    if _is_launched(norms):
        return cast(Tensor, _Gain.apply(magnitude, norms))
    gain = magnitude / norms.masked_fill(norms == 0, 1)
    return torch.where(norms == 0, torch.ones_like(gain), gain)


def _is_launched(tensor: Tensor) -> bool:
    """Whether each operation on this tensor launches a kernel on a device, so that the number of
    operations matters. False on a CPU, under ``torch.compile``, and in transforms of
    ``torch.func``."""
    if tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return _C._functorch.peek_interpreter_stack() is None


class _Gain(torch.autograd.Function):
    """``gain_of`` with few launches: it divides by norms of zero too, and replaces the results
    afterwards, by 1 in the gain and by 0 in the gradient."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, norms: Tensor) -> Tensor:
        ctx.save_for_backward(norms)
        return (magnitude / norms).nan_to_num_(1.0, 1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (norms,) = ctx.saved_tensors
        # not by ``nan_to_num``, which would hide a gradient that overflowed
        return (gradient / norms).masked_fill_(norms == 0, 0.0), None


@torch.no_grad()
def _norms_of_pieces(pieces: Iterator[Tensor], low: LowRank) -> Tensor:
    """``row_norms`` of a weight with one group whose rows come in ``pieces``, each a dense block of
    n rows [1, n, in]."""
    norms_by_piece, first_row = [], 0
    for piece in pieces:
        rows = slice(first_row, first_row + piece.shape[1])
        norms_by_piece.append(row_norms(piece, LowRank(low.A, low.B[:, rows], low.scale)))
        first_row = rows.stop
        del piece  # frees it before the next one is read
    return torch.cat(norms_by_piece)


@torch.no_grad()
def row_norms(weight: Tensor, low: LowRank) -> Tensor:
    """The norm of every output row of W + ΔW, [g · out], for the ``weight`` W [g, out, in] and the
    factors ``low`` of ΔW. Computed in the wider dtype of W and ΔW, and at least float32. On a CPU,
    only a block of rows at a time is cast to that dtype. No gradient."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, low.A.dtype), torch.float32)
    low, device_type = low.to(dtype), weight.device.type
    in_one_block = device_type != "cpu" or torch.compiler.is_compiling()
    rows_per_block = (
        weight.shape[1]
        if in_one_block
        else max(1, CHUNK_BYTES // (weight.shape[2] * dtype.itemsize))
    )
    row_blocks = zip(
        weight.split(rows_per_block, dim=1), low.B.split(rows_per_block, dim=1), strict=True
    )
    no_autocast = (
        torch.autocast(device_type, enabled=False)
        if torch.amp.is_autocast_available(device_type)
        else nullcontext()
    )
    with no_autocast:
        if _is_launched(weight) and len(weight) == 1:  # ``baddbmm`` copies W once more
            changed_weight = (
                weight[0].to(dtype, copy=True).addmm_(low.B[0], low.A[0], alpha=low.scale)
            )
            return torch.linalg.vector_norm(changed_weight, dim=-1)
        changed_blocks = (
            torch.baddbmm(block.to(dtype), B, low.A, alpha=low.scale) for block, B in row_blocks
        )
        norms = [torch.linalg.vector_norm(block, dim=-1) for block in changed_blocks]
        return (norms[0] if len(norms) == 1 else torch.cat(norms, dim=1)).flatten()


DORA = register(
    LORA,
    name="dora",
    paper="Liu et al. 2024, arXiv:2402.09353",
    init=init,
    resolve=resolve,
    peft={"use_dora": True},
    peft_keys={"magnitude": "lora_magnitude_vector"},
)
