"""Fold a low-rank change into a weight: exact, in bounded memory, at the speed of copying.

    W' = round(gain ⊙ (W + scale · B @ A))        W: [g, out, in]   A: [g, r, in]   B: [g, out, r]
    g: matrices in the weight (experts, or groups of a convolution), else 1   r: rank

**One rounding.** The stored value is the one nearest to the exact result (ties to even). All faster
paths must give the same bits. For 16-bit targets, v is W + ΔW in float32, with a proven bound of
its error, so that the exact value lies in an interval around v. Both ends of the interval are
rounded. If both round to the same value, so does every number between them. For about one element
in 5,000 they do not. These elements are doubtful, and computed again in float64 (Ziv 1991, "Fast
evaluation of elementary mathematical functions with correctly rounded last bit"). This covers
subnormals, overflow and cancellation without special cases.

    |v - exact|  ≤  2⁻²⁴ |v|  +  1.01 (r + 6) · 2⁻²⁴ · Σₖ |scale · B[row, k]| · maxⱼ |A[k, j]|
                    +  underflow

The second term covers r products and their sums in any order, and the roundings of scale · B and of
A to float32. The ends of the interval are computed as |v| (1 ± 2⁻²²) ± the second and third
term. This computation itself rounds twice, by 2⁻²⁴ each, which the factor 1 ± 2⁻²² covers.

If numba is installed, large weights are processed by a compiled loop (``round_nearest.py``), else
in tiles of ``TILE_SIZE`` elements, whose buffers stay in the cache. Rejected: comparing the low
bits of v with the low bits of a tie, which saves a pass. After a cancellation, the last bit of v
does not bound its error.
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
from veneer.kernels.error_feedback import directions, faithful
from veneer.kernels.grid import Grid
from veneer.kernels.reference import round_once
from veneer.kernels.switch import is_on
from veneer.kernels.threads import map_on_threads, threads_for
from veneer.lowrank import LowRank
from veneer.precision import compute_device, has_float64, multiplies_in_float32

__all__ = ["Folded", "fold", "fold_onto"]

#: elements of a tile, whose buffers fit into a cache; the most columns of a tile in float64;
#: elements for one call of the compiled loop. They are constants, so that the sums of a report do
#: not depend on the number of threads
TILE_SIZE, MAX_TILE_COLUMNS, SLAB_SIZE = 1 << 16, 1 << 13, 1 << 19
#: on a GPU, the most tiles of a weight, and the fewest elements of a tile
TILES_PER_WEIGHT, MIN_TILE_SIZE = 8, 1 << 10
#: on a GPU, the temporary tensors of a tile have about ``TEMPORARY_BYTES`` per element, and take at
#: most 1 / ``FREE_SHARE`` of the free memory
FREE_SHARE, TEMPORARY_BYTES = 16, 40
#: how many squares a sum in float32 has, because longer sums lose precision
SQUARES_PER_SUM = 256
#: the most threads
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
    """Sums over a weight that was rounded to nearest: ``size`` is ⟨ΔW, ΔW⟩, ``realised`` is ⟨ΔW,
    W' - W⟩, ``moved`` is ⟨W' - W, W' - W⟩ and ``base`` is ⟨W, W⟩. The ``Sums`` of disjoint slices
    add up to the ``Sums`` of all."""

    size: float
    realised: float
    moved: float
    base: float

    def __add__(self, sums: Sums) -> Sums:
        return Sums(*map(operator.add, astuple(self), astuple(sums)))

    @property
    def retention(self) -> float:
        """The share of ΔW in the rounded weight, ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩."""
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
        weight: W', [g, out, in].
        change: ‖ΔW‖ / ‖W‖ (Frobenius norms; ΔW includes the effect of a gain).
        retention: the share of ΔW in the rounded weight, ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩; 1.0 if nothing
            changes. Near 1 if W has more bits than W', because W' - W then also contains the
            rounding of W itself.
        rounding: the rounding that was applied, "nearest" or "faithful".
        finite: whether the weight holds neither infinities nor NaN.
        sums: the sums for rounding to nearest.
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
        rounding: "nearest"; "faithful", for 16-bit targets (others are rounded to nearest); or
            "auto": faithful if nearest would be inaccurate (see ``is_inaccurate``).
        side: what faithful rounding protects: "inputs" (read by A) or "outputs" (written by B).
        inputs: Σ xᵀx of further inputs (or outputs, see ``side``) to protect, in any scale.
        out: tensor for the result, of ``dtype``, with any strides, that shares no memory with
            ``weight``. By default a new tensor with the memory layout of ``weight``.
        compiled: whether numba may be used (faster, the same bits, 100 MiB of memory for its code).

    Temporary memory is below 32 MiB on a CPU, and about 2.5 times a 16-bit weight on another
    device, besides float64 copies of A and B and numba's code. A device without float64 (MPS) uses
    the CPU. The bits of the result depend on neither strides nor threads. A result that is not
    finite in ``dtype`` is rounded to nearest.

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
    """``fold`` for a quantised weight: each element becomes a number of the weight's grid.

    Args:
        grid: returns the numbers that can be stored; called only if they are needed.
        weight: the stored weight, dequantised.
        nearest: ``gain ⊙ (weight + ΔW)``, rounded to nearest on the grid. The result holds this
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
    """Round faithfully into ``folded.weight``. ``low`` and ``gain`` [g, out, 1] are in float64."""
    new = folded.weight
    if side == "outputs":
        weight, new, low = weight.mT, new.mT, low.T
        gain = None if gain is None else gain.mT
        grid = None if grid is None else grid.map_tensors(lambda tensor: tensor.mT)
    rounding_error = faithful(weight, low, gain, directions(low.A, inputs), new, grid)
    return replace(folded, retention=1 + rounding_error / folded.sums.size, rounding="faithful")


