"""A linear layer on a batch in which different tokens use different adapters: each span of
neighbouring tokens has its own low-rank factors. One differentiable function.

    y = x Wᵀ + bias,  and on the tokens of span i:  + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W: [out, in]   A_i: [r_i, in]   B_i: [out, r_i]

W is frozen, so x Wᵀ is one product for all tokens, in forward and in backward. Each low-rank
product reads the tokens of one span only, so that no value of it (such as a NaN) reaches the output
or gradient of another span. If all spans are equally long and have no dropout, batched products
compute them together, also for several layers that read the same x; smaller ranks are padded by
zeros. Otherwise, the products of ``fused.py`` compute one span after another. As in ``fused.py``,
the low-rank term is computed first, and x Wᵀ is added to it in place. Saved for backward are x, and
h = drop(x) Aᵀ if it is small.

The factors of all spans are joined by ``torch.cat`` before the autograd function is called, so that
it has one argument for A and one for each layer's B. Passing the 16 factors of eight adapters
separately, in forward and backward, took longer than the products of 16 tokens.
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
    """The neighbouring tokens ``first`` … ``after`` - 1 of a batch, which use the same adapter; the
    rank and scale of this adapter; and the probability and seed of its dropout."""

    first: int
    after: int
    rank: int
    scale: float
    dropout: float = 0.0
    seed: int = 0

    @property
    def strength(self) -> float:
        """The factor of drop(x) Aᵀ Bᵀ: the scale, divided by the probability with which dropout
        keeps an entry of x."""
        return self.scale / (1 - self.dropout)

    def select(self, x: Tensor) -> Tensor:
        """A view of the span's rows of x, which has one row for each token of the batch."""
        return x[self.first : self.after]

    def drop_entries(self, x: Tensor) -> Tensor | None:
        """The flat indices of the entries of x that dropout sets to zero, or None without dropout.
        x [t, in] holds the span's tokens only, so that the same entries are dropped as in a batch
        of these tokens alone."""
        return draw_dropped(x, self.dropout, self.seed)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spans: Sequence[Span],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> Tensor:
    """x Wᵀ + bias, plus the low-rank term of each span on its tokens: [*, out], in the dtype of x.
    Differentiable in x and all factors. Requires that ``fused.applies(x, weight)`` is true.

    Args:
        x: [*, in].
        weight, bias: W [out, in], frozen, and [out] or None.
        spans: in the order of the tokens, without overlap. Tokens that are in no span get
            x Wᵀ + bias.
        A, B: for each span, [1, r_i, in] and [1, out, r_i] of any floating-point dtype. They are
            cast to the dtype of x.
    """
    if not spans:
        return F.linear(x, weight, bias)
    if can_batch(spans):
        return linears(x, [weight], [bias], spans, [A], [B])[0]
    joined_A, joined_transposed_B = (
        torch.cat(tuple(A), 1)[0],
        torch.cat([span_B.mT for span_B in B], 1)[0],
    )
    return _apply(
        tuple(spans), x, joined_A.to(x.dtype), joined_transposed_B.to(x.dtype), weight, bias
    )[0]


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spans: Sequence[Span],
    A: Sequence[Sequence[Tensor]],
    B: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """``linear`` for several layers that read the same x: one output for each weight. ``A[i]`` and
    ``B[i]`` hold the factors of layer i for each span. ``can_batch(spans)`` must be true: the spans
    are adjacent and equally long."""
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
    # The A of all layers and spans are joined, so that they need one autograd node, one cast and
    # one gradient. The gradient of each A is a view of it.
    A_by_span = itertools.chain(*zip(*A, strict=True))
    joined_A = torch.cat(tuple(A_by_span)).to(x.dtype)  # [spans · layers, r, in]
    # each [spans, out, r]
    B_by_layer = [torch.cat(tuple(layer_factors)).to(x.dtype) for layer_factors in B]
    return _apply(tuple(spans), x, joined_A, *B_by_layer, *weights, *biases)


