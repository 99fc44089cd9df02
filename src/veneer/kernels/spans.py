"""One linear layer on rows of which each span has low-rank factors of its own, as one differentiable function.

    y = x Wᵀ + bias,  and on the tokens of span i:  + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W: [out, in]   A_i: [r_i, in]   B_i: [out, r_i]

The products with W are one for all rows, forward and backward, as W is frozen. What is thin runs on each span's own
tokens, so that nothing of one span, a NaN included, reaches another's output or gradient: spans of one length without
dropout as batched products, smaller ranks filled up with zeros; others one after another (``fused.py`` has the
products). The change comes first and x Wᵀ is added to it, as in ``fused.py``. Saved are x, and h where it is small.

Eight spans of rank 8 in a layer of 576 × 576, one thread, forward and backward: of 16 tokens 0.18 ms batched and 0.43
one after another in float32, 0.19 and 1.1 in bfloat16, beside 1.8 and 0.8 of the products with W; of 64 tokens 0.64 and
1.0 in float32, 0.36 and 1.3 in bfloat16, beside 7.3 and 3.5.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.kernels import dropout, fused, reference
from veneer.kernels.compiled.saved_inputs import SavedInput, again, kept
from veneer.kernels.dropout import Dropped

_C: Any = torch._C


class Span(NamedTuple):
    """Tokens ``first`` up to ``after``, the rank and scale of their change, and the probability and seed of dropout."""

    first: int
    after: int
    rank: int
    scale: float
    dropout: float = 0.0
    seed: int = 0

    @property
    def strength(self) -> float:
        return self.scale / (1 - self.dropout)

    def of(self, x: Tensor) -> Tensor:
        return x[self.first : self.after]

    def dropped(self, x: Tensor) -> Dropped | None:
        """What is dropped of the span's own tokens [t, in]: drawn as for a call that holds these alone."""
        return dropout.of_rows(x, self.dropout, self.seed) if self.dropout else None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, spans: Sequence[Span], A: Sequence[Tensor], B: Sequence[Tensor]
) -> Tensor:
    """y [*, out] in the dtype of x; differentiable in x and all factors. Where ``fused.applies`` alone.

    Args:
        spans: in order, none over another; tokens in no span are the base's.
        A, B: [r_i, in] and [out, r_i] of each span, or all with a first axis of one, of any floating-point dtype:
            computed in that of x.
    """
    if not spans:
        return F.linear(x, weight, bias)
    return _apply(tuple(spans), x, weight, bias, *A, *B)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, spans: tuple[Span, ...], x: Tensor, weight: Tensor, bias: Any, *factors: Tensor) -> Tensor:
        matrices = [one if one.ndim == 2 else one[0] for one in factors]
        A, B = matrices[: len(spans)], matrices[len(spans) :]
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        part = tokens.new_empty(len(tokens), len(weight))
        way = _Batched if _alike(spans, A) else _Each
        downs, ups = _below(A, x.dtype, way), _below([up.mT for up in B], x.dtype, way)
        part[: spans[0].first] = 0
        part[spans[-1].after :] = 0
        h = way.forward(spans, tokens, downs, ups, part)
        y = fused.added(part, tokens, weight, bias)
        ctx.spans, ctx.shape, ctx.way = spans, x.shape, way
        *made_of, ctx.gate = kept(x)
        h = h if max(map(len, A)) * 8 <= x.shape[-1] else [None] * len(h)
        ctx.save_for_backward(*made_of, weight, downs, ups, *factors, *h)
        return y.view(*x.shape[:-1], len(weight)).data  # which forgets that it is a view

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not _C._is_any_autocast_enabled():
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy)


# as in ``fused.py``: what ``Function.apply`` does for ``torch.func``, whose transforms never come here
_apply = cast(Any, super(Function, _Linear)).apply


