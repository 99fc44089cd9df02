"""Linear layers that read the same input, with their low-rank changes, on a GPU or similar device.

    y_i = gain_i ⊙ (x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ) + bias_i
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]   gain_i: [out_i] or None

``fused.py`` computes the same function on a CPU. The costs differ here: a launch takes as long as
the low-rank products themselves, and reading a value back stops the host until the device has
finished.

- **Few launches.** All tensors of another dtype than the products' are cast by one launch,
  gradients in backward too. A scale is the ``alpha`` of a product. x Wᵀ is added to the change
  inside its own product. A layer with a float32 adapter in bfloat16 takes 4 launches forward and 6
  backward (``tests/cuda/test_counts.py``).
- **No synchronisation.** Dropout multiplies by a mask from a seed, drawn again in backward. The CPU
  instead draws the positions of the dropped entries, whose number must be known to allocate them.
- **Autocast** is applied here, because torch's autocast would handle each product separately: x, W,
  A and B are cast together.
- **16-bit outputs are rounded once**, including bias and change, if the device has products with
  float32 output (``_sums_wide``). With a gain, the product is rounded before the gain.

Backward gets x (or its factors), the low-rank factors in the dtype of the products, h if it is
small, and the output before the gain, if there is one. A weight may be a function that reads it
(4-bit storage); backward reads it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError
from veneer.kernels import eager, reference
from veneer.kernels.dropout import mask
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input

_C: Any = torch._C
Read = Callable[[torch.dtype], Tensor]


class Settings(NamedTuple):
    """The options of a call.

    Fields:
        scales: s_i.
        dtype: dtype of the products and of y.
        dropout, seed: as in ``fused.Settings``.
        reads: for each layer, a function that reads its weight [out, in] in a dtype, or None if the
            weight is a tensor.
    """

    scales: tuple[float, ...]
    dtype: torch.dtype
    dropout: float
    seed: int
    reads: tuple[Read | None, ...]


#: whether tensors on the meta device take the path of a device
_COUNTED: ContextVar[bool] = ContextVar("counted", default=False)


@contextmanager
def count_on_meta() -> Iterator[None]:
    """Let tensors on the meta device take the path of a device inside of the block, so that a
    step's operations and saved tensors can be counted without a device."""
    token = _COUNTED.set(True)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def plain(x: Tensor) -> bool:
    """Return whether a call is eager and x is a plain floating-point tensor on a device."""
    return (
        type(x) is Tensor
        and not x.is_cpu
        and (not x.is_meta or _COUNTED.get())
        and x.layout is torch.strided
        and x.ndim > 0
        and type(x.shape[0]) is int
        and x.is_floating_point()
        and eager()
    )


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product of x, given autocast (which does not change float64)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.itemsize < 8 and _autocast(kind) else x.dtype


def _autocast(kind: str) -> bool:
    """Return whether autocast is on for a type of device. torch raises for meta, which has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def applies(x: Tensor, weight: Any) -> bool:
    """Return whether ``linears`` supports a call: a ``plain`` x and a frozen weight on its device,
    of the same dtype after autocast."""
    if (
        not plain(x)
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or weight.device != x.device
    ):
        return False
    return weight.is_floating_point() and dtype_of(weight) == dtype_of(x)


def applies_alike(x: Tensor, weight: Any) -> bool:
    """``applies`` without a cast of autocast: for functions that do not handle autocast."""
    return applies(x, weight) and dtype_of(x) == x.dtype == weight.dtype


def linears(
    scales: Sequence[float],
    x: Tensor,
    weights: Sequence[Tensor | Read],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gains: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Return y_i for each layer, in autocast's dtype if it is on, else in x's. Twice differentiable
    in x, the biases, A, B and the gains.

    Args:
        x: [*, in], for which ``plain`` holds.
        weights: [out_i, in], or functions that read them; they get no gradient.
        A, B: [r_i, in] and [out_i, r_i], or all of them with a first axis of size 1, of any
            floating-point dtype.
        gains: [out_i] or None.

    Raises:
        VeneerError: in backward, for a second gradient through an x that autocast has cast.
    """
    gains = [None] * len(A) if gains is None else gains
    reads = tuple(cast(Any, None if isinstance(weight, Tensor) else weight) for weight in weights)
    tensors = [weight if isinstance(weight, Tensor) else None for weight in weights]
    settings = Settings(tuple(scales), dtype_of(x), dropout, seed, reads)
    with torch.autocast(x.device.type, enabled=False) if _autocast(x.device.type) else _NOTHING:
        if torch.is_grad_enabled():
            return _apply(settings, x, *tensors, *biases, *A, *B, *gains)
        return _forward(None, settings, x, *tensors, *biases, *A, *B, *gains)


