"""What the benchmarks share: interleaved rounds, ratios to a floor of the same round, medians with quartiles; printed,
and written to results/<name>.json, from which `make docs` makes the tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
#: glibc gives large blocks back to the system and asks for them again in each step, unless these are set
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
PACKAGES = (
    "torch", "transformers", "peft", "trl", "loralib", "bitsandbytes", "torchao", "liger-kernel", "unsloth", "vllm",
    "veneer",
)  # fmt: skip


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Median and quartiles, under the names of a row: ratio, low, high."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    numbers = {"ratio": statistics.median(ordered), "low": ordered[quarter], "high": ordered[-1 - quarter]}
    return {name: round(number, digits) for name, number in numbers.items()}


def rounds(candidates: Mapping[str, Callable[[], float]], *, runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """What each candidate's calls cost (each returns it, in seconds), a call a round.

    Each round begins with another candidate: what ran before leaves its mark on caches and on the allocator.
    """
    names = list(candidates)
    costs: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + runs):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cost = candidates[name]()
            if number >= warmup:
                costs[name].append(cost)
    return costs


def measure(
    candidates: Mapping[str, Callable[[], float]],
    *,
    floor: str,
    runs: int,
    warmup: int = 1,
    pairs: Mapping[str, tuple[str, str]] | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """A case: every candidate's cost / floor's cost, round by round; and by the name of a row the first of two
    candidates over the second (`pairs`). `setting` says what the case was."""
    costs = rounds(candidates, runs=runs, warmup=warmup)
    ratios = {name: (name, floor) for name in costs} | dict(pairs or {})
    rows = {
        name: {
            **spread(value / base for value, base in zip(costs[one], costs[other], strict=True)),
            "seconds": statistics.median(costs[one]),
        }
        for name, (one, other) in ratios.items()
    }
    return {"setting": setting, "floor": floor, "runs": runs, "rows": rows}


def show(name: str, case: Mapping[str, Any]) -> None:
    """Print a case of `measure`."""
    setting = ", ".join(f"{key} {value}" for key, value in case["setting"].items())
    print(f"{name}{f' ({setting})' if setting else ''}: ratio to {case['floor']}, ", end="")
    print(f"median (quartiles) of {case['runs']} interleaved rounds")
    width = max(map(len, case["rows"]))
    for key, row in case["rows"].items():
        quartiles = f"({row['low']:.3f} to {row['high']:.3f})"
        print(f"  {key:<{width}}  {row['ratio']:6.3f}  {quartiles}   {row['seconds'] * 1000:10.2f} ms", flush=True)


def machine() -> dict[str, Any]:
    """Where and with what a result was made."""
    cpu = Path("/proc/cpuinfo")
    found = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    tuned = all(os.environ.get(name) for name in ALLOCATOR)
    return {
        "machine": f"{found[0].partition(':')[2].strip()}, {platform.machine()}" if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "allocator": "large blocks kept" if tuned else "as it comes",
        "versions": {**versions, "python": platform.python_version()},
    }


def write(name: str, result: Mapping[str, Any], out: Path | None = None) -> dict[str, Any]:
    """Write `result` with its name and machine to `out` (benchmarks/results, if None)."""
    whole = {"name": name, **result, **machine()}
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")
    return whole


@contextmanager
def untuned() -> Iterator[None]:
    """Processes that are started meanwhile have the allocator as it comes."""
    kept = {name: os.environ.pop(name) for name in ALLOCATOR if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def compare(
    name: str,
    candidates: Mapping[str, Callable[[], float]],
    *,
    floor: str,
    runs: int = 9,
    warmup: int = 1,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure one case, print it and write it."""
    case = measure(candidates, floor=floor, runs=runs, warmup=warmup)
    show(name, case)
    return write(name, case, out)


def child(script: str, *arguments: str, timeout: float = 1800, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `script` in a process of its own, with `env` set besides, and return the JSON of its last line."""
    own, command = {**os.environ, **(env or {})}, [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=own)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
