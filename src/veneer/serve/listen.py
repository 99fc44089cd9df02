"""The listening socket, connections and signals of the server process.

first SIGTERM or Ctrl-C    /ready and new requests answer 503; running requests have ``grace``
                           seconds; then the process exits with status 0
second                     the process exits at once, with status 128 + the signal's number
SIGHUP                     the key file is read again; without a key file, like a first SIGTERM
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

#: seconds that connections may stay open after draining, when no request runs in the engine. A
#: request that still waits then, such as a poll of a training run, is cut off
CLOSE_SECONDS = 0.5
#: the answer when too many connections are open
_TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


class Connection(H11Protocol):
    """A connection, with limits on the number of open connections and on the time that a client may
    keep the server waiting."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > limits.CONNECTIONS:
            transport.write(_TOO_MANY_CONNECTIONS)
            transport.close()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in filter(None, (self._head_timer, self._stall_timer)):
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def pause_writing(self) -> None:
        """Start a timeout, after which the connection is aborted: the client reads more slowly than
        the server writes."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(limits.STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # closing would wait for a client that does not read

    def _wait_for_head(self) -> None:
        """Start the timeout for the headers of a request when the server begins to wait for them,
        and stop it once they are complete. Bytes that arrive in between do not restart it, so a
        client cannot hold the connection by sending headers slowly."""
        is_in_request = self.cycle is not None and not self.cycle.response_complete
        if is_in_request and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not is_in_request and self._head_timer is None:
            self._head_timer = self.loop.call_later(limits.HEAD_SECONDS, self._abort_idle)

    def _abort_idle(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """A uvicorn server that drains before it stops. ``run([bind(host, port)])`` serves until a
    signal or ``should_exit`` stops it.

    Args:
        app: the application.
        drain: is called as ``drain(grace)``. It refuses new requests and blocks until no request
            runs, for at most ``grace`` seconds.
        grace: seconds that running requests have after the first signal.
        started: called when the server listens.
        reload: called on SIGHUP, in a new thread; None treats SIGHUP as SIGTERM.
    """

    def __init__(
        self,
        app: Any,
        drain: Callable[[float], Any],
        grace: float,
        started: Callable[[], None] = lambda: None,
        reload: Callable[[], None] | None = None,
    ) -> None:
        config: Any = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
        )
        config.timeout_graceful_shutdown = CLOSE_SECONDS  # set here, as uvicorn declares it as int
        super().__init__(config)
        self._reload = reload
        self._drain, self._grace, self._on_started, self._draining = drain, grace, started, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            hangup = getattr(signal, "SIGHUP", None)  # None on Windows, which has no SIGHUP
            if (
                hangup is None
                or threading.current_thread() is not threading.main_thread()
                # under nohup, the signal is ignored, and must stay so
                or (self._reload is None and signal.getsignal(hangup) is signal.SIG_IGN)
            ):
                yield
                return
            previous_handler = signal.signal(hangup, self._handle_hangup)
            try:
                yield
            finally:
                signal.signal(hangup, previous_handler)

    def _handle_hangup(self, sig: int, frame: Any) -> None:
        if self._reload is not None:
            threading.Thread(target=self._reload, name="veneer-keys", daemon=True).start()
        elif not self._draining:  # a closing terminal may send SIGHUP several times
            self.handle_exit(sig, frame)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._draining:
            os._exit(128 + sig)
        self._draining = True
        threading.Thread(target=self._drain_and_stop, name="veneer-drain", daemon=True).start()

    def _drain_and_stop(self) -> None:
        log.info("Draining: what runs has %g s, new requests are refused", self._grace)
        deadline = time.monotonic() + self._grace
        try:
            self._drain(self._grace)
            # the engine is done, but parts of answers may not be sent yet: wait until they are
            while time.monotonic() < deadline and any(
                map(_has_unsent_data, [*self.server_state.connections])
            ):
                time.sleep(0.02)
        finally:
            self.should_exit = True


def _has_unsent_data(connection: Any) -> bool:
    """Whether bytes of an answer wait to be sent on a connection."""
    flow = connection.flow  # None while the connection is being made
    return flow is not None and (
        flow.write_paused or connection.transport.get_write_buffer_size() > 0
    )


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. ``ConfigError``: the port is in use, or the address does
    not belong to this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # so that a socket bound to "::" accepts IPv4 connections, too
        is_dual_stack = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            address, family=family, backlog=1024, dualstack_ipv6=is_dual_stack
        )
        # accepted connections inherit this option. asyncio would set it only on a socket that was
        # created with an explicit protocol (IPPROTO_TCP), and this one was not
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}, {error.strerror or error}",
            "a free address of this machine",
            "choose another with --host and --port",
        ) from error


def is_loopback(host: str) -> bool:
    """Whether ``host`` is "localhost" or a loopback address, so that only this machine can reach
    it."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
