"""The one mechanism that puts an adapter into a layer.

An adapted layer is the same object with the same parameters. Only its class changes, to a subclass made once for each
class of layer, whose ``forward`` asks which adapter is selected:

    Linear, adapted (Adapted, nn.Linear)
      .weight, .bias                      the base's own Parameters, untouched
      ._modules["veneer"]: Site           the adapters of this layer, by name
          ["default"]: LayerAdapter       what this adapter does here
              .low["weight"]: Change      the trained numbers A, B, … of one weight
              .full                       parameters that are trained in full, and running statistics

So ``isinstance(layer, nn.Linear)`` holds, every base key of ``state_dict()`` stays, and detaching is giving the class
back.

Rejected: wrapping the layer (renames every parameter, breaks ``isinstance`` and ties), replacing ``forward`` on the
instance (a bound method per copy, lost under pickle), forward hooks (two more calls a layer, and no way to change the
weight that is used) and ``parametrize`` (materialises always, changes the state dict's keys, cannot be pickled).

    factored:      y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias      layers that are linear in their one weight
    materialised:  y = op(x; gain ⊙ (W + ΔW)) + bias                   the same, by the definition
    viewed:        y = forward(x) of a view whose weights are gain ⊙ (W + ΔW)          every other module there is
"""

from __future__ import annotations

import copy
import functools
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from veneer import context, precision
from veneer.bases import BASES, Storage
from veneer.config import LoraConfig
from veneer.errors import SelectionError, sentence
from veneer.kernels import fused, plan
from veneer.kernels.dropout import dropout as drop
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Dims, Layer
from veneer.linears import Direct, Together, direct, outputs
from veneer.lowrank import LowRank
from veneer.qconfig import Qconfig
from veneer.variants import VARIANTS, Variant

SITE = "veneer"
GROUP = "_veneer"

#: from a module to one below it, by the names of children
Way = tuple[str, ...]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class Selected:
    """What one call uses: the adapter's name, and its parts by the key of their site; what concerns a method besides
    forward alone, by (that key, its name). No name is the base alone; no
    parts, that it cannot be told, or that the adapter has been detached."""

    name: str | None
    parts: Mapping[Any, Any] | None


BASE = Selected(None, {})
AMBIGUOUS = Selected(None, None)

#: Threads that attach and detach take turns. Threads that call the model never wait.
_CHANGING = threading.RLock()


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what changes a model's adapters: one thread at a time."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _CHANGING:
            return function(*args, **kwargs)

    return run


def detached(name: str | None) -> SelectionError:
    """The error of a call whose adapter is gone."""
    found = f"a call that selects {name!r}, which was detached"
    return SelectionError(sentence(found, "an adapter that stays until the call has ended", "detach it later"))


class Group:
    """What one model's sites share: the adapters' names, configs and parts, and which of them is merged.

    ``uid`` identifies the model in ``context.Context.selection``. A copy of the model is another model, so it gets
    another. ``root`` is the model; unknown of a copy until it is seen at one. ``merging``: a merge has not come to its
    end, so that only weights of which a copy is kept may have been written.
    """

    root: weakref.ref[nn.Module] | None = None
    merging = False

    def __init__(self) -> None:
        self.uid = uuid.uuid4().hex
        self.configs: dict[str, LoraConfig] = {}
        self.selections: dict[str, Selected] = {}
        self.default = BASE
        self.merged: str | None = None
        self.required_grad: dict[str, bool] = {}
        self.keys = 0
        self.banks = 0  # who need the sites although no adapter of the model's own is there

    def set_adapters(self, configs: dict[str, LoraConfig], selections: dict[str, Selected]) -> None:
        """Replace the adapters, and with them the default selection: the only adapter, if there is just one."""
        self.configs, self.selections = configs, selections
        self.default = next(iter(selections.values())) if len(selections) == 1 else AMBIGUOUS if selections else BASE

    def new_key(self) -> int:
        self.keys += 1
        return self.keys

    def claim(self, root: nn.Module) -> None:
        """This is the group of ``root``."""
        if self.root is None:
            self.root = weakref.ref(root)
            STRAY.discard(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("uid", "default", "root")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, uid=uuid.uuid4().hex, banks=0)
        self.set_adapters(self.configs, self.selections)
        STRAY.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        made = memo[id(self)] = object.__new__(Group)
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        root = None if self.root is None else self.root()
        if root is not None and id(root) in memo:  # the whole model is being copied
            made.claim(memo[id(root)])
        return made


