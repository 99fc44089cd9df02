"""Attach and detach: from (model, config) to plans, from plans to sites.

    plan(model, config) -> Plans    which weight gets which rank, who reads it, what is trained in full
    install(model, name, plans)     makes the trained numbers, then puts them in place
    detach(model)                   gives back the very model

``plan`` finds every problem before anything changes, and raises once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapted import (
    GROUP,
    SITE,
    STRAY,
    Change,
    Group,
    LayerAdapter,
    Selected,
    Site,
    at_least_float32,
    enter,
    in_turn,
    own_class,
    set_child,
    site_of,
    sites,
    uninstall,
    walk,
    weight_of,
)
from veneer.adapted import (
    install as install_site,
)
from veneer.bases import Storage, storage_of
from veneer.config import LoraConfig
from veneer.distributed import spread_problem
from veneer.errors import ConfigError, MergeError, SelectionError, TargetError, listing, nearest, raise_all, sentence
from veneer.layers import LAYERS, Dims, Layer, kind_of
from veneer.layers._base import GENERAL, factors
from veneer.linears import Together
from veneer.methods import take_back
from veneer.overlap import overlaps
from veneer.proof import fresh
from veneer.readers import Host, alike, bound, hosts, switched, switches, unreachable
from veneer.targets import (
    WORDS,
    Names,
    Slot,
    bad_regex,
    excluded,
    expand,
    fresh_head,
    select,
    unmatched,
    value_for,
)
from veneer.variants import VARIANTS, Start


class SkippedLayers(UserWarning):
    """``targets="all"`` met layers that cannot carry an adapter; the text names each, and why."""


@dataclass(frozen=True)
class LowPlan:
    """One weight to change: its owner, every module that holds it (the owner first), and every method that reads it
    past those.

    ``rows`` are the outputs to change, None for all of them.
    """

    path: str
    weight: str
    layer: Layer
    storage: Storage
    dims: Dims
    rank: int
    alpha: float
    holders: tuple[Slot, ...]
    hosts: tuple[Host, ...] = ()
    rows: tuple[int, ...] | None = None

    @property
    def slot(self) -> Slot:
        return self.path, self.weight

    @property
    def start_dims(self) -> Dims:
        """The size of what is trained: the whole weight's, or that of the chosen rows."""
        return self.dims if self.rows is None else self.dims._replace(out=len(self.rows))


@dataclass(frozen=True)
class Plans:
    """What one adapter will be: low-rank changes, and parameters (``full``: path → names) that are trained in full.
    ``full_hosts`` are the methods that read those past their modules, ``apart`` the places in ``full`` whose parameter
    is tied to another in the model, and has values of its own in this adapter."""

    config: LoraConfig
    low: tuple[LowPlan, ...]
    full: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    full_hosts: tuple[Host, ...] = ()
    apart: frozenset[Slot] = frozenset()


GENERAL_KIND: Layer = LAYERS[GENERAL]


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


def need_group(model: nn.Module, name: str | None = None, *, walk: bool = True) -> Group:
    """The model's group; a SelectionError if it has none, or no adapter of this name, or if layers of the model belong
    to another group. Without ``walk`` those are looked for only while there is a copied layer anywhere."""
    group = group_of(model)
    if group is None:
        raise SelectionError(
            sentence(f"no adapter on this {type(model).__name__}", "one", "call veneer.attach or load first")
        )
    group.claim(unwrap(model))
    if (walk or STRAY) and (problem := strangers(model)):
        raise SelectionError(problem)
    if name is not None and not (isinstance(name, str) and name in group.configs):
        found = f"no adapter named {name!r}{nearest(str(name), group.configs)}"
        raise SelectionError(sentence(found, f"one of {', '.join(group.configs)}", "use a name that is attached"))
    return group


def strangers(model: nn.Module) -> str | None:
    """The problem of layers with adapters that were attached through another model, or None. Nobody who selects, merges
    or detaches through this one means them, but a walk over its layers would meet them."""
    if not _strangers(model) or not (paths := in_turn(_strangers)(model)):  # another thread may be attaching
        return None
    found = f"adapters attached through another model object at {listing(paths, 3)}"
    do = (
        "go through the model that they were attached to; if a layer was copied, take the copy out, and detach before "
        "copying or attach after"
    )
    return sentence(found, "one root for all adapters", do)


