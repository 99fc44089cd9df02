from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from . import __doc__
from .judge import SECONDS, Outcome, judge_mutant, stands_in, table, work
from .seeds import write_all


def run(count: int, seed: int, start: int = 0) -> list[Outcome]:
    """The outcomes of ``count`` mutants, in a process that is started anew when it hangs or
    dies."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        while len(outcomes) < count:
            outcomes += _watch(Path(folder), seed, range(start + len(outcomes), start + count))
    return outcomes


def _write(folder: Path) -> None:
    logging.disable(logging.WARNING)  # of the libraries that PEFT looks for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_all(folder)
    finally:
        logging.disable(logging.NOTSET)


def _watch(folder: Path, seed: int, numbers: range, target: Any = work) -> list[Outcome]:
    """The outcomes of as many of these mutants as one process gets through."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=target, args=(theirs, folder, seed, numbers), daemon=True)
    process.start()
    theirs.close()
    outcomes: list[Outcome] = []
    current, wait, problem = None, 120.0, ""  # it imports torch first
    try:
        while True:
            if not _answers(ours, process, wait):
                problem = f"no end within {wait:.0f} s"
                break
            message: Any = ours.recv()
            if message is None:
                return outcomes
            current, wait = (message, SECONDS) if isinstance(message, int) else (None, 120.0)
            if isinstance(message, Outcome):
                outcomes.append(message)
    except EOFError:
        process.join()
        problem = f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if current is None:
        raise RuntimeError(f"the process that loads mutants does not work: {problem}")
    return [*outcomes, Outcome(current, "?", "?", "see --only", "failure", problem, SECONDS)]


def _answers(pipe: Any, process: Any, wait: float) -> bool:
    """Whether a process says something while it works for so many seconds, or in eight times as
    many: other work on the machine is no hang."""
    start, watched = time.perf_counter(), psutil.Process(process.pid)
    worked = sum(watched.cpu_times()[:2])
    while not pipe.poll(0.5):
        with contextlib.suppress(psutil.NoSuchProcess):  # poll will say so
            if (
                sum(watched.cpu_times()[:2]) - worked > wait
                or time.perf_counter() - start > 8 * wait
            ):
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which mutants")
    parser.add_argument("--only", type=int, help="one mutant, in this process")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _write(Path(folder))
            outcome = judge_mutant(arguments.only, arguments.seed, stands_in(Path(folder)))
        print(outcome.kind, outcome.seed, outcome.mutation, outcome.notes, outcome.text, sep="\n")
        return int(outcome.kind == "failure")
    start = time.perf_counter()
    outcomes = run(arguments.count, arguments.seed)
    failures = [outcome for outcome in outcomes if outcome.kind == "failure"]
    for failure in failures:
        print(
            f"FAILURE --seed {arguments.seed} --only {failure.number}: {failure.seed},"
            f" {failure.mutation}, {failure.notes}\n  {failure.text}"
        )
    print(table(outcomes))
    print(
        "refused: by one error, the model untouched. harmless: loads to the very outputs."
        " different: a valid folder of another adapter, where nothing can tell (no hashes, or all"
        " made anew)."
    )
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(
        f"{len(outcomes):,} mutants in {time.perf_counter() - start:.0f} s; the slowest, --only"
        f" {slowest.number}, took {slowest.seconds:.2f} s"
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
