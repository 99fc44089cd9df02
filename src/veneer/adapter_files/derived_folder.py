"""Write an adapter that is derived from other adapters, without a model (``compose``, ``convert``).

    sources: the source adapters    low: path in PEFT's file -> PeftLayer    full: path -> tensors

The result inherits the record of its sources: the fingerprints of their common base and the weights
that they change. If a source has no record, because another library wrote it, the result has none.
If a record covers the adapted layers only, so does the record of the result.
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
    """Write an adapter folder with these changes.

    Args:
        sources: at least one adapter; the first gives the config.
        low: the changes (``PeftLayer.with_low`` makes them), with ``extras`` if ``variant`` has
            any.
        full: parameters that are trained in full, by path and name.
        variant: "lora" or "dora".

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: a number is not finite, a change is absurdly large, or there is no change.
        OutputExistsError: the path exists and ``overwrite`` is False.
    """
    path, full = Path(path), full or {}
    if not low and not full:
        raise AdapterError("no change at all", "at least one", "check what was left out")
    # ``read`` would refuse such a folder
    raise_all(AdapterError, f"{path} was not written", list(change_problems(low)))
    tensors = _file_tensors(low, full)
    config = _config(sources, low, full, variant)
    base = merged_base(sources)
    changes = None if base is None else _changes(sources, low)
    first = sources[0].config
    ranks = [layer.rank for layer in low.values()] or [first.rank]
    # keep the dtype of the training only if the new tensors have it
    keep_dtype = first.dtype is not None and all(
        t.dtype == getattr(torch, str(first.dtype)) for t in tensors.values()
    )
    targets = tuple(dict.fromkeys(layer.target_path for layer in low.values())) or "all"
    new_config = replace(
        first,
        variant=variant,
        rank=max(ranks),
        alpha=float(config["lora_alpha"]),
        dropout=0.0,
        ranks={},
        alphas={},
        slices={},
        layers=None,
        exclude=(),
        targets=targets,
        dtype=first.dtype if keep_dtype else None,
    )
    if base is not None:
        base = _narrow_base(base, changes or {}, full)
    write(
        path,
        tensors,
        config,
        base=base,
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
        inner = f"{path_in_file}.base_layer".lstrip(".") if path_in_file in low else path_in_file
        for name, tensor in parameters.items():
            tensors[peft.tensor_key(inner, name)] = file_tensor(tensor)
    return tensors


def _narrow_base(
    base: Mapping[str, Any], changes: Mapping[str, Any], full: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The record's "base" for the remaining changes. Weights whose change was dropped return to
    "rest"; tensors that are trained in full do not."""
    trained = {
        f"{peft_paths.strip_wrappers(path_in_file)[0]}.{name}".lstrip(".")
        for path_in_file, tensors in full.items()
        for name in tensors
    }
    narrowed = dict(base)
    narrowed["weights"] = {weight_path: base["weights"][weight_path] for weight_path in changes}
    if "rest" in base:
        narrowed["rest"] = {
            name: fingerprint
            for name, fingerprint in recorded_fingerprints(base).items()
            if name not in {*changes, *trained}
        }
        if fresh := [name for name in narrowed.pop("fresh", ()) if name not in trained]:
            narrowed["fresh"] = fresh
    return narrowed


