"""A convolution with a low-rank change of its weight, as one differentiable function.

    y = conv(x; W) + bias + s · B conv(drop(x); A)
    x: [n, in, *size]   W: [out, in, *k]   A: [r, in · |k|]   B: [out, r]   y: [n, out, *positions]
    *k: the kernel size   |k|: the number of kernel positions

Differences from two convolutions and a sum in autograd:

- With many positions, W + s B A is computed in float32, in forward and again in backward. Then
  h = conv(x; A), which has as many positions as y, need not be computed or saved.
- With few positions, or in 16 bits, a batched product adds s · B h to y in place.
- A convolution with a kernel of size 1 is a matrix product. With strides, the positions of x that
  it reads are copied once, and saved instead of x.
- If channels are last in memory (``torch.channels_last``), positions are rows of a matrix. A kernel
  of size 1 is then computed as a linear layer (``fused.py``), and products with B likewise.
- Saved for backward are x, h unless W + s B A was computed, and for dropout only a seed.

A gradient of a gradient is computed by differentiable operations.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels import cost_model, device, dropout, fused, reference, without_autocast

#: up to this number of elements of x, the fused function is not used, because two convolutions and
#: a sum, which make fewer Python calls, are as fast then; measured on a CPU core
SMALL_INPUT_SIZE = 1 << 17
#: the channels-last memory format by the number of axes
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """The options of a convolution with one group and zero padding: one number for each spatial
    axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def positions(self, size: torch.Size, kernel: torch.Size) -> tuple[int, ...]:
        """The size of the output for an input of ``size`` and a kernel of size ``kernel``."""
        axes = zip(size, kernel, *self, strict=True)
        return tuple(
            (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for n, k, stride, pad, dilation in axes
        )


class Settings(NamedTuple):
    """The options of a call.

    Fields:
        scale: s / (1 - ``drop_probability``).
        forms_weight: whether to compute W + s B A.
        channels_last: whether channels are last in memory, in x, y and W.
    """

    geometry: Geometry
    scale: float
    drop_probability: float
    seed: int
    forms_weight: bool
    channels_last: bool


def is_channels_last(x: Tensor) -> bool | None:
    """Whether channels are last in memory in x [n, in, *size]. None if x is neither contiguous nor
    channels-last."""
    if x.is_contiguous():
        return False
    return (
        True
        if x.ndim in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
        else None
    )


def conv(
    geometry: Geometry,
    scale: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    drop_probability: float = 0.0,
) -> Tensor:
    """y [n, out, *positions], in the dtype of x; differentiable in x, bias, A and B.

    Args:
        x: [n, in, *size], contiguous or channels-last.
        weight: W, [out, in, *k] of the dtype of x, contiguous or channels-last; it gets no
            gradient. y is channels-last if x or W is.
        bias: [out] or None, of the dtype of x.
        A, B: [r, in · |k|] and [out, r], of any floating-point dtype. They are cast to the dtype of
            x, and get gradients in their own dtype.
        drop_probability: probability of dropping an entry of x on the low-rank path.
    """
    channels_last = bool(is_channels_last(x) or is_channels_last(weight))
    x = _to_format(x, channels_last)
    if weight[0, 0].numel() == 1 and not any(geometry.padding) and max(geometry.stride) > 1:
        strided_slices = [slice(None, None, step) for step in geometry.stride]
        # index in memory order, so that the gradient has the memory format of x
        if channels_last:
            x = x.movedim(1, -1)[(slice(None), *strided_slices)].movedim(-1, 1)
        else:
            x = x[(..., *strided_slices)]
        x = _to_format(x, channels_last)
        geometry = geometry._replace(stride=(1,) * len(geometry.stride))
    positions = geometry.positions(x.shape[2:], weight.shape[2:])
    position_count, in_ = x.shape[0] * torch.Size(positions).numel(), weight[0].numel()
    is_linear = channels_last and _is_product(geometry, weight)
    forms_weight = not drop_probability and position_count > cost_model.max_factored_tokens(
        weight.shape[0], in_, B.shape[1], x.dtype
    )
    seed = dropout.new_seed() if drop_probability else 0
    if is_linear and not x.is_cpu:
        rows = x.movedim(1, -1)
        weights = [weight.flatten(1)]
        return device.linears(
            [scale], rows, weights, [bias], [A], [B], None, drop_probability, seed
        )[0].movedim(-1, 1)
    if is_linear:
        settings = fused.Settings((scale,), drop_probability, seed, forms_weight)
        y = fused.linears(settings, x.movedim(1, -1), [weight.flatten(1)], [bias], [A], [B])[0]
        return y.movedim(-1, 1)
    scale = scale / (1 - drop_probability)
    settings = Settings(geometry, scale, drop_probability, seed, forms_weight, channels_last)
    return _Conv.apply(settings, x, weight, bias, A, B)  # pyright: ignore[reportReturnType]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, x, weight, bias, A, B) -> Tensor:
        down, up = A.to(x.dtype), B.to(x.dtype)
        if settings.forms_weight:
            h, changed_weight = None, _form_weight(weight, down, up, settings.scale)
            y = _convolve(settings, x, changed_weight, bias)
        else:
            dropped = dropout.draw_dropped(x, settings.drop_probability, settings.seed)
            dropped_x = _drop(settings, x, dropped)
            h = _bottleneck(settings, dropped_x, down, weight)
            y = _convolve(settings, x, weight, bias)
            if settings.channels_last:
                _as_rows(y).addmm_(_as_rows(h), up.mT, alpha=settings.scale)
            else:
                y.flatten(2).baddbmm_(up.expand(len(x), -1, -1), h.flatten(2), alpha=settings.scale)
        ctx.settings = settings
        ctx.save_for_backward(x, weight, bias, A, B, h)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        settings, (x, weight, bias, A, B, h) = ctx.settings, ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            definition = functools.partial(_definition, settings)
            return None, *reference.gradients_of(
                definition, (x, weight, bias, A, B), needs, [dy], settings.drop_probability
            )
        need_x, _, need_bias, need_A, need_B = needs
        dy, down, up = _to_format(dy, settings.channels_last), A.to(x.dtype), B.to(x.dtype)
        if need_B and h is None:
            h = _bottleneck(settings, x, down, weight)
        dx = dA = None
        dh, dB = _up_gradients(settings, dy, up, h if need_B else None)
        dB = None if dB is None else dB.to(B.dtype)
        if need_A or need_x:
            dx, dA = _bottleneck_gradients(
                settings, x, down, weight, dh, need_x and not settings.forms_weight, need_A
            )
            dA = None if dA is None else dA.to(A.dtype)
        if need_x:
            if settings.forms_weight:
                weight = _form_weight(weight, down, up, settings.scale)
            low_rank_dx = dx
            dx, *_ = _convolution_backward(settings, dy, x, weight, (True, False, False))
            dx = _to_format(dx, settings.channels_last)
            dx = dx if low_rank_dx is None else dx.add_(low_rank_dx)
        db = dy.sum((0, *range(2, dy.ndim))) if need_bias else None
        return None, dx, None, db, dA, dB


def _to_format(x: Tensor, channels_last: bool) -> Tensor:
    """x in channels-last or contiguous memory format."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if channels_last else x.contiguous()


def _as_rows(x: Tensor) -> Tensor:
    """View x [n, c, *positions], whose channels are last in memory, as a matrix of one row for each
    position, [n · positions, c]."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    """View a matrix [n · positions, c] as [n, c, *positions], the sizes of ``like`` [n, ·,
    *positions]."""
    return rows.view(len(like), *like.shape[2:], rows.shape[1]).movedim(-1, 1)


def _drop(settings: Settings, x: Tensor, dropped: Tensor | None) -> Tensor:
    """x with zeros at the dropped entries, which are indices in memory order."""
    if dropped is None:
        return x
    return (
        dropout.zero_entries(x.movedim(1, -1), dropped).movedim(-1, 1)
        if settings.channels_last
        else dropout.zero_entries(x, dropped)
    )


def _form_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight.reshape(len(weight), -1), up, down, alpha=scale).view(weight.shape)


def _is_product(geometry: Geometry, weight: Tensor) -> bool:
    """Whether each position of the output is the product of the weight with the same position of
    x."""
    return weight[0, 0].numel() == 1 and max(geometry.stride) == 1 and not any(geometry.padding)


def _convolve(settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    geometry = settings.geometry
    y = torch.convolution(x, weight, bias, *geometry, False, [0] * len(geometry.stride), 1)
    return _to_format(y, settings.channels_last)


def _bottleneck(settings: Settings, x: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """h = conv(x; A): [n, r, *positions]."""
    if _is_product(settings.geometry, weight):
        return torch.bmm(down.expand(len(x), -1, -1), x.flatten(2)).view(len(x), -1, *x.shape[2:])
    return _convolve(settings, x, down.view(-1, *weight.shape[1:]), None)


def _up_gradients(
    settings: Settings, dy: Tensor, up: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of h [n, r, *positions], and of B [out, r] unless h is None, from the gradient
    of y."""
    if settings.channels_last:
        rows, thin_factor = _as_rows(dy), (up * settings.scale).mT
        dh = _as_images(fused.thin_product(thin_factor, rows).mT.contiguous(), dy)
        if h is None:
            return dh, None
        return dh, torch.mm(_as_rows(h).mT, rows).mT * settings.scale
    flat = dy.flatten(2)  # [n, out, p]
    dh = torch.bmm((up * settings.scale).mT.expand(len(dy), -1, -1), flat).view(
        len(dy), -1, *dy.shape[2:]
    )
    return dh, None if h is None else torch.bmm(flat, h.flatten(2).mT).sum(0) * settings.scale


def _bottleneck_gradients(settings: Settings, x, down, weight, dh, need_x: bool, need_A: bool):
    """The gradients of x through h, and of A [r, in · |k|], from the gradient of h."""
    dx = dA = None
    dropped = dropout.draw_dropped(x, settings.drop_probability, settings.seed)
    dropped_x = _drop(settings, x, dropped) if need_A else x
    if _is_product(settings.geometry, weight):
        if need_x:
            dx = torch.bmm(down.mT.expand(len(x), -1, -1), dh.flatten(2)).view_as(x)
        if need_A:
            dA = torch.bmm(dh.flatten(2), dropped_x.flatten(2).mT).sum(0)
    else:
        thin_factor = down.view(-1, *weight.shape[1:])
        dx, dA, _ = _convolution_backward(
            settings, dh, dropped_x, thin_factor, (need_x, need_A, False)
        )
        dA = None if dA is None else dA.reshape(down.shape)
    if dx is not None:
        dx = _drop(settings, _to_format(dx, settings.channels_last), dropped)
    return dx, dA


def _convolution_backward(
    settings: Settings, dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> Any:
    """The gradients of x, the weight and the bias, each if ``needs`` says so."""
    geometry = settings.geometry
    zeros = [0] * len(geometry.stride)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry, False, zeros, 1, needs
    )


def _definition(settings: Settings, x, weight, bias, A, B) -> list[Tensor]:
    """y by differentiable operations, without dropout."""
    h = _convolve(settings, x, A.to(x.dtype).view(-1, *weight.shape[1:]), None)
    change = torch.matmul(B.to(x.dtype) * settings.scale, h.flatten(2))
    y = _convolve(settings, x, weight, bias)
    return [y + change.view_as(y)]