#: Groups of copies that have not been seen at the root of a model: of layers that were copied out of one, which may by
#: now be in another, or in the same.
STRAY: weakref.WeakSet[Group] = weakref.WeakSet()


class Site(nn.Module):
    """The adapters of one layer, by name, and how this layer reads its weights.

    ``layer`` is its kind (None for a module without parameters of its own, which only reads those of others),
    ``factors`` says that the factored form is right for it, ``product`` that it is a matrix product with a plain
    weight, which the fused kernel computes, ``transposed`` that it holds the adapted weight
    transposed (a linear head tied to an embedding), ``attributes`` are those that a view of it gets in place of
    its own: a switch that turns a fused fast path off, and ``bound`` those that hold methods bound to the module.
    """

    def __init__(
        self, group: Group, layer: Layer | None, factors: bool, attributes: Mapping[str, Any], product: bool = False
    ) -> None:
        super().__init__()
        self.group = group
        self.key = group.new_key()
        self.layer = layer
        self.factors = factors
        self.product = product
        self.transposed = False
        self.attributes = dict(attributes)
        self.bound: tuple[str, ...] = ()

    def refusal(self, chosen: Selected) -> SelectionError:
        """Of a call whose selection names no parts (several adapters and none selected, or a detached one), or another
        adapter than the merged one."""
        merged = self.group.merged
        if chosen.parts is None and chosen.name is not None:
            return detached(chosen.name)
        if chosen.parts is None:
            found = f"{len(self.group.configs)} adapters ({', '.join(self.group.configs)}) and none selected"
            do = "call the model inside `with veneer.use(model, name):`"
            return SelectionError(sentence(found, "one selected adapter, or None for the base", do))
        found = f"a call that selects {chosen.name!r} while {merged!r} is merged into the weights"
        return SelectionError(sentence(found, f"the merged adapter {merged!r}", "call veneer.unmerge(model) first"))

    def get(self, name: str) -> LayerAdapter | None:
        """The part of this adapter here."""
        return cast("LayerAdapter | None", self._modules.get(name))


