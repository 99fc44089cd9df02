"""Conclusions about a sweep's winner: whether a wider search could find a better candidate, and
whether the winner has the same losses when it trains as a single run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import annotated_types
from rich.console import Console

from veneer.errors import VeneerError
from veneer.models.messages import first_line
from veneer.train.config import TrainConfig
from veneer.train.run import fit
from veneer.train.sweep.sweep_settings import CHANCE, Range

#: number of steps of the winner's repetition
REPEATED_STEPS = 20
#: the share of a range at each end that counts as its edge
EDGE = 0.1


def find_edges(
    axes: Mapping[str, list[Any] | Range], changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The numeric axes at whose lowest or highest value the winner lies: {"axis", "value", "side",
    "tried"}. A limit of the setting itself, such as a dropout of 0, is no edge."""
    winner_edges = []
    for axis, values in axes.items():
        bounds = _bounds(values)
        if axis in CHANCE or bounds is None or axis not in changes:
            continue
        low, high = bounds
        value, log = changes[axis], isinstance(values, Range) and values.log
        share = _relative_position(value, low, high, log)
        margin = EDGE if isinstance(values, Range) else 0.0
        side = "lowest" if share <= margin else "highest" if share >= 1 - margin else None
        if side is not None and not (side == "lowest" and value == _lower_limit(axis)):
            winner_edges.append({"axis": axis, "value": value, "side": side, "tried": [low, high]})
    return winner_edges


def _bounds(values: list[Any] | Range) -> tuple[float, float] | None:
    if isinstance(values, Range):
        return values.low, values.high
    numbers = {
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return (
        (min(numbers), max(numbers))
        if len(numbers) > 1 and len(numbers) == len(set(map(str, values)))
        else None
    )


def _relative_position(value: float, low: float, high: float, log: bool) -> float:
    """The position of a value between ``low`` and ``high``, 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _lower_limit(axis: str) -> float | None:
    """The least valid value of a setting, if the limit is inclusive."""
    limits = TrainConfig.model_fields[axis].metadata
    inclusive = (limit.ge for limit in limits if isinstance(limit, annotated_types.Ge))
    return next(inclusive, None)  # pyright: ignore


def describe_edge(edge: Mapping[str, Any]) -> str:
    lowest, highest = edge["tried"]
    return (
        f"{edge['axis']} {edge['value']:g} lies at the {edge['side']} end of what was tried"
        f" ({lowest:g} to {highest:g}): a better one may lie beyond it."
    )


def repeat_winner(config: TrainConfig, losses: Sequence[float]) -> dict[str, Any]:
    """Train the first steps of the winner again with `veneer train`'s loop, and compare the losses
    with those of the sweep.

    Returns:
        {"steps", "largest" difference, "step" of the largest, "last" difference}, or {"problem"} if
        the comparison failed.
    """
    count, steps = 0, min(REPEATED_STEPS, len(losses))

    def enough() -> bool:
        nonlocal count
        count += 1
        return count >= steps

    try:
        with tempfile.TemporaryDirectory() as folder:
            changes = {
                "output": Path(folder) / "again",
                "check": False,
                "eval_every": 10**9,
                "save_every": 10**9,
            }
            result = fit(
                config.model_copy(update=changes),
                console=Console(quiet=True),
                quiet=True,
                stop_order=enough,
            )
    except (VeneerError, OSError, RuntimeError) as error:  # the sweep keeps its result
        return {"problem": first_line(error)}
    differences = [
        abs(repeated - original)
        for repeated, original in zip(result.losses[:steps], losses, strict=False)
    ]
    if not differences:
        return {"problem": "it was stopped before its first step"}
    largest = max(differences)
    return {
        "steps": len(differences),
        "largest": largest,
        "step": differences.index(largest) + 1,
        "last": differences[-1],
    }


def describe_repetition(alone: Mapping[str, Any]) -> str:
    if "problem" in alone:
        return (
            "How far the winner trained alone goes from its curve could not be measured:"
            f" {alone['problem']}"
        )
    return (
        f"Trained again alone for {alone['steps']:,} steps, its losses differ from those of the"
        f" sweep by at most {alone['largest']:.1e} (step {alone['step']}), and by"
        f" {alone['last']:.1e} at the last of them."
    )
