"""A convolution with a low-rank change of its weight, as one differentiable function.

    y = conv(x; W) + bias + s · B conv(drop(x); A)
    x: [n, in, *size]   W: [out, in, *k]   A: [r, in · |k|]   B: [out, r]   y: [n, out, *positions]
    *k: the kernel size   |k|: the number of kernel positions   s: the scale
    *size: the spatial size of x   *positions: the spatial size of y (output positions)

Differences from two convolutions and a sum in autograd:

- With many positions, in at least float32 and without dropout, W + s B A is formed in forward, and
  again in backward. Then h = conv(x; A), which has as many positions as y, is not saved.
- Otherwise, a product adds s · B h to y in place.
- A convolution with a kernel of size 1 is a matrix product. With strides, the positions of x that
  it reads are copied once, and saved instead of x.
- If channels are last in memory (``torch.channels_last``), each position is a row of a matrix. A
  convolution with a kernel of size 1 is then computed as a linear layer (``fused.py``, or
  ``device.py`` if x is not on a CPU), and the products with B as products of this matrix.
- Saved for backward are x, h unless W + s B A was computed, and for dropout only a seed.

A gradient of a gradient is computed by differentiable operations.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels import cost_model, device, dropout, fused, reference, without_autocast

#: the number of elements of x up to which callers should not use ``conv``: two convolutions and a
#: sum, which make fewer Python calls, are as fast; measured on a CPU core
SMALL_INPUT_SIZE = 1 << 17
#: the channels-last memory format for a tensor with this number of axes
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Geometry(NamedTuple):
    """The stride, padding and dilation of a convolution with one group, padded with zeros: one
    number for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def positions(self, input_shape: torch.Size, kernel_shape: torch.Size) -> tuple[int, ...]:
        """The spatial shape of the output, for the spatial shapes of the input and the kernel."""
        axes = zip(input_shape, kernel_shape, *self, strict=True)
        return tuple(
            (input_size + 2 * pad - dilation * (kernel_size - 1) - 1) // stride + 1
            for input_size, kernel_size, stride, pad, dilation in axes
        )


