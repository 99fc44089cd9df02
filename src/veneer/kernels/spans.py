"""A linear layer on a batch in which each span of rows has its own low-rank factors, as one
differentiable function.

    y = x Wᵀ + bias,  and on the tokens of span i:  + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W: [out, in]   A_i: [r_i, in]   B_i: [out, r_i]

W is frozen, so x Wᵀ is one product for all rows, in forward and backward. The low-rank products run
on each span's own tokens, so that nothing of one span (such as a NaN) reaches the output or
gradient of another. Spans of equal length without dropout are batched products, with smaller ranks
padded by zeros, for all layers that read the same x where possible; other spans are computed one
after another with the products of ``fused.py``. The change is computed first and x Wᵀ is added to
it, as there. Saved are x, and h where it is small.

All factors of a layer are passed as one tensor, joined by autograd's ``cat``. Passing the 16
factors of eight adapters separately, in forward and backward, took longer than the products of 16
tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from veneer.kernels import fused, reference
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input

_C: Any = torch._C


class Span(NamedTuple):
    """Tokens ``first`` to ``after``; the rank and scale of their change, and the probability and
    seed of dropout."""

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

    def drop_entries(self, x: Tensor) -> Tensor | None:
        """Indices of the dropped entries of the span's tokens [t, in], drawn as in a call on these
        tokens alone."""
        return fused.dropped_entries(x, self.dropout, self.seed)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spans: Sequence[Span],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> Tensor:
    """y [*, out] in the dtype of x; differentiable in x and all factors. Requires
    ``fused.applies``.

    Args:
        spans: in order, without overlap; tokens outside of all spans use the base.
        A, B: [1, r_i, in] and [1, out, r_i] of each span, of any floating-point dtype: computed in
            that of x.
    """
    if not spans:
        return F.linear(x, weight, bias)
    if can_batch(spans):
        return linears(x, [weight], [bias], spans, [A], [B])[0]
    downs, ups = torch.cat(tuple(A), 1)[0], torch.cat([up.mT for up in B], 1)[0]
    return _apply(tuple(spans), x, downs.to(x.dtype), ups.to(x.dtype), weight, bias)[0]


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spans: Sequence[Span],
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """``linear`` for several layers that read one x. For each layer, the factors of all spans,
    which must be adjacent and of equal length (``can_batch``)."""
    largest_rank = max(span.rank for span in spans)
    if any(span.rank != largest_rank for span in spans):
        A = [
            [F.pad(factor, (0, 0, 0, largest_rank - factor.shape[1])) for factor in layer_factors]
            for layer_factors in A
        ]
        B = [
            [F.pad(factor, (0, largest_rank - factor.shape[2])) for factor in layer_factors]
            for layer_factors in B
        ]
    # one autograd node, one cast and one gradient for the factors of all layers; each gets a view
    # of [spans · layers, r, in]
    downs = torch.cat(tuple(itertools.chain(*zip(*A, strict=True)))).to(x.dtype)
    ups = [torch.cat(tuple(layer_factors)).to(x.dtype) for layer_factors in B]  # [spans, out, r]
    return _apply(tuple(spans), x, downs, *ups, *weights, *biases)


def can_batch(spans: Sequence[Span]) -> bool:
    """Whether spans can be computed as one batch: adjacent, of equal length, and of similar
    ranks."""
    start, length = spans[0].first, spans[0].after - spans[0].first
    ranks = [span.rank for span in spans]
    return (
        len(spans) > 1
        and max(ranks) * len(ranks) <= 2 * sum(ranks)
        and all(
            span.first == start + i * length
            and span.after == span.first + length
            and not span.dropout
            for i, span in enumerate(spans)
        )
    )


class _Linears(Function):
    """``tensors``: for each layer, the factor B, the weight and the bias. Factors are [spans ·
    layers, r, in] and [spans, out, r] for spans that ``can_batch``, or [R, in] and [R, out], joined
    along the ranks, for one layer."""

    @staticmethod
    def forward(
        ctx: Any, spans: tuple[Span, ...], x: Tensor, downs: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        ups, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        changes = [tokens.new_empty(len(tokens), weight.shape[0]) for weight in weights]
        if spans[-1].after - spans[0].first < tokens.shape[0]:
            for change in changes:
                change[: spans[0].first] = 0
                change[spans[-1].after :] = 0
        products: Any = _Batched if downs.ndim == 3 else _Each
        h = products.forward(spans, tokens, downs, ups, changes)
        ys = [
            fused.add_product(change, tokens, *frozen)
            for change, *frozen in zip(changes, weights, biases, strict=True)
        ]
        ctx.spans, ctx.shape, ctx.products = spans, x.shape, products
        *made_of, ctx.gate = input_to_save(x)
        h = h if max(span.rank for span in spans) * 8 <= x.shape[-1] else [None] * len(h)
        ctx.save_for_backward(*made_of, downs, *ups, *weights, *h)
        # `.data` is no view for autograd
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not _C._is_any_autocast_enabled():
            return _gradients(ctx, dys)
        with torch.autocast(dys[0].device.type, enabled=False):
            return _gradients(ctx, dys)


# as in ``fused.py``: skips the calls of ``Function.apply`` for ``torch.func``, whose transforms
# never reach this function
_apply = cast(Any, super(Function, _Linears)).apply


class _Gradients(NamedTuple):
    """The results of ``backward``: the low-rank term [T, in] of dx, and the gradients of the
    factors in their layout."""

    x: Tensor | None
    downs: Tensor | None
    ups: Sequence[Tensor | None]


class _Batched:
    """All spans in one batched product each. Products with the tokens as the last axis are faster,
    in float32 and in 16 bits."""

    @staticmethod
    def forward(
        spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Any, changes: Any
    ) -> list[Tensor | None]:
        x, count = _Batched.of(spans, tokens), len(spans)
        h = torch.bmm(downs.view(count, -1, x.shape[2]), x.mT)  # [N, layers · r, t]
        h *= _Batched.scales(spans, x)
        for layer_h, up, change in zip(h.split(downs.shape[1], 1), ups, changes, strict=True):
            torch.bmm(layer_h.mT, up.mT, out=_Batched.of(spans, change))
        return [h]

    @staticmethod
    def backward(
        spans: Sequence[Span],
        tokens: Tensor,
        dys: Sequence[Tensor],
        downs: Tensor,
        ups: Any,
        h: list[Any],
        needs: Any,
    ) -> _Gradients:
        need_x, need_downs, *need_ups = needs
        x, count, rank = _Batched.of(spans, tokens), len(spans), downs.shape[1]
        A, scales = downs.view(count, -1, x.shape[2]), _Batched.scales(spans, x)
        dys = [_Batched.of(spans, dy) for dy in dys]
        rows = [torch.bmm(up.mT, dy.mT) for up, dy in zip(ups, dys, strict=True)]
        up_gradients = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        up_gradients *= scales  # s (dy B)ᵀ, [N, layers · r, t]
        dB: list[Tensor | None] = [None] * len(ups)
        if any(need_ups):
            all_h = torch.bmm(A, x.mT) * scales if h[0] is None else h[0]
            for i, (layer_h, dy, need) in enumerate(
                zip(all_h.split(rank, 1), dys, need_ups, strict=True)
            ):
                dB[i] = torch.bmm(layer_h, dy).mT.contiguous() if need else None
        dA = torch.bmm(up_gradients, x).view(downs.shape) if need_downs else None
        dx = None
        if need_x:
            dx = (
                tokens.new_zeros(tokens.shape)
                if x.numel() < tokens.numel()
                else tokens.new_empty(tokens.shape)
            )
            torch.bmm(up_gradients.mT, A, out=_Batched.of(spans, dx))
        return _Gradients(dx, dA, dB)

    @staticmethod
    def of(spans: Sequence[Span], x: Tensor) -> Tensor:
        """View x [T, n] as [N, t, n]; writing to the result writes to x."""
        return x[spans[0].first : spans[-1].after].view(len(spans), -1, x.shape[1])

    @staticmethod
    def scales(spans: Sequence[Span], x: Tensor) -> Any:
        scales = [span.scale for span in spans]
        return (
            scales[0]
            if scales.count(scales[0]) == len(scales)
            else x.new_tensor(scales)[:, None, None]
        )


class _Each:
    """One span after another."""

    @staticmethod
    def forward(
        spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Any, changes: Any
    ) -> list[Tensor | None]:
        h: list[Tensor | None] = []
        for i, (span, down, up) in enumerate(_Each.of(spans, downs, ups[0])):
            tokens_of_span = span.of(tokens)
            span_h = fused.thin(down, tokens_of_span, span.drop_entries(tokens_of_span))  # [r, t]
            span_h *= span.strength
            torch.mm(span_h.mT, up, out=span.of(changes[0]))
            h.append(span_h)
            if i + 1 < len(spans):
                changes[0][span.after : spans[i + 1].first] = 0
        return h

    @staticmethod
    def backward(
        spans: Sequence[Span],
        tokens: Tensor,
        dys: Sequence[Tensor],
        downs: Tensor,
        ups: Any,
        h: list[Any],
        needs: Any,
    ) -> _Gradients:
        need_x, need_A, need_B = needs
        dx = torch.zeros_like(tokens) if need_x else None
        dA: list[Any] = []
        dB: list[Any] = []
        for i, (span, down, up) in enumerate(_Each.of(spans, downs, ups[0])):
            span_tokens, span_dy = span.of(tokens), span.of(dys[0])
            dropped, span_h = span.drop_entries(span_tokens), h[i]
            if span_h is None:
                span_h = fused.thin(down, span_tokens, dropped) * span.strength
            u, gradient = (
                fused.thin_pair(up, span_dy, span_h) if need_B else (fused.thin(up, span_dy), None)
            )
            dB.append(gradient)
            u *= span.strength  # s (dy B)ᵀ, [r, t]
            span_dx, gradient = fused.thin_gradients(u, down, span_tokens, dropped, need_x, need_A)
            dA.append(gradient)
            if dx is not None:
                span.of(dx).copy_(span_dx)
        return _Gradients(
            dx, torch.cat(dA) if need_A else None, [torch.cat(dB) if need_B else None]
        )

    @staticmethod
    def of(spans: Sequence[Span], downs: Tensor, ups: Tensor) -> Any:
        """Each span with its factors."""
        ranks = [span.rank for span in spans]
        return zip(spans, downs.split(ranks), ups.split(ranks), strict=True)


def _gradients(ctx: Any, dys: Sequence[Tensor]) -> tuple[Any, ...]:
    count, spans, needs = len(dys), ctx.spans, ctx.needs_input_grad[1 : 3 + len(dys)]
    first, second, third, downs, *rest = ctx.saved_tensors
    ups, weights, h = rest[:count], rest[count : 2 * count], rest[2 * count :]
    x = restore_input(SavedInput(first, second, third, ctx.gate), needs[0])
    no_gradients = (None,) * (2 * count)
    if torch.is_grad_enabled():

        def plain(x: Tensor, downs: Tensor, *ups: Tensor) -> list[Tensor]:
            return _definition(spans, x, downs, ups, weights)

        drops = max(span.dropout for span in spans)
        return (
            None,
            *reference.gradients_of(plain, (x, downs, *ups), needs, dys, drops),
            *no_gradients,
        )
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    dx, dA, dB = ctx.products.backward(spans, x.reshape(-1, x.shape[-1]), dys, downs, ups, h, needs)
    if dx is not None:
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(ctx.shape)
    return None, dx, dA, *dB, *no_gradients


def _definition(
    spans: Sequence[Span],
    x: Tensor,
    downs: Tensor,
    ups: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """The layers by differentiable operations, without dropout and without biases, whose gradients
    are not needed."""
    tokens, layers = x.reshape(-1, x.shape[-1]), len(weights)
    outputs = []
    for layer, (weight, up) in enumerate(zip(weights, ups, strict=True)):
        y, end = F.linear(tokens, weight), 0
        if downs.ndim == 3:
            factors: Any = zip(spans, downs[layer::layers], up, strict=True)
        else:
            factors = ((span, down, up.mT) for span, down, up in _Each.of(spans, downs, up))
        pieces = []
        for span, down, span_up in factors:
            changed = reference.matmul_update(
                span.of(tokens), down, span_up, span.scale, span.of(y)
            )
            pieces += [y[end : span.first], changed]
            end = span.after
        outputs.append(torch.cat([*pieces, y[end:]]).view(*x.shape[:-1], -1))
    return outputs
