"""Attach and detach: from (model, config) to plans, from plans to sites.

    plan(model, config) -> Plans    which layer gets which rank, who shares its weight, what is trained in full
    install(model, name, plans)     makes the trained numbers, then puts them in place
    detach(model)                   gives back the very model

``plan`` finds every problem before anything changes, and raises once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.adapted import (
    GROUP,
    Group,
    LayerAdapter,
    Site,
    at_least_float32,
    own_class,
    site_of,
    sites,
    uninstall,
)
from veneer.adapted import (
    install as install_site,
)
from veneer.bases import Storage, storage_of
from veneer.config import LoraConfig
from veneer.errors import ConfigError, MergeError, SelectionError, TargetError, listing, nearest, raise_all, sentence
from veneer.layers import LAYERS, Dims, Layer, kind_of
from veneer.layers._base import factors
from veneer.targets import WORDS, Names, bad_regex, excluded, expand, select, unmatched, value_for
from veneer.variants import VARIANTS


class SkippedLayers(UserWarning):
    """``targets="all"`` met layers that cannot carry an adapter; the text names each, and why."""


@dataclass(frozen=True)
class LowPlan:
    """One weight to change: its owner, and every module that reads it (the owner first)."""

    path: str
    layer: Layer
    storage: Storage
    dims: Dims
    rank: int
    alpha: float
    readers: tuple[nn.Module, ...]

    @property
    def module(self) -> nn.Module:
        return self.readers[0]


@dataclass(frozen=True)
class Plans:
    """What one adapter will be: low-rank changes, and parameters (``full``: path → names) that are trained in full."""

    config: LoraConfig
    low: tuple[LowPlan, ...]
    full: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def group_of(model: nn.Module) -> Group | None:
    """The group of the adapters attached to ``model``, seen through DDP's and ``torch.compile``'s wrappers."""
    return unwrap(model).__dict__.get(GROUP)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` and (distributed) data-parallel wrappers.

    Raises:
        TargetError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(
            sentence(f"a {type(model).__name__} for a model", "a torch.nn.Module", "load the model first")
        )
    while GROUP not in model.__dict__:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None or len(model._modules) != 1:
            return model
        model = inner
    return model


def need_group(model: nn.Module, name: str | None = None) -> Group:
    """The model's group; a SelectionError if it has none, or no adapter of this name."""
    group = group_of(model)
    if group is None:
        raise SelectionError(
            sentence(f"no adapter on this {type(model).__name__}", "one", "call veneer.attach or load first")
        )
    if name is not None and not (isinstance(name, str) and name in group.configs):
        found = f"no adapter named {name!r}{nearest(str(name), group.configs)}"
        raise SelectionError(sentence(found, f"one of {', '.join(group.configs)}", "use a name that is attached"))
    return group


def only_name(model: nn.Module, name: str | None) -> str:
    """``name``, or the name of the only adapter; a SelectionError if there are several."""
    group = need_group(model, name)
    if name is None and len(group.configs) > 1:
        found = f"{len(group.configs)} adapters ({', '.join(group.configs)}) and no name"
        raise SelectionError(sentence(found, "a name", "say which adapter is meant"))
    return name if name is not None else next(iter(group.configs))


def adapters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LayerAdapter]]:
    """(path, layer, its adapter) for each weight that the adapter ``name`` changes, owners only, in the model's
    order."""
    seen: set[int] = set()
    for path, module, site in sites(model):
        adapter = site._modules.get(name)
        if adapter is not None and id(adapter) not in seen:
            seen.add(id(adapter))
            yield path, module, cast(LayerAdapter, adapter)


