"""python -m experiments [NAME ...]: run experiments and record what came out; docs/paper/ is
written from it by `make docs`. Without a name: all that can run here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

from experiments import NAMES, find
from experiments.run import alone, record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--smoke", action="store_true", help="seconds, on tiny models: does it run")
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run that was stopped is"
    )
    parser.add_argument(
        "--at-once", type=int, default=len(os.sched_getaffinity(0)), help="processes at one time"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: experiments/results)"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        with contextlib.redirect_stdout(sys.stderr):
            found = alone(options.names[0], json.loads(options.cell))
        print(json.dumps(found))
        return 0
    lacking = {}
    for name in options.names or NAMES:
        experiment = find(name)
        lack = None if options.smoke else experiment.data()
        if lack:
            lacking[name] = lack
            print(f"{name}: left out. {lack}", file=sys.stderr)
            continue
        print(f"{name}: {experiment.title}", flush=True)
        result = record(
            name,
            smoke=options.smoke,
            resume=options.resume,
            at_once=options.at_once,
            out=options.out,
        )
        print(experiment.tables(result["runs"]))
        for claim in experiment.claims(result["runs"]):
            print(f"- {claim.what} ({claim.source}): {claim.found} [{claim.held}]", flush=True)
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
