"""The paths in PEFT's files and the patterns in its config: which modules ``target_modules``
matches, the rank and alpha of the pattern that ``patterns.py`` finds for a path, and how PEFT nests
the modules that it wraps.

The rules are those of PEFT 0.21's source; the tests compare them with PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from veneer.formats import patterns


def layers_patterns(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The regular expressions of ``layers_pattern`` in a config, or PEFT's default, which matches
    any one segment of a path."""
    patterns = config.get("layers_pattern") or [r"[^.]+"]
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def expected_paths(config: Mapping[str, Any], paths: Iterable[str]) -> set[str] | None:
    """The module paths among ``paths`` that the config's targets match by PEFT's rules. None if the
    match cannot be evaluated: for "all-linear", and for regular expressions that are invalid or
    exceed the limits of ``patterns.py`` (their length, or the time to match them)."""
    targets, exclude = (
        names if isinstance(names, str) else frozenset(names or ())
        for names in (config.get("target_modules"), config.get("exclude_modules"))
    )
    if targets == "all-linear":
        return None
    # leave out the modules of modules_to_save and those below them, because PEFT adapts none there
    saved_modules = [f".{name}." for name in config.get("modules_to_save") or ()]
    paths = [path for path in paths if not any(name in f".{path}." for name in saved_modules)]
    try:
        matching_paths = {
            path
            for path in paths
            if _matches_names(targets, path) and not (exclude and _matches_names(exclude, path))
        }
    except (ValueError, patterns.TooSlowError):
        return None
    layer_indices = config.get("layers_to_transform")
    layer_indices = [layer_indices] if isinstance(layer_indices, int) else layer_indices
    if not layer_indices:
        return matching_paths
    # PEFT adapts a module that is named by its full path, whatever the index of its layer
    full_paths = set() if isinstance(targets, str) else set(targets)
    return {
        path
        for path in matching_paths
        if path in full_paths or _layer_index(path, config) in layer_indices
    }


def _layer_index(path: str, config: Mapping[str, Any]) -> int | None:
    """The layer index in a path; None if it has none. The index is a number that is not the last
    segment, and of which the path before it matches a ``layers_pattern``. If several numbers
    qualify, it is the first number after a match of the first matching pattern. Without a pattern,
    PEFT ignores a number right after the first segment."""
    container_expressions, segments = (
        patterns.layer_containers(layers_patterns(config)),
        path.split("."),
    )
    first_position = 1 if config.get("layers_pattern") else 2
    index_candidates = [
        (int(segment), ".".join(segments[:position]))
        for position, segment in enumerate(segments[:-1])
        if position >= first_position and segment.isdecimal()
    ]
    matches = (
        (pattern_index, candidate_index)
        for candidate_index, (_, container_path) in enumerate(index_candidates)
        for pattern_index in container_expressions.matching(container_path)
    )
    first_match = min(matches, default=None)
    return index_candidates[first_match[1]][0] if first_match is not None else None


def _matches_names(names: str | Collection[str], path: str) -> bool:
    """Whether a path matches a regular expression (if ``names`` is a text), or ends with one of the
    ``names``, as in PEFT."""
    if isinstance(names, str):
        return patterns.full_matcher(names)(path)
    segments = path.split(".")
    return any(".".join(segments[start:]) in names for start in range(len(segments)))


def rank_alpha_scale(config: Mapping[str, Any], *paths: str) -> tuple[int, float, float]:
    """(rank, alpha, scale) of a change. If it has several paths, the first path that a pattern
    matches counts.

    PEFT uses the first key of ``rank_pattern`` and ``alpha_pattern`` that matches the end of a path
    as a regular expression."""

    def look_up(pattern_field: str, default_field: str) -> Any:
        values = config.get(pattern_field) or {}
        matches = (
            patterns.path_endings(tuple(values)).first_match(path)
            for path in (paths if values else ())
        )
        return next(
            (values[pattern] for pattern in matches if pattern is not None), config[default_field]
        )

    rank, alpha = int(look_up("rank_pattern", "r")), look_up("alpha_pattern", "lora_alpha")
    return rank, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def strip_wrappers(path: str) -> tuple[str, int]:
    """(the path without the segments ``base_layer`` of PEFT's wrappers, the number of wrappers at
    the end of the path)."""
    segments = path.split(".")
    wrapper_count = next(
        (count for count, segment in enumerate(reversed(segments)) if segment != "base_layer"),
        len(segments),
    )
    return ".".join(segment for segment in segments if segment != "base_layer"), wrapper_count


def add_wrappers(path: str, wrapper_counts: Mapping[str, int]) -> str:
    """The path with a segment ``base_layer`` for each of PEFT's wrappers, behind the wrapped
    module. ``wrapper_counts``: the number of wrappers of each module, by path."""
    segments = path.split(".") if path else []
    wrapped_segments: list[str] = []
    for position, segment in enumerate(segments):
        wrapper_count = wrapper_counts.get(".".join(segments[:position]), 0) if position else 0
        wrapped_segments += [*["base_layer"] * wrapper_count, segment]
    return ".".join(wrapped_segments)


