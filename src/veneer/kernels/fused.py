"""Linear layers that read one input, with their low-rank changes, as one differentiable function.

    y_i = x W_iᵀ + bias_i + s_i · (drop(x) A_iᵀ) B_iᵀ
    x: [*, in]   W_i: [out_i, in]   A_i: [r_i, in]   B_i: [out_i, r_i]

Against ``reference.matmul_update`` layer by layer in autograd:

- h = A xᵀ for all layers is one product [R, T] (R = Σ r_i, T tokens) that reads x once; skinny
  products are oriented (rank, tokens), which BLAS runs up to several times faster than (tokens,
  rank);
- ΔW's part comes first and x Wᵀ is added to it inside its own product (``addmm_``), in the gradient
  of x too. That costs no pass of its own, and 16-bit outputs are rounded once, with the change in
  them: added to an output that has been rounded already, a change below half a step of its grid
  would vanish (at ‖ΔW‖ = 1e-4 ‖W‖, 93 % of it);
- saved are x, once for all layers, or what it was made of if that is saved anyway
  (``saved_inputs.py``), and h if it is small;
- dropout is a seed: backward draws the same entries again (see ``dropout.py``).

The backward of the backward (``create_graph=True``) goes through the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from veneer.kernels import device, dropout, has_tiles, reference
from veneer.kernels.saved_inputs import SavedInput, again, kept

_C: Any = torch._C


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is right for a call: an eager one on plain dense tensors of one dtype,
    with a frozen weight. Everything else (torch.compile, torch.func, autocast, tensor subclasses,
    …) takes the reference, and what lies on a device ``device.py``."""
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
        and type(x.shape[0])
        is int  # a tensor while torch.jit.trace runs, which this costs no call to ask
        and not _C._is_any_autocast_enabled()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


#: tokens up to which float32 is the faster dtype of a thin product
FEW = 32
# : bytes that a float32 thin product reads at a time on a CPU: they stay in its cache for the next
# one
CACHE = 3 << 18


class Settings(NamedTuple):
    """What a call is besides its tensors.

    Fields:
        scales: s_i.
        dropout: probability of dropping an entry of x on the low-rank path; one draw, by ``seed``,
            serves all layers.
        form: x is multiplied by W_i + s_i B_i A_i, formed anew in forward and in backward, in place
            of adding the product of the thin factors. Not with dropout, and not in 16 bits, where
            the sum would lose a small change.
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
        A, B: [r_i, in] and [out_i, r_i], or all of them with a first axis of one, of any
            floating-point dtype: computed in that of x, gradients in their own.

    Raises:
        ValueError: ``form`` with dropout or in 16 bits.
    """
    if settings.form and (settings.dropout or x.element_size() < 4):
        raise ValueError("W + ΔW is formed in float32 or float64 only, and without dropout")
    return _apply(settings, x, *weights, *biases, *A, *B)


def _cast(
    A: Sequence[Tensor], B: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor]]:
    """The factors A below each other [R, in], and each B [out, r], in a dtype."""
    joined = _matrix(A[0] if len(A) == 1 else torch.cat(tuple(A), -2), dtype)
    return joined, [_matrix(up, dtype) for up in B]


def dropped_entries(x: Tensor, p: float, seed: int) -> Tensor | None:
    """Indices of the entries of x that dropout of probability p drops; None for p = 0."""
    return dropout.drawn(x.numel(), p, seed, x.device) if p else None


def thin(narrow: Tensor, x: Tensor, entries: Tensor | None = None) -> Tensor:
    """narrow [R, k] times xᵀ, with x [T, k] and zeros in its ``entries``: [R, T]. In float32 the
    other way round may take a processor's library five times as long; in 16 bits it is this way
    which takes longer, so there the result lies transposed."""
    if entries is not None:
        x = dropout.without(x, entries)
    if x.dtype.itemsize < 4:
        return (x @ narrow.mT).mT
    chunk = _chunk(x)
    if x.shape[0] <= chunk or not x.is_cpu:
        return narrow @ x.mT
    rows = x.new_empty(narrow.shape[0], x.shape[0])
    for piece, place in zip(x.unsafe_split(chunk), rows.unsafe_split(chunk, 1), strict=True):
        torch.mm(narrow, piece.mT, out=place)
    return rows