class Settings(NamedTuple):
    """The options of one call of ``_Conv``.

    Fields:
        scale: s / (1 - ``drop_probability``).
        seed: the seed from which forward and backward draw the same dropped entries of x.
        forms_weight: whether to convolve x with W + s B A, instead of computing h = conv(x; A).
        channels_last: whether x, y and h are in channels-last memory format; else contiguous.
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
    """y = conv(x; W) + bias + scale · B conv(drop(x); A), [n, out, *positions], in the dtype of x;
    differentiable in x, bias, A and B.

    Args:
        scale: the factor of the low-rank path.
        x: [n, in, *size], contiguous or channels-last.
        weight: W, [out, in, *k] with kernel size k, of the dtype of x, contiguous or channels-last;
            it gets no gradient. y is channels-last if x or W is.
        bias: [out] or None, of the dtype of x.
        A, B: [r, in · kernel positions] and [out, r], of any floating-point dtype. They are cast to
            the dtype of x, and get gradients in their own dtype.
        drop_probability: probability of dropping an entry of x on the low-rank path.
    """
    channels_last = bool(is_channels_last(x) or is_channels_last(weight))
    x = _to_format(x, channels_last)
    if weight[0, 0].numel() == 1 and not any(geometry.padding) and max(geometry.stride) > 1:
        strided_slices = [slice(None, None, step) for step in geometry.stride]
        # A kernel of size 1 reads every stride-th position only. These are taken out of x, and the
        # stride becomes 1. x is indexed in memory order, so that its gradient has its memory
        # format.
        if channels_last:
            x = x.movedim(1, -1)[(slice(None), *strided_slices)].movedim(-1, 1)
        else:
            x = x[(..., *strided_slices)]
        x = _to_format(x, channels_last)
        geometry = geometry._replace(stride=(1,) * len(geometry.stride))
    positions = geometry.positions(x.shape[2:], weight.shape[2:])
    position_count, in_ = x.shape[0] * torch.Size(positions).numel(), weight[0].numel()
    is_linear = channels_last and _is_matrix_product(geometry, weight)
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
        cast_A, cast_B = A.to(x.dtype), B.to(x.dtype)
        if settings.forms_weight:
            h, changed_weight = None, _form_weight(weight, cast_A, cast_B, settings.scale)
            y = _convolve(settings, x, changed_weight, bias)
        else:
            dropped = dropout.draw_dropped(x, settings.drop_probability, settings.seed)
            dropped_x = _drop(settings, x, dropped)
            h = _project_down(settings, dropped_x, cast_A, weight)
            y = _convolve(settings, x, weight, bias)
            if settings.channels_last:
                _as_rows(y).addmm_(_as_rows(h), cast_B.mT, alpha=settings.scale)
            else:
                y.flatten(2).baddbmm_(
                    cast_B.expand(len(x), -1, -1), h.flatten(2), alpha=settings.scale
                )
        ctx.settings = settings
        ctx.save_for_backward(x, weight, bias, A, B, h)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        settings, (x, weight, bias, A, B, h) = ctx.settings, ctx.saved_tensors
        needs_gradient = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            outputs_of = functools.partial(_differentiable_outputs, settings)
            return None, *reference.gradients_of(
                outputs_of, (x, weight, bias, A, B), needs_gradient, [dy], settings.drop_probability
            )
        need_x, _, need_bias, need_A, need_B = needs_gradient
        dy, cast_A, cast_B = _to_format(dy, settings.channels_last), A.to(x.dtype), B.to(x.dtype)
        if need_B and h is None:
            h = _project_down(settings, x, cast_A, weight)
        dx = dA = None
        dh, dB = _up_gradients(settings, dy, cast_B, h if need_B else None)
        dB = None if dB is None else dB.to(B.dtype)
        if need_A or need_x:
            dx, dA = _down_gradients(
                settings, x, cast_A, weight, dh, need_x and not settings.forms_weight, need_A
            )
            dA = None if dA is None else dA.to(A.dtype)
        if need_x:
            if settings.forms_weight:
                weight = _form_weight(weight, cast_A, cast_B, settings.scale)
            low_rank_dx = dx
            dx, *_ = _convolution_backward(settings, dy, x, weight, (True, False, False))
            dx = _to_format(dx, settings.channels_last)
            dx = dx if low_rank_dx is None else dx.add_(low_rank_dx)
        db = dy.sum((0, *range(2, dy.ndim))) if need_bias else None
        return None, dx, None, db, dA, dB


def _to_format(x: Tensor, channels_last: bool) -> Tensor:
    """x in channels-last memory format if ``channels_last``, else contiguous; copied if needed."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if channels_last else x.contiguous()


def _as_rows(x: Tensor) -> Tensor:
    """View x [n, c, *positions], whose channels are last in memory, as a matrix [n · positions, c]:
    one row for each position of each image."""
    return x.movedim(1, -1).view(-1, x.shape[1])


def _as_images(rows: Tensor, shape_source: Tensor) -> Tensor:
    """View a matrix [n · positions, c] as [n, c, *positions]. n and the spatial shape *positions
    are those of ``shape_source`` [n, channels, *positions]."""
    return rows.view(len(shape_source), *shape_source.shape[2:], rows.shape[1]).movedim(-1, 1)


def _drop(settings: Settings, x: Tensor, dropped: Tensor | None) -> Tensor:
    """x with zeros at the dropped entries, or x itself if ``dropped`` is None. ``dropped`` holds
    flat indices or a flat mask, both in the memory order of x."""
    if dropped is None:
        return x
    return (
        dropout.zero_entries(x.movedim(1, -1), dropped).movedim(-1, 1)
        if settings.channels_last
        else dropout.zero_entries(x, dropped)
    )