def can_batch(spans: Sequence[Span]) -> bool:
    """Whether batched products can and should compute all spans at once: there are several, they
    are adjacent, equally long and without dropout, and padding all ranks to the largest at most
    doubles their sum."""
    first_token, span_length = spans[0].first, spans[0].after - spans[0].first
    ranks = [span.rank for span in spans]
    return (
        len(spans) > 1
        and max(ranks) * len(ranks) <= 2 * sum(ranks)
        and all(
            span.first == first_token + i * span_length
            and span.after == span.first + span_length
            and not span.dropout
            for i, span in enumerate(spans)
        )
    )


class _Linears(Function):
    """Linear layers that read the same x, with one adapter for each span of tokens.

    Args of ``forward``:
        joined_A: the A of all spans: [spans · layers, r, in] if ``can_batch(spans)`` is true. Else
            there is one layer, and joined_A is [R, in], joined along the ranks of all spans.
        tensors: B of each layer, then W of each layer, then the bias of each layer. B is
            [spans, out, r] if ``can_batch(spans)``, else Bᵀ [R, out].
    """

    @staticmethod
    def forward(
        ctx: Any, spans: tuple[Span, ...], x: Tensor, joined_A: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        B_by_layer, weights, biases = split_equally(tensors, 3)
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        low_rank_outputs = [tokens.new_empty(len(tokens), weight.shape[0]) for weight in weights]
        if spans[-1].after - spans[0].first < tokens.shape[0]:
            for low_rank_output in low_rank_outputs:
                low_rank_output[: spans[0].first] = 0
                low_rank_output[spans[-1].after :] = 0
        method: Any = _Batched if joined_A.ndim == 3 else _OneByOne
        h = method.forward(spans, tokens, joined_A, B_by_layer, low_rank_outputs)
        ys = [
            fused.add_product(low_rank_output, tokens, *weight_and_bias)
            for low_rank_output, *weight_and_bias in zip(
                low_rank_outputs, weights, biases, strict=True
            )
        ]
        ctx.spans, ctx.shape, ctx.method = spans, x.shape, method
        *saved, ctx.gate = input_to_save(x)
        h = h if max(span.rank for span in spans) * 8 <= x.shape[-1] else [None] * len(h)
        ctx.save_for_backward(*saved, joined_A, *B_by_layer, *weights, *h)
        # Autograd forbids in-place changes of a view that a custom function returns, and does not
        # treat `.data` as a view.
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *dys: Tensor) -> Any:
        return _gradients(ctx, dys)


# ``apply`` of the C++ base class skips the dozen Python calls that ``Function.apply`` makes for the
# transforms of ``torch.func``. Calls under a transform never reach this function (see
# ``fused.applies``).
_apply = cast(Any, super(Function, _Linears)).apply


#: the results of ``backward``: the gradient [T, in] of x through the low-rank products, the
#: gradient of ``joined_A`` in its shape, and the gradient of each B in its shape
_Gradients = tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]


