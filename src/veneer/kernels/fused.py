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
- dropout draws the few entries that it drops, not a random number for each, and draws them again in backward.

The backward of the backward (``create_graph=True``) goes through the reference. Everything here is plain tensor code:
it knows no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import reference


def linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    form: bool = False,
) -> tuple[Tensor, ...]:
    """y_i for each layer, in the dtype of x; differentiable in x, the biases, A and B.

    Args:
        x: [*, in], floating point.
        weights: [out_i, in] of the dtype of x; they get no gradient.
        biases: [out_i] or None, of the dtype of x.
        A, B: [r_i, in] and [out_i, r_i] of any floating-point dtype: computed in that of x, gradients in their own.
        scales: s_i.
        dropout: probability of dropping an entry of x on the low-rank path; one draw, from torch's default generator,
            serves all layers.
        form: multiply by W_i + s_i B_i A_i, formed anew in forward and in backward, in place of adding the product of
            the thin factors. Not with dropout, and not in 16 bits, where the sum would lose a small change.

    Raises:
        ValueError: ``form`` with dropout or in 16 bits.
    """
    if form and (dropout or x.element_size() < 4):
        raise ValueError("W + ΔW is formed in float32 or float64 only, and without dropout")
    seed = int(torch.randint(2**62, ())) if dropout else 0
    settings = _Settings(tuple(scales), dropout, seed, form)
    if not torch.is_grad_enabled():
        return _forward(settings, x, weights, biases, A, B)[0]
    return _Linears.apply(settings, x, *weights, *biases, *A, *B)  # pyright: ignore[reportReturnType]


class _Settings(NamedTuple):
    scales: tuple[float, ...]
    dropout: float
    seed: int
    form: bool


