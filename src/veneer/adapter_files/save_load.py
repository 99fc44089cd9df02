"""Between a model and an adapter folder: ``save`` collects what an adapter is, ``install_from``
puts one in place that ``match_model.py`` has verified against the model. The folder itself is
``folder.py``'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapter_files import token_rows
from veneer.adapter_files.base_proof import (
    fingerprint_beside,
    fingerprints_of,
    record_of,
)
from veneer.adapter_files.folder import write
from veneer.adapter_files.match_model import match
from veneer.adapter_files.peft_mapping import peft_config, peft_entries, tensors_of, written
from veneer.adapter_files.record import ranges_of
from veneer.adapter_files.ties import untie_for
from veneer.attach.adapted_module import base_class, walk, weight_of, with_values
from veneer.attach.change import Change
from veneer.attach.fresh_weights import fresh_parameters, has_head, warn_fresh
from veneer.attach.install import install
from veneer.attach.lookup import adapters, changes, need_adapters, only_name, parameter_path, unwrap
from veneer.attach.merge import kept_bits, unkept
from veneer.attach.refusals import name_problems
from veneer.attach.targets import Names
from veneer.attach.weight_tying import tie_again
from veneer.distributed import has_fsdp1, meet, reshard, whole_values
from veneer.errors import AdapterError, listing, warn_caller
from veneer.fileio.hashing import digest, hash_json
from veneer.formats import peft
from veneer.models.base_weights import ModuleWeight, list_weights
from veneer.models.quantize import quantization_in, sources_of
from veneer.variants import VARIANTS, InitContext


class LoadedElsewhere(UserWarning):
    """An adapter folder was written that other readers, PEFT or ``from_pretrained``, cannot load,
    or not whole; the text says why, and what can."""


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
    """Write the adapter ``name`` (None: the only one) as a folder, in one step: a crash leaves what
    was there before, or the whole.

    In several processes (``torch.distributed``: DDP, FSDP2) every rank that holds the model must
    call this, with the same path. Weights that are spread over them are gathered, one at a time;
    all ranks compare what they hold, the first one writes, and the others return once the folder is
    there. Where they differ, or one fails or stays away (``distributed.PATIENCE``), every rank
    raises and nothing is replaced.

    Args:
        base_name: what to call the base; None takes the name that transformers loaded it by, and
            none for an adapter that was attached to merged weights.
        provenance: anything worth knowing about the training, as JSON values (the first rank's).
            The model card (README.md) shows some keys of it, such as "license" and "metrics": see
            ``model_card.py``.
        overwrite: replace the adapter in a folder that exists; all other files stay, and notes at
            the end of its model card.
        fingerprints: of the base's tensors, by their paths, for a model that stands for its base
            without holding the values (``models.meta_model``); those of changed weights must be
            there. None takes those of the tensors that it holds.
        alone: this rank saves by itself and waits for no other: under DDP, where each rank holds
            all, behind an ``if rank == 0``.

    Raises:
        OutputExistsError: the path exists and ``overwrite`` is False; it is a file, or holds
            another whole model.
        AdapterError: a trained number is not finite, the variant has no form in such a folder, or
            the base's weights are not known any more (merged with ``keep=False``); ranks that
            differ or do not come.
        MergeError: the adapter was attached while another was merged, which it no longer is.

    Warns:
        FreshWeights: parameters that the checkpoint did not hold are not in the folder either.
        LoadedElsewhere: PEFT has the variant (DoRA), but not for one of these layers, and cannot
            read the folder.
    """
    path = Path(path)

    def put(content: Mapping[str, Any]) -> None:
        write(path, **content, provenance=provenance or {}, overwrite=overwrite)
        reason = peft.not_for_peft(content["peft_config"])
        # a variant of PEFT's own, which it has not here
        if reason and VARIANTS[content["config"].variant].peft_keys:
            text = (
                f"PEFT cannot read {path} ({reason}): load it with veneer.load, or merge the"
                " adapter"
            )
            warn_caller(text, LoadedElsewhere, within=("veneer", "torch"))

    save_by(put, model, path, name, base_name, fingerprints, alone)
    return path


def save_by(
    put: Callable[[Mapping[str, Any]], None], model: nn.Module, path: Path, name: str | None,
    base_name: str | None = None, fingerprints: Mapping[str, str] | None = None, alone: bool = False,
) -> None:  # fmt: skip
    """``save`` with another last step: ``put`` writes what was gathered, on one of the ranks that
    meet at ``path``."""
    model = unwrap(model)
    if not alone:
        reshard(model)
    _must_be_gathered(model, only_name(model, name))
    ranks = meet(str(path), model, alone=alone)

    def collected() -> dict[str, Any]:
        own = only_name(model, name)
        modules = [change for *_, change in changes(model, own)] + [
            part.full for _, _, part in adapters(model, own)
        ]
        values = whole_values(value for m in modules for value in (*m.parameters(), *m.buffers()))
        with with_values(modules, values):
            return _content(model, own, base_name, fingerprints)

    if ranks is None:
        put(collected())
        return
    # before what is gathered
    ranks.each(lambda: _outline(model, only_name(model, name)), hash_json, "an adapter")
    content = ranks.each(collected, _mark, "an adapter, or a base,")
    ranks.each(lambda: put(content) if ranks.writes else None, lambda _: "", "a folder")


def _must_be_gathered(model: nn.Module, name: str) -> None:
    """Raise an AdapterError where FSDP1 has flattened the weights and spread them over processes,
    which does not say what their shapes were, or where its wrappers are part of the paths."""
    if not has_fsdp1(module for _, module in walk(model)):
        return
    weights = [weight_of(module, weight) for _, module, weight, _ in changes(model, name)]
    inside = any("_fsdp_wrapped_module" in path for path, _ in walk(model))
    if inside or any(isinstance(weight, nn.Parameter) and weight.dim() == 1 for weight in weights):
        found = "a model in torch's first FullyShardedDataParallel (FSDP1)"
        found += (
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
        raise AdapterError(found, "whole weights, or those of FSDP2", do)


def _outline(model: nn.Module, name: str) -> list[Any]:
    """What an adapter consists of, without the values."""
    parts = {path: part.state_dict() for path, _, part in adapters(model, name)}
    shapes = [
        (path, key, [*value.shape]) for path, part in parts.items() for key, value in part.items()
    ]
    return [name, need_adapters(model, name).configs[name].to_dict(), shapes]


def _mark(content: Mapping[str, Any]) -> str:
    """A hash of all that the folder will hold, but for the provenance."""
    tensors = {
        key: digest(tensor)
        for part in ("tensors", "parameters")
        for key, tensor in content[part].items()
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
    """The labels of a classifier of transformers, in the order of its outputs; None of any other
    model, whose config has two as well."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or not base_class(model).__name__.endswith("Classification"):
        return None
    return [str(names[number]) for number in sorted(names)]


def _content(
    model: nn.Module, name: str, base_name: str | None, fingerprints: Mapping[str, str] | None
) -> dict[str, Any]:
    config = need_adapters(model, name).configs[name]
    if VARIANTS[config.variant].peft is None:
        raise AdapterError(
            f"variant {config.variant!r}", "one that PEFT's format can express", "merge it instead"
        )
    names = Names(model)
    peft_form = peft_entries(names, name)
    # merged weights have no name
    if base_name is None and need_adapters(model).selections[name].on is None:
        base_name = base_name_of(model)
    weights = {
        parameter_path(at, weight): (weight_of(module, weight), change)
        for at, module, weight, change in changes(model, name)
    }
    exact = {id(entry.change): entry.exact for entry in peft_form}
    return {
        "tensors": {**tensors_of(model, name, peft_form), **token_rows.tensors_of(names, name)},
        "peft_config": (
            peft_config(names, name, config, base_name, peft_form)
            | token_rows.config_fields(names, name)
        ),
        "base": {
            "name": base_name,
            "architecture": base_class(model).__name__,
            **({} if (labels := labels_of(model)) is None else {"labels": labels}),
            **({} if (quantised := quantization_in(model)) is None else {"quantized": quantised}),
            **_proof(names, name, weights, fingerprints),
        },
        "changes": {at: _described(change) for at, (_, change) in weights.items()},
        "config": config,
        "parameters": {
            f"{at}.{key}": written(value)
            for at, (_, change) in weights.items()
            if not exact.get(id(change), True)
            for key, value in change.adapter_parameters.items()
            if key not in change.variant.derived or not _derived(change)
        },
    }


def _proof(
    names: Names,
    name: str,
    weights: Mapping[str, tuple[Any, Change]],
    fingerprints: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The fingerprints of all that the adapted model computes with, and what of it no checkpoint
    ever held. ``weights``: what it changes at a low rank, by path."""
    model, tensors = names.model, list_weights(names)
    by_identity = {id(tensor.weight): tensor for tensor in tensors}
    replaced = {
        id({**module._parameters, **module._buffers}[key])
        for _, module, part in adapters(model, name)
        for key in (*part.full._parameters, *part.full._buffers)
    }
    # in its new rows
    held = {id(weight) for weight, change in weights.values() if change.tokens is not None}
    lost = {key: ref for key, ref in fresh_parameters(names).items() if key not in replaced | held}
    warn_fresh(lost.values(), "As the adapter is saved", stacklevel=5)
    # a base model's own output does not need its pooler, and nobody uses a random one
    gone = unkept(model, name) if fingerprints is None else frozenset()
    left_out = replaced.union(gone, () if has_head(model) else lost)

    def of(tensors: Sequence[ModuleWeight]) -> Sequence[str | None]:
        if fingerprints is not None:
            return [
                next((fingerprints[at] for at in tensor.names if at in fingerprints), None)
                for tensor in tensors
            ]
        sources = sources_of(model)
        return [sources.get(own, own) for own in fingerprints_of(tensors, kept_bits(model, name))]

    unknown = [at for at, (held, _) in weights.items() if id(held) in gone]
    if unknown:
        problem = (
            f"{listing(unknown)}, merged with keep=False, of which nobody knows what the base was"
        )
        raise AdapterError(
            problem, "the base's weights, for its fingerprint", "save it before that merge"
        )
    record = record_of(
        tensors, {at: by_identity[id(held)] for at, (held, _) in weights.items()}, left_out, of
    )
    for at, (held, change) in weights.items() if fingerprints is None else ():
        # whose rows are the adapter's: the base's there are no part of what it needs
        if change.tokens is not None:
            ids = change.tokens.tolist()
            record["weights"][at] = fingerprint_beside(
                by_identity[id(held)], ids, kept_bits(model, name)
            )
    return {
        **record,
        **({"fresh": [parameter_path(*ref) for ref in lost.values()]} if lost else {}),
    }


def install_from(
    model: nn.Module, path: str | Path, name: str, *, trainable: bool, verify_base: bool, of_weights: bool = False,
    untie: bool | None = None, grow: bool = False,
) -> None:  # fmt: skip
    """What ``veneer.load`` does: verify the folder against the model, then install it.

    ``of_weights`` says that the changes are those of weights also where no record says it: they
    came from a format that means weights, so that it does not matter where PEFT would compute
    something else. ``untie``: whether the names of a tied weight that the folder changes apart get
    weights of their own (``ties.untie_for``). ``grow``: let the vocabulary of the model grow first,
    as that of the adapter's base did.
    """
    with token_rows.grown(model, path) if grow else nullcontext():
        untied = untie_for(model, path, untie)
        try:
            found = list(name_problems(model, name))
            load_plan = match(model, path, found, verify_base=verify_base, of_weights=of_weights)
            install(
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
    load_plan.fill({at: part for at, _, part in adapters(model, name)})


def _derived(change: Change) -> bool:
    """Whether the parameters that no file needs are those which the sizes give: PEFT's VeRA has
    others."""
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


def _described(change: Change) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kind": change.layer.name,
        "rank": change.rank,
        "alpha": change.alpha,
    }
    described |= {"module_only": True} if change.module_only else {}
    if change.rows is not None:
        described["rows"] = ranges_of(change.rows.tolist())
    if change.tokens is not None:
        # of the weight as it lies
        rows = change.dims.in_ if change.layer.out_axis else change.dims.out
        described |= {"tokens": ranges_of(change.tokens.tolist()), "of": rows}
    return described