def attention_of(path: str) -> str | None:
    """The path of an attention module if ``path`` is the path of its out-projection in a file; None
    otherwise. The attention and its out-projection have the same rank and alpha."""
    segments = path.split(".")
    return ".".join(segments[:-2]) if segments[-2:] == ["base_layer", "out_proj"] else None


def parameter_at(config: Mapping[str, Any], path: str, by_veneer: bool) -> list[str]:
    """[the path of the parameter that the change at ``path`` in a file belongs to], or [] if the
    change belongs to a module's weight. If ``target_parameters`` has several parameters of the
    module, the change under the outermost wrapper belongs to the last one, and each further
    segment ``base_layer`` in the path leads to the parameter before it. For the modules that
    ``unordered_modules`` returns, the result is a guess. ``by_veneer``: whether Veneer wrote the
    config, which then has full paths; else targets may be the ends of paths."""
    bare_path, wrapper_count = strip_wrappers(path)
    parameters = _target_parameters_of(config, bare_path, by_veneer)
    return (
        [f"{bare_path}.{parameters[-1 - wrapper_count]}".lstrip(".")]
        if wrapper_count < len(parameters)
        else []
    )


def unordered_modules(config: Mapping[str, Any], file_paths: Iterable[str]) -> tuple[str, ...]:
    """The modules among ``file_paths`` of which the config may target several parameters in another
    order than the model's. PEFT nests its wrappers in the order of the model and ignores the order
    of ``target_parameters``. Veneer lists them in the order of the model; its configs lack
    "auto_mapping", which is in every config of PEFT."""
    if "auto_mapping" not in config or len(config.get("target_parameters") or ()) < 2:
        return ()
    module_paths = dict.fromkeys(strip_wrappers(path)[0] for path in file_paths)
    return tuple(
        path for path in module_paths if len(_target_parameters_of(config, path, False)) > 1
    )


def _target_parameters_of(
    config: Mapping[str, Any], module_path: str, by_veneer: bool
) -> list[str]:
    """The names of a module's parameters that ``target_parameters`` may mean, in their order there.
    ``by_veneer``: as for ``parameter_at``."""
    split_targets = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    parameters = [parameter for module, _, parameter in split_targets if module == module_path]
    if (
        not by_veneer
        and not parameters
        and not expected_paths({**config, "exclude_modules": None}, [module_path])
    ):
        parameters = [
            parameter
            for module, _, parameter in split_targets
            if not module or _matches_names([module], module_path)
        ]
    return list(dict.fromkeys(parameters))


def expected_parameters(config: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """The parameters among ``paths`` that the config's ``target_parameters`` match."""
    names = frozenset(config.get("target_parameters") or ())
    return {path for path in paths if _matches_names(names, path)}


def targets_for(target_paths: list[str], all_paths: Iterable[str]) -> list[str] | str:
    """The ``target_modules`` with which PEFT adapts exactly ``target_paths`` out of
    ``all_paths``: the last segments of the paths if they suffice, else the full paths. If these do
    not suffice either, because one path is the end of another, a regular expression."""
    all_paths, expected_set = list(all_paths), set(target_paths)
    if not expected_set:
        return []
    for paths in (sorted({path.rpartition(".")[2] for path in expected_set}), sorted(expected_set)):
        if expected_paths({"target_modules": paths}, all_paths) == expected_set:
            return paths
    return "|".join(map(re.escape, sorted(expected_set)))


def common_rank_and_alpha(
    ranks: Mapping[str, int], alphas: Mapping[str, float], rank: int, alpha: float
) -> tuple[int, float]:
    """The values to write as ``r`` and ``lora_alpha``: ``rank`` and ``alpha`` if some layer has
    both, else the pair that most layers have. So if all layers have one scale, readers that ignore
    ``rank_pattern`` and ``alpha_pattern`` (as vLLM did) compute this scale. ``ranks``, ``alphas``:
    the rank and alpha of each layer, by path."""
    rank_alpha_pairs = [(ranks[path], alphas[path]) for path in ranks]
    return (
        (rank, alpha)
        if (rank, alpha) in rank_alpha_pairs or not rank_alpha_pairs
        else max(rank_alpha_pairs, key=rank_alpha_pairs.count)
    )


def patterns_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """A ``rank_pattern`` or ``alpha_pattern``: each layer's value that differs from ``default``, by
    a regular expression that matches the layer's full path. ``values``: the value of each layer, by
    path. If the path of a layer with another value ends in this path, the expression begins with
    "^", so that it does not match that layer too."""

    def pattern(path: str) -> str:
        is_ambiguous = any(
            longer_path.endswith(f".{path}") and values[longer_path] != values[path]
            for longer_path in values
        )
        return f"^{re.escape(path)}" if is_ambiguous else re.escape(path)

    return {pattern(path): value for path, value in values.items() if value != default}
