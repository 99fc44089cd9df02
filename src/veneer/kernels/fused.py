"""Linear layers that read one input, with their low-rank changes, as one differentiable function.

    y_i = x W_iᵀ + bias_i + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]

What autograd would do with ``reference.matmul_update`` layer by layer costs more than it must:

- h = A xᵀ for all layers is one product [R, T] (R = Σ r_i, T tokens) that reads x once; skinny products are oriented
  (rank, tokens), which BLAS runs up to several times faster than (tokens, rank);
- ΔW's part comes first and x Wᵀ is added to it inside its own product (``addmm_``), in the gradient of x too. That
  costs no pass of its own, and 16-bit outputs are rounded once, with the change in them: added to an output that has
  been rounded already, a change below half a step of its grid would vanish (at ‖ΔW‖ = 1e-4 ‖W‖, 93 % of it);
- saved are x, once for all layers (dropped already, if there is dropout), and h where it is small;
- dropout is a seed: backward draws the same entries again (see ``dropout.py``).

The backward of the backward (``create_graph=True``) goes through the reference. Everything here is plain tensor code:
it knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from veneer.kernels import dropout, reference

_C: Any = torch._C


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is right for a call: an eager one on plain dense tensors of one dtype, with a frozen weight.
    Everything else (``torch.compile``, ``torch.func``, forward-mode AD, autocast, tensor subclasses) takes the
    reference, which is plain differentiable code."""
    return (
        type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.device == weight.device
        and not weight.requires_grad
        and x.layout is torch.strided
        and not (torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag)
        and not _C._is_any_autocast_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


#: tokens up to which float32 is the faster dtype of a thin product
FEW = 32


class Settings(NamedTuple):
    """What a call is besides its tensors.

    Fields:
        scales: s_i.
        dropout: probability of dropping an entry of x on the low-rank path; one draw, by ``seed``, serves all layers.
        form: x is multiplied by W_i + s_i B_i A_i, formed anew in forward and in backward, in place of adding the
            product of the thin factors. Not with dropout, and not in 16 bits, where the sum would lose a small change.
    """

    scales: tuple[float, ...]
    dropout: float = 0.0
    seed: int = 0
    form: bool = False


def linears(
    settings: Settings,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """y_i for each layer, in the dtype of x; differentiable in x, the biases, A and B.

    Args:
        x: [*, in], floating point.
        weights: [out_i, in] of the dtype of x; they get no gradient.
        biases: [out_i] or None, of the dtype of x.
        A, B: [r_i, in] and [out_i, r_i] of any floating-point dtype: computed in that of x, gradients in their own.

    Raises:
        ValueError: ``form`` with dropout or in 16 bits.
    """
    if settings.form and (settings.dropout or x.element_size() < 4):
        raise ValueError("W + ΔW is formed in float32 or float64 only, and without dropout")
    return _apply(settings, x, *weights, *biases, *A, *B)


def _forward(settings: Settings, x, weights, biases, A, B):
    """(outputs, what the low-rank path read [T, in], h [T, R] or None)."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, in]
    factors = zip(weights, biases, A, B, settings.scales, strict=True)
    if settings.form:
        return _shaped([F.linear(tokens, _formed(W, A, B, s), bias) for W, bias, A, B, s in factors], x), tokens, None
    read = dropout.zeroed(tokens, settings.dropout, settings.seed) if settings.dropout else tokens
    h = _thin(read, _joined(A, x.dtype).mT)  # [T, R]
    ys, start = [], 0
    for weight, bias, _, up, scale in factors:
        own = slice(start, start := start + up.shape[1])
        part = h[:, own] @ _scaled(up, scale / (1 - settings.dropout), x.dtype).mT  # [T, out]
        ys.append(part.addmm_(tokens, weight.mT) if bias is None else _biased(part, tokens, weight, bias))
    return _shaped(ys, x), read, h


def _thin(x: Tensor, factor: Tensor) -> Tensor:
    """x [T, k] times a narrow factor [k, R]: [T, R], laid out [R, T] in float32, where a processor's library may take
    five times as long the other way round; in 16 bits it is that way round which takes longer."""
    return x @ factor if x.element_size() < 4 else (factor.mT @ x.mT).mT


def _biased(part: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """part + x Wᵀ + bias, rounded once, where torch has a product that takes a bias and a summand."""
    if part.dtype.itemsize >= 4:
        return part.add_(bias).addmm_(tokens, weight.mT)
    if part.device.type == "cpu" and part.dtype is torch.bfloat16 and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise.binary(tokens, part, weight, bias, "add")
    return part.addmm_(tokens, weight.mT).add_(bias)  # rounded twice


def _shaped(ys: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(_shaped_as(y, x) for y in ys)


def _shaped_as(y: Tensor, x: Tensor) -> Tensor:
    """y [T, out] as [*, out]. ``data`` forgets that it is a view: those that a function makes may not be modified in
    place, as ``nn.ReLU(inplace=True)`` does."""
    return y.view(*x.shape[:-1], y.shape[1]).data


def _scaled(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (up * scale).to(dtype)


def _formed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A [out, in], in the dtype and layout of W."""
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    if weight.is_contiguous():
        return torch.addmm(weight, up, down, alpha=scale)
    return torch.addmm(weight.mT, down.mT, up.mT, alpha=scale).mT


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The factors A below each other, [R, in]."""
    return (factors[0] if len(factors) == 1 else torch.cat(tuple(factors))).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, x, *tensors):
        outputs, read, h = _forward(settings, x, *_apart(tensors))
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, x.shape
        # h is a small part of x unless ranks are large; then it is cheaper to compute than to keep
        keep = h is not None and h.shape[1] * 8 <= read.shape[1]
        ctx.save_for_backward(read if settings.dropout else x, h if keep else None, *tensors)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, *gradients)


class _Linear(torch.autograd.Function):
    """The same for one layer without dropout."""

    @staticmethod
    def forward(ctx, scale: float, x, weight, bias, A, B):
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        down, wide = A if A.dtype == x.dtype else A.to(x.dtype), x.dtype.itemsize >= 4
        h = (down @ tokens.mT).mT if wide else tokens @ down.mT  # [T, r]; _thin, without its calls
        up = B * scale
        part = h @ (up if up.dtype == x.dtype else up.to(x.dtype)).mT  # [T, out]
        if wide and bias is not None:
            part += bias
        y = part.addmm_(tokens, weight.mT) if wide or bias is None else _biased(part, tokens, weight, bias)
        ctx.settings, ctx.shape = scale, x.shape
        # what ctx.save_for_backward does, without a call
        ctx.to_save = x, h if A.shape[0] * 8 <= A.shape[1] else None, weight, bias, A, B
        return y if x.ndim == 2 else y.view(*x.shape[:-1], B.shape[0]).data

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, *gradients)


# ``Function.apply`` spends a dozen Python calls on ``torch.func``, whose transforms never come here (``applies``).
_apply = cast(Any, super(torch.autograd.Function, _Linears)).apply
#: (scale, x, weight, bias, A, B) -> y: ``linears`` of one layer without dropout, in as few Python calls as can be
linear = cast(Any, super(torch.autograd.Function, _Linear)).apply


def unrecorded(scale: float, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """``linear`` without a graph, to the same bits, but for few tokens of a 16-bit layer with float32 factors: those
    form B A x in float32, where products so small cost less, and a single one is a vector, for which bfloat16 has a
    product of its own, twice as fast as that of matrices."""
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    dtype, wide = x.dtype, x.dtype.itemsize >= 4
    if not wide and A.dtype is torch.float32 and tokens.shape[0] <= FEW:
        part = (((tokens.float() @ A.mT) * scale) @ B.mT).to(dtype)
        if bias is None and dtype is torch.bfloat16 and tokens.shape[0] == 1 and x.is_cpu and weight.stride(1) == 1:
            part[0].addmv_(weight, tokens[0])
            return part.view(*x.shape[:-1], B.shape[0])
    else:
        down, up = A if A.dtype == dtype else A.to(dtype), B * scale
        h = (down @ tokens.mT).mT if wide else tokens @ down.mT
        part = h @ (up if up.dtype == dtype else up.to(dtype)).mT
    if wide and bias is not None:
        part += bias
    y = part.addmm_(tokens, weight.mT) if wide or bias is None else _biased(part, tokens, weight, bias)
    return y.view(*x.shape[:-1], B.shape[0])


def _backward(ctx, *gradients):
    """Of both functions: in the dtypes of forward, which ran without autocast."""
    if not _C._is_any_autocast_enabled():
        return _gradients(ctx, *gradients)
    device = next(gradient.device.type for gradient in gradients if gradient is not None)
    with torch.autocast(device, enabled=False):
        return _gradients(ctx, *gradients)


def _gradients(ctx, *gradients):
    saved, kept, *tensors = ctx.saved_tensors
    if not isinstance(ctx.settings, Settings):
        ctx.settings = Settings((ctx.settings,))
    settings, weights, biases, A, B = ctx.settings, *_apart(tensors)
    if torch.is_grad_enabled():
        return _differentiable(ctx, saved, weights, biases, A, B, gradients)
    need_x, need = ctx.needs_input_grad[1], _apart(ctx.needs_input_grad[2:])
    read = saved.reshape(-1, saved.shape[-1])  # [T, in]
    dys = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]  # [T, out]
    joined = _joined(A, read.dtype)  # [R, in]
    h = _thin(read, joined.mT) if kept is None else kept  # [T, R]
    db, dB, thins = [None] * len(A), [None] * len(A), []
    start = 0
    for number, (dy, up) in enumerate(zip(dys, B, strict=True)):
        own = slice(start, start := start + up.shape[1])
        if dy is None:
            thins.append(read.new_zeros(read.shape[0], up.shape[1]))
            continue
        scale = settings.scales[number] / (1 - settings.dropout)
        thins.append(_thin(dy, _scaled(up, scale, dy.dtype)))
        if need[1][number]:
            db[number] = dy.sum(0)
        if need[3][number]:
            dB[number] = (h[:, own].mT @ dy).mT.to(up.dtype) * scale
    U = thins[0] if len(thins) == 1 else torch.cat(thins, 1)  # s dy B, [T, R]
    dx = _carried(dys, weights, A, B, U, joined, settings).view(ctx.shape) if need_x else None
    dA: list[Any] = [None] * len(A)
    if any(need[2]):
        parts = (U.mT @ read).to(A[0].dtype).split([down.shape[0] for down in A])
        dA = [None if dy is None else part for dy, part in zip(dys, parts, strict=True)]
    return None, dx, *[None] * len(A), *db, *dA, *dB


def _carried(dys, weights, A, B, U: Tensor, joined: Tensor, settings: Settings) -> Tensor:
    """The gradient of x [T, in]: dy (W + ΔW) of all layers."""
    dx = None
    if not settings.form:
        dx = U @ joined
        if settings.dropout:
            dx.view(-1).index_fill_(0, dropout.indices(dx.numel(), settings.dropout, settings.seed, dx.device), 0)
    for dy, weight, down, up, scale in zip(dys, weights, A, B, settings.scales, strict=True):
        if dy is not None:
            through = _formed(weight, down, up, scale) if settings.form else weight
            dx = dy @ through if dx is None else dx.addmm_(dy, through)
    return joined.new_zeros(U.shape[0], joined.shape[1]) if dx is None else dx


def _apart(items: Sequence):
    """(weights, biases, A, B) from one sequence of them all."""
    count = len(items) // 4
    return tuple(items[part * count : (part + 1) * count] for part in range(4))


def _differentiable(ctx, x, weights, biases, A, B, gradients):
    """The gradients as functions that have gradients themselves, by the reference. It runs on aliases: x may itself
    depend on the bias, if the layer is called twice, and that is not this call's part of its gradient."""
    if ctx.settings.dropout:
        raise NotImplementedError("a gradient of a gradient through dropout: call eval(), or set dropout to 0")
    tensors: list[Any] = [None if one is None else one.view_as(one) for one in (x, *weights, *biases, *A, *B)]
    x, (weights, biases, A, B) = tensors[0], _apart(tensors[1:])
    ys = [
        reference.matmul_update(x, down.to(x.dtype), up.to(x.dtype), scale, F.linear(x, weight, bias))
        for weight, bias, down, up, scale in zip(weights, biases, A, B, ctx.settings.scales, strict=True)
    ]
    known = [(y, gradient) for y, gradient in zip(ys, gradients, strict=True) if gradient is not None]
    wanted = [value for value, need in zip(tensors, ctx.needs_input_grad[1:], strict=True) if need]
    outputs, weights_of = zip(*known, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, weights_of, create_graph=True, allow_unused=True))
    return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])
