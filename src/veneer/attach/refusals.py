"""Why a weight cannot be changed, in words: one function for each kind of reason, none of which
changes the model.

refusals_of     a low-rank change of a weight, for every module that holds or reads it
check_full      parameters that are trained in full
name_problems   an adapter of this name, whatever it is
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

from veneer.attach.adapted_module import base_class, walk, weight_of
from veneer.attach.from_peft import peft_problem
from veneer.attach.lookup import adapters_of, foreign_layers_problem, parameter_path
from veneer.attach.state import STATE, LayerState
from veneer.attach.targets import Names, ParamRef
from veneer.attach.weight_readers import switched, unreachable, weight_readers
from veneer.bases import storage_of, unreadable
from veneer.distributed import spread_problem, within_run_on_all
from veneer.errors import listing, sentence
from veneer.layers import LAYERS, Layer, kind_of
from veneer.layers._base import GENERAL

GENERAL_KIND: Layer = LAYERS[GENERAL]


def kind_for(module: nn.Module, name: str) -> Any:
    """The kind that describes one parameter: its module's, or the general one for what that does
    not mention."""
    kind = kind_of(module)
    return kind if kind is not None and name in kind.weights(module) else GENERAL_KIND


def holders(names: Names) -> dict[int, list[ParamRef]]:
    """(path, name) of every module that holds a parameter, by the parameter's identity."""
    found: dict[int, list[ParamRef]] = {}
    for ref, parameter in names.parameters():
        found.setdefault(id(parameter), []).append(ref)
    return found


def holders_of(
    names: Names, ref: ParamRef, by_identity: Mapping[int, list[ParamRef]]
) -> list[ParamRef]:
    """(path, name) of every module that holds a weight, in the model's order."""
    return by_identity.get(id(weight_of(names.modules[ref[0]], ref[1])), [ref])


def refusals_of(
    names: Names, ref: ParamRef, by_identity: Mapping[int, list[ParamRef]]
) -> Iterator[str]:
    """Why a weight cannot be changed, for each module that holds or reads it."""
    yield from filter(
        None, (_refusal(names, holder, ref) for holder in holders_of(names, ref, by_identity))
    )


def _refusal(names: Names, holder: ParamRef, target: ParamRef) -> str | None:
    """Why the module that holds a weight, which is that of ``target``, cannot run on a changed one,
    or None."""
    (path, name), module = holder, names.modules[holder[0]]
    kind, weight = kind_for(module, name), weight_of(module, name)
    shared = (
        "" if holder == target else f" (it shares the weight of target {parameter_path(*target)!r})"
    )
    what = f"{path!r}, a {base_class(module).__name__}{shared}"
    if problem := unreadable_problem(path, module):
        return problem
    if weight is None:
        found = f"{what}, whose {name!r} is no parameter (computed by a hook?)"
        return sentence(
            found, "a parameter, or a parametrization of torch.nn.utils.parametrize", "leave it out"
        )
    stem, _, ending = name.rpartition("_")
    if ending in ("v", "g", "orig") and isinstance(module.__dict__.get(stem), Tensor):
        found = (
            f"{what}, of whose {name!r} a hook computes {stem!r} before any adapter is seen"
            " (weight_norm, prune?)"
        )
        return sentence(
            found, "a parametrization of torch.nn.utils.parametrize", "leave it out, or use that"
        )
    if (
        getattr(weight, "is_meta", False)
        and not names.on_meta_device
        and not nn.parameter.is_lazy(weight)
    ):
        found = f"{what}, whose weight is on the meta device, its numbers elsewhere (offloaded?)"
        return sentence(found, "a weight that holds numbers", "load it first, or leave it out")
    if nn.parameter.is_lazy(weight):
        return sentence(
            f"{what}, whose weight has no shape yet",
            "a model that has run once",
            "run it on an example",
        )
    if storage_of(weight) is None:
        found = (
            f"{what}, whose weight is stored as {type(weight).__name__} of"
            f" {getattr(weight, 'dtype', 'no dtype')}"
        )
        return sentence(
            found,
            "a floating-point parameter",
            "load the base in a floating-point dtype, or leave it out",
        )
    reason = kind.refuses(module) or no_place(names, path) or _readers_refuse(names, path, name)
    return (
        sentence(f"{what}: {reason}", "a layer whose adapter takes effect", "leave it out")
        if reason
        else None
    )


def unreadable_problem(path: str, module: nn.Module) -> str | None:
    """Why a module with quantised weights cannot carry an adapter, or None if it can, or has
    none."""
    said = unreadable(module)
    if said is None:
        return None
    problem = f"{path!r}, a {base_class(module).__name__}, {said[0]}"
    return sentence(problem, "weights in a floating-point dtype", f"{said[1]}, or leave it out")


