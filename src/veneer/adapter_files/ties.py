"""Untie weights for an adapter folder: if the folder changes a tied weight differently under its
several names, these names get separate weights.

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
from veneer.attach import ModelIndex, Untied, adapters_of, untie
from veneer.bases import weight_of
from veneer.errors import AdapterError, listing
from veneer.formats import peft
from veneer.layers import ParamRef, parameter_path


class TieBroken(UserWarning):
    """A folder of PEFT changes a tied weight under some of its names only, or differently under
    them. Until the last adapter is detached, each changed name has a separate weight."""


def untie_for(model: nn.Module, path: str | Path, required: bool | None) -> Untied | None:
    """Untie the names of tied weights that the folder ``path`` changes differently. Returns what
    was untied, so that it can be tied again; None if nothing was.

    Args:
        required: True unties the names. None does so too, and warns ``TieBroken``. False does
            nothing.

    Raises:
        AdapterError: a weight to untie is stored packed, or an adapter is merged into the model.
    """
    if required is False:
        return None
    model_index = ModelIndex(model)
    if not any(len(refs) > 1 for refs in model_index.refs_by_parameter_id().values()):
        return None
    refs = refs_to_untie(model_index, read(path, weight_lookup_of(model_index)))
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
    untied = untie(model_index, refs)
    if required is None and untied.names:
        warnings.warn(_describe_untied(path, untied), TieBroken, stacklevel=4)
    return untied if untied.names else None


def _describe_untied(path: str | Path, untied: Untied) -> str:
    pairs = [
        f"{parameter_path(*untied_ref)!r} apart from {parameter_path(*kept_ref)!r}"
        for untied_ref, kept_ref in untied.names
    ]
    config_note = ", and config.tie_word_embeddings is False" if untied.changed_config else ""
    return (
        f"{path} changes {listing(pairs, 3)}, one weight of this model, as PEFT does: until the"
        f" last adapter is detached, each name has a weight of its own{config_note}. untie=True"
        " loads it without this warning, untie=False refuses what would untie."
    )


def refs_to_untie(model_index: ModelIndex, adapter_files: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights that need weights of their own for a folder: the names for which it
    has a low-rank change, values that are trained in full, or token rows, but not the same for all
    names of the weight. A name is (module path, name of the parameter)."""
    layers_by_ref = {
        ref_at(model_index, path, adapter_files.peft_config): layer
        for path, layer in adapter_files.low.items()
    }
    low_rank_refs: list[ParamRef] = []
    tied_groups = [refs for refs in model_index.refs_by_parameter_id().values() if len(refs) > 1]
    for refs in tied_groups:
        tied_layers = [layers_by_ref[ref] for ref in refs if ref in layers_by_ref]
        if tied_layers and (
            len(tied_layers) < len(refs)
            or not all(_is_same_change(tied_layers[0], tied_layer) for tied_layer in tied_layers)
        ):
            low_rank_refs += [ref for ref in refs if ref in layers_by_ref]
    full_by_module: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensors in adapter_files.full.items():
        module_path = module_at(model_index, path)
        # leave out weights with a low-rank change: for an embedding, PEFT also saves the frozen
        # weight, which changes nothing
        full_by_module.setdefault(module_path, {}).update(
            {
                name: value
                for name, value in tensors.items()
                if (module_path, name) not in layers_by_ref
            }
        )
    replaced_refs = [
        (path, name)
        for path, name in model_index.split_ties(full_by_module)
        if full_by_module[path][name].shape == weight_of(model_index.modules[path], name).shape
    ]
    replaced_refs += _token_refs(model_index, adapter_files)
    # a packed weight needs no copy, because the tensors that are trained in full replace all of it
    unpacked_refs = [
        ref
        for ref in dict.fromkeys(replaced_refs)
        if type(weight_of(model_index.modules[ref[0]], ref[1])) is nn.Parameter
    ]
    return list(dict.fromkeys([*low_rank_refs, *unpacked_refs]))


def _token_refs(model_index: ModelIndex, adapter_files: AdapterFiles) -> list[ParamRef]:
    """The names of tied weights under which the folder has trained token rows that do not belong to
    all names of the weight: (module path, name of the parameter) of each."""
    refs_by_id, token_refs = model_index.refs_by_parameter_id(), []
    base_record = adapter_files.metadata.get("base", {})
    recorded_names = {
        tensor_name for field in ("weights", "rest") for tensor_name in base_record.get(field) or ()
    }
    for module_path in adapter_files.tokens:
        first_ref = saved_token_rows.first_ref_at(model_index, module_path, refs_by_id)
        if first_ref is None:
            continue
        ref = saved_token_rows.ref_of(model_index, module_path)
        tied_refs = [
            tied_ref
            for tied_ref in refs_by_id[
                id(weight_of(model_index.modules[first_ref[0]], first_ref[1]))
            ]
            if tied_ref != ref
        ]
        if adapter_files.record is None:
            needs_untying = saved_token_rows.trains_one_name(
                model_index, ref, refs_by_id, {*adapter_files.tokens}
            )
            tied_token_rows = [
                adapter_files.tokens[path] for path, _ in tied_refs if path in adapter_files.tokens
            ]
            token_rows = adapter_files.tokens[module_path]
            needs_untying |= any(
                other_rows.ids != token_rows.ids
                or not torch.equal(other_rows.rows, token_rows.rows)
                for other_rows in tied_token_rows
            )
        else:  # if the record lists another name, that name had a weight of its own in training
            needs_untying = any(
                parameter_path(*tied_ref) in recorded_names for tied_ref in tied_refs
            )
        token_refs += [ref] if needs_untying else []
    return token_refs


def _is_same_change(layer: peft.PeftLayer, tied_layer: peft.PeftLayer) -> bool:
    """Whether two layers hold the same change of a matrix, one of them possibly transposed."""
    if layer.suffixes == tied_layer.suffixes:
        return torch.equal(layer.A, tied_layer.A) and torch.equal(layer.B, tied_layer.B)
    return torch.equal(layer.A, tied_layer.B.mT) and torch.equal(layer.B, tied_layer.A.mT)
