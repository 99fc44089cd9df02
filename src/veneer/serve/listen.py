"""The process: sockets, connections, signals.

first SIGTERM or Ctrl-C    /ready and new requests answer 503, what runs has ``grace`` seconds; then
                           exit 0
second                     exit at once, with 128 + the signal's number
SIGHUP                     read the keys again; without a file of keys the same as a first SIGTERM
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.errors import ConfigError
from veneer.serve import limits

log = logging.getLogger("veneer.serve")

#: seconds for connections to close when no request runs any more. After that, requests that still
#: wait, such as a poll of a training run, are cut off
CLOSING = 0.5
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class Connection(H11Protocol):
    """A connection. Bounds limit how many are open and how long each may keep the server
    waiting."""

    _timer: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > limits.CONNECTIONS:
            transport.write(_FULL)
            transport.close()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self._timer, self._stall)):
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes."""
        super().pause_writing()
        self._stall = self.loop.call_later(limits.STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for a client that does not read

    def _wait_for_head(self) -> None:
        """Start the timeout when request headers are awaited, and stop it when they are complete.
        Further bytes do not restart it."""
        inside = self.cycle is not None and not self.cycle.response_complete
        if inside and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif not inside and self._timer is None:
            self._timer = self.loop.call_later(limits.HEAD_SECONDS, self._late)

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """A uvicorn server that drains before it stops. ``drain`` blocks until no request runs, for at
    most ``grace`` seconds. ``started`` is called when the server listens; ``reload`` is called on
    SIGHUP, in a new thread."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[float], Any], grace: float,
        started: Callable[[], None], reload: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._reload = reload
        self._drain, self._grace, self._on_started, self._draining = drain, grace, started, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none
            if hangup is None or threading.current_thread() is not threading.main_thread():
                yield
                return
            if self._reload is None and signal.getsignal(hangup) is signal.SIG_IGN:  # nohup
                yield
                return
            before = signal.signal(hangup, self._hang_up)
            try:
                yield
            finally:
                signal.signal(hangup, before)

    def _hang_up(self, sig: int, frame: Any) -> None:
        if self._reload is not None:
            threading.Thread(target=self._reload, name="veneer-keys", daemon=True).start()
        elif not self._draining:  # a closing terminal may send several
            self.handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._draining:
            os._exit(128 + sig)
        self._draining = True
        threading.Thread(target=self._stop, name="veneer-drain", daemon=True).start()

    def _stop(self) -> None:
        log.info("Draining: what runs has %g s, new requests are refused", self._grace)
        end = time.monotonic() + self._grace
        try:
            self._drain(self._grace)
            # an answer is complete only when the client has received all of it
            while time.monotonic() < end and any(
                map(_has_unsent, [*self.server_state.connections])
            ):
                time.sleep(0.02)
        finally:
            self.should_exit = True


def _has_unsent(connection: Any) -> bool:
    """Whether a part of an answer has not been sent yet."""
    flow = connection.flow  # None while the connection is being made
    return flow is not None and (
        flow.write_paused or connection.transport.get_write_buffer_size() > 0
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. ``ConfigError``: the port is in use, or the address does
    not belong to this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = (
            family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        )  # "::" then includes IPv4 addresses
        listening = socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=both)
        # inherited by the connections: asyncio sets it only for sockets that name their protocol
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        problem, do = (
            f"{host}:{port}, {error.strerror or error}",
            "choose another with --host and --port",
        )
        raise ConfigError(problem, "a free address of this machine", do) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make(
    app: Any, drain: Callable[[float], Any], grace: float,
    started: Callable[[], None] = lambda: None, reload: Callable[[], None] | None = None,
) -> Server:  # fmt: skip
    """A server for an application. ``run([bind(host, port)])`` serves until a signal or
    ``should_exit`` stops it."""
    config: Any = uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False
    )
    config.server_header = config.proxy_headers = False
    config.timeout_keep_alive, config.timeout_graceful_shutdown = 30, CLOSING
    return Server(config, drain, grace, started, reload)
