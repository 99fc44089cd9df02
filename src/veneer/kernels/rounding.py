"""Fold a low-rank change into a weight: exact, in bounded memory, at the speed of copying.

    W' = round(gain ⊙ (W + scale · B @ A))        W: [g, out, in]   A: [g, r, in]   B: [g, out, r]

**One rounding.** The stored value is the one nearest to the float64 result (ties to even), and all
faster paths must give the same bits. For 16-bit targets, v is W + ΔW in float32 with a proven bound
of its error, and both ends of the interval that contains the exact value are rounded. If both round
to the same value, so does everything between. The few values (about one in 5,000) whose interval
contains a tie of the 16-bit grid are computed again in float64 (Ziv 1991, "Fast evaluation of
elementary mathematical functions with correctly rounded last bit"). This covers subnormals,
overflow and cancellation without special cases.

    |v - exact|  ≤  2⁻²⁴ |v|  +  1.01 (r + 6) · 2⁻²⁴ · Σₖ |scale · B[row, k]| · maxⱼ |A[k, j]|
                    +  underflow

The second term covers r products and their sums in any order, and the roundings of scale · B and of
A to float32. Computing an end of the interval, |v| (1 ± 2⁻²²) ± the other terms, costs two more
roundings of 2⁻²⁴ each, which the factor 1 ± 2⁻²² covers.

Large weights are processed **in one loop** if numba is installed (``round_nearest.py``), else **in
tiles** of ``TILE`` values, whose buffers stay in the cache. Rejected: comparing the low bits of v
with those of a tie, which saves a pass: after a cancellation, v's last bit does not bound its
error.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError, sentence
from veneer.kernels.error_feedback import directions, faithful
from veneer.kernels.grid import Grid
from veneer.kernels.reference import round_once
from veneer.kernels.switch import on
from veneer.kernels.threads import spread, threads_for
from veneer.lowrank import LowRank
from veneer.precision import compute_device, has_float64

__all__ = ["Folded", "fold", "fold_onto"]

#: numbers in a tile, whose buffers fit into a cache; the most columns of a tile in float64; numbers
#: for one call of the compiled loop. Constants, so that the sums of a report do not depend on the
#: number of threads
TILE, WIDEST, SLAB = 1 << 16, 1 << 13, 1 << 19
#: for a weight on another device: the share of it that is a tile, the fewest numbers in a tile, the
#: share of free memory for a tile's temporaries, and approximately their bytes per number
SHARE, SMALLEST, FREE, WIDE = 8, 1 << 10, 16, 40
#: how many squares to sum at once: longer float32 sums lose precision
LINE = 256
WORKERS = 8
#: the fewest numbers in a weight for which numba is loaded
WORTH = 1 << 20
#: how many numbers to compute again at once
AGAIN = 1 << 15
ROUNDINGS = ("auto", "nearest", "faithful")
HALF = (torch.bfloat16, torch.float16)
UNIT, TINY = 2.0**-24, 2.0**-126

Piece = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Sums:
    """⟨ΔW, ΔW⟩, ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩ of rounding to nearest. The sums of
    several slices add up."""

    size: float
    realised: float
    moved: float
    base: float

    def __add__(self, sums: Sums) -> Sums:
        return Sums(
            *(getattr(self, field.name) + getattr(sums, field.name) for field in fields(self))
        )

    @property
    def retention(self) -> float:
        return self.realised / self.size if self.size else 1.0

    @property
    def error(self) -> float:
        """‖W' - W - ΔW‖ / ‖ΔW‖"""
        return (
            (max(self.moved - 2 * self.realised + self.size, 0.0) / self.size) ** 0.5
            if self.size
            else 0.0
        )


@dataclass(frozen=True)
class Folded:
    """A weight with a change folded into it, and the effect of rounding on the change.

    Fields:
        change: ‖ΔW‖ / ‖W‖ (Frobenius; ΔW includes a gain).
        retention: the share of ΔW in the stored weight, ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩; 1.0 if nothing
            changes. Near 1 if W is finer than the target, because W' - W then also contains the
            rounding of W itself.
        rounding: the applied one, "nearest" or "faithful".
        finite: whether the weight holds neither infinities nor NaN.
        sums: of rounding to nearest.
    """

    weight: Float[Tensor, "g out in_"]
    change: float
    retention: float
    rounding: str
    finite: bool
    sums: Sums


