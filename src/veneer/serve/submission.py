"""Submit requests to the engine, and stream events to a client. When the client disconnects, the
requests of its stream are cancelled."""

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
    """Submit requests, all with the same blend. If the blend belongs to an extension, the tokens
    count against the quota of the key."""
    loop, charge = asyncio.get_running_loop(), None
    extension = next(filter(None, map(service.extension_of, engine_requests[0].blend)), None)
    if extension is not None:
        token_count = sum(
            len(request.prompt) + request.sampling.max_tokens for request in engine_requests
        )
        charge = await extension.reserve_tokens(key, token_count)

    def submit_all() -> Answers:
        try:
            return Answers(service.engine, engine_requests, loop, charge)
        except BaseException:
            if charge is not None:
                charge(0)
            raise

    if engine_requests[0].sampling.schema is None and engine_requests[0].sampling.grammar is None:
        return submit_all()
    try:
        # submitting compiles the schema with the tokenizer, so do it in the tokenizer's thread
        submission = in_text_thread(service, limits.SCHEMA_WAITING_CHARS, submit_all)
        return await await_or_undo(submission, Answers.cancel)
    except Exception:
        if charge is not None:
            charge(0)  # a second call, after that of ``submit_all``, has no effect
        raise


class EventStream(StreamingResponse):
    """A response of server-sent events. Its answers are cancelled when the client disconnects."""

    def __init__(self, answers: Answers, content: Any) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()  # also if the iterator was never started
