"""The one mechanism that puts an adapter into a layer.

An adapted layer is the same object with the same parameters. Only its class changes, to a subclass made once for each
class of layer, whose ``forward`` asks which adapter is selected:

    AdaptedLinear(Adapted, nn.Linear)
      .weight, .bias                      the base's own Parameters, untouched
      ._modules["veneer"]: Site           the adapters of this layer, by name
          ["default"]: LayerAdapter       the trained numbers A, B, … and how they are read

So ``isinstance(layer, nn.Linear)`` holds, every base key of ``state_dict()`` stays, and detaching is giving the class
back.

Rejected: wrapping the layer (renames every parameter, breaks ``isinstance`` and ties), replacing ``forward`` on the
instance (a bound method per copy, lost under pickle), forward hooks (two more calls a layer, and no way to change the
weight that is used) and ``parametrize`` (materialises always, changes the state dict's keys, cannot be pickled).

    factored:      y = gain ⊙ (op(x; W) + op(drop(x); ΔW)) + bias
    materialised:  y = op(x; gain ⊙ (W + ΔW)) + bias
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import context
from veneer.bases import Storage
from veneer.config import LoraConfig
from veneer.errors import SelectionError, sentence
from veneer.kernels import plan
from veneer.layers import Dims, Layer
from veneer.lowrank import LowRank
from veneer.variants import Variant

SITE = "veneer"
GROUP = "_veneer"
AMBIGUOUS = "\0ambiguous"  # the default selection of a model with several adapters; no adapter can have this name


class Group:
    """What one model's sites share: the adapters' names and configs, and which of them is merged.

    ``uid`` identifies the model in ``context.Context.selection``. A copy of the model is another model, so it gets
    another.
    """

    def __init__(self) -> None:
        self.uid = uuid.uuid4().hex
        self.configs: dict[str, LoraConfig] = {}
        self.default: str | None = None
        self.merged: str | None = None
        self.required_grad: dict[str, bool] = {}

    def set_configs(self, configs: dict[str, LoraConfig]) -> None:
        """Replace the adapters' configs, and with them the default selection: the only adapter, if there is just
        one."""
        self.configs = configs
        self.default = next(iter(configs)) if len(configs) == 1 else AMBIGUOUS if configs else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "uid"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, uid=uuid.uuid4().hex)


class Site(nn.Module):
    """The adapters of one layer, by name, and how this layer reads its weight.

    ``layer`` is its kind (None where modules are only trained fully), ``factors`` says that the factored form is
    right for it, and ``transposed`` that it holds the adapted weight transposed: a linear head tied to an embedding.
    ``borrowed`` holds the adapters of a weight that another module owns, without registering them a second time.
    """

    def __init__(self, group: Group, layer: Layer | None, factors: bool) -> None:
        super().__init__()
        self.group = group
        self.layer = layer
        self.factors = factors
        self.transposed = False
        self.borrowed: dict[str, LayerAdapter] = {}

    def active(self) -> LayerAdapter | None:
        """The adapter that this call uses here; None for the base alone.

        Raises:
            SelectionError: several adapters and none selected, or a selection that contradicts a merge.
        """
        now, group = context.current, self.group
        name = now.selection.get(group.uid, group.default)
        if name == AMBIGUOUS and (caller := context.of_backward()) is not None:
            name = caller.selection.get(group.uid, group.default)
        if name == AMBIGUOUS:
            found = f"{len(group.configs)} adapters ({', '.join(group.configs)}) and none selected"
            do = "call the model inside `with veneer.use(model, name):`"
            raise SelectionError(sentence(found, "one selected adapter, or None for the base", do))
        if group.merged is not None:
            if name != group.merged:
                found = f"a call that selects {name!r} while {group.merged!r} is merged into the weights"
                do = "call veneer.unmerge(model) first"
                raise SelectionError(sentence(found, f"the merged adapter {group.merged!r}", do))
            return None
        adapter = None if name is None else self.get(name)
        if adapter is not None and now.reached is not None:
            now.reached.add(id(adapter))
        return adapter

    def get(self, name: str) -> LayerAdapter | None:
        """The adapter of this name that changes this layer, owned or borrowed."""
        owned = self._modules.get(name)
        return cast(LayerAdapter, owned) if owned is not None else self.borrowed.get(name)


_NO_DIMS = Dims(0, 0, 0)


class LayerAdapter(nn.Module):
    """One adapter at one layer: the trained numbers, and how they change the layer.

    ``layer`` and ``variant`` are None where nothing is low-rank here (a module of ``train_also``, a bias of a module
    that is no target); ``full`` then holds full replacements of parameters and buffers, by their name in the layer.
    """

    layer: Any  # a Layer, or None; likewise the next two
    variant: Any
    storage: Any
    dims: Dims
    full: nn.Module
    digests: Any

    def __init__(
        self,
        *,
        numbers: Mapping[str, Tensor] | None = None,
        layer: Layer | None = None,
        variant: Variant | None = None,
        storage: Storage | None = None,
        dims: Dims = _NO_DIMS,
        rank: int = 0,
        alpha: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer, self.variant, self.storage, self.dims = layer, variant, storage, dims
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = variant.scale(alpha, rank) if variant else 0.0
        for name, value in (numbers or {}).items():
            self.register_parameter(name, nn.Parameter(value))
        self.full = nn.Module()

    def __repr__(self) -> str:
        full = f"full={list(self.full.state_dict())}" if self.full.state_dict() else ""
        low = (
            f"{self.variant.name}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}" if self.variant else ""
        )
        return f"{type(self).__name__}({', '.join(filter(None, (low, full)))})"

    def resolve(self, weight: Tensor) -> tuple[LowRank, Tensor | None]:
        """The change of ``weight`` as (LowRank, gain [g · out] or None), differentiable in the trained numbers."""
        return self.variant.resolve(self._parameters, self.scale, lambda: self._dense(weight))

    def _dense(self, weight: Tensor) -> Tensor:
        dense = self.storage.dense(weight)
        return self.layer.unfold(dense.to(at_least_float32(dense.dtype)), self.dims)

    def changed(self, weight: Tensor, low: LowRank | None, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``gain ⊙ (W + ΔW)`` in the weight's own shape: the meaning of an adapter. Without ``low``, ``gain ⊙ W``."""
        layer, dense = self.layer, self.storage.dense(weight).to(dtype)
        if low is not None:
            dense = dense + layer.fold(low.delta(dtype), dense.shape)
        if gain is not None:
            shape = [1] * dense.dim()
            shape[layer.out_axis] = -1
            dense = dense * gain.to(dtype).reshape(shape)
        return dense

    def replacements(self, module: nn.Module) -> dict[str, Tensor]:
        """What ``full`` puts in place of the module's own parameters and buffers, in their dtypes."""
        if not self.full._parameters and not self.full._buffers:
            return {}
        own = {**module._buffers, **module._parameters}
        trained: dict[str, Any] = {name: value.to(own[name].dtype) for name, value in self.full._parameters.items()}
        return {**trained, **cast(dict[str, Tensor], self.full._buffers)}

    def run(self, module: nn.Module, base: type[nn.Module], site: Site, args: tuple, kwargs: dict) -> Any:
        """The adapted forward of ``module``, whose class was ``base``."""
        full = self.replacements(module)
        if self.layer is None:
            return base.forward(view(module, base, full), *args, **kwargs)
        weight: Any = module._parameters[self.layer.weight]
        low, gain = self.resolve(weight)
        transposed_gain = site.transposed and gain is not None
        path = plan.choose(factors=site.factors, transposed_gain=transposed_gain, forced=context.current.path)
        way = self._factored if path == plan.FACTORED else self._materialised
        return way(module, base, site, low, gain, full, args, kwargs)

    def _factored(self, module, base, site: Site, low: LowRank, gain, full, args, kwargs) -> Tensor:
        reader: Any = site.layer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight, bias = module._parameters[reader.weight], full.get("bias", module._parameters.get("bias"))
        if gain is not None:
            y = reader.op(module, x, weight, None)
        elif full:
            y = reader.op(module, x, weight, bias)
        else:
            y = base.forward(module, *args, **kwargs)
        low = (low.T if site.transposed else low).to(x.dtype if x.is_floating_point() else weight.dtype)
        if not (self.dropout and self.training):
            y = reader.update(module, x, low, y)
        elif reader.drops_input:
            y = reader.update(module, F.dropout(x, self.dropout), low, y)
        else:
            y = y + reader.update(module, x, low, None) * _token_mask(x, self.dropout, y.dtype)
        if gain is not None:
            y = y * reader.per_output(module, gain, y).to(y.dtype)
            y = y if bias is None else y + reader.per_output(module, bias, y).to(y.dtype)
        return y

    def _materialised(self, module, base, site: Site, low: LowRank, gain, full, args, kwargs) -> Any:
        reader: Any = site.layer
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        weight = module._parameters[reader.weight]
        dtype = at_least_float32(weight.dtype)
        wide = dtype != weight.dtype  # a 16-bit layer runs in float32, as a 16-bit W + ΔW would lose a small ΔW
        own = {**module._buffers, **module._parameters, **full} if wide else full
        values = {name: _widen(value, dtype) for name, value in own.items() if value is not None}

        def op(x: Tensor, weight: Tensor) -> Any:
            x = _widen(x, dtype) if wide else x
            if site.factors:
                return reader.op(module, x, weight, values.get("bias", module._parameters.get("bias")))
            seen = view(module, base, {**values, reader.weight: weight})
            return base.forward(seen, x, *args[1:], **(kwargs if args else dict(list(kwargs.items())[1:])))

        output = _output_dtype(x, weight)
        with torch.autocast(weight.device.type, enabled=False) if wide else nullcontext():
            changed = self.changed(weight, low, gain, dtype)
            if not (self.dropout and self.training):
                y = op(x, changed)
            else:
                frozen = self.changed(weight, None, gain, dtype)
                dropped = F.dropout(x, self.dropout) if reader.drops_input else x
                change = op(dropped, changed) - op(dropped, frozen)
                mask = 1 if reader.drops_input else _token_mask(x, self.dropout, change.dtype)
                y = op(x, frozen) + change * mask
        return y.to(output) if wide and isinstance(y, Tensor) else y


