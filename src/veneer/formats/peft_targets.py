"""Which tensors of an adapter folder PEFT applies.

PEFT wraps the modules that the config matches, and ignores the tensors of all other modules. A
folder of which a user narrowed ``target_modules``, ``exclude_modules`` or ``layers_to_transform``
by hand is therefore a smaller adapter. Veneer also ignores these tensors, with a warning that names
their modules. Rejected: to refuse the folder, because PEFT loads it, and because a config is easier
to edit than a file of tensors; to apply every tensor, because PEFT does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import AdapterError, listing
from veneer.formats import peft, peft_paths, peft_tokens
from veneer.formats.peft_tuners import PROJECTIONS, tuner_of

#: the fields of LoRA's config that narrow its targets; and, by ``peft_type``, those of them that
#: the config of another tuner lacks, so that PEFT ignores them in its folders
_NARROWING_FIELDS = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_MISSING_FIELDS = {
    "VERA": _NARROWING_FIELDS[:1],
    "LN_TUNING": _NARROWING_FIELDS[1:3],
    peft_tokens.TOKENS_TYPE: _NARROWING_FIELDS,
}


class TensorsLeftOut(UserWarning):
    """A folder holds tensors of modules that its config does not match. Veneer leaves them out, as
    PEFT does."""


def ignored_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor | None], suffixes: Iterable[str]
) -> dict[str, list[str]]:
    """The keys of the tensors that PEFT ignores, by the path of their module. If the targets are a
    regular expression that exceeds the limits of ``patterns.py`` (its length, or the time to match
    it), or that is invalid, the result is empty.

    Args:
        tensors: the tensors by key; None instead of a tensor if only its key is known.
        suffixes: the suffixes of LoRA's tensors. They do not matter for folders of other tuners.
    """
    keys_by_module: dict[str, list[str]] = {}
    for key in tensors:
        path = _module_path(key, config, suffixes)
        if path is not None and not _may_target_parameter(config, path):
            keys_by_module.setdefault(path, []).append(key)
    config = {**config, **dict.fromkeys(_MISSING_FIELDS.get(str(config.get("peft_type")), ()))}
    if config.get("target_modules") == "all-linear":
        config["target_modules"] = ".*"
    # PEFT adapts the out-projection of an adapted attention even if no target names the projection,
    # so a change of the projection applies if the path of the attention matches
    paths_to_match = {
        path: {
            peft_paths.strip_wrappers(name)[0]
            for name in (path, peft_paths.attention_of(path) or path)
        }
        for path in keys_by_module
    }
    matched_paths = peft_paths.expected_paths(config, set().union(*paths_to_match.values()))
    if matched_paths is None:
        return {}
    matched_keys = [
        key
        for path, keys in keys_by_module.items()
        for key in keys
        if paths_to_match[path] & matched_paths
    ]
    keys_by_prefix: dict[str, list[str]] = {}
    for key in tensors:
        keys_by_prefix.setdefault(key.rpartition(".")[0], []).append(key)
    ignored_by_module: dict[str, list[str]] = {}
    for path, keys in keys_by_module.items():
        if paths_to_match[path] & matched_paths or (
            config.get("ensure_weight_tying") and _are_tied(keys, matched_keys, tensors)
        ):
            continue
        # PEFT also ignores the trained bias of this layer, or the frozen weight of this embedding
        keys += keys_by_prefix.get(f"{peft.PREFIX}{path}.base_layer", [])
        ignored_by_module.setdefault(peft_paths.strip_wrappers(path)[0], []).extend(keys)
    return ignored_by_module


def _are_tied(
    keys: Iterable[str], adapted_keys: Iterable[str], tensors: Mapping[str, Tensor | None]
) -> bool:
    """Whether each of the tensors ``keys`` equals one of the tensors ``adapted_keys``, or its
    transpose: PEFT also adapts a module of which the weight is tied to a target's weight. Tensors
    of which only the keys are known count as equal."""

    def are_equal(factor: Tensor | None, adapted_factor: Tensor | None) -> bool:
        if factor is None or adapted_factor is None:
            return True
        transposed = adapted_factor.mT if adapted_factor.dim() == 2 else adapted_factor
        return any(torch.equal(factor, candidate) for candidate in (adapted_factor, transposed))

    factors = (tensors[key] for key in keys if not key.endswith(peft.MAGNITUDE))
    return all(
        any(are_equal(factor, tensors[adapted_key]) for adapted_key in adapted_keys)
        for factor in factors
    )


def applied_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], suffixes: Iterable[str]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """(the tensors that PEFT applies, the modules with tensors that the config does not match).

    Raises:
        AdapterError: the config matches no module with tensors, or names modules in
            ``modules_to_save`` of which the file holds low-rank changes.
    """
    suffixes = tuple(suffixes)
    ignored_by_module = ignored_tensors(config, tensors, suffixes)
    if not ignored_by_module:
        return tensors, ()
    if (
        saved_modules := ignored_by_module.keys()
        - ignored_tensors({**config, "modules_to_save": None}, tensors, suffixes).keys()
    ):
        raise AdapterError(
            f"low-rank changes of {listing(sorted(saved_modules), 3)}, which modules_to_save in"
            f" {peft.CONFIG} names",
            "these modules in full",
            "correct modules_to_save, or get both files again",
        )
    ignored_keys = {key for keys in ignored_by_module.values() for key in keys}
    remaining_tensors = {key: tensor for key, tensor in tensors.items() if key not in ignored_keys}
    if remaining_tensors.keys() <= {*PROJECTIONS}:
        problem = (
            f"no tensor of {len(tensors)} for what {peft.CONFIG} means: they are of"
            f" {listing(ignored_by_module, 3)}"
        )
        fields_text = "target_modules, exclude_modules and layers_to_transform"
        raise AdapterError(
            problem, "tensors of its targets", f"correct {fields_text}, or get both files again"
        )
    return remaining_tensors, tuple(sorted(ignored_by_module))


def describe_ignored(modules: Iterable[str]) -> str:
    """A sentence that names the ignored modules."""
    modules = list(modules)
    subject = (
        f"tensors of {len(modules)} modules that {peft.CONFIG} leaves out ({listing(modules, 3)})"
    )
    return f"{subject}: they are no part of the adapter, as in PEFT"


def _module_path(key: str, config: Mapping[str, Any], suffixes: Iterable[str]) -> str | None:
    """The path in the file of the module that a tensor changes; None for any other tensor."""
    bare_key, tuner = key.removeprefix(peft.PREFIX), tuner_of(config)
    if bare_key == key:
        return None
    # without targets, PEFT trains tokens of the input embedding, whose rows it never ignores
    if config.get("peft_type") == peft_tokens.TOKENS_TYPE:
        suffixes = (peft_tokens.TUNER_ROWS_SUFFIX,) if config.get("target_modules") else ()
    elif tuner is not None and not tuner.required_suffixes:
        module_path, _, suffix = bare_key.rpartition(".")
        bare_key, suffixes = module_path if suffix else bare_key, tuner.suffixes
    elif tuner is not None:
        suffixes = tuner.suffixes
    ending = next((suffix for suffix in suffixes if bare_key.endswith(f".{suffix}")), None)
    return None if ending is None else bare_key.removesuffix(f".{ending}")


def _may_target_parameter(config: Mapping[str, Any], path_in_file: str) -> bool:
    """Whether ``target_parameters`` may name a parameter of the module at a path of the file. A
    parameter that it names without a module may be of any; ``match_base`` then asks the model."""
    module_path = peft_paths.strip_wrappers(path_in_file)[0]
    target_modules = [target.rpartition(".")[0] for target in config.get("target_parameters") or ()]
    return any(
        not target or module_path == target or module_path.endswith(f".{target}")
        for target in target_modules
    )
