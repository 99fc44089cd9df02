"""The one runner of the benchmarks.

A case has arms: callables that each do one unit of the same work in a process that is prepared for
all of them, the floor among them. The floor runs before and after each round; in between, every
other arm runs once, in an order that is drawn anew for the round (by a seed). The floor's time in a
round is the mean of the two. A case has several processes, so that the spread that is shown lies
between runs.

**What is thrown away.** `movement` of a round is the difference between the floor's wall times
before and after it, as a share of their mean. If it is above ``LIMIT``, the round counts for no
arm, its times stay in the record as thrown away, and another round follows. A process that has
too few rounds after ``ATTEMPTS`` times as many as it needs is thrown away, and another takes its
place. Where ``RETRIES`` others fail too, the case is given up and nothing of it is recorded: the
machine is not quiet. ``LIMIT`` is 10 %: the throughput of two threads of a virtual machine moves
by 5 to 30 % within ten seconds while nothing else runs on it. Ratios are of one round, so most of
such a drift cancels; what is left of it is in the spread between processes.

**Settings share a process** where they have the same threads, in an order that is drawn for each
process: most of a short case is the start of its processes. One that is thrown away runs again in a
process of its own.

**One arm a process** (``apart``): peaks of memory, and whole runs. Such a process has no rounds, so
nothing of it is thrown away; each is shown in the spread. `seed` is the number of the process.

A unit shorter than ``SHORTEST`` seconds is repeated, as often for each arm. Wall time is measured,
and CPU time beside it. The record holds every raw time, the machine, versions, threads, allocator,
commit and load.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT, ATTEMPTS, RETRIES, SHORTEST = 0.1, 4, 2, 0.4
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "loralib",
    "bitsandbytes",
    "torchao",
    "liger-kernel",
    "unsloth",
    "vllm",
    "veneer",
)
# : of the environment, what changes threads and the allocator: a process has its case's own
# settings and no others
TUNING = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")

Numbers = Mapping[str, float]
Arms = Mapping[str, Callable[[], Numbers | None]]


class RecordError(RuntimeError):
    """A case cannot be recorded here and now."""


@dataclass(frozen=True)
class Case:
    """The work that is measured.

    `arms(stack, seed, **setting)` prepares a process and names its arms; an arm may return further
    numbers of its unit, or replace "wall" and "cpu" by its own. `settings` are the columns of its
    table; "threads" of one is "default" or a count. `toy` replaces parts of each setting in a smoke
    run. `shown` has a title and a form for each number: "ratio" to the floor of the same round, or
    a format. `minutes` is what a record takes on two quiet cores, estimated.
    """

    name: str
    about: str
    equal: str
    floor: str
    settings: Sequence[Mapping[str, Any]]
    arms: Callable[..., Arms]
    toy: Mapping[str, Any]
    shown: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {"wall": ("wall time", "ratio")}
    )
    rounds: int = 3
    processes: int = 5
    seeds: Sequence[int] = ()
    apart: bool = False
    minutes: float = 1.0
    group: str = "bench"
    lacks: Callable[[], str | None] = lambda: None


def measure_unit(arm: Callable[[], Numbers | None], repeats: int) -> dict[str, float]:
    """Seconds of one unit, and what the arm says of it. Garbage is collected before."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    numbers = None
    for _ in range(repeats):
        numbers = arm()
    return {
        "wall": (time.perf_counter() - wall) / repeats,
        "cpu": (time.process_time() - cpu) / repeats,
        **(numbers or {}),
    }


def draw_order(names: Sequence[Any], *seed: Any) -> list[Any]:
    return random.Random(str(seed)).sample(list(names), len(names))


def arguments_of(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != "threads"}


def run_rounds(case: Case, setting: Mapping[str, Any], seed: int, rounds: int) -> dict[str, Any]:
    """All arms in this process, interleaved; where there are several rounds, one before them warms
    up. With one round, the floor runs in it and is not watched."""
    with contextlib.ExitStack() as stack:
        arms = case.arms(stack, seed, **arguments_of(setting))
        if rounds == 1:
            times = {name: [measure_unit(arm, 1)] for name, arm in arms.items()}
            return {"seed": seed, "rounds": times, "repeats": 1, "kept": True, **state_of()}
        for arm in arms.values():
            measure_unit(arm, 1)
        repeats = 1
        if (short := measure_unit(arms[case.floor], 1)["wall"]) < SHORTEST:
            repeats = min(1000, math.ceil(SHORTEST / short))
        others = [name for name in arms if name != case.floor]
        kept_rounds, thrown_away = [], []
        before = measure_unit(arms[case.floor], repeats)
        for number in range(ATTEMPTS * rounds):
            order = draw_order(others, case.name, seed, number)
            units = {name: measure_unit(arms[name], repeats) for name in order}
            after = measure_unit(arms[case.floor], repeats)
            moved = movement(before["wall"], after["wall"])
            done = {"order": order, "units": units, "floor": [before, after], "movement": moved}
            (kept_rounds if moved <= LIMIT else thrown_away).append(done)
            before = after
            if len(kept_rounds) == rounds:
                break
    times = {
        name: [
            mean_unit(*done["floor"]) if name == case.floor else done["units"][name]
            for done in kept_rounds
        ]
        for name in arms
    }
    return {
        "seed": seed,
        "rounds": times,
        "orders": [done["order"] for done in kept_rounds],
        "floors": [done["floor"] for done in kept_rounds],
        "movement": [done["movement"] for done in kept_rounds],
        "thrown_away": thrown_away,
        "repeats": repeats,
        "kept": len(kept_rounds) == rounds,
        **state_of(),
    }


