"""The middleware around all routes. It checks the key, the size and the timely arrival of the body
before a route runs, and afterwards adds a request id, headers, a log line and a tracing span.

    limits of a connection (serve/listen.py) ──▶ Guard ──▶ routes

A body is read completely before a route runs, within a limit of bytes and of seconds. If a path
needs a key (``PRIVATE_PATHS``), a request without a valid one is refused before its body is read.
Queries, headers and bodies are never logged.

A server without keys on a loopback address answers only requests whose Host header is a loopback
name (``Service.hosts``). So a web page cannot reach it through a domain name of its own that points
to 127.0.0.1 (DNS rebinding). Routes take only bodies in application/json, except for protobuf in
the training service. A page of another origin cannot send JSON without a preflight request, which
succeeds only with ``--cors`` (serve/cors.py).
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
from veneer.serve.refusal import RETRY_AFTER, Refusal, draining_refusal
from veneer.serve.request_log import CURRENT_RECORD, ID_HEADER, RequestRecord, request_id_of

log = logging.getLogger("veneer.serve.access")

#: routes for operators, which also answer while the server drains
OPERATOR_PATHS = ("/health", "/ready", "/metrics")
#: beginnings of the paths that need a key; paths of extensions need one too
PRIVATE_PATHS = ("/v1", "/v2", "/tokenize", "/detokenize", "/score", "/rerank")
PAGE_FILES = "/web/"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware. It reads the attributes ``keys``, ``hosts``, ``cors``, ``tracer``,
    ``metrics``, ``extensions`` and ``draining`` of a ``Service``."""

    def __init__(self, app: Any, service: Any) -> None:
        self.app, self.service = app, service
        # bytes of request bodies in memory, by ``Key.owner``; None: requests without a valid key
        self.body_bytes: Counter[str | None] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        logged_path = ascii(self._mask_secret(path)[:200])[1:-1]
        client_ids = headers.getlist(ID_HEADER)
        record = RequestRecord(request_id_of(client_ids), scope["method"], logged_path)
        added_headers = self._added_headers(path, record.request_id, headers.get("origin"))
        added_names = {name for name, _ in added_headers}

        async def reply(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self.service.metrics.responses.labels(str(record.status)).inc()
                # drop headers of the same names, which a replica behind this server may have added
                route_headers = [
                    pair for pair in message.get("headers", ()) if pair[0] not in added_names
                ]
                message = {**message, "headers": [*route_headers, *added_headers]}
            await send(message)

        # pass the request id on: if the application is a gateway, it sends the id to its replicas
        client_headers = [
            pair for pair in scope["headers"] if pair[0].lower() != ID_HEADER.encode()
        ]
        scope["headers"] = [*client_headers, (ID_HEADER.encode(), record.request_id.encode())]
        reset_token = CURRENT_RECORD.set(record)
        try:
            await self._check_and_run(scope, receive, reply)
        except Exception:
            if not record.status:
                refusal = Refusal(
                    500, "a bug in the server", "an answer", "tell whoever runs it", code="bug"
                )
                await refusal.response(scope["path"])(scope, receive, reply)
            raise  # so that uvicorn logs it
        finally:
            CURRENT_RECORD.reset(reset_token)
            record.key = getattr(scope.get("state", {}).get("key"), "name", None)
            record.total_seconds = time.monotonic() - record.started
            self._report(record, path, headers)

    def _added_headers(
        self, path: str, request_id: str, origin: str | None
    ) -> list[tuple[bytes, bytes]]:
        """The headers that are added to the response. ``path``: of the request; ``origin``: of the
        web page that sent it, None if no page did."""
        cache_headers = [(b"cache-control", b"no-store")] if self._is_private(path) else []
        cors_headers = cors.origin_headers(self.service.cors, origin)
        id_header = (ID_HEADER.encode(), request_id.encode())
        return [id_header, *_SECURITY_HEADERS, *cache_headers, *cors_headers]

    def _report(self, record: RequestRecord, path: str, headers: Headers) -> None:
        """Log a request that has ended, and export its span."""
        # operators' routes are polled every few seconds: log them only when they fail
        is_routine = record.status == 200 and path in OPERATOR_PATHS
        level = logging.DEBUG if is_routine else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s", record.line(), extra={"request": record.fields()})
        if self.service.tracer is not None and not is_routine:
            self.service.tracer.send(record, headers)

    async def _check_and_run(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request and run its route, or answer it with a refusal."""
        headers = Headers(scope=scope)
        key_prefixes = [extension.key_prefix for extension in self.service.extensions]
        key = self.service.keys.find(credentials(headers, key_prefixes))
        scope.setdefault("state", {})["key"] = key
        owner, body_bytes = None if key is None else key.owner, 0

        def reserve(byte_count: int) -> None:
            """Count more bytes of the body as held in memory, until the request ends. ``Refusal``:
            there is no room for them."""
            nonlocal body_bytes
            self._check_room(owner, byte_count)
            self.body_bytes[owner] += byte_count
            body_bytes += byte_count

        try:
            try:
                _check_headers(scope, headers)
                if self.service.cors and cors.is_preflight(scope["method"], headers):
                    response = cors.preflight_response(self.service.cors, headers)
                    await response(scope, receive, send)
                    return
                self._check_access(scope, headers, key)
                extension = self._extension_at(scope["path"])
                max_bytes = limits.BODY if key is None or extension is None else extension.max_body
                body = await _read_body(headers, receive, max_bytes, reserve)
            except Refusal as refusal:
                refusal.headers["connection"] = "close"  # since the rest of the body is unread
                await refusal.response(scope["path"])(scope, receive, send)
                return
            if body is None:
                return
            unread_messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def replay() -> Any:
                """Replay the body that was read, then wait for the client to disconnect."""
                return next(unread_messages, None) or await receive()

            await self.app(scope, replay, send)
        finally:
            self.body_bytes[owner] -= body_bytes
            if not self.body_bytes[owner]:
                del self.body_bytes[owner]

    def _check_room(self, owner: str | None, byte_count: int) -> None:
        """Check the room for ``byte_count`` more bytes of a request's body. ``owner``: the name of
        the key; None without a valid key. ``Refusal``: with the bytes, all bodies together, or
        those of the owner, would exceed their limit."""
        free_bytes = limits.BODIES - self.body_bytes.total()
        if owner != "":  # "" is every client of a server without keys: no limit of its own
            free_bytes = min(free_bytes, free_bytes - self.body_bytes[owner])
        if byte_count > free_bytes:
            raise Refusal(
                429,
                "more bodies at one time than this server holds",
                f"at most {limits.BODIES:,} bytes together, half of what others leave for one key",
                "send it again in a second",
                code="too_many_bodies",
                headers={RETRY_AFTER: "1"},
            )

    def _check_access(self, scope: Any, headers: Headers, key: Any) -> None:
        """Check whether a request may run. ``key``: its valid key, or None. ``Refusal``: the Host
        header is wrong, the server drains, or the path needs a key and there is none."""
        host = headers.get("host", "").lower()
        host_name = host if host.endswith("]") else host.rpartition(":")[0] or host
        hosts = self.service.hosts
        if hosts is not None and host_name not in hosts:
            raise Refusal(
                403,
                f"host {host[:100]!r}",
                f"one of {', '.join(hosts)}, as this server has no keys",
                "use that address, or start it with --keys",
            )
        path = scope["path"]
        answers_always = path in (*OPERATOR_PATHS, "/") or path.startswith(PAGE_FILES)
        if self.service.draining and not answers_always:
            raise draining_refusal()
        extension = self._extension_at(path)
        is_public = extension is not None and path.startswith(extension.public_paths)
        if key is None and self._is_private(path) and not is_public:
            raise missing_key_refusal(headers)

    def _extension_at(self, path: str) -> Extension | None:
        matches = (
            extension
            for extension in self.service.extensions
            if path.startswith(extension.path_prefix)
        )
        return next(matches, None)

    def _is_private(self, path: str) -> bool:
        """Whether requests for a path need a key. The public paths of an extension count as
        private here; ``_check_access`` exempts them."""
        return path.startswith(PRIVATE_PATHS) or self._extension_at(path) is not None

    def _mask_secret(self, path: str) -> str:
        """A path for the log, without the secret that an extension's path may contain."""
        extension = self._extension_at(path)
        if extension is None or not path.startswith(extension.secret_path):
            return path
        _, _, later_path = path.removeprefix(extension.secret_path).partition("/")
        return f"{extension.secret_path}…/{later_path}"


def credentials(headers: Any, prefixes: Sequence[str] = ()) -> str | None:
    """The key of a request, as the value of an Authorization header ("Bearer …"). A client may send
    the key in X-API-Key instead, possibly after one of ``prefixes``, which are removed. None if the
    request has neither header."""
    api_key = headers.get("x-api-key")
    for prefix in prefixes:
        api_key = api_key and api_key.removeprefix(prefix)
    return headers.get("authorization") or (None if api_key is None else f"Bearer {api_key}")


def _check_headers(scope: Any, headers: Headers) -> None:
    """Check the headers. ``Refusal``: they are too long, or they give the length of the body in a
    way that a proxy in front of this server may have read differently."""
    if "transfer-encoding" in headers and (
        "content-length" in headers or scope["http_version"] == "1.0"
    ):
        # RFC 9112, 6.1: such a proxy could take a part of the body for the next request
        raise Refusal(
            400,
            "a body with Transfer-Encoding and Content-Length, or in HTTP/1.0 with"
            " Transfer-Encoding",
            "one way to say where it ends",
            "send Content-Length alone",
        )
    if sum(len(name) + len(value) for name, value in headers.raw) > limits.HEADERS:
        raise Refusal(
            431, "headers that are too long", f"at most {limits.HEADERS:,} bytes", "send fewer"
        )


def missing_key_refusal(headers: Any) -> Refusal:
    """The answer to a request that has no valid key."""
    problem = "a key that is not known" if credentials(headers) else "no key"
    return Refusal(
        401,
        problem,
        "a header 'Authorization: Bearer KEY'",
        "ask whoever runs the server for a key",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


async def _read_body(
    headers: Headers, receive: Any, max_bytes: int, reserve: Callable[[int], None]
) -> bytes | None:
    """Read the complete body; None if the client disconnected. ``reserve`` is called with the size
    of each chunk, in bytes. ``Refusal``: the body is too large or too slow."""
    too_large = sentence(
        "a body that is too large", f"at most {max_bytes:,} bytes", "send less at once"
    )
    declared_length, body = headers.get("content-length", "0"), bytearray()
    if (
        not declared_length.isdecimal()
        or len(declared_length) > 18
        or int(declared_length) > max_bytes
    ):
        raise Refusal(413, too_large, code="body_too_large")
    try:
        async with asyncio.timeout(limits.BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                if len(body) + len(chunk) > max_bytes:
                    raise Refusal(413, too_large, code="body_too_large")
                reserve(len(chunk))
                body += chunk
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(
            408,
            "a body that did not arrive",
            f"all of it within {limits.BODY_SECONDS:g} s",
            "send it faster",
        ) from None
