"""A convolution with a low-rank change of its weight, as one differentiable function.

    y = conv(x; W) + bias + s · B conv(drop(x); A)
    x: [n, in, *size]   W: [out, in, *k]   A: [r, in · |k|]   B: [out, r]   y: [n, out, *positions]

Differences from two convolutions and a sum in autograd:

- With many positions, W + s B A is formed in float32, in forward and in backward. No bottleneck of
  the
  size of the output is needed then, and the gradients of A and B need thin products only.
- With few positions, or in 16 bits, the bottleneck's output is added in place by a batched product.
- A kernel of one position is a matrix product. With strides, it copies the positions of x that it
  reads once, and saves those instead of x.
- If channels are last in memory (``torch.channels_last``), positions are rows of a matrix: a kernel
  of one position is then computed as a linear layer (``fused``), and so are the products with B.
- Saved are x and, unless W + s B A was formed, h = conv(x; A); dropout is saved as a seed.

The backward of the backward is plain differentiable code.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels import cost_model, device, dropout, fused, reference

#: the most numbers in x for which two convolutions and a sum, with less Python, are as fast;
#: measured on a CPU core
SMALL = 1 << 17
#: the channels-last memory format by the number of axes
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """The options of a convolution with one group and zero padding, one number for each spatial
    axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def positions(self, size: torch.Size, kernel: torch.Size) -> tuple[int, ...]:
        """The size of the output for an input of this one."""
        axes = zip(size, kernel, *self, strict=True)
        return tuple(
            (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for n, k, stride, pad, dilation in axes
        )


class Settings(NamedTuple):
    """The options of a call. ``scale``: s / (1 - ``drops``); ``form``: as in ``fused.Settings``;
    ``last``: whether channels are last in memory."""

    geometry: Geometry
    scale: float
    drops: float
    seed: int
    form: bool
    last: bool


def lies(x: Tensor) -> bool | None:
    """Whether channels are last in memory in x [n, in, *size]; None if x is neither contiguous nor
    channels-last."""
    if x.is_contiguous():
        return False
    return True if x.ndim in LAST and x.is_contiguous(memory_format=LAST[x.ndim]) else None


def conv(
    geometry: Geometry,
    scale: float,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    drops: float = 0.0,
) -> Tensor:
    """y [n, out, *positions], in the dtype of x; differentiable in x, bias, A and B.

    Args:
        x: [n, in, *size], contiguous or channels-last.
        weight: [out, in, *k] of the dtype of x, contiguous or channels-last; it gets no gradient.
            If x or weight is channels-last, so is y.
        bias: [out] or None, of the dtype of x.
        A, B: [r, in · |k|] and [out, r], of any floating-point dtype: computed in that of x, with
            gradients in their own.
        drops: probability of dropping an entry of x on the low-rank path.
    """
    last = bool(lies(x) or lies(weight))
    x = _laid(x, last)
    if weight[0, 0].numel() == 1 and not any(geometry.padding) and max(geometry.stride) > 1:
        read = [slice(None, None, step) for step in geometry.stride]
        # index in memory order, so that the gradient has the layout of x
        x = x.movedim(1, -1)[(slice(None), *read)].movedim(-1, 1) if last else x[(..., *read)]
        x = _laid(x, last)
        geometry = geometry._replace(stride=(1,) * len(geometry.stride))
    positions = geometry.positions(x.shape[2:], weight.shape[2:])
    tokens, in_ = x.shape[0] * torch.Size(positions).numel(), weight[0].numel()
    product = last and _is_product(geometry, weight)
    form = not drops and tokens > cost_model.forms_above(weight.shape[0], in_, B.shape[1], x.dtype)
    seed = dropout.seed() if drops else 0
    if product and not x.is_cpu:
        tokens_ = x.movedim(1, -1)
        return device.linears(
            [scale], tokens_, [weight.flatten(1)], [bias], [A], [B], None, drops, seed
        )[0].movedim(-1, 1)
    if product:
        settings = fused.Settings((scale,), drops, seed, form)
        y = fused.linears(settings, x.movedim(1, -1), [weight.flatten(1)], [bias], [A], [B])[0]
        return y.movedim(-1, 1)
    settings = Settings(geometry, scale / (1 - drops), drops, seed, form, last)
    return _Conv.apply(settings, x, weight, bias, A, B)  # pyright: ignore[reportReturnType]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, x, weight, bias, A, B) -> Tensor:
        down, up = A.to(x.dtype), B.to(x.dtype)
        if settings.form:
            h, y = None, _plain(settings, x, _form_weight(weight, down, up, settings.scale), bias)
        else:
            read = _without(settings, x, _draw_entries(settings, x))
            h, y = _thin(settings, read, down, weight), _plain(settings, x, weight, bias)
            if settings.last:
                _rows(y).addmm_(_rows(h), up.mT, alpha=settings.scale)
            else:
                y.flatten(2).baddbmm_(up.expand(len(x), -1, -1), h.flatten(2), alpha=settings.scale)
        ctx.settings = settings
        ctx.save_for_backward(x, weight, bias, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        settings, (x, weight, bias, A, B, h) = ctx.settings, ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            plain = functools.partial(_definition, settings)
            return None, *reference.gradients_of(
                plain, (x, weight, bias, A, B), needs, [dy], settings.drops
            )
        need_x, _, need_bias, need_A, need_B = needs
        with torch.autocast(x.device.type, enabled=False):
            dy, down, up = _laid(dy, settings.last), A.to(x.dtype), B.to(x.dtype)
            if need_B and h is None:
                h = _thin(settings, x, down, weight)
            dx = dA = None
            dh, dB = _through_up(settings, dy, up, h if need_B else None)
            dB = None if dB is None else dB.to(B.dtype)
            if need_A or need_x:
                dx, dA = _through_thin(
                    settings, x, down, weight, dh, need_x and not settings.form, need_A
                )
                dA = None if dA is None else dA.to(A.dtype)
            if need_x:
                merged_weight = (
                    _form_weight(weight, down, up, settings.scale) if settings.form else weight
                )
                low_rank_dx, dx = (
                    dx,
                    _laid(
                        _backward(settings, dy, x, merged_weight, (True, False, False))[0],
                        settings.last,
                    ),
                )
                dx = dx if low_rank_dx is None else dx.add_(low_rank_dx)
            db = dy.sum((0, *range(2, dy.ndim))) if need_bias else None
        return None, dx, None, db, dA, dB


def _laid(x: Tensor, last: bool) -> Tensor:
    """x in channels-last or contiguous memory format."""
    return x.contiguous(memory_format=LAST[x.ndim]) if last else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """View x [n, c, *positions], whose channels are last, as a matrix [T, c]."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _images(rows: Tensor, example: Tensor) -> Tensor:
    """View a matrix [T, c] as [n, c, *positions], with the positions of another tensor [n, *,
    *positions]."""
    return rows.view(len(example), *example.shape[2:], rows.shape[1]).movedim(-1, 1)


def _draw_entries(settings: Settings, x: Tensor) -> Tensor | None:
    """Entries of x, in memory order, that dropout removes from the low-rank path."""
    return (
        dropout.entries(x.numel(), settings.drops, settings.seed, x.device)
        if settings.drops
        else None
    )


def _without(settings: Settings, x: Tensor, dropped: Tensor | None) -> Tensor:
    """x with zeros in these entries."""
    if dropped is None:
        return x
    return (
        dropout.zero_entries(x.movedim(1, -1), dropped).movedim(-1, 1)
        if settings.last
        else dropout.zero_entries(x, dropped)
    )


def _form_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A."""
    return torch.addmm(weight.reshape(len(weight), -1), up, down, alpha=scale).view(weight.shape)


def _is_product(geometry: Geometry, weight: Tensor) -> bool:
    """Whether each position of the output is the product of the weight and the same position of
    x."""
    return weight[0, 0].numel() == 1 and max(geometry.stride) == 1 and not any(geometry.padding)


def _plain(settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    geometry = settings.geometry
    y = torch.convolution(x, weight, bias, *geometry, False, [0] * len(geometry.stride), 1)
    return _laid(y, settings.last)


def _thin(settings: Settings, x: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """conv(x; A): [n, r, *positions]."""
    if _is_product(settings.geometry, weight):
        return torch.bmm(down.expand(len(x), -1, -1), x.flatten(2)).view(len(x), -1, *x.shape[2:])
    return _plain(settings, x, down.view(-1, *weight.shape[1:]), None)


def _through_up(
    settings: Settings, dy: Tensor, up: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of h [n, r, *positions], gradient of B [out, r] if h is given), from the gradient
    of y."""
    if settings.last:
        rows, narrow = _rows(dy), (up * settings.scale).mT
        if h is None:
            return _images(fused.thin(narrow, rows).mT.contiguous(), dy), None
        dh, dB = fused.thin_pair(narrow, rows, _rows(h).mT)
        return _images(dh.mT.contiguous(), dy), dB.mT * settings.scale
    flat = dy.flatten(2)  # [n, out, p]
    dh = torch.bmm((up * settings.scale).mT.expand(len(dy), -1, -1), flat).view(
        len(dy), -1, *dy.shape[2:]
    )
    return dh, None if h is None else torch.bmm(flat, h.flatten(2).mT).sum(0) * settings.scale


def _through_thin(settings: Settings, x, down, weight, dh, need_x: bool, need_A: bool):
    """(gradient of x through h, gradient of A [r, in · |k|]), from the gradient of h."""
    dx = dA = None
    dropped = _draw_entries(settings, x)
    read = _without(settings, x, dropped) if need_A else x
    if _is_product(settings.geometry, weight):
        if need_x:
            dx = torch.bmm(down.mT.expand(len(x), -1, -1), dh.flatten(2)).view_as(x)
        if need_A:
            dA = torch.bmm(dh.flatten(2), read.flatten(2).mT).sum(0)
    else:
        narrow = down.view(-1, *weight.shape[1:])
        dx, dA, _ = _backward(settings, dh, read, narrow, (need_x, need_A, False))
        dA = None if dA is None else dA.reshape(down.shape)
    if dx is not None:
        dx = _without(settings, _laid(dx, settings.last), dropped)
    return dx, dA


def _backward(
    settings: Settings, dy: Tensor, x: Tensor, weight: Tensor, of: tuple[bool, bool, bool]
) -> Any:
    """The gradients of x, the weight and a bias, as far as ``of`` requests them."""
    none, geometry = [0] * len(settings.geometry.stride), settings.geometry
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, False, none, 1, of)


def _definition(settings: Settings, x, weight, bias, A, B) -> list[Tensor]:
    h = _plain(settings, x, A.to(x.dtype).view(-1, *weight.shape[1:]), None)
    change = torch.matmul(B.to(x.dtype) * settings.scale, h.flatten(2))
    y = _plain(settings, x, weight, bias)
    return [y + change.view_as(y)]
