"""Tied weights whose names a folder changes differently: these names need separate weights
(``attach/planning/weight_tying.py``).

PEFT adapts modules one by one. Its adapter may change one name of a tied weight at a low rank, in
full or in some rows, and leave the other name unchanged. That is no change of one shared weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from veneer.adapter_files import saved_token_rows
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.peft_mapping import module_at, ref_at
from veneer.adapter_files.tuner_folder import weights_of
from veneer.attach import Names, Untied, adapters_of, untie
from veneer.bases import weight_of
from veneer.errors import AdapterError, listing
from veneer.formats import peft
from veneer.layers import ParamRef, parameter_path


class TieBroken(UserWarning):
    """A folder of PEFT changes a tied weight under some of its names only: until the last adapter
    is detached, each of these names has a weight of its own."""


def untie_for(model: nn.Module, path: str | Path, required: bool | None) -> Untied | None:
    """Untie the names that the folder ``path`` changes differently; None if there are none.

    Args:
        required: None unties with a warning, True without, False does not untie.

    Raises:
        AdapterError: such a weight is stored packed, or an adapter is merged into it.
    """
    if required is False:
        return None
    names = Names(model)
    if not any(len(refs) > 1 for refs in names.holders().values()):
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
        warnings.warn(_describe_untied(path, untied), TieBroken, stacklevel=4)
    return untied if untied.names else None


def _describe_untied(path: str | Path, untied: Untied) -> str:
    pairs = [
        f"{parameter_path(*ref)!r} apart from {parameter_path(*keeps)!r}"
        for ref, keeps in untied.names
    ]
    config = ", and config.tie_word_embeddings is False" if untied.changed_config else ""
    return (
        f"{path} changes {listing(pairs, 3)}, one weight of this model, as PEFT does: until the"
        f" last adapter is detached, each name has a weight of its own{config}. untie=True loads it"
        " without this warning, untie=False refuses what would untie."
    )


def refs_apart(names: Names, saved: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights that a folder changes differently: at a low rank, if the names have
    different changes; in full, if they have different values; in token rows that PEFT gives to one
    of the names only."""
    low = {ref_at(names, path, saved.peft_config): layer for path, layer in saved.low.items()}
    refs_low: list[ParamRef] = []
    tied = [refs for refs in names.holders().values() if len(refs) > 1]
    for refs in tied:
        layers = [low[ref] for ref in refs if ref in low]
        if layers and (
            len(layers) < len(refs)
            or not all(_alike(layers[0], tied_layer) for tied_layer in layers)
        ):
            refs_low += [ref for ref in refs if ref in low]
    full: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensors in saved.full.items():
        module_path = module_at(names, path)
        # PEFT saves the frozen weight of an adapted embedding too
        full.setdefault(module_path, {}).update(
            {name: value for name, value in tensors.items() if (module_path, name) not in low}
        )
    more = [ref for ref in names.split_ties(full) if _fits(names, ref, full)]
    more += _token_refs(names, saved)
    # full values replace a packed weight and need no copy of it
    plain = [
        ref
        for ref in dict.fromkeys(more)
        if type(weight_of(names.modules[ref[0]], ref[1])) is nn.Parameter
    ]
    return list(dict.fromkeys([*refs_low, *plain]))


def _fits(names: Names, ref: ParamRef, full: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    return full[ref[0]][ref[1]].shape == weight_of(names.modules[ref[0]], ref[1]).shape


def _token_refs(names: Names, saved: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights for which the folder trains different token rows."""
    by_identity, token_refs = names.holders(), []
    recorded = saved.metadata.get("base", {})
    recorded_names = {
        tensor_name for kind in ("weights", "rest") for tensor_name in recorded.get(kind) or ()
    }
    for module_path in saved.tokens:
        owner = saved_token_rows.owner_at(names, module_path, by_identity)
        if owner is None:
            continue
        ref = saved_token_rows.ref_of(names, module_path)
        tied_refs = [
            tied_ref
            for tied_ref in by_identity[id(weight_of(names.modules[owner[0]], owner[1]))]
            if tied_ref != ref
        ]
        if saved.record is None:
            apart = saved_token_rows.trains_one_name(names, ref, by_identity, {*saved.tokens})
            entries = [saved.tokens[path] for path, _ in tied_refs if path in saved.tokens]
            entry = saved.tokens[module_path]
            apart |= any(
                tied_entry.ids != entry.ids or not torch.equal(tied_entry.rows, entry.rows)
                for tied_entry in entries
            )
        else:  # the record lists the other name as a separate weight
            apart = any(parameter_path(*tied_ref) in recorded_names for tied_ref in tied_refs)
        token_refs += [ref] if apart else []
    return token_refs


def _alike(layer: peft.PeftLayer, second: peft.PeftLayer) -> bool:
    """Whether two layers hold the same change of a matrix, one of them possibly transposed."""
    if layer.suffixes == second.suffixes:
        return torch.equal(layer.A, second.A) and torch.equal(layer.B, second.B)
    return torch.equal(layer.A, second.B.mT) and torch.equal(layer.B, second.A.mT)
