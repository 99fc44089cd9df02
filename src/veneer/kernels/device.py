"""Linear layers that read the same input x, with low-rank changes, on any device but the CPU.

    y_i = gain_i ⊙ (x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ) + bias_i
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]   gain_i: [out_i] or None

``fused.py`` computes the same function (without gains) on a CPU. The costs differ here: launching
an operation takes as long as a product with A or B, and the host waits for the device whenever it
reads a value from it.

- **Few launches.** One launch casts all tensors that do not have the dtype of the products; in
  backward, another casts the gradients. A scale is the ``alpha`` of a product. The product x Wᵀ
  adds its result to the low-rank term in place. A bfloat16 layer with a float32 adapter takes 4
  launches in forward and 6 in backward (``tests/cuda/test_counts.py``).
- **No synchronisation.** Dropout multiplies by a mask that is drawn from a seed; backward draws it
  again. Drawing the indices of dropped entries, as on a CPU, would need their number on the host to
  allocate memory for them.
- **Autocast** is applied in this module, so that x, W, A and B are cast together. torch would cast
  for each product separately.
- **16-bit outputs are rounded once**, after the bias and the low-rank term are added, if the device
  has products with float32 output (``_has_wide_products``). With a gain (DoRA), the output is
  rounded before and after the multiplication by the gain.

Saved for backward are x (or factors from which x is recomputed, see ``saved_inputs.py``), A and B
in the dtype of the products, h = drop(x) Aᵀ if it is small, and, with a gain, the output before the
gain. A weight that is not stored as a plain tensor (4-bit storage) is passed as a function that
dequantises it; backward calls this function again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError
from veneer.kernels import is_eager, reference, split_equally
from veneer.kernels.dropout import keep_mask
from veneer.kernels.saved_inputs import SavedInput, input_to_save, restore_input

_C: Any = torch._C
#: a function that dequantises a weight and returns it as a tensor [out, in] of the given dtype
ReadWeight = Callable[[torch.dtype], Tensor]


class Settings(NamedTuple):
    """The options of a call of ``linears``.

    Fields:
        scales: s_i, the factor of B_i A_i of each layer.
        dtype: dtype of the products and of y.
        dropout: probability of dropping an entry of x on the low-rank path. ``seed`` determines the
            dropped entries, which are the same for all layers.
        readers: for each layer, the function that dequantises its weight; None if the weight is a
            tensor.
    """

    scales: tuple[float, ...]
    dtype: torch.dtype
    dropout: float
    seed: int
    readers: tuple[ReadWeight | None, ...]


#: whether this module handles tensors on the meta device as if they were on a GPU
#: (``count_on_meta``)
_INCLUDES_META: ContextVar[bool] = ContextVar("includes_meta", default=False)


@contextmanager
def count_on_meta() -> Iterator[None]:
    """A context in which this module handles tensors on the meta device as if they were on a GPU,
    so that the operations and saved tensors of a training step can be counted without a GPU."""
    reset_token = _INCLUDES_META.set(True)
    try:
        yield
    finally:
        _INCLUDES_META.reset(reset_token)


def is_plain(x: Tensor) -> bool:
    """Whether the call is eager, and x is an ordinary dense floating-point tensor on any device but
    the CPU and the meta device. The meta device counts only within ``count_on_meta``."""
    return (
        type(x) is Tensor
        and not x.is_cpu
        and (not x.is_meta or _INCLUDES_META.get())
        and x.layout is torch.strided
        and x.ndim > 0
        and type(x.shape[0]) is int
        and x.is_floating_point()
        and is_eager()
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x is computed: autocast's dtype if autocast is on
    and x is not float64, else the dtype of x."""
    device_type = x.device.type
    if x.itemsize < 8 and _is_autocast_on(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _is_autocast_on(device_type: str) -> bool:
    """Whether autocast is on for this type of device. False for "meta", for which
    ``torch.is_autocast_enabled`` raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def applies(x: Tensor, weight: Any) -> bool:
    """Whether ``linears`` supports this input and weight: ``is_plain(x)`` is true, and the weight
    is a frozen floating-point parameter on the device of x, with the same dtype as x (after
    autocast has cast both, if it is on)."""
    if (
        not is_plain(x)
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or weight.device != x.device
    ):
        return False
    return weight.is_floating_point() and product_dtype(weight) == product_dtype(x)


def applies_without_cast(x: Tensor, weight: Any) -> bool:
    """Whether ``applies(x, weight)`` is true and autocast would cast neither x nor the weight. For
    callers whose own operations ignore autocast."""
    return applies(x, weight) and product_dtype(x) == x.dtype == weight.dtype


def linears(
    scales: Sequence[float],
    x: Tensor,
    weights: Sequence[Tensor | ReadWeight],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gains: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """y_i of each layer, in autocast's dtype if autocast is on, else in the dtype of x. Twice
    differentiable in x, the biases, A, B and the gains.

    Args:
        x: [*, in], for which ``is_plain`` is true.
        weights: of each layer, a tensor [out_i, in], or a function that dequantises the weight to
            one. They get no gradient.
        biases: of each layer, [out_i] or None.
        A, B: of each layer, tensors [r_i, in] and [out_i, r_i] of any floating-point dtype. All of
            them may have a first axis of size 1.
        gains: of each layer, a tensor [out_i] by which x (W + ΔW)ᵀ is multiplied before the bias is
            added (DoRA), or None; None if no layer has a gain.
        dropout, seed: the probability of dropping an entry of x on the low-rank path, and the seed
            that determines the dropped entries.

    Raises:
        VeneerError: in backward with ``create_graph=True``, if autocast has cast x.
    """
    gains = [None] * len(A) if gains is None else gains
    readers = tuple(cast(Any, None if isinstance(weight, Tensor) else weight) for weight in weights)
    weight_tensors = [weight if isinstance(weight, Tensor) else None for weight in weights]
    settings = Settings(tuple(scales), product_dtype(x), dropout, seed, readers)
    with (
        torch.autocast(x.device.type, enabled=False)
        if _is_autocast_on(x.device.type)
        else _NO_CONTEXT
    ):
        if torch.is_grad_enabled():
            return _apply(settings, x, *weight_tensors, *biases, *A, *B, *gains)
        return _forward(None, settings, x, *weight_tensors, *biases, *A, *B, *gains)


_NO_CONTEXT = nullcontext()  # stateless, so all calls can share it


def same_dtype(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors in ``dtype``: all tensors of one other dtype are cast by one launch. None stays
    None."""
    return _cast_each(tensors, [dtype] * len(tensors))


def _cast_each(
    tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """Each tensor in its dtype of ``dtypes``: one launch casts all tensors that go from the same
    dtype to the same other dtype. A tensor that has its dtype already is returned as it is; None
    stays None."""
    cast_tensors, positions_by_dtypes = list(tensors), {}
    for position, (tensor, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if tensor is not None and tensor.dtype != dtype:
            positions_by_dtypes.setdefault((tensor.dtype, dtype), []).append(position)
    for (_, dtype), positions in positions_by_dtypes.items():
        casts = _cast([cast(Tensor, tensors[position]) for position in positions], dtype)
        for position, tensor in zip(positions, casts, strict=True):
            cast_tensors[position] = tensor
    return cast_tensors


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    if len(tensors) == 1 or not tensors[0].is_cuda:
        return [tensor.to(dtype) for tensor in tensors]
    if _has_list_copy():
        copies = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
        vars(torch)["_foreach_copy_"](copies, tensors)
        return copies
    # one ``cat`` into a tensor of ``dtype`` casts all contiguous tensors; views of it are returned
    contiguous_indices = [index for index, tensor in enumerate(tensors) if tensor.is_contiguous()]
    sizes = [tensors[index].numel() for index in contiguous_indices]
    flat = tensors[0].new_empty(sum(sizes), dtype=dtype)
    if contiguous_indices:
        torch.cat([tensors[index].view(-1) for index in contiguous_indices], out=flat)
    views = dict(zip(contiguous_indices, flat.split(sizes), strict=True))
    return [
        views[i].view(tensor.shape) if i in views else tensor.to(dtype)
        for i, tensor in enumerate(tensors)
    ]


@functools.cache
def _has_list_copy() -> bool:
    """Whether this torch has a CUDA kernel for ``torch._foreach_copy_``, which can cast a list of
    tensors in one launch."""
    return _C._dispatch_has_kernel_for_dispatch_key("aten::_foreach_copy_", "CUDA")


def product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · left @ right, from [m, k] and [k, n], written to ``out`` [m, n] if it is not None."""
    out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    return (
        torch.mm(left, right, out=out)
        if scale == 1
        else out.addmm_(left, right, beta=0, alpha=scale)
    )


@functools.cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``torch.addmm`` of tensors in ``dtype``, if it has 16 bits, can write a float32
    output on this device. Tested by calling it, because torch has no query for it."""
    if dtype.itemsize > 2:
        return False
    try:
        probe = torch.zeros(8, 8, dtype=dtype, device=device)
        torch.addmm(probe.float(), probe, probe, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def add_change(
    h: Tensor, B: Tensor, scale: float, tokens: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """x Wᵀ + scale · h Bᵀ + bias, [T, out], for h = x Aᵀ [T, r], B [out, r], the input x as
    ``tokens`` [T, in] and the ``weight`` W [out, in]. In 16 bits, the result is rounded once, or
    twice with a bias on a device without 16-bit products with float32 output."""
    B, weight = B.mT, weight.mT
    if bias is None:
        return product(h, B, scale).addmm_(tokens, weight)
    if h.itemsize >= 4:
        return torch.addmm(bias, h, B, alpha=scale).addmm_(tokens, weight)
    if not _has_wide_products(h.device, h.dtype):
        return product(h, B, scale).addmm_(tokens, weight).add_(bias)  # rounded twice
    float32_sum = h.new_empty(h.shape[0], B.shape[1], dtype=torch.float32)
    options: Any = {"out_dtype": torch.float32, "out": float32_sum}
    torch.addmm(float32_sum, h, B, beta=0, alpha=scale, **options)
    torch.addmm(float32_sum, tokens, weight, **options)
    return torch.add(float32_sum, bias, out=h.new_empty(float32_sum.shape))


def add_frozen_product(change: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """change + x Wᵀ + bias in 16 bits, written to ``change`` [T, out], the low-rank term
    scale · h Bᵀ of the layer, and returned. x is ``tokens`` [T, in]. Rounded once if the device has
    16-bit products with float32 output, else twice."""
    if not _has_wide_products(change.device, change.dtype):
        return change.addmm_(tokens, weight.mT).add_(bias)
    float32_sum, options = change.float(), cast(Any, {"out_dtype": torch.float32})
    torch.addmm(float32_sum, tokens, weight.mT, out=float32_sum, **options)
    return torch.add(float32_sum, bias, out=change)


def _as_matrix(factor: Tensor) -> Tensor:
    """A or B, of shape [m, n] or [1, m, n], as [m, n]."""
    return factor if factor.ndim == 2 else factor[0]


def _rank_spans(B_by_layer: Sequence[Tensor]) -> list[tuple[int, int]]:
    """For each layer, the (start, end) of its columns in h [T, R], in which the ranks of all layers
    follow each other. A layer's rank is read from its B [out, r]."""
    ends = itertools.accumulate((layer_B.shape[1] for layer_B in B_by_layer), initial=0)
    return list(itertools.pairwise(ends))


def _forward(ctx: Any, settings: Settings, x: Tensor, *layer_tensors: Any) -> tuple[Tensor, ...]:
    weights, biases, A, B, gains = split_equally(layer_tensors, 5)
    count, dtype = len(A), settings.dtype
    uncast_tensors = [x, *weights, *biases, *map(_as_matrix, A), *map(_as_matrix, B)]
    x_cast, *cast_layer_tensors = same_dtype(uncast_tensors, dtype)
    cast_weights, cast_biases, cast_A, cast_B = split_equally(cast(Any, cast_layer_tensors), 4)
    joined_A = cast_A[0] if count == 1 else torch.cat(cast_A)  # [R, in], R: the ranks of all layers
    tokens = cast(Tensor, x_cast).reshape(-1, x.shape[-1])  # [T, in]
    dropped_x, keep_probability = tokens, 1 - settings.dropout
    if settings.dropout:
        dropped_x = tokens * keep_mask(tokens.shape, settings.dropout, settings.seed, x.device)
    h = dropped_x @ joined_A.mT  # [T, R]
    ys, outputs_before_gain = [], []
    for layer, (start, end) in enumerate(_rank_spans(cast_B)):
        scale, gain = settings.scales[layer] / keep_probability, gains[layer]
        weight, bias = cast_weights[layer], cast_biases[layer]
        weight = settings.readers[layer](dtype) if weight is None else weight  # pyright: ignore[reportOptionalCall]
        y = add_change(
            h[:, start:end],
            cast_B[layer],
            scale,
            tokens,
            weight,
            None if gain is not None else bias,
        )
        outputs_before_gain.append(None if gain is None else y)
        if gain is not None:
            y = torch.mul(y, gain, out=torch.empty_like(y))
            y = y if bias is None else y.add_(bias)
        # Autograd forbids in-place changes of a view that a custom function returns. It does not
        # treat `.data` as a view.
        ys.append(y.view(*x.shape[:-1], y.shape[1]).data)
    if ctx is not None:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape, ctx.device_type = settings, x.shape, x.device.type
        ctx.uncast_dtype = None if x_cast is x else x.dtype
        saved = input_to_save(x) if x_cast is x else SavedInput(cast(Tensor, x_cast))
        *saved_tensors, ctx.gate = saved
        # `saved` holds x, or the factors from which backward computes x. In the first case, and
        # with dropout, drop(x) is saved in place of x, because backward uses nothing else of it.
        ctx.saves_dropped_x = settings.dropout > 0 and saved.second is None
        if ctx.saves_dropped_x:
            saved_tensors[0] = dropped_x
        h = h if h.shape[1] * 8 <= x.shape[-1] else None
        # Casts of weights are saved too, as torch's autocast does, so that backward need not cast.
        weight_pairs = zip(cast_weights, weights, strict=True)
        casts = (
            None if cast_weight is weight else cast_weight for cast_weight, weight in weight_pairs
        )
        ctx.save_for_backward(
            *saved_tensors, h, joined_A, *cast_B, *casts, *outputs_before_gain, *layer_tensors
        )
    return tuple(ys)


class _LinearsOnDevice(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with (
            torch.autocast(ctx.device_type, enabled=False)
            if _is_autocast_on(ctx.device_type)
            else _NO_CONTEXT
        ):
            return _gradients(ctx, *dys)


# ``apply`` of the C++ base class skips the dozen Python calls that ``Function.apply`` makes for the
# transforms of ``torch.func``. Calls under a transform never reach this function (see
# ``is_plain``).
_apply = cast(Any, super(torch.autograd.Function, _LinearsOnDevice)).apply


def _gain_gradient(dy: Tensor, outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ dy · y over the tokens, [out], in ``dtype``. ``dy``, ``outputs``: [tokens, out]. Products
    of float16 may exceed its range, so they are computed in float32."""
    return ((dy.float() if dy.dtype == torch.float16 else dy) * outputs).sum(0, dtype=dtype)


def _gradients(ctx: Any, *dys: Tensor | None) -> Any:
    x_or_factor, factor2, factor3, h, joined_A, *saved_tensors = ctx.saved_tensors
    settings, count = ctx.settings, len(ctx.settings.scales)
    cast_B, cast_weights, outputs_before_gain = split_equally(saved_tensors[: 3 * count], 3)
    layer_tensors = saved_tensors[3 * count :]
    x = restore_input(SavedInput(x_or_factor, factor2, factor3, ctx.gate), ctx.needs_input_grad[1])
    need_x, needs_by_input = ctx.needs_input_grad[1], split_equally(ctx.needs_input_grad[2:], 5)
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, x, layer_tensors, dys)
    _, need_bias, need_A, need_B, need_gain = needs_by_input
    weights, biases, A, B, gains = split_equally(layer_tensors, 5)
    weights = [
        weight if cast_weight is None else cast_weight
        for cast_weight, weight in zip(cast_weights, weights, strict=True)
    ]
    tokens = x.reshape(-1, x.shape[-1])
    mask = None
    if settings.dropout and (need_x or not ctx.saves_dropped_x):
        mask = keep_mask(tokens.shape, settings.dropout, settings.seed, x.device)
    dropped_x = tokens if mask is None or ctx.saves_dropped_x else tokens * mask
    h = dropped_x @ joined_A.mT if h is None else h
    u = h.new_empty(h.shape)  # s · dy B of each layer, [T, R]
    db, dB, dgain, scaled_dys = cast(Any, ([None] * count for _ in range(4)))
    for layer, (start, end) in enumerate(_rank_spans(cast_B)):
        dy, scale = dys[layer], settings.scales[layer] / (1 - settings.dropout)
        if dy is None:
            u[:, start:end].zero_()
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        db[layer] = dy.sum(0) if need_bias[layer] else None
        if gains[layer] is not None:
            if need_gain[layer]:
                dgain[layer] = _gain_gradient(dy, outputs_before_gain[layer], gains[layer].dtype)
            dy = torch.mul(dy, gains[layer], out=torch.empty_like(dy))
        product(dy, cast_B[layer], scale, u[:, start:end])
        dB[layer] = product(dy.mT, h[:, start:end], scale) if need_B[layer] else None
        scaled_dys[layer] = dy
    dA = (
        (u.mT @ dropped_x).split([end - start for start, end in _rank_spans(cast_B)])
        if True in need_A
        else [None] * count
    )
    dx = None
    if need_x:
        dx = u @ joined_A
        dx = dx if mask is None else dx.mul_(mask)
        dx = _add_frozen_gradients(dx, settings, scaled_dys, weights).view(ctx.shape)
    dA = [
        gradient if need and dy is not None else None
        for gradient, dy, need in zip(dA, dys, need_A, strict=True)
    ]
    parameters = (*biases, *A, *B)
    dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    dx, *cast_gradients = _cast_each([dx, *db, *dA, *dB], [ctx.uncast_dtype or x.dtype, *dtypes])
    cast_gradients = [
        None if gradient is None else gradient.view(parameter.shape)
        for gradient, parameter in zip(cast_gradients, parameters, strict=True)
    ]
    return None, dx, *[None] * count, *cast_gradients, *dgain


def _add_frozen_gradients(
    dx: Tensor, settings: Settings, dys: Sequence[Tensor | None], weights: Sequence[Tensor | None]
) -> Tensor:
    """Add Σ dy_i W_i, the gradient of x through the frozen weights, to ``dx`` [T, in] in place, and
    return it. A weight that is None is dequantised by its function in ``settings.readers``; a layer
    whose dy is None adds nothing."""
    for dy, weight, reader in zip(dys, weights, settings.readers, strict=True):
        if dy is not None:
            dx.addmm_(dy, reader(settings.dtype) if weight is None else weight)  # pyright: ignore[reportOptionalCall]
    return dx


def _differentiable_gradients(
    ctx: Any, x: Tensor, layer_tensors: Sequence[Any], dys: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The gradients of all inputs of ``_forward``, with an autograd graph, so that they can be
    differentiated again.

    Raises:
        VeneerError: if autocast has cast x. Only the cast was saved, and it has no graph that leads
            to x.
    """
    settings = ctx.settings
    if ctx.uncast_dtype is not None:
        raise VeneerError(
            f"a second gradient through an input in {ctx.uncast_dtype} that autocast casts to "
            f"{settings.dtype}",
            f"an input in {settings.dtype}, of which backward keeps no copy without a graph",
            "cast the input before the layer, or compute this outside of autocast",
        )
    outputs_of = functools.partial(_differentiable_outputs, settings)
    needs_gradient = ctx.needs_input_grad[1:]
    return None, *reference.gradients_of(
        outputs_of, (x, *layer_tensors), needs_gradient, dys, settings.dropout
    )


def _differentiable_outputs(settings: Settings, x: Tensor, *layer_tensors: Any) -> list[Tensor]:
    """The outputs of the layers by operations that can be differentiated twice, without dropout.
    ``layer_tensors``: the weights (None if ``settings.readers`` has a function), biases, A, B and
    gains of all layers."""
    dtype, ys = settings.dtype, []
    x = x.to(dtype)
    for layer, (weight, bias, layer_A, layer_B, gain) in enumerate(
        zip(*split_equally(layer_tensors, 5), strict=True)
    ):
        weight = settings.readers[layer](dtype) if weight is None else weight.to(dtype)  # pyright: ignore[reportOptionalCall]
        y = torch.nn.functional.linear(x, weight)
        y = reference.matmul_update(
            x,
            _as_matrix(layer_A).to(dtype),
            _as_matrix(layer_B).to(dtype),
            settings.scales[layer],
            y,
        )
        y = y if gain is None else (y * gain).to(dtype)
        ys.append(y if bias is None else y + bias.to(dtype))
    return ys
