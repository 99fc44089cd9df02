"""Phrases that the tools' reports share."""

from __future__ import annotations

from collections.abc import Iterable


def rank_range(ranks: Iterable[int]) -> str:
    """ "rank 8", "ranks 4 to 16" or "no ranks"."""
    ordered = sorted(set(ranks))
    if not ordered:
        return "no ranks"
    return f"rank {ordered[0]}" if len(ordered) == 1 else f"ranks {ordered[0]} to {ordered[-1]}"


def count_noun(number: int, noun: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
