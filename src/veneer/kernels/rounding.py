"""Fold a low-rank change into a weight: rounded once, in bounded memory, nearly as fast as a copy.

    W' = round(gain ⊙ (W + scale · B @ A))        W: [g, out, in]   A: [g, r, in]   B: [g, out, r]
    g: matrices in the weight (experts, or groups of a convolution), else 1   r: rank

Each stored value is the one nearest to the exact result (ties to even), on every path. For 16-bit
targets, v is W + ΔW in float32, with a proven bound of its error, so that the exact value lies in
an interval around v. If both ends of the interval round to the same number, so does every number
between them. For about one element in 5,000 they do not. Such elements are called doubtful, and
computed again in float64 (Ziv 1991, "Fast evaluation of elementary mathematical functions with
correctly rounded last bit"). Subnormals, overflow and cancellation need no special cases.

    |v - exact|  ≤  2⁻²⁴ |v|  +  1.01 (r + 6) · 2⁻²⁴ · Σₖ |scale · B[row, k]| · maxⱼ |A[k, j]|
                    +  underflow

The second term covers r products and their sums in any order, and the roundings of scale · B and of
A to float32. The ends of the interval are computed as |v| (1 ± 2⁻²²) ± the other two terms. The
factor 1 ± 2⁻²² also covers the two roundings of this computation, by 2⁻²⁴ each.

If numba is installed, a compiled loop (``round_nearest.py``) processes large weights. All others
are processed in tiles of ``TILE_SIZE`` elements, whose buffers stay in the cache. Rejected: finding
doubtful elements by the low bits of v, because after a cancellation the error exceeds its last bit.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels.error_feedback import directions_to_protect, round_with_feedback
from veneer.kernels.grid import Grid
from veneer.kernels.reference import round_once
from veneer.kernels.switch import is_on
from veneer.kernels.threads import map_on_threads, threads_for
from veneer.lowrank import LowRank
from veneer.precision import compute_device, has_float64, multiplies_in_float32

__all__ = ["Folded", "fold", "fold_onto"]

#: elements of a tile, whose buffers fit into a cache; its most columns in float64; elements of a
#: call of the compiled loop. Being constants, they keep ``Sums`` independent of the thread count
TILE_SIZE, MAX_TILE_COLUMNS, SLAB_SIZE = 1 << 16, 1 << 13, 1 << 19
#: on a GPU, the most tiles (slices rounded at once) of a weight, and the fewest elements of a tile
TILES_PER_WEIGHT, MIN_TILE_SIZE = 8, 1 << 10
#: on a GPU, the temporary tensors of a tile have about ``TEMPORARY_BYTES`` per element, and take at
#: most 1 / ``FREE_SHARE`` of the free memory
FREE_SHARE, TEMPORARY_BYTES = 16, 40
#: the most squares that are added up in one float32 sum, because longer sums lose precision
SQUARES_PER_SUM = 256
#: the most threads that round a weight
MAX_THREADS = 8
#: the fewest elements of a weight for which numba is loaded
NUMBA_MIN_ELEMENTS = 1 << 20
#: how many doubtful elements are computed again at once
DOUBTFUL_CHUNK = 1 << 15
ROUNDINGS = ("auto", "nearest", "faithful")
HALF_DTYPES = (torch.bfloat16, torch.float16)
#: float32: half a unit in the last place of 1, and the smallest normal number
UNIT_ROUNDOFF, SMALLEST_NORMAL = 2.0**-24, 2.0**-126

#: slices of groups, rows and columns of a weight [g, out, in]
Piece = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Sums:
    """Inner products over a weight W that became W' when W + ΔW was rounded to nearest: ``size`` is
    ⟨ΔW, ΔW⟩, ``realised`` is ⟨ΔW, W' - W⟩, ``moved`` is ⟨W' - W, W' - W⟩ and ``base`` is ⟨W, W⟩.
    The ``Sums`` of disjoint slices add up to the ``Sums`` of the weight."""

    size: float
    realised: float
    moved: float
    base: float

    def __add__(self, sums: Sums) -> Sums:
        return Sums(*map(operator.add, astuple(self), astuple(sums)))

    @property
    def retention(self) -> float:
        """The share of ΔW that W' contains, ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩; 1.0 if ΔW is 0."""
        return self.realised / self.size if self.size else 1.0

    @property
    def error(self) -> float:
        """The rounding error relative to ΔW, ‖W' - W - ΔW‖ / ‖ΔW‖; 0.0 if ΔW is 0."""
        return (
            (max(self.moved - 2 * self.realised + self.size, 0.0) / self.size) ** 0.5
            if self.size
            else 0.0
        )