class Change(nn.Module):
    """One adapter's change of one weight: the trained numbers, and how they become ΔW.

    ``rows`` are the indices of the outputs that change (None: all); ``still`` is the input that never does.
    """

    layer: Any
    variant: Any
    storage: Any
    dims: Dims
    digests: Any

    def __init__(
        self,
        numbers: Mapping[str, Tensor],
        *,
        layer: Layer,
        variant: Variant,
        storage: Storage,
        dims: Dims,
        rank: int,
        alpha: float,
        dropout: float,
        rows: Tensor | None = None,
        still: int | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.variant, self.storage, self.dims = layer, variant, storage, dims
        self.rank, self.alpha, self.dropout, self.still = rank, alpha, dropout, still
        self.scale = variant.scale(alpha, rank)
        self.rows = rows
        for name, value in numbers.items():
            if name in variant.frozen:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def extra_repr(self) -> str:
        return f"{self.variant.name}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"

    @property
    def numbers(self) -> dict[str, Any]:
        """The variant's numbers, trained and frozen, by name."""
        return {**self._parameters, **self._buffers}

    def resolve(self, weight: Any, dtype: torch.dtype | None = None) -> tuple[LowRank, Tensor | None]:
        """The change of ``weight`` as (LowRank, gain [g · out] or None), differentiable in the trained numbers; in
        ``dtype`` if that is given."""
        numbers = self.numbers
        if dtype is not None:
            numbers = {name: precision.cast(value, dtype) for name, value in numbers.items()}
        if self.still is not None and "A" in numbers:  # a gain may depend on ΔW, of which that input is no part
            numbers["A"] = numbers["A"].index_fill(2, torch.tensor([self.still], device=numbers["A"].device), 0)
        low, gain = self.variant.resolve(numbers, self.scale, lambda: self._dense(weight, dtype))
        if self.rows is not None:
            rows = self.rows.to(low.B.device)
            low = low.place(rows, self.dims.out)
            gain = None if gain is None else torch.ones_like(gain).new_ones(self.dims.out).index_copy(0, rows, gain)
        return low if self.still is None else low.without(self.still), gain

    def exactly(self, weight: Any) -> tuple[LowRank, Tensor | None]:
        """``resolve`` for a merge, in float64: so a gain does not show whether it was computed for a whole stack of
        matrices or for one of them."""
        return self.resolve(weight, torch.float64)

    def _dense(self, weight: Any, dtype: torch.dtype | None = None) -> Tensor:
        """[g, out, in] in the dtype of the weight, where arithmetic in ``dtype`` is done."""
        dense = self.storage.dense(weight)
        dense = dense if dtype is None else dense.to(precision.place(dense.device, dtype))
        dense = self.layer.unfold(dense, self.dims)
        return dense if self.rows is None else dense[:, self.rows.to(dense.device)]

    def changed(
        self, weight: Any, low: LowRank | None, gain: Tensor | None, dtype: torch.dtype, drop: bool = False
    ) -> Tensor:
        """``gain ⊙ (W + ΔW)`` in the weight's own shape: the meaning of an adapter. Without ``low``, ``gain ⊙ W``.

        ``drop`` drops whole inputs of ΔW, as the same dropout of every input row would.
        """
        layer, dense = self.layer, precision.cast(self.storage.dense(weight), dtype)
        if low is not None:
            delta = low.delta(dtype)
            if drop and self.training and self.dropout:
                delta = delta * F.dropout(delta.new_ones(delta.shape[0], 1, delta.shape[2]), self.dropout)
            dense = dense + layer.fold(delta, dense.shape)
        return dense if gain is None else dense * layer.spread(gain.to(dtype), self.dims, dense.shape)


class LayerAdapter(nn.Module):
    """What one adapter does at one layer.

    ``changes`` are the changes of this module's own weights by name; those that no other module registered are in
    ``low``. ``full`` holds full replacements of parameters and buffers by name. ``hosted`` are the parts of modules
    below, by path, whose weights this module's forward reads directly; ``entries`` the same of each other method that
    reads an adapted weight, here or below.
    """

    full: nn.Module
    low: nn.Module
    digests: Any

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Module()
        self.full = nn.Module()
        self.changes: dict[str, Change] = {}
        self.direct: Direct | None = None
        self.together: Together | None = None
        self.hosted: dict[Way, LayerAdapter] = {}
        self.entries: dict[str, dict[Way, LayerAdapter]] = {}

    def keys(self, site: Site) -> Iterator[Any]:
        """The keys of what this part takes part in: forward, unless it would find nothing changed, and methods."""
        if self.changes or self.hosted or self.full._parameters or self.full._buffers or site.attributes:
            yield site.key
        for method in self.entries:
            yield site.key, method

    def settle(self, module: nn.Module, site: Site) -> None:
        """Called once all of this part is in place: is it nothing but one product B A for all outputs, whose numbers
        the fused kernel can take as they are?"""
        changes = tuple(self.changes.values())
        alone = len(changes) == 1 and not (self.hosted or self.full._parameters or self.full._buffers)
        plain = alone and changes[0].variant.resolve is VARIANTS["lora"].resolve
        if plain and changes[0].rows is None and changes[0].still is None and site.product and not site.transposed:
            self.direct = direct(changes[0], module, cast(Layer, site.layer))

    def seen(self, method: str = "forward") -> Iterator[int]:
        """The identities of what a call of this layer sees: this part, its changes, and those of hosted parts."""
        yield id(self)
        yield from map(id, self.changes.values())
        for part in self.below(method).values():
            yield from part.seen()

    def below(self, method: str) -> Mapping[Way, LayerAdapter]:
        """The parts of modules below whose weights a method reads directly."""
        return self.hosted if method == "forward" else self.entries[method]

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """What ``full`` puts in place of the module's own parameters and buffers, in their dtypes."""
        full = self.full
        if not full._parameters and not full._buffers:
            return {}
        own = {**module._buffers, **module._parameters}
        trained: dict[str, Any] = {name: value.to(own[name].dtype) for name, value in full._parameters.items()}
        return {**trained, **cast(dict[str, Tensor], full._buffers)}

    def run(
        self,
        module: nn.Module,
        base: type[nn.Module],
        site: Site,
        args: tuple,
        kwargs: dict,
        now: Any,
        share: bool = True,
        method: str = "forward",
    ) -> Any:
        """The adapted forward (or another method) of ``module``, whose class was ``base``, in the context ``now``.
        ``share`` allows to compute layers that read the same input together."""
        if method != "forward":
            return viewed(self, module, base, site, args, kwargs, method)
        known = self.direct
        if known is not None and not (kwargs or args[1:]) and now.path is None and known.weight in module._parameters:
            # Each Python call here is time in every layer of a decoding step.
            x, own = args[0], module._parameters
            weight: Any = own[known.weight]
            if fused.applies(x, weight):
                if self.together is not None and share and self.together.applies(known, x):
                    return self.together.output(module, self, x)
                shape, change = x.shape, known.change
                tokens = shape[0] * shape[1] if x.ndim == 3 else x.numel() // shape[-1]
                if tokens > known.forms_above or (change.dropout and change.training):
                    return outputs([(module, known)], x)[0]
                numbers: Any = change._parameters
                bias = None if known.bias is None else own[known.bias]
                weight = weight.mT if known.flipped else weight
                run = fused.linear if torch.is_grad_enabled() else fused.unrecorded
                return run(change.scale, x, weight, bias, numbers["A"], numbers["B"])
        full = self.replacements(module)
        if not (site.factors and self.changes and len(args) + len(kwargs) == 1) or self.hosted:
            return viewed(self, module, base, site, args, kwargs)
        reader: Any = site.layer
        change = self.changes[reader.weight]
        weight = weight_of(module, reader.weight)
        low, gain = change.resolve(weight)
        way = plan.choose(gain_fits=gain is None or not site.transposed, forced=now.path)
        run = self._factored if way == plan.FACTORED else self._materialised
        return run(change, module, base, site, low, gain, full, args, kwargs)

    def _factored(self, change: Change, module, base, site: Site, low: LowRank, gain, full, args, kwargs) -> Tensor:
        reader: Any = site.layer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight: Any = weight_of(module, reader.weight)
        bias = full.get("bias", module._parameters.get("bias"))
        if site.product and gain is None and fused.applies(x, weight):
            low, dropout = low.T if site.transposed else low, change.dropout if change.training else 0.0
            seed = new_seed() if dropout else 0
            settings = fused.Settings((low.scale,), dropout, seed)
            matrix = weight.mT if reader.out_axis == 1 else weight
            return fused.linears(settings, x, (matrix,), (bias,), (low.A[0],), (low.B[0],))[0]
        if base in reader.types() and gain is None and not site.transposed and fused.applies(x, weight):
            drops = change.dropout if change.training else 0.0
            y = None if context.current.path else reader.fused(module, x, weight, bias, low, drops)
            if y is not None:
                return y
        if gain is None and not full and not change.storage.computed:
            plain: Any = view(module, base, {}) if self.entries else module  # whose methods are the base's too
            y = base.forward(plain, *args, **kwargs)
        else:
            dense = change.storage.dense(weight)
            y = reader.op(
                module, x, dense.to(x.dtype) if x.is_floating_point() else dense, None if gain is not None else bias
            )
        dropout = change.dropout if change.training else 0
        low = (low.T if site.transposed else low).to(x.dtype if x.is_floating_point() else y.dtype)
        if not dropout:
            y = reader.update(module, x, low, y)
        elif reader.drops_input:
            y = reader.update(module, drop(x, dropout), low, y)
        else:
            y = y + reader.update(module, x, low, None) * _token_mask(x, dropout, y.dtype)
        if gain is not None:
            y = y * reader.per_output(module, gain, y).to(y.dtype)
            y = y if bias is None else y + reader.per_output(module, bias, y).to(y.dtype)
        return y

    def _materialised(self, change: Change, module, base, site: Site, low: LowRank, gain, full, args, kwargs) -> Tensor:
        reader: Any = site.layer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight: Any = weight_of(module, reader.weight)
        own = change.storage.dtype(weight)
        dtype = at_least_float32(own)
        # A 16-bit layer runs in float32, as a 16-bit W + ΔW would lose a small ΔW; so does a packed one on a narrow x.
        narrow_x = x.is_floating_point() and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)
        wide = dtype != own or narrow_x
        bias = full.get("bias", module._parameters.get("bias"))
        bias = _widen(bias, dtype) if wide and bias is not None else bias
        dropout = change.dropout if change.training else 0
        with _no_autocast(x) if wide else nullcontext():
            seen = _widen(x, dtype) if wide else x
            changed = change.changed(weight, low, gain, dtype)
            if not dropout:
                y = reader.op(module, seen, changed, bias)
            else:
                frozen = change.changed(weight, None, gain, dtype)
                dropped = drop(seen, dropout) if reader.drops_input else seen
                update = reader.op(module, dropped, changed, bias) - reader.op(module, dropped, frozen, bias)
                mask = 1 if reader.drops_input else _token_mask(seen, dropout, update.dtype)
                y = reader.op(module, seen, frozen, bias) + update * mask
        return y.to(_output_dtype(x, own)) if wide else y

    def changed(self, module: nn.Module, wide: bool) -> dict[str, Tensor]:
        """``gain ⊙ (W + ΔW)`` of every weight that changes here, in at least float32 if ``wide``, else in its own
        dtype."""
        values = {}
        for name, change in self.changes.items():
            weight = weight_of(module, name)
            own = change.storage.dtype(weight)
            low, gain = change.resolve(weight)
            value = change.changed(weight, low, gain, at_least_float32(own), drop=True)
            values[name] = value if wide else value.to(own)
        return values


