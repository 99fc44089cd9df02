"""Fold a low-rank change into a weight: exact, in bounded memory, at the speed of copying.

    W' = round(gain ⊙ (W + scale · B @ A))        W: [g, out, in]   A: [g, r, in]   B: [g, out, r]

**Once.** The stored number is the one nearest to the float64 result (ties to even); whatever is computed faster must
give these bits. For 16-bit targets W + ΔW is v in float32, with a proven bound of its error, and both ends of the
interval that must hold the exact number are rounded. Where they round alike, so does everything between; the few numbers
(about one in 5,000) whose interval holds a tie of the 16-bit grid are computed again in float64 (Ziv 1991, "Fast
evaluation of elementary mathematical functions with correctly rounded last bit"). That covers subnormals, overflow and
cancellation without a case of its own.

    |v - exact|  ≤  2⁻²⁴ |v|  +  1.01 (r + 6) · 2⁻²⁴ · Σₖ |scale · B[row, k]| · maxⱼ |A[k, j]|  +  what underflows

The second term: r products and their sums, in any order, and the roundings of scale · B and of A to float32. An end of
the interval, |v| (1 ± 2⁻²²) ± the rest, costs two more roundings of 2⁻²⁴ each, which its factor covers.

**In tiles** of ``TILE`` numbers, whose buffers stay in the cache, so that memory is read and written once. Rejected:
float64 on whole tensors (eight times the weight in temporaries, and many times the time); comparing the low bits of v
with those of a tie, one pass less (v's own last bit says nothing about its error after a cancellation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.kernels.reference import round_once
from veneer.lowrank import LowRank

#: numbers in a tile, and columns at most: fixed, so that the sums of a report do not depend on who asks
TILE, WIDEST = 1 << 17, 1 << 13
#: words of 64 bits that one look tests for a bit that differs
LANES = 16
#: products of an element of B with one of A that are formed at once where numbers are computed again
AGAIN = 1 << 18
HALF = (torch.bfloat16, torch.float16)
UNIT, TINY = 2.0**-24, 2.0**-126

Tile = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Folded:
    """A weight with a change in it, and what rounding did to the change.

    ``change`` is ‖ΔW‖ / ‖W‖ (Frobenius; ΔW is all that changes, a gain included), ``retention`` the share of ΔW that the
    stored weight realises: ⟨ΔW, W' - W⟩ / ⟨ΔW, ΔW⟩, and 1.0 where nothing changes. ``rounding`` is what was done,
    "nearest" or "faithful". Unless ``finite``, the weight holds infinities or NaN.

    W is the base as it was given. Where it is finer than the target, W' - W also holds the rounding of W itself, which
    knows nothing of ΔW: the share then is near 1, however small ΔW is beside that noise.
    """

    weight: Float[Tensor, "g out in_"]
    change: float
    retention: float
    rounding: str
    finite: bool


@dataclass(frozen=True)
class _Sums:
    """⟨ΔW, ΔW⟩, ⟨ΔW, W' - W⟩ and ⟨W, W⟩."""

    size: float
    realised: float
    base: float


def fold(
    weight: Float[Tensor, "g out in_"],
    low: LowRank,
    gain: Float[Tensor, " rows"] | None = None,
    dtype: torch.dtype | None = None,
    *,
    out: Float[Tensor, "g out in_"] | None = None,
) -> Folded:
    """``gain ⊙ (weight + ΔW)`` in ``dtype`` (default: the weight's), rounded once.

    Args:
        weight: float64, float32, bfloat16 or float16, with any strides, on any device; not changed.
        gain: one factor a row, [g · out].
        out: where to put the result: of ``dtype``, with any strides, and no memory of ``weight``. None makes a tensor that
            lies in memory as ``weight`` does.

    Beside the result and float64 copies of A and B it needs less than 16 MiB. The bits of the result depend on neither
    strides nor threads.
    """
    dtype = weight.dtype if dtype is None else dtype
    if out is None:
        out = torch.empty_like(weight, dtype=dtype, requires_grad=False)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        spread = None if gain is None else gain.double().view(*weight.shape[:2], 1)
        return _nearest(weight, low.to(torch.float64), spread, out)