def merged_base(sources: Sequence[AdapterFiles]) -> dict[str, Any] | None:
    """The base of the sources' records, with the fingerprints of all of them; None if a source has
    no record. "rest" is in the result if all records have it.

    Raises:
        BaseMismatchError: the sources were trained on different bases.
        AdapterError: their fingerprints are of different kinds and cannot be compared.
    """
    if any(source.record is None for source in sources):
        return None
    bases = [source.metadata["base"] for source in sources]
    sha_paths = [
        source.path
        for source, base in zip(sources, bases, strict=True)
        if recorded_hash_kind(base) != XXH3
    ]
    if 0 < len(sha_paths) < len(bases):
        problem = f"SHA-256 fingerprints in {listing(map(str, sha_paths))}, and XXH3 in the others"
        do = "load and save those of an earlier Veneer again, on their base"
        raise AdapterError(problem, "fingerprints of one kind, which can be compared", do)
    fingerprints_by_name: dict[str, str] = {}
    for source, base in zip(sources, bases, strict=True):
        fingerprints = recorded_fingerprints(base)
        differ = [
            name
            for name, print_ in fingerprints.items()
            if fingerprints_by_name.get(name, print_) != print_
        ]
        if differ:
            problem = (
                f"{sources[0].path} and {source.path}, made for different bases"
                f" ({listing(differ, 3)})"
            )
            raise BaseMismatchError(problem, "adapters of one base", "leave one of them out")
        fingerprints_by_name |= fingerprints
    weights = {
        weight_path: print_ for base in bases for weight_path, print_ in base["weights"].items()
    }
    shared_record = {
        key: value for key, value in bases[0].items() if key not in ("rest", "fresh")
    } | {"weights": weights}
    if all("rest" in base for base in bases):
        shared_record["rest"] = {
            name: print_ for name, print_ in fingerprints_by_name.items() if name not in weights
        }
        fresh = list(dict.fromkeys(name for base in bases for name in base.get("fresh", ())))
        shared_record |= {"fresh": fresh} if fresh else {}
    return shared_record


def _changes(sources: Sequence[AdapterFiles], low: Mapping[str, peft.PeftLayer]) -> dict[str, Any]:
    """The record's "changes" of the new adapter, by weight, from those of its sources."""
    layers = {layer.target_path: layer for layer in low.values()}
    changes: dict[str, Any] = {}
    for source in sources:
        for weight, change in source.metadata["changes"].items():
            layer = layers.get(weight) or layers.get(weight.rpartition(".")[0])
            if layer is None:
                continue
            recorded = changes.get(weight, change)
            if recorded.get("module_only", False) != change.get("module_only", False):
                problem = (
                    f"a change of {weight!r} that some of them, as PEFT does, make to the output of"
                    " its module alone"
                )
                raise AdapterError(
                    problem, "changes of one kind", "leave those out, or compose the others"
                )
            same = {
                key: change[key]
                for key in ("kind", "rows", "module_only")
                if key in change and recorded.get(key) == change[key]
            }
            changes[weight] = {"rank": layer.rank, "alpha": layer.alpha, **same}
    return changes


def _config(
    sources: Sequence[AdapterFiles],
    low: Mapping[str, peft.PeftLayer],
    full: Mapping[str, Mapping[str, Tensor]],
    variant: str,
) -> dict[str, Any]:
    """PEFT's config of the new adapter."""
    configs = [source.peft_config for source in sources]
    sizes = {peft.pattern_of(path, layer): (layer.rank, layer.alpha) for path, layer in low.items()}
    parameters = list(
        dict.fromkeys(
            layer.target_path for path, layer in low.items() if peft.targets_parameter(path, layer)
        )
    )
    targets = [
        layer.target_path for path, layer in low.items() if not peft.targets_parameter(path, layer)
    ]
    target_lists = [config.get("target_modules") for config in configs]
    simple = all(isinstance(names, list) for names in target_lists) and not any(
        config.get("exclude_modules") or config.get("layers_to_transform") is not None
        for config in configs
    )
    union = sorted({name for names in target_lists for name in names or ()}) if simple else []
    module_targets = {
        layer.target_path
        for source in sources
        for path, layer in source.low.items()
        if not peft.targets_parameter(path, layer)
    }
    target_modules = union if union and module_targets == set(targets) else sorted(set(targets))
    types = [str(config.get("peft_type")) for config in configs]
    invocation = configs[0].get("alora_invocation_tokens")
    modules = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    biases = [config.get("bias") or "none" for config in configs]
    fields = {
        "peft_type": next((name for name in types if name.startswith(peft.NOT_FOR_PEFT)), types[0]),
        "task_type": configs[0].get("task_type"),
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "lora_dropout": 0.0,
        "target_modules": target_modules if low else peft.NO_TARGETS,
        "modules_to_save": modules or None,
        "bias": next((bias for bias in ("all", "lora_only") if bias in biases and full), "none"),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        **({"use_dora": True} if variant == "dora" else {}),
        **({"alora_invocation_tokens": invocation} if invocation else {}),
    }
    return config_fields(fields, sizes, (configs[0]["r"], configs[0]["lora_alpha"]), parameters)
