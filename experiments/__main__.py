"""python -m experiments [NAME ...]: run what is missing of some experiments, one after the other on
one thread, and record it in experiments/results/. `make docs` writes docs/paper/ from the records.

Without a name all experiments run but latency, which needs a machine without other work: run
`python -m experiments latency` by itself."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

from experiments import NAMES, RUN_ORDER, load_experiment, study


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    options = parser.parse_args(arguments)
    failed = False
    for name in options.names or RUN_ORDER:
        experiment = load_experiment(name)
        if missing := experiment.missing_data():
            print(f"{name} is left out. {missing}", file=sys.stderr)
            failed = True
            continue
        print(f"{name}: {experiment.title}", flush=True)
        try:
            path = study.record(name, experiment, fresh=options.fresh)
        except Exception:  # the next experiment does not depend on this one
            traceback.print_exc()
            failed = True
            continue
        print(f"{name} is complete: {path}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
