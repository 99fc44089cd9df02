"""The gateway in front of the replicas. It reads a request, chooses a replica, and forwards the
answer.

If the replica of a request dies, the gateway sends the request to another one, unless it has
forwarded a part of the answer. A complete answer is forwarded when all of it has arrived, and a
stream from its first token on. A stream whose replica dies cannot continue, because another replica
would sample other tokens. It ends with an error event and no [DONE], like any answer that fails
(serve/answers.py).

The gateway also checks keys and the size of bodies, before it forwards a request (serve/guard.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from veneer.serve import limits
from veneer.serve.access import Keyring
from veneer.serve.cluster.routing import NO_MODEL_KEY, adapter_of
from veneer.serve.guard import Guard
from veneer.serve.metrics import Metrics, merge_pages
from veneer.serve.refusal import RETRY_AFTER, Refusal

log = logging.getLogger("veneer.serve")

#: the most replicas that get the same request, one after the other as they die
MAX_ATTEMPTS = 5
#: headers that concern a single connection and are not forwarded
_CONNECTION_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding")

Message = dict[str, Any]


@dataclass(frozen=True)
class CompleteAnswer:
    """The complete answer of one replica."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Gateway:
    """The gateway, whose ASGI application is ``app``.

    Args:
        base: the base's model name.
        keys: the API keys.
        hosts: host names accepted in the Host header; None: all.
        ask_replica: sends a request, as (adapter, ASGI scope, body), to a replica and yields the
            ASGI messages of its answer.
        ask_all_replicas: sends a request, as (ASGI scope, body), to all replicas and returns their
            answers.
        death_errors: the exceptions which mean that a replica has died.
        cors: the origins that browsers may call from.
    """

    # ``Guard`` reads these attributes. No tracer, because the replicas send the spans of requests.
    draining, extensions, tracer = False, (), None

    def __init__(
        self,
        base: str,
        keys: Keyring,
        hosts: tuple[str, ...] | None,
        ask_replica: Callable[[str, Message, bytes], AsyncGenerator[Message]],
        ask_all_replicas: Callable[[Message, bytes], Awaitable[Sequence[CompleteAnswer]]],
        death_errors: tuple[type[Exception], ...],
        cors: tuple[str, ...] = (),
    ) -> None:
        self.base, self.keys, self.hosts, self.cors = base, keys, hosts, cors
        self.metrics = Metrics()
        self._ask_replica, self._ask_all_replicas = ask_replica, ask_all_replicas
        self._death_errors = death_errors
        self.app = Guard(self._answer, self)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = (await receive())["body"]
        message = transferable_scope(scope)
        try:
            if scope["path"] == "/metrics":
                await self._send_metrics(message, body, send)
                return
            adapter = NO_MODEL_KEY
            if body:
                is_large = len(body) > limits.PARSED_INLINE
                adapter = (
                    await asyncio.to_thread(adapter_of, body, self.base)
                    if is_large
                    else adapter_of(body, self.base)
                )
            await relay(
                lambda: self._ask_replica(adapter, message, body),
                send,
                self._death_errors,
                scope["path"],
            )
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)

    async def _send_metrics(self, message: Message, body: bytes, send: Any) -> None:
        """Send the metrics of all replicas, each labelled with its replica. If a replica refuses
        the request, send its refusal instead."""
        try:
            answers = await self._ask_all_replicas(message, body)
        except self._death_errors as error:
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
    request_answer: Callable[[], AsyncGenerator[Message]],
    send: Callable[[Message], Awaitable[None]],
    death_errors: tuple[type[Exception], ...],
    path: str,
) -> None:
    """Forward the answer of the first attempt that succeeds. ``request_answer``: asks a replica and
    yields the ASGI messages of its answer. ``death_errors``: the exceptions which mean that a
    replica has died. ``path``: the path of the request's route, on which the format of an error
    event depends. ``Refusal``: all attempts failed, or a replica gave no answer."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        start_message: Message | None = None  # held back until the first message of the body
        has_begun = has_ended = False
        event_count = 0  # events of a stream that were forwarded
        try:
            async with aclosing(request_answer()) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        headers = [
                            (name, value)
                            for name, value in message["headers"]
                            if name.lower() not in _CONNECTION_HEADERS
                        ]
                        start_message = {**message, "headers": headers}
                        continue
                    if not has_begun and start_message is not None:
                        await send(start_message)
                        has_begun = True
                    await send(message)
                    has_ended = not message.get("more_body", False)
                    event_count += message.get("body", b"").count(b"\n\n")
        except death_errors as error:
            # the client has the complete answer, so send nothing more: the connection may already
            # be used for its next request
            if has_ended:
                return
            log.warning("A replica was lost in attempt %d: %s", attempt, type(error).__name__)
            if has_begun:
                event = broken_off().error_event(path, event_count)
                await send({"type": "http.response.body", "body": event})
                return
            continue
        if not has_begun:
            raise Refusal(
                500, "a bug in the server", "an answer", "tell whoever runs it", code="bug"
            )
        return
    raise no_replica()


def no_replica() -> Refusal:
    return Refusal(
        503,
        "no replica that answers",
        "one",
        "try again later",
        code="replica_lost",
        headers={RETRY_AFTER: "5"},
    )


def broken_off() -> Refusal:
    """The refusal that ends a stream whose replica has died."""
    return Refusal(
        503,
        "a replica that was lost in the middle of an answer",
        "one that ends",
        "send the request again",
        code="replica_lost",
    )


def transferable_scope(scope: Message) -> Message:
    """The fields of an ASGI scope that can be sent to another process."""
    field_names = (
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
    request = {name: scope[name] for name in field_names if name in scope}
    return {**request, "headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]]}


async def answer_messages(app: Any, request: Message, body: bytes) -> AsyncGenerator[Message]:
    """Yield the ASGI messages of the answer of the ASGI application ``app`` to a request. If the
    generator is closed early, the application is cancelled."""
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
    """The complete answer of an application to a request. ``name``: the name of the replica."""
    status, headers, content = 500, [], bytearray()
    async with aclosing(answer_messages(app, request, body)) as answer:
        async for message in answer:
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                content += message.get("body", b"")
    return CompleteAnswer(name, status, headers, bytes(content))


async def _lifespan(receive: Any, send: Any) -> None:
    """Answer the ASGI lifespan events, for which there is nothing to do."""
    while True:
        phase = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{phase}.complete"})
        if phase == "shutdown":
            return
