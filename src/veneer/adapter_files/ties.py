"""Untie weights for an adapter folder: the names of a tied weight to which the folder gives
different changes become separate weights.

A tied weight is one parameter with several names in the model. PEFT adapts modules one by one. Its
adapter may change one name of a tied weight at a low rank, in full or in some rows, and leave the
other name unchanged. No change of the shared parameter has this effect, so each such name needs a
weight of its own (``attach/planning/weight_tying.py``).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from veneer.adapter_files import saved_token_rows
from veneer.adapter_files.folder import AdapterFiles, read
from veneer.adapter_files.peft_mapping import module_at, ref_at
from veneer.adapter_files.tuner_folder import weight_lookup_of
from veneer.attach import Names, Untied, adapters_of, untie
from veneer.bases import weight_of
from veneer.errors import AdapterError, listing
from veneer.formats import peft
from veneer.layers import ParamRef, parameter_path


class TieBroken(UserWarning):
    """A folder of PEFT changes a tied weight under some of its names only. Until the last adapter
    is detached, each of these names has a separate weight."""


def untie_for(model: nn.Module, path: str | Path, required: bool | None) -> Untied | None:
    """Untie the names of tied weights that the folder ``path`` changes differently. None if the
    folder changes no names differently.

    Args:
        required: True unties the names. None does so too, and warns ``TieBroken``. False does
            nothing.

    Raises:
        AdapterError: such a weight is stored packed, or an adapter is merged into it.
    """
    if required is False:
        return None
    names = Names(model)
    if not any(len(refs) > 1 for refs in names.refs_by_parameter_id().values()):
        return None
    refs = refs_to_untie(names, read(path, weight_lookup_of(names)))
    if not refs:
        return None
    attached = adapters_of(model)
    if attached is not None and attached.merged is not None:
        raise AdapterError(
            f"a tied weight that {path} changes under one name alone, while {attached.merged!r} is"
            " merged into it",
            "an unmerged model",
            "call veneer.unmerge(model) first",
        )
    untied = untie(names, refs)
    if required is None and untied.names:
        warnings.warn(_describe_untied(path, untied), TieBroken, stacklevel=4)
    return untied if untied.names else None


def _describe_untied(path: str | Path, untied: Untied) -> str:
    pairs = [
        f"{parameter_path(*ref)!r} apart from {parameter_path(*keeps)!r}"
        for ref, keeps in untied.names
    ]
    config_note = ", and config.tie_word_embeddings is False" if untied.changed_config else ""
    return (
        f"{path} changes {listing(pairs, 3)}, one weight of this model, as PEFT does: until the"
        f" last adapter is detached, each name has a weight of its own{config_note}. untie=True"
        " loads it without this warning, untie=False refuses what would untie."
    )


def refs_to_untie(names: Names, adapter_files: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights that a folder changes differently. It does so if the names have
    different low-rank changes, if they have different values that are trained in full, or if PEFT
    replaces token rows under one of the names only."""
    layers_by_ref = {
        ref_at(names, path, adapter_files.peft_config): layer
        for path, layer in adapter_files.low.items()
    }
    low_rank_refs: list[ParamRef] = []
    tied_groups = [refs for refs in names.refs_by_parameter_id().values() if len(refs) > 1]
    for refs in tied_groups:
        layers = [layers_by_ref[ref] for ref in refs if ref in layers_by_ref]
        if layers and (
            len(layers) < len(refs)
            or not all(_is_same_change(layers[0], tied_layer) for tied_layer in layers)
        ):
            low_rank_refs += [ref for ref in refs if ref in layers_by_ref]
    full: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensors in adapter_files.full.items():
        module_path = module_at(names, path)
        # PEFT saves the frozen weight of an adapted embedding too
        full.setdefault(module_path, {}).update(
            {
                name: value
                for name, value in tensors.items()
                if (module_path, name) not in layers_by_ref
            }
        )
    replaced_refs = [
        (path, name)
        for path, name in names.split_ties(full)
        if full[path][name].shape == weight_of(names.modules[path], name).shape
    ]
    replaced_refs += _token_refs(names, adapter_files)
    # a packed weight needs no copy, because the tensors that are trained in full replace all of it
    unpacked_refs = [
        ref
        for ref in dict.fromkeys(replaced_refs)
        if type(weight_of(names.modules[ref[0]], ref[1])) is nn.Parameter
    ]
    return list(dict.fromkeys([*low_rank_refs, *unpacked_refs]))


def _token_refs(names: Names, adapter_files: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights for which the folder has different token rows."""
    refs_by_id, token_refs = names.refs_by_parameter_id(), []
    base_record = adapter_files.metadata.get("base", {})
    recorded_names = {
        tensor_name for kind in ("weights", "rest") for tensor_name in base_record.get(kind) or ()
    }
    for module_path in adapter_files.tokens:
        first_ref = saved_token_rows.first_ref_at(names, module_path, refs_by_id)
        if first_ref is None:
            continue
        ref = saved_token_rows.ref_of(names, module_path)
        tied_refs = [
            tied_ref
            for tied_ref in refs_by_id[id(weight_of(names.modules[first_ref[0]], first_ref[1]))]
            if tied_ref != ref
        ]
        if adapter_files.record is None:
            differs = saved_token_rows.trains_one_name(
                names, ref, refs_by_id, {*adapter_files.tokens}
            )
            tied_token_rows = [
                adapter_files.tokens[path] for path, _ in tied_refs if path in adapter_files.tokens
            ]
            token_rows = adapter_files.tokens[module_path]
            differs |= any(
                other_rows.ids != token_rows.ids
                or not torch.equal(other_rows.rows, token_rows.rows)
                for other_rows in tied_token_rows
            )
        else:  # the base had separate weights in training if the record lists the other name
            differs = any(parameter_path(*tied_ref) in recorded_names for tied_ref in tied_refs)
        token_refs += [ref] if differs else []
    return token_refs


def _is_same_change(layer: peft.PeftLayer, tied_layer: peft.PeftLayer) -> bool:
    """Whether two layers hold the same change of a matrix, one of them possibly transposed."""
    if layer.suffixes == tied_layer.suffixes:
        return torch.equal(layer.A, tied_layer.A) and torch.equal(layer.B, tied_layer.B)
    return torch.equal(layer.A, tied_layer.B.mT) and torch.equal(layer.B, tied_layer.A.mT)
