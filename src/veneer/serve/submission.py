"""Requests on their way to the engine, and the stream of events that takes them with it when its
client goes away."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi.responses import StreamingResponse

from veneer.serve import limits
from veneer.serve.access import Key
from veneer.serve.answers import Answers
from veneer.serve.requests import Request as Job
from veneer.serve.service import Service, await_or_undo, in_text_thread


async def submit(service: Service, key: Key, jobs: list[Job]) -> Answers:
    """Submit requests of one blend. An extension's models count as tokens of the key."""
    loop, charge = asyncio.get_running_loop(), None
    extension = next(filter(None, map(service.extension_of, jobs[0].blend)), None)
    if extension is not None:
        most = sum(len(job.prompt) + job.sampling.max_tokens for job in jobs)
        charge = await extension.reserve_tokens(key, most)

    def submit_all() -> Answers:
        try:
            return Answers(service.engine, jobs, loop, charge)
        except BaseException:
            if charge is not None:
                charge(0)
            raise

    if jobs[0].sampling.schema is None and jobs[0].sampling.grammar is None:
        return submit_all()
    try:
        # a schema is compiled when it is submitted, with the tokenizer: in that one's thread
        submission = in_text_thread(service, limits.READING_SCHEMA, submit_all)
        return await await_or_undo(submission, Answers.cancel)
    except Exception:
        if charge is not None:
            charge(0)  # too much waits to be read; after ``submit_all`` it changes nothing
        raise


class EventStream(StreamingResponse):
    """Server-sent events, which take their answers with them when the client goes away at any
    moment."""

    def __init__(self, answers: Answers, content: Any) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
        )
        self._answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()  # also where the iterator was never entered
