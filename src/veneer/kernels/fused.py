"""Linear layers that read the same input x, with low-rank changes, as one differentiable function.

    y_i = x W_iᵀ + bias_i + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]

Differences from applying ``reference.matmul_update`` to each layer:

- h = A xᵀ of all layers is one product [R, T] (R = Σ r_i ranks, T tokens) that reads x once. In
  float32, a thin product is computed as [ranks, tokens], up to several times faster in BLAS than
  as [tokens, ranks].
- The change is computed first, and the product x Wᵀ adds its result to the change in place
  (``addmm_``); the gradient of x is computed in the same order. This needs no further pass over
  memory, and 16-bit outputs are rounded once, including the change. Adding the change to a rounded
  output would lose changes below half a step of its grid (at ‖ΔW‖ = 1e-4 ‖W‖, 93 % of them).
- Backward needs x, h and the casts of A and B. x is saved once for all layers; if autograd saves
  tensors from which x can be recomputed, they are saved instead (``saved_inputs.py``). h is saved
  only if it is small.
- The gradients of all A are one product and one cast; the gradient of each A is a view of it.
- Dropout saves only a seed, from which backward draws the same entries again (``dropout.py``).

A gradient of a gradient (``create_graph=True``) is computed by the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from veneer.kernels import (
    device,
    dropout,
    has_amx,
    reference,
    split_equally,
    weight_first,
    without_autocast,
)
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input

_C: Any = torch._C


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether this module supports a call: an eager call, with plain dense tensors of one dtype on
    a CPU, and a frozen weight. ``device.py`` supports other devices, and the reference supports
    everything else (torch.compile, torch.func, autocast, tensor subclasses, …)."""
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and not weight.requires_grad
        and x.layout is torch.strided
        and not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and x.ndim > 0
        # under torch.jit.trace a size is a tensor; testing its type needs no call
        and type(x.shape[0]) is int
        and not _C._is_any_autocast_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


#: the most tokens for which products with A and B are faster in float32 than in 16 bits
MAX_FLOAT32_TOKENS = 32


class Settings(NamedTuple):
    """The options of a call.

    Fields:
        scales: s_i.
        dropout: probability of dropping an entry of x on the low-rank path. ``seed`` determines the
            dropped entries, which are the same for all layers.
        forms_weight: multiply x by the sum W_i + s_i B_i A_i, computed in forward and again in
            backward, instead of adding a low-rank product. Not with dropout, and not in 16 bits,
            where the sum would lose a small change.
    """

    scales: tuple[float, ...]
    dropout: float = 0.0
    seed: int = 0
    forms_weight: bool = False


