"""Linear layers that read the same input x, with low-rank changes, as one differentiable function,
for a CPU.

    y_i = x W_iᵀ + bias_i + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]

Differences from applying ``reference.matmul_update`` to each layer:

- h = A xᵀ of all layers is one product [R, T] (R = Σ r_i ranks, T tokens) that reads x once. In
  float32, it is computed as [ranks, tokens], which BLAS computes up to several times faster than
  [tokens, ranks].
- The low-rank term s · h Bᵀ is computed first, and ``addmm_`` adds x Wᵀ to it in place; the
  gradient of x is computed in the same order. This order needs no further pass over memory, and
  rounds 16-bit outputs once, including the low-rank term. If the term were added to the rounded
  x Wᵀ, every part of it below half a step of the 16-bit dtype would be lost (93 % of the entries at
  ‖ΔW‖ = 1e-4 ‖W‖).
- Backward needs x, h and the casts of A and B. x is saved once for all layers. If autograd saves
  factors from which x can be recomputed, these are saved instead (``saved_inputs.py``). h is saved
  only if it is small compared with x.
- The gradients of all A are one product and one cast; the gradient of each A is a view of it.
- Dropout saves only a seed, from which backward draws the same entries again (``dropout.py``).

A gradient of a gradient (``create_graph=True``) is computed by ``reference.matmul_update``.
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
    onednn_supports_bfloat16,
    reference,
    split_equally,
    weight_first,
    without_autocast,
)
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input

_C: Any = torch._C


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions of this module support a call with this input and weight: an eager call
    without autocast, x and the weight are plain dense tensors of one dtype on a CPU, and the weight
    is frozen. ``device.py`` supports other devices, and ``reference.py`` supports everything else
    (torch.compile, torch.func, autocast, tensor subclasses, …)."""
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
        # Under torch.jit.trace, a size is a tensor. This test is cheaper than a call of
        # torch.jit.is_tracing.
        and type(x.shape[0]) is int
        and not _C._is_any_autocast_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


#: the most tokens of a 16-bit layer for which the products with A and B are faster in float32
MAX_FLOAT32_TOKENS = 32


class Settings(NamedTuple):
    """The options of a call of ``linears``.

    Fields:
        scales: s_i, the factor of B_i A_i of each layer.
        dropout: probability of dropping an entry of x on the low-rank path. ``seed`` determines the
            dropped entries, which are the same for all layers.
        forms_weight: whether to multiply x by the sum W_i + s_i B_i A_i, computed in forward and
            again in backward, instead of adding a low-rank product. Not allowed with dropout, nor
            in 16 bits, because a 16-bit sum would lose a small B_i A_i.
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
    """y_i [*, out_i] of each layer, in the dtype of x; differentiable in x, the biases, A and B.

    Args:
        x: [*, in], for which ``applies`` is true with each weight.
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
    """thin_factor @ drop(x)ᵀ, [R, T], with thin_factor [R, k] (A or Bᵀ) and x [T, k]. drop sets the
    entries of x with the flat indices ``dropped`` to zero. In 16 bits, x @ thin_factorᵀ is faster,
    so the result is a transposed view of that product, and not contiguous."""
    if dropped is not None:
        x = dropout.zero_entries(x, dropped)
    if x.dtype.itemsize < 4:
        return torch.mm(x, thin_factor.t()).t()
    return thin_factor @ x.mT