class _Batched:
    """The low-rank products of all spans together, as batched products for N spans of t tokens
    each. h is computed as [N, r, t], because products with the tokens as the last axis are faster,
    in float32 and in 16 bits."""

    @staticmethod
    def forward(
        spans: Sequence[Span],
        tokens: Tensor,
        joined_A: Tensor,
        B_by_layer: Any,
        low_rank_outputs: Any,
    ) -> list[Tensor | None]:
        x, span_count = _Batched.by_span(spans, tokens), len(spans)
        h = torch.bmm(joined_A.view(span_count, -1, x.shape[2]), x.mT)  # [N, layers · r, t]
        h *= _Batched.scales(spans, x)
        for layer_h, layer_B, low_rank_output in zip(
            h.split(joined_A.shape[1], 1), B_by_layer, low_rank_outputs, strict=True
        ):
            torch.bmm(layer_h.mT, layer_B.mT, out=_Batched.by_span(spans, low_rank_output))
        return [h]

    @staticmethod
    def backward(
        spans: Sequence[Span],
        tokens: Tensor,
        dys: Sequence[Tensor],
        joined_A: Tensor,
        B_by_layer: Any,
        h: list[Any],
        needs_gradient: Any,
    ) -> _Gradients:
        need_x, need_A, *need_B_by_layer = needs_gradient
        x, span_count, rank = _Batched.by_span(spans, tokens), len(spans), joined_A.shape[1]
        A, scales = joined_A.view(span_count, -1, x.shape[2]), _Batched.scales(spans, x)
        dys = [_Batched.by_span(spans, dy) for dy in dys]
        u_by_layer = [
            torch.bmm(layer_B.mT, dy.mT) for layer_B, dy in zip(B_by_layer, dys, strict=True)
        ]
        u = u_by_layer[0] if len(u_by_layer) == 1 else torch.cat(u_by_layer, 1)
        u *= scales  # s · (dy B)ᵀ, [N, layers · r, t]
        dB: list[Tensor | None] = [None] * len(B_by_layer)
        if any(need_B_by_layer):
            all_h = torch.bmm(A, x.mT) * scales if h[0] is None else h[0]
            for i, (layer_h, dy, need) in enumerate(
                zip(all_h.split(rank, 1), dys, need_B_by_layer, strict=True)
            ):
                dB[i] = torch.bmm(layer_h, dy).mT.contiguous() if need else None
        dA = torch.bmm(u, x).view(joined_A.shape) if need_A else None
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
        """A view [N, t, n] of the rows of x [T, n] that belong to the N spans, with t tokens each.
        Writing to the view writes to x."""
        return x[spans[0].first : spans[-1].after].view(len(spans), -1, x.shape[1])

    @staticmethod
    def scales(spans: Sequence[Span], x: Tensor) -> Any:
        """The scales of the N spans: one number if all are equal, else a tensor [N, 1, 1] with the
        dtype and device of x."""
        scales = [span.scale for span in spans]
        return (
            scales[0]
            if scales.count(scales[0]) == len(scales)
            else x.new_tensor(scales)[:, None, None]
        )


class _OneByOne:
    """The low-rank products of one layer, computed for one span after another."""

    @staticmethod
    def forward(
        spans: Sequence[Span],
        tokens: Tensor,
        joined_A: Tensor,
        B_by_layer: Any,
        low_rank_outputs: Any,
    ) -> list[Tensor | None]:
        h: list[Tensor | None] = []
        for i, (span, span_A, transposed_B) in enumerate(
            _OneByOne.with_factors(spans, joined_A, B_by_layer[0])
        ):
            span_tokens = span.select(tokens)
            # [r, t]
            span_h = fused.thin_product(span_A, span_tokens, span.drop_entries(span_tokens))
            span_h *= span.strength
            torch.mm(span_h.mT, transposed_B, out=span.select(low_rank_outputs[0]))
            h.append(span_h)
            if i + 1 < len(spans):
                low_rank_outputs[0][span.after : spans[i + 1].first] = 0
        return h

    @staticmethod
    def backward(
        spans: Sequence[Span],
        tokens: Tensor,
        dys: Sequence[Tensor],
        joined_A: Tensor,
        B_by_layer: Any,
        h: list[Any],
        needs_gradient: Any,
    ) -> _Gradients:
        need_x, need_A, need_B = needs_gradient
        dx = torch.zeros_like(tokens) if need_x else None
        dA: list[Any] = []
        dB: list[Any] = []
        for i, (span, span_A, transposed_B) in enumerate(
            _OneByOne.with_factors(spans, joined_A, B_by_layer[0])
        ):
            span_tokens, span_dy = span.select(tokens), span.select(dys[0])
            dropped, span_h = span.drop_entries(span_tokens), h[i]
            if span_h is None:
                span_h = fused.thin_product(span_A, span_tokens, dropped) * span.strength
            if need_B:
                dB.append(torch.mm(span_h, span_dy))
            u = fused.thin_product(transposed_B, span_dy)
            u *= span.strength  # s · (dy B)ᵀ, [r, t]
            span_dx, span_dA = fused.thin_gradients(u, span_A, span_tokens, dropped, need_x, need_A)
            dA.append(span_dA)
            if dx is not None:
                span.select(dx).copy_(span_dx)
        return dx, torch.cat(dA) if need_A else None, [torch.cat(dB) if need_B else None]

    @staticmethod
    def with_factors(spans: Sequence[Span], joined_A: Tensor, joined_transposed_B: Tensor) -> Any:
        """An iterator over (span, A [r, in], Bᵀ [r, out]) of each span. ``joined_A`` [R, in] and
        ``joined_transposed_B`` [R, out] hold the A and Bᵀ of all spans, joined along the rank."""
        ranks = [span.rank for span in spans]
        return zip(spans, joined_A.split(ranks), joined_transposed_B.split(ranks), strict=True)


