"""A vLLM process that this server starts, watches and stops. It listens at a Unix socket in a
folder that only this user may enter, so clients reach it only through this server.

    start → loading → ready → (vLLM ends by itself: ``ready`` is false, and ``on_exit`` is called)
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
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from veneer.errors import ConfigError
from veneer.serve.scheduler import BlendKey, Scheduler

log = logging.getLogger("veneer.serve")

#: seconds between two checks whether vLLM is ready, and seconds that vLLM has to end after SIGTERM
#: before it is killed
POLL_SECONDS, STOP_SECONDS = 0.2, 20.0
#: variables of vLLM's environment; the first one enables the routes that load adapters
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
#: on Linux, a Python program that asks for SIGTERM when its parent, this process, ends in any way
#: (PR_SET_PDEATHSIG), and then replaces itself with the command of its arguments
RUN_UNTIL_PARENT_ENDS = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


class VllmProcess:
    """vLLM as the ``engine`` of a ``Service``.

    Args:
        command_line: vLLM's command line.
        address: the path of the socket at which vLLM listens.
        rows: the most requests that are sent to vLLM at one time.
        queue: the most requests that wait.
        timeout: seconds that an answer may take.
        on_exit: called in a thread, with the exit status, if vLLM ends by itself.
        folder: a temporary folder, removed when vLLM ends.
    """

    def __init__(
        self,
        command_line: Sequence[str],
        address: Path,
        rows: int,
        queue: int,
        timeout: float,
        on_exit: Callable[[int], None],
        folder: TemporaryDirectory[str],
    ) -> None:
        self._command_line, self._socket = command_line, address
        self._on_exit, self._timeout = on_exit, timeout
        self.gate, self._folder, self.secret = Gate(rows, queue), folder, secrets.token_hex(16)
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._sync_client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(address)), base_url="http://vllm", timeout=timeout
        )
        self._async_client: httpx.AsyncClient | None = None
        self.ready = False

    def start(self) -> None:
        """Start vLLM, and wait until it answers. ``ConfigError``: vLLM ended before that."""
        wrapper = [sys.executable, "-c", RUN_UNTIL_PARENT_ENDS] if sys.platform == "linux" else []
        self._process = subprocess.Popen(
            [*wrapper, *self._command_line],
            # without a library, Veneer's plug-in in vLLM does nothing (``vllm_plugin.py``)
            env={**os.environ, **ENVIRONMENT, "VENEER_LIBRARY": ""},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # Ctrl-C must not reach vLLM: running requests end first
        )
        try:
            while not self._is_healthy():
                if (exit_status := self._process.poll()) is not None:
                    raise ConfigError(
                        f"vLLM, which ended with status {exit_status} before it was ready",
                        "one that loads the base",
                        "see its own words above",
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise
        self.ready = True
        threading.Thread(target=self._watch, name="veneer-vllm", daemon=True).start()

    def _is_healthy(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:  # httpx would leave a refused socket open
                probe.connect(str(self._socket))
        except OSError:
            return False
        try:
            return self._sync_client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _watch(self) -> None:
        """Wait until vLLM ends, and report an end that this server did not ask for."""
        assert self._process is not None
        exit_status = self._process.wait()
        self.ready = False
        if not self._closing:
            log.error("vLLM ended by itself, with status %d; this server ends too", exit_status)
            self._folder.cleanup()
            self._on_exit(exit_status)

    @property
    def running(self) -> int:
        return self.gate.running

    @property
    def waiting(self) -> int:
        return self.gate.waiting

    def post(self, path: str, body: Any) -> tuple[int, str]:
        """Send a POST request of this server itself, from any thread. Returns the status and text
        of the answer. ``OSError``: vLLM does not answer."""
        try:
            answer = self._sync_client.post(path, json=body)
        except (httpx.HTTPError, RuntimeError) as error:  # the client may have been closed
            raise OSError(f"vLLM does not answer ({type(error).__name__})") from error
        return answer.status_code, answer.text

    def read(self, path: str) -> bytes:
        """The content of vLLM's answer to GET ``path``; empty if vLLM does not answer with 200."""
        try:
            answer = self._sync_client.get(path)
        except httpx.HTTPError:
            return b""
        return answer.content if answer.status_code == 200 else b""

    def model_card(self) -> dict[str, Any]:
        """vLLM's description of the base, from its /v1/models."""
        return json.loads(self.read("/v1/models"))["data"][0]

    async def send(self, method: str, path: str, body: bytes, headers: Any) -> httpx.Response:
        """Forward a client's request. Returns the answer, whose body is not read yet; the caller
        must close it."""
        if self._async_client is None:
            # one connection for each request: at a Unix socket this is cheap, and leaves none open
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._async_client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits),
                base_url="http://vllm",
                timeout=httpx.Timeout(self._timeout, connect=5),
            )
        request = self._async_client.build_request(method, path, content=body, headers=headers)
        return await self._async_client.send(request, stream=True)

    def drain(self, seconds: float) -> None:
        """Wait up to ``seconds`` until no request runs or waits."""
        deadline = time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        self._closing, self.ready = True, False
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._sync_client.close()
        self._folder.cleanup()


class Ticket:
    """A request that waits for its turn or was sent to vLLM, with the fields that the scheduler
    reads (``scheduler.Waiting``)."""

    def __init__(
        self, owner: str, counted_adapter: str, blend_key: BlendKey, priority: int
    ) -> None:
        self.owner, self.counted_adapter = owner, counted_adapter
        self.blend_key, self.priority = blend_key, priority
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Gate:
    """Lets at most ``rows`` requests of all clients be in vLLM at one time, while at most ``queue``
    others wait. As in Veneer's engine, the next one is of the least served key and adapter
    (``scheduler.py``). Only the event loop may call the methods."""

    def __init__(self, rows: int, queue: int) -> None:
        self._rows, self._scheduler = rows, Scheduler[Ticket](queue)
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    async def enter(self, ticket: Ticket) -> None:
        """Wait until the request may be sent. ``Busy``: the queue has no place for it."""
        self._scheduler.add(ticket)
        self._admit()
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            if not self._scheduler.remove(ticket):
                self.leave(ticket, 0)
            raise

    def leave(self, ticket: Ticket, tokens: float) -> None:
        """Record that the request has ended, and count its ``tokens`` for its key and adapter."""
        self._scheduler.charge(ticket, tokens)
        self._scheduler.ended(ticket)
        self.running -= 1
        self._admit()

    def _admit(self) -> None:
        """Let the next requests go to vLLM, as long as there are free rows."""
        while self.running < self._rows and (ticket := self._scheduler.take()) is not None:
            self.running += 1
            self._scheduler.began(time.monotonic())
            if not ticket.admitted.done():
                ticket.admitted.set_result(None)
