"""The gateway in front of the replicas: it reads a request, finds a replica for it, and forwards
the answer.

If the replica of a request dies, the request is sent to another one, unless a byte of the answer
was forwarded already. An answer that is no stream is forwarded when it is complete, a stream from
its first token. A stream that breaks off later ends with an error event and without [DONE], like
any answer that cannot be finished (serve/answers.py), because another replica would sample other
tokens.

Keys and limits of bodies are checked here too (serve/guard.py), before a request is forwarded.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from veneer.errors import sentence
from veneer.serve import limits
from veneer.serve.access import Keyring
from veneer.serve.cluster.routing import OPERATOR, adapter_of
from veneer.serve.guard import Guard
from veneer.serve.metrics import Metrics, merge_pages
from veneer.serve.refusal import RETRY, Refusal

log = logging.getLogger("veneer.serve")

#: how many replicas may die while they compute one request
TRIES = 5
#: headers that belong to one connection and are not forwarded
_OWN = (b"connection", b"keep-alive", b"transfer-encoding")

Message = dict[str, Any]


@dataclass(frozen=True)
class CompleteAnswer:
    """The complete answer of one replica."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Gateway:
    """An ASGI application (``app``). ``ask`` sends a request, as (adapter, scope, body), to a
    replica and yields its ASGI messages; ``ask_all`` sends it to all replicas. ``lost``: the
    exceptions that mean that a replica has died."""

    draining, extensions, tracer = False, (), None  # read by ``Guard``; replicas send their spans

    def __init__(
        self,
        base: str,
        keys: Keyring,
        hosts: tuple[str, ...] | None,
        ask: Callable[[str, Message, bytes], AsyncGenerator[Message]],
        ask_all: Callable[[Message, bytes], Awaitable[Sequence[CompleteAnswer]]],
        lost: tuple[type[Exception], ...],
        cors: tuple[str, ...] = (),
    ) -> None:
        self.base, self.keys, self.hosts, self.cors = base, keys, hosts, cors
        self.metrics = Metrics()
        self._ask, self._ask_all, self._lost = ask, ask_all, lost
        self.app = Guard(self._answer, self)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = (await receive())["body"]
        message = request_of(scope)
        try:
            if scope["path"] == "/metrics":
                await self._metrics(message, body, send)
                return
            adapter = OPERATOR
            if body:
                large = len(body) > limits.PARSED_INLINE
                adapter = (
                    await asyncio.to_thread(adapter_of, body, self.base)
                    if large
                    else adapter_of(body, self.base)
                )
            await relay(lambda: self._ask(adapter, message, body), send, self._lost)
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)

    async def _metrics(self, message: Message, body: bytes, send: Any) -> None:
        """The metrics of all replicas, each labelled with its replica; or the first refusal of a
        replica."""
        try:
            answers = await self._ask_all(message, body)
        except self._lost as error:
            raise no_replica() from error
        if not answers:
            raise no_replica()
        answer = next((answer for answer in answers if answer.status != 200), answers[0])
        if answer.status == 200:
            page = await asyncio.to_thread(
                merge_pages, {answer.replica: answer.body for answer in answers}
            )
            headers = [(name, value) for name, value in answer.headers if name != b"content-length"]
            answer = CompleteAnswer(
                "", 200, [*headers, (b"content-length", b"%d" % len(page))], page
            )
        await send(
            {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        )
        await send({"type": "http.response.body", "body": answer.body})


async def relay(
    attempt: Callable[[], AsyncGenerator[Message]],
    send: Callable[[Message], Awaitable[None]],
    lost: tuple[type[Exception], ...],
) -> None:
    """Forward the answer of the first attempt that succeeds. ``Refusal``: all attempts were
    lost."""
    for number in range(TRIES):
        head: Message | None = None  # not sent before the first byte of the body
        begun = ended = False
        try:
            async with aclosing(attempt()) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        headers = [
                            (name, value)
                            for name, value in message["headers"]
                            if name.lower() not in _OWN
                        ]
                        head = {**message, "headers": headers}
                        continue
                    if not begun and head is not None:
                        await send(head)
                        begun = True
                    await send(message)
                    ended = not message.get("more_body", False)
        except lost as error:
            # the client has the complete answer, and may send another request on this connection
            if ended:
                return
            log.warning("A replica was lost in attempt %d: %s", number + 1, type(error).__name__)
            if begun:
                await send({"type": "http.response.body", "body": broken_off()})
                return
            continue
        if not begun:
            raise Refusal(
                500, "a bug in the server", "an answer", "tell whoever runs it", code="bug"
            )
        return
    raise no_replica()


def no_replica() -> Refusal:
    message = sentence("no replica that answers", "one", "try again later")
    return Refusal(503, message, code="replica_lost", headers={RETRY: "5"})


def broken_off() -> bytes:
    """The last event of a stream whose replica has died."""
    message = sentence(
        "a replica that was lost in the middle of an answer",
        "one that ends",
        "send the request again",
    )
    refusal = Refusal(503, message, code="replica_lost")
    return f"data: {json.dumps(refusal.body(), separators=(',', ':'))}\n\n".encode()


def request_of(scope: Message) -> Message:
    """The fields of an ASGI scope that go to another process."""
    fields = (
        "type",
        "asgi",
        "http_version",
        "method",
        "scheme",
        "path",
        "raw_path",
        "query_string",
        "root_path",
    )
    request = {name: scope[name] for name in fields if name in scope}
    return {**request, "headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}


async def messages(app: Any, request: Message, body: bytes) -> AsyncGenerator[Message]:
    """An application's answer to a request, message by message. Closing the generator disconnects
    the client."""
    queue: asyncio.Queue[Message | None] = asyncio.Queue()  # holds at most one answer
    unread = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(unread, None) or await asyncio.Future()

    running = asyncio.ensure_future(app(dict(request), receive, queue.put))
    running.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (message := await queue.get()) is not None:
            yield message
        if (error := running.exception()) is not None:
            log.error("A request ended with an error", exc_info=error)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def complete_answer(name: str, app: Any, request: Message, body: bytes) -> CompleteAnswer:
    """The complete answer of an application to a request. ``name``: of its replica."""
    status, headers, content = 500, [], bytearray()
    async with aclosing(messages(app, request, body)) as answer:
        async for message in answer:
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                content += message.get("body", b"")
    return CompleteAnswer(name, status, headers, bytes(content))


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        phase = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{phase}.complete"})
        if phase == "shutdown":
            return