def _form_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale · B A, in the shape [out, in, *k] of the ``weight`` W, for A
    [r, in · kernel positions] and B [out, r]."""
    return torch.addmm(weight.reshape(len(weight), -1), B, A, alpha=scale).view(weight.shape)


def _is_matrix_product(geometry: Geometry, weight: Tensor) -> bool:
    """Whether the convolution is a matrix product with each position of x: kernel size 1, stride 1
    and no padding."""
    return weight[0, 0].numel() == 1 and max(geometry.stride) == 1 and not any(geometry.padding)


def _convolve(settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    geometry = settings.geometry
    y = torch.convolution(x, weight, bias, *geometry, False, [0] * len(geometry.stride), 1)
    return _to_format(y, settings.channels_last)


def _project_down(settings: Settings, x: Tensor, A: Tensor, weight: Tensor) -> Tensor:
    """h = conv(x; A), [n, r, *positions], for A [r, in · kernel positions]. The ``weight``
    [out, in, *k] only gives the kernel size."""
    if _is_matrix_product(settings.geometry, weight):
        return torch.bmm(A.expand(len(x), -1, -1), x.flatten(2)).view(len(x), -1, *x.shape[2:])
    return _convolve(settings, x, A.view(-1, *weight.shape[1:]), None)


def _up_gradients(
    settings: Settings, dy: Tensor, B: Tensor, h: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(the gradient of h [n, r, *positions], the gradient of B [out, r]) from ``dy``, the gradient
    of y. If h is None, the gradient of B is None."""
    if settings.channels_last:
        rows, scaled_B_transposed = _as_rows(dy), (B * settings.scale).mT
        dh = _as_images(fused.thin_product(scaled_B_transposed, rows).mT.contiguous(), dy)
        if h is None:
            return dh, None
        return dh, torch.mm(_as_rows(h).mT, rows).mT * settings.scale
    flat = dy.flatten(2)  # [n, out, p]
    dh = torch.bmm((B * settings.scale).mT.expand(len(dy), -1, -1), flat).view(
        len(dy), -1, *dy.shape[2:]
    )
    return dh, None if h is None else torch.bmm(flat, h.flatten(2).mT).sum(0) * settings.scale


def _down_gradients(settings: Settings, x, A, weight, dh, need_x: bool, need_A: bool):
    """(the gradient of x through h = conv(drop(x); A), the gradient of A
    [r, in · kernel positions]) from ``dh``, the gradient of h. A gradient that is not needed is
    None."""
    dx = dA = None
    dropped = dropout.draw_dropped(x, settings.drop_probability, settings.seed)
    dropped_x = _drop(settings, x, dropped) if need_A else x
    if _is_matrix_product(settings.geometry, weight):
        if need_x:
            dx = torch.bmm(A.mT.expand(len(x), -1, -1), dh.flatten(2)).view_as(x)
        if need_A:
            dA = torch.bmm(dh.flatten(2), dropped_x.flatten(2).mT).sum(0)
    else:
        A_kernel = A.view(-1, *weight.shape[1:])
        dx, dA, _ = _convolution_backward(
            settings, dh, dropped_x, A_kernel, (need_x, need_A, False)
        )
        dA = None if dA is None else dA.reshape(A.shape)
    if dx is not None:
        dx = _drop(settings, _to_format(dx, settings.channels_last), dropped)
    return dx, dA


def _convolution_backward(
    settings: Settings,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needs_gradient: tuple[bool, bool, bool],
) -> Any:
    """The gradients of x, the weight and the bias of a convolution; None for each of them whose
    entry in ``needs_gradient`` is False."""
    geometry = settings.geometry
    output_padding = [0] * len(geometry.stride)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, *geometry, False, output_padding, 1, needs_gradient
    )


def _differentiable_outputs(settings: Settings, x, weight, bias, A, B) -> list[Tensor]:
    """[y], computed without dropout by operations that can be differentiated twice."""
    h = _convolve(settings, x, A.to(x.dtype).view(-1, *weight.shape[1:]), None)
    low_rank_output = torch.matmul(B.to(x.dtype) * settings.scale, h.flatten(2))
    y = _convolve(settings, x, weight, bias)
    return [y + low_rank_output.view_as(y)]
