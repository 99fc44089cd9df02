"""Write an adapter folder that is computed from other adapter folders, without a model, as
``compose`` and ``convert`` do.

The new folder has a record if each source folder has one: with the fingerprints of their common
base and the weights that they change. If another library wrote a source, which then has no record,
the new folder has no record either. If a source's record covers the adapted weights of the base
only, so does the new record.
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
    """Write an adapter folder with the changes ``low`` and the parameters ``full``.

    Args:
        sources: the adapters that the new one was computed from, at least one. The first source
            gives the config.
        low: the low-rank changes by path in PEFT's file, as ``PeftLayer.with_low_rank`` makes them,
            with ``extras`` if ``variant`` needs them.
        full: the parameters that are trained in full, by path in PEFT's file and then by name.
        variant: "lora" or "dora".

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: a value is not finite, a change is absurdly large, or there is no change.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    path, full = Path(path), full or {}
    if not low and not full:
        raise AdapterError("no change at all", "at least one", "check what was left out")
    # ``read`` would refuse a folder with changes that overflow
    raise_all(AdapterError, f"{path} was not written", list(change_problems(low)))
    tensors = _file_tensors(low, full)
    peft_config = _peft_config(sources, low, full, variant)
    base_record = common_base_record(sources)
    changes = None if base_record is None else _recorded_changes(sources, low)
    first_config = sources[0].config
    # keep the training dtype in the config only if all new tensors have it
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
    """The tensors of the adapter's file by their keys in PEFT's layout."""
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
        # PEFT's wrapper of an adapted module holds the module as ``base_layer``
        tensor_path = (
            f"{path_in_file}.base_layer".lstrip(".") if path_in_file in low else path_in_file
        )
        for name, tensor in parameters.items():
            tensors[peft.tensor_key(tensor_path, name)] = file_tensor(tensor)
    return tensors


def _narrow_base(
    base: Mapping[str, Any], changes: Mapping[str, Any], full: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The field "base" of a record, with only the weights in ``changes`` in its "weights". The
    fingerprints of other weights move to "rest", except for tensors that are trained in full."""
    full_names = {
        f"{peft_paths.strip_wrappers(path_in_file)[0]}.{name}".lstrip(".")
        for path_in_file, tensors in full.items()
        for name in tensors
    }
    narrowed_record = dict(base)
    narrowed_record["weights"] = {
        weight_path: base["weights"][weight_path] for weight_path in changes
    }
    if "rest" in base:
        narrowed_record["rest"] = {
            name: fingerprint
            for name, fingerprint in recorded_fingerprints(base).items()
            if name not in {*changes, *full_names}
        }
        if fresh := [name for name in narrowed_record.pop("fresh", ()) if name not in full_names]:
            narrowed_record["fresh"] = fresh
    return narrowed_record


def common_base_record(sources: Sequence[AdapterFiles]) -> dict[str, Any] | None:
    """The field "base" for the record of a new adapter, with the fingerprints of all its sources;
    None if a source has no record. It has "rest" if every source's record has "rest".

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: the records have fingerprints by different hashes, which cannot be compared.
    """
    if any(source.record is None for source in sources):
        return None
    base_records = [source.metadata["base"] for source in sources]
    sha_paths = [
        source.path
        for source, base_record in zip(sources, base_records, strict=True)
        if recorded_hash_kind(base_record) != XXH3
    ]
    if 0 < len(sha_paths) < len(base_records):
        raise AdapterError(
            f"SHA-256 fingerprints in {listing(map(str, sha_paths))}, and XXH3 in the others",
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
    weights = {
        weight_path: digest
        for base_record in base_records
        for weight_path, digest in base_record["weights"].items()
    }
    merged_record = {
        key: value for key, value in base_records[0].items() if key not in ("rest", "fresh")
    } | {"weights": weights}
    if all("rest" in base_record for base_record in base_records):
        merged_record["rest"] = {
            name: digest for name, digest in fingerprints_by_name.items() if name not in weights
        }
        fresh = list(
            dict.fromkeys(
                name for base_record in base_records for name in base_record.get("fresh", ())
            )
        )
        merged_record |= {"fresh": fresh} if fresh else {}
    return merged_record


def _recorded_changes(
    sources: Sequence[AdapterFiles], low: Mapping[str, peft.PeftLayer]
) -> dict[str, Any]:
    """The field "changes" for the record of a new adapter, by weight, from its sources' records."""
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
    """The config of the new adapter in PEFT's fields."""
    configs = [source.peft_config for source in sources]
    ranks_and_alphas = {
        peft.pattern_of(path, layer): (layer.rank, layer.alpha) for path, layer in low.items()
    }
    parameters = list(
        dict.fromkeys(
            layer.target_path for path, layer in low.items() if peft.targets_parameter(path, layer)
        )
    )
    targets = [
        layer.target_path for path, layer in low.items() if not peft.targets_parameter(path, layer)
    ]
    target_lists = [config.get("target_modules") for config in configs]
    has_name_lists = all(isinstance(names, list) for names in target_lists) and not any(
        config.get("exclude_modules") or config.get("layers_to_transform") is not None
        for config in configs
    )
    target_names = (
        sorted({name for names in target_lists for name in names or ()}) if has_name_lists else []
    )
    source_targets = {
        layer.target_path
        for source in sources
        for path, layer in source.low.items()
        if not peft.targets_parameter(path, layer)
    }
    target_modules = (
        target_names if target_names and source_targets == set(targets) else sorted(set(targets))
    )
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
        fields, ranks_and_alphas, (configs[0]["r"], configs[0]["lora_alpha"]), parameters
    )