def _gradients(ctx: Any, dys: Sequence[Tensor]) -> tuple[Any, ...]:
    layer_count, spans, needs_gradient = len(dys), ctx.spans, ctx.needs_input_grad[1 : 3 + len(dys)]
    x_or_factor, factor2, factor3, joined_A, *saved_tensors = ctx.saved_tensors
    B_by_layer, weights, h = (
        saved_tensors[:layer_count],
        saved_tensors[layer_count : 2 * layer_count],
        saved_tensors[2 * layer_count :],
    )
    x = restore_input(SavedInput(x_or_factor, factor2, factor3, ctx.gate), needs_gradient[0])
    no_gradients = (None,) * (2 * layer_count)
    if torch.is_grad_enabled():

        def outputs_of(x: Tensor, joined_A: Tensor, *B_by_layer: Tensor) -> list[Tensor]:
            return _differentiable_outputs(spans, x, joined_A, B_by_layer, weights)

        max_dropout = max(span.dropout for span in spans)
        return (
            None,
            *reference.gradients_of(
                outputs_of, (x, joined_A, *B_by_layer), needs_gradient, dys, max_dropout
            ),
            *no_gradients,
        )
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    dx, dA, dB = ctx.method.backward(
        spans, x.reshape(-1, x.shape[-1]), dys, joined_A, B_by_layer, h, needs_gradient
    )
    if dx is not None:
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(ctx.shape)
    return None, dx, dA, *dB, *no_gradients


def _differentiable_outputs(
    spans: Sequence[Span],
    x: Tensor,
    joined_A: Tensor,
    B_by_layer: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """The outputs of the layers by differentiable operations, without dropout, for a gradient of a
    gradient. Biases are left out, because the gradients of x, A and B do not depend on them.

    Args:
        joined_A, B_by_layer: as ``joined_A`` and B in ``_Linears``.
    """
    tokens, layer_count = x.reshape(-1, x.shape[-1]), len(weights)
    outputs = []
    for layer, (weight, layer_B) in enumerate(zip(weights, B_by_layer, strict=True)):
        y, previous_end = F.linear(tokens, weight), 0
        if joined_A.ndim == 3:
            factors: Any = zip(spans, joined_A[layer::layer_count], layer_B, strict=True)
        else:
            spans_with_factors = _OneByOne.with_factors(spans, joined_A, layer_B)
            factors = (
                (span, span_A, transposed_B.mT) for span, span_A, transposed_B in spans_with_factors
            )
        output_blocks = []
        for span, span_A, span_B in factors:
            changed_rows = reference.matmul_update(
                span.select(tokens), span_A, span_B, span.scale, span.select(y)
            )
            output_blocks += [y[previous_end : span.first], changed_rows]
            previous_end = span.after
        outputs.append(torch.cat([*output_blocks, y[previous_end:]]).view(*x.shape[:-1], -1))
    return outputs
