"""Make the README's picture and its caption from the latest record of `python -m benchmarks
time_to_target`: held-out loss over the time of training, by `veneer train` and by TRL's SFTTrainer
with PEFT, for the same number of steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import runner
from scripts import charts

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "docs/first-run.svg"
#: the arms by their names in the picture
ARMS = {
    "veneer train": "veneer",
    "TRL + PEFT, tuned": "trl + peft, tuned",
    "TRL + PEFT": "trl + peft",
}


def record() -> dict[str, Any]:
    return runner.records("time_to_target")[-1]


def curve(result: Mapping[str, Any], arm: str) -> list[dict[str, float]]:
    """At each evaluation, the medians over the seeds of step, seconds and numbers on held-out
    rows."""
    runs = [process["rounds"][arm][0]["curve"] for process in result["cases"][0]["processes"]]
    return [
        {name: statistics.median(point[name] for point in points) for name in points[0]}
        for points in zip(*runs, strict=True)
    ]


def picture() -> str:
    result = record()
    curves = {
        name: [(round(point["wall"], 1), point["loss"]) for point in curve(result, arm)]
        for name, arm in ARMS.items()
    }
    return charts.lines_file(curves, x="seconds", y="held-out loss")


def caption() -> str:
    result = record()
    ends = {name: curve(result, arm)[-1] for name, arm in ARMS.items()}
    ours, tuned, default = (ends[name] for name in ARMS)
    start = curve(result, "veneer")[0]
    return (
        "![Held-out loss over the seconds of training: veneer train, and TRL with"
        f" PEFT]({PICTURE})\n\n**{start['right']:.0%} → {ours['right']:.0%} of held-out tokens"
        f" right**: SmolLM2-135M learns pronunciations, {ours['step']:.0f} steps in"
        f" {ours['wall']:.0f} s.\nTRL with PEFT: {tuned['wall']:.0f} s tuned,"
        f" {default['wall']:.0f} s by default; losses {ours['loss']:.2f},"
        f" {tuned['loss']:.2f},\n{default['loss']:.2f}"
        " ([how](docs/benchmarks.md#time-to-a-held-out-loss))."
    )