def mean_unit(first: Numbers, second: Numbers) -> dict[str, Any]:
    """The mean of each number of two units; None where one of them lacks it."""
    return {
        name: None if number is None or second[name] is None else (number + second[name]) / 2
        for name, number in first.items()
    }


def run_alone(case: Case, setting: Mapping[str, Any], seed: int, arm: str) -> dict[str, Any]:
    """One unit of one arm, which has this process for itself."""
    with contextlib.ExitStack() as stack:
        unit = measure_unit(case.arms(stack, seed, **arguments_of(setting))[arm], 1)
    return {"seed": seed, "rounds": {arm: [unit]}, "kept": True, **state_of()}


def run_each_arm(
    case: Case, setting: Mapping[str, Any], seed: int, run: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Call `run` for each arm, in an order that the seed draws, and join the answers."""
    with contextlib.ExitStack() as stack:
        names = [*case.arms(stack, seed, **arguments_of(setting))]
    answers = {arm: run(arm) for arm in draw_order(names, case.name, seed)}
    rounds = {arm: answers[arm]["rounds"][arm] for arm in names}
    return {**next(iter(answers.values())), "rounds": rounds}


def movement(before: float, after: float) -> float:
    """The difference of two times, as a share of their mean."""
    return abs(after - before) / ((before + after) / 2)


def state_of() -> dict[str, Any]:
    """Threads and load of this process."""
    torch = sys.modules.get("torch")
    return {
        "threads": torch.get_num_threads() if torch else None,
        "load": os.getloadavg()[0],
        "tuning": {name: value for name, value in os.environ.items() if name.startswith(TUNING)},
    }


def environment(threads: Any) -> dict[str, str]:
    """As a user's own, who has set nothing; or with so many threads."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(TUNING)}
    counted = (
        {}
        if threads == "default"
        else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    )
    return {**plain, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **counted}


def child(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 4 * 3600
) -> dict[str, Any]:
    """Run Python with these arguments in the root of the repository; the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=env,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


#: answers of settings that ran in the process of another one, and all settings that ran so far
PENDING: dict[tuple[str, int, int], dict[str, Any]] = {}
MEASURED: set[tuple[str, int, int]] = set()


def settings_of_process(case: Case, index: int, seed: int) -> list[int]:
    """The settings that run in the process of this one: all with its threads, once for each seed.
    A setting that is thrown away runs in a process of its own."""
    threads = case.settings[index].get("threads")
    return [
        number
        for number, setting in enumerate(case.settings)
        if number == index
        or (setting.get("threads") == threads and (case.name, seed, number) not in MEASURED)
    ]


def run_process(case: Case, setting: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """One process of a case, for all settings that have its threads, in an order that the seed
    draws; with `apart`, one for each arm."""
    env = environment(setting.get("threads", "default"))
    index = next(i for i, candidate in enumerate(case.settings) if candidate is setting)
    if (pending := PENDING.pop((case.name, seed, index), None)) is not None:
        return pending
    name = f"{case.arms.__module__}:{case.name}"
    command = ["-m", "benchmarks", "--child", name, "--seed", str(seed), "--settings"]
    if case.apart:
        run_arm = functools.partial(child, *command, str(index), "--arm", env=env)
        return run_each_arm(case, setting, seed, run_arm)
    indices = draw_order(settings_of_process(case, index, seed), case.name, seed)
    answers = child(*command, ",".join(map(str, indices)), env=env)["settings"]
    keys = [(case.name, seed, number) for number in indices]
    MEASURED.update(keys)
    PENDING.update(zip(keys, answers, strict=True))
    return PENDING.pop((case.name, seed, index))


def gather(
    case: Case,
    setting: Mapping[str, Any],
    run: Callable[[Case, Mapping[str, Any], int], dict[str, Any]] = run_process,
) -> list[dict[str, Any]]:
    """Processes until enough of them were quiet. Raises RecordError after too many that were
    not."""
    processes: list[dict[str, Any]] = []
    for seed in case.seeds or range(case.processes):
        for _ in range(RETRIES + 1):
            processes.append(run(case, setting, seed))
            if processes[-1]["kept"]:
                break
            print(
                "  a process is thrown away: the floor moved in "
                f"{len(processes[-1]['thrown_away'])} rounds",
                flush=True,
            )
        else:
            raise RecordError(
                f"Found: {case.name}, {describe(setting)}: the floor moved by more than "
                f"{LIMIT:.0%} in most rounds of "
                f"{RETRIES + 1} processes. Expected: a quiet machine. Do: end other work and "
                "record it again."
            )
    return processes


def record(case: Case, run: Callable[..., dict[str, Any]] = run_process) -> dict[str, Any]:
    """The content of a recorded file."""
    commit = require_clean_tree()
    start = {
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
    }
    cases = []
    for setting in case.settings:
        cases.append({"setting": dict(setting), "processes": gather(case, setting, run)})
        print(
            f"{case.name}, {describe(setting)}: {summarise(case, cases[-1]['processes'])}",
            flush=True,
        )
    if require_clean_tree() != commit:
        raise RecordError(
            f"Found: another commit than {commit[:12]} at the end. Expected: one commit. Do: "
            "record again."
        )
    return {
        **describe_case(case),
        "commit": commit,
        "clean": True,
        **start,
        **machine(),
        "cases": cases,
    }


def describe_case(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "about": case.about,
        "equal": case.equal,
        "floor": case.floor,
        "shown": {number: list(form) for number, form in case.shown.items()},
    }


def smoke(case: Case, only: int | None = None) -> dict[str, Any]:
    """Each setting once, on toys, in this process: the form of a record, and no figures."""
    cases = []
    for setting in case.settings[:only]:
        toy = {**setting, **case.toy}
        if case.apart:
            process = run_each_arm(case, toy, 0, functools.partial(run_alone, case, toy, 0))
        else:
            process = run_rounds(case, toy, 0, 1)
        cases.append({"setting": dict(setting), "processes": [process]})
    return {
        **describe_case(case),
        "commit": "smoke",
        "clean": False,
        "recorded": "",
        "load": os.getloadavg()[0],
        **machine(),
        "cases": cases,
    }


def process_values(
    processes: Sequence[Mapping[str, Any]], arm: str, floor: str, number: str, form: str
) -> list[float]:
    """A value of each process that counts: a number's median over the rounds, or that of its ratio
    to the floor's in the same round. Processes without the number are left out."""
    values = []
    for process in processes:
        rounds = process["rounds"]
        if not process["kept"] or any(unit.get(number) is None for unit in rounds.get(arm, [{}])):
            continue
        units = [unit[number] for unit in rounds[arm]]
        if form == "ratio":
            floors = [unit[number] for unit in rounds[floor]]
            units = [unit / base for unit, base in zip(units, floors, strict=True) if base]
        values += [statistics.median(units)] if units else []
    return values


def spread(
    processes: Sequence[Mapping[str, Any]], arm: str, floor: str, number: str, form: str
) -> list[float] | None:
    """[median, least, most] of `process_values`; None without any."""
    values = process_values(processes, arm, floor, number, form)
    return [statistics.median(values), min(values), max(values)] if values else None


def summarise(case: Case, processes: Sequence[Mapping[str, Any]]) -> str:
    number, (_, form) = next(iter(case.shown.items()))
    cells = []
    for arm in processes[0]["rounds"]:
        numbers = spread(processes, arm, case.floor, number, form)
        cells.append(
            f"{arm} {numbers[0]:.3f} ({numbers[1]:.3f} to {numbers[2]:.3f})"
            if numbers
            else f"{arm} –"
        )
    return "; ".join(cells)


def describe(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())


def require_clean_tree() -> str:
    """The commit, whose tree this is but for results that were recorded since. Raises RecordError
    where it is not."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    results = git("status", "--porcelain", "--", "benchmarks/results").splitlines()
    if changed or not all(line.startswith("??") for line in results):
        raise RecordError(
            "Found: changes that are not committed. Expected: the tree of a commit, which the "
            "record names. "
            "Do: commit them, then record."
        )
    return git("rev-parse", "HEAD")


def machine() -> dict[str, Any]:
    """Where and with what a result is made."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    return {
        "machine": ", ".join([*models[:1], platform.machine()]),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "allocator": "changed by the environment" if tuned else "as it comes",
        "versions": {**versions, "python": platform.python_version()},
    }


def write(result: Mapping[str, Any], out: Path = RESULTS) -> Path:
    """Append a record: results/NAME/COMMIT.json. Raises RecordError where there is one of that
    commit."""
    file = out / result["name"] / f"{result['commit'][:12]}.json"
    if file.exists():
        raise RecordError(
            f"Found: {file}. Expected: one record of a commit. Do: commit a change, or keep that "
            "record."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file


def records(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All that was recorded of a case, the latest last."""
    return sorted(
        (json.loads(file.read_text()) for file in (folder / name).glob("*.json")),
        key=lambda result: result["recorded"],
    )


def names_of(results: Path = RESULTS) -> Iterator[Path]:
    """The recorded files of all cases."""
    for folder in sorted(results.iterdir()):
        if folder.is_dir() and folder.name not in ("before", "again"):
            yield from sorted(folder.glob("*.json"))
    yield from sorted((results / "again").glob("*/*.json"))


def call(
    function: str, *arguments: Any, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> Any:
    """MODULE:FUNCTION of the benchmarks in a process of its own, by way of JSON."""
    return child(*prefix, "-m", "benchmarks", "--call", function, json.dumps(arguments), env=env)