def _needs_faithful(rounding: str, sums: Sums) -> bool:
    """Whether the result of rounding to nearest requires faithful rounding."""
    return sums.size > 0 and (
        rounding == "faithful" or (rounding == "auto" and is_inaccurate(sums))
    )


def _change_and_retention(sums: Sums) -> tuple[float, float]:
    """(‖ΔW‖ / ‖W‖, the share of ΔW in the weight after rounding to nearest), for a report."""
    change, base = sums.size**0.5, sums.base**0.5
    return change / base if base else float(change > 0), sums.retention


def check_rounding(rounding: str) -> None:
    """Raise ConfigError if ``rounding`` is not in ``ROUNDINGS``."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r}", f"one of {', '.join(ROUNDINGS)}", "choose one")


def is_inaccurate(sums: Sums) -> bool:
    """Whether rounding to nearest is not good enough: it retains less than 99 % or more than 101 %
    of ΔW, or its error is above 0.3 ‖ΔW‖.

    A systematic loss of 1 % comes with an error of at least 0.1 ‖ΔW‖. With a smaller error, the
    loss is chance, as in a weight with few elements. If W has more bits than the target dtype, the
    rounding of W itself hides the loss, and only the error shows it. 0.3 is the error at which
    rounding a W of the target dtype loses 1 %."""
    return (abs(sums.retention - 1) > 0.01 and sums.error > 0.1) or sums.error > 0.3


def _nearest(
    weight: Tensor, low: LowRank, gain: Tensor | None, out: Tensor, compiled: bool
) -> tuple[Sums, bool]:
    """Round to nearest into ``out``. Returns the sums, and whether the result is finite."""
    old, new, factors, wide_gain = weight, out, low, gain
    if old.stride(-1) > old.stride(-2):  # stored transposed: process it in memory order
        old, new, factors = old.mT, new.mT, low.T
        wide_gain = None if gain is None else gain.mT
    bound = _bound(old, factors, new.dtype) if gain is None else None
    if bound is None:
        sums = _in_float64(old, factors, wide_gain, new)
    else:
        loop = rounding_loop(old, new) if compiled and old.numel() >= NUMBA_MIN_ELEMENTS else None
        sums = _in_float32(old, factors, bound, new, loop)
    has_finite_sums = all(map(math.isfinite, (sums.realised, sums.moved, sums.base)))
    # finite sums show that all elements are finite
    tiles = () if has_finite_sums else _slices(new.shape, _tile_size(new), MAX_TILE_COLUMNS)
    is_finite = all(bool(new[tile].isfinite().all()) for tile in tiles)
    if bound is not None and not (has_finite_sums and sums.base > 1e-20 * old.numel()):
        sums = _in_float64(old, factors, wide_gain, None)  # squares are out of float32's range
    return sums, is_finite


def rounding_loop(old: Tensor, new: Tensor) -> Any:
    """The module ``round_nearest`` if it is enabled and supports these weights [g, out, in], else
    None. It is imported only here, because it imports numba."""
    if not is_on("round_nearest"):
        return None
    module = importlib.import_module("veneer.kernels.round_nearest")
    return module if module.supports(old, new) else None


def _tile_size(weight: Tensor) -> int:
    """The most elements of a tile.

    On a CPU, a tile fits into the cache. On a GPU, each operation costs a launch, so a tile is a
    fixed share of the weight: the number of launches is the same for every weight, and the float64
    temporaries are a few times as large as a 16-bit weight. It is smaller if memory is short."""
    if weight.device.type == "cpu":
        return TILE_SIZE
    tile = max(-(-weight.numel() // TILES_PER_WEIGHT), MIN_TILE_SIZE)
    if weight.is_cuda:
        tile_in_memory = _free_bytes(weight.device) // (FREE_SHARE * TEMPORARY_BYTES)
        tile = min(tile, max(tile_in_memory, MIN_TILE_SIZE))
    return tile


def _free_bytes(device: torch.device) -> int:
    """The free bytes of a CUDA device, including bytes that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _slices(shape: torch.Size, size: int, widest: int | None = None) -> Iterator[Piece]:
    """Yield slices of [g, out, in] with about ``size`` elements: several groups if these are small,
    else rows of one group, in blocks of at most ``widest`` columns if that is not None."""
    groups, rows, columns = shape
    column_count = max(1, min(columns, widest or columns, size if widest else columns))
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
    old: Tensor,
    low: LowRank,
    gain: Tensor | None,
    new: Tensor | None,
    rounded_weight: Tensor | None = None,
) -> Sums:
    """Compute gain ⊙ (W + ΔW) in float64, tile by tile; round it once and write it to ``new``.

    Without ``new``, only the sums are computed: for ``rounded_weight``, or for W + ΔW without
    rounding if that is None too. ``gain`` is [g, out, 1] or [g, 1, in]."""
    if gain is not None and gain.shape[2] == 1:
        gain = gain.expand(-1, old.shape[1], -1)

    def sum_tile(tile: Piece, _: None) -> Tensor:
        groups, rows, columns = tile
        # base: W   value: gain ⊙ (W + ΔW)   rounded: W'
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
        change, moved = value.sub_(base).flatten(), (rounded - base).flatten()
        base = base.flatten()
        return torch.stack(
            [change.dot(change), change.dot(moved), moved.dot(moved), base.dot(base)]
        )

    tiles = list(_slices(old.shape, _tile_size(old), MAX_TILE_COLUMNS))
    sums = map_on_threads(tiles, lambda: None, sum_tile, threads_for(old, MAX_THREADS))
    no_tiles = torch.zeros(4, dtype=torch.float64, device=old.device)
    return Sums(*torch.stack([*sums, no_tiles]).sum(0).tolist())


