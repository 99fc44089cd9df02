"""Run every case with every library and print the results side by side; exit with 1 if Veneer fails
one."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import version

import torch

from report import RESULTS
from torture_cases.cases import CASES, Case, run
from torture_cases.judges import heard
from torture_cases.library import Library, Result
from torture_cases.ours import Veneer
from torture_cases.peers import PEERS

MARKS = {True: "ok", False: "WRONG", None: "–"}
NAME, CELL = 32, 34


def quietly(case: Case, library: Library) -> Result:
    """Run a case, without the peer's warnings, log and prints."""
    if isinstance(library, Veneer):
        return run(case, library)
    with (
        heard(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return run(case, library)


def line(cells: list[str]) -> str:
    """A row of the table: the first cell is a name, the others are wrapped."""
    columns = [textwrap.wrap(cell, CELL) or [""] for cell in cells[1:]]
    columns.insert(0, textwrap.wrap(cells[0], NAME))
    widths = [NAME] + [CELL] * (len(cells) - 1)
    lines = []
    for number in range(max(map(len, columns))):
        parts = [column[number] if number < len(column) else "" for column in columns]
        lines.append(
            "  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        )
    return "\n".join(lines)


def cell(result: Result) -> str:
    return f"{MARKS[result.ok]}  {result.text}"


def totals(results: Mapping[str, Mapping[str, Result]], library: str) -> str:
    marks = [row[library].ok for row in results.values()]
    return f"{marks.count(True)} ok, {marks.count(False)} wrong, {marks.count(None)} not offered"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run these cases, and write no file"
    )
    parser.add_argument(
        "--libraries", nargs="+", metavar="NAME", help="run these libraries, and write no file"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    everyone: list[Library] = [Veneer(), *PEERS]
    libraries = [
        it
        for it in everyone
        if not options.libraries or it.name.lower() in map(str.lower, options.libraries)
    ]
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    print(
        line(["case", *(f"{it.name} {version(it.distribution)}" for it in libraries)]), flush=True
    )
    results: dict[str, dict[str, Result]] = {}
    row = None
    for case in chosen:
        if case.row != row:
            row = case.row
            print(f"\n{row}", flush=True)
        results[case.name] = {it.name: quietly(case, it) for it in libraries}
        print(
            line([f"  {case.name}", *(cell(result) for result in results[case.name].values())]),
            flush=True,
        )
    print("\n" + line(["in all", *(totals(results, it.name) for it in libraries)]))
    if not options.only and not options.libraries:
        write(results, libraries)
    failed = [name for name, row in results.items() if "Veneer" in row and not row["Veneer"].ok]
    if failed:
        print(f"\nVENEER FAILS {len(failed)} OF {len(results)}: {', '.join(failed)}")
    return int(bool(failed))


def write(results: Mapping[str, Mapping[str, Result]], libraries: list[Library]) -> None:
    rows = {case.name: case.row for case in CASES}
    content = {
        "name": "torture",
        "cases": {
            name: {
                "row": rows[name],
                **{who: {"ok": it.ok, "text": it.text} for who, it in found.items()},
            }
            for name, found in results.items()
        },
        "versions": {it.name: version(it.distribution) for it in libraries},
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "torture.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