def _nearest(weight: Tensor, low: LowRank, gain: Tensor | None, out: Tensor) -> Folded:
    old, new, factors, spread = weight, out, low, gain
    if old.stride(-1) > old.stride(-2):  # it lies transposed: walk as it lies
        old, new, factors, spread = old.mT, new.mT, low.T, None if gain is None else gain.mT
    bound = _bound(old, factors, new.dtype) if gain is None else None
    sums = _in_float64(old, factors, spread, new) if bound is None else _in_float32(old, factors, bound, new)
    finite = sums.realised - sums.realised == 0 or bool(_finite(new))
    if bound is not None and not (sums.realised - sums.realised == 0 and sums.base > 1e-20 * old.numel()):
        sums = _in_float64(old, factors, spread, None)  # squares that float32 does not hold
    change, base = sums.size**0.5, sums.base**0.5
    retention = sums.realised / sums.size if sums.size else 1.0
    return Folded(out, change / base if base else float(change > 0), retention, "nearest", finite)


def _tiles(shape: torch.Size) -> Iterator[Tile]:
    """Slices of [g, out, in]: whole groups if they are small, else rows of one, cut if they are long."""
    groups, rows, columns = shape
    if not groups * rows * columns:
        return
    wide = min(columns, WIDEST)
    many = max(1, TILE // (rows * columns)) if columns <= WIDEST else 1
    high = min(rows, max(1, TILE // wide))
    for group in range(0, groups, many):
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                yield (
                    slice(group, min(group + many, groups)),
                    slice(row, min(row + high, rows)),
                    slice(column, min(column + wide, columns)),
                )


def _product(low: LowRank, tile: Tile) -> tuple[Tensor, Tensor]:
    groups, rows, columns = tile
    return low.B[groups, rows], low.A[groups, :, columns]


def _in_float64(old: Tensor, low: LowRank, gain: Tensor | None, new: Tensor | None) -> _Sums:
    """The definition, tile by tile. ``new`` gets the result; without it there are only the sums, of no rounding."""
    sums = torch.zeros(3, dtype=torch.float64, device=old.device)
    for tile in _tiles(old.shape):
        base = old[tile].double()
        value = torch.bmm(*_product(low, tile)).mul_(low.scale).add_(base)
        if gain is not None:
            value *= gain[tile[0], tile[1]] if gain.shape[2] == 1 else gain[tile[0], :, tile[2]]
        rounded = value
        if new is not None:
            rounded = new[tile].copy_(round_once(value, new.dtype)).double()
        change, realised = (value - base).flatten(), (rounded - base).flatten()
        base = base.flatten()
        sums += torch.stack([change.dot(change), change.dot(realised), base.dot(base)])
    return _Sums(*sums.tolist())


def _bound(old: Tensor, low: LowRank, dtype: torch.dtype) -> Tensor | None:
    """What float32 may do to ΔW, a row of it: [g, out, 1] in float32. None where the float32 path is not for it: a target
    or a weight of more bits, numbers beyond its range, products that torch may compute in less than float32."""
    if dtype not in HALF or old.dtype not in (*HALF, torch.float32) or old.device.type != "cpu":
        return None
    if torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee"):
        return None
    B, widest = (low.B * low.scale).abs(), low.A.abs().amax(2, keepdim=True)  # [g, out, r], [g, r, 1]
    reach = B @ widest  # [g, out, 1]
    if not max(float(one.max()) for one in (B, widest, reach)) < 2.0**120:
        return None
    underflow = TINY * (low.rank + B.sum(2, keepdim=True) + widest.sum(1, keepdim=True))
    return torch.where(reach > 0, 1.01 * ((low.rank + 6) * UNIT * reach + underflow), reach).float()


def _in_float32(old: Tensor, low: LowRank, bound: Tensor, new: Tensor) -> _Sums:
    A, B = low.A.float(), (low.B * low.scale).float()
    above, below = bound, -bound
    buffers = torch.empty(4, TILE), torch.zeros(2, TILE + 4 * LANES, dtype=new.dtype)
    benches: dict[torch.Size, _Bench] = {}
    realised, bases, doubtful = [], [], []
    for groups, rows, columns in _tiles(old.shape):
        part, into = old[groups, rows, columns], new[groups, rows, columns]
        if part.shape not in benches:
            benches[part.shape] = _Bench(part.shape, *buffers)
        bench = benches[part.shape]
        base, change, value, end = bench.base, bench.change, bench.value, bench.end
        base.copy_(part)
        torch.bmm(B[groups, rows], A[groups, :, columns], out=change)
        torch.add(base, change, out=value)
        into.copy_(value)
        value.abs_()
        bench.high.copy_(torch.add(above[groups, rows], value, alpha=1 + 4 * UNIT, out=end))
        bench.low.copy_(torch.add(below[groups, rows], value, alpha=1 - 4 * UNIT, out=end))
        found = bench.differing()
        if found is not None:
            doubtful.append(_place(found, (groups, rows, columns), old.shape))
        value.copy_(into)
        value.sub_(base)
        realised.append(bench.flat_change.dot(bench.flat_value))
        bases.append(bench.flat_base.dot(bench.flat_base))
    sums = [float(torch.stack(one).double().sum()) if one else 0.0 for one in (realised, bases)]
    more = _again(torch.cat(doubtful), old, low, new) if doubtful else 0.0
    return _Sums(low.norm() ** 2, sums[0] + more, sums[1])


class _Bench:
    """The buffers of a tile of one shape, and views of them, which all tiles of that shape share."""

    def __init__(self, shape: torch.Size, wide: Tensor, half: Tensor) -> None:
        count = shape.numel()
        self.flat_base, self.flat_change, self.flat_value, _ = wide[:, :count].unbind()
        self.base, self.change, self.value, self.end = wide[:, :count].view(4, *shape).unbind()
        self.high, self.low = half[:, :count].view(2, *shape).unbind()
        length = -(-count // (4 * LANES)) * 4 * LANES
        bits = half[:, :length].view(torch.int16)
        self.bits, self.other, self.tail = bits[0, :count], bits[1, :count], bits[0, count:]
        self.words = bits[0].view(torch.int64).view(LANES, -1)
        self.any = torch.empty(LANES // 2, self.words.shape[1], dtype=torch.int64)

    def differing(self) -> Tensor | None:
        """The positions at which ``high`` and ``low`` differ in a bit, None if at none. Overwrites ``high``."""
        self.bits ^= self.other
        self.tail.zero_()
        words, any_, half = self.words, self.any, LANES // 2
        torch.bitwise_or(words[:half], words[half:], out=any_)
        while half > 1:
            half //= 2
            any_[:half] |= any_[half : 2 * half]
        columns = any_[0].nonzero().squeeze(1)
        if not len(columns):
            return None
        lane, column, part = words[:, columns].view(torch.int16).view(LANES, -1, 4).nonzero().unbind(1)
        return (lane * words.shape[1] + columns[column]) * 4 + part


def _place(found: Tensor, tile: Tile, shape: torch.Size) -> Tensor:
    """Positions in a tile as positions in the whole."""
    (groups, rows, columns), (_, out, in_) = tile, shape
    wide, high = columns.stop - columns.start, rows.stop - rows.start
    first = (groups.start * out + rows.start) * in_ + columns.start
    if wide == in_ and (high == out or groups.stop - groups.start == 1):  # one piece of the whole
        return found + first
    return first + found // wide * in_ + found % wide  # of one group, as `_tiles` cuts


def _again(places: Tensor, old: Tensor, low: LowRank, new: Tensor) -> float:
    """Compute these numbers in float64; returns what that adds to ⟨ΔW, W' - W⟩."""
    _, out, in_ = old.shape
    more = 0.0
    for each in places.split(max(1, AGAIN // low.rank)):
        at = each // (out * in_), each // in_ % out, each % in_
        change = (low.B[at[0], at[1]] * low.A[at[0], :, at[2]]).sum(1) * low.scale
        rounded = round_once(old[at].double() + change, new.dtype)
        more += float((change * (rounded.double() - new[at].double())).sum())
        new[at] = rounded
    return more


def _finite(new: Tensor) -> bool:
    return all(bool(new[tile].isfinite().all()) for tile in _tiles(new.shape))