def _bound(old: Tensor, low: LowRank, dtype: torch.dtype) -> Tensor | None:
    """A bound of float32's error in ΔW for each row, float32 [g, out, 1].

    None if the float32 path does not apply: the target has more than 16 bits, the weight more than
    32, values exceed float32's range, torch may multiply float32 in lower precision, or the weight
    is not on the CPU."""
    if (
        not old.numel()
        or dtype not in HALF_DTYPES
        or old.dtype not in (*HALF_DTYPES, torch.float32)
        or old.device.type != "cpu"
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


def _in_float32(old: Tensor, low: LowRank, bound: Tensor, new: Tensor, loop: Any) -> Sums:
    """Round W + ΔW to nearest into ``new`` by float32 arithmetic, and doubtful elements by float64.
    ``loop``: the module ``round_nearest``, or None to use tiles."""
    A, B = low.A.float(), (low.B * low.scale).float()
    threads, correction = threads_for(old, MAX_THREADS), 0.0
    if loop is not None:
        A, B, columns = loop.pad_rank(A, 1), loop.pad_rank(B, 2), low.A.mT.contiguous()

        def round_by_loop(piece: Piece, _: None) -> Tensor:
            groups, rows, _columns = piece
            slab = groups, rows
            factors = (B[slab], A[groups], bound[slab], low.B[slab], columns[groups], low.scale)
            return loop.round_slab(old[slab], *factors, new[slab])

        slabs = list(_slices(old.shape, SLAB_SIZE))
        sums = map_on_threads(slabs, lambda: None, round_by_loop, threads)
    else:

        def round_by_tile(
            piece: Piece, tile_of_shape: Callable[[torch.Size], _Tile]
        ) -> tuple[Tensor, Tensor]:
            groups, rows, _columns = piece
            slab = groups, rows
            first = (groups.start * old.shape[1] + rows.start) * old.shape[2]
            sums, doubtful = tile_of_shape(old[slab].shape).fold(
                old[slab], B[slab], A[groups], bound[slab], new[slab]
            )
            return sums, doubtful + first

        results = map_on_threads(
            list(_slices(old.shape, TILE_SIZE)),
            lambda: functools.cache(lambda shape: _Tile(shape, new.dtype)),
            round_by_tile,
            threads,
        )
        sums, doubtful = zip(*results, strict=True)
        correction = _round_doubtful(torch.cat(doubtful), old, low, new)
    realised, moved, base = torch.stack(sums).double().sum(0).tolist()
    return Sums(low.norm() ** 2, realised + correction, moved, base)


class _Tile:
    """Rounds tiles of one shape. Holds the buffers of one thread."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        count = shape.numel()
        padded_count = -(-count // SQUARES_PER_SUM) * SQUARES_PER_SUM
        # dtype and device are named, because the caller may have changed torch's defaults
        wide = torch.zeros(4, padded_count, dtype=torch.float32, device="cpu")
        rounded_end = torch.zeros(padded_count, dtype=dtype, device="cpu")
        marks = torch.zeros(padded_count, dtype=torch.int16, device="cpu")
        self.base_lines, self.words = wide[0].view(-1, SQUARES_PER_SUM), marks.view(torch.int64)
        _, self.flat_change, _, self.flat_end = wide[:, :count].unbind()
        self.base, self.change, self.value, self.end = wide[:, :count].view(4, *shape).unbind()
        self.rounded_end, self.marks = rounded_end[:count].view(shape), marks[:count].view(shape)
        self.rounded_end_bits = self.rounded_end.view(torch.int16)

    def fold(
        self, old: Tensor, B: Tensor, A: Tensor, bound: Tensor, new: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fill ``new`` with W + ΔW, rounded to nearest. Returns ⟨ΔW, W' - W⟩, ⟨W' - W, W' - W⟩ and
        ⟨W, W⟩, and the flat indices of doubtful elements."""
        self.base.copy_(old)
        torch.bmm(B, A, out=self.change)
        torch.add(self.base, self.change, out=self.value)
        torch.copysign(bound, self.value, out=self.end)
        # the end of the interval that is farther from zero
        self.end.add_(self.value, alpha=1 + 4 * UNIT_ROUNDOFF)
        self.rounded_end.copy_(self.end)
        # the other end is 2 v - end
        new.copy_(torch.lerp(self.end, self.value, 2.0, out=self.end))
        torch.bitwise_xor(self.rounded_end_bits, new.view(torch.int16), out=self.marks)
        self.end.copy_(new)
        self.end.sub_(self.base)
        change, moved = self.flat_change, self.flat_end
        base = torch.linalg.vector_norm(self.base_lines, dim=1)
        # doubtful elements are rare, so the 16-bit marks of four elements are tested as one word
        words = self.words.nonzero().squeeze(1)
        word, offset = self.words[words].view(torch.int16).view(-1, 4).nonzero().unbind(1)
        return (
            torch.stack([change.dot(moved), moved.dot(moved), base.dot(base)]),
            words[word] * 4 + offset,
        )


def _round_doubtful(positions: Tensor, old: Tensor, low: LowRank, new: Tensor) -> float:
    """Compute the elements at these flat indices in float64. Returns by how much ⟨ΔW, W' - W⟩
    changes."""
    _, out, in_ = old.shape
    correction = 0.0
    for chunk in positions.split(DOUBTFUL_CHUNK):
        index = chunk // (out * in_), chunk // in_ % out, chunk % in_
        change = torch.zeros(len(chunk), dtype=torch.float64, device=chunk.device)
        # in the order of summation of the compiled loop, so that the bits are the same
        for k in range(low.rank):
            change += low.B[index[0], index[1], k] * low.A[index[0], k, index[2]]
        change *= low.scale
        rounded = round_once(old[index].double() + change, new.dtype)
        correction += float((change * (rounded.double() - new[index].double())).sum())
        new[index] = rounded
    return correction