_NOTHING = nullcontext()  # shared by all calls


def same_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Convert tensors to a dtype, with one launch for all tensors of the same other dtype."""
    converted, casts = list(tensors), {}
    for position, tensor in enumerate(tensors):
        if tensor is not None and tensor.dtype != dtype:
            casts.setdefault(tensor.dtype, []).append(position)
    for positions in casts.values():
        for position, tensor in zip(
            positions,
            _cast([cast(Tensor, tensors[position]) for position in positions], dtype),
            strict=True,
        ):
            converted[position] = tensor
    return converted


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    if len(tensors) == 1 or not tensors[0].is_cuda:
        return [tensor.to(dtype) for tensor in tensors]
    if _copies_lists():
        copies = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
        vars(torch)["_foreach_copy_"](copies, tensors)
        return copies
    # concatenate, which also casts
    positions = [position for position, tensor in enumerate(tensors) if tensor.is_contiguous()]
    sizes = [tensors[position].numel() for position in positions]
    flat = tensors[0].new_empty(sum(sizes), dtype=dtype)
    if positions:
        torch.cat([tensors[position].view(-1) for position in positions], out=flat)
    views = dict(zip(positions, flat.split(sizes), strict=True))
    return [
        views[i].view(tensor.shape) if i in views else tensor.to(dtype)
        for i, tensor in enumerate(tensors)
    ]


@functools.cache
def _copies_lists() -> bool:
    """Return whether this torch has a kernel that casts a list of tensors."""
    return _C._dispatch_has_kernel_for_dispatch_key("aten::_foreach_copy_", "CUDA")


def product(first: Tensor, second: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return scale · first second; [m, k] × [k, n] -> [m, n], in ``out`` if given."""
    out = first.new_empty(first.shape[0], second.shape[1]) if out is None else out
    return (
        torch.mm(first, second, out=out)
        if scale == 1
        else out.addmm_(first, second, beta=0, alpha=scale)
    )


@functools.cache
def _sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has products of 16-bit tensors with float32 output. Tested with a
    product, because torch supports them on some devices only."""
    if dtype.itemsize > 2:
        return False
    try:
        probe = torch.zeros(8, 8, dtype=dtype, device=device)
        torch.addmm(probe.float(), probe, probe, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def add_change(
    h: Tensor, up: Tensor, scale: float, tokens: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return x Wᵀ + scale · h upᵀ + bias, [T, out], rounded once if the device supports that."""
    up, weight = up.mT, weight.mT
    if bias is None:
        return product(h, up, scale).addmm_(tokens, weight)
    if h.itemsize >= 4:
        return torch.addmm(bias, h, up, alpha=scale).addmm_(tokens, weight)
    if not _sums_wide(h.device, h.dtype):
        return product(h, up, scale).addmm_(tokens, weight).add_(bias)  # rounded twice
    wide = h.new_empty(h.shape[0], up.shape[1], dtype=torch.float32)
    options: Any = {"out_dtype": torch.float32, "out": wide}
    torch.addmm(wide, h, up, beta=0, alpha=scale, **options)
    torch.addmm(wide, tokens, weight, **options)
    return torch.add(wide, bias, out=h.new_empty(wide.shape))


