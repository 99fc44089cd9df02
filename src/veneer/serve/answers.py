"""From pieces of the engine to answers in OpenAI's form, whole or as a stream of events.

    engine's thread ── Piece ──▶ call_soon_threadsafe ──▶ queue ──▶ ``Answers.pieces()`` ──▶
    ``whole`` or ``events``

The queue needs no bound of its own: an answer has at most ``max_tokens`` pieces. When a client goes
away, the task that reads is cancelled or closed, and ``Answers`` cancels what still runs.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import accumulate
from typing import Any

from veneer.errors import sentence
from veneer.serve.refusal import RETRY, Refusal
from veneer.serve.requests import Cause, Piece, Request, Token
from veneer.serve.schemas import Asked, ChatRequest
from veneer.serve.tools.choose import CallReading
from veneer.serve.tools.deltas import Call, Delta, TextDelta, join_deltas

Pieces = AsyncGenerator[tuple[int, Piece], None]


class Answers:
    """The answers to some requests, all of which were submitted or none."""

    def __init__(
        self, engine: Any, requests: Sequence[Request], loop: asyncio.AbstractEventLoop,
        charge: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Submit them (``Engine.submit``), from any thread; pieces are read in ``loop``. ``charge``
        is called once, with the number of tokens of prompts and answers: when all have ended or are
        cancelled. It is not called if they are not submitted."""
        self._loop, self._open = loop, len(requests)
        self._charge, self._tokens = charge, sum(len(request.prompt) for request in requests)
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: list[Any] = []
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, partial(self._deliver, index)))
        except BaseException:
            self._charge = None
            self.cancel()
            raise

    def _deliver(self, index: int, piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self) -> Pieces:
        """(number of the request, piece), until the last of each. Cancels what runs when it is left
        early."""
        try:
            while self._open:
                index, piece = await self._queue.get()
                self._open -= piece.finish is not None
                self._tokens += len(piece.tokens)
                yield index, piece
                await asyncio.sleep(
                    0
                )  # a full queue never waits, and others (and a client's leaving) need a turn
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self._open:
            for ticket in self._tickets:
                ticket.cancel()
        charge, self._charge = self._charge, None
        if charge is not None:
            charge(self._tokens)


class Form:
    """How one call wants its answers. ``heads`` is the text that goes before each of them
    (``echo``), or empty; ``candid`` is whether the client may read the words of an error inside the
    server; ``reading`` is how calls of tools are read out of the answers, if they are."""

    def __init__(
        self, body: Asked, prompts: Sequence[Sequence[int]], heads: Sequence[str], candid: bool,
        reading: CallReading | None = None,
    ) -> None:  # fmt: skip
        self.chat, self.model, self.created = (
            isinstance(body, ChatRequest),
            body.model,
            int(time.time()),
        )
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.count, self.prompt_tokens = body.n * len(prompts), sum(map(len, prompts))
        self.heads, self.candid = heads or [""] * self.count, candid
        self.logprobs = body.alternatives() is not None
        self.usage = body.stream_options is not None and body.stream_options.include_usage
        self.markers = {} if reading is None else reading.markers
        self.parsers = [] if reading is None else [reading.new_parser() for _ in range(self.count)]

    async def complete(self, answers: Answers) -> dict[str, Any]:
        return await whole(answers, self)

    def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
        return events(self, first, pieces)

    def deltas(self, index: int, piece: Piece) -> list[Delta]:
        """The text and the calls that become certain with a piece of answer number ``index``."""
        if not self.parsers:
            return [TextDelta(piece.text)] if piece.text else []
        parser = self.parsers[index]
        deltas = parser.feed(piece.text)
        return deltas + parser.end() if piece.finish else deltas

    def finish(self, index: int, piece: Piece) -> str | None:
        """Why that answer ended with its last piece, in OpenAI's words."""
        return self.parsers[index].finish(piece.finish) if self.parsers else piece.finish

    def counts(self, generated: int) -> dict[str, int]:
        total = self.prompt_tokens + generated
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": total,
        }

    def frame(self, choices: list[Any], *, chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' * chunk}" if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more,
        }  # fmt: skip


def failure(piece: Piece, candid: bool) -> Refusal | None:
    """The error for an answer that did not come to its end."""
    match piece.finish:
        case "timeout":
            message = sentence(
                "an answer that took too long", "one within the time limit", "ask for fewer tokens"
            )
            return Refusal(504, message, code="timeout", headers={"x-should-retry": "false"})
        case "cancelled":
            message = sentence(
                "an answer that was cancelled", "one that ends", "send the request again"
            )
            return Refusal(503, message, code="cancelled", headers={RETRY: "5"})
        case "error":
            return of_cause(piece.error or "no reason given", piece.cause, candid)
        case _:
            return None


def of_cause(why: str, cause: Cause | None, candid: bool) -> Refusal:
    """The same statuses as where the cause is found before an answer begins (``refusal.of``)."""
    match cause:
        case "bad_request":
            return Refusal(400, why, param="response_format")
        case "out_of_memory":
            return Refusal(503, why, code=cause, headers={RETRY: "5"})
        case "bad_adapter":
            words = (
                "an adapter that cannot be loaded",
                "a whole one of this base",
                "tell whoever runs the server",
            )
            status, param = 400, "model"
        case "model_not_found":
            words = "an adapter that is served no more", "one that is", "GET /v1/models lists yours"
            status, param = 404, "model"
        case _:
            words = "an error in the server", "an answer", "tell whoever runs it"
            status, param = 500, None
    return Refusal(
        status, why if candid else sentence(*words), param=param, code=cause or "engine_error"
    )


