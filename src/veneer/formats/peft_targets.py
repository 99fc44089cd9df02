"""The tensors of a folder that PEFT applies.

PEFT wraps the modules that the config matches, and ignores the tensors of all others. A folder
whose ``target_modules``, ``exclude_modules`` or ``layers_to_transform`` was narrowed by hand is
therefore a smaller adapter. Rejected: to refuse it, because PEFT loads it, and a config is easier
to edit than a file of tensors; to apply every tensor, because PEFT does not. A warning names the
ignored tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, listing
from veneer.formats import peft, peft_paths, peft_tokens
from veneer.formats.peft_tuners import PROJECTIONS, tuner_of

#: the fields that narrow LoRA's targets, and those that other types of tuners lack, so that PEFT
#: ignores them
_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_LACKED = {"VERA": _FIELDS[:1], "LN_TUNING": _FIELDS[1:3], peft_tokens.TYPE: _FIELDS}


class TensorsLeftOut(UserWarning):
    """A folder holds tensors of modules that its config does not match; the adapter does not
    include them."""


def left_out(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor | None], suffixes: Iterable[str]
) -> dict[str, list[str]]:
    """The keys of tensors that PEFT ignores, by the path of their module. An expression that is not
    evaluated matches everything.

    Args:
        tensors: by key; None for a tensor of which only the key is known.
        suffixes: of LoRA's tensors; other tuners have their own.
    """
    by_module: dict[str, list[str]] = {}
    for key in tensors:
        path = _module_of(key, config, suffixes)
        if path is not None and not _means_parameter(config, path):
            by_module.setdefault(path, []).append(key)
    config = {**config, **dict.fromkeys(_LACKED.get(str(config.get("peft_type")), ()))}
    if config.get("target_modules") == "all-linear":
        config["target_modules"] = ".*"
    # PEFT adapts the out-projection of an attention together with it, whatever its name
    names = {
        path: {
            peft_paths.strip_wrappers(name)[0]
            for name in (path, peft_paths.attention_of(path) or path)
        }
        for path in by_module
    }
    expected = peft_paths.expected_paths(config, set().union(*names.values()))
    if expected is None:
        return {}
    inside = [key for path, keys in by_module.items() for key in keys if names[path] & expected]
    outside: dict[str, list[str]] = {}
    for path, keys in by_module.items():
        if names[path] & expected or (
            config.get("ensure_weight_tying") and _are_tied(keys, inside, tensors)
        ):
            continue
        below = (  # a trained bias of the layer, or an embedding's frozen weight
            f"{peft.PREFIX}{path}.base_layer."
        )
        keys += [
            key for key in tensors if key.startswith(below) and "." not in key.removeprefix(below)
        ]
        outside.setdefault(peft_paths.strip_wrappers(path)[0], []).extend(keys)
    return outside


def _are_tied(
    keys: Iterable[str], adapted_keys: Iterable[str], tensors: Mapping[str, Tensor | None]
) -> bool:
    """Whether the factors at ``keys`` equal those of another module, as they are or transposed:
    PEFT also adapts a module whose weight is tied to a target's. True if the factors are not
    known."""

    def alike(factor: Tensor | None, adapted: Tensor | None) -> bool:
        if factor is None or adapted is None:
            return True
        turned = adapted.mT if adapted.dim() == 2 else adapted
        return any(torch.equal(factor, value) for value in (adapted, turned))

    factors = (tensors[key] for key in keys if not key.endswith(peft.MAGNITUDE))
    return all(
        any(alike(factor, tensors[adapted_key]) for adapted_key in adapted_keys)
        for factor in factors
    )


def applied_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], suffixes: Iterable[str]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """(the tensors that PEFT applies, the modules that the config does not match).
    ``AdapterError``: it matches no module, or requires modules in full that the file does not
    hold."""
    suffixes = tuple(suffixes)
    modules = left_out(config, tensors, suffixes)
    if not modules:
        return tensors, ()
    if (
        full := modules.keys()
        - left_out({**config, "modules_to_save": None}, tensors, suffixes).keys()
    ):
        problem = (
            f"low-rank changes of {listing(sorted(full), 3)}, which modules_to_save in"
            f" {peft.CONFIG} names"
        )
        raise AdapterError(
            problem, "these modules in full", "correct modules_to_save, or get both files again"
        )
    outside = {key for keys in modules.values() for key in keys}
    rest = {key: tensor for key, tensor in tensors.items() if key not in outside}
    if rest.keys() <= {*PROJECTIONS}:
        problem = (
            f"no tensor of {len(tensors)} for what {peft.CONFIG} means: they are of"
            f" {listing(modules, 3)}"
        )
        fields = "target_modules, exclude_modules and layers_to_transform"
        raise AdapterError(
            problem, "tensors of its targets", f"correct {fields}, or get both files again"
        )
    return rest, tuple(sorted(modules))


def describe(modules: Iterable[str]) -> str:
    """A sentence that names the ignored modules."""
    modules = list(modules)
    count = (
        f"tensors of {len(modules)} modules that {peft.CONFIG} leaves out ({listing(modules, 3)})"
    )
    return f"{count}: they are no part of the adapter, as in PEFT"


def _module_of(key: str, config: Mapping[str, Any], suffixes: Iterable[str]) -> str | None:
    """The path in the file of the module that a tensor adapts, or None for any other tensor."""
    bare, tuner = key.removeprefix(peft.PREFIX), tuner_of(config)
    if bare == key:
        return None
    # without targets, PEFT takes the input embedding
    if config.get("peft_type") == peft_tokens.TYPE:
        suffixes = (peft_tokens.ALONE,) if config.get("target_modules") else ()
    elif tuner is not None and not tuner.needs:
        above, _, suffix = bare.rpartition(".")
        bare, suffixes = above if suffix else bare, tuner.suffixes
    elif tuner is not None:
        suffixes = tuner.suffixes
    end = next((suffix for suffix in suffixes if bare.endswith(f".{suffix}")), None)
    return None if end is None else bare.removesuffix(f".{end}")


def _means_parameter(config: Mapping[str, Any], path: str) -> bool:
    """Whether ``target_parameters`` may match a parameter of the module at a path of the file."""
    bare = peft_paths.strip_wrappers(path)[0]
    above = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    return any(not end or bare == end or bare.endswith(f".{end}") for end in above)
