"""Run cases that LoRA libraries get wrong, each library at its defaults.

    python -m benchmarks.torture                                  every case with every library
    python -m benchmarks.torture conv2d_circular --library peft   one of them
    python -m benchmarks.torture --record                         into results/torture.json

Each line is the outcome, the number that the library gave and the right one. Exits with 1 if Veneer
is not right in a case.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import torch

from torture_cases.cases import CASES, run_case
from torture_cases.library import OUTCOMES, RIGHT, Library

LIBRARIES = ("Veneer", "Peft", "Lycoris", "Loralib")
RECORD = Path(__file__).parent / "results" / "torture.json"


def create_library(name: str) -> Library:
    return getattr(importlib.import_module(f"torture_cases.{name.lower()}_library"), name)()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="*", help="names of cases; without one, all")
    parser.add_argument(
        "--library", type=str.capitalize, choices=LIBRARIES, help="this one; without it, all"
    )
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} (of all)")
    options = parser.parse_args(arguments)
    if unknown := {*options.case} - {case.name for case in CASES}:
        parser.error(f"no case is called {', '.join(sorted(unknown))}")
    cases = [case for case in CASES if not options.case or case.name in options.case]
    torch.set_num_threads(1)
    libraries = [create_library(name) for name in LIBRARIES if options.library in (None, name)]
    record = {case.name: {"about": case.about, "results": {}} for case in cases}
    counts = {library.name: dict.fromkeys(OUTCOMES, 0) for library in libraries}
    failures = 0
    for case in cases:
        print(f"{case.name}: {case.about}", flush=True)
        for library in libraries:
            result = run_case(case, library)
            record[case.name]["results"][library.name] = {
                "outcome": result.outcome,
                "text": result.text,
                "got": result.got,
                "right": result.right,
            }
            counts[library.name][result.outcome] += 1
            failures += library.name == "Veneer" and result.outcome != RIGHT
            numbers = f" | got: {result.got} | right: {result.right}" if result.got else ""
            label = f"{library.name} {version(library.distribution)}"
            print(f"    {label}: {result.outcome}: {result.text}{numbers}", flush=True)
    for name, outcomes in counts.items():
        print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}")
    if options.record:
        if len(cases) < len(CASES) or options.library:
            parser.error("--record takes all cases and all libraries")
        content = {
            "versions": {library.name: version(library.distribution) for library in libraries},
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cases": record,
        }
        RECORD.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