def _misread(model: nn.Module) -> str | None:
    """What is wrong with a base whose answers are not those of its weights, whatever is adapted."""
    packed = [(path, weight_of(module, "weight")) for path, module in walk(model)]
    packed = [
        (path, weight, storage_of(weight))
        for path, weight in packed
        if hasattr(weight, "quant_state")
    ]
    odd = [
        f"{path!r} {tuple(storage.shape(weight))}"
        for path, weight, storage in packed
        if storage.misread(weight)
    ]
    if not odd:
        return None
    problem = (
        f"{listing(odd, 3)} in 4 bits on a CPU, whose rows are no whole blocks: bitsandbytes reads"
        " them with the "
    )
    do = (
        "move the model to a GPU, quantise it to int8, or leave these layers out of it"
        " (llm_int8_skip_modules)"
    )
    return sentence(f"{problem}scales of other blocks", "a base that answers by its weights", do)


def _readers_refuse(names: Names, path: str, name: str) -> str | None:
    """Why a module that reads a parameter from above, or whose fast path would, cannot see a
    changed one, or None."""
    for weight_reader in weight_readers(names, path, name):
        if reason := no_place(names, weight_reader.path, weight_reader.method):
            reader = repr(weight_reader.path) if weight_reader.path else "the model"
            where = "" if weight_reader.method == "forward" else f" in {weight_reader.method!r}"
            return f"{reader}{where} reads it, and {reason}"
    for above in switched(names, path):
        if reason := _taken(names.modules[above]):
            return f"{above!r} reads it, and {reason}"
    return None


def no_place(names: Names, path: str, method: str = "forward") -> str | None:
    """Why no adapter can stand at ``path``, whatever its weights are, or would have no effect in a
    method; or None."""
    return unreachable(names, path, method) or _taken(names.modules[path])


def _taken(module: nn.Module) -> str | None:
    own = dict(module._modules.items()).get(STATE)  # a ScriptModule's children are no dict
    mine = own is None or isinstance(own, LayerState)
    return (
        None
        if mine
        else f"it has a child of its own called {STATE!r}, where its adapters would stand"
    )


def frozen_on_purpose(names: Names) -> set[int]:
    """The ids of the parameters that are frozen while others of the model train, adapters aside."""
    attached = adapters_of(names.model)
    before = {} if attached is None else attached.required_grad
    trains: dict[int, bool] = {}
    for key, refs in holders(names).items():
        (path, name), *_ = refs  # a tie is known by the first of its names
        required = names.modules[path]._parameters[name].requires_grad
        trains[key] = before.get(parameter_path(path, name), required)
    return (
        {key for key, required in trains.items() if not required} if any(trains.values()) else set()
    )


def check_full(
    names: Names,
    full: Mapping[str, tuple[str, ...]],
    problems: list[str],
    frozen: Set[int] = frozenset(),
) -> None:
    """Problems of what is to be trained in full: out of forward's reach, or ``frozen`` (ids) by the
    user."""
    for path, parameters in full.items():
        module = names.modules[path]
        reason = no_place(names, path) if parameters else None
        if reason:
            found = f"{path!r} trained in full: {reason}"
            problems.append(sentence(found, "a module that takes effect", "leave it out"))
        for name in parameters:
            parameter, where = module._parameters.get(name), parameter_path(path, name)
            if parameter is None and name in module._parameters:
                continue  # a bias for a layer without one
            if not reason and (why := _readers_refuse(names, path, name)):
                found = f"{where!r} trained in full: {why}"
                problems.append(sentence(found, "a module that takes effect", "leave it out"))
            if parameter is None:
                found = f"{path}.{name} trained in full, which is computed by a parametrization"
                problems.append(sentence(found, "a plain parameter", "leave it out"))
            elif problem := (
                None if parameter.is_floating_point() else unreadable_problem(path, module)
            ):
                problems.append(problem)
            elif not parameter.is_floating_point():
                problems.append(
                    sentence(f"{where} of {parameter.dtype}", "floating point", "leave it out")
                )
            elif parameter.is_meta and not names.on_meta_device:
                problems.append(sentence(f"{where} on the meta device", "numbers", "load it first"))
            elif id(parameter) in frozen:
                found = (
                    f"{where} trained in full, which you froze (requires_grad=False) among"
                    " parameters that train"
                )
                problems.append(
                    sentence(found, "one that may be trained", "leave it out, or unfreeze it first")
                )


def name_problems(model: nn.Module, name: str) -> Iterator[str]:
    """Why an adapter called ``name`` cannot be added to the model now, whatever it is."""
    attached = adapters_of(model)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        yield sentence(
            f"adapter name {name!r}", "letters, digits, '_' and '-'", "choose such a name"
        )
    if attached and name in attached.configs:
        found = f"adapter name {name!r}, which is taken"
        yield sentence(found, "a new name", "choose another, or detach that one first")
    if problem := peft_problem(model):
        yield problem
    if attached and attached.stacked:
        found = f"{attached.merged!r} merged into the weights, one over the other"
        do = (
            "call veneer.unmerge(model), or keep these weights with detach(model, keep_merged=True)"
        )
        yield sentence(
            found,
            "a base, or weights into which one adapter after the other was merged and attached",
            do,
        )
    if problem := _misread(model):
        yield problem
    if problem := foreign_layers_problem(model):
        yield problem
    # its parameters would be no part of what is sharded, and of what averages gradients; nor the
    # same on every rank
    do = "attach or load the adapter first, then shard the model (fully_shard)"
    if not within_run_on_all() and (
        problem := spread_problem((module for _, module in walk(model)), "an adapter", do)
    ):
        yield problem