def fold(
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Float[Tensor, " rows"] | None = None,
    dtype: torch.dtype | None = None,
    *,
    rounding: str = "auto",
    side: str = "inputs",
    inputs: Float[Tensor, "g n n"] | None = None,
    out: Float[Tensor, "g out in_"] | None = None,
    compiled: bool = True,
) -> Folded:
    """Return ``gain ⊙ (weight + ΔW)`` in ``dtype`` (default: the weight's).

    Args:
        weight: float64, float32, bfloat16 or float16, with any strides, on any device; not changed.
        gain: one factor per row, [g · out].
        rounding: "nearest"; "faithful" (16-bit targets; others are rounded to nearest); "auto":
            faithful if nearest would change ΔW by more than 1 % (see ``is_inaccurate``).
        side: what faithful rounding protects: "inputs" (read by A) or "outputs" (written by B).
        inputs: Σ xᵀx of further inputs (of that side) to protect, in any scale.
        out: tensor for the result: of ``dtype``, with any strides, not sharing memory with
            ``weight``; by default a new tensor with the memory layout of ``weight``.
        compiled: whether numba may be used: faster, with the same bits, and 100 MiB for its code.

    Temporary memory, besides float64 copies of A and B and numba's code: below 32 MiB on a CPU;
    about 2.5 times a 16-bit weight on another device. A device without float64 (MPS) uses the CPU.
    The bits depend on neither strides nor threads. A result that is not finite in ``dtype`` is not
    rounded faithfully.

    Raises:
        ConfigError: an unknown ``rounding``.
    """
    known_rounding(rounding)
    dtype = weight.dtype if dtype is None else dtype
    if out is None:
        out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    if not has_float64(weight.device):
        wide_device = compute_device(weight.device)
        low, gain = low.on(wide_device), None if gain is None else gain.to(wide_device)
        options: Any = {
            "rounding": rounding,
            "side": side,
            "inputs": None if inputs is None else inputs.to(wide_device),
        }
        folded = fold(weight.to(wide_device), low, gain, dtype, compiled=compiled, **options)
        return replace(folded, weight=out.copy_(folded.weight))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        old, new, exact = weight, out, low.to(torch.float64)
        spread = None if gain is None else gain.double().view(*weight.shape[:2], 1)
        if side == "outputs":
            old, new, exact, spread = old.mT, new.mT, exact.T, None if spread is None else spread.mT
        sums, finite = _nearest(old, exact, spread, new, compiled)
        (change, retention), done = _change_and_retention(sums), "nearest"
        if dtype in HALF and finite and _needs_faithful(rounding, sums):
            retention = (
                1 + faithful(old, exact, spread, directions(exact.A, inputs), new) / sums.size
            )
            done = "faithful"
    return Folded(out, change, retention, done, finite, sums)


