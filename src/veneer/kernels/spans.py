"""A linear layer on a batch in which different tokens use different adapters: each span of
neighbouring tokens has its own low-rank factors. One differentiable function.

    y = x Wᵀ + bias,  and on the tokens of span i:  + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W: [out, in]   A_i: [r_i, in]   B_i: [out, r_i]

W is frozen, so x Wᵀ is one product for all tokens, in forward and in backward. The low-rank
products use only the tokens of one span, so that nothing of it (such as a NaN) reaches the output
or gradient of another span. If all spans are equally long and have no dropout, batched products
compute them together, also for several layers that read the same x; smaller ranks are padded by
zeros. Otherwise, the products of ``fused.py`` compute one span after another. As in ``fused.py``,
the change is computed first, and x Wᵀ is added to it. Saved for backward are x, and h = drop(x) Aᵀ
if it is small.

All factors of a layer are passed as one tensor, which autograd's ``cat`` joins. Passing the 16
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

from veneer.kernels import fused, reference, split_equally, without_autocast
from veneer.kernels.dropout import draw_dropped
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input


class Span(NamedTuple):
    """The tokens ``first`` … ``after`` - 1; the rank and scale of their change; and the probability
    and seed of dropout."""

    first: int
    after: int
    rank: int
    scale: float
    dropout: float = 0.0
    seed: int = 0

    @property
    def strength(self) -> float:
        """The scale, divided by the probability of keeping an entry of x."""
        return self.scale / (1 - self.dropout)

    def select(self, x: Tensor) -> Tensor:
        """A view of the span's rows of x [T, ·]."""
        return x[self.first : self.after]

    def drop_entries(self, x: Tensor) -> Tensor | None:
        """Flat indices of the dropped entries of the span's tokens [t, in]; None without dropout.
        They are the same as in a call on these tokens alone."""
        return draw_dropped(x, self.dropout, self.seed)


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
        A, B: of each span, [1, r_i, in] and [1, out, r_i] of any floating-point dtype. They are
            cast to the dtype of x.
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
    """``linear`` for several layers that read the same x. A and B hold the factors of all spans for
    each layer. The spans must be adjacent and equally long (``can_batch``)."""
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
    # joined, the A of all layers need one autograd node, one cast and one gradient; the gradient of
    # each A is a view
    A_by_span = itertools.chain(*zip(*A, strict=True))
    downs = torch.cat(tuple(A_by_span)).to(x.dtype)  # [spans · layers, r, in]
    ups = [torch.cat(tuple(layer_factors)).to(x.dtype) for layer_factors in B]  # [spans, out, r]
    return _apply(tuple(spans), x, downs, *ups, *weights, *biases)


def can_batch(spans: Sequence[Span]) -> bool:
    """Whether spans can be computed as one batch: if they are adjacent and equally long, without
    dropout, and the ranks are similar."""
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
    """``tensors``: B of each layer, then W of each layer, then the bias of each layer. For spans
    that ``can_batch``, ``downs`` is [spans · layers, r, in] and each B [spans, out, r]. Else there
    is one layer, with ``downs`` [R, in] and B [R, out], joined along the ranks of all spans."""

    @staticmethod
    def forward(
        ctx: Any, spans: tuple[Span, ...], x: Tensor, downs: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ups, weights, biases = split_equally(tensors, 3)
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        changes = [tokens.new_empty(len(tokens), weight.shape[0]) for weight in weights]
        if spans[-1].after - spans[0].first < tokens.shape[0]:
            for change in changes:
                change[: spans[0].first] = 0
                change[spans[-1].after :] = 0
        products: Any = _Batched if downs.ndim == 3 else _OneByOne
        h = products.forward(spans, tokens, downs, ups, changes)
        ys = [
            fused.add_product(change, tokens, *weight_and_bias)
            for change, *weight_and_bias in zip(changes, weights, biases, strict=True)
        ]
        ctx.spans, ctx.shape, ctx.products = spans, x.shape, products
        *saved, ctx.gate = input_to_save(x)
        h = h if max(span.rank for span in spans) * 8 <= x.shape[-1] else [None] * len(h)
        ctx.save_for_backward(*saved, downs, *ups, *weights, *h)
        # `.data` is no view for autograd, as in ``fused.py``
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *dys: Tensor) -> Any:
        return _gradients(ctx, dys)


# As in ``fused.py``, this skips ``Function.apply``, whose Python calls serve the transforms of
# ``torch.func``. Calls under a transform never reach this function.
_apply = cast(Any, super(Function, _Linears)).apply


#: the results of ``backward``: the gradient [T, in] of x through the low-rank products, and the
#: gradients of A and B, in the shapes of ``downs`` and ``ups``
_Gradients = tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]