def thin_gradients(
    u: Tensor, joined_A: Tensor, x: Tensor, dropped: Tensor | None, need_x: bool, need_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dA): the gradients of x and ``joined_A`` through h = joined_A drop(x)ᵀ, from the
    gradient ``u`` [R, T] of h. They are uᵀ joined_A [T, in] and u drop(x) [R, in], or None if not
    needed.

    Args:
        joined_A: the A of all layers, [R, in].
        x: [T, in].
        dropped: the flat indices of the entries that are zero in drop(x), and so in dx; None
            without dropout.
    """
    dx = torch.mm(u.t(), joined_A) if need_x else None
    if dropped is not None:
        x = dropout.zero_entries(x, dropped) if need_A else x
        dx = None if dx is None else dx.view(-1).index_fill_(0, dropped, 0).view(x.shape)
    return dx, torch.mm(u, x) if need_A else None


def add_product(
    change: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allows_weight_first: bool = False,
) -> Tensor:
    """change + x Wᵀ + bias, written to ``change`` [T, out], the low-rank term of a layer, and
    returned. x: [T, in]; the ``weight`` W: [out, in]. With a bias in 16 bits, the result is rounded
    once if torch has a kernel for it, else twice.

    ``allows_weight_first``: whether x Wᵀ may be computed as (W xᵀ)ᵀ, which is faster for a few
    tokens but not bitwise equal (``weight_first.py``). True in a decoding step; also allowed inside
    of ``with weight_first.use()``."""
    if (allows_weight_first or weight_first.STATE.is_used) and weight_first.suits(x, weight):
        return weight_first.add_product(change, x, weight, bias)
    if bias is None:
        return change.addmm_(x, weight.mT)
    if change.dtype.itemsize >= 4:
        change += bias
        return change.addmm_(x, weight.mT)
    if not change.is_cpu:
        return device.add_frozen_product(change, x, weight, bias)
    is_bfloat16 = change.dtype is torch.bfloat16
    if is_bfloat16 and torch.backends.mkldnn.enabled and onednn_supports_bfloat16():
        return torch.ops.mkldnn._linear_pointwise.binary(x, change, weight, bias, "add")
    return change.addmm_(x, weight.mT).add_(bias)  # rounded twice


def match_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """The ``gradient`` [m, n] of A or B in the dtype and shape of this ``factor``, [m, n] or
    [1, m, n]."""
    if gradient.dtype != factor.dtype:
        gradient = gradient.to(factor.dtype, memory_format=torch.contiguous_format)
    return gradient if factor.ndim == 2 else gradient[None]


def _as_matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B, of shape [m, n] or [1, m, n], as [m, n] in ``dtype``."""
    factor = factor if factor.ndim == 2 else factor[0]
    return factor if factor.dtype == dtype else factor.to(dtype)


def _join_factors(
    A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor]]:
    """(the A of all layers, joined along the rank to [R, in]; the B [out, r] of each layer), in
    ``dtype``."""
    joined_A = _as_matrix(A[0] if len(A) == 1 else torch.cat(tuple(A), -2), dtype)
    return joined_A, [_as_matrix(layer_B, dtype) for layer_B in B]


