"""Linear layers that read one input, with their low-rank changes, on a device with its own memory
(a GPU).

    y_i = gain_i ⊙ (x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ) + bias_i
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]   gain_i: [out_i] or None

The function that ``fused.py`` computes on a processor, by other means, since other things are dear
here: a launch takes as long as the thin products themselves, and to read a number back stops the
host until the device has caught up.

- **Few launches.** Whatever is not of the dtype that the products run in is cast by one launch, the
  gradients in backward too; a scale is a product's ``alpha``; x Wᵀ is added inside its own product
  to what the change has written there. One layer with a float32 adapter in bfloat16: 4 forward and
  6 backward (``tests/cuda/test_counts.py``).
- **No waits.** Dropout is a mask from a seed, drawn again in backward: a processor draws the few
  entries that it drops, whose number must be known before there is memory for them.
- **Autocast** is seen to here, as torch's own would take each product apart: x, W, A and B are cast
  together.
- **16-bit outputs are rounded once**, with bias and change in them, where the device has products
  that sum up in float32 (``_sums_wide``); with a gain, the product is rounded before it.

Saved are x (or what it was made of), the thin factors in the dtype of the products, h if it is
small, and with a gain what it multiplies. A weight may be given as a function that reads it (4
bits): it is read anew in backward.
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
        dtype: that of the products and of y.
        dropout, seed: as in ``fused.Settings``.
        reads: for each layer what reads its weight in a dtype, [out, in], where that is no tensor;
            else None.
    """

    scales: tuple[float, ...]
    dtype: torch.dtype
    dropout: float
    seed: int
    reads: tuple[Read | None, ...]


#: whether tensors on the meta device count as lying on a device
_COUNTED: ContextVar[bool] = ContextVar("counted", default=False)


@contextmanager
def count_on_meta() -> Iterator[None]:
    """A block in which tensors on the meta device take the path of a device, so that what a step
    there computes and saves can be counted without one."""
    token = _COUNTED.set(True)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def plain(x: Tensor) -> bool:
    """Whether a call is an eager one, of a plain tensor on a device."""
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
    """The dtype in which a matrix product of x runs now: autocast leaves float64 alone."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.itemsize < 8 and _autocast(kind) else x.dtype


def _autocast(kind: str) -> bool:
    """Whether autocast is on for a kind of device; torch has none for meta, and raises if it is
    asked."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def applies(x: Tensor, weight: Any) -> bool:
    """Whether ``linears`` is right for a call: ``plain``, on a frozen weight of the same dtype, or
    one that autocast gives the same."""
    if (
        not plain(x)
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or weight.device != x.device
    ):
        return False
    return weight.is_floating_point() and dtype_of(weight) == dtype_of(x)


def applies_alike(x: Tensor, weight: Any) -> bool:
    """``applies`` where nothing is cast: for functions that leave autocast to others."""
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
    """y_i for each layer, in the dtype that autocast says, else in that of x; differentiable once
    more often than backward needs, in x, the biases, A, B and the gains.

    Args:
        x: [*, in], for which ``plain`` holds.
        weights: [out_i, in], or what reads it; they get no gradient.
        A, B: [r_i, in] and [out_i, r_i], or all of them with a first axis of one, of any
            floating-point dtype.
        gains: [out_i] or None.

    Raises:
        VeneerError: in backward, for a gradient with a graph through an x that autocast has cast.
    """
    gains = [None] * len(A) if gains is None else gains
    reads = tuple(cast(Any, None if isinstance(weight, Tensor) else weight) for weight in weights)
    tensors = [weight if isinstance(weight, Tensor) else None for weight in weights]
    settings = Settings(tuple(scales), dtype_of(x), dropout, seed, reads)
    with torch.autocast(x.device.type, enabled=False) if _autocast(x.device.type) else _NOTHING:
        if torch.is_grad_enabled():
            return _apply(settings, x, *tensors, *biases, *A, *B, *gains)
        return _forward(None, settings, x, *tensors, *biases, *A, *B, *gains)


_NOTHING = nullcontext()  # one serves all calls


def same_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in a dtype; those of one other dtype by one launch."""
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
    # joined, and cast meanwhile
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
    """Whether this torch casts a list of tensors by one kernel of its own."""
    return _C._dispatch_has_kernel_for_dispatch_key("aten::_foreach_copy_", "CUDA")


def product(first: Tensor, second: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · left right."""
    out = first.new_empty(first.shape[0], second.shape[1]) if out is None else out
    return (
        torch.mm(first, second, out=out)
        if scale == 1
        else out.addmm_(first, second, beta=0, alpha=scale)
    )


@functools.cache
def _sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of 16-bit numbers may be had in float32. Asked by making one: torch has them
    for some."""
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
    """x Wᵀ + scale · h upᵀ + bias [T, out], rounded once where the device can."""
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


def onto(change: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """part + x Wᵀ + bias in 16 bits: ``add_change`` for a change that is there already."""
    if not _sums_wide(change.device, change.dtype):
        return change.addmm_(tokens, weight.mT).add_(bias)
    wide, options = change.float(), cast(Any, {"out_dtype": torch.float32})
    torch.addmm(wide, tokens, weight.mT, out=wide, **options)
    return torch.add(wide, bias, out=change)


def _matrix(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 2 else factor[0]


def _spans(ups: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Where the ranks of each layer lie among those of all."""
    spans, first = [], 0
    for up in ups:
        spans.append((first, first + up.shape[1]))
        first += up.shape[1]
    return spans


