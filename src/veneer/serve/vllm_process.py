"""A vLLM process that this server starts, watches and stops (``VllmProcess``), and the queue of
requests before it (``Gate``).

    start → loading → ready → (vLLM ends by itself: ``ready`` is false, and ``on_exit`` is called)

vLLM listens at a Unix socket in a folder that only the user of this process may enter, so clients
reach vLLM only through this server.
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

#: POLL_SECONDS: the time between two checks whether vLLM is ready. STOP_SECONDS: the time after
#: SIGTERM in which vLLM must end before it is killed.
POLL_SECONDS, STOP_SECONDS = 0.2, 20.0
#: environment variables for vLLM. The first one enables vLLM's routes that load adapters; the
#: second one keeps vLLM from sending usage statistics to its makers.
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
#: Python code that starts vLLM on Linux. It asks the kernel to send it SIGTERM when its parent,
#: this process, ends in any way (PR_SET_PDEATHSIG), and then replaces itself by the command in its
#: arguments, so that vLLM never outlives this server.
RUN_UNTIL_PARENT_ENDS = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)


class VllmProcess:
    """vLLM as the ``engine`` of a ``Service``.

    Args:
        command_line: vLLM's command line.
        socket_path: the path of the Unix socket at which vLLM listens.
        rows: the most requests that are sent to vLLM at one time.
        queue: the most requests that wait.
        timeout: seconds that an answer may take.
        on_exit: called in a thread, with the exit status, if vLLM ends without ``close``.
        folder: a temporary folder, with the socket and copies of adapters, that is removed when
            vLLM ends.
    """

    def __init__(
        self,
        command_line: Sequence[str],
        socket_path: Path,
        rows: int,
        queue: int,
        timeout: float,
        on_exit: Callable[[int], None],
        folder: TemporaryDirectory[str],
    ) -> None:
        self._command_line, self._socket_path = command_line, socket_path
        self._on_exit, self._timeout = on_exit, timeout
        self.gate, self._folder, self.salt_secret = Gate(rows, queue), folder, secrets.token_hex(16)
        self._closing = False
        self._process: subprocess.Popen[bytes] | None = None
        self._sync_client = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)),
            base_url="http://vllm",
            timeout=timeout,
        )
        self._async_client: httpx.AsyncClient | None = None
        self.ready = False

    def start(self) -> None:
        """Start vLLM, and wait until it has loaded the base and answers. ``ConfigError``: vLLM
        ended before."""
        wrapper_command = (
            [sys.executable, "-c", RUN_UNTIL_PARENT_ENDS] if sys.platform == "linux" else []
        )
        self._process = subprocess.Popen(
            [*wrapper_command, *self._command_line],
            # VENEER_LIBRARY is empty, so that Veneer's plug-in in vLLM does nothing: this server
            # loads the adapters itself
            env={**os.environ, **ENVIRONMENT, "VENEER_LIBRARY": ""},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # so that Ctrl-C ends vLLM only after its requests
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
            # first without httpx, which would leave a refused socket open
            with socket.socket(socket.AF_UNIX) as test_socket:
                test_socket.connect(str(self._socket_path))
        except OSError:
            return False
        try:
            return self._sync_client.get("/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _watch(self) -> None:
        """Wait until vLLM ends. If ``close`` was not called before, log an error, remove the folder
        and call ``on_exit``. Runs in a thread of its own."""
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
        """Send a POST request that is not a client's, such as to load an adapter, with ``body`` as
        JSON. Any thread may call this. Returns the HTTP status and the text of the answer.
        ``ConnectionError``: vLLM does not answer."""
        try:
            response = self._sync_client.post(path, json=body)
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client is closed
            raise ConnectionError(f"vLLM does not answer ({type(error).__name__})") from error
        return response.status_code, response.text

    def read(self, path: str) -> bytes:
        """The content of vLLM's answer to GET ``path``; empty if vLLM does not answer, or answers
        with another status than 200."""
        try:
            response = self._sync_client.get(path)
        except httpx.HTTPError:
            return b""
        return response.content if response.status_code == 200 else b""

    def model_card(self) -> dict[str, Any]:
        """The entry of the base in vLLM's answer to GET /v1/models."""
        return json.loads(self.read("/v1/models"))["data"][0]

    async def send(self, method: str, path: str, body: bytes, headers: Any) -> httpx.Response:
        """Forward a client's request to vLLM. Returns the answer as soon as its headers have
        arrived; the caller must read its body and close it. ``httpx.TransportError``: vLLM does
        not answer."""
        if self._async_client is None:
            # a new connection for each request, which is cheap at a Unix socket, so that no idle
            # connections stay open
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._async_client = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(self._socket_path), limits=limits),
                base_url="http://vllm",
                timeout=httpx.Timeout(self._timeout, connect=5),
            )
        request = self._async_client.build_request(method, path, content=body, headers=headers)
        return await self._async_client.send(request, stream=True)

    def drain(self, seconds: float) -> None:
        """Wait until no request runs or waits, but at most ``seconds``."""
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
    """A request that waits in the queue or was sent to vLLM, with the attributes that the scheduler
    reads (``scheduler.Waiting``). ``admitted``: a future that is done when it may be sent."""

    def __init__(
        self, owner: str, counted_adapter: str, blend_key: BlendKey, priority: int
    ) -> None:
        self.owner, self.counted_adapter = owner, counted_adapter
        self.blend_key, self.priority = blend_key, priority
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Gate:
    """The queue of requests before vLLM. At most ``rows`` requests are in vLLM at one time, and at
    most ``queue`` others wait. The next request to be sent is of the API key that was served the
    fewest tokens, and of its least served adapter (``scheduler.py``). Only the event loop may call
    the methods."""

    def __init__(self, rows: int, queue: int) -> None:
        self._max_running, self._scheduler = rows, Scheduler[Ticket](queue)
        self.running = 0

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    async def enter(self, ticket: Ticket) -> None:
        """Wait until the request may be sent to vLLM. If the caller is cancelled while it waits,
        the request leaves the queue. ``Busy``: the queue has no place for it."""
        self._scheduler.add(ticket)
        self._admit()
        try:
            await ticket.admitted
        except asyncio.CancelledError:
            if not self._scheduler.remove(ticket):
                self.leave(ticket, 0)
            raise

    def leave(self, ticket: Ticket, tokens: float) -> None:
        """Record that a request that was sent has ended, count its ``tokens`` for its key and
        adapter, and let the next request be sent."""
        self._scheduler.charge(ticket, tokens)
        self._scheduler.ended(ticket)
        self.running -= 1
        self._admit()

    def _admit(self) -> None:
        """Let waiting requests be sent to vLLM until ``rows`` of them run."""
        while self.running < self._max_running and (ticket := self._scheduler.take()) is not None:
            self.running += 1
            self._scheduler.began(time.monotonic())
            if not ticket.admitted.done():
                ticket.admitted.set_result(None)
