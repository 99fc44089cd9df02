"""Save an adapter of a model to a folder, and install an adapter from a folder. ``folder.py``
writes and reads the folder, and ``match_model.py`` verifies it against the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import saved_token_rows
from veneer.adapter_files.base_proof import base_record, fingerprint_without_rows, fingerprints_of
from veneer.adapter_files.folder import write
from veneer.adapter_files.match_model import match
from veneer.adapter_files.peft_mapping import file_tensor, peft_config, peft_entries, tensors_of
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.ties import untie_for
from veneer.attach import (
    Change,
    Names,
    adapters,
    bits_before_merge,
    changes,
    install_adapter,
    name_problems,
    need_adapters,
    only_name,
    tie_again,
    unwrap,
    walk,
    with_values,
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
    """An adapter folder was written that PEFT or ``from_pretrained`` cannot load, or only in part;
    the text gives the reason and a way to load it."""


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
) -> Path:
    """Write the adapter ``name`` (None: the only one) as a folder, in one atomic step: after a
    crash the path holds the old folder or the new one.

    In several processes (``torch.distributed``: DDP, FSDP2) every rank that holds the model must
    call this with the same path. Sharded weights are gathered one at a time; all ranks compare
    their tensors, the first rank writes, and the others return once the folder exists. If the ranks
    differ, or one fails or does not call (``distributed.PATIENCE``), every rank raises and nothing
    is replaced.

    Args:
        base_name: the name of the base; None takes the name that transformers loaded it by, and no
            name for an adapter that was attached to merged weights.
        provenance: facts about the training, as JSON values (those of the first rank). The model
            card (README.md) shows some of its keys, such as "license" and "metrics"; see
            ``model_card.py``.
        overwrite: replace the adapter in an existing folder; all other files stay, and so do notes
            at the end of its model card.
        fingerprints: the fingerprints of the base's tensors, by path, for a model without values
            (``models.meta_model``); those of changed weights are required. None computes them from
            the model.
        alone: this rank saves by itself and waits for no other rank; under DDP, where each rank
            has the whole model, call it behind ``if rank == 0``.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False; it is a file, or holds
            another whole model.
        AdapterError: a trained value is not finite; the variant has no form in such a folder; the
            base's weights are lost (merged with ``keep=False``); ranks differ or do not call.
        MergeError: the adapter was attached while another was merged, which is no longer merged.

    Warns:
        FreshWeights: parameters of the model are in neither the checkpoint nor the folder.
        LoadedElsewhere: PEFT has the variant (DoRA), but not for one of these layers, and cannot
            read the folder.
    """
    path = Path(path)

    def put(content: Mapping[str, Any]) -> None:
        write(path, **content, provenance=provenance or {}, overwrite=overwrite)
        reason = peft.not_for_peft(content["peft_config"])
        # PEFT has the variant, but not for these layers
        if reason and VARIANTS[content["config"].variant].peft_keys:
            text = (
                f"PEFT cannot read {path} ({reason}): load it with veneer.load, or merge the"
                " adapter"
            )
            warn_caller(text, LoadedElsewhere, within=("veneer", "torch"))

    save_by(put, model, path, name, base_name, fingerprints, alone)
    return path


def save_by(
    put: Callable[[Mapping[str, Any]], None],
    model: nn.Module,
    path: Path,
    name: str | None,
    base_name: str | None = None,
    fingerprints: Mapping[str, str] | None = None,
    alone: bool = False,
) -> None:
    """``save`` with another last step: ``put`` gets the collected content, on one of the ranks that
    save to ``path``."""
    model = unwrap(model)
    if not alone:
        reshard(model)
    _must_be_gathered(model, only_name(model, name))
    ranks = meet_ranks(str(path), model, alone=alone)

    def collect() -> dict[str, Any]:
        adapter_name = only_name(model, name)
        modules = [change for *_, change in changes(model, adapter_name)] + [
            layer_adapter.full for _, _, layer_adapter in adapters(model, adapter_name)
        ]
        values = full_tensors(value for m in modules for value in (*m.parameters(), *m.buffers()))
        with with_values(modules, values):
            return _content(model, adapter_name, base_name, fingerprints)

    if ranks is None:
        put(collect())
        return
    # compare the outlines before anything is gathered
    ranks.run_on_all(lambda: _outline(model, only_name(model, name)), hash_json, "an adapter")
    content = ranks.run_on_all(collect, _content_hash, "an adapter, or a base,")
    ranks.run_on_all(lambda: put(content) if ranks.writes else None, lambda _: "", "a folder")


def _must_be_gathered(model: nn.Module, name: str) -> None:
    """Raise AdapterError if FSDP1 has flattened and sharded the weights, so that their shapes are
    lost, or if its wrappers are part of the paths."""
    if not has_fsdp1(module for _, module in walk(model)):
        return
    weights = [weight_of(module, weight) for _, module, weight, _ in changes(model, name)]
    inside = any("_fsdp_wrapped_module" in path for path, _ in walk(model))
    if inside or any(isinstance(weight, nn.Parameter) and weight.dim() == 1 for weight in weights):
        problem = "a model in torch's first FullyShardedDataParallel (FSDP1)"
        problem += (
            ", which wraps modules of it"
            if inside
            else ", whose weights it has spread over processes"
        )
        do = "shard with FSDP2 (torch.distributed.fsdp.fully_shard)"
        if not inside:
            do += (
                ", or save on every rank inside of `with"
                " FullyShardedDataParallel.summon_full_params(wrapped):`"
            )
        raise AdapterError(problem, "whole weights, or those of FSDP2", do)


def _outline(model: nn.Module, name: str) -> list[Any]:
    """The name, config, and the paths and shapes of the tensors of an adapter."""
    states = {path: layer_adapter.state_dict() for path, _, layer_adapter in adapters(model, name)}
    shapes = [
        (path, key, [*value.shape])
        for path, state in states.items()
        for key, value in state.items()
    ]
    return [name, need_adapters(model, name).configs[name].to_dict(), shapes]


def _content_hash(content: Mapping[str, Any]) -> str:
    """A hash of the content of the folder, without the provenance."""
    tensors = {
        key: digest(tensor)
        for kind in ("tensors", "parameters")
        for key, tensor in content[kind].items()
    }
    rest = {
        key: value
        for key, value in content.items()
        if key not in ("tensors", "parameters", "config")
    }
    return hash_json([tensors, rest, content["config"].to_dict()])


def base_name_of(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or None


def labels_of(model: nn.Module) -> list[str] | None:
    """The labels of a classifier of transformers, in the order of its outputs; None for any other
    model (the config of every model has two default labels)."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or not base_class(model).__name__.endswith("Classification"):
        return None
    return [str(names[number]) for number in sorted(names)]


