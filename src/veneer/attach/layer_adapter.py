"""What one adapter does at one layer, and the choice of the arithmetic for a call.

Linear, adapted (a subclass of nn.Linear: ``adapted_module.py``)
  .weight, .bias                      the base's own Parameters, untouched
  ._modules["veneer"]: LayerState     the adapters of this layer, by name
      ["default"]: LayerAdapter       what this adapter does here
          .low["weight"]: Change      the adapter parameters A, B, … of one weight
          .full                       parameters that are trained in full, and running statistics

factored:      y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias      layers that are linear in their one weight
materialised:  y = op(x; gain ⊙ (W + ΔW)) + bias                   the same, by the definition
viewed:        y = forward(x) of a view whose weights are gain ⊙ (W + ΔW)          every other module there is

Rejected: wrapping the layer (renames every parameter, breaks ``isinstance`` and ties), replacing
``forward`` on the instance (a bound method per copy, lost under pickle), forward hooks (two more
calls a layer, and no way to change the weight that is used) and ``parametrize`` (materialises
always, changes the state dict's keys, cannot be pickled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import context
from veneer.attach.adapted_module import own_forward, weight_of
from veneer.attach.change import PIECES, Change, changed_storage, frozen_weight
from veneer.attach.dtypes import at_least_float32, no_autocast, output_dtype, widen
from veneer.attach.experts import dropped, is_stack
from veneer.attach.fused_linear import Direct, Together, direct, outputs, seed_of
from veneer.attach.state import LayerState, ModulePath
from veneer.attach.views import view, viewed
from veneer.kernels import cost_model, device, fused
from veneer.kernels.dropout import dropout as drop
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Layer
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS


def _trains_both(change: Change) -> bool:
    """Whether a change is the product of two parameters A and B, as LoRA's is; MiCA's B is a
    buffer."""
    return change.variant.resolve is VARIANTS["lora"].resolve and not change.variant.frozen


class LayerAdapter(nn.Module):
    """What one adapter does at one layer.

    ``changes`` are the changes of this module's own weights by name; those that no other module
    registered are in ``low``. ``full`` holds full replacements of parameters and buffers by name.
    ``read_below`` are the parts of modules below, by path, whose weights this module's forward
    reads directly; ``entries`` the same of each other method that reads an adapted weight, here or
    below.
    """

    full: nn.Module
    low: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Module()
        self.full = nn.Module()
        self.changes: dict[str, Change] = {}
        self.gained = False
        self.direct: Direct | None = None
        self.together: Together | None = None
        self.read_below: dict[ModulePath, LayerAdapter] = {}
        self.entries: dict[str, dict[ModulePath, LayerAdapter]] = {}

    def keys(self, layer_state: LayerState) -> Iterator[Any]:
        """The keys of what this part takes part in: forward, unless it would find nothing changed,
        and methods."""
        if (
            self.changes
            or self.read_below
            or self.full._parameters
            or self.full._buffers
            or layer_state.attributes
        ):
            yield layer_state.key
        for method in self.entries:
            yield layer_state.key, method

    def finalize(self, module: nn.Module, layer_state: LayerState) -> None:
        """Once all is in place: is it one product B A for all outputs, for the fused kernel to take
        as it is?"""
        changes = tuple(self.changes.values())
        alone = len(changes) == 1 and not (
            self.read_below or self.full._parameters or self.full._buffers
        )
        plain = alone and _trains_both(changes[0])
        if (
            plain
            and changes[0].rows is None
            and changes[0].tokens is None
            and changes[0].frozen_input is None
            and layer_state.product
            and not layer_state.transposed
        ):
            self.direct = direct(changes[0], module, cast(Layer, layer_state.layer))

    def seen(self, method: str = "forward") -> Iterator[int]:
        """The identities of what a call of this layer sees: this part, its changes, and the parts
        that it reads."""
        yield id(self)
        yield from map(id, self.changes.values())
        for part in self.below(method).values():
            yield from part.seen()

    def below(self, method: str) -> Mapping[ModulePath, LayerAdapter]:
        """The parts of modules below whose weights a method reads directly."""
        return self.read_below if method == "forward" else self.entries[method]

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """What ``full`` puts in place of the module's own parameters and buffers, in their
        dtypes."""
        full = self.full
        if not full._parameters and not full._buffers:
            return {}
        own: dict[str, Any] = {**module._buffers, **module._parameters}
        for name in full._parameters.keys() - own.keys():
            raise changed_storage(module, name)
        # of a layer without one: in the dtype of its weight
        if "bias" in full._parameters and own["bias"] is None:
            own["bias"] = own["weight"]
        trained: dict[str, Any] = {
            name: value.to(own[name].dtype) for name, value in full._parameters.items()
        }
        return {**trained, **cast(dict[str, Tensor], full._buffers)}

    def run(
        self,
        module: Any,
        base: Any,
        layer_state: Any,
        args: tuple,
        kwargs: dict,
        now: Any,
        share=True,
        method="forward",
        seed: int | None = None,
    ) -> Any:
        """The adapted forward (or another method) of ``module``, whose class was ``base``, in the
        context ``now``. ``share`` allows to compute layers that read the same input together.
        ``seed``: that of dropout, where it is known already."""
        if method != "forward":
            return viewed(self, module, base, layer_state, args, kwargs, now, method=method)
        known = self.direct
        try:
            if (
                known is not None
                and not (kwargs or args[1:])
                and now.path is None
                and known.weight in module._parameters
            ):
                # Each Python call here is time in every layer of a decoding step.
                x, own = args[0], module._parameters
                weight: Any = own[known.weight]
                if fused.applies(x, weight):
                    if self.together is not None and share and self.together.applies(known, x):
                        return self.together.output(module, self, x)
                    shape, change = x.shape, known.change
                    tokens = shape[0] * shape[1] if x.ndim == 3 else x.numel() // shape[-1]
                    if change.dropout and change.training:
                        seed = seed_of(module, self, x) if share and seed is None else seed
                        return outputs([(module, known)], x, seed)[0]
                    if tokens > known.forms_above:
                        return outputs([(module, known)], x)[0]
                    factors: Any = change._parameters
                    bias = None if known.bias is None else own[known.bias]
                    weight = weight.mT if known.flipped else weight
                    run = fused.linear if torch.is_grad_enabled() else fused.linear_without_graph
                    return run(change.scale, x, weight, bias, factors["A"], factors["B"])
                if device.applies(x, weight):
                    return self._with_others(module, known, x, share, seed)
        except KeyError as error:
            if known is None or error.args != (known.bias,):
                raise
            # this layer, or one that is computed with it, has a bias that is no parameter any more:
            # pruned, say
        return self._run_any(module, base, layer_state, args, kwargs, now)

    def _run_any(
        self, module: Any, base: Any, layer_state: Any, args: tuple, kwargs: dict, now: Any
    ) -> Any:
        """A forward that is not one fused product: in factors, on the changed weight, or on a
        view."""
        full = self.replacements(module)
        if (
            not (layer_state.factors and self.changes and len(args) + len(kwargs) == 1)
            or self.read_below
        ):
            return viewed(self, module, base, layer_state, args, kwargs, now)
        reader: Any = layer_state.layer
        if is_jagged(args, kwargs) and reader.by_position:
            run = partial(self._run_any, module, base, layer_state, kwargs={}, now=now)
            return on_values(run, args, kwargs)
        change = self.changes[reader.weight]
        low, gain = change.resolve(frozen_weight(change, module, reader.weight))
        dropout = change.dropout if change.training else 0.0
        call = Call(module, base, layer_state, args, kwargs, full, bool(self.entries))
        call.refuse_other_dtype(change)
        # where rows of ΔW are rescaled along what this layer (tied to the adapted one) reads as
        # inputs, only W + ΔW is right; elsewhere the caller's choice counts
        if now.path == cost_model.MATERIALISED or (gain is not None and layer_state.transposed):
            return _materialised(
                change, reader, module, call.x, call.weight, call.bias(change), low, gain
            )
        return factored(call, change, low, gain, dropout)

    def stacks(self, module: nn.Module) -> dict[str, tuple[Any, LowRank]] | None:
        """(W, ΔW) of every weight that changes here, by name, if each is a plain stack of matrices
        without a gain."""
        if self.gained:  # to find that out again takes W + ΔW
            return None
        weights = {
            name: frozen_weight(change, module, name) for name, change in self.changes.items()
        }
        if not all(is_stack(change, weights[name]) for name, change in self.changes.items()):
            return None
        found = {}
        for name, change in self.changes.items():
            if _trains_both(change) and change.rows is change.tokens is None:
                own: Any = change._parameters  # in every layer of a decoding step
                low, gain = LowRank(own["A"], own["B"], change.scale), None
            else:
                low, gain = change.resolve(weights[name])
            if gain is not None:
                self.gained = True
                return None
            found[name] = weights[name], dropped(change, low)
        return found

    def _with_others(
        self, module: nn.Module, known: Direct, x: Tensor, share: bool, seed: int | None
    ) -> Tensor:
        """The output of a layer that the fused kernel computes, with those of layers that read the
        same x."""
        if self.together is not None and share and self.together.applies(known, x):
            return self.together.output(module, self, x)
        seed = seed_of(module, self, x) if share and known.drops and seed is None else seed
        return outputs([(module, known)], x, seed)[0]

    def changed(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """``gain ⊙ (W + ΔW)`` of every weight that changes, in at least float32 if ``wide``, else
        in its dtype."""
        values = {}
        for name, change in self.changes.items():
            weight = frozen_weight(change, module, name)
            own = change.storage.dtype(weight)
            low, gain = change.resolve(weight)
            value = change.changed(weight, low, gain, at_least_float32(own), drop=True)
            values[name] = value if wide else value.to(own)
        return values


def is_jagged(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the one input of a call is a nested tensor of jagged layout."""
    x = args[0] if args else next(iter(kwargs.values()))
    return type(x) is not Tensor and isinstance(x, Tensor) and x.layout is torch.jagged