def _chunk(x: Tensor) -> int:
    """A number of x's rows that stay in a processor's cache."""
    return 1 << max(CACHE // (x.shape[1] * 4), 1).bit_length() - 1


def _by_layer(rows: Tensor, ups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows [R, T] as those of each layer [r_i, T]."""
    return (rows,) if len(ups) == 1 else rows.split_with_sizes([up.shape[-1] for up in ups])


def _scaled(rows: Tensor, ups: Sequence[Tensor], settings: Settings) -> Tensor:
    """Each layer's rows [r_i, T] of [R, T] times its scale, in place."""
    scales = settings.scales
    if scales.count(scales[0]) == len(scales):
        rows *= scales[0] / (1 - settings.dropout)
    else:
        for part, scale in zip(_by_layer(rows, ups), scales, strict=True):
            part *= scale / (1 - settings.dropout)
    return rows


def onto(h: Tensor, up: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hᵀ upᵀ + x Wᵀ + bias [T, out]."""
    return added(h.mT @ up.mT, tokens, weight, bias)


def added(part: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """part + x Wᵀ + bias, in place and rounded once, where torch has a product that takes a bias
    and a summand."""
    if bias is None:
        return part.addmm_(tokens, weight.mT)
    if part.dtype.itemsize >= 4:
        part += bias
        return part.addmm_(tokens, weight.mT)
    if part.device.type == "cpu" and part.dtype is torch.bfloat16 and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise.binary(tokens, part, weight, bias, "add")
    if not part.is_cpu:
        return device.onto(part, tokens, weight, bias)
    return part.addmm_(tokens, weight.mT).add_(bias)  # rounded twice


def _matrix(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """[1, m, n] or [m, n] as [m, n] of a dtype."""
    factor = factor if factor.ndim == 2 else factor[0]
    return factor if factor.dtype == dtype else factor.to(dtype)


def _formed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s B A [out, in], in the dtype and layout of W."""
    up, down = _matrix(up, weight.dtype), _matrix(down, weight.dtype)
    if weight.is_contiguous():
        return torch.addmm(weight, up, down, alpha=scale)
    return torch.addmm(weight.mT, down.mT, up.mT, alpha=scale).mT


def _backward(ctx, *gradients):
    """Of both functions: in the dtypes of forward, which ran without autocast."""
    if not _C._is_any_autocast_enabled():
        return _gradients(ctx, *gradients)
    device = next(gradient.device.type for gradient in gradients if gradient is not None)
    with torch.autocast(device, enabled=False):
        return _gradients(ctx, *gradients)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, x, *tensors):
        weights, biases, A, B = _apart(tensors)
        tokens = x.reshape(-1, x.shape[-1])  # [T, in]
        h, cast_ = None, (None,) * (1 + len(B))
        if settings.form:
            factors = zip(weights, biases, A, B, settings.scales, strict=True)
            ys = [
                F.linear(tokens, _formed(W, down, up, s), bias) for W, bias, down, up, s in factors
            ]
        else:
            joined, ups = _cast(A, B, x.dtype)
            entries = dropped_entries(tokens, settings.dropout, settings.seed)
            h = _scaled(thin(joined, tokens, entries), ups, settings)  # [R, T]
            factors = zip(_by_layer(h, ups), ups, weights, biases, strict=True)
            ys = [onto(part, up, tokens, W, bias) for part, up, W, bias in factors]
            # h is a small part of x unless ranks are large; then it is cheaper to compute than to
            # keep
            h = h if h.shape[0] * 8 <= x.shape[-1] else None
            if A[0].dtype != x.dtype:  # backward needs what was cast
                cast_ = joined, *ups
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.shape = settings, x.shape
        *made_of, ctx.gate = kept(x)
        ctx.save_for_backward(*made_of, h, *cast_, *tensors)
        # `data` forgets that it is a view: those that a function makes may not be modified in
        # place, as ``nn.ReLU(inplace=True)`` does
        return tuple(y.view(*x.shape[:-1], y.shape[1]).data for y in ys)

    backward = staticmethod(_backward)


class _Linear(torch.autograd.Function):
    """The same for one layer without dropout, in as few Python calls as can be. Without ctx nothing
    is kept."""

    @staticmethod
    def forward(ctx, scale: float, x, weight, bias, A, B):
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        dtype = x.dtype
        down, up = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
        cast = A.dtype != dtype or B.dtype != dtype
        if cast:
            down, up = down.to(dtype), up.to(dtype)
        wide = dtype.itemsize >= 4
        few = tokens.shape[0] <= FEW
        h = down @ tokens.mT if wide and few else thin(down, tokens)  # [r, T]
        h *= scale
        if wide and few:
            y = h.mT @ up.mT  # [T, out]
            if bias is not None:
                y += bias
            y = y.addmm_(tokens, weight.mT)
        else:
            y = onto(h, up, tokens, weight, bias)
        if ctx is not None:
            ctx.settings, ctx.shape = scale, x.shape
            keep = h if h.shape[0] * 8 <= x.shape[-1] else None
            # what ctx.save_for_backward does, without a call
            x, second, third, ctx.gate = (x, None, None, None) if x.grad_fn is None else kept(x)
            ctx.to_save = (
                x,
                second,
                third,
                keep,
                down if cast else None,
                up if cast else None,
                weight,
                bias,
                A,
                B,
            )
        return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1]).data

    backward = staticmethod(_backward)