def _split_layers(joined_rows: Tensor, B_by_layer: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split ``joined_rows`` [R, *], which has one row for each rank of each layer, into [r_i, *]
    for each layer. The ranks r_i are read from the B [out_i, r_i] of each layer."""
    return (
        (joined_rows,)
        if len(B_by_layer) == 1
        else joined_rows.split_with_sizes([layer_B.shape[-1] for layer_B in B_by_layer])
    )


def _join_layers(rows_by_layer: Sequence[Tensor]) -> Tensor:
    """Join the tensors [r_i, T] of all layers along the rank to [R, T], in the memory layout of the
    given tensors: contiguous, or transposed as the 16-bit results of ``thin_product``."""
    if len(rows_by_layer) == 1:
        return rows_by_layer[0]
    if rows_by_layer[0].is_contiguous():
        return torch.cat(tuple(rows_by_layer))
    return torch.cat([layer_rows.t() for layer_rows in rows_by_layer], 1).t()


def _scale_layers(joined_rows: Tensor, B_by_layer: Sequence[Tensor], settings: Settings) -> Tensor:
    """Multiply the rows of each layer i in ``joined_rows`` [R, T] by s_i / (1 - dropout), in place,
    and return ``joined_rows``. The layer has r_i of these rows, the rank of its B [out_i, r_i]."""
    scales = settings.scales
    if scales.count(scales[0]) == len(scales):
        joined_rows *= scales[0] / (1 - settings.dropout)
    else:
        for layer_rows, scale in zip(_split_layers(joined_rows, B_by_layer), scales, strict=True):
            layer_rows *= scale / (1 - settings.dropout)
    return joined_rows


def _form_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale · B A [out, in], in the dtype and memory layout of the ``weight`` W."""
    B, A = _as_matrix(B, weight.dtype), _as_matrix(A, weight.dtype)
    if weight.is_contiguous():
        return torch.addmm(weight, B, A, alpha=scale)
    return torch.addmm(weight.mT, A.mT, B.mT, alpha=scale).mT


# ---- several layers that read the same input


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, x, *layer_tensors):
        weights, biases, A, B = split_equally(layer_tensors, 4)
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        h, casts = None, (None,) * (1 + len(B))
        if settings.forms_weight:
            factors = zip(weights, biases, A, B, settings.scales, strict=True)
            ys = [
                F.linear(tokens, _form_weight(W, layer_A, layer_B, scale), bias)
                for W, bias, layer_A, layer_B, scale in factors
            ]
        else:
            joined_A, cast_B = _join_factors(A, B, x.dtype)
            dropped = dropout.draw_dropped(tokens, settings.dropout, settings.seed)
            h = _scale_layers(thin_product(joined_A, tokens, dropped), cast_B, settings)  # [R, T]
            factors = zip(_split_layers(h, cast_B), cast_B, weights, biases, strict=True)
            ys = [
                add_product(torch.mm(layer_h.t(), layer_B.t()), tokens, W, bias)
                for layer_h, layer_B, W, bias in factors
            ]
            # h is saved only if it is at most an eighth of x; a larger h is recomputed in backward
            h = h if h.shape[0] * 8 <= x.shape[-1] else None
            if A[0].dtype != x.dtype:
                casts = joined_A, *cast_B
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, x.shape
        *saved, ctx.gate = input_to_save(x)
        ctx.save_for_backward(*saved, h, *casts, *layer_tensors)
        # Autograd forbids in-place changes (as by ``nn.ReLU(inplace=True)``) of a view that a
        # custom function returns. It does not treat `.data` as a view.
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    @staticmethod
    @without_autocast
    def backward(ctx, *dys):
        x_or_factor, factor2, factor3, h, joined_A, *saved_tensors = ctx.saved_tensors
        cast_B, layer_tensors = saved_tensors[: len(dys)], saved_tensors[len(dys) :]
        x = restore_input(
            SavedInput(x_or_factor, factor2, factor3, ctx.gate), ctx.needs_input_grad[1]
        )
        settings = ctx.settings
        if torch.is_grad_enabled():
            return _differentiable_gradients(
                ctx, settings.scales, settings.dropout, x, layer_tensors, dys
            )
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        dys = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]  # [T, out]
        weights, _, A, B = split_equally(layer_tensors, 4)
        if joined_A is None:
            joined_A, cast_B = _join_factors(A, B, x.dtype)
        _, need_bias, need_A, need_B = split_equally(ctx.needs_input_grad[2:], 4)
        need_x = ctx.needs_input_grad[1]
        dropped = dropout.draw_dropped(tokens, settings.dropout, settings.seed)
        if h is None:
            h = _scale_layers(thin_product(joined_A, tokens, dropped), cast_B, settings)  # [R, T]
        u, dB = _output_gradients(dys, cast_B, _split_layers(h, cast_B), need_B)
        u = _scale_layers(u, cast_B, settings)  # s · (dy B)ᵀ of each layer, [R, T]
        dx, joined_dA = thin_gradients(
            u, joined_A, tokens, dropped, need_x and not settings.forms_weight, True in need_A
        )
        if need_x:  # add dy W of each layer to the low-rank dx; or, if dx is None, dy (W + ΔW)
            for dy, W, layer_A, layer_B, scale in zip(
                dys, weights, A, B, settings.scales, strict=True
            ):
                if dy is not None:
                    W = _form_weight(W, layer_A, layer_B, scale) if settings.forms_weight else W
                    dx = torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)
            dx = (torch.zeros_like(tokens) if dx is None else dx).view(ctx.shape)
        pairs = zip(dys, need_bias, strict=True)
        db = [dy.sum(0) if need and dy is not None else None for dy, need in pairs]
        dA: list[Any] = [None] * len(A)
        if joined_dA is not None:
            if len({layer_A.dtype for layer_A in A}) == 1:  # one cast for the A of all layers
                joined_dA = joined_dA.to(A[0].dtype)
            triples = zip(dys, _split_layers(joined_dA, cast_B), A, strict=True)
            dA = [
                None if dy is None else match_factor(layer_gradient, layer_A)
                for dy, layer_gradient, layer_A in triples
            ]
        pairs = zip(dB, B, strict=True)
        dB = [
            None if layer_gradient is None else match_factor(layer_gradient.t(), layer_B)
            for layer_gradient, layer_B in pairs
        ]
        return None, dx, *[None] * len(A), *db, *dA, *dB


