"""Does loading one adapter slow those who are served meanwhile?

A thousand adapters are registered and the bank has room for a hundred. Streams run on warm ones. Now and then, in
turns, one more request comes, for one token: for an adapter that was never in memory and whose files are not in the
kernel's cache, or for one that is warm. The gaps between tokens of the streams are sorted by what happens in them:

    none        nothing
    loading     a cold adapter loads: from when its request is sent until the step that computes it
    cold        the step that computes that request, whose prompt every other row waits for
    warm        the same for an adapter that is in memory

So "loading" over "none" is what loading costs the others, and "cold" over "warm" what it costs in the step after it.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import os
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from report import spread
from serve_cases import against, client, servers

STREAMS, KEPT = 8, 4
KINDS = ("none", "loading", "cold", "warm")


async def watch(url: str, warm: Sequence[str], cold: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One block: streams on the first of the warm ones, and a window for each of the cold ones and as many others."""
    lengths, words = (options.shortest, min(64, options.longest)), options.vocabulary
    answers: list[client.Answer] = []
    windows: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    stop = asyncio.Event()
    async with client.session() as http:

        async def stream(number: int) -> None:
            turn = 0
            while not stop.is_set():
                ids = client.prompt((number, turn), *lengths, words)
                answers.append(
                    await client.ask(http, url, client.body(warm[number], ids, options.answer), number, turn)
                )
                turn += 1

        async def probe(kind: str, adapter: str) -> None:
            found = await client.ask(http, url, client.body(adapter, client.prompt(adapter, *lengths, words), 1))
            windows[kind].append((found.sent, found.times[0]))

        streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
        await asyncio.sleep(options.pause * 2)
        draw = random.Random(len(cold))
        kept = warm[STREAMS : STREAMS + KEPT]
        for number, name in enumerate(cold):
            kinds = [("cold", name), ("warm", kept[number % KEPT])]
            draw.shuffle(kinds)
            for kind, adapter in kinds:
                await asyncio.sleep(draw.uniform(0.5, 1.5) * options.pause)
                await probe(kind, adapter)
        stop.set()
        await asyncio.gather(*streams)
    return {"gaps": sort(answers, windows), "windows": windows}


def sort(answers: Sequence[client.Answer], windows: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    """The gaps between tokens by what happens in them; a window is from a request to its first token."""
    pairs = [pair for answer in answers for pair in pairwise(answer.times)]
    half = statistics.median(after - before for before, after in pairs) / 2  # a token of the same step is not later
    marks = sorted((start, end, kind) for kind, spans in windows.items() for start, end in spans)
    starts = [mark[0] for mark in marks]
    gaps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for before, after in pairs:
        last = bisect.bisect_left(starts, after) - 1  # windows do not overlap each other
        kind = "none"
        if last >= 0:
            _, end, asked = marks[last]
            if after < end - half:
                kind = "loading" if asked == "cold" else "none"
            elif before < end - half:
                kind = asked
        gaps[kind].append(after - before)
    return gaps


def run(place: Path, adapters: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The case, in blocks; each with cold adapters of its own."""
    log, cores = options.logs / "cold.log", len(os.sched_getaffinity(0))
    with servers.serve(against.ours(place, options), log, threads=cores) as server:
        each = asyncio.run(_touch(server.url, adapters[:1], options))
    limit = int(each * (options.resident + 0.5))
    with servers.serve(against.ours(place, options, "--memory", str(limit)), log, threads=cores) as server:
        warm = list(adapters[: options.resident])
        asyncio.run(_touch(server.url, warm, options))
        rest = iter(adapters[options.resident :])
        blocks = []
        for number in range(options.rounds):
            cold = [next(rest) for _ in range(options.loads)]
            asyncio.run(_touch(server.url, warm[: STREAMS + KEPT], options))
            blocks.append(asyncio.run(watch(server.url, warm, cold, options)))
            print(f"  block {number}: {told(blocks[-1])}", flush=True)
        resident = [entry for entry in _adapters(server.url) if entry["resident"]]
        memory = servers.memory([server])
    return case(blocks, options, registered=len(adapters), resident=len(resident), memory=memory)


async def _touch(url: str, names: Sequence[str], options: argparse.Namespace) -> int:
    """Ask each for a token; returns the bytes in memory of the last."""
    async with client.session() as http:
        for name in names:
            await client.ask(http, url, client.body(name, client.prompt(name, 4, 8, options.vocabulary), 1))
    return next(entry["bytes"] for entry in _adapters(url) if entry["name"] == names[-1])


def _adapters(url: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{url}/v1/adapters", trust_env=False, timeout=60).raise_for_status().json()
    return found if isinstance(found, list) else found["data"]


def told(block: dict[str, Any]) -> str:
    parts = []
    for kind, gaps in block["gaps"].items():
        cuts = client.percentiles(gaps)
        parts.append(f"{kind}: p50 {cuts['p50']:.1f} ms, p95 {cuts['p95']:.1f} of {len(gaps)} gaps")
    return "; ".join(parts)


def case(blocks: Sequence[dict[str, Any]], options: argparse.Namespace, **setting: Any) -> dict[str, Any]:
    """p95 of each kind of gap over that of "none", block by block, and of "cold" over "warm"."""
    cuts = [{kind: client.percentiles(gaps)["p95"] for kind, gaps in block["gaps"].items()} for block in blocks]
    rows = {}
    for kind in KINDS:
        gaps = [gap for block in blocks for gap in block["gaps"][kind]]
        waits = [end - start for block in blocks for start, end in block["windows"].get(kind, ())]
        rows[kind] = {
            **spread(cut[kind] / cut["none"] for cut in cuts),
            **client.percentiles(gaps),
            "gaps": len(gaps),
            "longest": round(max(gaps) * 1000, 2),
            "first": client.percentiles(waits) if waits else None,
        }
    setting |= {"streams": STREAMS, "loads": options.loads * options.rounds, "dtype": options.dtype[0]}
    memory = setting.pop("memory")
    return {
        "setting": setting, "floor": "none", "runs": len(blocks), "rows": rows, "memory": memory,
        "cold over warm": spread(cut["cold"] / cut["warm"] for cut in cuts),
    }  # fmt: skip


def show(case: dict[str, Any]) -> None:
    print(f"serve --cold ({', '.join(f'{key} {value}' for key, value in case['setting'].items())})")
    for kind, row in case["rows"].items():
        first = f"; first token of that request after {row['first']['p50']:.0f} ms" if row["first"] else ""
        print(
            f"  {kind:<7} p95 {row['p95']:7.1f} ms, {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
            f"of none; p50 {row['p50']:.1f}, longest {row['longest']:.0f} of {row['gaps']} gaps{first}"
        )
    row = case["cold over warm"]
    print(f"  cold over warm: {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
