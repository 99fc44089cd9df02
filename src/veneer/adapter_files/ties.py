"""Names of tied weights that a folder changes apart: they need weights of their own
(``attach/weight_tying.py``).

PEFT adapts modules one by one. Its adapter may change one name of a tied weight at a low rank, in
full or in some rows, and leave the other name as it was. That is no change of the one weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from veneer.adapter_files import token_rows
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.peft_mapping import module_at, ref_at
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach.adapted_module import weight_of
from veneer.attach.lookup import adapters_of, parameter_path
from veneer.attach.refusals import holders
from veneer.attach.targets import Names, ParamRef
from veneer.attach.weight_tying import Untied, apart, untie
from veneer.errors import AdapterError, listing
from veneer.formats import peft


class TieBroken(UserWarning):
    """A folder of PEFT changes a tied weight under some of its names alone: until the last adapter
    is detached, each of these names has a weight of its own."""


def untie_for(model: nn.Module, path: str | Path, required: bool | None) -> Untied | None:
    """Untie the names that the folder ``path`` changes apart; None where there are none.

    Args:
        required: None warns of it; True does not; False unties nothing.

    Raises:
        AdapterError: a weight that is stored packed, or into which an adapter is merged.
    """
    if required is False:
        return None
    names = Names(model)
    if not any(len(refs) > 1 for refs in holders(names).values()):
        return None
    refs = refs_apart(names, read(path, weights_of(names)))
    if not refs:
        return None
    attached = adapters_of(model)
    if attached is not None and attached.merged is not None:
        problem = (
            f"a tied weight that {path} changes under one name alone, while {attached.merged!r} is"
            " merged into it"
        )
        raise AdapterError(problem, "an unmerged model", "call veneer.unmerge(model) first")
    untied = untie(names, refs)
    if required is None and untied.names:
        warnings.warn(_described(path, untied), TieBroken, stacklevel=4)
    return untied if untied.names else None


def _described(path: str | Path, untied: Untied) -> str:
    pairs = [
        f"{parameter_path(*ref)!r} apart from {parameter_path(*keeps)!r}"
        for ref, keeps in untied.names
    ]
    config = ", and config.tie_word_embeddings is False" if untied.config else ""
    return (
        f"{path} changes {listing(pairs, 3)}, one weight of this model, as PEFT does: until the"
        f" last adapter is detached, each name has a weight of its own{config}. untie=True loads it"
        " without this warning, untie=False refuses what would untie."
    )


def refs_apart(names: Names, saved: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights that a folder changes apart: at a low rank, where it does not
    change every name alike; in full, by values of their own; in rows that PEFT gives to one of the
    names alone."""
    low = {ref_at(names, path, saved.peft_config): layer for path, layer in saved.low.items()}
    found: list[ParamRef] = []
    tied = [refs for refs in holders(names).values() if len(refs) > 1]
    for refs in tied:
        there = [low[ref] for ref in refs if ref in low]
        if there and (
            len(there) < len(refs) or not all(_alike(there[0], other) for other in there)
        ):
            found += [ref for ref in refs if ref in low]
    full: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensors in saved.full.items():
        at = module_at(names, path)
        # PEFT writes the frozen weight of an adapted embedding along
        full.setdefault(at, {}).update(
            {name: value for name, value in tensors.items() if (at, name) not in low}
        )
    more = [ref for ref in apart(names, full) if _fits(names, ref, full)]
    more += _token_refs(names, saved)
    # values in place of a packed weight need no copy of it
    plain = [
        ref
        for ref in dict.fromkeys(more)
        if type(weight_of(names.modules[ref[0]], ref[1])) is nn.Parameter
    ]
    return list(dict.fromkeys([*found, *plain]))


def _fits(names: Names, ref: ParamRef, full: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    return full[ref[0]][ref[1]].shape == weight_of(names.modules[ref[0]], ref[1]).shape


def _token_refs(names: Names, saved: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights of which the folder trains tokens apart."""
    by_identity, found = holders(names), []
    recorded = saved.metadata.get("base", {})
    known = {at for part in ("weights", "rest") for at in recorded.get(part) or ()}
    for at in saved.tokens:
        owner = token_rows.owner_at(names, at, by_identity)
        if owner is None:
            continue
        ref = token_rows.ref_of(names, at)
        others = [
            other
            for other in by_identity[id(weight_of(names.modules[owner[0]], owner[1]))]
            if other != ref
        ]
        if saved.record is None:
            alone = token_rows.trains_one_name(names, ref, by_identity, {*saved.tokens})
            entries = [saved.tokens[path] for path, _ in others if path in saved.tokens]
            own = saved.tokens[at]
            alone |= any(
                other.ids != own.ids or not torch.equal(other.rows, own.rows) for other in entries
            )
        else:  # the record knows the other name as a weight of its own
            alone = any(parameter_path(*other) in known for other in others)
        found += [ref] if alone else []
    return found


def _alike(layer: peft.PeftLayer, other: peft.PeftLayer) -> bool:
    """Whether two layers hold one change of a matrix, each as it lies there or its transpose."""
    if layer.suffixes == other.suffixes:
        return torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B)
    return torch.equal(layer.A, other.B.mT) and torch.equal(layer.B, other.A.mT)