@dataclass(frozen=True)
class Folded:
    """A weight with a change folded into it, and the effect of rounding on the change.

    Fields:
        weight: W', [g, out, in].
        change: ‖ΔW‖ / ‖W‖ (Frobenius norms; ΔW includes the effect of a gain).
        retention: the share of ΔW that W' contains, ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩; 1.0 if ΔW is 0. Near 1
            if W has more bits than W', because W' - W then also contains the rounding of W itself.
        rounding: the rounding that was applied, "nearest" or "faithful" (by error feedback).
        finite: whether the weight holds neither infinities nor NaN.
        sums: the ``Sums`` of rounding to nearest, also if ``rounding`` is "faithful".
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
    """Return ``gain ⊙ (weight + ΔW)`` in ``dtype`` (default: the weight's); ``low`` holds ΔW.

    Args:
        weight: float64, float32, bfloat16 or float16, with any strides, on any device; not changed.
        gain: one factor for each row of W + ΔW, [g · out]; None for no gain.
        rounding: "nearest"; "faithful", so that errors cancel in the directions given by ``side``
            (16-bit targets only; others are rounded to nearest); or "auto", which is "faithful" if
            rounding to nearest is inaccurate (``is_inaccurate``), else "nearest".
        side: "inputs" (directions that A reads) or "outputs" (directions that B writes).
        inputs: Σ xᵀx of measured inputs x (or outputs, see ``side``), in any scale, which
            "faithful" protects too.
        out: tensor for the result, of ``dtype``, with any strides, that shares no memory with
            ``weight``. By default a new tensor with the memory layout of ``weight``.
        compiled: whether numba may be used (faster, the same bits, 100 MiB of memory for its code).

    Temporary memory, besides float64 copies of A and B and numba's code, is below 32 MiB on a CPU,
    and about 2.5 times a 16-bit weight on another device. A device without float64 (MPS) uses the
    CPU. The bits of the result depend on neither strides nor threads. A result that is not finite
    in ``dtype`` is rounded to nearest.

    Raises:
        ConfigError: an unknown ``rounding``.
    """
    check_rounding(rounding)
    dtype = weight.dtype if dtype is None else dtype
    if out is None:
        out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    if not has_float64(weight.device):
        wide_device = compute_device(weight.device)
        gain = None if gain is None else gain.to(wide_device)
        inputs = None if inputs is None else inputs.to(wide_device)
        options: Any = {"rounding": rounding, "side": side, "inputs": inputs, "compiled": compiled}
        folded = fold(weight.to(wide_device), low.on(wide_device), gain, dtype, **options)
        return replace(folded, weight=out.copy_(folded.weight))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        exact_change = low.to(torch.float64)
        wide_gain = None if gain is None else gain.double().view(*weight.shape[:2], 1)
        sums, finite = _nearest(weight, exact_change, wide_gain, out, compiled)
        folded = Folded(out, *_change_and_retention(sums), "nearest", finite, sums)
        if dtype in HALF_DTYPES and finite and _needs_faithful(rounding, sums):
            folded = _round_faithfully(folded, weight, exact_change, wide_gain, side, inputs)
    return folded


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
    """``fold`` for a quantised weight: each element becomes a number of ``grid()``, dequantised.

    Args:
        grid: returns the ``Grid`` of storable numbers; called only for faithful rounding.
        weight: the stored weight, dequantised.
        nearest: ``gain ⊙ (weight + ΔW)``, rounded to nearest on the grid. ``Folded.weight`` is this
            tensor, or a new float32 tensor if rounding is faithful.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        change = low.to(torch.float64)
        wide_gain = None if gain is None else gain.double().view(*weight.shape[:2], 1)
        sums = _in_float64(weight, change, wide_gain, None, nearest)
        finite = bool(nearest.isfinite().all()) and math.isfinite(sums.size)
        folded = Folded(nearest, *_change_and_retention(sums), "nearest", finite, sums)
        if finite and _needs_faithful(rounding, sums):
            folded = replace(folded, weight=torch.empty_like(weight, dtype=torch.float32))
            folded = _round_faithfully(folded, weight, change, wide_gain, side, inputs, grid())
    return folded


def _round_faithfully(
    folded: Folded,
    weight: Tensor,
    low: LowRank,
    gain: Tensor | None,
    side: str,
    inputs: Tensor | None,
    grid: Grid | None = None,
) -> Folded:
    """Overwrite ``folded.weight`` by gain ⊙ (W + ΔW), rounded by error feedback. Returns ``folded``
    with its new retention. ``low`` and ``gain`` [g, out, 1] are float64."""
    out = folded.weight
    if side == "outputs":
        weight, out, low = weight.mT, out.mT, low.T
        gain = None if gain is None else gain.mT
        grid = None if grid is None else grid.map_tensors(lambda tensor: tensor.mT)
    rounding_error = round_with_feedback(
        weight, low, gain, directions_to_protect(low.A, inputs), out, grid
    )
    return replace(folded, retention=1 + rounding_error / folded.sums.size, rounding="faithful")


def _needs_faithful(rounding: str, sums: Sums) -> bool:
    """Whether to round again faithfully, after rounding to nearest gave these ``sums``."""
    return sums.size > 0 and (
        rounding == "faithful" or (rounding == "auto" and is_inaccurate(sums))
    )


def _change_and_retention(sums: Sums) -> tuple[float, float]:
    """(‖ΔW‖ / ‖W‖, or 1.0 if only W is 0; the share of ΔW that rounding to nearest retained)."""
    change, base = sums.size**0.5, sums.base**0.5
    return change / base if base else float(change > 0), sums.retention


def check_rounding(rounding: str) -> None:
    """Raise ConfigError if ``rounding`` is not in ``ROUNDINGS``."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}", f"one of {', '.join(ROUNDINGS)}", "choose one")


def is_inaccurate(sums: Sums) -> bool:
    """Whether rounding to nearest is not good enough: it retains less than 99 % or more than 101 %
    of ΔW, or its error is above 0.3 ‖ΔW‖.

    A systematic loss of 1 % comes with an error of at least 0.1 ‖ΔW‖; with a smaller error, the
    loss is due to chance, as in a weight with few elements. If W has more bits than the target
    dtype, the rounding of W itself hides the loss, and only the error shows it. At an error of 0.3,
    a W of the target dtype loses 1 %."""
    return (abs(sums.retention - 1) > 0.01 and sums.error > 0.1) or sums.error > 0.3


def _nearest(
    weight: Tensor, low: LowRank, gain: Tensor | None, out: Tensor, compiled: bool
) -> tuple[Sums, bool]:
    """Round gain ⊙ (W + ΔW) to nearest, into ``out``. Returns (sums, whether ``out`` is finite)."""
    W, rounded, factors, wide_gain = weight, out, low, gain
    if W.stride(-1) > W.stride(-2):  # stored transposed: process it in memory order
        W, rounded, factors = W.mT, rounded.mT, low.T
        wide_gain = None if gain is None else gain.mT
    error_bound = _bound(W, factors, rounded.dtype) if gain is None else None
    if error_bound is None:
        sums = _in_float64(W, factors, wide_gain, rounded)
    else:
        loop = rounding_loop(W, rounded) if compiled and W.numel() >= NUMBA_MIN_ELEMENTS else None
        sums = _in_float32(W, factors, error_bound, rounded, loop)
    has_finite_sums = all(map(math.isfinite, (sums.realised, sums.moved, sums.base)))
    # finite sums show that all elements are finite
    tiles = () if has_finite_sums else _slices(rounded.shape, _tile_size(rounded), MAX_TILE_COLUMNS)
    is_finite = all(bool(rounded[tile].isfinite().all()) for tile in tiles)
    if error_bound is not None and not (has_finite_sums and sums.base > 1e-20 * W.numel()):
        sums = _in_float64(W, factors, wide_gain, None)  # again: squares left float32's range
    return sums, is_finite


def rounding_loop(weight: Tensor, out: Tensor) -> Any:
    """The module ``round_nearest`` (a compiled loop), if it is turned on and can round a ``weight``
    [g, out, in] into ``out``, else None. It is imported only here, because it imports numba."""
    if not is_on("round_nearest"):
        return None
    loop_module = importlib.import_module("veneer.kernels.round_nearest")
    return loop_module if loop_module.supports(weight, out) else None


def _tile_size(weight: Tensor) -> int:
    """The most elements of a tile, the slice of ``weight`` that is rounded at once. On a CPU, a
    tile fits into the cache. On a GPU, each operation costs a launch, so a tile is a fixed share of
    the weight, or less if memory is short: thus the number of launches does not grow with the
    weight."""
    if weight.device.type == "cpu":
        return TILE_SIZE
    tile = max(-(-weight.numel() // TILES_PER_WEIGHT), MIN_TILE_SIZE)
    if weight.is_cuda:
        tile_in_memory = _free_bytes(weight.device) // (FREE_SHARE * TEMPORARY_BYTES)
        tile = min(tile, max(tile_in_memory, MIN_TILE_SIZE))
    return tile


def _free_bytes(device: torch.device) -> int:
    """The free bytes of a CUDA device, including bytes that torch has reserved and does not use."""
    reserved_unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved_unused


def _slices(shape: torch.Size, size: int, max_columns: int | None = None) -> Iterator[Piece]:
    """Yield slices of a weight of this shape [g, out, in] with about ``size`` elements: several
    groups if these are small, else rows of one group, with at most ``max_columns`` columns."""
    groups, rows, columns = shape
    column_count = max(1, min(columns, max_columns or columns, size if max_columns else columns))
    row_count = max(1, min(rows, size // column_count))
    group_count = max(1, size // (row_count * column_count))
    for group in range(0, groups, group_count):
        for row in range(0, rows, row_count):
            for column in range(0, columns, column_count):
                yield (
                    slice(group, min(group + group_count, groups)),
                    slice(row, min(row + row_count, rows)),
                    slice(column, min(column + column_count, columns)),
                )


def _in_float64(
    weight: Tensor,
    low: LowRank,
    gain: Tensor | None,
    out: Tensor | None,
    rounded_weight: Tensor | None = None,
) -> Sums:
    """Compute gain ⊙ (W + ΔW) in float64, tile by tile; round it once and write it to ``out``.

    If ``out`` is None, only the sums are computed: for W' = ``rounded_weight``, or, if that is None
    too, for W' = gain ⊙ (W + ΔW) without rounding. ``gain`` is [g, out, 1] or [g, 1, in]."""
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, weight.shape[1], -1)

    def sum_tile(tile: Piece, _: None) -> Tensor:
        groups, rows, columns = tile
        # base: W   exact: gain ⊙ (W + ΔW)   rounded: W'
        base = weight[tile].double()
        exact = torch.bmm(low.B[groups, rows], low.A[groups, :, columns]).mul_(low.scale).add_(base)
        if gain is not None:
            exact *= gain[groups, rows] if gain.shape[2] == 1 else gain[groups, :, columns]
        if rounded_weight is not None:
            rounded = rounded_weight[tile].double()
        else:
            rounded = (
                exact.clone()
                if out is None
                else out[tile].copy_(round_once(exact, out.dtype)).double()
            )
        change, moved = exact.sub_(base).flatten(), (rounded - base).flatten()
        base = base.flatten()
        return torch.stack(
            [change.dot(change), change.dot(moved), moved.dot(moved), base.dot(base)]
        )

    tiles = list(_slices(weight.shape, _tile_size(weight), MAX_TILE_COLUMNS))
    sums = map_on_threads(tiles, lambda: None, sum_tile, threads_for(weight, MAX_THREADS))
    no_tiles = torch.zeros(4, dtype=torch.float64, device=weight.device)
    return Sums(*torch.stack([*sums, no_tiles]).sum(0).tolist())


