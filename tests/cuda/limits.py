"""What one layer with one variant may ask of a device: launches, waits and bytes of each operation,
as the code asked for when ``limits.txt`` was written. Less is fine; more fails.
``VENEER_WRITE_LIMITS=1 make test-cuda`` writes it anew, which is to be looked at before it is
committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.support.emulated_device import DEVICE, count

FILE = Path(__file__).with_name("limits.txt")
WRITE = bool(os.environ.get("VENEER_WRITE_LIMITS"))
#: bytes that an allocation more or less of a few numbers may take, and the share of them
SLACK, SHARE = 256, 1.1


class Cost(NamedTuple):
    launches: int
    waits: int
    bytes: int


Costs = dict[str, Cost]


def watching(into: Costs) -> Callable[[str], object]:
    """A watch for ``gpu_checks``: notes what each operation costs."""

    @contextmanager
    def watch(operation: str) -> Iterator[None]:
        before = DEVICE.device_held(0)
        DEVICE.device_reset_peak()
        with count() as seen:
            yield
        into[operation] = Cost(len(seen.launches), len(seen.waits), DEVICE.device_peak(0) - before)

    return watch


def read() -> dict[str, Costs]:
    """By the name of what is run, which has no blanks."""
    limits: dict[str, Costs] = {}
    for line in FILE.read_text().splitlines():
        key, *cells = line.split()
        limits[key] = {
            name: Cost(*map(int, cost.split("/")))
            for name, cost in (cell.split("=") for cell in cells)
        }
    return limits


def write(found: dict[str, Costs]) -> None:
    """Put what was found beside what the file holds of other layers."""
    whole = (read() if FILE.exists() else {}) | found
    lines = []
    for name, costs in sorted(whole.items()):
        cells = (f"{operation}={'/'.join(map(str, cost))}" for operation, cost in costs.items())
        lines.append(" ".join([name, *cells]))
    FILE.write_text("\n".join(lines) + "\n")


def kept(found: dict[str, Costs]) -> None:
    """Assert that nothing costs more than its limit, or write the limits."""
    if WRITE:
        write(found)
        return
    limits = read()
    problems = [one for name, costs in found.items() for one in exceeded(name, costs, limits)]
    assert not problems, "\n".join(problems)


def exceeded(name: str, costs: Costs, limits: dict[str, Costs]) -> list[str]:
    """What costs more than it may; what no limit is known of, too."""
    problems = []
    for operation, cost in costs.items():
        limit = limits.get(name, {}).get(operation)
        if limit is None:
            problems.append(
                f"{name}, {operation}: no limit is written (VENEER_WRITE_LIMITS=1 make test-cuda)"
            )
        elif (
            cost.launches > limit.launches
            or cost.waits > limit.waits
            or cost.bytes > limit.bytes * SHARE + SLACK
        ):
            problems.append(f"{name}, {operation}: {cost} where {limit} is the limit")
    return problems