async def collect(answers: Answers, form: Form) -> list[list[Piece]]:
    """The pieces of each answer, when the last has ended. ``Refusal``: one of them did not come to
    its end."""
    pieces_by_answer: list[list[Piece]] = [[] for _ in range(form.count)]
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if refusal := failure(piece, form.candid):
                raise refusal
            pieces_by_answer[index].append(piece)
    return pieces_by_answer


async def whole(answers: Answers, form: Form) -> dict[str, Any]:
    """All answers, when the last has ended. ``Refusal``: one of them did not come to its end."""
    pieces_by_answer = await collect(answers, form)
    generated = sum(len(piece.tokens) for some in pieces_by_answer for piece in some)

    def choices() -> list[dict[str, Any]]:
        return [_choice(form, index, some) for index, some in enumerate(pieces_by_answer)]

    # 16 answers of 2,000 tokens with 20 alternatives each are seconds of work: not the loop's
    answer_choices = await asyncio.to_thread(choices) if form.logprobs else choices()
    return form.frame(answer_choices, usage=form.counts(generated))


def _choice(form: Form, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    head, text = form.heads[index], "".join(piece.text for piece in pieces)
    shown = _logprobs(form, [token for piece in pieces for token in piece.tokens], len(head))
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if form.parsers:
        message |= _message_fields(
            join_deltas(delta for piece in pieces for delta in form.deltas(index, piece))
        )
    finish = form.finish(index, pieces[-1])
    content = {"message": message} if form.chat else {"text": head + text}
    return {"index": index, **content, "logprobs": shown, "finish_reason": finish}


def _message_fields(answer: Sequence[str | Call]) -> dict[str, Any]:
    """An answer's text and calls as a message has them."""
    text = "".join(block for block in answer if isinstance(block, str))
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.arguments},
        }
        for block in answer
        if isinstance(block, Call)
    ]
    return {"content": text or None, "tool_calls": calls} if calls else {"content": text}


def _chat_delta(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.name is not None:
        function = {"name": delta.name, "arguments": delta.arguments}
        call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
    return {"tool_calls": [call]}


def _tool_events(form: Form, index: int, piece: Piece, shown: Any) -> Iterator[bytes]:
    """The events of one piece of an answer in which calls are looked for."""
    for delta in form.deltas(index, piece):
        yield _event(form, index, {"delta": _chat_delta(delta)}, shown)
        shown = None
    if shown is not None:
        yield _event(form, index, {"delta": {}}, shown)
    if piece.finish:
        yield _event(form, index, {"delta": {}}, finish=form.finish(index, piece))


def _logprobs(form: Form, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
    if not form.logprobs:
        return None
    return (
        {"content": chat_logprobs(tokens), "refusal": None}
        if form.chat
        else text_logprobs(tokens, start)
    )


async def events(form: Form, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
    """The answers as server-sent events; ``first`` was taken from ``pieces`` already, to see that
    there is an answer. An answer that breaks off ends the stream with an event {"error": …} and
    without [DONE]."""
    generated, offsets = 0, [len(head) for head in form.heads]
    item: tuple[int, Piece] | None = first
    async with aclosing(pieces):
        for index, head in enumerate(form.heads):
            if form.chat:
                yield _event(form, index, {"delta": {"role": "assistant", "content": ""}})
            elif head:
                yield _event(form, index, {"text": head})
        while item is not None:
            index, piece = item
            if refusal := failure(piece, form.candid):
                yield _data(refusal.body())
                return
            generated += len(piece.tokens)
            shown = _logprobs(form, piece.tokens, offsets[index])
            offsets[index] += sum(len(token.text) for token in piece.tokens)
            if form.parsers:
                for event in _tool_events(form, index, piece, shown):
                    yield event
            elif form.chat:
                if piece.text or piece.tokens:
                    yield _event(form, index, {"delta": {"content": piece.text}}, shown)
                if piece.finish:
                    yield _event(form, index, {"delta": {}}, finish=piece.finish)
            elif piece.text or piece.tokens or piece.finish:
                yield _event(form, index, {"text": piece.text}, shown, finish=piece.finish)
            item = await anext(pieces, None)
        if form.usage:
            yield _data(form.frame([], chunk=True, usage=form.counts(generated)))
        yield b"data: [DONE]\n\n"


def _event(
    form: Form, index: int, text: dict[str, Any], shown: Any = None, finish: str | None = None
) -> bytes:
    choice = {"index": index, **text, "logprobs": shown, "finish_reason": finish}
    more = {"usage": None} if form.usage else {}
    return _data(form.frame([choice], chunk=True, **more))


def _data(content: dict[str, Any]) -> bytes:
    """An event, in ASCII: some readers of lines take U+2028 for an end, and a model could write an
    event of its own."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def chat_logprobs(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {
            **_named(token.text, token.logprob),
            "top_logprobs": [_named(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def _named(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _json_logprob(logprob), "bytes": list(text.encode())}


def text_logprobs(tokens: Sequence[Token], start: int) -> dict[str, Any]:
    """Probabilities as completions show them; ``start`` is where in the text the first token
    begins."""
    offsets = [*accumulate((len(token.text) for token in tokens), initial=start)][: len(tokens)]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_json_logprob(token.logprob) for token in tokens],
        "top_logprobs": [
            {text: _json_logprob(logprob) for _, text, logprob in token.top} for token in tokens
        ],
        "text_offset": offsets,
    }


def _json_logprob(logprob: float | None) -> float:
    """JSON has no infinity: a token that could not be drawn has OpenAI's -9999."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else logprob