def _alike(spans: Sequence[Span], A: Sequence[Tensor]) -> bool:
    """Whether spans can be one batch: neighbours of one length, of ranks that are not far from each other."""
    length, ranks = spans[0].after - spans[0].first, [len(down) for down in A]
    return (
        len(spans) > 1
        and max(ranks) * len(ranks) <= 2 * sum(ranks)
        and all(not span.dropout for span in spans)
        and all(span.first == spans[0].first + i * length for i, span in enumerate(spans))
        and spans[-1].after == spans[0].first + len(spans) * length
    )


def _below(factors: Sequence[Tensor], dtype: torch.dtype, way: Any) -> Tensor:
    """Factors [r_i, n] below each other, in a dtype: a copy and a cast for all; each of the largest rank if batched."""
    most = max(map(len, factors))
    if way is _Batched and any(len(one) != most for one in factors):
        zeros = factors[0].new_zeros(most, factors[0].shape[1])
        factors = [piece for one in factors for piece in (one, zeros[len(one) :])]
    return torch.cat(tuple(factors)).to(dtype)


class _Gradients(NamedTuple):
    """What ``backward`` of a way makes: part [T, in] of dx, and those of each A [r, in] and B [out, r]. Its ``dtype``
    is the widest of the factors', for a cast of all at once."""

    x: Tensor | None
    A: Sequence[Any]
    B: Sequence[Any]


class _Batched:
    """All spans in one product each."""

    @staticmethod
    def forward(spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Tensor, part: Tensor) -> list[Tensor | None]:
        x, y = _Batched.of(spans, tokens), _Batched.of(spans, part)
        h = torch.bmm(x, downs.view(len(spans), -1, x.shape[2]).mT)  # [N, t, r]
        h *= _Batched.scales(spans, x)
        torch.bmm(h, ups.view(len(spans), -1, y.shape[2]), out=y)
        return [h]

    @staticmethod
    def backward(
        spans: Sequence[Span], tokens: Tensor, dy: Tensor, downs: Tensor, ups: Tensor, h: list[Any], needs: Any,
        dtype: torch.dtype,
    ) -> _Gradients:  # fmt: skip
        need_x, need_A, need_B = needs
        x, dy, count = _Batched.of(spans, tokens), _Batched.of(spans, dy), len(spans)
        A, B = downs.view(count, -1, x.shape[2]), ups.view(count, -1, dy.shape[2])
        scales = _Batched.scales(spans, x)
        carried = torch.bmm(dy, B.mT)  # s (dy B), [N, t, r]
        carried *= scales
        dA: Sequence[Any] = [None] * count
        dB: Sequence[Any] = [None] * count
        if any(need_A):  # cast, and of B transposed, all at once
            dA = [own[: span.rank] for own, span in zip(torch.bmm(carried.mT, x).to(dtype), spans, strict=True)]
        if any(need_B):
            narrow = torch.bmm(x, A.mT) * scales if h[0] is None else h[0]
            whole = torch.bmm(narrow.mT, dy).mT.to(dtype).contiguous()
            dB = [own[:, : span.rank] for own, span in zip(whole, spans, strict=True)]
        dx = None
        if need_x:
            dx = tokens.new_zeros(tokens.shape) if x.numel() < tokens.numel() else tokens.new_empty(tokens.shape)
            torch.bmm(carried, A, out=_Batched.of(spans, dx))
        return _Gradients(dx, dA, dB)

    @staticmethod
    def of(spans: Sequence[Span], x: Tensor) -> Tensor:
        """x [T, n] as [N, t, n], in its own memory: what is written there is x's."""
        return x[spans[0].first : spans[-1].after].view(len(spans), -1, x.shape[1])

    @staticmethod
    def scales(spans: Sequence[Span], x: Tensor) -> Any:
        scales = [span.scale for span in spans]
        return scales[0] if len({*scales}) == 1 else x.new_tensor(scales)[:, None, None]