def plan(model: nn.Module, config: LoraConfig, name: str) -> Plans:
    """What ``config`` means for ``model``. Nothing is changed.

    Raises:
        TargetError: with every problem.
    """
    if not isinstance(config, LoraConfig):
        found = f"config={config!r}"
        raise ConfigError(
            sentence(found, "a veneer.LoraConfig", "use LoraConfig(…), or LoraConfig.from_dict for a mapping")
        )
    problems = [*name_problems(model, name), *bad_regex(config)]
    if config.variant not in VARIANTS.names():
        found = f"variant={config.variant!r}{nearest(config.variant, VARIANTS.names())}"
        problems.append(sentence(found, f"one of {', '.join(VARIANTS.names())}", "choose one that exists"))
    raise_all(TargetError, "Nothing was attached", problems)

    names, variant = Names(model), VARIANTS[config.variant]
    targets, problems = select(names, config)
    also = expand(names, config.train_also, "train_also", problems)
    explicit = callable(config.targets) or any(t not in WORDS for t in _strings(config.targets))
    for path in set(targets).intersection(also) if explicit else ():
        problems.append(sentence(f"{path!r} in targets and in train_also", "one of them", "leave it out of the other"))
    targets = [path for path in targets if path not in also]
    if "all" in _strings(config.targets if not callable(config.targets) else ()):
        targets = _attachable(names, targets)
    for field_name, patterns in (("ranks", config.ranks), ("alphas", config.alphas)):
        problems += unmatched(names, patterns, field_name, targets)

    alpha = variant.default_alpha if config.alpha is None else config.alpha
    wanted = {
        path: (int(value_for(names, path, config.ranks, config.rank)), value_for(names, path, config.alphas, alpha))
        for path in targets
    }
    low = plan_low(names, wanted, problems)
    full = {path: tuple(name for name, p in names.modules[path]._parameters.items() if p is not None) for path in also}
    full |= _bias_plan(names, config, [entry.path for entry in low], also, problems)
    check_full(names, full, problems)
    shared = {id(reader) for entry in low if len(entry.readers) > 1 for reader in entry.readers}
    for path in full:
        if id(names.modules[path]) in shared:
            found = f"a bias to train at {path!r}, which shares its weight with another target"
            problems.append(sentence(found, "biases of layers with a weight of their own", 'use bias="none"'))
    raise_all(TargetError, "Nothing was attached", problems)
    if callable(config.targets):
        config = replace(config, targets=tuple(targets))
    return Plans(config, tuple(low), full)


def _attachable(names: Names, targets: list[str]) -> list[str]:
    """The targets without those that cannot carry an adapter, of which a warning tells: "all" means all that can."""
    held = holders(names)
    refused = {path: reason for path in targets if (reason := next(_refusals(names, path, held), None))}
    if refused:
        lines = "\n".join(f"  {reason}" for reason in refused.values())
        warnings.warn(f'targets="all" leaves out {len(refused)} layers\n{lines}', SkippedLayers, stacklevel=4)
    return [path for path in targets if path not in refused]


def holders(names: Names) -> dict[int, list[tuple[str, str]]]:
    """(path, name) of every place that holds a parameter, by the parameter's identity."""
    found: dict[int, list[tuple[str, str]]] = {}
    for path, module in names.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((path, name))
    return found


def _readers(names: Names, path: str, held: Mapping[int, list[tuple[str, str]]]) -> list[str]:
    """The paths of the modules that hold the weight of the layer at ``path``, in the model's order."""
    kind = kind_of(names.modules[path])
    weight = names.modules[path]._parameters.get(kind.weight) if kind else None
    return [path] if weight is None else [reader for reader, _ in held[id(weight)]]


def _refusals(names: Names, path: str, held: Mapping[int, list[tuple[str, str]]]) -> Iterator[str]:
    """Why the weight at ``path`` cannot be changed, for each module that reads it."""
    kind = kind_of(names.modules[path])
    weight = names.modules[path]._parameters.get(kind.weight) if kind else None
    for reader in _readers(names, path, held):
        problem = _refusal(names, reader, weight, path)
        if problem:
            yield problem


def plan_low(names: Names, wanted: Mapping[str, tuple[int, float]], problems: list[str]) -> list[LowPlan]:
    """A plan for each path in ``wanted`` (→ rank, alpha), with everyone who shares its weight; problems are added."""
    held = holders(names)
    plans: dict[str, LowPlan] = {}
    for path, (rank, alpha) in wanted.items():
        found = list(_refusals(names, path, held))
        if found:
            problems += found
            continue
        readers = _readers(names, path, held)
        owner = readers[0]
        entry = _low_plan(names, owner, readers, rank, alpha, problems)
        if entry is not None:
            plans.setdefault(owner, entry)
    return list(plans.values())


def _low_plan(names, owner: str, readers: list[str], rank: int, alpha: float, problems: list[str]) -> LowPlan | None:
    module = names.modules[owner]
    layer: Any = kind_of(module)
    dims = layer.dims(module)
    if rank > dims.max_rank:
        found = f"rank {rank} for {owner!r} ({own_class(module).__name__}, groups, out, in = {tuple(dims)})"
        do = f"lower the rank, set ranks={{{owner!r}: {dims.max_rank}}} or exclude it"
        problems.append(sentence(found, f"at most {dims.max_rank}, what its weight allows", do))
        return None
    storage: Any = storage_of(module._parameters[layer.weight])
    modules = tuple(names.modules[reader] for reader in readers)
    return LowPlan(owner, layer, storage, dims, rank, alpha, modules)


