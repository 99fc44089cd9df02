"""Check the options of ``compose``, and complete them with defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError, listing, nearest, raise_all, sentence
from veneer.tools.compose.merge_methods import MERGE_METHODS
from veneer.tools.compose.weighted_sum import ComposeOptions

METHODS = ("sum", "svd", *MERGE_METHODS)
#: pattern of layer names -> one factor for all adapters, or a factor for each adapter
LayerFactors = Mapping[str, float | Sequence[float]]
#: (whether the check failed, and the texts of its error: problem, expected value, what to do)
_Check = tuple[bool, str, str, str]


def check_options(
    adapter_count: int,
    weights: Sequence[float],
    method: str | None,
    rank: int | None,
    energy: float | None,
    density: float | None,
    layer_factors: LayerFactors,
    seed: int,
) -> ComposeOptions:
    """The checked options of ``compose``, with their defaults. ``ConfigError`` lists every invalid
    option. ``weights``: one for each adapter; ``layer_factors``: the argument ``layers``."""
    method = method or ("svd" if rank is not None or energy is not None else "sum")
    checks = [
        *_weight_checks(adapter_count, weights, layer_factors),
        *_method_checks(method, rank, energy, density),
    ]
    problems = [sentence(*error_texts) for failed, *error_texts in checks if failed]
    raise_all(ConfigError, "These adapters cannot be composed so", problems)
    return ComposeOptions(method, rank, energy, density or 1.0, seed)


def _weight_checks(
    adapter_count: int, weights: Sequence[float], layer_factors: LayerFactors
) -> list[_Check]:
    factors = [
        number
        for factor_or_list in layer_factors.values()
        for number in list_factors(factor_or_list)
    ]
    weights_and_factors = [*weights, *factors]
    all_finite, weight_count = all(map(_is_finite_number, weights_and_factors)), len(weights)
    mismatched_patterns = [
        pattern
        for pattern, factor_or_list in layer_factors.items()
        if not isinstance(factor_or_list, int | float) and len(factor_or_list) != adapter_count
    ]
    return [
        (adapter_count == 0, "no adapter", "at least one", "name the adapters"),
        (
            weight_count != adapter_count,
            f"{weight_count} weights for {adapter_count} adapters",
            "one each",
            "leave them out to weigh all by 1",
        ),
        (not all_finite, f"weights {weights_and_factors}", "finite numbers", "correct them"),
        (
            all_finite and weight_count > 0 and not any(weights),
            "weights that are all 0",
            "one that is not",
            "there would be nothing to write",
        ),
        (
            bool(mismatched_patterns),
            f"factors of {listing(mismatched_patterns)} for other than {adapter_count} adapters",
            "one each",
            "correct it",
        ),
    ]


def _method_checks(
    method: str, rank: int | None, energy: float | None, density: float | None
) -> list[_Check]:
    has_rank_or_energy = rank is not None or energy is not None
    is_merge_method = method in MERGE_METHODS
    paper_density = MERGE_METHODS[method].paper_density if is_merge_method else None
    return [
        (
            method not in METHODS,
            f"method={method!r}{nearest(str(method), METHODS)}",
            " | ".join(METHODS),
            'use "sum"',
        ),
        (
            rank is not None and (type(rank) is not int or rank < 1),
            f"rank={rank!r}",
            "a whole number of at least 1",
            "use 16",
        ),
        (
            energy is not None and not _is_share(energy),
            f"energy={energy!r}",
            "a share of ‖ΔW‖² in (0, 1]",
            "use 0.99",
        ),
        (
            rank is not None and energy is not None,
            "both a rank and an energy",
            "one of them",
            "leave one out",
        ),
        (
            method == "sum" and has_rank_or_energy,
            "a rank or an energy for an exact sum",
            "none",
            "use method='svd'",
        ),
        (
            method == "svd" and not has_rank_or_energy,
            "neither a rank nor an energy for svd",
            "one of them",
            "give rank=16 or energy=0.99",
        ),
        (
            is_merge_method and not _is_share(density),
            f"density={density!r} for {method}",
            "a share of entries in (0, 1]",
            f"give density={paper_density}, as in the paper",
        ),
        (
            density is not None and method in ("sum", "svd"),
            f"a density for {method}",
            "none",
            f"use it with one of {listing(MERGE_METHODS)}",
        ),
    ]


def _is_share(number: Any) -> bool:
    return _is_finite_number(number) and 0 < number <= 1


def _is_finite_number(number: object) -> bool:
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    )


def list_factors(factor_or_list: float | Sequence[float]) -> list[float]:
    return [factor_or_list] if isinstance(factor_or_list, int | float) else list(factor_or_list)