class _Batched:
    """All spans together, by batched products: N spans of t tokens. h is computed as [N, r, t],
    because products with the tokens as the last axis are faster, in float32 and in 16 bits."""

    @staticmethod
    def forward(
        spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Any, changes: Any
    ) -> list[Tensor | None]:
        x, count = _Batched.by_span(spans, tokens), len(spans)
        h = torch.bmm(downs.view(count, -1, x.shape[2]), x.mT)  # [N, layers · r, t]
        h *= _Batched.scales(spans, x)
        for layer_h, up, change in zip(h.split(downs.shape[1], 1), ups, changes, strict=True):
            torch.bmm(layer_h.mT, up.mT, out=_Batched.by_span(spans, change))
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
        x, count, rank = _Batched.by_span(spans, tokens), len(spans), downs.shape[1]
        A, scales = downs.view(count, -1, x.shape[2]), _Batched.scales(spans, x)
        dys = [_Batched.by_span(spans, dy) for dy in dys]
        us = [torch.bmm(up.mT, dy.mT) for up, dy in zip(ups, dys, strict=True)]
        u = us[0] if len(us) == 1 else torch.cat(us, 1)
        u *= scales  # s · (dy B)ᵀ, [N, layers · r, t]
        dB: list[Tensor | None] = [None] * len(ups)
        if any(need_ups):
            all_h = torch.bmm(A, x.mT) * scales if h[0] is None else h[0]
            for i, (layer_h, dy, need) in enumerate(
                zip(all_h.split(rank, 1), dys, need_ups, strict=True)
            ):
                dB[i] = torch.bmm(layer_h, dy).mT.contiguous() if need else None
        dA = torch.bmm(u, x).view(downs.shape) if need_downs else None
        dx = None
        if need_x:
            dx = (
                tokens.new_zeros(tokens.shape)
                if x.numel() < tokens.numel()
                else tokens.new_empty(tokens.shape)
            )
            torch.bmm(u.mT, A, out=_Batched.by_span(spans, dx))
        return dx, dA, dB

    @staticmethod
    def by_span(spans: Sequence[Span], x: Tensor) -> Tensor:
        """View the rows [T, n] of all spans as [N, t, n]. Writing to the view writes to x."""
        return x[spans[0].first : spans[-1].after].view(len(spans), -1, x.shape[1])

    @staticmethod
    def scales(spans: Sequence[Span], x: Tensor) -> Any:
        """The scales of the spans: one number if they are equal, else a tensor [N, 1, 1]."""
        scales = [span.scale for span in spans]
        return (
            scales[0]
            if scales.count(scales[0]) == len(scales)
            else x.new_tensor(scales)[:, None, None]
        )


class _OneByOne:
    """One span after another."""

    @staticmethod
    def forward(
        spans: Sequence[Span], tokens: Tensor, downs: Tensor, ups: Any, changes: Any
    ) -> list[Tensor | None]:
        h: list[Tensor | None] = []
        for i, (span, down, up) in enumerate(_OneByOne.with_factors(spans, downs, ups[0])):
            span_tokens = span.select(tokens)
            span_h = fused.thin_product(down, span_tokens, span.drop_entries(span_tokens))  # [r, t]
            span_h *= span.strength
            torch.mm(span_h.mT, up, out=span.select(changes[0]))
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
        for i, (span, down, up) in enumerate(_OneByOne.with_factors(spans, downs, ups[0])):
            span_tokens, span_dy = span.select(tokens), span.select(dys[0])
            dropped, span_h = span.drop_entries(span_tokens), h[i]
            if span_h is None:
                span_h = fused.thin_product(down, span_tokens, dropped) * span.strength
            if need_B:
                dB.append(torch.mm(span_h, span_dy))
            u = fused.thin_product(up, span_dy)
            u *= span.strength  # s · (dy B)ᵀ, [r, t]
            span_dx, gradient = fused.thin_gradients(u, down, span_tokens, dropped, need_x, need_A)
            dA.append(gradient)
            if dx is not None:
                span.select(dx).copy_(span_dx)
        return dx, torch.cat(dA) if need_A else None, [torch.cat(dB) if need_B else None]

    @staticmethod
    def with_factors(spans: Sequence[Span], downs: Tensor, ups: Tensor) -> Any:
        """(span, A [r, in], Bᵀ [r, out]) of each span."""
        ranks = [span.rank for span in spans]
        return zip(spans, downs.split(ranks), ups.split(ranks), strict=True)


def _gradients(ctx: Any, dys: Sequence[Tensor]) -> tuple[Any, ...]:
    count, spans, needs = len(dys), ctx.spans, ctx.needs_input_grad[1 : 3 + len(dys)]
    first, second, third, downs, *saved_lists = ctx.saved_tensors
    ups, weights, h = saved_lists[:count], saved_lists[count : 2 * count], saved_lists[2 * count :]
    x = restore_input(SavedInput(first, second, third, ctx.gate), needs[0])
    no_gradients = (None,) * (2 * count)
    if torch.is_grad_enabled():

        def definition(x: Tensor, downs: Tensor, *ups: Tensor) -> list[Tensor]:
            return _definition(spans, x, downs, ups, weights)

        dropout = max(span.dropout for span in spans)
        return (
            None,
            *reference.gradients_of(definition, (x, downs, *ups), needs, dys, dropout),
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
    """The outputs of the layers by differentiable operations, without dropout. Biases are left out,
    because only gradients of other tensors are computed from these outputs."""
    tokens, layers = x.reshape(-1, x.shape[-1]), len(weights)
    outputs = []
    for layer, (weight, up) in enumerate(zip(weights, ups, strict=True)):
        y, end = F.linear(tokens, weight), 0
        if downs.ndim == 3:
            factors: Any = zip(spans, downs[layer::layers], up, strict=True)
        else:
            triples = _OneByOne.with_factors(spans, downs, up)
            factors = ((span, down, up.mT) for span, down, up in triples)
        blocks = []
        for span, down, span_up in factors:
            changed_rows = reference.matmul_update(
                span.select(tokens), down, span_up, span.scale, span.select(y)
            )
            blocks += [y[end : span.first], changed_rows]
            end = span.after
        outputs.append(torch.cat([*blocks, y[end:]]).view(*x.shape[:-1], -1))
    return outputs
