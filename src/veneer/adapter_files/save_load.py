"""Save an adapter of a model to a folder, and install an adapter from a folder on a model.

``folder.py`` writes and reads the folder; ``match_model.py`` verifies the folder against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import saved_token_rows
from veneer.adapter_files.base_proof import (
    base_record,
    changed_weight_ids,
    fingerprint_without_rows,
    fingerprints_of,
)
from veneer.adapter_files.folder import write
from veneer.adapter_files.match_model import match
from veneer.adapter_files.peft_mapping import file_tensor, file_tensors, peft_config, peft_entries
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.ties import untie_for
from veneer.attach import (
    Change,
    ModelIndex,
    adapters,
    bits_before_merge,
    changes,
    install_adapter,
    name_or_default,
    name_problems,
    need_adapters,
    replaced_tensors,
    tie_again,
    unwrap,
    walk,
    without_backup,
)
from veneer.bases import weight_of
from veneer.distributed import base_class, full_tensors, has_fsdp1, meet_ranks, reshard
from veneer.errors import AdapterError, FreshWeights, listing, warn_caller
from veneer.fileio.hashing import digest, hash_json
from veneer.formats import peft
from veneer.layers import parameter_path
from veneer.models.base_weights import ModuleWeight, list_weights
from veneer.models.quantize import quantization_in, sources_of
from veneer.variants import VARIANTS, InitContext


class LoadedElsewhere(UserWarning):
    """PEFT or ``from_pretrained`` cannot load the adapter folder that was written, or can load only
    parts of it. The text gives the reason and a way to load the folder."""


@torch.no_grad()
def save(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    base_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    fingerprints: Mapping[str, str] | None = None,
    alone: bool = False,
    tokenizer: Path | None = None,
) -> Path:
    """Write an adapter of a model as a folder, in one atomic step: after a crash, ``path`` holds
    the old folder or the new one.

    In several processes (``torch.distributed``: DDP, FSDP2), every rank that holds the model must
    call ``save`` with the same path. Sharded weights are gathered one at a time. All ranks compare
    their tensors, the first rank writes, and the other ranks return once the folder exists. If the
    ranks differ, or if one fails or does not call in time (``distributed.PATIENCE`` seconds), every
    rank raises and no folder is replaced. But if no weight is sharded and only one rank calls, it
    saves alone and warns (``distributed.SavedAlone``).

    Args:
        name: the name of the adapter. None means the default adapter, or the only one.
        base_name: the name of the base. None means the name by which transformers loaded the base,
            or no name for an adapter that was attached to merged weights.
        provenance: facts about the training, as JSON values. The first rank's facts are written.
            The model card (README.md) shows some keys, such as "license" and "metrics"; see
            ``model_card.py``.
        overwrite: whether to replace the adapter in an existing folder. All other files stay, as do
            notes at the end of the old model card.
        fingerprints: the fingerprints of the base's tensors, by path, for a model without values
            (``models.meta_model``). The fingerprint of each changed weight is required. None
            computes them from the model.
        alone: whether this rank saves by itself and waits for no other rank. Under DDP, where each
            rank has the complete model, call it behind ``if rank == 0``.
        tokenizer: the folder of a tokenizer with added tokens, whose files are copied into the
            adapter's folder.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False; it is a file; or it holds a
            complete model other than the base.
        AdapterError: a trained value is not finite; the variant cannot be written in PEFT's format;
            the base's weights are lost (merged with ``keep=False``); ranks differ or do not call.
        MergeError: the adapter was attached while another adapter was merged, and the latter is no
            longer merged.

    Warns:
        FreshWeights: some parameters of the model are neither in its checkpoint nor in the folder.
        LoadedElsewhere: PEFT cannot read the folder, because it supports the variant (DoRA), but
            not for one of the adapted layers.
    """
    path = Path(path)

    def write_content(content: Mapping[str, Any]) -> None:
        write(
            path, **content, provenance=provenance or {}, overwrite=overwrite, tokenizer=tokenizer
        )
        reason = peft.not_for_peft(content["peft_config"])
        # warn only if PEFT has this variant: then users may expect that PEFT reads the folder
        if reason and VARIANTS[content["config"].variant].peft_keys:
            warning_text = (
                f"PEFT cannot read {path} ({reason}): load it with veneer.load, or merge the"
                " adapter"
            )
            warn_caller(warning_text, LoadedElsewhere, within=("veneer", "torch"))

    save_with(write_content, model, path, name, base_name, fingerprints, alone)
    return path


def save_with(
    write_content: Callable[[Mapping[str, Any]], None],
    model: nn.Module,
    path: Path,
    name: str | None,
    base_name: str | None = None,
    fingerprints: Mapping[str, str] | None = None,
    alone: bool = False,
) -> None:
    """Do all that ``save`` does, but instead of writing the files, call ``write_content`` on one of
    the ranks that save to ``path``.

    Args:
        write_content: a function of a mapping with keyword arguments for ``folder.write``: the
            tensors, the configs and the fingerprints.
        base_name: the name of the base model for the record; None: the name that the model has.
        name, fingerprints, alone: as in ``save``.
    """
    model = unwrap(model)
    if not alone:
        reshard(model)
    _must_be_gathered(model, name_or_default(model, name))
    ranks = meet_ranks(str(path), model, alone=alone)

    def collect() -> dict[str, Any]:
        adapter_name = name_or_default(model, name)
        adapter_modules = [change for *_, change in changes(model, adapter_name)] + [
            layer_adapter.full for _, _, layer_adapter in adapters(model, adapter_name)
        ]
        tensors = full_tensors(
            tensor
            for module in adapter_modules
            for tensor in (*module.parameters(), *module.buffers())
        )
        with replaced_tensors(adapter_modules, tensors):
            return _content(model, adapter_name, base_name, fingerprints)

    if ranks is None:
        write_content(collect())
        return
    # compare the shapes of the adapters first, so that ranks with different adapters raise an error
    # before any tensor is gathered
    with ranks.joint_work("an adapter") as compare:
        compare(hash_json, _describe_adapter(model, name_or_default(model, name)))
    with ranks.joint_work("an adapter, or a base,") as compare:
        content = collect()
        compare(_content_hash, content)
    with ranks.joint_work():
        if ranks.is_writer:
            write_content(content)


def _must_be_gathered(model: nn.Module, adapter_name: str) -> None:
    """Raise AdapterError if FSDP1 has flattened and sharded the weights, so that their shapes are
    unknown, or if it has wrapped submodules, so that the paths of modules contain the wrappers'
    names."""
    if not has_fsdp1(module for _, module in walk(model)):
        return
    changed_weights = [
        weight_of(module, weight_name) for _, module, weight_name, _ in changes(model, adapter_name)
    ]
    wraps_modules = any("_fsdp_wrapped_module" in path for path, _ in walk(model))
    if wraps_modules or any(
        isinstance(weight, nn.Parameter) and weight.dim() == 1 for weight in changed_weights
    ):
        problem = "a model in torch's first FullyShardedDataParallel (FSDP1)"
        problem += (
            ", which wraps modules of it"
            if wraps_modules
            else ", whose weights it has spread over processes"
        )
        advice = "shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
        if not wraps_modules:
            advice += (
                ", or save on every rank inside of `with"
                " FullyShardedDataParallel.summon_full_params(wrapped):`"
            )
        raise AdapterError(problem, "whole weights, or those of FSDP2", advice)


def _describe_adapter(model: nn.Module, adapter_name: str) -> list[Any]:
    """[name, config, shapes] of an adapter, to be compared between ranks. The shapes are a list of
    (module path, key, shape), one for each tensor."""
    states = {
        path: layer_adapter.state_dict() for path, _, layer_adapter in adapters(model, adapter_name)
    }
    shapes = [
        (path, key, [*value.shape])
        for path, state in states.items()
        for key, value in state.items()
    ]
    return [
        adapter_name,
        need_adapters(model, adapter_name).configs[adapter_name].to_dict(),
        shapes,
    ]


def _content_hash(content: Mapping[str, Any]) -> str:
    """A hash of ``content``, the result of ``_content``, to be compared between ranks."""
    digests = {
        key: digest(tensor)
        for field_name in ("tensors", "parameters")
        for key, tensor in content[field_name].items()
    }
    other_content = {
        key: value
        for key, value in content.items()
        if key not in ("tensors", "parameters", "config")
    }
    return hash_json([digests, other_content, content["config"].to_dict()])


def base_name_of(model: nn.Module) -> str | None:
    """The name by which transformers loaded a model; None if it has no such name."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or None