def viewed(
    part: Any, module: nn.Module, base: type[nn.Module], site: Site, args: tuple, kwargs: dict, method: str = "forward"
) -> Any:
    """The module's own forward (or another method), on a view of it with the changed weights of a part."""
    function, hosted, full = method_of(base, method), part.below(method), part.replacements(module)
    dtypes = {change.storage.dtype(weight_of(module, name)) for name, change in part.changes.items()}
    narrow = next((dtype for dtype in dtypes if at_least_float32(dtype) != dtype), None)
    if hosted or any(child is not site for child in module._modules.values()):
        narrow = None  # what runs below is not widened
    wide = narrow is not None
    values = {**full, **part.changed(module, wide)}
    if wide:
        own = {**module._buffers, **module._parameters, **values}
        values = {name: _widen(value, torch.float32) for name, value in own.items() if value is not None}
    made: list[_Seen] = []
    seen = _seen(module, base, values, _hosted_children(module, hosted, made), site, made)
    if narrow is None:
        y = function(seen, *args, **kwargs)
    else:
        floats = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_float(leaf)]
        first = floats[0].data if floats else None  # a tensor's, or a packed sequence's
        output = narrow if first is None else _output_dtype(first, narrow)
        with _no_autocast(next(iter(values.values()))):
            args, kwargs = _cast((args, kwargs), torch.float32)
            y = _cast(function(seen, *args, **kwargs), output)
    for entry in made:
        entry.write_back()
    return y


