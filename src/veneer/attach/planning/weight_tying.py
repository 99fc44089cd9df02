"""Handle tied weights to whose names an adapter gives different values: untie them, tie them again,
and find the ties that a merge would break.

A tied weight is one parameter with several names. Veneer trains it as one parameter. PEFT adapts
each module separately, and gives each module in ``modules_to_save`` a copy, tied or not. So a PEFT
file may hold two values for one weight; or a value, a low-rank change or some rows for only one of
its names. Such files are common, because adapters that add tokens list both embeddings. One weight
cannot have two values, so the changed name gets a new parameter until the last adapter is detached
(``adapter_files/ties.py``). If untying is not allowed (``untie=False``, or in a ``Bank``), a value
that replaces the full weight is used only at its own name and cannot be merged; a low-rank change
or trained rows for only one name are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.attach.layer.adapted_module import layer_states
from veneer.attach.layer.lookup import adapters
from veneer.attach.layer.model_index import ModelIndex
from veneer.bases import weight_of
from veneer.errors import AdapterError, listing, sentence
from veneer.layers import ParamRef, parameter_path

#: how to untie a weight so that it can be merged, for messages
HOW_TO_UNTIE = (
    "merge it in memory (veneer.load unties such names, and save_pretrained writes both), or untie"
    " the base first (config.tie_word_embeddings = False, and a copy for the head:"
    " `model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())`), save it, and"
    " merge into that"
)


def split_tie_problems(model: nn.Module, name: str) -> Iterator[str]:
    """An error text for each tied weight to whose names the adapter ``name`` gives different
    values, trained in full: after a merge, the one weight could not hold them all."""
    full_params_by_path = {
        path: layer_adapter.full._parameters
        for path, _, layer_adapter in adapters(model, name)
        if layer_adapter.full._parameters
    }
    for refs in ModelIndex(model).refs_by_parameter_id().values() if full_params_by_path else ():
        values = [full_params_by_path.get(path, {}).get(weight) for path, weight in refs]
        if all(value is values[0] for value in values):
            continue
        changed_paths = [
            parameter_path(*ref)
            for ref, value in zip(refs, values, strict=True)
            if value is not None
        ]
        unchanged_paths = [
            parameter_path(*ref) for ref, value in zip(refs, values, strict=True) if value is None
        ]
        tie_text = (
            f"one weight with {listing(unchanged_paths)}" if unchanged_paths else "one weight"
        )
        yield sentence(
            f"values of their own for {listing(changed_paths)}, {tie_text} in this model",
            "one value",
            HOW_TO_UNTIE,
        )


def broken_tie_problems(model: nn.Module, name: str) -> Iterator[str]:
    """An error text for each weight that was tied when the adapter was attached and has been untied
    since. A merge would change only one of the weights that there are now."""
    # (path, weight) of the first weight that each change applies to, by the ``id`` of the change
    first_weights: dict[int, tuple[str, Any]] = {}
    for path, module, layer_state in layer_states(model):
        layer_adapter = layer_state.get(name)
        if layer_adapter is None:
            continue
        weight_changes = (*layer_adapter.changes.items(), *layer_adapter.full._parameters.items())
        for weight_name, change in weight_changes:
            full_path, weight = parameter_path(path, weight_name), weight_of(module, weight_name)
            first_path, first_weight = first_weights.setdefault(id(change), (full_path, weight))
            are_tensors = isinstance(weight, Tensor) and isinstance(first_weight, Tensor)
            if weight is not first_weight and not (
                are_tensors and weight.data_ptr() == first_weight.data_ptr() != 0
            ):
                yield sentence(
                    f"{full_path!r} and {first_path!r}, one weight when attached, untied since",
                    "one weight",
                    "tie them again (`to_empty`, and loading with `assign=True`, untie)",
                )


@dataclass(frozen=True)
class Untied:
    """The names of tied weights to which ``untie`` gave new parameters.

    Fields:
        names: for each of them (its module path and parameter name, those of a name that still has
            the original parameter).
        changed_config: whether ``untie`` set ``tie_word_embeddings`` of the model's config to
            False.
    """

    names: tuple[tuple[ParamRef, ParamRef], ...]
    changed_config: bool


def untie(model_index: ModelIndex, refs: Iterable[ParamRef]) -> Untied:
    """Give each of the names ``refs``, (module path, parameter name), of tied weights a new
    parameter with the same values. If ``refs`` holds all names of a weight, the first name keeps
    the original parameter. If a name gets a new one, ``tie_word_embeddings`` of the model's config
    is set to False.

    Raises:
        AdapterError: a weight to untie is stored packed (quantised). Nothing was changed.
    """
    chosen_refs, untied_refs = set(refs), []
    for tied_refs in model_index.refs_by_parameter_id().values():
        kept_ref = next((ref for ref in tied_refs if ref not in chosen_refs), tied_refs[0])
        untied_refs += [
            (ref, kept_ref) for ref in tied_refs if ref in chosen_refs and ref != kept_ref
        ]
    tied_weights: list[Any] = [
        model_index.modules[path]._parameters[name] for (path, name), _ in untied_refs
    ]
    if packed_refs := [
        ref
        for (ref, _), weight in zip(untied_refs, tied_weights, strict=True)
        if type(weight) is not nn.Parameter
    ]:
        raise AdapterError(
            f"{parameter_path(*packed_refs[0])!r}, a tied weight that is stored packed",
            "a plain weight to untie",
            "untie the base before it is quantised",
        )
    for ((path, name), _), weight in zip(untied_refs, tied_weights, strict=True):
        new_parameter = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        vars(new_parameter).update(vars(weight))  # transformers' mark: not random
        model_index.modules[path]._parameters[name] = new_parameter
    config = getattr(model_index.model, "config", None)
    changes_config = bool(untied_refs) and getattr(config, "tie_word_embeddings", False) is True
    if changes_config:  # else transformers would tie the weights again, and save only one of them
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]
    return Untied(tuple(untied_refs), changes_config)


def tie_again(model: nn.Module, untied: Untied) -> None:
    """Undo ``untie``, whose result is ``untied``: give the names the original parameters again, and
    restore the config."""
    for (path, name), (kept_path, kept_name) in untied.names:
        weight = model.get_submodule(kept_path)._parameters[kept_name]
        model.get_submodule(path)._parameters[name] = weight
    if untied.changed_config:
        model.config.tie_word_embeddings = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