def _bound(weight: Tensor, low: LowRank, dtype: torch.dtype) -> Tensor | None:
    """A bound, for each row, of the error of ΔW if it is computed in float32: float32 [g, out, 1].

    None if W + ΔW must be computed in float64: ``dtype``, the target's, has more than 16 bits, the
    weight more than 32, values exceed float32's range, torch may multiply float32 in lower
    precision, or the weight is not on the CPU."""
    if (
        not weight.numel()
        or dtype not in HALF_DTYPES
        or weight.dtype not in (*HALF_DTYPES, torch.float32)
        or weight.device.type != "cpu"
    ):
        return None
    if not multiplies_in_float32():
        return None
    # [g, out, r], [g, r, 1]
    B, largest_A = (low.B * low.scale).abs(), low.A.abs().amax(2, keepdim=True)
    largest_change = B @ largest_A  # [g, out, 1]
    if not max(float(tensor.max()) for tensor in (B, largest_A, largest_change)) < 2.0**120:
        return None
    underflow = low.rank + B.sum(2, keepdim=True) + largest_A.sum(1, keepdim=True)
    rounding_error = (low.rank + 6) * UNIT_ROUNDOFF * largest_change + SMALLEST_NORMAL * underflow
    return torch.where(largest_change > 0, 1.01 * rounding_error, largest_change).float()


