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
    """The outcomes of ``count`` mutants. They are judged in a process that is restarted when it
    hangs or dies."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        while len(outcomes) < count:
            outcomes += _watch(Path(folder), seed, range(start + len(outcomes), start + count))
    return outcomes


def _write(folder: Path) -> None:
    logging.disable(logging.WARNING)  # PEFT warns of missing libraries
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_all(folder)
    finally:
        logging.disable(logging.NOTSET)


def _watch(folder: Path, seed: int, numbers: range, target: Any = work) -> list[Outcome]:
    """The outcomes of these mutants, until one process has judged all of them, hangs or dies."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=target, args=(sender, folder, seed, numbers), daemon=True)
    process.start()
    sender.close()
    outcomes: list[Outcome] = []
    current, wait, problem = None, 120.0, ""  # the first message comes after torch is imported
    try:
        while True:
            if not _has_message(receiver, process, wait):
                problem = f"no end within {wait:.0f} s"
                break
            message: Any = receiver.recv()
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


def _has_message(pipe: Any, process: Any, wait: float) -> bool:
    """Whether a process sends a message before it has worked for ``wait`` seconds of CPU time, and
    before eight times as much time has passed. (Other work on the machine may slow it down.)"""
    start, process_info = time.perf_counter(), psutil.Process(process.pid)
    start_cpu_seconds = sum(process_info.cpu_times()[:2])
    while not pipe.poll(0.5):
        with contextlib.suppress(psutil.NoSuchProcess):  # poll will tell
            if (
                sum(process_info.cpu_times()[:2]) - start_cpu_seconds > wait
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
