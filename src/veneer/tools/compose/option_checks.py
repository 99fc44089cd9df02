"""Check the options of ``compose``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError, listing, nearest, raise_all, sentence
from veneer.tools.compose.merge_methods import MERGE_METHODS
from veneer.tools.compose.weighted_sum import ComposeOptions

METHODS = ("sum", "svd", *MERGE_METHODS)
#: pattern -> a factor for the layers that it matches, or a factor for each adapter
LayerFactors = Mapping[str, float | Sequence[float]]
#: (whether the check failed, found, expected, what to do)
_Check = tuple[bool, str, str, str]


def check_options(
    count: int,
    weights: Sequence[float],
    method: str | None,
    rank: int | None,
    energy: float | None,
    density: float | None,
    layers: LayerFactors,
    seed: int,
) -> ComposeOptions:
    """The options for ``count`` adapters; ``ConfigError`` with every problem."""
    method = method or ("svd" if rank is not None or energy is not None else "sum")
    checks = [
        *_weight_checks(count, weights, layers),
        *_method_checks(method, rank, energy, density),
    ]
    problems = [sentence(*error_texts) for failed, *error_texts in checks if failed]
    raise_all(ConfigError, "These adapters cannot be composed so", problems)
    return ComposeOptions(method, rank, energy, density or 1.0, seed)


def _weight_checks(count: int, weights: Sequence[float], layers: LayerFactors) -> list[_Check]:
    factors = [value for factor in layers.values() for value in factor_list(factor)]
    numbers = [*weights, *factors]
    finite, weight_count = all(map(_is_finite_number, numbers)), len(weights)
    all_zero = finite and weight_count > 0 and not any(weights)
    wrong_lengths = [
        pattern
        for pattern, factor in layers.items()
        if not isinstance(factor, int | float) and len(factor) != count
    ]
    return [
        (count == 0, "no adapter", "at least one", "name the adapters"),
        (
            weight_count != count,
            f"{weight_count} weights for {count} adapters",
            "one each",
            "leave them out to weigh all by 1",
        ),
        (not finite, f"weights {numbers}", "finite numbers", "correct them"),
        (all_zero, "weights that are all 0", "one that is not", "there would be nothing to write"),
        (
            bool(wrong_lengths),
            f"factors of {listing(wrong_lengths)} for other than {count} adapters",
            "one each",
            "correct it",
        ),
    ]


def _method_checks(
    method: str, rank: int | None, energy: float | None, density: float | None
) -> list[_Check]:
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not _is_share(energy)
    truncates = rank is not None or energy is not None
    merges = method in MERGE_METHODS
    paper_density = MERGE_METHODS[method].paper_density if merges else None
    return [
        (
            method not in METHODS,
            f"method={method!r}{nearest(str(method), METHODS)}",
            " | ".join(METHODS),
            'use "sum"',
        ),
        (bad_rank, f"rank={rank!r}", "a whole number of at least 1", "use 16"),
        (bad_energy, f"energy={energy!r}", "a share of ‖ΔW‖² in (0, 1]", "use 0.99"),
        (
            rank is not None and energy is not None,
            "both a rank and an energy",
            "one of them",
            "leave one out",
        ),
        (
            method == "sum" and truncates,
            "a rank or an energy for an exact sum",
            "none",
            "use method='svd'",
        ),
        (
            method == "svd" and not truncates,
            "neither a rank nor an energy for svd",
            "one of them",
            "give rank=16 or energy=0.99",
        ),
        (
            merges and not _is_share(density),
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


def _is_share(value: Any) -> bool:
    return _is_finite_number(value) and 0 < value <= 1


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def factor_list(factor: float | Sequence[float]) -> list[float]:
    return [factor] if isinstance(factor, int | float) else list(factor)