def _strangers(model: nn.Module) -> list[str]:
    group = group_of(model)
    return [path for path, _, site in sites(unwrap(model)) if site.group is not group]


def only_name(model: nn.Module, name: str | None) -> str:
    """``name``, or the name of the only adapter; a SelectionError if there are several."""
    group = need_group(model, name)
    if name is None and len(group.configs) > 1:
        found = f"{len(group.configs)} adapters ({', '.join(group.configs)}) and no name"
        raise SelectionError(sentence(found, "a name", "say which adapter is meant"))
    return name if name is not None else next(iter(group.configs))


def adapters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LayerAdapter]]:
    """(path, module, its part of the adapter ``name``) for every module where it does something of its own, in the
    model's order."""
    for path, module, site in sites(model):
        part = site.get(name)
        if part is not None and (part.low._modules or part.full.state_dict()):
            yield path, module, part


def changes(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str, Change]]:
    """(path, module, weight, change) of each weight that the adapter ``name`` changes, once, in the model's order."""
    for path, module, part in adapters(model, name):
        for weight, change in part.low._modules.items():
            yield path, module, weight, change  # pyright: ignore[reportReturnType]


def parameter_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@in_turn
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
    problems, unusable = list(name_problems(model, name)), bad_regex(config)
    if config.variant not in VARIANTS.names():
        found = f"variant={config.variant!r}{nearest(config.variant, VARIANTS.names())}"
        problems.append(sentence(found, f"one of {', '.join(VARIANTS.names())}", "choose one that exists"))
    raise_all(TargetError, "Nothing was attached", [*problems, *unusable] if unusable else [])

    names, variant = Names(model), VARIANTS[config.variant if config.variant in VARIANTS.names() else "lora"]
    frozen = frozen_on_purpose(names)
    targets, more = select(names, config)
    problems += more
    also = expand(names, config.train_also, "train_also", problems)
    explicit = callable(config.targets) or any(t not in WORDS for t in _strings(config.targets))
    for path in dict.fromkeys(path for path, _ in targets if path in also) if explicit else ():
        problems.append(sentence(f"{path!r} in targets and in train_also", "one of them", "leave it out of the other"))
    head = [] if explicit else _untrained_head(names, config, frozen)
    targets = [slot for slot in targets if slot[0] not in also and slot not in head]
    everything = not callable(config.targets) and "all" in _strings(config.targets)
    if everything:
        targets = _attachable(names, targets, frozen)
    for field_name, patterns in (("ranks", config.ranks), ("alphas", config.alphas), ("slices", config.slices)):
        problems += unmatched(names, patterns, field_name, targets)

    alpha = variant.default_alpha if config.alpha is None else config.alpha
    low_slots = [slot for slot in targets if is_matrix(names, slot)]
    wanted = {
        slot: Wish(
            int(value_for(names, slot, config.ranks, config.rank)),
            value_for(names, slot, config.alphas, alpha),
            value_for(names, slot, config.slices, None),
            # "all" means as much as each layer allows; a rank that was asked for a layer by name must fit
            clamp=everything and value_for(names, slot, config.ranks, None) is None,
        )
        for slot in low_slots
    }
    low = plan_low(names, wanted, problems)
    vectors: dict[str, tuple[str, ...]] = {}
    for path, vector in (*head, *targets):
        if (path, vector) not in wanted:
            vectors[path] = (*vectors.get(path, ()), vector)
    full = {path: tuple(name for name, p in names.modules[path]._parameters.items() if p is not None) for path in also}
    for source in (vectors, _bias_plan(names, config, [entry.path for entry in low], also, problems)):
        for path, found in source.items():
            full[path] = tuple(dict.fromkeys((*full.get(path, ()), *found)))
    full = with_ties(names, full)
    check_full(names, full, problems, frozen)
    for path, name in {slot for entry in low for slot in entry.holders}:
        if name in full.get(path, ()):
            found = f"{parameter_path(path, name)!r} to be changed and, through a tie, trained in full"
            problems.append(sentence(found, "one of them", "leave one of the tied modules out of train_also"))
    problems += overlaps(names, changed_slots(low, full))
    raise_all(TargetError, "Nothing was attached", problems)
    if callable(config.targets):
        config = replace(config, targets=tuple(dict.fromkeys(path for path, _ in targets)))
    return Plans(config, tuple(low), full, frozenset(also), full_hosts(names, full))


