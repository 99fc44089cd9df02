"""A training step of every real architecture in the test suite (small, random weights), under the planner and with
every layer forced to the plain factored path: time under the planner / time without. Everything with a weight that
fits is adapted at rank 4. CPU time of one thread, in interleaved rounds of `--repeats` steps.

    python benchmarks/planner.py
    python benchmarks/planner.py --model llama resnet18 --runs 21

Predicted: 0.85 for transformers, where q, k and v run together, 1.00 for the rest, none above 1.03.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from tests.support.real_models import REAL

import veneer
from report import measure, show, write


def case(name: str, runs: int, repeats: int) -> dict[str, Any]:
    model, example, loss = REAL[name].build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what "all" leaves out
        handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets="all"))
    parameters = handle.parameters()

    def timed(path: str | None) -> float:
        start = time.process_time()
        with contextlib.nullcontext() if path is None else veneer.use(model, handle.name, path=path):
            for _ in range(repeats):
                torch.autograd.grad(loss(model(**example)), parameters, allow_unused=True)
        return (time.process_time() - start) / repeats

    calls: dict[str, Callable[[], float]] = {"factored": lambda: timed("factored"), "planner": lambda: timed(None)}
    return measure(calls, floor="factored", runs=runs, model=name)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for name in options.model:
        cases.append(case(name, options.runs, options.repeats))
        show("planner", cases[-1])
    slower = [one["setting"]["model"] for one in cases if one["rows"]["planner"]["low"] > 1]
    print(f"planner: {len(cases)} models, slower beyond the quartiles: {', '.join(slower) or 'none'}")
    if options.out is None and options.model != list(REAL):
        return {"name": "planner", "cases": cases}
    return write("planner", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