def _refusal(names: Names, path: str, weight: Tensor | None, wanted: str) -> str | None:
    """Why the module at ``path`` cannot read a changed weight, or None. ``wanted`` is the target whose weight it
    shares."""
    module = names.modules[path]
    kind, shared = kind_of(module), "" if path == wanted else f" (it shares the weight of target {wanted!r})"
    what = f"{path!r}, a {own_class(module).__name__}{shared}"
    known = f"a layer of a kind that Veneer knows ({listing(LAYERS.names())})"
    if kind is None or module._parameters.get(kind.weight) is not weight:
        return sentence(what, known, "untie the weight, or leave the target out")
    if weight is None:
        found = f"{what}, whose {kind.weight!r} is no parameter of its own (computed by a parametrization?)"
        return sentence(found, "a plain parameter", "leave it out")
    if storage_of(weight) is None:
        found = f"{what}, whose weight is stored as {type(weight).__name__} of {weight.dtype}"
        return sentence(found, "a floating-point parameter", "load the base in a floating-point dtype, or leave it out")
    reason = kind.refuses(module) or unreachable(names, path)
    return sentence(f"{what}: {reason}", "a layer whose adapter takes effect", "leave it out") if reason else None


def unreachable(names: Names, path: str) -> str | None:
    """Why an adapter at ``path`` would have no effect there, or None."""
    module = names.modules[path]
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks?), which would pass the adapter by"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, whose forward cannot be changed"
    for alias in names.aliases[path]:
        parts = alias.split(".")
        for depth in range(len(parts)):
            above = names.modules[names.canonical[".".join(parts[:depth])]]
            if isinstance(above, nn.MultiheadAttention):
                return "nn.MultiheadAttention reads this weight directly, so an adapter would be passed by"
            if isinstance(above, nn.TransformerEncoderLayer):
                return "nn.TransformerEncoderLayer's fast path reads this weight directly in eval mode"
    return None


def check_full(names: Names, full: Mapping[str, tuple[str, ...]], problems: list[str]) -> None:
    """Problems of the parameters that are to be trained in full: tied to another module's, or out of forward's
    reach."""
    held = holders(names)
    for path, parameters in full.items():
        module = names.modules[path]
        reason = unreachable(names, path)
        if reason:
            problems.append(
                sentence(f"{path!r} trained in full: {reason}", "a module that takes effect", "leave it out")
            )
        for name in parameters:
            parameter = module._parameters[name]
            others = [f"{user}.{own}" for user, own in held[id(parameter)] if (user, own) != (path, name)]
            if others:
                found = f"{path}.{name} trained in full, which is tied to {listing(others)}"
                do = "exclude it" if name == "bias" else "target it with a low-rank change, which keeps ties"
                problems.append(sentence(found, "an untied parameter", do))
            if not parameter.is_floating_point():
                problems.append(sentence(f"{path}.{name} of {parameter.dtype}", "floating point", "leave it out"))


def _bias_plan(names: Names, config: LoraConfig, low: list[str], also: list[str], problems: list[str]):
    if config.bias == "none":
        return {}
    left_out = {*also, *excluded(names, config, [])}
    candidates = low if config.bias == "targets" else [path for path in names.modules if path not in left_out]
    found = {path: ("bias",) for path in candidates if names.modules[path]._parameters.get("bias") is not None}
    if not found:
        what = f"bias={config.bias!r} and no bias there"
        problems.append(sentence(what, "at least one bias to train", 'use bias="none"'))
    return found


def name_problems(model: nn.Module, name: str) -> Iterator[str]:
    """Why an adapter called ``name`` cannot be added to the model now, whatever it is."""
    group = group_of(model)
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        yield sentence(f"adapter name {name!r}", "letters, digits, '_' and '-'", "choose such a name")
    if group and name in group.configs:
        yield sentence(
            f"adapter name {name!r}, which is taken", "a new name", "choose another, or detach that one first"
        )
    if group and group.merged is not None:
        yield sentence(
            f"{group.merged!r} merged into the weights", "an unmerged model", "call veneer.unmerge(model) first"
        )
    foreign = [path for path, _, site in sites(model) if site.group is not group]
    if foreign:
        found = f"adapters attached through another model object at {listing(foreign, 3)}"
        yield sentence(
            found, "one root for all adapters", "attach to the model that they were attached to, or detach them"
        )


def _strings(targets) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