def linears(
    settings: Settings,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i of each layer, in the dtype of x; differentiable in x, the biases, A and B.

    Args:
        x: [*, in], floating point.
        weights: of each layer, [out_i, in] of the dtype of x; they get no gradient.
        biases: of each layer, [out_i] of the dtype of x, or None.
        A, B: of each layer, [r_i, in] and [out_i, r_i] of any floating-point dtype. All of them may
            have a first axis of size 1. They are cast to the dtype of x, and get gradients in their
            own dtype.

    Raises:
        ValueError: ``forms_weight`` with dropout or in 16 bits.
    """
    if settings.forms_weight and (settings.dropout or x.element_size() < 4):
        raise ValueError("W + ΔW is formed in float32 or float64 only, and without dropout")
    return _apply(settings, x, *weights, *biases, *A, *B)


# ---- products with A or B, which are thin: one side is the rank


def thin_product(thin_factor: Tensor, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """thin_factor @ drop(x)ᵀ, [R, T], with thin_factor [R, k] and x [T, k]. drop sets the entries
    of x with the flat indices ``dropped`` to zero. In 16 bits, where x @ thin_factorᵀ is faster,
    the result is a transposed view of that product."""
    if dropped is not None:
        x = dropout.zero_entries(x, dropped)
    if x.dtype.itemsize < 4:
        return torch.mm(x, thin_factor.t()).t()
    return thin_factor @ x.mT


def thin_gradients(
    U: Tensor, joined_A: Tensor, x: Tensor, dropped: Tensor | None, need_x: bool, need_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(the gradient of x through the low-rank products, Uᵀ joined_A [T, in]; the gradient of
    joined_A, U drop(x) [R, in]) for U [R, T], joined_A [R, in] and x [T, in]. The entries with the
    flat indices ``dropped`` are zero in drop(x) and in the gradient of x. A gradient that is not
    needed is None."""
    dx = torch.mm(U.t(), joined_A) if need_x else None
    if dropped is not None:
        x = dropout.zero_entries(x, dropped) if need_A else x
        dx = None if dx is None else dx.view(-1).index_fill_(0, dropped, 0).view(x.shape)
    return dx, torch.mm(U, x) if need_A else None


def add_product(
    change: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allows_weight_first: bool = False,
) -> Tensor:
    """change + x Wᵀ + bias, in place. Rounded once if torch has a kernel for it.
    ``allows_weight_first``: whether ``weight_first`` may compute x Wᵀ, as in a block of
    ``weight_first.use``; for a decoding step."""
    if (allows_weight_first or weight_first.STATE.is_used) and weight_first.suits(x, weight):
        return weight_first.add_product(change, x, weight, bias)
    if bias is None:
        return change.addmm_(x, weight.mT)
    if change.dtype.itemsize >= 4:
        change += bias
        return change.addmm_(x, weight.mT)
    if not change.is_cpu:
        return device.add_frozen_product(change, x, weight, bias)
    if change.dtype is torch.bfloat16 and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise.binary(x, change, weight, bias, "add")
    return change.addmm_(x, weight.mT).add_(bias)  # rounded twice


def match_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient [m, n] of a factor, in the dtype and shape of the factor."""
    if gradient.dtype != factor.dtype:
        gradient = gradient.to(factor.dtype, memory_format=torch.contiguous_format)
    return gradient if factor.ndim == 2 else gradient[None]


def _as_matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor [m, n] or [1, m, n] as [m, n], in ``dtype``."""
    factor = factor if factor.ndim == 2 else factor[0]
    return factor if factor.dtype == dtype else factor.to(dtype)


def _join_factors(
    A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor]]:
    """All A, joined along the rank [R, in], and each B [out, r], in ``dtype``."""
    joined_A = _as_matrix(A[0] if len(A) == 1 else torch.cat(tuple(A), -2), dtype)
    return joined_A, [_as_matrix(up, dtype) for up in B]


