"""Record the benchmarks: ``python -m benchmarks [NAME…]``.

    python -m benchmarks                 all of the group "bench" (--list has the minutes)
    python -m benchmarks step forward    these
    python -m benchmarks --group serve   of another group: serve ($VLLM), tasks, plan, earlier
    python -m benchmarks --list          the cases, their settings and the time that they take
    python -m benchmarks --smoke         toys, in this process: does it run; records nothing
    python -m benchmarks --again DIR     record into DIR, to hold beside what is recorded

A record needs a tree without changes, and goes to benchmarks/results/NAME/COMMIT.json; then `make
docs`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import runner  # noqa: E402 (behind the folders)
from cases import all_cases  # noqa: E402


def answer_parent(options: argparse.Namespace) -> None:
    """Run MODULE:NAME for a parent, a case or a function; the answer is the last line."""
    name, _, inside = (options.child or options.call[0]).partition(":")
    module = importlib.import_module(name)
    with contextlib.redirect_stdout(sys.stderr):
        if options.call:
            answer = getattr(module, inside)(*json.loads(options.call[1]))
        else:
            case = next(case for case in module.CASES if case.name == inside)
            settings = [case.settings[int(index)] for index in options.settings.split(",")]
            if options.arm:
                answer = runner.run_alone(case, settings[0], options.seed, options.arm)
            else:
                answer = {"settings": []}
                for setting in settings:
                    rounds = runner.run_rounds(case, setting, options.seed, case.rounds)
                    answer["settings"].append(rounds)
                    gc.collect()
    print(json.dumps(answer))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help="a case; --list has their names")
    parser.add_argument(
        "--group", default="bench", choices=("bench", "plan", "serve", "tasks", "earlier")
    )
    parser.add_argument("--list", action="store_true", help="print the cases and their estimates")
    parser.add_argument("--smoke", action="store_true", help="toys: does it run")
    parser.add_argument(
        "--again", type=Path, default=runner.RESULTS, metavar="DIR", help="record into this folder"
    )
    for name in ("--child", "--settings", "--arm"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child or options.call:
        answer_parent(options)
        return 0
    cases = all_cases()
    if unknown := [name for name in options.name if name not in cases]:
        raise SystemExit(
            f"Found: {', '.join(unknown)}. Expected: names of cases. Do: python -m benchmarks "
            "--list"
        )
    chosen = [cases[name] for name in options.name] or [
        case for case in cases.values() if case.group == options.group
    ]
    print(
        f"{len(chosen)} cases, about {sum(case.minutes for case in chosen):.0f} minutes on two "
        "quiet cores",
        flush=True,
    )
    failed = []
    for case in chosen:
        if options.list:
            print(
                f"{case.name:<16} {case.minutes:4.1f} min  {len(case.settings)} settings  "
                f"{case.about}"
            )
        elif missing := case.lacks():
            print(f"{case.name} is left out: it needs {missing}", flush=True)
        elif options.smoke:
            for result in runner.smoke(case)["cases"]:
                print(
                    f"{case.name}, {runner.describe(result['setting'])}: "
                    f"{', '.join(result['processes'][0]['rounds'])}"
                )
        else:
            try:
                print(runner.write(runner.record(case), options.again), flush=True)
            except (runner.RecordError, RuntimeError) as error:
                print(f"{case.name}: {error}", file=sys.stderr, flush=True)
                failed.append(case.name)
    print(f"not recorded: {', '.join(failed)}" if failed else "done")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
