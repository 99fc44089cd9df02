"""The reasons why a weight cannot be changed, as texts of errors. Nothing here changes the model.

refusals_of             reasons against a low-rank change, for every module that holds the weight
check_full              reasons against training parameters in full
invocation_problems     reasons against an adapter with invocation tokens, which changes no token
                        before these tokens
name_problems           reasons against adding an adapter of this name to the model now
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

from veneer.attach.invocation import takes_input_ids
from veneer.attach.layer.adapted_module import walk
from veneer.attach.layer.lookup import adapters_of, foreign_layers_problem
from veneer.attach.layer.model_index import ModelIndex
from veneer.attach.layer.state import LAYER_STATE_NAME, LayerState
from veneer.attach.source.from_peft import peft_problem
from veneer.attach.source.weight_readers import modules_with_fast_path, unreachable, weight_readers
from veneer.bases import storage_of, unreadable, weight_of
from veneer.distributed import base_class, spread_problem, within_joint_work
from veneer.errors import listing, sentence
from veneer.layers import ParamRef, kind_for, parameter_path
from veneer.layers._base import can_factor


def refusals_of(
    model_index: ModelIndex, ref: ParamRef, refs_by_id: Mapping[int, list[ParamRef]]
) -> Iterator[str]:
    """An error text for each module that holds the weight ``ref``, (path, name), and cannot run on
    a changed weight. ``refs_by_id`` is the result of ``refs_by_parameter_id``."""
    yield from filter(
        None,
        (
            _refusal(model_index, holder_ref, ref)
            for holder_ref in model_index.holders_of(ref, refs_by_id)
        ),
    )


def _refusal(model_index: ModelIndex, holder_ref: ParamRef, target_ref: ParamRef) -> str | None:
    """The reason why a module cannot run on a changed weight; None if it can. ``holder_ref`` is the
    (path, name) at which the module holds the weight, ``target_ref`` the one that the config
    targets; they differ if the weight is tied."""
    (path, name), module = holder_ref, model_index.modules[holder_ref[0]]
    kind, weight = kind_for(module, name), weight_of(module, name)
    sharing_note = (
        ""
        if holder_ref == target_ref
        else f" (it shares the weight of target {parameter_path(*target_ref)!r})"
    )
    description = f"{path!r}, a {base_class(module).__name__}{sharing_note}"
    if problem := unreadable_problem(path, module):
        return problem
    if weight is None:
        return sentence(
            f"{description}, whose {name!r} is no parameter (computed by a hook?)",
            "a parameter, or a parametrization of torch.nn.utils.parametrize",
            "leave it out",
        )
    stem, _, suffix = name.rpartition("_")
    if suffix in ("v", "g", "orig") and isinstance(module.__dict__.get(stem), Tensor):
        return sentence(
            f"{description}, of whose {name!r} a hook computes {stem!r} before any adapter is seen"
            " (weight_norm, prune?)",
            "a parametrization of torch.nn.utils.parametrize",
            "leave it out, or use that",
        )
    if (
        getattr(weight, "is_meta", False)
        and not model_index.on_meta_device
        and not nn.parameter.is_lazy(weight)
    ):
        problem = (
            f"{description}, whose weight is on the meta device, its numbers elsewhere (offloaded?)"
        )
        return sentence(problem, "a weight that holds numbers", "load it first, or leave it out")
    if nn.parameter.is_lazy(weight):
        return sentence(
            f"{description}, whose weight has no shape yet",
            "a model that has run once",
            "run it on an example",
        )
    if storage_of(weight) is None:
        return sentence(
            f"{description}, whose weight is stored as {type(weight).__name__} of"
            f" {getattr(weight, 'dtype', 'no dtype')}",
            "a floating-point parameter",
            "load the base in a floating-point dtype, or leave it out",
        )
    reason = (
        kind.refuses(module)
        or unadaptable(model_index, path)
        or _reader_refusal(model_index, path, name)
    )
    return (
        sentence(f"{description}: {reason}", "a layer whose adapter takes effect", "leave it out")
        if reason
        else None
    )


def unreadable_problem(path: str, module: nn.Module) -> str | None:
    """The reason why an adapter cannot change a module with quantised weights, whose format Veneer
    cannot read. None if it can, or if the weights are not quantised."""
    reason_and_fix = unreadable(module)
    if reason_and_fix is None:
        return None
    reason, fix = reason_and_fix
    problem = f"{path!r}, a {base_class(module).__name__}, {reason}"
    return sentence(problem, "weights in a floating-point dtype", f"{fix}, or leave it out")


def _misread_base_problem(model: nn.Module) -> str | None:
    """An error text if the base itself computes wrong outputs, because its library decodes some
    quantised weights wrongly; else None."""
    weights = [(path, weight_of(module, "weight")) for path, module in walk(model)]
    # bitsandbytes quantises a weight in `.to(device)`; before, ``storage_of`` returns None
    packed_weights = [
        (path, weight, storage)
        for path, weight in weights
        if hasattr(weight, "quant_state") and (storage := storage_of(weight)) is not None
    ]
    misread_texts = [
        f"{path!r} {tuple(storage.shape(weight))}"
        for path, weight, storage in packed_weights
        if storage.library_misreads(weight)
    ]
    if not misread_texts:
        return None
    return sentence(
        f"{listing(misread_texts, 3)} in 4 bits on a CPU, whose rows are no whole blocks:"
        " bitsandbytes reads them with the scales of other blocks",
        "a base that answers by its weights",
        "move the model to a GPU, quantise it to int8, or leave these layers out of it"
        " (llm_int8_skip_modules)",
    )


def _reader_refusal(model_index: ModelIndex, path: str, name: str) -> str | None:
    """The reason why another module, which reads the parameter ``name`` of the module at ``path``
    directly or in a fused fast path, would ignore a change of it; None if there is no such
    module."""
    for weight_reader in weight_readers(model_index, path, name):
        if reason := unadaptable(model_index, weight_reader.path, weight_reader.method):
            reader_text = repr(weight_reader.path) if weight_reader.path else "the model"
            in_method = "" if weight_reader.method == "forward" else f" in {weight_reader.method!r}"
            return f"{reader_text}{in_method} reads it, and {reason}"
    for path_above in modules_with_fast_path(model_index, path):
        if reason := _name_conflict(model_index.modules[path_above]):
            return f"{path_above!r} reads it, and {reason}"
    return None


def unadaptable(model_index: ModelIndex, path: str, method: str = "forward") -> str | None:
    """The reason why no adapter can act in this ``method`` of the module at ``path``, whichever
    weight it changes: the method would not run it, or it cannot be installed there. None if there
    is no such reason."""
    return unreachable(model_index, path, method) or _name_conflict(model_index.modules[path])


def _name_conflict(module: nn.Module) -> str | None:
    """A reason against an adapter if a module has a child with the name under which Veneer adds its
    own child, the ``LayerState``; else None."""
    # ``dict``, because the children of a ScriptModule are in an object without ``get``
    conflicting_child = dict(module._modules.items()).get(LAYER_STATE_NAME)
    is_free = conflicting_child is None or isinstance(conflicting_child, LayerState)
    if is_free:
        return None
    return f"it has a child of its own called {LAYER_STATE_NAME!r}, where its adapters would stand"


def frozen_on_purpose(model_index: ModelIndex) -> set[int]:
    """The ``id`` of each base parameter that the user froze, while other base parameters train. If
    none trains, the user has frozen the base as a whole, not chosen parameters, so the result is
    empty. Attaching freezes the base too, so the flags from before the first attach count."""
    model_adapters = adapters_of(model_index.model)
    requires_grad_before = {} if model_adapters is None else model_adapters.original_requires_grad
    trains_by_id: dict[int, bool] = {}
    for parameter_id, refs in model_index.refs_by_parameter_id().items():
        (path, name), *_ = refs  # a tied parameter has several; its flag is stored by the first
        requires_grad_now = model_index.modules[path]._parameters[name].requires_grad
        trains_by_id[parameter_id] = requires_grad_before.get(
            parameter_path(path, name), requires_grad_now
        )
    return (
        {parameter_id for parameter_id, trains in trains_by_id.items() if not trains}
        if any(trains_by_id.values())
        else set()
    )


def check_full(
    model_index: ModelIndex,
    full_params: Mapping[str, tuple[str, ...]],
    problems: list[str],
    frozen_ids: Set[int] = frozenset(),
) -> None:
    """Add the reasons why parameters cannot be trained in full to ``problems``, such as that the
    forward does not reach them, or that the user froze them.

    Args:
        full_params: the parameters, as {module path: parameter names}.
        frozen_ids: the ``id`` of each parameter that the user froze.
    """
    for path, parameter_names in full_params.items():
        module = model_index.modules[path]
        reason = unadaptable(model_index, path) if parameter_names else None
        if reason:
            problem = f"{path!r} trained in full: {reason}"
            problems.append(sentence(problem, "a module that takes effect", "leave it out"))
        for name in parameter_names:
            parameter, full_path = module._parameters.get(name), parameter_path(path, name)
            if parameter is None and name in module._parameters:
                continue  # a bias that the adapter adds to a layer without one: nothing to refuse
            if not reason and (reader_reason := _reader_refusal(model_index, path, name)):
                problem = f"{full_path!r} trained in full: {reader_reason}"
                problems.append(sentence(problem, "a module that takes effect", "leave it out"))
            if parameter is None:
                problem = f"{full_path} trained in full, which is computed by a parametrization"
                problems.append(sentence(problem, "a plain parameter", "leave it out"))
            elif problem := (
                None if parameter.is_floating_point() else unreadable_problem(path, module)
            ):
                problems.append(problem)
            elif not parameter.is_floating_point():
                problems.append(
                    sentence(f"{full_path} of {parameter.dtype}", "floating point", "leave it out")
                )
            elif parameter.is_meta and not model_index.on_meta_device:
                problems.append(
                    sentence(f"{full_path} on the meta device", "numbers", "load it first")
                )
            elif id(parameter) in frozen_ids:
                problems.append(
                    sentence(
                        f"{full_path} trained in full, which you froze (requires_grad=False) among"
                        " parameters that train",
                        "one that may be trained",
                        "leave it out, or unfreeze it first",
                    )
                )


def invocation_problems(
    model_index: ModelIndex, low_rank_plans: Iterable[Any], full_params: Mapping[str, Iterable[str]]
) -> Iterator[str]:
    """The reasons why an adapter cannot have invocation tokens, before which it changes no token.

    Args:
        low_rank_plans: the ``LowRankPlan`` of each low-rank change.
        full_params: the parameters that it trains in full, as {module path: parameter names}.
    """
    paths_with_input_ids = [
        path for path, module in model_index.modules.items() if takes_input_ids(module)
    ]
    model_config = getattr(model_index.model, "config", None)
    if not paths_with_input_ids or getattr(model_config, "is_encoder_decoder", False):
        trait = (
            "which has an encoder" if paths_with_input_ids else "whose forward takes no input_ids"
        )
        yield sentence(
            f"invocation_tokens for a {base_class(model_index.model).__name__}, {trait}",
            "a model in whose input_ids they are found",
            "leave invocation_tokens out",
        )
    for weight_plan in low_rank_plans:
        for path, weight_name in weight_plan.holders:
            module, kind = (
                model_index.modules[path],
                kind_for(model_index.modules[path], weight_name),
            )
            can_be_factored = kind.product and can_factor(
                kind, module, base_class(module), weight_plan.storage.modules()
            )
            if not can_be_factored or weight_plan.weight_readers or weight_plan.tokens is not None:
                yield sentence(
                    f"{path!r}, a {base_class(module).__name__}, with invocation_tokens",
                    "linear layers, of whose tokens some change",
                    "exclude it",
                )
    for path in (path for path, parameter_names in full_params.items() if [*parameter_names]):
        yield sentence(
            f"{path!r} trained in full, with invocation_tokens",
            "changes that act from the invocation on: low-rank ones alone",
            "leave it out",
        )


def name_problems(model: nn.Module, name: str) -> Iterator[str]:
    """The reasons why no adapter called ``name`` can be added to the model now."""
    model_adapters = adapters_of(model)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        yield sentence(
            f"adapter name {name!r}", "letters, digits, '_' and '-'", "choose such a name"
        )
    if model_adapters and name in model_adapters.configs:
        problem = f"adapter name {name!r}, which is taken"
        yield sentence(problem, "a new name", "choose another, or detach that one first")
    if problem := peft_problem(model):
        yield problem
    if model_adapters and model_adapters.has_unrelated_merges:
        yield sentence(
            f"{model_adapters.merged!r} merged into the weights, one over the other",
            "a base, or weights into which one adapter after the other was merged and attached",
            "call veneer.unmerge(model), or keep these weights with"
            " detach(model, keep_merged=True)",
        )
    if problem := _misread_base_problem(model):
        yield problem
    if problem := foreign_layers_problem(model):
        yield problem
    # Refuse a sharded model: the adapter's parameters would not be sharded, so their gradients
    # would not be averaged over the ranks (processes), and their values would differ.
    advice = "attach or load the adapter first, then shard the model (fully_shard)"
    if not within_joint_work() and (
        problem := spread_problem((module for _, module in walk(model)), "an adapter", advice)
    ):
        yield problem