def _content(
    model: nn.Module, name: str, base_name: str | None, fingerprints: Mapping[str, str] | None
) -> dict[str, Any]:
    """The arguments for ``folder.write``: the tensors, configs and fingerprints of an adapter."""
    config = need_adapters(model, name).configs[name]
    if VARIANTS[config.variant].peft is None:
        raise AdapterError(
            f"variant {config.variant!r}", "one that PEFT's format can express", "merge it instead"
        )
    names = Names(model)
    peft_form = peft_entries(names, name)
    # an adapter of merged weights has no base with a name
    if base_name is None and need_adapters(model).selections[name].merged_at_attach is None:
        base_name = base_name_of(model)
    weights = {
        parameter_path(weight_path, weight): (weight_of(module, weight), change)
        for weight_path, module, weight, change in changes(model, name)
    }
    exact = {id(entry.change): entry.exact for entry in peft_form}
    return {
        "tensors": {
            **tensors_of(model, name, peft_form),
            **saved_token_rows.tensors_of(names, name),
        },
        "peft_config": (
            peft_config(names, name, config, base_name, peft_form)
            | saved_token_rows.config_fields(names, name)
        ),
        "base": {
            "name": base_name,
            "architecture": base_class(model).__name__,
            **({} if (labels := labels_of(model)) is None else {"labels": labels}),
            **({} if (quantised := quantization_in(model)) is None else {"quantized": quantised}),
            **_proof(names, name, weights, fingerprints),
        },
        "changes": {
            weight_path: _describe_change(change) for weight_path, (_, change) in weights.items()
        },
        "config": config,
        "parameters": {
            f"{weight_path}.{key}": file_tensor(value)
            for weight_path, (_, change) in weights.items()
            if not exact.get(id(change), True)
            for key, value in change.adapter_parameters.items()
            if key not in change.variant.derived or not _has_default_derived(change)
        },
    }