def add_frozen_product(change: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return change + x Wᵀ + bias in 16 bits, in place: ``add_change`` for a computed change."""
    if not _sums_wide(change.device, change.dtype):
        return change.addmm_(tokens, weight.mT).add_(bias)
    wide, options = change.float(), cast(Any, {"out_dtype": torch.float32})
    torch.addmm(wide, tokens, weight.mT, out=wide, **options)
    return torch.add(wide, bias, out=change)


def _matrix(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor[0]


def _spans(ups: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return [start, end) of each layer's ranks among the joined ranks of all layers."""
    spans, first = [], 0
    for up in ups:
        spans.append((first, first + up.shape[1]))
        first += up.shape[1]
    return spans


def _forward(ctx: Any, settings: Settings, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    weights, biases, A, B, gains = _divide(tensors)
    count, dtype = len(A), settings.dtype
    uncast = [x, *weights, *biases, *map(_matrix, A), *map(_matrix, B)]
    x_cast, *rest = same_dtype(uncast, dtype)
    weights_, biases_, downs, ups = _divide(cast(Any, rest), 4)
    joined = downs[0] if count == 1 else torch.cat(downs)  # [R, in]
    tokens = cast(Tensor, x_cast).reshape(-1, x.shape[-1])  # [T, in]
    read, keep = tokens, 1 - settings.dropout
    if settings.dropout:
        read = tokens * mask(tokens.shape, settings.dropout, settings.seed, x.device)
    h = read @ joined.mT  # [T, R]
    ys, before = [], []
    for number, (first, after) in enumerate(_spans(ups)):
        scale, gain, weight = settings.scales[number] / keep, gains[number], weights_[number]
        weight = settings.reads[number](dtype) if weight is None else weight  # pyright: ignore[reportOptionalCall]
        bias = biases_[number]
        y = add_change(
            h[:, first:after],
            ups[number],
            scale,
            tokens,
            weight,
            None if gain is not None else bias,
        )
        before.append(None if gain is None else y)
        if gain is not None:
            y = torch.mul(y, gain, out=torch.empty_like(y))
            y = y if bias is None else y.add_(bias)
        ys.append(y.view(*x.shape[:-1], y.shape[1]).data)  # `data` is not tracked as a view
    if ctx is not None:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape, ctx.kind = settings, x.shape, x.device.type
        ctx.cast = None if x_cast is x else x.dtype
        *made_of, ctx.gate = input_to_save(x) if x_cast is x else SavedInput(cast(Tensor, x_cast))
        ctx.dropped = settings.dropout > 0 and made_of[1] is None
        if ctx.dropped:  # backward needs only the dropped-out x
            made_of[0] = read
        h = h if h.shape[1] * 8 <= x.shape[-1] else None
        # also save the casts of weights, as torch's autocast does
        pairs = zip(weights_, weights, strict=True)
        casts = (None if weight_cast is weight else weight_cast for weight_cast, weight in pairs)
        ctx.save_for_backward(*made_of, h, joined, *ups, *casts, *before, *tensors)
    return tuple(ys)


class _LinearsOnDevice(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(ctx.kind, enabled=False) if _autocast(ctx.kind) else _NOTHING:
            return _gradients(ctx, *gradients)


# ``Function.apply`` makes a dozen Python calls for ``torch.func``, whose transforms never reach
# this function (see ``plain``).
_apply = cast(Any, super(torch.autograd.Function, _LinearsOnDevice)).apply


def _gradients(ctx: Any, *gradients: Tensor | None) -> Any:
    first, second, third, h, joined, *rest = ctx.saved_tensors
    settings, count = ctx.settings, len(ctx.settings.scales)
    (ups, casts, unscaled_outputs), tensors = _divide(rest[: 3 * count], 3), rest[3 * count :]
    x = restore_input(SavedInput(first, second, third, ctx.gate), ctx.needs_input_grad[1])
    needs_x, needs = ctx.needs_input_grad[1], _divide(ctx.needs_input_grad[2:])
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, x, tensors, gradients)
    _, needs_bias, needs_A, needs_B, needs_gain = needs
    weights, biases, A, B, gains = _divide(tensors)
    weights = [
        tensor if gradient is None else gradient
        for gradient, tensor in zip(casts, weights, strict=True)
    ]
    tokens = x.reshape(-1, x.shape[-1])
    keep_mask = None
    if settings.dropout and (needs_x or not ctx.dropped):
        keep_mask = mask(tokens.shape, settings.dropout, settings.seed, x.device)
    read = tokens if keep_mask is None or ctx.dropped else tokens * keep_mask
    h = read @ joined.mT if h is None else h
    U = h.new_empty(h.shape)  # s (dy B), [T, R]
    db, dB, dgain, dys = cast(Any, ([None] * count for _ in range(4)))
    for number, (start, end) in enumerate(_spans(ups)):
        dy, scale = gradients[number], settings.scales[number] / (1 - settings.dropout)
        if dy is None:
            U[:, start:end].zero_()
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        db[number] = dy.sum(0) if needs_bias[number] else None
        if gains[number] is not None:
            if needs_gain[number]:
                dgain[number] = (dy * unscaled_outputs[number]).sum(0, dtype=gains[number].dtype)
            dy = torch.mul(dy, gains[number], out=torch.empty_like(dy))
        product(dy, ups[number], scale, U[:, start:end])
        dB[number] = product(dy.mT, h[:, start:end], scale) if needs_B[number] else None
        dys[number] = dy
    dA = (
        (U.mT @ read).split([end - start for start, end in _spans(ups)])
        if True in needs_A
        else [None] * count
    )
    dx = None
    if needs_x:
        dx = U @ joined
        dx = dx if keep_mask is None else dx.mul_(keep_mask)
        dx = _add_frozen_gradients(dx, settings, dys, weights).view(ctx.shape)
    dA = [
        gradient if need and dy is not None else None
        for gradient, dy, need in zip(dA, gradients, needs_A, strict=True)
    ]
    parameters = (*biases, *A, *B)
    dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    dx, *converted = _convert_gradients([dx, *db, *dA, *dB], [ctx.cast or x.dtype, *dtypes])
    converted = [
        None if gradient is None else gradient.view(parameter.shape)
        for gradient, parameter in zip(converted, parameters, strict=True)
    ]
    return None, dx, *[None] * count, *converted, *dgain


def _add_frozen_gradients(
    dx: Tensor, settings: Settings, dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> Tensor:
    """Add Σ dy_i W_i, the gradient through the frozen weights, to dx in place."""
    for dy, weight, read in zip(dys, weights, settings.reads, strict=True):
        if dy is not None:
            dx.addmm_(dy, read(settings.dtype) if weight is None else weight)  # pyright: ignore[reportOptionalCall]
    return dx


def _differentiable_gradients(
    ctx: Any, x: Tensor, tensors: Sequence[Any], gradients: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Return the gradients with a graph. Raises VeneerError if autocast has cast x: the saved cast
    has no graph to x."""
    settings = ctx.settings
    if ctx.cast is not None:
        raise VeneerError(
            f"a second gradient through an input in {ctx.cast} that autocast casts to "
            f"{settings.dtype}",
            f"an input in {settings.dtype}, of which backward keeps no copy without a graph",
            "cast the input before the layer, or compute this outside of autocast",
        )
    function = functools.partial(_definition, settings)
    needed = ctx.needs_input_grad[1:]
    return None, *reference.gradients_of(
        function, (x, *tensors), needed, gradients, settings.dropout
    )


def _convert_gradients(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """Convert each gradient to its dtype, with one launch for all gradients of a dtype."""
    converted = list(gradients)
    for dtype in {*dtypes} - {None}:
        positions = [position for position, target in enumerate(dtypes) if target == dtype]
        for position, gradient in zip(
            positions,
            same_dtype([gradients[position] for position in positions], cast(Any, dtype)),
            strict=True,
        ):
            converted[position] = gradient
    return converted


def _divide(items: Sequence, pieces: int = 5) -> tuple[Any, ...]:
    """Divide a sequence into equal pieces, such as (weights, biases, A, B, gains)."""
    count = len(items) // pieces
    return tuple(items[number * count : (number + 1) * count] for number in range(pieces))


def _definition(settings: Settings, x: Tensor, *tensors: Any) -> list[Tensor]:
    """Compute the layers by differentiable operations, without dropout."""
    dtype, ys = settings.dtype, []
    x = x.to(dtype)
    for number, (weight, bias, down, up, gain) in enumerate(zip(*_divide(tensors), strict=True)):
        weight = settings.reads[number](dtype) if weight is None else weight.to(dtype)  # pyright: ignore[reportOptionalCall]
        y = torch.nn.functional.linear(x, weight)
        y = reference.matmul_update(
            x, _matrix(down).to(dtype), _matrix(up).to(dtype), settings.scales[number], y
        )
        y = y if gain is None else (y * gain).to(dtype)
        ys.append(y if bias is None else y + bias.to(dtype))
    return ys