def install(model: nn.Module, name: str, plans: Plans, *, trainable: bool = True) -> None:
    """Put a planned adapter in place and freeze the base. All memory is allocated before the model is touched."""
    group = group_of(model) or Group()
    made = [(entry, _make(entry, plans.config)) for entry in plans.low]
    by_path = {entry.path: adapter for entry, adapter in made}
    modules = Names(model).modules
    full_only: list[tuple[nn.Module, LayerAdapter]] = []
    # A frozen base keeps its running statistics too: what training would move becomes a copy that the adapter owns.
    moving = {path: () for path, module in modules.items() if _keeps_statistics(module) and path not in plans.full}
    for path, parameters in {**plans.full, **moving}.items():
        adapter = by_path.get(path)
        if adapter is None:
            adapter = LayerAdapter()
            full_only.append((modules[path], adapter))
        _copy_full(adapter, modules[path], parameters, plans.config, whole=path not in by_path)
    for adapter in [*by_path.values(), *(adapter for _, adapter in full_only)]:
        adapter.requires_grad_(trainable).train(model.training)

    if GROUP not in model.__dict__:
        group.required_grad = {path: p.requires_grad for path, p in model.named_parameters()}
        model.__dict__[GROUP] = group
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for entry, adapter in made:
        for reader in entry.readers:
            # Registered once, at the owner: to register it at each reader would tie the adapter's own tensors.
            site = _site(reader, group, entry.layer)
            (site._modules if reader is entry.module else site.borrowed)[name] = adapter
    for module, adapter in full_only:
        _site(module, group, None)._modules[name] = adapter
    group.set_configs({**group.configs, name: plans.config})


def _site(module: nn.Module, group: Group, owner: Layer | None) -> Site:
    """The module's site, made if need be. ``owner`` is the kind of layer whose low-rank change the module reads."""
    site = site_of(module)
    if site is None:
        kind = kind_of(module)
        site = Site(group, kind, factors=kind is not None and factors(kind, module, type(module)))
        site.train(module.training)
        install_site(module, site)
    if owner is not None:
        site.transposed = site.layer.out_axis != owner.out_axis
    return site


def _keeps_statistics(module: nn.Module) -> bool:
    return module._buffers.get("running_mean") is not None


def _make(entry: LowPlan, config: LoraConfig) -> LayerAdapter:
    """The trained numbers of one layer, at their start, on the weight's device."""
    layer, module, variant = entry.layer, entry.module, VARIANTS[config.variant]
    weight: Any = module._parameters[layer.weight]

    def base() -> Tensor:
        dense = entry.storage.dense(weight)
        return layer.unfold(dense.to(at_least_float32(dense.dtype)), entry.dims)

    with torch.no_grad(), torch.device(weight.device):
        numbers = variant.init(*entry.dims, entry.rank, layer.fan_in(entry.dims), base)
        numbers["A"] = layer.mask_init(module, numbers["A"])
    dtype = trained_dtype(config, weight)
    numbers = {name: value.to(dtype) for name, value in numbers.items()}
    return LayerAdapter(
        numbers=numbers, layer=layer, variant=variant, storage=entry.storage, dims=entry.dims,
        rank=entry.rank, alpha=entry.alpha, dropout=config.dropout,
    )  # fmt: skip


def _copy_full(adapter: LayerAdapter, module: nn.Module, parameters, config: LoraConfig, whole: bool) -> None:
    for name in parameters:
        own = module._parameters[name].detach()
        adapter.full.register_parameter(name, nn.Parameter(own.to(trained_dtype(config, own), copy=True)))
    for name, own in module._buffers.items() if whole else ():
        if own is not None and name not in module._non_persistent_buffers_set:
            adapter.full.register_buffer(name, own.detach().clone())


def trained_dtype(config: LoraConfig, weight: Tensor) -> torch.dtype:
    """The dtype of what is trained for ``weight``: the config's, else float32 for a 16-bit base and the base's
    otherwise."""
    return getattr(torch, config.dtype) if config.dtype else at_least_float32(weight.dtype)


def detach(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> None:
    """Remove the adapter ``name`` (None: all of them). With the last one, the model is again the very object graph
    that it was: classes, modules, parameters, ``requires_grad``.

    Args:
        keep_merged: leave the weights of a merged adapter merged, and with them a plain model.

    Raises:
        SelectionError: there is no such adapter.
        MergeError: the adapter is merged and ``keep_merged`` is False. Nothing was changed.
    """
    model = unwrap(model)
    group = need_group(model, name)
    names = list(group.configs) if name is None else [name]
    if group.merged in names and not keep_merged:
        do = "call veneer.unmerge(model) first, or detach(model, keep_merged=True) to keep the merged weights"
        raise MergeError(sentence(f"{group.merged!r} is merged into the weights", "an unmerged model", do))
    for _, module, site in list(sites(model)):
        for adapter in names:
            site._modules.pop(adapter, None)
            site.borrowed.pop(adapter, None)
        if not site._modules and not site.borrowed:
            uninstall(module)
    group.set_configs({key: value for key, value in group.configs.items() if key not in names})
    if group.merged in names:
        group.merged = None
    if not group.configs:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(group.required_grad.get(path, parameter.requires_grad))
        del model.__dict__[GROUP]