def _output_gradients(
    dys: Sequence[Tensor | None],
    B_by_layer: Sequence[Tensor],
    h_by_layer: Sequence[Tensor],
    needs_dB: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """(u, dB): (dy B)ᵀ of all layers, joined to [R, T], and for each layer the gradient h dy
    [r, out] of Bᵀ. The latter is None if ``needs_dB`` is False or dy is None for the layer."""
    u_by_layer, dB_by_layer = [], []
    for dy, layer_B, layer_h, needs_gradient in zip(
        dys, B_by_layer, h_by_layer, needs_dB, strict=True
    ):
        u_by_layer.append(
            torch.zeros_like(layer_h) if dy is None else thin_product(layer_B.t(), dy)
        )
        dB_by_layer.append(torch.mm(layer_h, dy) if needs_gradient and dy is not None else None)
    return _join_layers(u_by_layer), dB_by_layer


# ---- one layer without dropout


class _Linear(torch.autograd.Function):
    """``_Linears`` for one layer without dropout, with few Python calls. ``forward`` may be called
    directly with ctx None; then nothing is saved for backward."""

    @staticmethod
    def forward(ctx, scale: float, x, weight, bias, A, B):
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dtype = x.dtype
        cast_A, cast_B = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
        needs_cast = A.dtype != dtype or B.dtype != dtype
        if needs_cast:
            cast_A, cast_B = cast_A.to(dtype), cast_B.to(dtype)
        # h [T, r]; in float32, the product in the order [r, T] is faster (as in ``thin_product``)
        h = torch.mm(tokens, cast_A.mT) if dtype.itemsize < 4 else torch.mm(cast_A, tokens.mT).mT
        h *= scale
        y = add_product(torch.mm(h, cast_B.mT), tokens, weight, bias)  # [T, out]
        if ctx is not None:
            ctx.scale, ctx.shape = scale, x.shape
            h = h if cast_A.shape[0] * 8 <= x.shape[-1] else None
            # Assigning ``ctx.to_save`` does what ``ctx.save_for_backward`` does, without its call.
            saved, ctx.gate = (x, None, None), None
            if x.grad_fn is not None:
                *saved, ctx.gate = input_to_save(x)
            casts = (cast_A, cast_B) if needs_cast else (None, None)
            ctx.to_save = (*saved, h, *casts, weight, bias, A, B)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]).data

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        x_or_factor, factor2, factor3, h, cast_A, cast_B, weight, bias, A, B = ctx.saved_tensors
        _, need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad
        x = restore_input(SavedInput(x_or_factor, factor2, factor3, ctx.gate), need_x)
        if torch.is_grad_enabled():
            layer_tensors = (weight, bias, A, B)
            return _differentiable_gradients(ctx, (ctx.scale,), 0.0, x, layer_tensors, (dy,))
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dy = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
        if cast_A is None:
            cast_A, cast_B = _as_matrix(A, x.dtype), _as_matrix(B, x.dtype)
        h = thin_product(cast_A, tokens).mul_(ctx.scale).t() if h is None else h  # [T, r]
        dB = torch.mm(h.t(), dy) if need_B else None  # [r, out]
        u = thin_product(cast_B.t(), dy).mul_(ctx.scale)  # [r, T]
        dx, dA = thin_gradients(u, cast_A, tokens, None, need_x, need_A)
        dx = None if dx is None else dx.addmm_(dy, weight).view(ctx.shape)
        db = dy.sum(0) if need_bias else None
        dA = None if dA is None else match_factor(dA, A)
        return None, dx, None, db, dA, None if dB is None else match_factor(dB.t(), B)