class _Each:
    """One span after another."""

    @staticmethod
    def forward(spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Tensor, part: Tensor) -> list[Tensor | None]:
        h: list[Tensor | None] = []
        for i, (span, down, up) in enumerate(_Each.of(spans, downs, ups)):
            own = span.of(tokens)
            narrow = fused.thin(down, own, span.dropped(own))  # [r, t]
            narrow *= span.strength
            torch.mm(narrow.mT, up, out=span.of(part))
            h.append(narrow)
            if i + 1 < len(spans):
                part[span.after : spans[i + 1].first] = 0
        return h

    @staticmethod
    def backward(
        spans: Sequence[Span], tokens: Tensor, dy: Tensor, downs: Tensor, ups: Tensor, h: list[Any], needs: Any,
        dtype: torch.dtype,
    ) -> _Gradients:  # fmt: skip
        need_x, need_A, need_B = needs
        dx = torch.zeros_like(tokens) if need_x else None
        dA: list[Any] = [None] * len(spans)
        dB: list[Any] = [None] * len(spans)
        for i, (span, down, up) in enumerate(_Each.of(spans, downs, ups)):
            own, given = span.of(tokens), span.of(dy)
            dropped, narrow = span.dropped(own), h[i]
            if narrow is None:
                narrow = fused.thin(down, own, dropped) * span.strength
            carried, grown = fused.thin_twice(up, given, narrow) if need_B[i] else (fused.thin(up, given), None)
            dB[i] = None if grown is None else grown.mT
            carried *= span.strength  # s (dy B)ᵀ, [r, t]
            part, dA[i] = fused.thin_back(carried, down, own, dropped, need_x, need_A[i])
            if dx is not None:
                span.of(dx).copy_(part)
        return _Gradients(dx, dA, dB)

    @staticmethod
    def of(spans: Sequence[Span], downs: Tensor, ups: Tensor) -> Any:
        """Each span with its own factors."""
        ranks = [span.rank for span in spans]
        return zip(spans, downs.split(ranks), ups.split(ranks), strict=True)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    first, second, third, weight, downs, ups, *rest = ctx.saved_tensors
    spans, count, need_x = ctx.spans, len(ctx.spans), ctx.needs_input_grad[1]
    factors, h = rest[: 2 * count], rest[2 * count :]
    x = again(SavedInput(first, second, third, ctx.gate), need_x)
    needs = need_x, ctx.needs_input_grad[4 : 4 + count], ctx.needs_input_grad[4 + count :]
    if torch.is_grad_enabled():

        def plain(x: Tensor, *factors: Tensor) -> list[Tensor]:
            return [_definition(spans, x, weight, factors)]

        drops = max(span.dropout for span in spans)
        dx, *grown = reference.gradients_of(plain, (x, *factors), (need_x, *needs[1], *needs[2]), [dy], drops)
        return None, dx, None, None, *grown
    tokens, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dtype = functools.reduce(torch.promote_types, {one.dtype for one in factors})
    part, dA, dB = ctx.way.backward(spans, tokens, dy, downs, ups, h, needs, dtype)
    dx = None if part is None else part.addmm_(dy, weight).view(ctx.shape)
    grown = [
        fused.as_factor(own, factor) if need else None
        for own, factor, need in zip([*dA, *dB], factors, [*needs[1], *needs[2]], strict=True)
    ]
    return None, dx, None, None, *grown


def _definition(spans: Sequence[Span], x: Tensor, weight: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Without a bias, whose gradient nobody asks for, and without dropout."""
    tokens = x.reshape(-1, x.shape[-1])
    y, count = F.linear(tokens, weight), len(spans)
    found, end = [], 0
    for span, down, up in zip(spans, factors[:count], factors[count:], strict=True):
        own = span.of(tokens)
        down, up = down.reshape(-1, x.shape[-1]).to(x.dtype), up.reshape(-1, span.rank).to(x.dtype)
        changed = reference.matmul_update(own, down, up, span.scale, span.of(y))
        found += [y[end : span.first], changed]
        end = span.after
    return torch.cat([*found, y[end:]]).view(*x.shape[:-1], -1)
