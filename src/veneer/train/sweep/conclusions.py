"""What a sweep may conclude of its winner: whether a wider search could find a better one, and
whether the winner does alone what it did among the others."""

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
from veneer.train.sweep.settings import CHANCE, Range

#: steps of the winner that are trained again, alone
AGAIN = 20
#: the share of a range at its ends that counts as its edge
EDGE = 0.1


def edges(
    axes: Mapping[str, list[Any] | Range], changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The axes of numbers at whose lowest or highest value the winner lies: {"axis", "value",
    "side", "tried"}. An end beyond which the setting cannot go, such as a dropout of 0, is no
    edge."""
    lying = []
    for axis, values in axes.items():
        bounds = _bounds(values)
        if axis in CHANCE or bounds is None or axis not in changes:
            continue
        low, high = bounds
        value, log = changes[axis], isinstance(values, Range) and values.log
        share = _share(value, low, high, log)
        margin = EDGE if isinstance(values, Range) else 0.0
        side = "lowest" if share <= margin else "highest" if share >= 1 - margin else None
        if side is not None and not (side == "lowest" and value == _least(axis)):
            lying.append({"axis": axis, "value": value, "side": side, "tried": [low, high]})
    return lying


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


def _share(value: float, low: float, high: float, log: bool) -> float:
    """How far a value lies from ``low`` to ``high``, 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _least(axis: str) -> float | None:
    """The least value that a setting can have, where that value is allowed itself."""
    limits = TrainConfig.model_fields[axis].metadata
    return next((limit.ge for limit in limits if isinstance(limit, annotated_types.Ge)), None)  # pyright: ignore


def edge_words(edge: Mapping[str, Any]) -> str:
    low, high = edge["tried"]
    return (
        f"{edge['axis']} {edge['value']:g} lies at the {edge['side']} end of what was tried"
        f" ({low:g} to {high:g}): a better one may lie beyond it."
    )


def measure_alone(config: TrainConfig, losses: Sequence[float]) -> dict[str, Any]:
    """Train the winner again for its first steps, as `veneer train` does, and compare with its
    losses of the sweep: {"steps", "largest" difference, "step" of it, "last" difference}, or
    {"problem"} where that could not be done."""
    count, steps = 0, min(AGAIN, len(losses))

    def enough() -> bool:
        nonlocal count
        count += 1
        return count >= steps

    try:
        with tempfile.TemporaryDirectory() as folder:
            alone = {
                "output": Path(folder) / "again",
                "check": False,
                "eval_every": 10**9,
                "save_every": 10**9,
            }
            result = fit(
                config.model_copy(update=alone),
                console=Console(quiet=True),
                quiet=True,
                stop_order=enough,
            )
    except (
        VeneerError,
        OSError,
        RuntimeError,
    ) as error:  # the sweep itself is done, and keeps its result
        return {"problem": first_line(error)}
    apart = [
        abs(again - before) for again, before in zip(result.losses[:steps], losses, strict=False)
    ]
    if not apart:
        return {"problem": "it was stopped before its first step"}
    largest = max(apart)
    return {
        "steps": len(apart),
        "largest": largest,
        "step": apart.index(largest) + 1,
        "last": apart[-1],
    }


def alone_words(alone: Mapping[str, Any]) -> str:
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
