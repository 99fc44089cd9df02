"""The paths of PEFT's files and the patterns of its config: which modules ``target_modules``
matches, which rank and alpha a path has, and how PEFT nests the modules that it wraps.

Every rule is read from PEFT 0.21's source and checked against it in the tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.formats import patterns


def layers_patterns(config: Mapping[str, Any]) -> tuple[str, ...]:
    listed = config.get("layers_pattern") or [r"[^.]+"]
    return (listed,) if isinstance(listed, str) else tuple(listed)


def expected_paths(config: Mapping[str, Any], paths: Iterable[str]) -> set[str] | None:
    """The paths among ``paths`` that the config's targets match by PEFT's rules; None if that
    cannot be decided: for "all-linear", and for expressions beyond the limits of ``patterns``."""
    targets, exclude = config.get("target_modules") or (), config.get("exclude_modules")
    if targets == "all-linear":
        return None
    # PEFT adapts nothing below modules_to_save
    saved_modules = [f".{name}." for name in config.get("modules_to_save") or ()]
    paths = [path for path in paths if not any(name in f".{path}." for name in saved_modules)]
    try:
        chosen = {
            path
            for path in paths
            if _matches_names(targets, path) and not (exclude and _matches_names(exclude, path))
        }
    except (ValueError, patterns.TooSlowError):
        return None
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if not layers:
        return chosen
    # PEFT adapts a full path in the list whatever its layer index is
    full_paths = set() if isinstance(targets, str) else set(targets)
    return {path for path in chosen if path in full_paths or _layer_of(path, config) in layers}


def _layer_of(path: str, config: Mapping[str, Any]) -> int | None:
    """The layer index in a path: the first number that follows a match of the first matching
    ``layers_pattern`` and is not the last segment. Without a pattern PEFT ignores a number right
    after the first segment."""
    above, segments = patterns.containers(layers_patterns(config)), path.split(".")
    least = 1 if config.get("layers_pattern") else 2
    indices = [
        (int(segment), ".".join(segments[:n]))
        for n, segment in enumerate(segments[:-1])
        if n >= least and segment.isdecimal()
    ]
    hits = (
        (pattern, number)
        for number, (_, front) in enumerate(indices)
        for pattern in above.matching(front)
    )
    first = min(hits, default=None)
    return indices[first[1]][0] if first is not None else None


def _matches_names(names: str | Iterable[str], path: str) -> bool:
    if isinstance(names, str):
        return patterns.matcher_of_whole_texts(names)(path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def strength(config: Mapping[str, Any], *paths: str) -> tuple[int, float, float]:
    """(rank, alpha, scale) of a change with these paths, for the first path that a pattern matches.
    PEFT uses the first key of ``rank_pattern`` and ``alpha_pattern`` that matches the end of the
    path as a regular expression."""

    def value(patterned: str, default: str) -> Any:
        values = config.get(patterned) or {}
        looked_up = (patterns.ends(tuple(values)).first(path) for path in (paths if values else ()))
        return next(
            (values[pattern] for pattern in looked_up if pattern is not None), config[default]
        )

    rank, alpha = int(value("rank_pattern", "r")), value("alpha_pattern", "lora_alpha")
    return rank, alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def strip_wrappers(path: str) -> tuple[str, int]:
    """(the path without PEFT's wrappers, the number of wrappers at its end)."""
    segments = path.split(".")
    depth = next(
        (count for count, segment in enumerate(reversed(segments)) if segment != "base_layer"),
        len(segments),
    )
    return ".".join(segment for segment in segments if segment != "base_layer"), depth


def add_wrappers(path: str, wrapper_counts: Mapping[str, int]) -> str:
    """The path with PEFT's wrappers. ``wrapper_counts``: how many wrappers each module above it
    has."""
    segments = path.split(".") if path else []
    inside: list[str] = []
    for count, segment in enumerate(segments):
        wrappers = wrapper_counts.get(".".join(segments[:count]), 0) if count else 0
        inside += [*["base_layer"] * wrappers, segment]
    return ".".join(inside)


def attention_of(path: str) -> str | None:
    """The path of the attention if ``path`` is that of its out-projection in a file, else None.
    Both have the same rank and alpha."""
    segments = path.split(".")
    return ".".join(segments[:-2]) if segments[-2:] == ["base_layer", "out_proj"] else None


def parameter_at(config: Mapping[str, Any], path: str, by_veneer: bool) -> list[str]:
    """The path of the parameter that the entry at ``path`` changes, in a list, as far as the config
    determines it: the last of ``target_parameters`` in that module, or an earlier one for each
    wrapper. Empty if the entry changes a module."""
    bare, depth = strip_wrappers(path)
    ends = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    parameters = [parameter for above, _, parameter in ends if above == bare]
    if (
        not by_veneer
        and not parameters
        and not expected_paths({**config, "exclude_modules": None}, [bare])
    ):
        parameters = [
            parameter for above, _, parameter in ends if not above or _matches_names([above], bare)
        ]
    return [f"{bare}.{parameters[-1 - depth]}".lstrip(".")] if depth < len(parameters) else []


def expected_parameters(config: Mapping[str, Any], paths: Iterable[str]) -> set[str]:
    """The parameters among ``paths`` that the config's ``target_parameters`` match."""
    return {path for path in paths if _matches_names(config.get("target_parameters") or (), path)}


def targets_for(chosen: list[str], among: Iterable[str]) -> list[str] | str:
    """The ``target_modules`` with which PEFT adapts exactly the ``chosen`` paths ``among`` all
    candidates: last segments if they suffice, else full paths, else (if one path is the end of
    another) a regular expression."""
    among, wanted = list(among), set(chosen)
    if not wanted:
        return []
    for paths in (sorted({path.rpartition(".")[2] for path in wanted}), sorted(wanted)):
        if expected_paths({"target_modules": paths}, among) == wanted:
            return paths
    return "|".join(map(re.escape, sorted(wanted)))


def common_size(
    ranks: Mapping[str, int], alphas: Mapping[str, float], rank: int, alpha: float
) -> tuple[int, float]:
    """The rank and alpha for ``r`` and ``lora_alpha``: ``rank`` and ``alpha`` if a layer has both,
    else the pair that most layers have. If all layers have the same scale, it is then that of r and
    lora_alpha, for readers that ignore patterns (as vLLM did)."""
    pairs = [(ranks[path], alphas[path]) for path in ranks]
    return (rank, alpha) if (rank, alpha) in pairs or not pairs else max(pairs, key=pairs.count)


def patterns_for(values: Mapping[str, float], default: float) -> dict[str, float]:
    """A rank or alpha pattern with the full path of every layer that differs from the default, so
    that no key matches another layer with the same ending."""

    def pattern(path: str) -> str:
        alike = any(
            longer.endswith(f".{path}") and values[longer] != values[path] for longer in values
        )
        return f"^{re.escape(path)}" if alike else re.escape(path)

    return {pattern(path): value for path, value in values.items() if value != default}