def fold_onto(
    grid: Callable[[], Grid],
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Float[Tensor, " rows"] | None,
    nearest: Float[Tensor, "g out in_"],
    *,
    rounding: str = "auto",
    side: str = "inputs",
    inputs: Float[Tensor, "g n n"] | None = None,
) -> Folded:
    """``fold`` onto the grid of a quantised weight.

    Args:
        grid: returns the representable values; called only if they are needed.
        weight: the stored weight.
        nearest: the result of rounding to nearest. It is returned as it is, or replaced by a new
            float32 tensor.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        exact = low.to(torch.float64)
        spread = None if gain is None else gain.double().view(*weight.shape[:2], 1)
        sums = _in_float64(weight, exact, spread, None, nearest)
        finite = bool(nearest.isfinite().all()) and math.isfinite(sums.size)
        folded = Folded(nearest, *_change_and_retention(sums), "nearest", finite, sums)
        if not (finite and _needs_faithful(rounding, sums)):
            return folded
        out = torch.empty_like(weight, dtype=torch.float32)
        old, new, levels = weight, out, grid()
        if side == "outputs":
            old, new, exact = old.mT, new.mT, exact.T
            levels = levels.map_tensors(lambda tensor: tensor.mT)
            spread = None if spread is None else spread.mT
        lost = faithful(old, exact, spread, directions(exact.A, inputs), new, levels)
        return replace(folded, weight=out, retention=1 + lost / sums.size, rounding="faithful")


def _needs_faithful(rounding: str, sums: Sums) -> bool:
    """Return whether the result of rounding to nearest requires faithful rounding."""
    return sums.size > 0 and (
        rounding == "faithful" or (rounding == "auto" and is_inaccurate(sums))
    )


def _change_and_retention(sums: Sums) -> tuple[float, float]:
    """(‖ΔW‖ / ‖W‖, the share of ΔW that rounding to nearest retains), for a report."""
    change, base = sums.size**0.5, sums.base**0.5
    return change / base if base else float(change > 0), sums.retention


def known_rounding(rounding: str) -> None:
    """Raises:
    ConfigError: the value is not in ``ROUNDINGS``."""
    if rounding not in ROUNDINGS:
        raise ConfigError(
            sentence(f"rounding={rounding!r}", f"one of {', '.join(ROUNDINGS)}", "choose one")
        )


def is_inaccurate(sums: Sums) -> bool:
    """Return whether rounding to nearest is not good enough: it retains less than 99 % or more than
    101 % of ΔW, or its error is above 0.3 ‖ΔW‖.

    A loss of 1 % comes with an error of a tenth of ΔW; with a smaller error, the loss is chance in
    a small weight. If W is finer than the target dtype, the rounding of W itself hides the loss, so
    only the error tells: 0.3 is the error at which rounding a W on the grid loses 1 %."""
    return (abs(sums.retention - 1) > 0.01 and sums.error > 0.1) or sums.error > 0.3


def _nearest(
    weight: Tensor, low: LowRank, gain: Tensor | None, out: Tensor, compiled: bool
) -> tuple[Sums, bool]:
    old, new, factors, spread = weight, out, low, gain
    if old.stride(-1) > old.stride(-2):  # stored transposed: process it in memory order
        old, new, factors, spread = old.mT, new.mT, low.T, None if gain is None else gain.mT
    bound = _bound(old, factors, new.dtype) if gain is None else None
    if bound is None:
        sums = _in_float64(old, factors, spread, new)
    else:
        loop = rounding_loop(old, new) if compiled and old.numel() >= WORTH else None
        sums = _in_float32(old, factors, bound, new, loop)
    ordinary = all(map(math.isfinite, (sums.realised, sums.moved, sums.base)))
    tiles = () if ordinary else _pieces(new.shape, _tile(new), WIDEST)
    finite = all(bool(new[tile].isfinite().all()) for tile in tiles)
    if bound is not None and not (ordinary and sums.base > 1e-20 * old.numel()):
        sums = _in_float64(old, factors, spread, None)  # squares are out of float32's range
    return sums, finite


def rounding_loop(old: Tensor, new: Tensor) -> Any:
    """Return the module ``round_nearest`` if it is enabled and supports these weights [g, out, in],
    else None. It is imported here because it imports numba."""
    if not on("round_nearest"):
        return None
    module = importlib.import_module("veneer.kernels.round_nearest")
    return module if module.supports(old, new) else None


def _tile(weight: Tensor) -> int:
    """Return the largest number of values in a tile.

    On a CPU, a tile fits into the cache. On a device, each operation costs a launch, so a tile is a
    fixed share of the weight: the number of launches is the same for every weight, and the float64
    temporaries are a few times as large as a 16-bit weight. Less if memory is short."""
    if weight.device.type == "cpu":
        return TILE
    tile = max(-(-weight.numel() // SHARE), SMALLEST)
    return (
        min(tile, max(_free(weight.device) // (FREE * WIDE), SMALLEST)) if weight.is_cuda else tile
    )


def _free(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, including unused bytes that torch has reserved."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _pieces(shape: torch.Size, most: int, widest: int | None = None) -> Iterator[Piece]:
    """Yield slices of [g, out, in] with about ``most`` values: several groups if these are small,
    else rows of one group, in blocks of at most ``widest`` columns."""
    groups, rows, columns = shape
    wide = max(1, min(columns, widest or columns, most if widest else columns))
    high = max(1, min(rows, most // wide))
    many = max(1, most // (high * wide))
    for group in range(0, groups, many):
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                yield (
                    slice(group, min(group + many, groups)),
                    slice(row, min(row + high, rows)),
                    slice(column, min(column + wide, columns)),
                )


def _in_float64(
    old: Tensor,
    low: LowRank,
    gain: Tensor | None,
    new: Tensor | None,
    rounded_weight: Tensor | None = None,
) -> Sums:
    """Compute the definition tile by tile, and write the result to ``new``.

    Without ``new``, only the sums are computed: of ``rounded_weight``, or without rounding.
    ``gain`` is [g, out, 1] or [g, 1, in]."""
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, old.shape[1], -1)

    def of_tile(tile: Piece, _: None) -> Tensor:
        groups, rows, columns = tile
        base = old[tile].double()
        value = torch.bmm(low.B[groups, rows], low.A[groups, :, columns]).mul_(low.scale).add_(base)
        if gain is not None:
            value *= gain[groups, rows] if gain.shape[2] == 1 else gain[groups, :, columns]
        if rounded_weight is not None:
            rounded = rounded_weight[tile].double()
        else:
            rounded = (
                value.clone()
                if new is None
                else new[tile].copy_(round_once(value, new.dtype)).double()
            )
        change, realised = value.sub_(base).flatten(), (rounded - base).flatten()
        base = base.flatten()
        return torch.stack(
            [change.dot(change), change.dot(realised), realised.dot(realised), base.dot(base)]
        )

    tiles = list(_pieces(old.shape, _tile(old), WIDEST))
    sums = spread(tiles, lambda: None, of_tile, threads_for(old, WORKERS))
    return Sums(
        *torch.stack([*sums, torch.zeros(4, dtype=torch.float64, device=old.device)])
        .sum(0)
        .tolist()
    )


def _bound(old: Tensor, low: LowRank, dtype: torch.dtype) -> Tensor | None:
    """Return a bound of float32's error in ΔW for each row, float32 [g, out, 1].

    None if the float32 path does not apply: a target or weight with more bits, values outside of
    its range, or products that torch may compute in lower precision."""
    if (
        not old.numel()
        or dtype not in HALF
        or old.dtype not in (*HALF, torch.float32)
        or old.device.type != "cpu"
    ):
        return None
    products: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    if products.fp32_precision not in ("none", "ieee"):
        return None
    # [g, out, r], [g, r, 1]
    B, widest = (
        (low.B * low.scale).abs(),
        low.A.abs().amax(2, keepdim=True),
    )
    reach = B @ widest  # [g, out, 1]
    if not max(float(tensor.max()) for tensor in (B, widest, reach)) < 2.0**120:
        return None
    underflow = TINY * (low.rank + B.sum(2, keepdim=True) + widest.sum(1, keepdim=True))
    return torch.where(reach > 0, 1.01 * ((low.rank + 6) * UNIT * reach + underflow), reach).float()


def _in_float32(old: Tensor, low: LowRank, bound: Tensor, new: Tensor, loop: Any) -> Sums:
    A, B, threads, more = low.A.float(), (low.B * low.scale).float(), threads_for(old, WORKERS), 0.0
    if loop is not None:
        A, B, columns = loop.pad_rank(A, 1), loop.pad_rank(B, 2), low.A.mT.contiguous()

        def in_one_loop(piece: Piece, _: None) -> Tensor:
            groups, rows, _all = piece
            slab = groups, rows
            factors = (B[slab], A[groups], bound[slab], low.B[slab], columns[groups], low.scale)
            return loop.round_slab(old[slab], *factors, new[slab])

        sums = spread(list(_pieces(old.shape, SLAB)), lambda: None, in_one_loop, threads)
    else:

        def in_tiles(piece: Piece, tile: Callable[[torch.Size], _Tile]) -> tuple[Tensor, Tensor]:
            groups, rows, _all = piece
            slab = groups, rows
            first = (groups.start * old.shape[1] + rows.start) * old.shape[2]
            sums, doubtful = tile(old[slab].shape).fold(
                old[slab], B[slab], A[groups], bound[slab], new[slab]
            )
            return sums, doubtful + first

        pieces = list(_pieces(old.shape, TILE))
        results = spread(
            pieces,
            lambda: functools.cache(lambda shape: _Tile(shape, new.dtype)),
            in_tiles,
            threads,
        )
        sums, doubtful = zip(*results, strict=True)
        more = _round_doubtful(torch.cat(doubtful), old, low, new)
    realised, moved, base = torch.stack(sums).double().sum(0).tolist()
    return Sums(low.norm() ** 2, realised + more, moved, base)


class _Tile:
    """The buffers of one thread for tiles of one shape."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        count = shape.numel()
        padded_count = -(-count // LINE) * LINE
        # explicit dtype and device, because the caller may have changed torch's defaults
        wide = torch.zeros(4, padded_count, dtype=torch.float32, device="cpu")
        half, marks = (
            torch.zeros(padded_count, dtype=kind, device="cpu") for kind in (dtype, torch.int16)
        )
        self.lines, self.words = wide[0].view(-1, LINE), marks.view(torch.int64)
        _, self.flat_change, _, self.flat_end = wide[:, :count].unbind()
        self.base, self.change, self.value, self.end = wide[:, :count].view(4, *shape).unbind()
        self.half, self.marks = half[:count].view(shape), marks[:count].view(shape)
        self.bits = self.half.view(torch.int16)

    def fold(
        self, old: Tensor, B: Tensor, A: Tensor, bound: Tensor, new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill ``new``. Returns ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and ⟨W, W⟩, and the positions of
        doubtful values."""
        self.base.copy_(old)
        torch.bmm(B, A, out=self.change)
        torch.add(self.base, self.change, out=self.value)
        torch.copysign(bound, self.value, out=self.end)
        self.end.add_(
            self.value, alpha=1 + 4 * UNIT
        )  # the end of the interval that is farther from zero
        self.half.copy_(self.end)
        # 2 v - end: the other end
        new.copy_(torch.lerp(self.end, self.value, 2.0, out=self.end))
        torch.bitwise_xor(self.bits, new.view(torch.int16), out=self.marks)
        self.end.copy_(new)
        self.end.sub_(self.base)
        change, moved, base = (
            self.flat_change,
            self.flat_end,
            torch.linalg.vector_norm(self.lines, dim=1),
        )
        # doubtful values are rare: test four of them as one word
        words = self.words.nonzero().squeeze(1)
        word, offset = self.words[words].view(torch.int16).view(-1, 4).nonzero().unbind(1)
        return (
            torch.stack([change.dot(moved), moved.dot(moved), base.dot(base)]),
            words[word] * 4 + offset,
        )


def _round_doubtful(positions: Tensor, old: Tensor, low: LowRank, new: Tensor) -> float:
    """Compute the values at these positions in float64; return the correction of ⟨ΔW, W' - W⟩."""
    _, out, in_ = old.shape
    more = 0.0
    for chunk in positions.split(AGAIN):
        index = chunk // (out * in_), chunk // in_ % out, chunk % in_
        change = torch.zeros(len(chunk), dtype=torch.float64, device=chunk.device)
        # in the order of the compiled loop, so that the bits are the same
        for k in range(low.rank):
            change += low.B[index[0], index[1], k] * low.A[index[0], k, index[2]]
        change *= low.scale
        rounded = round_once(old[index].double() + change, new.dtype)
        more += float((change * (rounded.double() - new[index].double())).sum())
        new[index] = rounded
    return more