# ``apply`` of the C++ base class skips the dozen Python calls that ``Function.apply`` makes for the
# transforms of ``torch.func``. Calls under a transform never reach this function (see ``applies``).
_apply = cast(Any, super(torch.autograd.Function, _Linears)).apply
#: (scale, x, weight, bias, A, B) -> y: ``linears`` for one layer without dropout, with as few
#: Python calls as possible
linear = cast(Any, super(torch.autograd.Function, _Linear)).apply


def linear_without_graph(
    scale: float, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> Tensor:
    """``linear`` without an autograd graph. The results are bitwise those of ``linear``, except in
    two cases with float32 A and B: for a single token in float32, products of a matrix and a vector
    are used, and for at most ``MAX_FLOAT32_TOKENS`` tokens in 16 bits, (x Aᵀ) Bᵀ is computed in
    float32. Both are faster."""
    dtype, in_ = x.dtype, x.shape[-1]
    is_one_token, is_16_bit = x.numel() == in_, dtype.itemsize < 4
    has_few_tokens = x.numel() <= MAX_FLOAT32_TOKENS * in_ if is_16_bit else is_one_token
    has_float32_factors = A.dtype is torch.float32 and B.dtype is torch.float32
    if not (has_few_tokens and has_float32_factors and dtype is not torch.float64):
        return _Linear.forward(None, scale, x, weight, bias, A, B)
    tokens = x if x.ndim == 2 else x.reshape(-1, in_)
    A_matrix, B_matrix = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
    float32_tokens = tokens.float() if is_16_bit else tokens
    if is_one_token:
        h = torch.mv(A_matrix, float32_tokens[0])
        change = torch.addmv(h[:1], B_matrix, h, beta=0, alpha=scale)[None]
    else:
        change = ((float32_tokens @ A_matrix.mT) * scale) @ B_matrix.mT
    change = change.to(dtype) if is_16_bit else change
    is_vector_faster = not is_16_bit or (dtype is torch.bfloat16 and has_amx())
    if is_one_token and bias is None and is_vector_faster and x.is_cpu and weight.stride(1) == 1:
        change[0].addmv_(weight, tokens[0])
    else:
        change = add_product(change, tokens, weight, bias)
    return change.view(*x.shape[:-1], change.shape[1])


# ---- gradients of gradients


def _differentiable_gradients(
    ctx: Any,
    scales: Sequence[float],
    drop_probability: float,
    x: Tensor,
    layer_tensors: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
) -> Any:
    outputs_of, needs_gradient = (
        functools.partial(_differentiable_outputs, scales),
        ctx.needs_input_grad[1:],
    )
    return None, *reference.gradients_of(
        outputs_of, (x, *layer_tensors), needs_gradient, dys, drop_probability
    )


def _differentiable_outputs(scales: Sequence[float], x: Tensor, *layer_tensors) -> list[Tensor]:
    return [
        reference.matmul_update(
            x,
            _as_matrix(layer_A, x.dtype),
            _as_matrix(layer_B, x.dtype),
            scale,
            F.linear(x, weight, bias),
        )
        for weight, bias, layer_A, layer_B, scale in zip(
            *split_equally(layer_tensors, 4), scales, strict=True
        )
    ]
