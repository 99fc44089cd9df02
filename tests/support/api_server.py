"""A server for tests: Veneer's application on a real port, with a fake engine and a fake bank.

    with serving(tmp_path, "french") as it:
        it.client().models.list()

The engine answers each prompt with the text "w0 w1 w2 …", in words of one token; if the request has
a seed, the first word has this number. The answer ends after ``words`` words, and the engine waits
``pause`` seconds before each.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
from tests.support.tiny import tiny_tokenizer

from veneer.errors import AdapterError, SelectionError
from veneer.serve.access import Keyring
from veneer.serve.api import create
from veneer.serve.catalogue import Catalogue
from veneer.serve.listen import Server, bind
from veneer.serve.metrics import Metrics
from veneer.serve.requests import Busy, Piece, Request, Token
from veneer.serve.service import Service

BASE = "tiny"


@dataclass
class Ticket:
    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted_at: float = 1.0
    started_at: float | None = None
    cached: int = 0

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """An engine that writes each answer in a thread of its own."""

    def __init__(self, words: int = 8, pause: float = 0.0, observer: Any = None) -> None:
        self.words, self.pause, self.observer = words, pause, observer
        self.seen: list[Request] = []
        self.tickets: list[Ticket] = []
        self.threads: list[threading.Thread] = []
        self.ready, self.full, self.fails, self.late, self.refuses = True, False, "", False, False
        self.cause: Any = None
        self.lock = threading.Lock()
        self.running = self.waiting = 0

    def submit(self, request: Request, deliver: Any) -> Ticket:
        if self.full or self.refuses:
            raise Busy("Found: a full queue. Expected: room. Do: wait.", 2.3)
        ticket = Ticket(request)
        with self.lock:
            self.running += 1
        self.seen.append(request)
        self.tickets.append(ticket)
        thread = threading.Thread(target=self._write, args=(ticket, deliver), daemon=True)
        self.threads.append(thread)
        thread.start()
        return ticket

    def _write(self, ticket: Ticket, deliver: Any) -> None:
        request, finish = ticket.request, "length"
        sampling, text, generated = request.sampling, "", 0
        blend, ticket.started_at = request.blend, ticket.submitted_at + 0.01
        if self.observer:
            self.observer.started(blend, 0.01)
        if sampling.prompt_logprobs is not None:
            deliver(Piece("", prompt=_scored(request.prompt, sampling.prompt_logprobs)))
        for number in range(min(self.words, sampling.max_tokens)):
            if ticket.cancelled.wait(self.pause):
                finish = "cancelled"
                break
            if self.fails or self.late:
                finish = "error" if self.fails else "timeout"
                break
            word = f"w{number + (sampling.seed or 0)} "
            stop = next((stop for stop in sampling.stop if stop in text + word), None)
            visible_text = (
                word if stop is None else word[: max(0, (text + word).index(stop) - len(text))]
            )
            top_tokens = tuple((9, f"x{i}", -1.0 - i) for i in range(sampling.logprobs or 0))
            token = Token(7, word, None if sampling.logprobs is None else -0.5, top_tokens)
            text, generated = text + word, generated + 1
            deliver(Piece(visible_text, (token,)))
            if stop is not None:
                finish = "stop"
                break
        else:
            finish = "length" if sampling.max_tokens <= self.words else "stop"
        with self.lock:
            self.running -= 1
        if self.observer:
            self.observer.first_token(blend, 0.02)
            for _ in range(1, generated):
                self.observer.next_token(blend, 0.03)
            self.observer.tokens(blend, len(request.prompt), generated)
            self.observer.finished(blend, finish, 0.1)
        deliver(Piece("", (), finish, self.fails or None, self.cause if self.fails else None))

    def drain(self, seconds: float) -> None:
        self.refuses = True
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()
        for thread in self.threads:
            thread.join(timeout=10)


def _scored(prompt: tuple[int, ...], alternatives: int) -> tuple[Token, ...]:
    """The tokens "p0", "p1", … of a prompt. The second has the log-probability -0.2 and rank 2, the
    third -0.3 and rank 3, and so on."""
    top_tokens = tuple((9 + i, f"x{i}", -1.0 - i) for i in range(alternatives))
    return tuple(
        Token(token_id, f"p{i}", -(i + 1) / 10, top_tokens, i + 1) if i else Token(token_id, "p0")
        for i, token_id in enumerate(prompt)
    )


class FakeBank:
    """A bank that knows names and paths only. A folder with {"broken": true} in its config does not
    load."""

    def __init__(self) -> None:
        self.paths: dict[str, Path] = {}
        self.resident: set[str] = set()
        self.pinned: set[str] = set()
        self.loads = 0
        self.on_event: Any = None

    def throttle_loads(self) -> None:
        """Do nothing: no load takes long here."""

    def register(self, name: str, path: Path, *, replace: bool = False) -> None:
        if name in self.paths and not replace:
            raise SelectionError(f"Found: {name}, which is taken.")
        if not (path / "adapter_model.safetensors").is_file():
            raise AdapterError(f"Found: no tensors in {path}.")
        self.paths[name] = path
        self.resident.discard(name)
        self.pinned -= {name} if replace else set()

    def add(self, path: Path, name: str, *, replace: bool = False) -> str:
        if json.loads((path / "adapter_config.json").read_text()).get("broken"):
            raise AdapterError(f"Found: a damaged adapter {path.name}.")
        if replace:
            self.paths.pop(name, None)
        self.register(name, path)
        self.loads += 1
        self.resident.add(name)
        return name

    def remove(self, name: str) -> None:
        del self.paths[name]
        self.resident.discard(name)
        self.pinned.discard(name)
        if self.on_event:
            self.on_event("remove", name, 0.0)

    def pin(self, name: str) -> None:
        assert name in self.paths
        self.resident.add(name)
        self.pinned.add(name)

    def unpin(self, name: str) -> None:
        self.pinned.discard(name)

    def status(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name, path=path, resident=name in self.resident,
                bytes=100 * (name in self.resident), pinned=name in self.pinned, users=0, rank=4,
                variant="lora",
            )
            for name, path in list(self.paths.items())
        ]  # fmt: skip

    def acquire(self, blend: Mapping[str, float]) -> Future[Any]:
        raise AssertionError("the fake engine asks for no lease")


def adapter_at(path: Path, **fields: Any) -> Path:
    """A folder that looks like an adapter folder unless its tensors are read."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **fields}))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


