"""A vLLM that this process starts, watches and ends, and its routes, at a socket in a folder that
nobody else may enter: no client reaches them but through us.

    start → loading → ready → (it ends by itself: nothing is ready any more, ``lost`` is called)
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from veneer.errors import ConfigError
from veneer.serve.scheduler import Scheduler

log = logging.getLogger("veneer.serve")

#: seconds between two looks whether vLLM is ready, and for it to end before it is killed
LOOK, ENDING = 0.2, 20.0
#: vLLM's routes that load adapters are there with this alone
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
#: on Linux, a program that ends with its parent, however that ends (PR_SET_PDEATHSIG, SIGTERM)
FOLLOW = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


class VllmProcess:
    """vLLM, as the ``engine`` of a ``Service``. ``line``: its command line; ``address``: the socket
    at which it listens; ``lost`` is called, in a thread, if it ends by itself; ``folder``, a
    temporary one, is removed at the end."""

    def __init__(
        self, line: Sequence[str], address: Path, rows: int, queue: int, timeout: float,
        lost: Callable[[int], None] = lambda code: None, folder: Any = None,
    ) -> None:  # fmt: skip
        self._line, self._socket, self._lost, self._timeout = line, address, lost, timeout
        self.gate, self._folder, self.secret = Gate(rows, queue), folder, secrets.token_hex(16)
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._blocking = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(address)), base_url="http://vllm", timeout=timeout
        )
        self._client: httpx.AsyncClient | None = None
        self.ready = False

    def start(self) -> None:
        """Start vLLM, and wait until it answers. ``ConfigError``: it ended before that."""
        follow = [sys.executable, "-c", FOLLOW] if sys.platform == "linux" else []
        self._process = subprocess.Popen(
            [*follow, *self._line],
            env={**os.environ, **ENVIRONMENT, "VENEER_LIBRARY": ""},  # it finds no adapters itself
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # Ctrl-C is ours: what runs is finished first
        )
        try:
            while not self._is_healthy():
                if (code := self._process.poll()) is not None:
                    problem = f"vLLM, which ended with status {code} before it was ready"
                    do = "see its own words above"
                    raise ConfigError(problem, "one that loads the base", do)
                time.sleep(LOOK)
        except BaseException:
            self.close()
            raise
        self.ready = True
        threading.Thread(target=self._watch, name="veneer-vllm", daemon=True).start()

    def _is_healthy(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:  # httpx leaves one open that is refused
                probe.connect(str(self._socket))
        except OSError:
            return False
        try:
            return self._blocking.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _watch(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self.ready = False
        if not self._closing:
            log.error("vLLM ended by itself, with status %d; this server ends too", code)
            if self._folder is not None:
                self._folder.cleanup()
            self._lost(code)

    @property
    def running(self) -> int:
        return self.gate.running

    @property
    def waiting(self) -> int:
        return self.gate.waiting

    def post(self, path: str, body: Any) -> tuple[int, str]:
        """Status and text of the answer to a request of our own, from any thread. ``OSError``:
        there is none."""
        try:
            answer = self._blocking.post(path, json=body)
        except httpx.HTTPError as error:
            raise OSError(f"vLLM does not answer ({type(error).__name__})") from error
        return answer.status_code, answer.text

    def read(self, path: str) -> bytes:
        """The content of vLLM's answer at a path; nothing, if there is none."""
        try:
            answer = self._blocking.get(path)
        except httpx.HTTPError:
            return b""
        return answer.content if answer.status_code == 200 else b""

    def card(self) -> dict[str, Any]:
        """vLLM's own words on the base."""
        return json.loads(self.read("/v1/models"))["data"][0]

    async def send(self, method: str, path: str, body: bytes, headers: Any) -> httpx.Response:
        """The answer to a client's request, of which the body is still to be read; the caller
        closes it."""
        if self._client is None:
            # a connection each: at a socket it costs nothing, and none is left at the end
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits),
                base_url="http://vllm",
                timeout=httpx.Timeout(self._timeout, connect=5),
            )
        request = self._client.build_request(method, path, content=body, headers=headers)
        return await self._client.send(request, stream=True)

    def drain(self, seconds: float) -> None:
        """Wait, at most so long, until nothing runs."""
        end = time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < end:
            time.sleep(0.02)

    def close(self) -> None:
        self._closing, self.ready = True, False
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._blocking.close()
        if self._folder is not None:
            self._folder.cleanup()


class Ticket:
    """A request that waits for vLLM, or is there, as ``scheduler.Waiting``."""

    def __init__(self, owner: str, flow: str, key: Any, priority: int) -> None:
        self.owner, self.flow, self.key, self.priority = owner, flow, key, priority
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Gate:
    """Lets at most ``rows`` requests of all clients go to vLLM at a time, the least served key and
    adapter first, as the engine does with its rows. The event loop alone calls it."""

    def __init__(self, rows: int, queue: int) -> None:
        self._rows, self._scheduler = rows, Scheduler[Ticket](queue)
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    async def enter(self, ticket: Ticket) -> None:
        """Wait for its turn. ``Busy``: there is no place in the queue."""
        self._scheduler.add(ticket)
        self._admit()
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if not self._scheduler.remove(ticket):
                self.leave(ticket, 0)
            raise

    def leave(self, ticket: Ticket, tokens: float) -> None:
        """It has its answer, which took so many tokens."""
        self._scheduler.charge(ticket, tokens)
        self._scheduler.ended(ticket)
        self.running -= 1
        self._admit()

    def _admit(self) -> None:
        while self.running < self._rows and (ticket := self._scheduler.take()) is not None:
            self.running += 1
            self._scheduler.began(time.monotonic())
            if not ticket.turn.done():
                ticket.turn.set_result(None)