def _untrained_head(names: Names, config: LoraConfig, frozen: Set[int]) -> list[Slot]:
    """With "all-linear", a task head that no checkpoint held, which is trained in full: a low-rank change of random
    numbers, or none at all, would leave the head to whoever loads the adapter."""
    if callable(config.targets) or "all-linear" not in _strings(config.targets):
        return []
    found, left_out = fresh(names), excluded(names, config, [])
    head = fresh_head(names, [slot for key, slot in found.items() if key not in frozen])
    return [slot for slot in head if slot not in left_out]


def changed_slots(low: Sequence[LowPlan], full: Mapping[str, Sequence[str]]) -> list[Slot]:
    """Every place whose parameter an adapter changes or replaces."""
    own = [slot for entry in low for slot in entry.holders]
    return [*own, *((path, name) for path, parameters in full.items() for name in parameters)]


def with_ties(names: Names, full: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """``full`` with every other place that holds the same parameters: a tie is trained as one."""
    held, whole = holders(names), {path: dict.fromkeys(parameters) for path, parameters in full.items()}
    for path, parameters in full.items():
        for name in parameters:
            for other, own in held.get(id(names.modules[path]._parameters.get(name)), ()):
                whole.setdefault(other, {})[own] = None
    return {path: tuple(parameters) for path, parameters in whole.items()}


def full_hosts(names: Names, full: Mapping[str, Sequence[str]]) -> tuple[Host, ...]:
    """Who reads parameters that are trained in full past their module."""
    found = [host for path, parameters in full.items() for name in parameters for host in hosts(names, path, name)]
    return tuple(dict.fromkeys(found))


def is_matrix(names: Names, slot: Slot) -> bool:
    """Whether a low-rank change fits a parameter: its module's kind says so, or it has two axes that count."""
    path, name = slot
    module = names.modules[path]
    kind = kind_of(module)
    if kind is not None and (name in kind.weights(module) or name in kind.vectors(module)):
        return name in kind.weights(module)
    return "bias" not in name and name in GENERAL_KIND.weights(module)


def _kind_for(module: nn.Module, name: str) -> Any:
    """The kind that describes one parameter: its module's, or the general one for what that does not mention."""
    kind = kind_of(module)
    return kind if kind is not None and name in kind.weights(module) else GENERAL_KIND


def _attachable(names: Names, targets: list[Slot], frozen: Set[int]) -> list[Slot]:
    """The targets without those that cannot carry an adapter, of which a warning tells: "all" means all that can."""
    held = holders(names)
    refused: dict[Slot, str] = {}
    for slot in targets:
        reason = next(_refusals(names, slot, held), None)
        if reason is None and not is_matrix(names, slot):
            problems: list[str] = []
            check_full(names, {slot[0]: (slot[1],)}, problems, frozen)
            reason = next(iter(problems), None)
        if reason:
            refused[slot] = reason
    if refused:
        lines = "\n".join(f"  {reason}" for reason in refused.values())
        warnings.warn(f'targets="all" leaves out {len(refused)} weights\n{lines}', SkippedLayers, stacklevel=4)
    return [slot for slot in targets if slot not in refused]


def holders(names: Names) -> dict[int, list[Slot]]:
    """(path, name) of every place that holds a parameter, by the parameter's identity."""
    found: dict[int, list[Slot]] = {}
    for path, module in names.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((path, name))
    return found


def _holders(names: Names, slot: Slot, held: Mapping[int, list[Slot]]) -> list[Slot]:
    """Every place that holds the weight of a slot, in the model's order."""
    return held.get(id(weight_of(names.modules[slot[0]], slot[1])), [slot])


def _refusals(names: Names, slot: Slot, held: Mapping[int, list[Slot]]) -> Iterator[str]:
    """Why a weight cannot be changed, for each module that holds or reads it."""
    for holder in _holders(names, slot, held):
        problem = _refusal(names, holder, slot)
        if problem:
            yield problem


@dataclass(frozen=True)
class Wish:
    """What is wanted for one weight. ``slices`` are (start, stop) ranges of its outputs, or a bool for each of its
    equal parts. ``clamp`` lowers the rank to what the shape allows."""

    rank: int
    alpha: float
    slices: Sequence[Any] | None = None
    clamp: bool = False


def plan_low(names: Names, wanted: Mapping[Slot, Wish], problems: list[str]) -> list[LowPlan]:
    """A plan for each wanted weight, with everyone who holds or reads it; problems are added."""
    held = holders(names)
    plans: dict[Slot, LowPlan] = {}
    for slot, wish in wanted.items():
        found = list(_refusals(names, slot, held))
        if found:
            problems += found
            continue
        entry = _low_plan(names, _holders(names, slot, held), wish, problems)
        if entry is not None:
            plans.setdefault(entry.slot, entry)
    return list(plans.values())


def _low_plan(names: Names, slots: list[Slot], wish: Wish, problems: list[str]) -> LowPlan | None:
    path, name = slots[0]
    module = names.modules[path]
    layer, weight = _kind_for(module, name), weight_of(module, name)
    storage: Any = storage_of(weight)
    where = f"{parameter_path(path, name)!r} ({own_class(module).__name__})"
    dims = layer.dims(module, storage.shape(weight))
    rows = None
    if wish.slices is not None:
        rows = _rows(wish.slices, dims)
        if rows is None:
            found = f"slices {list(wish.slices)!r} for {where}, which has {dims.out} outputs"
            expected = "a bool for each of its equal parts, or (start, stop) ranges of its outputs"
            problems.append(sentence(found, expected, "correct them, for instance [True, False, True]"))
            return None
    largest = min(dims.max_rank, len(rows)) if rows else dims.max_rank
    rank = min(wish.rank, largest) if wish.clamp else wish.rank
    if rank > largest:
        found = f"rank {rank} for {where}, (groups, out, in) = {tuple(dims)}"
        do = f"lower the rank, set ranks={{{path!r}: {largest}}} or exclude it"
        problems.append(sentence(found, f"at most {largest}, what its weight allows", do))
        return None
    above = tuple(dict.fromkeys(host for slot in slots for host in hosts(names, *slot)))
    return LowPlan(path, name, layer, storage, dims, rank, wish.alpha, tuple(slots), above, rows)


def _rows(slices: Sequence[Any], dims: Dims) -> tuple[int, ...] | None:
    """The outputs that slices choose, or None if they do not fit."""
    if all(isinstance(part, bool) for part in slices):
        size, rest = divmod(dims.out, len(slices))
        ranges = [(size * number, size * (number + 1)) for number, on in enumerate(slices) if on]
        fits = not rest
    else:
        ranges = [tuple(part) for part in slices]
        fits = all(len(part) == 2 and 0 <= part[0] < part[1] <= dims.out for part in ranges)
    rows = tuple(row for start, stop in ranges for row in range(start, stop)) if fits else ()
    return rows if rows and len(set(rows)) == len(rows) and dims.groups == 1 else None


def _refusal(names: Names, holder: Slot, wanted: Slot) -> str | None:
    """Why the module that holds a weight cannot run on a changed one, or None. ``wanted`` is the target whose weight
    it shares."""
    (path, name), module = holder, names.modules[holder[0]]
    kind, weight = _kind_for(module, name), weight_of(module, name)
    shared = "" if holder == wanted else f" (it shares the weight of target {parameter_path(*wanted)!r})"
    what = f"{path!r}, a {own_class(module).__name__}{shared}"
    if weight is None:
        found = f"{what}, whose {name!r} is no parameter (computed by a hook?)"
        return sentence(found, "a parameter, or a parametrization of torch.nn.utils.parametrize", "leave it out")
    stem, _, ending = name.rpartition("_")
    if ending in ("v", "g", "orig") and isinstance(module.__dict__.get(stem), Tensor):
        found = f"{what}, of whose {name!r} a hook computes {stem!r} before any adapter is seen (weight_norm, prune?)"
        return sentence(found, "a parametrization of torch.nn.utils.parametrize", "leave it out, or use that")
    if getattr(weight, "is_meta", False) and not names.without_numbers and not nn.parameter.is_lazy(weight):
        found = f"{what}, whose weight is on the meta device while others hold numbers (offloaded?)"
        return sentence(found, "a weight that holds numbers", "load it first, or leave it out")
    if nn.parameter.is_lazy(weight):
        return sentence(f"{what}, whose weight has no shape yet", "a model that has run once", "run it on an example")
    if storage_of(weight) is None:
        found = f"{what}, whose weight is stored as {type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
        return sentence(found, "a floating-point parameter", "load the base in a floating-point dtype, or leave it out")
    reason = kind.refuses(module) or no_site(names, path) or _hosts_refuse(names, path, name)
    return sentence(f"{what}: {reason}", "a layer whose adapter takes effect", "leave it out") if reason else None


def _hosts_refuse(names: Names, path: str, name: str) -> str | None:
    """Why a module that reads a parameter from above, or whose fast path would, cannot see a changed one, or None."""
    for host in hosts(names, path, name):
        if reason := no_site(names, host.path, host.method):
            reader = (repr(host.path) if host.path else "the model") + f" in {host.method!r}" * (
                host.method != "forward"
            )
            return f"{reader} reads it, and {reason}"
    for above in switched(names, path):
        if reason := _taken(names.modules[above]):
            return f"{above!r} reads it, and {reason}"
    return None


def no_site(names: Names, path: str, method: str = "forward") -> str | None:
    """Why an adapter at ``path`` cannot stand there or would have no effect in a method, whatever its weights are, or
    None."""
    return unreachable(names, path, method) or _taken(names.modules[path])


def _taken(module: nn.Module) -> str | None:
    own = dict(module._modules.items()).get(SITE)  # a ScriptModule's children are no dict
    mine = own is None or isinstance(own, Site)
    return None if mine else f"it has a child of its own called {SITE!r}, where its adapters would stand"


def frozen_on_purpose(names: Names) -> set[int]:
    """The ids of the parameters that are frozen while others of the model train, adapters aside. A model that is
    frozen as a whole tells nothing about any one of them."""
    group = group_of(names.model)
    before = {} if group is None else group.required_grad
    trains: dict[int, bool] = {}
    for path, module in names.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a tie is known by the first of its names
                required = before.get(parameter_path(path, name), parameter.requires_grad)
                trains.setdefault(id(parameter), required)
    return {key for key, required in trains.items() if not required} if any(trains.values()) else set()


def check_full(
    names: Names, full: Mapping[str, tuple[str, ...]], problems: list[str], frozen: Set[int] = frozenset()
) -> None:
    """Problems of the parameters that are to be trained in full: out of forward's reach, or not to be trained.
    ``frozen`` are the ids of those that the user has frozen."""
    for path, parameters in full.items():
        module = names.modules[path]
        reason = no_site(names, path) if parameters else None
        if reason:
            problems.append(
                sentence(f"{path!r} trained in full: {reason}", "a module that takes effect", "leave it out")
            )
        for name in parameters:
            parameter = module._parameters.get(name)
            if not reason and (why := _hosts_refuse(names, path, name)):
                found = f"{parameter_path(path, name)!r} trained in full: {why}"
                problems.append(sentence(found, "a module that takes effect", "leave it out"))
            if parameter is None:
                found = f"{path}.{name} trained in full, which is computed by a parametrization"
                problems.append(sentence(found, "a plain parameter", "leave it out"))
                continue
            where = parameter_path(path, name)
            if not parameter.is_floating_point():
                problems.append(sentence(f"{where} of {parameter.dtype}", "floating point", "leave it out"))
            elif parameter.is_meta and not names.without_numbers:
                problems.append(sentence(f"{where} on the meta device", "numbers", "load it first"))
            elif id(parameter) in frozen:
                found = f"{where} trained in full, which you froze (requires_grad=False) among parameters that train"
                problems.append(sentence(found, "one that may be trained", "leave it out, or unfreeze it first"))


def _bias_plan(names: Names, config: LoraConfig, low: list[str], also: list[str], problems: list[str]):
    if config.bias == "none":
        return {}
    left_out = {*((path, "bias") for path in also), *excluded(names, config, [])}
    candidates = low if config.bias == "targets" else [p for p in names.modules if (p, "bias") not in left_out]
    own = {path: names.modules[path]._parameters for path in candidates}
    found = {path: ("bias",) for path, named in own.items() if "bias" in named and named["bias"] is not None}
    if not found:
        what = f"bias={config.bias!r} and no bias there"
        problems.append(sentence(what, "at least one bias to train", 'use bias="none"'))
    return found


def name_problems(model: nn.Module, name: str) -> Iterator[str]:
    """Why an adapter called ``name`` cannot be added to the model now, whatever it is."""
    group = group_of(model)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        yield sentence(f"adapter name {name!r}", "letters, digits, '_' and '-'", "choose such a name")
    if group and name in group.configs:
        yield sentence(
            f"adapter name {name!r}, which is taken", "a new name", "choose another, or detach that one first"
        )
    if group and group.merged is not None:
        yield sentence(
            f"{group.merged!r} merged into the weights", "an unmerged model", "call veneer.unmerge(model) first"
        )
    if problem := strangers(model):
        yield problem
    # its numbers would be no part of what is sharded, and of what averages gradients
    do = "attach or load the adapter first, then shard the model (fully_shard)"
    if problem := spread_problem((module for _, module in walk(model)), "an adapter", do):
        yield problem


def _strings(targets) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(targets)


Evidence = Callable[[LowPlan], Mapping[str, Callable[[], Tensor]]]


@in_turn
@torch.inference_mode(False)  # the numbers can be trained later, wherever this is called
def install(
    model: nn.Module,
    name: str,
    plans: Plans,
    *,
    trainable: bool = True,
    numbers: Mapping[Slot, Mapping[str, Tensor]] | None = None,
    evidence: Evidence | None = None,
) -> None:
    """Put a planned adapter in place and freeze the base. All memory is allocated before the model is touched.

    Args:
        numbers: the trained numbers of each weight; made anew without.
        evidence: what a variant may look at of one weight besides the weight itself, by name.
    """
    raise_all(
        TargetError, "Nothing was attached", list(name_problems(model, name))
    )  # another thread may have been faster
    names = Names(model)
    parts = build(names, plans, trainable=trainable, numbers=numbers, evidence=evidence)
    group = enlist(model)
    selected = place(names, group, plans, parts)
    for path, part in parts.items():
        site: Any = site_of(names.modules[path])
        set_child(site, name, part)
    group.set_adapters({**group.configs, name: plans.config}, {**group.selections, name: Selected(name, selected)})


def build(
    names: Names,
    plans: Plans,
    *,
    trainable: bool,
    numbers: Mapping[Slot, Mapping[str, Tensor]] | None = None,
    evidence: Evidence | None = None,
) -> dict[str, LayerAdapter]:
    """The parts of a planned adapter by the path of their module. The model does not know them yet.

    Raises:
        TargetError: a variant cannot start from these weights.
    """
    modules, given = names.modules, numbers or {}
    for entry in plans.low:
        entry.storage.prepare(modules[entry.path])
    made, problems = [], []
    for entry in plans.low:
        try:
            made.append((entry, make_change(entry, modules, plans.config, given.get(entry.slot, {}), evidence)))
        except _BadStartError as error:
            problems.append(str(error))
    if problems:
        for entry in plans.low:
            if site_of(modules[entry.path]) is None:
                entry.storage.release(modules[entry.path])
    raise_all(TargetError, "Nothing was attached", problems)
    parts: dict[str, LayerAdapter] = {}

    def part(path: str) -> LayerAdapter:
        return parts.setdefault(path, LayerAdapter())

    for entry, change in made:
        part(entry.path).low._modules[entry.weight] = change
        for path, weight in entry.holders:
            part(path).changes[weight] = change
    # A frozen base keeps its running statistics too: what training would move becomes a copy that the adapter owns.
    moving = {path: () for path, module in modules.items() if _keeps_statistics(module) and path not in plans.full}
    copies: dict[Any, nn.Parameter] = {}
    for path, parameters in {**plans.full, **moving}.items():
        whole = path in plans.whole or _keeps_statistics(modules[path])
        alone = {own: (path, own) for own in parameters if (path, own) in plans.apart}
        _copy_full(part(path).full, modules[path], parameters, plans.config, whole, copies, alone)
    for host in (*(host for entry in plans.low for host in entry.hosts), *plans.full_hosts):
        below = part(names.canonical[".".join((host.path, *host.way)).strip(".")])
        if host.method == "forward":
            part(host.path).hosted[host.way] = below
        else:
            part(host.path).entries.setdefault(host.method, {})[host.way] = below
    for path in list(parts):
        for above in switched(names, path):
            part(above)
    for path, adapter in parts.items():
        adapter.requires_grad_(trainable).train(modules[path].training)
    return {path: parts[path] for path in modules if path in parts}


def enlist(model: nn.Module) -> Group:
    """The group of a model; where it had none, a new one, and a frozen base."""
    group = group_of(model)
    if group is None:
        group = Group()
        group.required_grad = {path: p.requires_grad for path, p in model.named_parameters()}
        model.__dict__[GROUP] = group
        group.claim(model)
        for parameter in model.parameters():
            parameter.requires_grad = False  # the method refuses a parameter that has no shape yet
    return group


def place(names: Names, group: Group, plans: Plans, parts: Mapping[str, LayerAdapter]) -> dict[Any, LayerAdapter]:
    """Make the modules of these parts adapted, and return the table of the parts by what calls them (see
    ``adapted.Selected``). The sites do not hold the parts yet."""
    modules = names.modules
    transposed = {
        path for entry in plans.low for path, _ in entry.holders
        if _kind_for(modules[path], entry.weight).out_axis != entry.layer.out_axis
    }  # fmt: skip
    selected: dict[Any, LayerAdapter] = {}
    for path, part in parts.items():
        site = _site(modules[path], group)
        site.transposed = site.transposed or path in transposed
        part.settle(modules[path], site)
        enter(modules[path], part.entries)
        selected.update(dict.fromkeys(part.keys(site), part))
    share(names, parts)
    return selected


def share(names: Names, parts: Mapping[str, LayerAdapter]) -> None:
    """Let layers that read one input be computed together."""
    for path, module in names.modules.items():
        for children in alike(own_class(module)):
            paths = [names.canonical.get(parameter_path(path, child), "") for child in children]
            known = [(names.modules[p], parts[p]) for p in dict.fromkeys(paths) if p in parts and p != path]
            by_size: dict[Any, list[tuple[nn.Module, LayerAdapter]]] = {}
            for child, part in known:
                if part.direct is not None and part.together is None:
                    change = part.direct.change
                    by_size.setdefault((change.dims.in_, change.dropout), []).append((child, part))
            for members in by_size.values():
                together = Together(members) if len(members) > 1 else None
                for _, part in members:
                    part.together = together


def _site(module: nn.Module, group: Group) -> Site:
    """The module's site, made if need be."""
    site = site_of(module)
    if site is None:
        kind = kind_of(module)
        storage = storage_of(weight_of(module, kind.weight)) if kind is not None else None
        trusted = storage.modules() if storage is not None else ()
        factored = kind is not None and factors(kind, module, type(module), trusted)
        product = factored and kind.product and storage is not None and storage.name == "plain"
        site = Site(group, kind, factored, switches(module), product)
        site.bound = tuple(bound(module))
        site.train(module.training)
        install_site(module, site)
    return site


def _keeps_statistics(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return not scripted and module._buffers.get("running_mean") is not None


class _BadStartError(TargetError):
    """Numbers from which a variant starts are not finite, or too near to that for linear algebra."""


def _starting(entry: LowPlan, variant: str, what: str, values: Tensor) -> Tensor:
    """``values``, if a variant can start from them."""
    if values.is_meta or values.isfinite().all():
        return values
    where = parameter_path(*entry.slot)
    found = f"the weight {where!r}" if what == "base" else f"the {what} of {where!r}"
    expected = f"finite numbers, from which variant {variant!r} starts"
    do = "repair the base or the data, exclude the layer, or use a variant that starts from neither, such as lora"
    raise _BadStartError(sentence(f"{found} with NaN or infinity", expected, do))


def make_change(
    entry: LowPlan,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    given: Mapping[str, Tensor],
    evidence: Evidence | None,
) -> Change:
    """The numbers of one weight on its device: those that are given, or the variant's start."""
    layer, variant = entry.layer, VARIANTS[config.variant]
    module = modules[entry.path]
    weight = weight_of(module, entry.weight)
    rows = None if entry.rows is None else torch.tensor(entry.rows, device="cpu")

    def base() -> Tensor:
        dense = entry.storage.dense(weight)
        dense = layer.unfold(dense.to(at_least_float32(dense.dtype)), entry.dims)
        dense = dense if rows is None else dense[:, rows.to(dense.device)]
        return _starting(entry, variant.name, "base", dense)

    dims = entry.start_dims
    found = evidence(entry) if evidence is not None and not given else {}
    seen = {
        name: lambda name=name, read=read: _starting(entry, variant.name, name, read()) for name, read in found.items()
    }
    start = Start(dims.groups, dims.out, dims.in_, entry.rank, layer.fan_in(entry.dims), base, **seen)
    device = getattr(weight, "device", None) or entry.storage.dense(weight).device
    numbers = {name: value.to(device) for name, value in given.items()}
    if not given or variant.derived:
        try:
            with torch.no_grad(), torch.device(device):
                numbers = {**variant.init(start), **numbers}
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  # numbers that are finite, and yet too large
            found = f"{parameter_path(*entry.slot)!r}, from which variant {variant.name!r} cannot start ({error})"
            do = "exclude the layer, or use a variant that does not start from it, such as lora"
            raise _BadStartError(sentence(found, "numbers that have a decomposition", do)) from error
    dtype = trained_dtype(config, entry.storage.dtype(weight))
    numbers = {
        name: value if name in variant.derived else value.to(dtype, copy=bool(given)) for name, value in numbers.items()
    }
    return Change(
        numbers, layer=layer, variant=variant, storage=entry.storage, dims=entry.dims, rank=entry.rank,
        alpha=entry.alpha, dropout=config.dropout, rows=rows, still=layer.still(module),
    )  # fmt: skip


def _copy_full(full: nn.Module, module: nn.Module, parameters, config: LoraConfig, whole: bool, copies, alone) -> None:
    """Register copies of a module's parameters, and of its buffers if ``whole``; tied parameters have one copy, but for
    those that stand ``alone``."""
    for name in parameters:
        own: Any = module._parameters[name]
        key = alone.get(name, id(own))
        if key not in copies:
            copies[key] = nn.Parameter(own.detach().to(trained_dtype(config, own.dtype), copy=True))
        full.register_parameter(name, copies[key])
    for name, own in module._buffers.items() if whole else ():
        if own is not None and name not in module._non_persistent_buffers_set:
            full.register_buffer(name, own.detach().clone())


def trained_dtype(config: LoraConfig, base: torch.dtype) -> torch.dtype:
    """The dtype of what is trained for a weight of dtype ``base``: the config's, else float32 for a 16-bit base and
    the base's otherwise."""
    return getattr(torch, config.dtype) if config.dtype else at_least_float32(base)


@in_turn
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
    for adapter in names:
        group.selections[adapter].parts = None  # an error for calls that still select it
    for _, _, site in sites(model):
        for adapter in names:
            set_child(site, adapter, None)
    kept = [key for key in group.configs if key not in names]
    group.set_adapters({key: group.configs[key] for key in kept}, {key: group.selections[key] for key in kept})
    if group.merged in names:
        group.merged = None
    for _, module in walk(model) if not kept else ():
        take_back(module)
    abandon(model, group)


def abandon(model: nn.Module, group: Group) -> None:
    """Give modules without an adapter their own class and storage back, and with the last adapter the model its
    ``requires_grad``: unless a bank needs them."""
    if group.banks:
        return
    for _, module, site in list(sites(model)):
        if not site._modules:
            uninstall(module)
            for name in site.layer.weights(module) if site.layer is not None else ():
                storage = storage_of(weight_of(module, name))
                if storage is not None:
                    storage.release(module)
    if not group.configs:
        for path, parameter in model.named_parameters():
            parameter.requires_grad = group.required_grad.get(path, parameter.requires_grad)
        del model.__dict__[GROUP]