def _in_float32(weight: Tensor, low: LowRank, bound: Tensor, out: Tensor, loop: Any) -> Sums:
    """Write W + ΔW, rounded to nearest, to ``out``: from float32, and from float64 where float32 is
    not exact enough. ``loop``: the module ``round_nearest``, or None to use torch, in tiles."""
    A, B = low.A.float(), (low.B * low.scale).float()
    thread_count, correction = threads_for(weight, MAX_THREADS), 0.0
    if loop is not None:
        A, B, A_columns = loop.pad_rank(A, 1), loop.pad_rank(B, 2), low.A.mT.contiguous()

        def round_by_loop(piece: Piece, _: None) -> Tensor:
            groups, rows, _columns = piece
            slab = groups, rows
            factors = (B[slab], A[groups], bound[slab], low.B[slab], A_columns[groups], low.scale)
            return loop.round_slab(weight[slab], *factors, out[slab])

        slabs = list(_slices(weight.shape, SLAB_SIZE))
        sums = map_on_threads(slabs, lambda: None, round_by_loop, thread_count)
    else:

        def round_by_tile(
            piece: Piece, tile_of_shape: Callable[[torch.Size], _Tile]
        ) -> tuple[Tensor, Tensor]:
            groups, rows, _columns = piece
            slab = groups, rows
            first_index = (groups.start * weight.shape[1] + rows.start) * weight.shape[2]
            sums, doubtful = tile_of_shape(weight[slab].shape).fold(
                weight[slab], B[slab], A[groups], bound[slab], out[slab]
            )
            return sums, doubtful + first_index

        results = map_on_threads(
            list(_slices(weight.shape, TILE_SIZE)),
            lambda: functools.cache(lambda shape: _Tile(shape, out.dtype)),
            round_by_tile,
            thread_count,
        )
        sums, doubtful = zip(*results, strict=True)
        correction = _round_doubtful(torch.cat(doubtful), weight, low, out)
    realised, moved, base = torch.stack(sums).double().sum(0).tolist()
    return Sums(low.norm() ** 2, realised + correction, moved, base)


