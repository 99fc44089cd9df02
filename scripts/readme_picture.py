"""Make the README's picture and its caption: held-out loss by step of `veneer train`, compared with
TRL's SFTTrainer with PEFT for the same number of steps, from a recorded run. `python -m benchmarks
time_to_target` repeats the runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from veneer.tools.report import charts

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "before" / "time_to_target.json"
PICTURE = "docs/first-run.svg"
#: recorded arms with the same number of steps, by their names in the picture; TRL with PEFT has the
#: better of two settings
ARMS = {"veneer train": "veneer, as many steps", "TRL + PEFT": "trl + peft"}


def curve(arm: str, number: str) -> list[tuple[int, float]]:
    """(step, median over seeds of a number on held-out rows)."""
    runs = json.loads(RECORD.read_text())["curves"][arm]
    return [
        (points[0]["step"], statistics.median(point[number] for point in points))
        for points in zip(*runs, strict=True)
    ]


def picture() -> str:
    curves = {name: curve(arm, "loss") for name, arm in ARMS.items()}
    return charts.lines_file(curves, x="step", y="held-out loss")


def caption() -> str:
    losses, peer_losses = (curve(arm, "loss") for arm in ARMS.values())
    shares, peer_shares = (curve(arm, "accuracy") for arm in ARMS.values())
    return (
        "![Held-out loss by step: veneer train, and TRL with"
        f" PEFT]({PICTURE})\n\n**{shares[0][1]:.0%} → {shares[-1][1]:.0%} of held-out tokens"
        f" right**: SmolLM2-135M learns pronunciations in {losses[-1][0]} steps.\nTRL with PEFT:"
        f" {peer_shares[-1][1]:.0%}, at a loss of {peer_losses[-1][1]:.2f} beside"
        f" {losses[-1][1]:.2f} (medians of 3 seeds,\n"
        "[recorded before](docs/benchmarks.md#recorded-before))."
    )