def on_values(run: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a layer makes of a jagged tensor, of which it computes each position alone: of the
    positions of all rows, which are one plain tensor. The offsets stay the same, so that torch
    knows the outputs to be of equal shape."""
    x: Any = args[0] if args else next(iter(kwargs.values()))
    y = run(args=(x.values(),))
    return torch.nested.nested_tensor_from_jagged(
        y, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )


class Call(NamedTuple):
    """One call of a layer that has one input and is linear in its one weight. ``full``: what
    replaces parameters of its own; ``entries``: whether other methods of the module read adapted
    weights too."""

    module: Any
    base: Any
    layer_state: LayerState
    args: tuple
    kwargs: dict
    full: Mapping[str, Tensor]
    entries: bool

    @property
    def x(self) -> Tensor:
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def weight(self) -> Any:
        return weight_of(self.module, cast(Layer, self.layer_state.layer).weight)

    def bias(self, change: Change) -> Any:
        parameters = self.module._parameters
        plain = "bias" in parameters and not change.storage.opaque
        # pruned or parametrised, say
        own = parameters["bias"] if plain else getattr(self.module, "bias", None)
        return self.full.get("bias", own)

    def refuse_other_dtype(self, change: Change) -> None:
        """Raise torch's own error where the layer without an adapter takes no input of this
        dtype."""
        x, weight = (
            self.x,
            frozen_weight(change, self.module, cast(Layer, self.layer_state.layer).weight),
        )
        if change.storage.name != "plain" or not isinstance(x, Tensor) or x.dtype == weight.dtype:
            return
        if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            with torch.no_grad():
                own_forward(self.module, self.base, *self.args, **self.kwargs)

    def frozen(self, change: Change, biased: bool) -> Tensor:
        """op(x; W), with the bias if ``biased``."""
        module, reader, x = self.module, cast(Layer, self.layer_state.layer), self.x
        if biased and not self.full and not change.storage.computed:
            # with entries: on a view, whose methods are the base's too
            plain: Any = view(module, self.base, {}) if self.entries else module
            return own_forward(plain, self.base, *self.args, **self.kwargs)
        dense = change.storage.dense(self.weight)
        dense = dense.to(x.dtype) if x.is_floating_point() else dense
        return reader.op(module, x, dense, self.bias(change) if biased else None)


def factored(
    call: Call,
    change: Change,
    low: LowRank,
    gain: Tensor | None,
    dropout: float,
    form: bool = False,
) -> Any:
    """gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias. ``form``: W + ΔW may be formed, where nothing
    else hinders it."""
    module, layer_state, x, weight = call.module, call.layer_state, call.x, call.weight
    reader: Any = layer_state.layer
    bias = call.bias(change)
    if gain is None and layer_state.product and fused.applies(x, weight):
        low = low.T if layer_state.transposed else low
        settings = fused.Settings(
            (low.scale,), dropout, new_seed() if dropout else 0, form and not dropout
        )
        matrix = weight.mT if reader.out_axis == 1 else weight
        return fused.linears(settings, x, (matrix,), (bias,), (low.A[0],), (low.B[0],))[0]
    if reader.product and device.plain(x):
        y = _on_device(change, reader, layer_state, x, weight, bias, low, gain, dropout)
        if y is not None:
            return y
    stock = (
        layer_state.stock
        and gain is None
        and not layer_state.transposed
        and not change.storage.opaque
    )
    if stock and (fused.applies(x, weight) or device.applies_alike(x, weight)):
        y = None if context.current.path else reader.fused(module, x, weight, bias, low, dropout)
        if y is not None:
            return y
    y = call.frozen(change, biased=gain is None)
    return with_update(
        reader, module, x, y, low.T if layer_state.transposed else low, gain, bias, dropout
    )


def _on_device(
    change: Change, reader: Any, layer_state: LayerState, x: Tensor, weight: Any, bias: Any, low: LowRank,
    gain: Tensor | None, dropout: float,
) -> Tensor | None:  # fmt: skip
    """A matrix product on a device. A packed weight is read here if it has a gain, so that no dense
    copy of it is kept for backward; without, its library's own product is as good. None where this
    is not for the call."""
    if layer_state.product:
        if not device.applies(x, weight):
            return None
        read: Any = weight.mT if reader.out_axis == 1 else weight
    else:
        storage = change.storage
        if (
            gain is None
            or storage.computed
            or storage.name == "plain"
            or storage.device(weight) != x.device
        ):
            return None
        read = partial(_read, change, weight, reader.out_axis == 1)
    low = low.T if layer_state.transposed else low
    drops = dropout, new_seed() if dropout else 0
    return device.linears((low.scale,), x, (read,), (bias,), (low.A,), (low.B,), (gain,), *drops)[0]


def _read(change: Change, weight: Any, flipped: bool, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] in a dtype; piece by piece, as these may be of a wider one."""
    whole, first = None, 0
    for piece in change.storage.pieces(weight, PIECES):
        if len(piece) == (change.dims.in_ if flipped else change.dims.out):
            return piece.to(dtype).mT if flipped else piece.to(dtype)
        if whole is None:
            whole = piece.new_empty(change.dims.out, change.dims.in_, dtype=dtype)
        whole[first : first + len(piece)].copy_(piece)
        first += len(piece)
    return cast(Tensor, whole)


def with_update(
    reader: Any,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    low: LowRank,
    gain: Tensor | None,
    bias: Any,
    dropout: float,
) -> Tensor:
    """The factored form, given y = op(x; W), which with a gain has no bias yet."""
    low = low.to(x.dtype if x.is_floating_point() else y.dtype)
    if dropout and not reader.drops_input:
        y = y + reader.update(module, x, low, None) * _token_mask(x, dropout, y.dtype)
    else:
        y = reader.update(module, drop(x, dropout) if dropout else x, low, y)
    if gain is not None:
        y = y * reader.per_output(module, gain, y).to(y.dtype)
        y = y if bias is None else y + reader.per_output(module, bias, y).to(y.dtype)
    return y


def _materialised(
    change: Change,
    reader: Any,
    module: nn.Module,
    x: Tensor,
    weight: Any,
    bias: Any,
    low: LowRank,
    gain: Tensor | None,
) -> Tensor:
    own = change.storage.dtype(weight)
    dtype = at_least_float32(own)
    # A 16-bit layer runs in float32, as a 16-bit W + ΔW would lose a small ΔW; so does a packed one
    # on a narrow x.
    narrow_x = (
        x.is_floating_point() and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
    )
    wide = dtype != own or narrow_x
    bias = widen(bias, dtype) if wide and bias is not None else bias
    dropout = change.dropout if change.training else 0
    with no_autocast(x) if wide else nullcontext():
        seen = widen(x, dtype) if wide else x
        changed = change.changed(weight, low, gain, dtype)
        if not dropout:
            y = reader.op(module, seen, changed, bias)
        else:
            frozen = change.changed(weight, None, gain, dtype)
            dropped = drop(seen, dropout) if reader.drops_input else seen
            update = reader.op(module, dropped, changed, bias) - reader.op(
                module, dropped, frozen, bias
            )
            mask = 1 if reader.drops_input else _token_mask(seen, dropout, update.dtype)
            y = reader.op(module, seen, frozen, bias) + update * mask
    return y.to(output_dtype(x, own)) if wide else y


def _token_mask(ids: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return F.dropout(torch.ones(*ids.shape, 1, dtype=dtype, device=ids.device), p)