class Adapted:
    """Mixed in before a layer's own class by ``adapted_class``."""

    veneer_base: type[nn.Module]
    _modules: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site = self._modules[SITE]
        adapter = site.active()
        base = type(self).veneer_base
        if adapter is None:
            return base.forward(self, *args, **kwargs)
        return adapter.run(self, base, site, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy name the base class and make it again.
        return _rebuild, (type(self).veneer_base,), self.__getstate__()


@functools.cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The one adapted subclass of ``base``."""
    body = {"veneer_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"Adapted{base.__name__}", (Adapted, base), body)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return object.__new__(adapted_class(base))


def view(module: nn.Module, base: type[nn.Module], values: Mapping[str, Tensor]) -> nn.Module:
    """``module`` as its base class sees it, with other parameters and buffers. The module itself is not touched, so
    that any number of threads may do this at once (``torch.func.functional_call`` swaps them in place)."""
    seen = object.__new__(base)
    seen.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = module.__dict__[kind]
        seen.__dict__[kind] = {name: values.get(name, own[name]) for name in own}
    return seen


def site_of(module: nn.Module) -> Site | None:
    """The module's site, if it is adapted."""
    return cast(Site | None, module._modules.get(SITE)) if isinstance(module, Adapted) else None


def install(module: nn.Module, site: Site) -> None:
    """Make ``module`` adapted. Nothing else of it changes."""
    module._modules[SITE] = site
    module.__class__ = adapted_class(type(module))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its adapters."""
    return getattr(type(module), "veneer_base", type(module))


def uninstall(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = own_class(module)
    del module._modules[SITE]


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) under every name that a module has, in the model's order. Unlike ``named_modules`` it does not
    enter the sites, whose many adapters would make every walk longer."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child) for name, child in module._modules.items() if child is not None
        ]
        stack += [entry for entry in reversed(children) if not isinstance(entry[1], Site)]


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


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which the plain layer would answer."""
    if not x.is_floating_point():
        return weight.dtype
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
