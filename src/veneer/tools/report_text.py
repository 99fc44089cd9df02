"""Phrases that the tools' reports share."""

from __future__ import annotations

from collections.abc import Iterable


def rank_range(ranks: Iterable[int]) -> str:
    """The range of some ranks as text: "rank 8", "ranks 4 to 16" or "no ranks"."""
    sorted_ranks = sorted(set(ranks))
    if not sorted_ranks:
        return "no ranks"
    return (
        f"rank {sorted_ranks[0]}"
        if len(sorted_ranks) == 1
        else f"ranks {sorted_ranks[0]} to {sorted_ranks[-1]}"
    )


def count_noun(count: int, noun: str) -> str:
    """A count and its noun as text, such as "1 layer" and "2 layers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
