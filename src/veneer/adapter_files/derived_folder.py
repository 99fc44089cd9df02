"""Write an adapter folder that is computed from other adapter folders, without a model, as
``compose`` and ``convert`` do.

The record of an adapter folder (``record.py``) describes the adapter and holds fingerprints of its
base. The new folder has a record if each source folder has one; it then holds the fingerprints of
the sources' common base. A source that another library wrote has no record, and neither has the new
folder then. If the record of a source has fingerprints of the adapted weights only, so has the new
record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles, write
from veneer.adapter_files.number_checks import change_problems
from veneer.adapter_files.peft_mapping import config_fields, file_tensor
from veneer.errors import AdapterError, BaseMismatchError, listing, raise_all
from veneer.fileio.hashing import XXH3, recorded_fingerprints, recorded_hash_kind
from veneer.formats import peft, peft_paths


def write_derived(
    path: str | Path,
    sources: Sequence[AdapterFiles],
    low: Mapping[str, peft.PeftLayer],
    full: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    variant: str = "lora",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter folder with the changes ``low`` and the parameters ``full``. Returns its
    path.

    Args:
        sources: the adapters that the new one was computed from, at least one. Settings of the new
            config that do not follow from the changes are those of the first source.
        low: the low-rank changes by path in PEFT's file, as ``PeftLayer.with_low_rank`` makes them.
            For "dora", their ``extras`` hold the magnitudes.
        full: the parameters that are trained in full, by path in PEFT's file and then by name.
        variant: "lora" or "dora".
        provenance: facts about the new adapter for its record, as JSON values.
        overwrite: whether to replace the adapter in an existing folder.

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: a value is not finite, a change is absurdly large, there is no change, or the
            records of the sources cannot be combined.
        OutputExistsError: the path exists and ``overwrite`` is False, or holds a complete model.
    """
    path, full = Path(path), full or {}
    if not low and not full:
        raise AdapterError("no change at all", "at least one", "check what was left out")
    # do not write changes so large that they overflow: ``read`` would refuse the folder
    raise_all(AdapterError, f"{path} was not written", list(change_problems(low)))
    tensors = _file_tensors(low, full)
    peft_config = _peft_config(sources, low, full, variant)
    base_record = common_base_record(sources)
    changes = None if base_record is None else _recorded_changes(sources, low)
    first_config = sources[0].config
    # the new config keeps the source's dtype of parameters only if all new tensors have it
    keeps_dtype = first_config.dtype is not None and all(
        tensor.dtype == getattr(torch, str(first_config.dtype)) for tensor in tensors.values()
    )
    new_config = replace(
        first_config,
        variant=variant,
        rank=max((layer.rank for layer in low.values()), default=first_config.rank),
        alpha=float(peft_config["lora_alpha"]),
        dropout=0.0,
        ranks={},
        alphas={},
        slices={},
        layers=None,
        exclude=(),
        targets=tuple(dict.fromkeys(layer.target_path for layer in low.values())) or "all",
        dtype=first_config.dtype if keeps_dtype else None,
    )
    if base_record is not None:
        base_record = _narrow_base(base_record, changes or {}, full)
    write(
        path,
        tensors,
        peft_config,
        base=base_record,
        changes=changes,
        config=new_config,
        provenance=provenance or {},
        overwrite=overwrite,
        parameters={},
    )
    return path


