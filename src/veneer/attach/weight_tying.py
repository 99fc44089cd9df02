"""Tied weights of which an adapter changes the names apart.

A tie is one parameter under several names. Veneer trains it as one. PEFT adapts modules one by one,
and gives each module in ``modules_to_save`` a copy, tied or not: its file may hold two values for
one weight, or one value for half of it, a low-rank change or some rows of one name alone. Adapters
that add tokens list both embeddings, so these files are common. That is no change of the one
weight, so that name gets a weight of its own until the last adapter is detached
(``adapter_files/ties.py``). Where nobody may untie (``untie=False``, a bank), values in full stand
in for the weight of each place and cannot be merged, and the rest is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.adapted_module import layer_states, weight_of
from veneer.attach.lookup import adapters, parameter_path
from veneer.attach.refusals import holders
from veneer.attach.targets import Names, ParamRef
from veneer.errors import AdapterError, listing, sentence

UNTIE = (
    "merge it in memory (veneer.load unties such names, and save_pretrained writes both), or untie"
    " the base first (config.tie_word_embeddings = False, and a copy for the head:"
    " `model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())`), save it, and"
    " merge into that"
)


def apart(names: Names, full: Mapping[str, Mapping[str, Tensor]]) -> frozenset[ParamRef]:
    """The (path, name) of tied parameters to which ``full`` gives values of their own. Equal ones
    are the tie's."""
    found: set[ParamRef] = set()
    for refs in holders(names).values():
        values = [full[path][name] for path, name in refs if name in full.get(path, ())]
        if values and (
            len(values) < len(refs) or not all(same(value, values[0]) for value in values)
        ):
            found |= {ref for ref in refs if ref[1] in full.get(ref[0], ())}
    return frozenset(found)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, in whichever dtypes."""
    common = torch.promote_types(one.dtype, other.dtype)
    return one is other or torch.equal(one.to(common), other.to(common))


def torn(model: nn.Module, name: str) -> Iterator[str]:
    """Why the adapter ``name`` cannot be merged: of each tie to which it gives values of their own,
    in words."""
    trained = {
        path: part.full._parameters
        for path, _, part in adapters(model, name)
        if part.full._parameters
    }
    for refs in holders(Names(model)).values() if trained else ():
        own = [trained.get(path, {}).get(weight) for path, weight in refs]
        if all(value is own[0] for value in own):
            continue
        there = [
            parameter_path(*ref) for ref, value in zip(refs, own, strict=True) if value is not None
        ]
        rest = [parameter_path(*ref) for ref, value in zip(refs, own, strict=True) if value is None]
        other = f"one weight with {listing(rest)}" if rest else "one weight"
        yield sentence(
            f"values of their own for {listing(there)}, {other} in this model", "one value", UNTIE
        )


def untied_since(model: nn.Module, name: str) -> Iterator[str]:
    """Weights that were one when the adapter was attached and are no longer: a merge, which writes
    once, misses one."""
    first: dict[int, tuple[str, Any]] = {}
    for path, module, layer_state in layer_states(model):
        part = layer_state.get(name)
        if part is None:
            continue
        for own, value in (*part.changes.items(), *part.full._parameters.items()):
            where, weight = parameter_path(path, own), weight_of(module, own)
            other, target = first.setdefault(id(value), (where, weight))
            tensors = isinstance(weight, Tensor) and isinstance(target, Tensor)
            if weight is not target and not (
                tensors and weight.data_ptr() == target.data_ptr() != 0
            ):
                do = "tie them again (`to_empty`, and loading with `assign=True`, untie)"
                yield sentence(
                    f"{where!r} and {other!r}, one weight when attached, untied since",
                    "one weight",
                    do,
                )


@dataclass(frozen=True)
class Untied:
    """Names of tied weights that have weights of their own now: (name, a name that has kept the
    weight) of each. ``config``: the model's config said that it ties its embeddings, and says now
    that it does not."""

    names: tuple[tuple[ParamRef, ParamRef], ...]
    config: bool


def untie(names: Names, refs: Iterable[ParamRef]) -> Untied:
    """Give each of these names of tied weights a parameter of its own with the same values; of a
    weight all of whose names are among them, the first keeps it. ``AdapterError``: a weight that is
    stored packed."""
    chosen, made = set(refs), []
    for tied in holders(names).values():
        keeps = next((ref for ref in tied if ref not in chosen), tied[0])
        made += [(ref, keeps) for ref in tied if ref in chosen and ref != keeps]
    weights: list[Any] = [names.modules[path]._parameters[name] for (path, name), _ in made]
    if packed := [
        ref for (ref, _), own in zip(made, weights, strict=True) if type(own) is not nn.Parameter
    ]:
        problem = f"{parameter_path(*packed[0])!r}, a tied weight that is stored packed"
        raise AdapterError(
            problem, "a plain weight to untie", "untie the base before it is quantised"
        )
    for ((path, name), _), own in zip(made, weights, strict=True):
        copy = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
        names.modules[path]._parameters[name] = copy
    config = getattr(names.model, "config", None)
    ties = bool(made) and getattr(config, "tie_word_embeddings", False) is True
    if ties:  # or transformers ties them again, and saves one of them
        config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]
    return Untied(tuple(made), ties)


def tie_again(model: nn.Module, untied: Untied) -> None:
    """Undo ``untie``."""
    for (path, name), (other, its_name) in untied.names:
        kept = model.get_submodule(other)._parameters[its_name]
        model.get_submodule(path)._parameters[name] = kept
    if untied.config:
        model.config.tie_word_embeddings = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