class _Tile:
    """Rounds tiles (slices of a weight) of one shape, in buffers that one thread reuses."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        count = shape.numel()
        padded_count = -(-count // SQUARES_PER_SUM) * SQUARES_PER_SUM
        # dtype and device are named, because the caller may have changed torch's defaults
        buffers = torch.zeros(4, padded_count, dtype=torch.float32, device="cpu")
        rounded_end = torch.zeros(padded_count, dtype=dtype, device="cpu")
        marks = torch.zeros(padded_count, dtype=torch.int16, device="cpu")
        self.base_lines, self.words = buffers[0].view(-1, SQUARES_PER_SUM), marks.view(torch.int64)
        _, self.flat_change, _, self.flat_end = buffers[:, :count].unbind()
        self.base, self.change, self.value, self.end = buffers[:, :count].view(4, *shape).unbind()
        self.rounded_end, self.marks = rounded_end[:count].view(shape), marks[:count].view(shape)
        self.rounded_end_bits = self.rounded_end.view(torch.int16)

    def fold(
        self, weight: Tensor, B: Tensor, A: Tensor, error_bound: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write W', W + ΔW rounded to nearest, to ``out``. Returns ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩
        and ⟨W, W⟩ [3], and the flat indices of the elements to compute again in float64."""
        self.base.copy_(weight)
        torch.bmm(B, A, out=self.change)
        torch.add(self.base, self.change, out=self.value)
        torch.copysign(error_bound, self.value, out=self.end)
        # the end, farther from zero, of the interval that holds the exact value
        self.end.add_(self.value, alpha=1 + 4 * UNIT_ROUNDOFF)
        self.rounded_end.copy_(self.end)
        # ``self.end`` becomes the other end of the interval, 2 v - end
        out.copy_(torch.lerp(self.end, self.value, 2.0, out=self.end))
        torch.bitwise_xor(self.rounded_end_bits, out.view(torch.int16), out=self.marks)
        self.end.copy_(out)
        self.end.sub_(self.base)
        change, moved = self.flat_change, self.flat_end
        base_norms = torch.linalg.vector_norm(self.base_lines, dim=1)
        # doubtful elements are rare, so the 16-bit marks of four elements are tested as one word
        word_indices = self.words.nonzero().squeeze(1)
        word, offset = self.words[word_indices].view(torch.int16).view(-1, 4).nonzero().unbind(1)
        return (
            torch.stack([change.dot(moved), moved.dot(moved), base_norms.dot(base_norms)]),
            word_indices[word] * 4 + offset,
        )


def _round_doubtful(indices: Tensor, weight: Tensor, low: LowRank, result: Tensor) -> float:
    """Compute the elements of ``result`` (W') at these flat indices again, in float64. Returns by
    how much ⟨ΔW, W' - W⟩ changes."""
    _, out, in_ = weight.shape
    correction = 0.0
    for chunk in indices.split(DOUBTFUL_CHUNK):
        index = chunk // (out * in_), chunk // in_ % out, chunk % in_
        delta = torch.zeros(len(chunk), dtype=torch.float64, device=chunk.device)
        # summed in the same order as in the compiled loop, so that the bits are the same
        for k in range(low.rank):
            delta += low.B[index[0], index[1], k] * low.A[index[0], k, index[2]]
        delta *= low.scale
        rounded = round_once(weight[index].double() + delta, result.dtype)
        correction += float((delta * (rounded.double() - result[index].double())).sum())
        result[index] = rounded
    return correction