def _file_tensors(
    low: Mapping[str, peft.PeftLayer], full: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors by key: A, B and ``extras`` of the low-rank changes,
    and the parameters ``full`` that are trained in full."""
    tensors = {
        peft.tensor_key(path_in_file, suffix): file_tensor(tensor)
        for path_in_file, layer in low.items()
        for suffix, tensor in (
            (layer.suffixes[0], layer.A),
            (layer.suffixes[1], layer.B),
            *layer.extras.items(),
        )
    }
    for path_in_file, parameters in full.items():
        # PEFT's wrapper of an adapted module holds the module as ``base_layer``, so this name is
        # part of the keys of the module's own parameters
        tensor_path = (
            f"{path_in_file}.base_layer".lstrip(".") if path_in_file in low else path_in_file
        )
        for name, tensor in parameters.items():
            tensors[peft.tensor_key(tensor_path, name)] = file_tensor(tensor)
    return tensors


def _narrow_base(
    base_record: Mapping[str, Any],
    changes: Mapping[str, Any],
    full: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """The entry "base" of the new record, from ``base_record``, the entry for all sources together.

    In the result, "weights" has the fingerprints of the weights in ``changes`` alone, by path. If
    there is a "rest", those of all other tensors are in it, without the tensors ``full``: these are
    trained in full, so their values in the base do not matter.
    """
    full_tensor_names = {
        f"{peft_paths.strip_wrappers(path_in_file)[0]}.{name}".lstrip(".")
        for path_in_file, tensors in full.items()
        for name in tensors
    }
    narrowed_record = dict(base_record)
    narrowed_record["weights"] = {
        weight_path: base_record["weights"][weight_path] for weight_path in changes
    }
    if "rest" in base_record:
        narrowed_record["rest"] = {
            name: fingerprint
            for name, fingerprint in recorded_fingerprints(base_record).items()
            if name not in {*changes, *full_tensor_names}
        }
        if fresh := [
            name for name in narrowed_record.pop("fresh", ()) if name not in full_tensor_names
        ]:
            narrowed_record["fresh"] = fresh
    return narrowed_record


def common_base_record(sources: Sequence[AdapterFiles]) -> dict[str, Any] | None:
    """The entry "base" for the record of a new adapter, with the fingerprints of all its sources;
    None if a source has no record. It has "rest", the fingerprints of the weights that no source
    changes, if the record of every source has "rest".

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: the records have fingerprints by different hashes, which cannot be compared.
    """
    if any(source.record is None for source in sources):
        return None
    base_records = [source.metadata["base"] for source in sources]
    sha256_paths = [
        source.path
        for source, base_record in zip(sources, base_records, strict=True)
        if recorded_hash_kind(base_record) != XXH3
    ]
    if 0 < len(sha256_paths) < len(base_records):
        raise AdapterError(
            f"SHA-256 fingerprints in {listing(map(str, sha256_paths))}, and XXH3 in the others",
            "fingerprints of one kind, which can be compared",
            "load and save those of an earlier Veneer again, on their base",
        )
    fingerprints_by_name: dict[str, str] = {}
    for source, base_record in zip(sources, base_records, strict=True):
        fingerprints = recorded_fingerprints(base_record)
        conflicting_names = [
            name
            for name, digest in fingerprints.items()
            if fingerprints_by_name.get(name, digest) != digest
        ]
        if conflicting_names:
            raise BaseMismatchError(
                f"{sources[0].path} and {source.path}, made for different bases"
                f" ({listing(conflicting_names, 3)})",
                "adapters of one base",
                "leave one of them out",
            )
        fingerprints_by_name |= fingerprints
    weight_fingerprints = {
        weight_path: digest
        for base_record in base_records
        for weight_path, digest in base_record["weights"].items()
    }
    merged_record = {
        key: value for key, value in base_records[0].items() if key not in ("rest", "fresh")
    } | {"weights": weight_fingerprints}
    if all("rest" in base_record for base_record in base_records):
        merged_record["rest"] = {
            name: digest
            for name, digest in fingerprints_by_name.items()
            if name not in weight_fingerprints
        }
        fresh_names = list(
            dict.fromkeys(
                name for base_record in base_records for name in base_record.get("fresh", ())
            )
        )
        merged_record |= {"fresh": fresh_names} if fresh_names else {}
    return merged_record


def _recorded_changes(
    sources: Sequence[AdapterFiles], low: Mapping[str, peft.PeftLayer]
) -> dict[str, Any]:
    """The entry "changes" for the record of a new adapter: {weight path: {"rank": …, "alpha": …}}.
    Other settings of a weight, such as its changed rows, are kept if all sources that change the
    weight agree on them. AdapterError: some sources change the weight itself, and others only the
    output of its module, as PEFT does ("module_only")."""
    layers = {layer.target_path: layer for layer in low.values()}
    changes: dict[str, Any] = {}
    for source in sources:
        for weight_path, change in source.metadata["changes"].items():
            layer = layers.get(weight_path) or layers.get(weight_path.rpartition(".")[0])
            if layer is None:
                continue
            earlier_change = changes.get(weight_path, change)
            if earlier_change.get("module_only", False) != change.get("module_only", False):
                raise AdapterError(
                    f"a change of {weight_path!r} that some of them, as PEFT does, make to the"
                    " output of its module alone",
                    "changes of one kind",
                    "leave those out, or compose the others",
                )
            shared_fields = {
                key: change[key]
                for key in ("kind", "rows", "module_only")
                if key in change and earlier_change.get(key) == change[key]
            }
            changes[weight_path] = {"rank": layer.rank, "alpha": layer.alpha, **shared_fields}
    return changes


def _peft_config(
    sources: Sequence[AdapterFiles],
    low: Mapping[str, peft.PeftLayer],
    full: Mapping[str, Mapping[str, Tensor]],
    variant: str,
) -> dict[str, Any]:
    """The fields of adapter_config.json for the new adapter. Its targets are the names that the
    sources' configs list, if these match the changed modules alone; else the modules' full paths.
    """
    configs = [source.peft_config for source in sources]
    ranks_and_alphas = {
        peft.pattern_of(path, layer): (layer.rank, layer.alpha) for path, layer in low.items()
    }
    parameter_paths = list(
        dict.fromkeys(
            layer.target_path for path, layer in low.items() if peft.targets_parameter(path, layer)
        )
    )
    target_paths = {
        layer.target_path for path, layer in low.items() if not peft.targets_parameter(path, layer)
    }
    target_lists = [config.get("target_modules") for config in configs]
    # with ensure_weight_tying, PEFT also adapts modules that no name in target_modules matches
    has_name_lists = all(isinstance(names, list) for names in target_lists) and not any(
        config.get("exclude_modules")
        or config.get("layers_to_transform") is not None
        or config.get("ensure_weight_tying")
        for config in configs
    )
    target_names = {name for names in target_lists for name in names or ()}
    source_targets = {
        layer.target_path
        for source in sources
        for path, layer in source.low.items()
        if not peft.targets_parameter(path, layer)
    }
    keeps_names = has_name_lists and target_names and source_targets == target_paths
    target_modules = sorted(target_names if keeps_names else target_paths)
    peft_types = [str(config.get("peft_type")) for config in configs]
    invocation_tokens = configs[0].get("alora_invocation_tokens")
    biases = [config.get("bias") or "none" for config in configs]
    fields = {
        "peft_type": next(
            (name for name in peft_types if name.startswith(peft.NOT_FOR_PEFT)), peft_types[0]
        ),
        "task_type": configs[0].get("task_type"),
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "lora_dropout": 0.0,
        "target_modules": target_modules if low else peft.NO_TARGETS,
        "modules_to_save": sorted(
            {name for config in configs for name in config.get("modules_to_save") or ()}
        )
        or None,
        "bias": next((bias for bias in ("all", "lora_only") if bias in biases and full), "none"),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        **({"use_dora": True} if variant == "dora" else {}),
        **({"alora_invocation_tokens": invocation_tokens} if invocation_tokens else {}),
    }
    return config_fields(
        fields, ranks_and_alphas, (configs[0]["r"], configs[0]["lora_alpha"]), parameter_paths
    )
