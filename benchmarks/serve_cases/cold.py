"""Does loading one adapter slow those who are served meanwhile?

A thousand adapters are registered and the bank has room for a hundred. Streams run on warm ones. Now and then, in
turns, one more request comes: for an adapter that was never in memory and whose files are not in the kernel's cache,
or for one that is warm. From when it is sent until its first token is a window. The gaps between tokens of the streams
are sorted by what they overlap: the window of a cold one, that of a warm one, or none.

A request costs its own prefill and its row whether its adapter is cold or not, so the windows of warm ones say what
loading alone adds; those with no window at all are what a user would call before.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from report import spread
from serve_cases import against, client, servers

STREAMS, KEPT = 8, 4


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


def sort(
    answers: Sequence[client.Answer], windows: dict[str, list[tuple[float, float]]]
) -> dict[str, list[float]]:  # fmt: skip
    """The gaps between tokens by what they overlap: "cold", "warm" or "none"."""
    marks = sorted((start, end, kind) for kind, spans in windows.items() for start, end in spans)
    starts = [mark[0] for mark in marks]
    gaps: dict[str, list[float]] = {"cold": [], "warm": [], "none": []}
    for answer in answers:
        for before, after in zip(answer.times, answer.times[1:], strict=False):
            last = bisect.bisect_left(starts, after) - 1  # windows do not overlap each other
            inside = last >= 0 and marks[last][1] > before
            gaps[marks[last][2] if inside else "none"].append(after - before)
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
    """p95 in the windows over p95 outside of them, block by block."""
    cuts = [{kind: client.percentiles(gaps) for kind, gaps in block["gaps"].items()} for block in blocks]
    rows = {}
    for kind in ("none", "warm", "cold"):
        waits = [end - start for block in blocks for start, end in block["windows"].get(kind, ())]
        rows[kind] = {
            **spread(cut[kind]["p95"] / cut["none"]["p95"] for cut in cuts),
            **client.percentiles([gap for block in blocks for gap in block["gaps"][kind]]),
            "gaps": sum(len(block["gaps"][kind]) for block in blocks),
            "longest": round(max(max(block["gaps"][kind]) for block in blocks) * 1000, 2),
            "first": client.percentiles(waits) if waits else None,
        }
    loading = spread(cut["cold"]["p95"] / cut["warm"]["p95"] for cut in cuts)
    setting |= {"streams": STREAMS, "loads": options.loads * options.rounds, "dtype": options.dtype[0]}
    memory = setting.pop("memory")
    return {
        "setting": setting, "floor": "none", "runs": len(blocks), "rows": rows, "cold over warm": loading,
        "memory": memory, "measured": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def show(case: dict[str, Any]) -> None:
    print(f"serve --cold ({', '.join(f'{key} {value}' for key, value in case['setting'].items())})")
    for kind, row in case["rows"].items():
        first = f"; its own first token after {row['first']['p50']:.0f} ms" if row["first"] else ""
        print(
            f"  {kind:<5} p95 {row['p95']:7.1f} ms, {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
            f"of none; p50 {row['p50']:.1f}, longest {row['longest']:.0f} of {row['gaps']} gaps{first}"
        )
    row = case["cold over warm"]
    print(f"  cold over warm: {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