def _forward(ctx: Any, settings: Settings, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    weights, biases, A, B, gains = _apart(tensors)
    count, dtype = len(A), settings.dtype
    uncast = [x, *weights, *biases, *map(_matrix, A), *map(_matrix, B)]
    x_cast, *rest = same_dtype(uncast, dtype)
    weights_, biases_, downs, ups = _apart(cast(Any, rest), 4)
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
        ys.append(y.view(*x.shape[:-1], y.shape[1]).data)  # which forgets that it is a view
    if ctx is not None:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape, ctx.kind = settings, x.shape, x.device.type
        ctx.cast = None if x_cast is x else x.dtype
        *made_of, ctx.gate = input_to_save(x) if x_cast is x else SavedInput(cast(Tensor, x_cast))
        ctx.dropped = settings.dropout > 0 and made_of[1] is None
        if ctx.dropped:  # backward reads no other x, and there is no more of this one
            made_of[0] = read
        h = h if h.shape[1] * 8 <= x.shape[-1] else None
        # the casts of weights too, as torch's own autocast keeps them
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


# ``Function.apply`` spends a dozen Python calls on ``torch.func``, whose transforms never come here
# (``plain``).
_apply = cast(Any, super(torch.autograd.Function, _LinearsOnDevice)).apply


def _gradients(ctx: Any, *gradients: Tensor | None) -> Any:
    first, second, third, h, joined, *rest = ctx.saved_tensors
    settings, count = ctx.settings, len(ctx.settings.scales)
    (ups, casts, unscaled_outputs), tensors = _apart(rest[: 3 * count], 3), rest[3 * count :]
    x = restore_input(SavedInput(first, second, third, ctx.gate), ctx.needs_input_grad[1])
    needs_x, needs = ctx.needs_input_grad[1], _apart(ctx.needs_input_grad[2:])
    if torch.is_grad_enabled():
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
    _, needs_bias, needs_A, needs_B, needs_gain = needs
    weights, biases, A, B, gains = _apart(tensors)
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
            dgain[number] = (
                (dy * unscaled_outputs[number]).sum(0, dtype=gains[number].dtype)
                if needs_gain[number]
                else None
            )
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
        for dy, weight, reading in zip(dys, weights, settings.reads, strict=True):
            if dy is not None:
                dx.addmm_(dy, reading(settings.dtype) if weight is None else weight)
        dx = dx.view(ctx.shape)
    dA = [
        gradient if need and dy is not None else None
        for gradient, dy, need in zip(dA, gradients, needs_A, strict=True)
    ]
    dtypes = [
        ctx.cast or x.dtype,
        *(None if gradient is None else gradient.dtype for gradient in (*biases, *A, *B)),
    ]
    dx, *converted = _own_dtypes([dx, *db, *dA, *dB], dtypes)
    db, dA, dB = _apart(converted, 3)
    dA, dB = (
        [
            None if gradient is None else gradient.view(tensor.shape)
            for gradient, tensor in zip(ones, owns, strict=True)
        ]
        for ones, owns in ((dA, A), (dB, B))
    )
    return None, dx, *[None] * count, *db, *dA, *dB, *dgain


def _own_dtypes(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """Each gradient in the dtype of what it is of."""
    converted = list(gradients)
    for dtype in {*dtypes} - {None}:
        positions = [position for position, own_dtype in enumerate(dtypes) if own_dtype == dtype]
        for position, gradient in zip(
            positions,
            same_dtype([gradients[position] for position in positions], cast(Any, dtype)),
            strict=True,
        ):
            converted[position] = gradient
    return converted


def _apart(items: Sequence, pieces: int = 5) -> tuple[Any, ...]:
    """Equal parts of a sequence: (weights, biases, A, B, gains)."""
    count = len(items) // pieces
    return tuple(items[number * count : (number + 1) * count] for number in range(pieces))


def _definition(settings: Settings, x: Tensor, *tensors: Any) -> list[Tensor]:
    """The same by differentiable operations, without dropout."""
    dtype, ys = settings.dtype, []
    x = x.to(dtype)
    for number, (weight, bias, down, up, gain) in enumerate(zip(*_apart(tensors), strict=True)):
        weight = settings.reads[number](dtype) if weight is None else weight.to(dtype)  # pyright: ignore[reportOptionalCall]
        y = torch.nn.functional.linear(x, weight)
        y = reference.matmul_update(
            x, _matrix(down).to(dtype), _matrix(up).to(dtype), settings.scales[number], y
        )
        y = y if gain is None else (y * gain).to(dtype)
        ys.append(y if bias is None else y + bias.to(dtype))
    return ys