# ``Function.apply`` spends a dozen Python calls on ``torch.func``, whose transforms never come here
# (``applies``).
_apply = cast(Any, super(torch.autograd.Function, _Linears)).apply
# : (scale, x, weight, bias, A, B) -> y: ``linears`` of one layer without dropout, in as few Python
# calls as can be
linear = cast(Any, super(torch.autograd.Function, _Linear)).apply


def unrecorded(
    scale: float, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> Tensor:
    """``linear`` without a graph, to the same bits but in 16 bits: few tokens with float32 factors
    form B A x in float32, where products so small cost less."""
    dtype = x.dtype
    if dtype.itemsize >= 4:
        return _Linear.forward(None, scale, x, weight, bias, A, B)
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    down, up = A if A.ndim == 2 else A[0], B if B.ndim == 2 else B[0]
    part = None
    if tokens.shape[0] <= FEW and A.dtype is torch.float32:
        part = (((tokens.float() @ down.mT) * scale) @ up.mT).to(dtype)
    if part is None:
        return _Linear.forward(None, scale, x, weight, bias, A, B)
    lone = bias is None and tokens.shape[0] == 1 and dtype is torch.bfloat16
    if lone and x.is_cpu and weight.stride(1) == 1 and has_tiles():
        part[0].addmv_(weight, tokens[0])
    else:
        part = added(part, tokens, weight, bias)
    return part.view(*x.shape[:-1], part.shape[1])


def _gradients(ctx, *gradients):
    first, second, third, h, joined, *rest = ctx.saved_tensors
    x = again(SavedInput(first, second, third, ctx.gate), ctx.needs_input_grad[1])
    count = len(rest) // 5
    ups, tensors = rest[:count], rest[count:]
    if not isinstance(ctx.settings, Settings):
        ctx.settings = Settings((ctx.settings,))
    settings, weights, _, A, B = ctx.settings, *_apart(tensors)
    if torch.is_grad_enabled():
        plain, needs = functools.partial(_definition, settings.scales), ctx.needs_input_grad[1:]
        return None, *reference.gradients_of(
            plain, (x, *tensors), needs, gradients, settings.dropout
        )
    need_x, (_, need_bias, need_A, need_B) = (
        ctx.needs_input_grad[1],
        _apart(ctx.needs_input_grad[2:]),
    )
    tokens = x.reshape(-1, x.shape[-1])  # [T, in]
    dropped = dropped_entries(tokens, settings.dropout, settings.seed)
    dys = [None if g is None else g.reshape(-1, g.shape[-1]) for g in gradients]  # [T, out]
    if joined is None:
        joined, ups = _cast(A, B, x.dtype)
    if h is None:
        h = _scaled(thin(joined, tokens, dropped), ups, settings)  # [R, T]
    rows, dB = [], []
    for dy, up, part, need in zip(dys, ups, _by_layer(h, ups), need_B, strict=True):
        if dy is None:
            carried, gradient = torch.zeros_like(part), None
        else:
            carried, gradient = thin_twice(up.mT, dy, part) if need else (thin(up.mT, dy), None)
        rows.append(carried)
        dB.append(gradient)
    U = _scaled(_stacked(rows), ups, settings)  # s (dy B)ᵀ, [R, T]
    db = [
        dy.sum(0) if need and dy is not None else None
        for dy, need in zip(dys, need_bias, strict=True)
    ]
    part, grown = thin_back(
        U, joined, tokens, dropped, need_x and not settings.form, True in need_A
    )
    dx = part
    if need_x:  # dy W of all layers onto that of the thin products, or dy (W + ΔW)
        for dy, weight, down, up, scale in zip(dys, weights, A, B, settings.scales, strict=True):
            if dy is not None:
                through = _formed(weight, down, up, scale) if settings.form else weight
                dx = dy @ through if dx is None else dx.addmm_(dy, through)
        dx = (torch.zeros_like(tokens) if dx is None else dx).view(ctx.shape)
    dA: list[Any] = [None] * len(A)
    if grown is not None:
        parts = _by_layer(grown, ups)
        dA = [
            None if dy is None else as_factor(part, down)
            for dy, part, down in zip(dys, parts, A, strict=True)
        ]
    dB = [None if part is None else as_factor(part.mT, up) for part, up in zip(dB, B, strict=True)]
    return None, dx, *[None] * len(A), *db, *dA, *dB


def thin_twice(narrow: Tensor, dy: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(narrow dyᵀ [r, T], h dy [r, out]) with narrow [r, out], dy [T, out], h [r, T]; in float32
    both of a chunk of tokens that is still in the processor's cache."""
    chunk = _chunk(dy)
    if dy.dtype.itemsize < 4 or dy.shape[0] <= chunk or not dy.is_cpu:
        return thin(narrow, dy), h @ dy
    rows, found = torch.empty_like(h), None
    pieces = zip(
        dy.unsafe_split(chunk), rows.unsafe_split(chunk, 1), h.unsafe_split(chunk, 1), strict=True
    )
    for piece, place, part in pieces:
        torch.mm(narrow, piece.mT, out=place)
        found = part @ piece if found is None else found.addmm_(part, piece)
    return rows, cast(Tensor, found)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """Each layer's [r_i, T] below each other, laid out as ``thin`` does."""
    if len(rows) == 1:
        return rows[0]
    return (
        torch.cat(tuple(rows))
        if rows[0].is_contiguous()
        else torch.cat([one.mT for one in rows], 1).mT
    )


def as_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient [m, n] of a factor in its own dtype and shape."""
    if gradient.dtype != factor.dtype:
        gradient = gradient.to(factor.dtype, memory_format=torch.contiguous_format)
    return gradient if factor.ndim == 2 else gradient[None]


def thin_back(
    U: Tensor, joined: Tensor, x: Tensor, entries: Tensor | None, need_x: bool, need_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(Uᵀ joined [T, in], U x [R, in]) with U [R, T], joined [R, in] and x [T, in], both with
    zeros in these ``entries``; None for what is not needed."""
    part = U.mT @ joined if need_x else None
    if entries is not None:
        x = dropout.without(x, entries) if need_A else x
        part = None if part is None else part.view(-1).index_fill_(0, entries, 0).view(x.shape)
    return part, U @ x if need_A else None


def _apart(items: Sequence):
    """(weights, biases, A, B) from one sequence of them all."""
    count = len(items) // 4
    return tuple(items[part * count : (part + 1) * count] for part in range(4))


def _definition(scales: Sequence[float], x: Tensor, *tensors) -> list[Tensor]:
    return [
        reference.matmul_update(
            x, _matrix(down, x.dtype), _matrix(up, x.dtype), scale, F.linear(x, weight, bias)
        )
        for weight, bias, down, up, scale in zip(*_apart(tensors), scales, strict=True)
    ]