def dropped(count: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Indices of the entries that are dropped of ``count``: each independently with probability p.

    A Poisson number of draws with replacement, with λ = -ln(1 - p) an entry, hits each entry a Poisson(λ) number of
    times, independently of the others: it is missed with probability exp(-λ) = 1 - p. For a small p that takes about
    p · count random numbers instead of count. (The colouring theorem of Poisson processes; Kingman 1993, "Poisson
    Processes", section 5.1.)
    """
    generator = torch.Generator(device).manual_seed(seed)
    mean = torch.tensor(-math.log1p(-p) * count, dtype=torch.float64, device=device)
    draws = int(torch.poisson(mean, generator=generator))
    return torch.randint(count, (draws,), generator=generator, device=device)


def drop(x: Tensor, p: float, seed: int) -> Tensor:
    """A copy of x [T, in] with zeros where ``dropped`` says; not rescaled."""
    copy = x.clone(memory_format=torch.contiguous_format)
    copy.view(-1).index_fill_(0, dropped(copy.numel(), p, seed, x.device), 0)
    return copy


def _forward(settings: _Settings, x, weights, biases, A, B):
    """(outputs, what the low-rank path read [T, in], h [R, T] or None)."""
    tokens = x.reshape(-1, x.shape[-1])  # [T, in]
    factors = zip(weights, biases, A, B, settings.scales, strict=True)
    if settings.form:
        return _shaped([F.linear(tokens, _formed(W, A, B, s), bias) for W, bias, A, B, s in factors], x), tokens, None
    read = drop(tokens, settings.dropout, settings.seed) if settings.dropout else tokens
    h = _joined(A, x.dtype) @ read.mT  # [R, T]
    ys, start = [], 0
    for weight, bias, _, up, scale in factors:
        rows = slice(start, start := start + up.shape[1])
        y = (h[rows].mT @ _scaled(up, scale / (1 - settings.dropout), x.dtype).mT).addmm_(tokens, weight.mT)  # [T, out]
        ys.append(y if bias is None else y.add_(bias))
    return _shaped(ys, x), read, h


def _shaped(ys: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _scaled(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return (up * scale).to(dtype)


def _formed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A [out, in], in the dtype of W."""
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype), alpha=scale)


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The factors A below each other, [R, in]."""
    return (factors[0] if len(factors) == 1 else torch.cat(tuple(factors))).to(dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: _Settings, x, *tensors):
        outputs, read, h = _forward(settings, x, *_apart(tensors))
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, x.shape
        # h is a small part of x unless ranks are large; then it is cheaper to compute than to keep
        keep = h is not None and h.shape[0] * 8 <= read.shape[1]
        ctx.save_for_backward(read if settings.dropout else x, h if keep else None, *tensors)
        return outputs

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, h, *tensors = ctx.saved_tensors
        settings, weights, biases, A, B = ctx.settings, *_apart(tensors)
        if torch.is_grad_enabled():
            return _differentiable(ctx, saved, weights, biases, A, B, gradients)
        need_x, need = ctx.needs_input_grad[1], _apart(ctx.needs_input_grad[2:])
        read = saved.reshape(-1, saved.shape[-1])  # [T, in]
        dys = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]  # [T, out]
        joined = _joined(A, read.dtype)  # [R, in]
        h = joined @ read.mT if h is None and any(need[3]) else h
        missing = any(dy is None for dy in dys)
        U = (read.new_zeros if missing else read.new_empty)(joined.shape[0], read.shape[0])  # s Bᵀ dyᵀ, [R, T]
        db, dB = [None] * len(A), [None] * len(A)
        start = 0
        for number, (dy, up) in enumerate(zip(dys, B, strict=True)):
            rows = slice(start, start := start + up.shape[1])
            if dy is None:
                continue
            scale = settings.scales[number] / (1 - settings.dropout)
            torch.mm(_scaled(up, scale, dy.dtype).mT, dy.mT, out=U[rows])
            if need[1][number]:
                db[number] = dy.sum(0)
            if need[3][number]:
                dB[number] = (h[rows] @ dy).mT.to(up.dtype) * scale
        dx = _carried(dys, weights, A, B, U, joined, settings).view(ctx.shape) if need_x else None
        dA = (U @ read).to(A[0].dtype).split([down.shape[0] for down in A]) if any(need[2]) else [None] * len(A)
        return None, dx, *[None] * len(A), *db, *dA, *dB


def _carried(dys, weights, A, B, U: Tensor, joined: Tensor, settings: _Settings) -> Tensor:
    """The gradient of x [T, in]: dy (W + ΔW) of all layers."""
    dx = None
    if not settings.form:
        dx = U.mT @ joined
        if settings.dropout:
            dx.view(-1).index_fill_(0, dropped(dx.numel(), settings.dropout, settings.seed, dx.device), 0)
    for dy, weight, down, up, scale in zip(dys, weights, A, B, settings.scales, strict=True):
        if dy is not None:
            through = _formed(weight, down, up, scale) if settings.form else weight
            dx = dy @ through if dx is None else dx.addmm_(dy, through)
    return joined.new_zeros(U.shape[1], joined.shape[1]) if dx is None else dx


def _apart(items: Sequence):
    """(weights, biases, A, B) from one sequence of them all."""
    count = len(items) // 4
    return tuple(items[part * count : (part + 1) * count] for part in range(4))


def _differentiable(ctx, x, weights, biases, A, B, gradients):
    """The gradients as functions that have gradients themselves, by the reference."""
    if ctx.settings.dropout:
        raise NotImplementedError("a gradient of a gradient through dropout: call eval(), or set dropout to 0")
    ys = [
        reference.matmul_update(x, down.to(x.dtype), up.to(x.dtype), scale, F.linear(x, weight, bias))
        for weight, bias, down, up, scale in zip(weights, biases, A, B, ctx.settings.scales, strict=True)
    ]
    known = [(y, gradient) for y, gradient in zip(ys, gradients, strict=True) if gradient is not None]
    inputs = (x, *weights, *biases, *A, *B)
    wanted = [value for value, need in zip(inputs, ctx.needs_input_grad[1:], strict=True) if need]
    outputs, weights_of = zip(*known, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, weights_of, create_graph=True, allow_unused=True))
    return None, *(next(found) if need else None for need in ctx.needs_input_grad[1:])
