"""Find out by training runs what every trainer does with an adapter of Veneer and of PEFT, and
record the results.

    python -m scripts.trainers            run everything, write benchmarks/results/trainers.json
                                          (then `make docs`)
    python -m scripts.trainers --check    run everything, fail if the record says something else
    python -m scripts.trainers SFT DPO    run the trainers whose names contain these, print their
                                          rows

Each cell of the table in docs/trainers.md is one result; `tests/support/trainer_cells.py` has the
checks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "trainers.json"
LIBRARIES = ("transformers", "trl", "accelerate", "pytorch-lightning", "peft", "torch")
#: the headings of the columns, by the names of the cells
HEADS = {
    "alone": "the adapter alone trains",
    "holds": "checkpoints hold it alone",
    "resume": "resumed, equal bit for bit",
    "bare": "so too where the trainer attaches",
    "best": "best model at the end",
    "loads": "`from_pretrained` of what it saves",
    "reference": "reference without a second copy",
}
NOT_OFFERED = "not offered by the trainer"


def table() -> str:
    """The recorded results as a table, with a numbered reason below it for each "no"."""
    record = json.loads(RECORD.read_text())
    notes: dict[str, int] = {}
    lines = [
        f"| Veneer, PEFT | {' | '.join(HEADS.values())} | checkpoint beside PEFT's |",
        "|---" * (len(HEADS) + 2) + "|",
    ]
    for name, row in record["trainers"].items():
        cells = [_cell(row["Veneer"][cell], row["PEFT"][cell], notes) for cell in HEADS]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['size']:.2f} |")
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, "", f"“–”: {NOT_OFFERED}. With {versions}.", "", *reasons])


def _cell(veneer_result: str, peft_result: str, notes: dict[str, int]) -> str:
    if veneer_result == peft_result == NOT_OFFERED:
        return "–"
    return ", ".join(_answer(answer, notes) for answer in (veneer_result, peft_result))


def _answer(answer: str, notes: dict[str, int]) -> str:
    word, _, reason = answer.partition(": ")
    return f"{word} ({notes.setdefault(reason, len(notes) + 1)})" if reason else answer


def run_trainers(only: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import datasets
    from tests.support.trainer_cells import CELLS, rows

    assert list(CELLS) == list(HEADS)
    datasets.disable_progress_bars()
    yield from rows(lambda run: not only or any(word in run.name for word in only))


def same_answers(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows have the same results. The sizes of checkpoints may differ slightly, with
    the names that a library writes."""
    has_similar_size = bool(first) and bool(second) and abs(first["size"] - second["size"]) < 0.1
    return has_similar_size and {**first, "size": None} == {**second, "size": None}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts.trainers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("only", nargs="*", help="run these trainers alone, and write nothing")
    parser.add_argument(
        "--check", action="store_true", help="fail if the record says something else"
    )
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, row in run_trainers(arguments.only):
        results[name] = row
        print(json.dumps({name: row}), file=sys.stderr)
    if arguments.check:
        recorded = json.loads(RECORD.read_text())["trainers"]
        stale = [
            name
            for name in {*results, *recorded}
            if name not in results or not same_answers(results[name], recorded.get(name, {}))
        ]
        if stale:
            print(
                f"Found: other answers of {', '.join(sorted(stale))}. Expected: those of"
                f" {RECORD.name}. Do: run python -m scripts.trainers and make docs, and commit."
            )
            return 1
    elif not arguments.only:
        versions = {name: version(name) for name in LIBRARIES}
        RECORD.write_text(json.dumps({"versions": versions, "trainers": results}, indent=1) + "\n")
    print(
        f"{len(results)} trainers: as recorded"
        if arguments.check
        else f"{len(results)} trainers asked"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
