"""The gateway in front of the replicas. It reads a request, finds out which adapter it needs, has
it answered by a replica, and forwards the answer.

If the replica dies, the gateway sends the request to another one, unless a part of the answer has
been forwarded. An answer that is not streamed is forwarded when all of it has arrived, and a stream
from its first token on. A stream whose replica dies cannot continue, because another replica would
sample other tokens. So it ends with an error event and without [DONE], like any answer that fails
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

#: the most times that a request is sent to a replica; it is sent again if the replica dies
MAX_ATTEMPTS = 5
#: headers that describe the connection to the replica, so they are not forwarded to the client
_CONNECTION_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding")

#: a message of the ASGI protocol, or an ASGI scope
Message = dict[str, Any]


@dataclass(frozen=True)
class CompleteAnswer:
    """The complete answer of one replica to a request. ``replica`` is the replica's name."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Gateway:
    """The gateway. Its attribute ``app`` is the ASGI application.

    Args:
        base_name: the model name of the base.
        keys: the API keys that clients may use.
        hosts: host names that are accepted in the Host header; None accepts all.
        ask_replica: a function of (adapter name, ASGI scope, body) that sends a request to one
            replica, chosen by the adapter, and yields the ASGI messages of the answer.
        ask_all_replicas: a function of (ASGI scope, body) that sends a request to all replicas and
            returns their answers.
        death_errors: the exceptions of ``ask_replica`` and ``ask_all_replicas`` that mean that a
            replica has died.
        cors: the origins of web pages that may call the server; empty for none.
    """

    # ``Guard`` reads these attributes. There is no tracer here, because the replicas export the
    # tracing spans of requests.
    draining, extensions, tracer = False, (), None

    def __init__(
        self,
        base_name: str,
        keys: Keyring,
        hosts: tuple[str, ...] | None,
        ask_replica: Callable[[str, Message, bytes], AsyncGenerator[Message]],
        ask_all_replicas: Callable[[Message, bytes], Awaitable[Sequence[CompleteAnswer]]],
        death_errors: tuple[type[Exception], ...],
        cors: tuple[str, ...] = (),
    ) -> None:
        self.base_name, self.keys, self.hosts, self.cors = base_name, keys, hosts, cors
        self.metrics = Metrics()
        self._ask_replica, self._ask_all_replicas = ask_replica, ask_all_replicas
        self._death_errors = death_errors
        self.app = Guard(self._answer, self)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application behind ``Guard``: forward a request to a replica, and its answer to
        the client."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = (await receive())["body"]
        request_scope = transferable_scope(scope)
        try:
            if scope["path"] == "/metrics":
                await self._send_metrics(request_scope, body, send)
                return
            adapter = NO_MODEL_KEY
            if body:
                is_large = len(body) > limits.PARSED_INLINE
                adapter = (
                    await asyncio.to_thread(adapter_of, body, self.base_name)
                    if is_large
                    else adapter_of(body, self.base_name)
                )
            await relay(
                lambda: self._ask_replica(adapter, request_scope, body),
                send,
                self._death_errors,
                scope["path"],
            )
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)

    async def _send_metrics(self, request_scope: Message, body: bytes, send: Any) -> None:
        """Send one page with the metrics of all replicas, each with its replica's name as a label.
        If a replica refuses the request, send its refusal instead."""
        try:
            answers = await self._ask_all_replicas(request_scope, body)
        except self._death_errors as error:
            raise no_replica_refusal() from error
        if not answers:
            raise no_replica_refusal()
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
    """Ask for an answer and forward it to the client; if the replica dies before a part was
    forwarded, ask again. If it dies later, end the stream with an error event.

    Args:
        request_answer: sends the request to a replica and yields the ASGI messages of its answer.
        send: sends an ASGI message to the client.
        death_errors: the exceptions of ``request_answer`` that mean that the replica has died.
        path: the path of the request; the format of an error event depends on it.

    Raises:
        Refusal: ``MAX_ATTEMPTS`` replicas have died, or a replica ended without an answer.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        # held back until the first message of the body, so that a request whose replica dies before
        # can be sent to another one
        start_message: Message | None = None
        has_begun = has_ended = False
        event_count = 0  # number of events of a stream that were forwarded
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
            # the client has the complete answer: send nothing more, because the connection may
            # already be used for the client's next request
            if has_ended:
                return
            log.warning("A replica was lost in attempt %d: %s", attempt, type(error).__name__)
            if has_begun:
                event = lost_replica_refusal().error_event(path, event_count)
                await send({"type": "http.response.body", "body": event})
                return
            continue
        if not has_begun:
            raise Refusal(
                500, "a bug in the server", "an answer", "tell whoever runs it", code="bug"
            )
        return
    raise no_replica_refusal()


def no_replica_refusal() -> Refusal:
    """The error response for a request that no replica could answer."""
    return Refusal(
        503,
        "no replica that answers",
        "one",
        "try again later",
        code="replica_lost",
        headers={RETRY_AFTER: "5"},
    )


def lost_replica_refusal() -> Refusal:
    """The error that ends a stream whose replica has died."""
    return Refusal(
        503,
        "a replica that was lost in the middle of an answer",
        "one that ends",
        "send the request again",
        code="replica_lost",
    )


def transferable_scope(scope: Message) -> Message:
    """A copy of an ASGI scope with only those fields that can be sent to another process."""
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
    transferable_fields = {name: scope[name] for name in field_names if name in scope}
    return {
        **transferable_fields,
        "headers": [(bytes(name), bytes(value)) for name, value in scope["headers"]],
    }


async def answer_messages(app: Any, request_scope: Message, body: bytes) -> AsyncGenerator[Message]:
    """Run the ASGI application ``app`` on a request, and yield the ASGI messages of its answer. If
    the generator is closed early, the application is cancelled. An exception of the application is
    logged and ends the answer."""
    # the queue needs no bound, because it holds the messages of one answer; None ends them
    message_queue: asyncio.Queue[Message | None] = asyncio.Queue()
    unread_messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        return next(unread_messages, None) or await asyncio.Future()

    app_task = asyncio.ensure_future(app(dict(request_scope), receive, message_queue.put))
    app_task.add_done_callback(lambda _: message_queue.put_nowait(None))
    try:
        while (message := await message_queue.get()) is not None:
            yield message
        if (error := app_task.exception()) is not None:
            log.error("A request ended with an error", exc_info=error)
    finally:
        app_task.cancel()
        await asyncio.gather(app_task, return_exceptions=True)


async def complete_answer(
    replica_name: str, app: Any, request_scope: Message, body: bytes
) -> CompleteAnswer:
    """The complete answer of the ASGI application ``app`` to a request; its status is 500 if the
    application sends none."""
    status, headers, response_body = 500, [], bytearray()
    async with aclosing(answer_messages(app, request_scope, body)) as answer:
        async for message in answer:
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                response_body += message.get("body", b"")
    return CompleteAnswer(replica_name, status, headers, bytes(response_body))


async def _lifespan(receive: Any, send: Any) -> None:
    """Confirm the ASGI lifespan events "startup" and "shutdown", at which the gateway has nothing
    to do."""
    while True:
        phase = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{phase}.complete"})
        if phase == "shutdown":
            return