def _hosted_children(module: nn.Module, parts: Mapping[Way, LayerAdapter], made: list[_Seen]) -> dict[str, nn.Module]:
    """Views of the modules below whose weights are read directly, under the names of this module's children."""
    below: dict[str, dict[Way, LayerAdapter]] = {}
    for path, part in parts.items():
        if path:
            below.setdefault(path[0], {})[path[1:]] = part
    return {name: _hosted_view(cast(nn.Module, module._modules[name]), rest, made) for name, rest in below.items()}


def _hosted_view(module: nn.Module, parts: Mapping[Way, LayerAdapter], made: list[_Seen]) -> nn.Module:
    own, site = parts.get(()), site_of(module)
    if own is None:
        return _seen(module, type(module), {}, _hosted_children(module, parts, made), None, made)
    if site is None and SITE in module._modules:
        return module  # a module further above has made this view
    if site is None:
        raise detached("the selected one")
    for hosted in (own.hosted, *own.entries.values()):  # its own methods run on the view too
        parts = {**hosted, **parts}
    values = {**own.replacements(module), **own.changed(module, wide=False)}
    return _seen(module, own_class(module), values, _hosted_children(module, parts, made), site, made)


@dataclass(frozen=True)
class _Seen:
    """A view for one call: what its attributes were before it, and the values that stand for the module's own."""

    module: nn.Module
    view: nn.Module
    before: Mapping[str, Any]
    values: Mapping[str, Tensor]

    def write_back(self) -> None:
        """Give the module what forward did to the view: attributes (a cache, a counter) and buffers."""
        own, seen = self.module.__dict__, self.view.__dict__
        for name, value in seen.items():
            if name not in self.before or self.before[name] is not value:
                own[name] = value
        for name in self.before:
            if name not in seen:
                own.pop(name, None)
        for name, value in self.view._buffers.items():
            if name not in self.values and self.module._buffers.get(name) is not value:
                self.module._buffers[name] = value