def _split_layers(rows: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split a tensor [R, *] along the ranks of all layers, into [r_i, *] for each layer."""
    return (rows,) if len(ups) == 1 else rows.split_with_sizes([up.shape[-1] for up in ups])


def _join_layers(rows: Sequence[Tensor]) -> Tensor:
    """Join tensors [r_i, T] of all layers along the rank, in the layout of ``thin_product``."""
    if len(rows) == 1:
        return rows[0]
    if rows[0].is_contiguous():
        return torch.cat(tuple(rows))
    return torch.cat([layer_rows.t() for layer_rows in rows], 1).t()


def _scale_layers(rows: Tensor, ups: Sequence[Tensor], settings: Settings) -> Tensor:
    """Multiply the rows [r_i, T] of each layer in [R, T] by the layer's scale, in place."""
    scales = settings.scales
    if scales.count(scales[0]) == len(scales):
        rows *= scales[0] / (1 - settings.dropout)
    else:
        for layer_rows, scale in zip(_split_layers(rows, ups), scales, strict=True):
            layer_rows *= scale / (1 - settings.dropout)
    return rows


def _form_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A [out, in], in the dtype and layout of W."""
    up, down = _as_matrix(up, weight.dtype), _as_matrix(down, weight.dtype)
    if weight.is_contiguous():
        return torch.addmm(weight, up, down, alpha=scale)
    return torch.addmm(weight.mT, down.mT, up.mT, alpha=scale).mT


# ---- several layers that read the same input


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, x, *tensors):
        weights, biases, A, B = split_equally(tensors, 4)
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        h, casts = None, (None,) * (1 + len(B))
        if settings.forms_weight:
            factors = zip(weights, biases, A, B, settings.scales, strict=True)
            ys = [
                F.linear(tokens, _form_weight(W, down, up, scale), bias)
                for W, bias, down, up, scale in factors
            ]
        else:
            joined_A, ups = _join_factors(A, B, x.dtype)
            dropped = dropout.draw_dropped(tokens, settings.dropout, settings.seed)
            h = _scale_layers(thin_product(joined_A, tokens, dropped), ups, settings)  # [R, T]
            factors = zip(_split_layers(h, ups), ups, weights, biases, strict=True)
            ys = [
                add_product(torch.mm(layer_h.t(), up.t()), tokens, W, bias)
                for layer_h, up, W, bias in factors
            ]
            # h is small compared with x unless ranks are large; a large h is recomputed in backward
            h = h if h.shape[0] * 8 <= x.shape[-1] else None
            if A[0].dtype != x.dtype:
                casts = joined_A, *ups
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, x.shape
        *saved, ctx.gate = input_to_save(x)
        ctx.save_for_backward(*saved, h, *casts, *tensors)
        # `.data` is no view for autograd. Views that a custom function returns may not be modified
        # in place, as by ``nn.ReLU(inplace=True)``
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    @without_autocast
    def backward(ctx, *dys):
        first, second, third, h, joined_A, *saved_lists = ctx.saved_tensors
        ups, tensors = saved_lists[: len(dys)], saved_lists[len(dys) :]
        x = restore_input(SavedInput(first, second, third, ctx.gate), ctx.needs_input_grad[1])
        settings = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable_gradients(
                ctx, settings.scales, settings.dropout, x, tensors, dys
            )
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]  # [T, out]
        weights, _, A, B = split_equally(tensors, 4)
        if joined_A is None:
            joined_A, ups = _join_factors(A, B, x.dtype)
        _, need_bias, need_A, need_B = split_equally(ctx.needs_input_grad[2:], 4)
        need_x = ctx.needs_input_grad[1]
        dropped = dropout.draw_dropped(tokens, settings.dropout, settings.seed)
        if h is None:
            h = _scale_layers(thin_product(joined_A, tokens, dropped), ups, settings)  # [R, T]
        U, dB = _output_gradients(dys, ups, _split_layers(h, ups), need_B)
        U = _scale_layers(U, ups, settings)  # s · (dy B)ᵀ of each layer, [R, T]
        dx, joined_dA = thin_gradients(
            U, joined_A, tokens, dropped, need_x and not settings.forms_weight, True in need_A
        )
        if need_x:  # add dy W of all layers to the low-rank gradient, or compute dy (W + ΔW)
            for dy, W, down, up, scale in zip(dys, weights, A, B, settings.scales, strict=True):
                if dy is not None:
                    W = _form_weight(W, down, up, scale) if settings.forms_weight else W
                    dx = torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)
            dx = (torch.zeros_like(tokens) if dx is None else dx).view(ctx.shape)
        pairs = zip(dys, need_bias, strict=True)
        db = [dy.sum(0) if need and dy is not None else None for dy, need in pairs]
        dA: list[Any] = [None] * len(A)
        if joined_dA is not None:
            if len({down.dtype for down in A}) == 1:  # one cast for all layers
                joined_dA = joined_dA.to(A[0].dtype)
            triples = zip(dys, _split_layers(joined_dA, ups), A, strict=True)
            dA = [None if dy is None else match_factor(rows, down) for dy, rows, down in triples]
        pairs = zip(dB, B, strict=True)
        dB = [None if rows is None else match_factor(rows.t(), up) for rows, up in pairs]
        return None, dx, *[None] * len(A), *db, *dA, *dB


def _output_gradients(
    dys: Sequence[Tensor | None], ups: Sequence[Tensor], h: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """(dy B)ᵀ of all layers [R, T], and for each layer h dy [r, out] if its B needs a gradient."""
    u_of_layers, gradients = [], []
    for dy, up, layer_h, need in zip(dys, ups, h, needs, strict=True):
        u_of_layers.append(torch.zeros_like(layer_h) if dy is None else thin_product(up.t(), dy))
        gradients.append(torch.mm(layer_h, dy) if need and dy is not None else None)
    return _join_layers(u_of_layers), gradients


# ---- one layer without dropout


class _Linear(torch.autograd.Function):
    """``_Linears`` for one layer without dropout, with few Python calls. If ctx is None, nothing is
    saved for backward."""

    @staticmethod
    def forward(ctx, scale: float, x, weight, bias, A, B):
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dtype = x.dtype
        down, up = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
        needs_cast = A.dtype != dtype or B.dtype != dtype
        if needs_cast:
            down, up = down.to(dtype), up.to(dtype)
        # [T, r], computed as in ``thin_product``
        h = torch.mm(tokens, down.mT) if dtype.itemsize < 4 else torch.mm(down, tokens.mT).mT
        h *= scale
        y = add_product(torch.mm(h, up.mT), tokens, weight, bias)  # [T, out]
        if ctx is not None:
            ctx.scale, ctx.shape = scale, x.shape
            h = h if down.shape[0] * 8 <= x.shape[-1] else None
            # this is ``ctx.save_for_backward``, without a Python call
            saved, ctx.gate = (x, None, None), None
            if x.grad_fn is not None:
                *saved, ctx.gate = input_to_save(x)
            casts = (down, up) if needs_cast else (None, None)
            ctx.to_save = (*saved, h, *casts, weight, bias, A, B)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]).data

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        first, second, third, h, down, up, weight, bias, A, B = ctx.saved_tensors
        _, need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad
        x = restore_input(SavedInput(first, second, third, ctx.gate), need_x)
        if torch.is_grad_enabled():
            tensors = (weight, bias, A, B)
            return _differentiable_gradients(ctx, (ctx.scale,), 0.0, x, tensors, (dy,))
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dy = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
        if down is None:
            down, up = _as_matrix(A, x.dtype), _as_matrix(B, x.dtype)
        h = thin_product(down, tokens).mul_(ctx.scale).t() if h is None else h  # [T, r]
        dB = torch.mm(h.t(), dy) if need_B else None  # [r, out]
        U = thin_product(up.t(), dy).mul_(ctx.scale)  # [r, T]
        dx, dA = thin_gradients(U, down, tokens, None, need_x, need_A)
        dx = None if dx is None else dx.addmm_(dy, weight).view(ctx.shape)
        db = dy.sum(0) if need_bias else None
        dA = None if dA is None else match_factor(dA, A)
        return None, dx, None, db, dA, None if dB is None else match_factor(dB.t(), B)


# This skips ``Function.apply``, which makes a dozen Python calls for the transforms of
# ``torch.func``: calls under a transform never reach this function (see ``applies``).
_apply = cast(Any, super(torch.autograd.Function, _Linears)).apply
#: (scale, x, weight, bias, A, B) -> y: ``linears`` for one layer without dropout, with as few
#: Python calls as possible
linear = cast(Any, super(torch.autograd.Function, _Linear)).apply


def linear_without_graph(
    scale: float, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> Tensor:
    """``linear`` without a graph. The results are bitwise those of ``linear``, except for one token
    in float32, where products of a matrix and a vector are faster, and for a few tokens in 16 bits
    with float32 A and B, where B A x is computed in float32, which is faster."""
    dtype, width = x.dtype, x.shape[-1]
    is_one_token, is_narrow = x.numel() == width, dtype.itemsize < 4
    has_few_tokens = x.numel() <= MAX_FLOAT32_TOKENS * width if is_narrow else is_one_token
    uses_float32 = A.dtype is torch.float32 and B.dtype is torch.float32
    if not (has_few_tokens and uses_float32 and dtype is not torch.float64):
        return _Linear.forward(None, scale, x, weight, bias, A, B)
    tokens = x if x.ndim == 2 else x.reshape(-1, width)
    down, up = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
    wide_tokens = tokens.float() if is_narrow else tokens
    if is_one_token:
        h = torch.mv(down, wide_tokens[0])
        change = torch.addmv(h[:1], up, h, beta=0, alpha=scale)[None]
    else:
        change = ((wide_tokens @ down.mT) * scale) @ up.mT
    change = change.to(dtype) if is_narrow else change
    is_vector_faster = not is_narrow or (dtype is torch.bfloat16 and has_amx())
    if is_one_token and bias is None and is_vector_faster and x.is_cpu and weight.stride(1) == 1:
        change[0].addmv_(weight, tokens[0])
    else:
        change = add_product(change, tokens, weight, bias)
    return change.view(*x.shape[:-1], change.shape[1])


# ---- gradients of gradients


def _differentiable_gradients(
    ctx: Any,
    scales: Sequence[float],
    p: float,
    x: Tensor,
    tensors: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
) -> Any:
    definition, needs = functools.partial(_definition, scales), ctx.needs_input_grad[1:]
    return None, *reference.gradients_of(definition, (x, *tensors), needs, dys, p)


def _definition(scales: Sequence[float], x: Tensor, *tensors) -> list[Tensor]:
    return [
        reference.matmul_update(
            x, _as_matrix(down, x.dtype), _as_matrix(up, x.dtype), scale, F.linear(x, weight, bias)
        )
        for weight, bias, down, up, scale in zip(*split_equally(tensors, 4), scales, strict=True)
    ]