def labels_of(model: nn.Module) -> list[str] | None:
    """The labels of a classifier of transformers, in the order of its outputs. None for any other
    model, although the config of every model has two default labels."""
    label_names = getattr(getattr(model, "config", None), "id2label", None)
    if not label_names or not base_class(model).__name__.endswith("Classification"):
        return None
    return [str(label_names[index]) for index in sorted(label_names)]


def _content(
    model: nn.Module,
    adapter_name: str,
    base_name: str | None,
    fingerprints: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The keyword arguments for ``folder.write`` that depend on the model: tensors, configs, and
    the entries "base" and "changes" of the record. ``base_name`` and ``fingerprints`` are those of
    ``save``. AdapterError: PEFT's format cannot express the variant, or the base's weights are
    lost."""
    config = need_adapters(model, adapter_name).configs[adapter_name]
    if VARIANTS[config.variant].peft is None:
        raise AdapterError(
            f"variant {config.variant!r}", "one that PEFT's format can express", "merge it instead"
        )
    model_index = ModelIndex(model)
    entries = peft_entries(model_index, adapter_name)
    # an adapter that was attached to merged weights has them as its base, which has no name
    if base_name is None and need_adapters(model).selections[adapter_name].merged_at_attach is None:
        base_name = base_name_of(model)
    changes_by_path = {
        parameter_path(module_path, weight_name): (weight_of(module, weight_name), change)
        for module_path, module, weight_name, change in changes(model, adapter_name)
    }
    is_complete_by_id = {id(entry.change): entry.is_complete for entry in entries}
    return {
        "tensors": {
            **file_tensors(model, adapter_name, entries),
            **saved_token_rows.file_tensors(model_index, adapter_name),
        },
        "peft_config": (
            peft_config(model_index, adapter_name, config, base_name, entries)
            | saved_token_rows.config_fields(model_index, adapter_name)
        ),
        "base": {
            "name": base_name,
            "architecture": base_class(model).__name__,
            **({} if (labels := labels_of(model)) is None else {"labels": labels}),
            **({} if (quantised := quantization_in(model)) is None else {"quantized": quantised}),
            **_base_fingerprints(model_index, adapter_name, changes_by_path, fingerprints),
        },
        "changes": {
            weight_path: _describe_change(change)
            for weight_path, (_, change) in changes_by_path.items()
        },
        "config": config,
        "parameters": {
            f"{weight_path}.{key}": file_tensor(parameter)
            for weight_path, (_, change) in changes_by_path.items()
            if not is_complete_by_id.get(id(change), True)
            for key, parameter in change.adapter_parameters.items()
            if key not in change.variant.derived or not _has_default_derived(change)
        },
    }


def _base_fingerprints(
    model_index: ModelIndex,
    adapter_name: str,
    changes_by_path: Mapping[str, tuple[Any, Change]],
    fingerprints: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The fields "weights", "rest" and "fresh" of the record's entry "base": the fingerprints of
    the base's tensors that the adapted model computes with, and the paths of the parameters that no
    checkpoint holds ("fresh"), of which ``FreshWeights`` warns.

    Args:
        changes_by_path: {path: (weight, change)} of the weights that the adapter changes at a low
            rank.
        fingerprints: known fingerprints by name, which are used instead of computing them.
    """
    model, base_weights = model_index.model, list_weights(model_index)
    weights_by_id = {id(base_weight.weight): base_weight for base_weight in base_weights}
    replaced_ids = {
        id({**module._parameters, **module._buffers}[key])
        for _, module, layer_adapter in adapters(model, adapter_name)
        for key in (*layer_adapter.full._parameters, *layer_adapter.full._buffers)
    }
    # a weight whose only rows without a checkpoint (added tokens) are in the adapter is not fresh
    token_weight_ids = {
        id(weight) for weight, change in changes_by_path.values() if change.tokens is not None
    }
    fresh_refs = {
        weight_id: ref
        for weight_id, ref in model_index.fresh_parameters().items()
        if weight_id not in replaced_ids | token_weight_ids
    }
    FreshWeights.warn(fresh_refs.values(), "As the adapter is saved", stacklevel=5)
    lost_ids = without_backup(model, adapter_name) if fingerprints is None else frozenset()
    lost_paths = [path for path, (weight, _) in changes_by_path.items() if id(weight) in lost_ids]
    if lost_paths:
        raise AdapterError(
            f"{listing(lost_paths)}, merged with keep=False, of which nobody knows what the base"
            " was",
            "the base's weights, for its fingerprint",
            "save it before that merge",
        )
    changed_weights = {
        path: weights_by_id[id(weight)] for path, (weight, _) in changes_by_path.items()
    }
    excluded_ids = replaced_ids.union(
        changed_weight_ids(model, adapter_name),
        lost_ids,
        # without a head, only a pooler can be fresh: random in each load, and without any effect
        () if _has_head(model) else fresh_refs,
    )
    unchanged_weights = [
        base_weight
        for base_weight in base_weights
        if id(base_weight.weight) not in excluded_ids and base_weight.is_readable
    ]
    recorded_weights = [*changed_weights.values(), *unchanged_weights]
    digests = _find_fingerprints(model, adapter_name, recorded_weights, fingerprints)
    record = base_record(changed_weights, unchanged_weights, digests)
    for weight_path, (weight, change) in changes_by_path.items() if fingerprints is None else ():
        # the adapter replaces the rows of trained tokens: fingerprint the other rows alone
        if change.tokens is not None:
            ids = change.tokens.tolist()
            record["weights"][weight_path] = fingerprint_without_rows(
                weights_by_id[id(weight)], ids, bits_before_merge(model, adapter_name)
            )
    return {
        **record,
        **({"fresh": [parameter_path(*ref) for ref in fresh_refs.values()]} if fresh_refs else {}),
    }


def _find_fingerprints(
    model: nn.Module,
    adapter_name: str,
    module_weights: Sequence[ModuleWeight],
    fingerprints: Mapping[str, str] | None,
) -> list[str | None]:
    """The fingerprint of each of ``module_weights``: by name from ``fingerprints`` (None if it is
    not there), or, if ``fingerprints`` is None, computed from the model's values.

    For a weight into which an adapter is merged, these are the values from before the merge. For a
    weight that was quantised at loading, the fingerprint of the weight in the checkpoint is used
    instead, if it is known, unless the variant fits the quantised weight alone."""
    if fingerprints is not None:
        return [
            next((fingerprints[name] for name in module_weight.names if name in fingerprints), None)
            for module_weight in module_weights
        ]
    variant = VARIANTS[need_adapters(model, adapter_name).configs[adapter_name].variant]
    file_fingerprints = {} if variant.makes_up_for_quantization else sources_of(model)
    computed = fingerprints_of(module_weights, bits_before_merge(model, adapter_name))
    return [file_fingerprints.get(fingerprint, fingerprint) for fingerprint in computed]


def install_from(
    model: nn.Module,
    path: str | Path,
    name: str,
    *,
    trainable: bool,
    verify_base: bool,
    of_weights: bool = False,
    untie: bool | None = None,
    grow: bool = False,
) -> None:
    """Verify a folder against a model, then install the adapter (``veneer.load``).

    Args:
        trainable: whether the adapter's parameters require gradients.
        verify_base: whether to compare the fingerprints of the base, if the folder has a record.
        of_weights: whether the changes of a folder without a record are changes of weights, because
            they were converted from a format that defines them so. Then the folder is not refused
            where PEFT would compute another result.
        untie: whether the names of a tied weight that the folder changes differently get separate
            weights. None allows this, with a warning (``ties.untie_for``).
        grow: whether to grow the vocabulary of the model first, to that of the adapter's base.

    Raises:
        AdapterError, BaseMismatchError: the folder does not fit the model, which is unchanged then.
    """
    with saved_token_rows.grow_vocabulary(model, path) if grow else nullcontext():
        untied = untie_for(model, path, untie)
        try:
            problems = list(name_problems(model, name))
            load_plan = match(model, path, problems, verify_base=verify_base, of_weights=of_weights)
            install_adapter(
                model,
                name,
                load_plan.plans,
                trainable=trainable,
                parameters=load_plan.adapter_parameters,
            )
        except BaseException:
            if untied is not None:
                tie_again(model, untied)
            raise
    if untied is not None:
        attached = need_adapters(model, name)
        attached.untied = (*attached.untied, untied)
    load_plan.fill(
        {module_path: layer_adapter for module_path, _, layer_adapter in adapters(model, name)}
    )


def _has_default_derived(change: Change) -> bool:
    """Whether the variant's ``derived`` parameters, such as the frozen A and B of VeRA, have the
    values that Veneer computes from the sizes of the change. Then they need not be saved. A VeRA
    adapter that was loaded from a file of PEFT has other values."""
    parameters, dims = change.adapter_parameters, change.dims
    out = dims.out if change.rows is None else len(change.rows)
    context = InitContext(dims.groups, out, dims.in_, change.rank, change.layer.fan_in(dims))
    for parameter_name in change.variant.derived:
        with torch.device(parameters[parameter_name].device):
            default_values = change.variant.init(context)[parameter_name]
        if default_values.shape != parameters[parameter_name].shape or not torch.equal(
            default_values.to(parameters[parameter_name].dtype), parameters[parameter_name]
        ):
            return False
    return True


def _describe_change(change: Change) -> dict[str, Any]:
    """The settings of one change, as the entry "changes" of the record has them."""
    fields: dict[str, Any] = {
        "kind": change.layer.name,
        "rank": change.rank,
        "alpha": change.alpha,
    }
    fields |= {"module_only": True} if change.module_only else {}
    if change.rows is not None:
        fields["rows"] = ranges_of(change.rows.tolist())
    if change.tokens is not None:
        # "of" is the number of rows of the weight as it is stored: its first size
        row_count = change.dims.in_ if change.layer.out_axis else change.dims.out
        fields |= {"tokens": ranges_of(change.tokens.tolist()), "of": row_count}
    return fields


def _has_head(model: nn.Module) -> bool:
    """Whether a model of transformers has a head, such as a classifier, on top of a base model.
    False for a base model itself, and for a model of another library."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