def _seen(module: nn.Module, base, values, children, site: Site | None, made: list[_Seen]) -> nn.Module:
    seen = view(module, base, values, children, None if site is None else site.attributes)
    for name in () if site is None else site.bound:
        seen.__dict__[name] = MethodType(seen.__dict__[name].__func__, seen)
    if site is not None and site.layer is not None:
        site.layer.bind(seen, values)
    made.append(_Seen(module, seen, dict(seen.__dict__), values))
    return seen


class Adapted:
    """Mixed in before a layer's own class by ``adapted_class``."""

    veneer_base: type[nn.Module]
    veneer_entries: tuple[str, ...]
    _modules: dict[str, Any]
    qconfig = Qconfig()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy name the base class and make it again.
        return _rebuild, (type(self).veneer_base, type(self).veneer_entries), self.__getstate__()

    def _get_name(self) -> str:
        return f"Adapted{type(self).veneer_base.__name__}"


@functools.cache
def adapted_class(base: type[nn.Module], entries: tuple[str, ...]) -> type[nn.Module]:
    """The one adapted subclass of ``base`` for these methods besides forward. It has the name of ``base``, and a
    forward of the same signature: both are read by libraries that wrap models."""

    @functools.wraps(base.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Subscripts and attributes, no calls: each one is time in every layer of a decoding step.
        modules, now = self._modules, context.current
        try:
            site = modules[SITE]
        except KeyError:  # another thread has detached since this method was looked up
            return base.forward(self, *args, **kwargs)
        group, selection = site.group, now.selection
        chosen = selection[group.uid] if group.uid in selection else group.default  # noqa: SIM401
        parts = chosen.parts
        if parts is None or group.merged is not None:
            if parts is None or chosen.name != group.merged:
                raise site.refusal(chosen)
            return base.forward(self, *args, **kwargs)
        if site.key not in parts:  # this adapter does nothing here; not `try`, which torch.compile would guard wrongly
            return base.forward(self, *args, **kwargs)
        part = parts[site.key]
        if now.reached is not None:
            now.reached.update(part.seen())
        return part.run(self, base, site, args, kwargs, now)

    about = {"__module__": base.__module__, "__doc__": base.__doc__, "veneer_base": base, "veneer_entries": entries}
    methods = {name: _entry(base, name) for name in entries}
    return type(base.__name__, (Adapted, base), {**about, **methods, "forward": forward})


def _entry(base: type[nn.Module], name: str) -> Any:
    """A method (or property) of ``base`` that reads adapted weights, as the adapted class has it. Within a view it is
    the class's own again, so that nothing changes twice."""
    method = method_of(base, name)

    @functools.wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        site, now = site_of(self), context.current
        if site is None:
            return method(self, *args, **kwargs)
        chosen = now.selection.get(site.group.uid, site.group.default)
        if chosen.parts is None or site.group.merged is not None:
            if chosen.parts is None or chosen.name != site.group.merged:
                raise site.refusal(chosen)
            return method(self, *args, **kwargs)
        if (site.key, name) not in chosen.parts:
            return method(self, *args, **kwargs)
        part = chosen.parts[site.key, name]
        if now.reached is not None:
            now.reached.update(part.seen(name))
        return part.run(self, base, site, args, kwargs, now, method=name)

    return property(run) if isinstance(getattr(base, name), property) else run


def method_of(base: type[nn.Module], name: str) -> Any:
    """A method of a class, or what computes a property."""
    method = getattr(base, name)
    return method.fget if isinstance(method, property) else method


def _rebuild(base: type[nn.Module], entries: tuple[str, ...] = ()) -> nn.Module:
    return object.__new__(adapted_class(base, entries))


def enter(module: nn.Module, methods: Iterable[str]) -> None:
    """Let these methods of an adapted module see its adapters too."""
    cls: Any = type(module)
    if not {*methods} <= {*cls.veneer_entries}:
        module.__class__ = adapted_class(cls.veneer_base, tuple(sorted({*cls.veneer_entries, *methods})))


def weight_of(module: nn.Module, name: str) -> Any:
    """What a module keeps under a weight's name: its ``Parameter``, or the ``ParametrizationList`` that computes it."""
    own = module._parameters
    weight = own[name] if name in own else None  # noqa: SIM401 (a ScriptModule's parameters are no dict)
    if weight is None and (lists := module._modules.get("parametrizations")) is not None:
        weight = lists._modules.get(name)
    return weight


def view(
    module: nn.Module,
    base: type[nn.Module],
    values: Mapping[str, Tensor],
    children: Mapping[str, nn.Module] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """``module`` as ``base`` sees it, with other parameters, buffers, children and attributes. The module itself is
    not touched, so that any number of threads may do this at once (``torch.func.functional_call`` swaps them in
    place)."""
    if values and is_parametrized(module):
        # Its class computes the weight by a property: the view is of the class from before, with every such weight.
        lists = cast(nn.ModuleDict, module._modules["parametrizations"])
        values = {**{name: BASES["parametrized"].dense(own) for name, own in lists.items()}, **values}
        base = base.__bases__[0]
    seen = object.__new__(base)
    seen.__dict__.update(module.__dict__)
    if attributes:
        seen.__dict__.update(attributes)
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        seen.__dict__[kind] = {name: values.get(name, own[name]) for name in own}
    extra = {
        name: value for name, value in values.items() if name not in seen._parameters and name not in seen._buffers
    }
    seen._parameters.update(cast(Any, extra))
    if children:
        seen.__dict__["_modules"] = {**module._modules, **children}
    return seen


def site_of(module: nn.Module) -> Site | None:
    """The module's site, if it is adapted."""
    return cast("Site | None", module._modules.get(SITE)) if isinstance(module, Adapted) else None


def set_child(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Put a child in place, or take it away, in a new table of children: another thread may be walking the old one
    (``nn.TransformerEncoderLayer`` does, in every forward)."""
    children = {key: value for key, value in module._modules.items() if key != name}
    module.__dict__["_modules"] = children if child is None else {**children, name: child}


def install(module: nn.Module, site: Site) -> None:
    """Make ``module`` adapted. Nothing else of it changes."""
    set_child(module, SITE, site)
    module.__class__ = adapted_class(type(module), ())


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its adapters."""
    return getattr(type(module), "veneer_base", type(module))


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back."""
    own = own_class(module)
    set_child(module, SITE, None)  # first: a module of its own class with a site is a view
    module.__class__ = own


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) under every name that a module has, in the model's order. Unlike ``named_modules`` it does not
    enter the sites, whose many adapters would make every walk longer, nor the insides of parametrised weights."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        skipped = (SITE, "parametrizations") if is_parametrized(module) else (SITE,)
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in list(module._modules.items())  # another thread may attach
            if child is not None and not (name in skipped and (name != SITE or isinstance(child, Site)))
        ]
        stack += reversed(children)


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, Site]]:
    """(path, module, site) of every adapted module, in the model's order, each once, under its first name."""
    seen: set[int] = set()
    for path, module in walk(model):
        site = site_of(module)
        if site is not None and id(module) not in seen:
            seen.add(id(module))
            yield path, module, site


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _token_mask(ids: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return F.dropout(torch.ones(*ids.shape, 1, dtype=dtype, device=ids.device), p)


def _is_float(value: Any) -> bool:
    tensor = value.data if isinstance(value, PackedSequence) else value
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(dtype) if _is_float(leaf) else leaf, tree)


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)


def _output_dtype(x: Tensor, weight: torch.dtype) -> torch.dtype:
    """The dtype in which the plain layer would answer."""
    if not x.is_floating_point():
        return weight
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
