"""Middleware of every route. Before a route: checks of the key, and of the size and timely arrival
of the body. After it: the id, headers, log line and span of the answer.

    limits of a connection (serve/listen.py) ──▶ Guard ──▶ routes

A body is read completely before a route runs, within a limit of bytes and of seconds. Under /v1 a
request without a valid key is refused before its body is read. Queries, headers and bodies are
never logged.

A server without keys answers loopback names in the Host header alone: a web page that points a name
of its own at
127.0.0.1 (DNS rebinding) is refused. Bodies must be application/json, which a page of another
origin cannot send without being asked first, and only ``--cors`` allows it (serve/cors.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers

from veneer.errors import sentence
from veneer.serve import cors, limits
from veneer.serve.extension import Extension
from veneer.serve.refusal import RETRY, Refusal, draining
from veneer.serve.request_log import CURRENT, ID_HEADER, RequestRecord, request_id_of

log = logging.getLogger("veneer.serve.access")

#: paths that are served while the server drains: those for operators, and the files of the page
ALWAYS = ("/health", "/ready", "/metrics")
#: paths that need a key, besides those of extensions
KEYED = ("/v1", "/v2", "/tokenize", "/detokenize", "/score", "/rerank")
PAGE = "/web/"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware of a ``Service``, of which it reads keys, hosts, cors, tracer, metrics,
    extensions and draining."""

    def __init__(self, app: Any, service: Any) -> None:
        self.app, self.service = app, service
        self.held: Counter[str | None] = (
            Counter()
        )  # bytes of bodies in memory, by owner of the key; None: requests without a key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        logged_path = ascii(self._mask(path)[:200])[1:-1]
        sent_ids = headers.getlist(ID_HEADER)
        record = RequestRecord(request_id_of(sent_ids), scope["method"], logged_path)
        added = self._added_headers(path, record.request_id, headers.get("origin"))
        names = {name for name, _ in added}

        async def reply(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self.service.metrics.responses.labels(str(record.status)).inc()
                # already added by a replica behind this server
                theirs = [pair for pair in message.get("headers", ()) if pair[0] not in names]
                message = {**message, "headers": [*theirs, *added]}
            await send(message)

        # the next server, such as a replica, uses the same request id
        unnamed = [pair for pair in scope["headers"] if pair[0].lower() != ID_HEADER.encode()]
        scope["headers"] = [*unnamed, (ID_HEADER.encode(), record.request_id.encode())]
        token = CURRENT.set(record)
        try:
            await self._pass(scope, receive, reply)
        except Exception:
            if not record.status:
                await _bug().response(scope["path"])(scope, receive, reply)
            raise  # so that it is in the log
        finally:
            CURRENT.reset(token)
            record.key = getattr(scope.get("state", {}).get("key"), "name", None)
            record.total_seconds = time.monotonic() - record.started
            self._report(record, path, headers)

    def _added_headers(
        self, path: str, request_id: str, origin: str | None
    ) -> list[tuple[bytes, bytes]]:
        """The headers of every answer."""
        private = [(b"cache-control", b"no-store")] if self._is_private(path) else []
        allowed = cors.origin_headers(self.service.cors, origin)
        return [(ID_HEADER.encode(), request_id.encode()), *_HEADERS, *private, *allowed]

    def _report(self, record: RequestRecord, path: str, headers: Headers) -> None:
        """Log a request that has ended, and export its span."""
        # routes that are polled every few seconds are logged only when they fail
        quiet = record.status == 200 and path in ALWAYS
        level = logging.DEBUG if quiet else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s", record.line(), extra={"request": record.fields()})
        if self.service.tracer is not None and not quiet:
            self.service.tracer.send(record, headers)

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        headers = Headers(scope=scope)
        prefixes = [extension.key_prefix for extension in self.service.extensions]
        key = self.service.keys.find(credentials(headers, prefixes))
        scope.setdefault("state", {})["key"] = key
        holder, held = None if key is None else key.owner, 0

        def hold(count: int) -> None:
            nonlocal held
            self._check_room(holder, count)
            self.held[holder] += count
            held += count

        try:
            try:
                _check_head(scope, headers)
                if self.service.cors and cors.is_preflight(scope["method"], headers):
                    answer = cors.preflight_response(self.service.cors, headers)
                    await answer(scope, receive, send)
                    return
                self._admit(scope, headers, key)
                extension = self._extension_at(scope["path"])
                most = limits.BODY if key is None or extension is None else extension.max_body
                body = await _body(headers, receive, most, hold)
            except Refusal as refusal:
                refusal.headers["connection"] = "close"  # the rest of the body is not read
                await refusal.response(scope["path"])(scope, receive, send)
                return
            if body is None:
                return
            fresh = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def again() -> Any:
                """Replay the body that was read, then wait for the client to disconnect."""
                return next(fresh, None) or await receive()

            await self.app(scope, again, send)
        finally:
            self.held[holder] -= held
            if not self.held[holder]:
                del self.held[holder]

    def _check_room(self, holder: str | None, count: int) -> None:
        """``Refusal``: ``count`` more bytes exceed the limit of all bodies together or of one
        key."""
        room = limits.BODIES - self.held.total()
        if holder != "":  # without keys, all clients share one limit
            room = min(room, room - self.held[holder])
        if count > room:
            problem = "more bodies at one time than this server holds"
            expected = (
                f"at most {limits.BODIES:,} bytes together, half of what others leave for one key"
            )
            message = sentence(problem, expected, "send it again in a second")
            raise Refusal(429, message, code="too_many_bodies", headers={RETRY: "1"})

    def _admit(self, scope: Any, headers: Headers, key: Any) -> None:
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        hosts = self.service.hosts
        if hosts is not None and name not in hosts:
            expected = f"one of {', '.join(hosts)}, as this server has no keys"
            raise Refusal(
                403, f"host {host[:100]!r}", expected, "use that address, or start it with --keys"
            )
        path = scope["path"]
        if self.service.draining and path not in (*ALWAYS, "/") and not path.startswith(PAGE):
            raise draining()
        extension = self._extension_at(path)
        public = extension is not None and path.startswith(extension.public_paths)
        if key is None and self._is_private(path) and not public:
            raise no_key(headers)

    def _extension_at(self, path: str) -> Extension | None:
        matches = (e for e in self.service.extensions if path.startswith(e.path_prefix))
        return next(matches, None)

    def _is_private(self, path: str) -> bool:
        return path.startswith(KEYED) or self._extension_at(path) is not None

    def _mask(self, path: str) -> str:
        """A path for the log, without the secret that an extension's path may contain."""
        extension = self._extension_at(path)
        if extension is None or not path.startswith(extension.secret_path):
            return path
        _, _, rest = path.removeprefix(extension.secret_path).partition("/")
        return f"{extension.secret_path}…/{rest}"


def credentials(headers: Any, prefixes: Sequence[str] = ()) -> str | None:
    """The key of a request, as the value of an Authorization header. Some clients send it as
    X-API-Key, with a prefix."""
    sent = headers.get("x-api-key")
    for prefix in prefixes:
        sent = sent and sent.removeprefix(prefix)
    return headers.get("authorization") or (None if sent is None else f"Bearer {sent}")


def _check_head(scope: Any, headers: Headers) -> None:
    """``Refusal``: headers that a proxy and this server may interpret differently, or that are too
    long."""
    if "transfer-encoding" in headers and (
        "content-length" in headers or scope["http_version"] == "1.0"
    ):
        # RFC 9112, 6.1: a proxy may follow the other header and take a part of the body for the
        # next request
        problem = (
            "a body with Transfer-Encoding and Content-Length, or in HTTP/1.0 with"
            " Transfer-Encoding"
        )
        raise Refusal(400, problem, "one way to say where it ends", "send Content-Length alone")
    if sum(len(name) + len(value) for name, value in headers.raw) > limits.HEADERS:
        raise Refusal(
            431, "headers that are too long", f"at most {limits.HEADERS:,} bytes", "send fewer"
        )


def _bug() -> Refusal:
    """The answer to an unexpected exception."""
    return Refusal(500, "a bug in the server", "an answer", "tell whoever runs it", code="bug")


def no_key(headers: Any) -> Refusal:
    problem = "a key that is not known" if credentials(headers) else "no key"
    message = sentence(
        problem, "a header 'Authorization: Bearer KEY'", "ask whoever runs the server for a key"
    )
    return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _body(
    headers: Headers, receive: Any, most: int, hold: Callable[[int], None]
) -> bytes | None:
    """The complete body; None if the client disconnected. ``hold`` is called with the size of each
    chunk. ``Refusal``: the body is too large or too slow."""
    too_large = sentence("a body that is too large", f"at most {most:,} bytes", "send less at once")
    declared, body = headers.get("content-length", "0"), bytearray()
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > most:
        raise Refusal(413, too_large, code="body_too_large")
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                received = message.get("body", b"")
                if len(body) + len(received) > most:
                    raise Refusal(413, too_large, code="body_too_large")
                hold(len(received))
                body += received
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        expected = f"all of it within {limits.BODY_SECONDS:g} s"
        raise Refusal(408, "a body that did not arrive", expected, "send it faster") from None
