"""Adapters made of other adapters, without a model: what ``compose`` and ``convert`` write.

    sources: the adapters that it came from        low: path in PEFT's file -> PeftLayer        full: path -> tensors

What the sources prove goes over to the result: the fingerprints of their base, which must be one
base, and the weights that they change. Where a source proves nothing, as another library wrote it,
the result proves nothing either; where one knows of adapted layers alone, so does the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles, odd_changes, write
from veneer.adapter_files.peft_mapping import config_fields, written
from veneer.errors import AdapterError, BaseMismatchError, listing, raise_all
from veneer.fileio.hashing import XXH3, kind_in, prints_in
from veneer.formats import peft


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
    """Write an adapter folder with these changes. ``sources``: at least one; the first lends its
    config. ``low``: the changes (``PeftLayer.with_low`` makes them; with ``extras`` where
    ``variant`` has some). ``full``: parameters that are trained in full, by path and name.
    ``variant``: "lora" or "dora". ``BaseMismatchError``: the sources were made for different bases.
    ``AdapterError``: a number is not finite or a change absurdly large, or nothing is left.
    ``OutputExistsError``: the path exists and ``overwrite`` is False."""
    path, full = Path(path), full or {}
    if not low and not full:
        raise AdapterError("no change at all", "at least one", "check what was left out")
    # ``read`` would refuse it
    raise_all(AdapterError, f"{path} was not written", list(odd_changes(low)))
    tensors = {
        peft.key(at, suffix): written(tensor)
        for at, layer in low.items()
        for suffix, tensor in (
            (layer.suffixes[0], layer.A),
            (layer.suffixes[1], layer.B),
            *layer.extras.items(),
        )
    }
    for at, parameters in full.items():
        # what is trained in full stands below the wrapper of an adapted module
        inside = f"{at}.base_layer".lstrip(".") if at in low else at
        tensors |= {peft.key(inside, name): written(tensor) for name, tensor in parameters.items()}
    config = _config(sources, low, full, variant)
    base = merged_base(sources)
    changes = None if base is None else _changes(sources, low)
    first = sources[0].config
    ranks = [layer.rank for layer in low.values()] or [first.rank]
    # what the numbers were trained in says nothing of the new ones, unless they are in it
    kept = first.dtype is not None and all(
        t.dtype == getattr(torch, str(first.dtype)) for t in tensors.values()
    )
    own = replace(
        first, variant=variant, rank=max(ranks), alpha=float(config["lora_alpha"]), dropout=0.0, ranks={}, alphas={},
        slices={}, layers=None, exclude=(), targets=tuple(dict.fromkeys(layer.at for layer in low.values())) or "all",
        dtype=first.dtype if kept else None,
    )  # fmt: skip
    if base is not None:
        # what is left out is one of the rest again, what is trained in full is none
        trained = {
            f"{peft.unnested(at)[0]}.{name}".lstrip(".")
            for at, tensors in full.items()
            for name in tensors
        }
        fingerprints, changed = prints_in(base), changes or {}
        base["weights"] = {at: base["weights"][at] for at in changed}
        if "rest" in base:
            base["rest"] = {
                at: print_ for at, print_ in fingerprints.items() if at not in {*changed, *trained}
            }
            if fresh := [name for name in base.pop("fresh", ()) if name not in trained]:
                base["fresh"] = fresh
    write(
        path, tensors, config, base=base, changes=changes, config=own, provenance=provenance or {},
        overwrite=overwrite, parameters={},
    )  # fmt: skip
    return path


def merged_base(sources: Sequence[AdapterFiles]) -> dict[str, Any] | None:
    """What the sources say of their base, with the fingerprints of all of them; None where one of
    them says nothing. "rest" is there if all of them have it. ``BaseMismatchError``: they speak of
    different bases. ``AdapterError``: their fingerprints are of different kinds, so that nobody can
    tell."""
    if any(source.record is None for source in sources):
        return None
    bases = [source.metadata["base"] for source in sources]
    old = [
        source.path for source, base in zip(sources, bases, strict=True) if kind_in(base) != XXH3
    ]
    if 0 < len(old) < len(bases):
        problem = f"SHA-256 fingerprints in {listing(map(str, old))}, and XXH3 in the others"
        do = "load and save those of an earlier Veneer again, on their base"
        raise AdapterError(problem, "fingerprints of one kind, which can be compared", do)
    known: dict[str, str] = {}
    for source, base in zip(sources, bases, strict=True):
        fingerprints = prints_in(base)
        differ = [
            name for name, print_ in fingerprints.items() if known.get(name, print_) != print_
        ]
        if differ:
            problem = (
                f"{sources[0].path} and {source.path}, made for different bases"
                f" ({listing(differ, 3)})"
            )
            raise BaseMismatchError(problem, "adapters of one base", "leave one of them out")
        known |= fingerprints
    weights = {at: print_ for base in bases for at, print_ in base["weights"].items()}
    whole = {key: value for key, value in bases[0].items() if key not in ("rest", "fresh")} | {
        "weights": weights
    }
    if all("rest" in base for base in bases):
        whole["rest"] = {name: print_ for name, print_ in known.items() if name not in weights}
        fresh = list(dict.fromkeys(name for base in bases for name in base.get("fresh", ())))
        whole |= {"fresh": fresh} if fresh else {}
    return whole


def _changes(sources: Sequence[AdapterFiles], low: Mapping[str, peft.PeftLayer]) -> dict[str, Any]:
    layers = {layer.at: layer for layer in low.values()}
    changes: dict[str, Any] = {}
    for source in sources:
        for weight, said in source.metadata["changes"].items():
            layer = layers.get(weight) or layers.get(weight.rpartition(".")[0])
            if layer is None:
                continue
            known = changes.get(weight, said)
            if known.get("module_only", False) != said.get("module_only", False):
                problem = (
                    f"a change of {weight!r} that some of them make to what its module gives, as"
                    " PEFT does, alone"
                )
                raise AdapterError(
                    problem, "changes of one kind", "leave those out, or compose the others"
                )
            same = {
                key: said[key]
                for key in ("kind", "rows", "module_only")
                if key in said and known.get(key) == said[key]
            }
            changes[weight] = {"rank": layer.rank, "alpha": layer.alpha, **same}
    return changes


def _config(
    sources: Sequence[AdapterFiles],
    low: Mapping[str, peft.PeftLayer],
    full: Mapping[str, Mapping[str, Tensor]],
    variant: str,
) -> dict[str, Any]:
    configs = [source.peft_config for source in sources]
    sizes = {peft.pattern_of(path, layer): (layer.rank, layer.alpha) for path, layer in low.items()}
    parameters = list(
        dict.fromkeys(layer.at for path, layer in low.items() if peft.of_parameter(path, layer))
    )
    targets = [layer.at for path, layer in low.items() if not peft.of_parameter(path, layer)]
    said = [config.get("target_modules") for config in configs]
    simple = all(isinstance(names, list) for names in said) and not any(
        config.get("exclude_modules") or config.get("layers_to_transform") is not None
        for config in configs
    )
    union = sorted({name for names in said for name in names or ()}) if simple else []
    kept = {
        layer.at
        for source in sources
        for path, layer in source.low.items()
        if not peft.of_parameter(path, layer)
    }
    whole = union if union and kept == set(targets) else sorted(set(targets))
    types = [str(config.get("peft_type")) for config in configs]
    modules = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    biases = [config.get("bias") or "none" for config in configs]
    fields = {
        "peft_type": next((name for name in types if name.startswith(peft.NOT_FOR_PEFT)), types[0]),
        "task_type": configs[0].get("task_type"),
        "base_model_name_or_path": configs[0].get("base_model_name_or_path"),
        "lora_dropout": 0.0,
        "target_modules": whole if low else peft.NO_TARGETS,
        "modules_to_save": modules or None,
        "bias": next((bias for bias in ("all", "lora_only") if bias in biases and full), "none"),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        **({"use_dora": True} if variant == "dora" else {}),
    }
    return config_fields(fields, sizes, (configs[0]["r"], configs[0]["lora_alpha"]), parameters)