def _proof(
    names: Names,
    name: str,
    weights: Mapping[str, tuple[Any, Change]],
    fingerprints: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The fingerprints of the tensors that the adapted model computes with, and the parameters
    among them that no checkpoint holds ("fresh"). ``weights``: the weights that it changes at a low
    rank, by path, with their changes."""
    model, tensors = names.model, list_weights(names)
    by_identity = {id(tensor.weight): tensor for tensor in tensors}
    replaced = {
        id({**module._parameters, **module._buffers}[key])
        for _, module, layer_adapter in adapters(model, name)
        for key in (*layer_adapter.full._parameters, *layer_adapter.full._buffers)
    }
    # the adapter holds the fresh rows of these
    held = {id(weight) for weight, change in weights.values() if change.tokens is not None}
    lost = {key: ref for key, ref in names.fresh_parameters().items() if key not in replaced | held}
    FreshWeights.warn(lost.values(), "As the adapter is saved", stacklevel=5)
    # the output of a model without a head does not depend on its pooler, which may be random
    gone = without_backup(model, name) if fingerprints is None else frozenset()
    left_out = replaced.union(gone, () if _has_head(model) else lost)

    unknown = [weight_path for weight_path, (held, _) in weights.items() if id(held) in gone]
    if unknown:
        problem = (
            f"{listing(unknown)}, merged with keep=False, of which nobody knows what the base was"
        )
        raise AdapterError(
            problem, "the base's weights, for its fingerprint", "save it before that merge"
        )
    changed = {weight_path: by_identity[id(held)] for weight_path, (held, _) in weights.items()}
    left_out = left_out.union(id(tensor.weight) for tensor in changed.values())
    rest = [
        tensor for tensor in tensors if id(tensor.weight) not in left_out and tensor.is_readable
    ]
    recorded = [*changed.values(), *rest]
    if fingerprints is None:
        values = _compute_fingerprints(model, name, recorded)
    else:
        values = [
            next((fingerprints[key] for key in tensor.names if key in fingerprints), None)
            for tensor in recorded
        ]
    record = base_record(changed, rest, values)
    for weight_path, (held, change) in weights.items() if fingerprints is None else ():
        # the adapter replaces these rows, so that the base's values in them do not matter
        if change.tokens is not None:
            ids = change.tokens.tolist()
            record["weights"][weight_path] = fingerprint_without_rows(
                by_identity[id(held)], ids, bits_before_merge(model, name)
            )
    return {
        **record,
        **({"fresh": [parameter_path(*ref) for ref in lost.values()]} if lost else {}),
    }


def _compute_fingerprints(
    model: nn.Module, name: str, tensors: Sequence[ModuleWeight]
) -> list[str | None]:
    """The fingerprints of tensors of the base as they were before a merge; of a packed weight, that
    of the weight in the file if it is known."""
    sources = sources_of(model)
    computed = fingerprints_of(tensors, bits_before_merge(model, name))
    return [sources.get(fingerprint, fingerprint) for fingerprint in computed]


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
        of_weights: the changes are changes of weights even without a record, as they come from a
            format that defines them so; PEFT's deviations then do not matter.
        untie: whether the names of a tied weight that the folder changes separately get weights of
            their own (``ties.untie_for``).
        grow: first grow the vocabulary of the model to that of the adapter's base.
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
    """Whether the derived parameters equal those that the sizes give, so that no file needs them.
    They differ in a VeRA adapter from PEFT."""
    held, dims = change.adapter_parameters, change.dims
    out = dims.out if change.rows is None else len(change.rows)
    start = InitContext(dims.groups, out, dims.in_, change.rank, change.layer.fan_in(dims))
    for name in change.variant.derived:
        with torch.device(held[name].device):
            begun = change.variant.init(start)[name]
        if begun.shape != held[name].shape or not torch.equal(
            begun.to(held[name].dtype), held[name]
        ):
            return False
    return True


def _describe_change(change: Change) -> dict[str, Any]:
    """The record's entry of one change."""
    described: dict[str, Any] = {
        "kind": change.layer.name,
        "rank": change.rank,
        "alpha": change.alpha,
    }
    described |= {"module_only": True} if change.module_only else {}
    if change.rows is not None:
        described["rows"] = ranges_of(change.rows.tolist())
    if change.tokens is not None:
        # the rows of the stored weight
        rows = change.dims.in_ if change.layer.out_axis else change.dims.out
        described |= {"tokens": ranges_of(change.tokens.tolist()), "of": rows}
    return described


def _has_head(model: nn.Module) -> bool:
    """Whether a transformers model has a head on top of a base model, rather than being that base
    model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
