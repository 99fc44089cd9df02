"""Submit the engine requests of an HTTP request, and stream the events of their answers to the
client. When the client disconnects, the requests are cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi.responses import StreamingResponse

from veneer.serve import limits
from veneer.serve.access import Key
from veneer.serve.answers import Answers
from veneer.serve.requests import Request as EngineRequest
from veneer.serve.service import Service, await_or_undo, in_text_thread


async def submit(service: Service, key: Key, engine_requests: list[EngineRequest]) -> Answers:
    """Submit requests, which must all have the same blend, to the engine. If an adapter of the
    blend belongs to an extension, the most tokens that the requests can use are first reserved from
    the quota of the key; after the answers, those that were used are charged.

    Raises:
        Refusal: the quota does not suffice.
        Busy: the queue has no place, or too many texts wait for the tokenizer's thread.
        RequestError: the engine cannot answer a request, for example because of its schema.
    """
    loop, charge_tokens = asyncio.get_running_loop(), None
    extension = next(filter(None, map(service.extension_of, engine_requests[0].blend)), None)
    if extension is not None:
        token_count = sum(
            len(request.prompt) + request.sampling.max_tokens for request in engine_requests
        )
        charge_tokens = await extension.reserve_tokens(key, token_count)

    def submit_all() -> Answers:
        try:
            return Answers(service.engine, engine_requests, loop, charge_tokens)
        except BaseException:
            if charge_tokens is not None:
                charge_tokens(0)
            raise

    if engine_requests[0].sampling.schema is None and engine_requests[0].sampling.grammar is None:
        return submit_all()
    try:
        # submitting compiles the schema or grammar with the tokenizer, which only the tokenizer's
        # thread may use
        submission = in_text_thread(service, limits.SCHEMA_WAITING_CHARS, submit_all)
        return await await_or_undo(submission, Answers.cancel)
    except Exception:
        if charge_tokens is not None:
            charge_tokens(0)  # has no effect if ``submit_all`` called it before
        raise


class EventStream(StreamingResponse):
    """A response of server-sent events. When it ends, also because the client disconnected, the
    answers that have not ended are cancelled."""

    def __init__(self, answers: Answers, content: Any) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()  # even if the client left before the first event
