"""Interleaved runs, ratios to a floor of the same round, medians with spread; printed, and written to
results/<name>.json."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def compare(
    name: str, candidates: Mapping[str, Callable[[], float]], *, floor: str, runs: int = 9, warmup: int = 1
) -> dict:
    """Run every candidate once a round (each returns its own cost, in seconds) and report cost / floor's cost, round
    by round."""
    costs: dict[str, list[float]] = {key: [] for key in candidates}
    for number in range(warmup + runs):
        for key, candidate in candidates.items():
            cost = candidate()
            if number >= warmup:
                costs[key].append(cost)
    rows = {}
    for key, values in costs.items():
        ratios = sorted(value / base for value, base in zip(values, costs[floor], strict=True))
        quarter = len(ratios) // 4
        rows[key] = {
            "ratio": round(statistics.median(ratios), 3),
            "low": round(ratios[quarter], 3),
            "high": round(ratios[-1 - quarter], 3),
            "seconds": statistics.median(values),
        }
    width = max(map(len, rows))
    print(f"{name}: ratio to {floor}, median (quartiles) of {runs} interleaved rounds")
    for key, row in rows.items():
        spread = f"({row['low']:.3f} to {row['high']:.3f})"
        print(f"  {key:<{width}}  {row['ratio']:6.3f}  {spread}   {row['seconds'] * 1000:10.2f} ms")
    result = {
        "name": name,
        "floor": floor,
        "runs": runs,
        "rows": rows,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result