@dataclass
class Served:
    url: str
    service: Service
    engine: FakeEngine
    bank: FakeBank
    folder: Path
    server: Any
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = "none") -> openai.OpenAI:
        """The client with this key. There is one for each key, open as long as the server."""
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20
            )
        return self.clients[key]

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=20)


def fake_service(folder: Path, *names: str, keys: Keyring | None = None, **engine: Any) -> Service:
    """A service on fakes, whose adapter folder holds adapters of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            adapter_at(folder / name)
    bank = FakeBank()
    catalogue = Catalogue(folder, bank, BASE)
    metrics = Metrics(catalogue.known)
    bank.on_event = metrics.event
    fake_engine = FakeEngine(observer=metrics, **engine)
    metrics.watch(fake_engine, bank)
    return Service(
        base=BASE, source="folder/tiny", tokenizer=tiny_tokenizer(), bank=bank, catalogue=catalogue,
        keys=keys or Keyring(), metrics=metrics, length=512, vocabulary=259, engine=fake_engine,
    )  # fmt: skip


@contextmanager
def listening(
    service: Service, grace: float = 5.0, *routers: Any, create: Any = create
) -> Iterator[tuple[str, Any]]:
    """Run a service on a free port, and yield (its address, its server)."""
    is_up, socket = threading.Event(), bind("127.0.0.1", 0)
    server = Server(create(service, *routers), service.drain, grace, is_up.set)
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    assert is_up.wait(20)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        service.close()
        assert not thread.is_alive()


@contextmanager
def serving(
    folder: Path, *names: str, keys: Keyring | None = None, grace: float = 5.0, **engine: Any
) -> Iterator[Any]:
    """Run a server on fakes, and yield it."""
    service = fake_service(folder, *names, keys=keys, **engine)
    with listening(service, grace) as (url, server):
        served = Served(url, service, service.engine, service.bank, folder, server)
        yield served
        for client in served.clients.values():
            client.close()


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until ``condition()`` is true, because another thread makes it so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def main() -> None:
    """Run a server in a separate process, for tests of signals: `python api_server.py FOLDER PAUSE
    GRACE`. It prints its address."""
    import logging

    logging.basicConfig(level=logging.INFO)
    folder, pause, grace = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    service = fake_service(folder, "french", words=20, pause=pause)
    socket = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{socket.getsockname()[1]}"
    server = Server(create(service), service.drain, grace, lambda: print(address, flush=True))
    server.run([socket])
    service.close()


if __name__ == "__main__":
    main()
