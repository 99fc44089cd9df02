"""Three servers as one, on loopback: how many requests find their adapter in memory, and what a killed server and
replaced adapters cost. 30 adapters of a tiny base, asked for by Zipf's law by 16 clients at once, each server of 8 rows
on a share of the cores; `veneer serve --replicas 3` on Ray, and three of `veneer serve` behind nginx and behind HAProxy
with the configurations of docs/serving.md.

A hit is a request that loads no adapter; "without first touches" leaves out the first one for each adapter. Killed:
SIGKILL for one server in the middle of the load, a third of which is streamed; failed is what a client saw fail that
had not begun, broken off is streams that had. Replaced: six adapters get other files one after the other under load;
mixed is an answer that is neither the old adapter's nor the new one's, and seconds how long the old one was seen.

    python benchmarks/cluster.py                     all fronts that are there
    python benchmarks/cluster.py --only nginx --quick

Predicted: 95 % of hits without first touches on Ray, since a home with all rows taken gives way and the next one loads
the adapter too; 98 % behind nginx, where it does not give way; no failed request, no mixed answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support import fleet

from report import write


def hits(where: fleet.Fleet, place: fleet.Place, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    asked = fleet.by_zipf(place.names, options.requests, seed)
    before = where.counted("veneer_adapter_loads_total")
    answers = asyncio.run(fleet.load(where, asked, clients=options.clients, tokens=8))
    loads, first = where.counted("veneer_adapter_loads_total") - before, len(set(asked)) if not before else 0
    return {
        "requests": len(asked), "loads": loads, "first": first, "failed": sum(bool(each.failed) for each in answers),
        "hits": 1 - loads / len(asked), "hits without first touches": 1 - (loads - first) / (len(asked) - first),
    }  # fmt: skip


def replaced(where: fleet.Fleet, place: fleet.Place, options: argparse.Namespace) -> dict[str, Any]:
    names, began = list(place.others), []

    def drive(count: int, **more: Any) -> list[fleet.Answer]:
        return asyncio.run(fleet.load(where, names * count, clients=options.clients, tokens=48, **more))

    def change() -> None:
        for name, folder in place.others.items():
            place.library.add(folder, name, overwrite=True)
        began.append(time.monotonic())

    old = {answer.adapter: answer.text for answer in drive(2)}
    answers = drive(options.requests // 4, streams=0.5, during=change)
    time.sleep(5)
    new = {answer.adapter: answer.text for answer in drive(2)}
    late = [each.began for each in answers if each.text == old[each.adapter] and each.began > began[0]]
    return {
        "requests": len(answers), "failed": sum(bool(each.failed) for each in answers),
        "mixed": sum(each.text not in (old[each.adapter], new[each.adapter]) for each in answers),
        "old": sum(each.text == old[each.adapter] for each in answers),
        "seconds": round(max(late, default=began[0]) - began[0], 1),
    }  # fmt: skip


def killed(where: fleet.Fleet, place: fleet.Place, options: argparse.Namespace) -> dict[str, Any]:
    asked = fleet.by_zipf(place.names, options.requests, seed=2)
    kill = lambda: fleet.kill_one(where)  # noqa: E731
    answers = asyncio.run(fleet.load(where, asked, clients=options.clients, tokens=16, streams=1 / 3, during=kill))
    failed = [each for each in answers if each.failed]
    broken = sum(each.finish is None for each in answers) - len(failed)
    return {"requests": len(answers), "failed": len(failed), "broken off": broken}


def measure(front: str, place: fleet.Place, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    setting = {"front": front, "replicas": 3, "rows": 8, "adapters": len(place.names), "clients": options.clients}
    with fleet.fleet(front, place, folder / front, rows=8) as where:
        case = {"setting": setting, "hits": hits(where, place, options, 0), "warm": hits(where, place, options, 1)}
        case["replaced"] = replaced(where, place, options)
        case["killed"] = killed(where, place, options)  # last: there is one server less now
    return case


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=fleet.FRONTS, default=fleet.FRONTS)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="few requests: does it run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.requests = 80
    cases = []
    with tempfile.TemporaryDirectory() as name:
        for front in options.only:
            if lacking := fleet.missing(front):
                print(f"{front}: no {lacking}")
                continue
            place = fleet.make_place(Path(name) / f"{front}-place", adapters=30, renewed=6)
            cases.append(measure(front, place, Path(name), options))
            print(cases[-1])
    return write("cluster", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
