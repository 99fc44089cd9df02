"""Conclusions about the winner of a sweep: whether a wider search could find a better candidate,
and whether the winner has the same losses when it trains as a single run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import annotated_types
from rich.console import Console

from veneer.errors import VeneerError, first_line
from veneer.train.config import TrainConfig
from veneer.train.run import fit
from veneer.train.sweep.sweep_settings import SEED_AXES, Range

#: number of steps for which the winner (the best candidate) trains again alone
REPEATED_STEPS = 20
#: a value lies at an edge of a range if it is within this share of the range's width from an end
EDGE_SHARE = 0.1


def find_edges(
    axes: Mapping[str, list[Any] | Range], changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Find the axes (settings that the sweep varies) on which a better value may lie beyond the
    tried ones: the winner's value is the lowest or highest of a list of numbers, or lies near an
    end of a range (``EDGE_SHARE``). Seeds do not count. Nor does the least value that a setting
    allows, such as a dropout of 0, since no lower value could be tried.

    Args:
        axes: by axis, the values to try.
        changes: by axis, the value of the winner.

    Returns:
        for each such axis {"axis": its name, "value": the winner's, "side": "lowest" or "highest",
        "tried": [lowest, highest]}.
    """
    winner_edges = []
    for axis, values in axes.items():
        bounds = _axis_bounds(values)
        if axis in SEED_AXES or bounds is None or axis not in changes:
            continue
        low, high = bounds
        value, is_log = changes[axis], isinstance(values, Range) and values.log
        position = _relative_position(value, low, high, is_log)
        margin = EDGE_SHARE if isinstance(values, Range) else 0.0
        side = "lowest" if position <= margin else "highest" if position >= 1 - margin else None
        if side is not None and not (side == "lowest" and value == _lower_limit(axis)):
            winner_edges.append({"axis": axis, "value": value, "side": side, "tried": [low, high]})
    return winner_edges


def _axis_bounds(values: list[Any] | Range) -> tuple[float, float] | None:
    """The lowest and the highest value of an axis; None if a value is no number, or if fewer than
    two different numbers are tried."""
    if isinstance(values, Range):
        return values.low, values.high
    numeric_values = {
        value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return (
        (min(numeric_values), max(numeric_values))
        if len(numeric_values) > 1 and len(numeric_values) == len(set(map(str, values)))
        else None
    )


def _relative_position(value: float, low: float, high: float, is_log: bool) -> float:
    """The position of a value between ``low`` (0) and ``high`` (1), on a logarithmic scale if
    ``is_log``."""
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _lower_limit(axis: str) -> float | None:
    """The least value that a setting allows; None if it has no lower limit, or an exclusive one."""
    constraints = TrainConfig.model_fields[axis].metadata
    inclusive_limits = (limit.ge for limit in constraints if isinstance(limit, annotated_types.Ge))
    return next(inclusive_limits, None)  # pyright: ignore


def describe_edge(edge: Mapping[str, Any]) -> str:
    lowest, highest = edge["tried"]
    return (
        f"{edge['axis']} {edge['value']:g} lies at the {edge['side']} end of what was tried"
        f" ({lowest:g} to {highest:g}): a better one may lie beyond it."
    )


def repeat_winner(config: TrainConfig, losses: Sequence[float]) -> dict[str, Any]:
    """Train the winner's first steps again alone, with the loop of `veneer train`, and compare the
    training losses with those of the sweep.

    Args:
        config: the configuration of the winner as a single run.
        losses: the training losses of the winner in the sweep, by step.

    Returns:
        {"steps": number of compared steps, "largest": the largest absolute difference of the two
        losses of a step, "step": the number of that step, from 1, "last": the difference at the
        last compared step}, or {"problem": text} if the repetition failed or was stopped at once.
    """
    completed_steps, step_limit = 0, min(REPEATED_STEPS, len(losses))

    def should_stop() -> bool:
        nonlocal completed_steps
        completed_steps += 1
        return completed_steps >= step_limit

    try:
        with tempfile.TemporaryDirectory() as temporary_folder:
            overrides = {
                "output": Path(temporary_folder) / "again",
                "check": False,
                "eval_every": 10**9,
                "save_every": 10**9,
            }
            result = fit(
                config.model_copy(update=overrides),
                console=Console(quiet=True),
                quiet=True,
                stop_order=should_stop,
            )
    except (VeneerError, OSError, RuntimeError) as error:
        # only report it, because the sweep itself has succeeded
        return {"problem": first_line(error)}
    differences = [
        abs(repeated - original)
        for repeated, original in zip(result.losses[:step_limit], losses, strict=False)
    ]
    if not differences:
        return {"problem": "it was stopped before its first step"}
    largest_difference = max(differences)
    return {
        "steps": len(differences),
        "largest": largest_difference,
        "step": differences.index(largest_difference) + 1,
        "last": differences[-1],
    }


def describe_repetition(repetition: Mapping[str, Any]) -> str:
    if "problem" in repetition:
        return (
            "How far the winner trained alone goes from its curve could not be measured:"
            f" {repetition['problem']}"
        )
    return (
        f"Trained again alone for {repetition['steps']:,} steps, its losses differ from those of"
        f" the sweep by at most {repetition['largest']:.1e} (step {repetition['step']}), and by"
        f" {repetition['last']:.1e} at the last of them."
    )
