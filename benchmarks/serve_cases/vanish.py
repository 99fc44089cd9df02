"""What clients that go away in the middle of an answer leave behind: memory, threads, files, rows, leases.

Each client asks, reads for a while that is drawn anew each time (it may be over before the first token, or before the
request has left the queue), and closes its connection. What the server holds is read when it is idle: after all rows
were full and a short storm, which grow what grows once, and after a long storm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from serve_cases import against, client, cold, servers
from serve_cases.servers import Server


async def storm(url: str, adapters: Sequence[str], seconds: float, options: argparse.Namespace) -> dict[str, int]:
    """Clients that come and vanish for so long. Counts what became of their requests."""
    until = time.monotonic() + seconds
    counts = {"vanished": 0, "refused": 0, "finished": 0}
    async with client.session() as http:

        async def one(number: int) -> None:
            draw, turn = random.Random(number), 0
            while time.monotonic() < until:
                turn += 1
                ids = client.prompt((number, turn), options.shortest, options.longest, options.vocabulary)
                request = client.body(draw.choice(adapters), ids, options.answer)
                patience = draw.choice((0.01, 0.1, 1, 5)) * draw.random()
                try:
                    counts[await asyncio.wait_for(_listen(http, url, request), patience)] += 1
                except TimeoutError:
                    counts["vanished"] += 1

        await asyncio.gather(*(one(number) for number in range(options.vanishing)))
    return counts


async def fill(url: str, adapters: Sequence[str], options: argparse.Namespace) -> None:
    """Let every row be as long as one can be in the storm: the memory of keys and values grows once and stays."""
    length = options.longest + options.answer - 2
    await client.together(
        lambda adapter: url, adapters, clients=options.rows, turns=1, tokens=2, lengths=(length, length),
        vocabulary=options.vocabulary,
    )  # fmt: skip


async def _listen(http: httpx.AsyncClient, url: str, request: dict[str, Any]) -> str:
    async with http.stream("POST", f"{url}/v1/completions", json=request) as response:
        if response.status_code == 429:
            return "refused"
        if response.status_code != 200:
            raise client.BenchmarkError(f"{response.status_code}: {(await response.aread()).decode()[:500]}")
        async for chunk in client.events(response):
            if "error" in chunk:
                raise client.BenchmarkError(str(chunk["error"]))
    return "finished"


def holds(server: Server, seconds: float = 60) -> dict[str, Any]:
    """What the server holds when it is idle, or after so long if it never is."""
    until = time.monotonic() + seconds
    while True:
        time.sleep(1)
        found = gauges(server.url)
        found["users"] = sum(entry["users"] for entry in cold._adapters(server.url))
        if not any(found.values()) or time.monotonic() > until:
            return {**servers.usage(server), **found}


def gauges(url: str) -> dict[str, float]:
    """Rows that run and requests that wait, as /metrics says."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=60).raise_for_status().text
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    values = {name: float(value) for name, value in lines if "{" not in name}
    return {name: values[f"veneer_{name}"] for name in ("running", "waiting")}


async def sampled(server: Server, adapters: Sequence[str], options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """A long storm, and the server's resident bytes and threads while it lasts."""
    start, series = time.monotonic(), []

    async def look() -> None:
        while True:
            await asyncio.sleep(max(0.5, options.seconds / 60))
            now = servers.usage(server)
            series.append([round(time.monotonic() - start, 1), now["rss"], now["threads"], now["files"]])

    looking = asyncio.create_task(look())
    counts = await storm(server.url, adapters, options.seconds, options)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    return counts, series


def run(place: Path, adapters: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The case: what was held before and after, and that the server answers as it did."""
    with servers.serve(
        against.ours(place, options), options.logs / "vanish.log", threads=len(os.sched_getaffinity(0))
    ) as server:

        def asked() -> list[str]:
            async def one() -> client.Answer:
                ids = client.prompt("same", options.shortest, options.longest, options.vocabulary)
                async with client.session() as http:
                    return await client.ask(http, server.url, client.body(adapters[0], ids, options.tokens))

            return asyncio.run(one()).words

        words = asked()
        asyncio.run(fill(server.url, adapters, options))
        asyncio.run(storm(server.url, adapters, options.warmup, options))
        before = holds(server)
        print(f"  before: {before}", flush=True)
        counts, series = asyncio.run(sampled(server, adapters, options))
        after = holds(server)
        print(f"  after {counts}: {after}", flush=True)
        again = asked() == words
    setting = {"clients": options.vanishing, "seconds": options.seconds, "dtype": options.dtype[0],
               "adapters": len(adapters), "rows": options.rows}  # fmt: skip
    return {"setting": setting, "before": before, "after": after, "requests": counts, "series": series,
            "same answer": again, "growth a minute": growth(series)}  # fmt: skip


def growth(series: Sequence[Sequence[float]]) -> float | None:
    """Bytes a minute by which the second half of the storm grew, by least squares."""
    half = series[len(series) // 2 :]
    if len(half) < 3:
        return None
    return statistics.linear_regression([row[0] / 60 for row in half], [row[1] for row in half]).slope


def show(case: dict[str, Any]) -> None:
    print(f"serve --vanish ({', '.join(f'{key} {value}' for key, value in case['setting'].items())})")
    for name, before in case["before"].items():
        after = case["after"][name]
        mib = name == "rss"
        print(
            f"  {name:<8} {before / 2**20 if mib else before:,.0f} before, {after / 2**20 if mib else after:,.0f} after"
        )
    print(f"  {case['requests']}; the same answer afterwards: {case['same answer']}")
