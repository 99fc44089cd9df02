"""How the overhead of a training step, its CPU time less the floor's, grows with tokens, rank and layers: exponents,
fitted by least squares to the logarithms.

On SmolLM2-135M's shape with a vocabulary of 512, so that the output head, which costs all the same, adds no noise. One
axis grows, the others stay at 256 tokens, rank 16 and 2 layers. Each point is the median over interleaved rounds of the
difference within a round. The residual is the root of the mean square of what the fit leaves in ln(overhead): 0.1 is
10 %. Where a median overhead is not above zero, there is nothing to fit, and it says so.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --axis rank --runs 15

Predicted: in tokens 0.9, in layers 1.0, in rank 0.4 (below rank 16 the skinny products are bound by memory), for both.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from candidates import ARCHITECTURES, DTYPES, llama, make, sharing, timed
from report import rounds, write

USUAL = {"tokens": 256, "rank": 16, "layers": 2}
AXES = {"tokens": (64, 128, 256, 512, 1024), "rank": (8, 16, 32, 64, 128), "layers": (1, 2, 4, 8)}
CANDIDATES = ("floor", "peft", "veneer, model's own attention and loss")


def point(dtype: str, runs: int, tiny: bool, tokens: int, rank: int, layers: int) -> dict[str, list[float]]:
    """Seconds of each candidate's steps, a step a round."""
    torch.manual_seed(0)
    changes = {} if tiny else {"vocab_size": 512}
    base = llama(layers, min(tokens, 256), tiny, **changes).to(DTYPES[dtype])
    batch = ARCHITECTURES["llama"].batch(base, tokens)
    made = {name: make(name, sharing(base), "llama", rank) for name in CANDIDATES}
    optimizers = {name: candidate.optimizer() for name, candidate in made.items()}

    calls = {name: lambda name=name: timed(made[name], optimizers[name], batch) for name in made}
    return rounds(calls, runs=runs, warmup=2)


def fit(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, float] | None:
    """cost ≈ factor · size ^ exponent, and what the fit leaves; None where a cost is not above zero."""
    if min(costs) <= 0:
        return None
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    slope, intercept = statistics.linear_regression(x, y)
    left = [value - (intercept + slope * place) for place, value in zip(x, y, strict=True)]
    residual = math.sqrt(statistics.fmean(part * part for part in left))
    return {"exponent": round(slope, 3), "factor": math.exp(intercept), "residual": round(residual, 3)}


def case(axis: str, sizes: Sequence[int], dtype: str, runs: int, tiny: bool, usual: dict[str, int]) -> dict[str, Any]:
    """Exponents along one axis: of the floor's own time, and of each candidate's overhead."""
    found = [point(dtype, runs, tiny, **{**usual, axis: size}) for size in sizes]
    rows: dict[str, Any] = {}
    for name in CANDIDATES:
        costs = [
            statistics.median(
                mine - (0 if name == "floor" else base) for mine, base in zip(costs[name], costs["floor"], strict=True)
            )
            for costs in found
        ]
        rows[name] = {"seconds": costs, "fit": fit(sizes, costs)}
    setting = {"axis": axis, "dtype": dtype, **{name: value for name, value in usual.items() if name != axis}}
    return {"setting": setting, "sizes": list(sizes), "floor": "floor", "runs": runs, "rows": rows}


def show(case: dict[str, Any]) -> None:
    axis = case["setting"]["axis"]
    print("scaling (" + ", ".join(f"{key} {value}" for key, value in case["setting"].items()) + ")")
    for name, row in case["rows"].items():
        what = "time" if name == case["floor"] else "overhead"
        points = ", ".join(
            f"{size}: {cost * 1000:.1f}" for size, cost in zip(case["sizes"], row["seconds"], strict=True)
        )
        law = (
            f"{axis}^{row['fit']['exponent']:.2f} (residual {row['fit']['residual']:.2f})"
            if row["fit"]
            else "no fit, not above zero everywhere"
        )
        print(f"  {name:<26} {what:<8} {law}   ms at {points}", flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--tiny", action="store_true", help="a model of a toy's width, three sizes an axis")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for dtype in options.dtype:
        for axis in options.axis:
            sizes, usual = AXES[axis], USUAL
            if options.tiny:
                sizes, usual = {"tokens": (16, 32, 64), "rank": (2, 4, 8), "layers": (1, 2, 3)}[axis], {
                    "tokens": 16, "rank": 4, "layers": 1,
                }  # fmt: skip
            cases.append(case(axis, sizes, dtype, options.runs, options.tiny, usual))
            show(cases[-1])
    if options.out is None and (options.axis, options.tiny) != (list(AXES), False):
        return {"name": "scaling", "cases": cases}
    return write("scaling", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
