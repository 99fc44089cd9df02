"""From pieces of the engine to answers in OpenAI's form, whole or as a stream of events.

    engine's thread ── Piece ──▶ call_soon_threadsafe ──▶ queue ──▶ ``Answers.pieces()`` ──▶ ``whole`` or ``events``

The queue needs no bound of its own: an answer has at most ``max_tokens`` pieces. When a client goes away, the task that
reads is cancelled or closed, and ``Answers`` cancels what still runs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import sentence
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Piece, Request, Token

DONE = b"data: [DONE]\n\n"
#: what JSON leaves as it is and some readers of lines (httpx's, and whatever uses str.splitlines) take for their end: a
#: model could break an event with it, or write one of its own
LINE_ENDS = tuple((chr(code), f"\\u{code:04x}") for code in (0x85, 0x2028, 0x2029))


class Answers:
    """The answers to some requests, all of which were submitted or none."""

    def __init__(self, engine: Any, requests: Sequence[Request], loop: asyncio.AbstractEventLoop) -> None:
        """Submit them, from any thread; pieces are read in ``loop``.

        Raises:
            Busy: the queue is full.
            RequestError: one of them can never be answered.
        """
        self._loop, self._open = loop, len(requests)
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets: list[Any] = []
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, self._deliver(index)))
        except BaseException:
            self.cancel()
            raise

    def _deliver(self, index: int) -> Any:
        def deliver(piece: Piece) -> None:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
            except RuntimeError:  # the loop has ended, and with it whoever would read
                return

        return deliver

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the request, piece), until the last of each. Cancels what runs when it is left early."""
        try:
            while self._open:
                index, piece = await self._queue.get()
                self._open -= piece.finish is not None
                yield index, piece
                await asyncio.sleep(0)  # a full queue never waits, and others (and a client's leaving) need a turn
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self._open:
            for ticket in self._tickets:
                ticket.cancel()


@dataclass
class Answer:
    """One answer as far as it has come."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


@dataclass(frozen=True)
class Form:
    """How one call wants its answers.

    Args:
        chat: chat completions, else completions.
        count: answers in all.
        prompt_tokens: tokens of all prompts, each counted once.
        heads: the text that goes before each answer (``echo``).
        logprobs: whether probabilities are shown.
        usage: whether a stream ends with the counts of tokens.
        candid: whether the client may read the words of an error inside the server.
    """

    id: str
    model: str
    chat: bool
    count: int
    prompt_tokens: int
    heads: tuple[str, ...] = ()
    logprobs: bool = False
    usage: bool = False
    candid: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, index: int) -> str:
        return self.heads[index] if self.heads else ""

    def counts(self, generated: int) -> dict[str, int]:
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def frame(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more,
        }  # fmt: skip


def failure(piece: Piece, candid: bool) -> Refusal | None:
    """What a client is told of an answer that did not come to its end."""
    match piece.finish:
        case "timeout":
            message = sentence("an answer that took too long", "one within the time limit", "ask for fewer tokens")
            return Refusal(504, message, code="timeout", headers={"x-should-retry": "false"})
        case "cancelled":
            message = sentence("an answer that was cancelled", "one that ends", "send the request again")
            return Refusal(503, message, code="cancelled", headers={"Retry-After": "5"})
        case "error":
            return _error(piece, candid)
        case _:
            return None


def _error(piece: Piece, candid: bool) -> Refusal:
    """The same statuses as where the cause is found before an answer begins (``refusal.of``)."""
    why = piece.error or "no reason given"
    match piece.cause:
        case "bad_request":
            return Refusal(400, why, param="response_format")
        case "bad_adapter":
            said = sentence(
                "an adapter that cannot be loaded", "a whole one of this base", "tell whoever runs the server"
            )
            return Refusal(400, why if candid else said, param="model", code="bad_adapter")
        case "model_not_found":
            said = sentence("an adapter that is served no more", "one that is", "GET /v1/models lists yours")
            return Refusal(404, why if candid else said, param="model", code="model_not_found")
        case "out_of_memory":
            return Refusal(503, why, code="out_of_memory", headers={"Retry-After": "5"})
        case _:
            said = sentence("an error in the server", "an answer", "tell whoever runs it")
            return Refusal(500, why if candid else said, code="engine_error")


async def whole(answers: Answers, form: Form) -> dict[str, Any]:
    """All answers, when the last has ended.

    Raises:
        Refusal: one of them did not come to its end.
    """
    found = [Answer() for _ in range(form.count)]
    pieces = answers.pieces()
    try:
        async for index, piece in pieces:
            if refusal := failure(piece, form.candid):
                raise refusal
            found[index].add(piece)
    finally:
        await pieces.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    generated = sum(len(answer.tokens) for answer in found)
    kind = "chat.completion" if form.chat else "text_completion"
    make = lambda: [_choice(form, index, answer) for index, answer in enumerate(found)]  # noqa: E731
    # 16 answers of 2,000 tokens with 20 alternatives each are seconds of work: not the loop's
    choices = await asyncio.to_thread(make) if form.logprobs else make()
    return form.frame(kind, choices, usage=form.counts(generated))


def _choice(form: Form, index: int, answer: Answer) -> dict[str, Any]:
    head = form.head(index)
    if form.chat:
        shown = {"content": chat_logprobs(answer.tokens), "refusal": None} if form.logprobs else None
        said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
    else:
        shown = text_logprobs(answer.tokens, len(head)) if form.logprobs else None
        said = {"text": head + answer.text}
    return {"index": index, **said, "logprobs": shown, "finish_reason": answer.finish}


async def events(answers: Answers, form: Form, first: tuple[int, Piece], pieces: Any) -> AsyncIterator[bytes]:
    """The answers as server-sent events; ``first`` was taken from ``pieces`` already, to see that there is an answer.

    An answer that breaks off ends the stream with an event {"error": …} and without [DONE].
    """
    generated, at = 0, [len(form.head(index)) for index in range(form.count)]
    try:
        for index in range(form.count):
            if form.chat:
                yield _event(form, index, {"delta": {"role": "assistant", "content": ""}})
            elif form.head(index):
                yield _event(form, index, {"text": form.head(index)})
        async for index, piece in _chained(first, pieces):
            if refusal := failure(piece, form.candid):
                yield _data(refusal.body())
                return
            generated += len(piece.tokens)
            if form.chat:
                if piece.text or piece.tokens:
                    shown = {"content": chat_logprobs(piece.tokens), "refusal": None} if form.logprobs else None
                    yield _event(form, index, {"delta": {"content": piece.text}}, shown)
                if piece.finish:
                    yield _event(form, index, {"delta": {}}, finish=piece.finish)
            elif piece.text or piece.tokens or piece.finish:
                shown = text_logprobs(piece.tokens, at[index]) if form.logprobs else None
                at[index] += sum(len(token.text) for token in piece.tokens)
                yield _event(form, index, {"text": piece.text}, shown, finish=piece.finish)
        if form.usage:
            kind = "chat.completion.chunk" if form.chat else "text_completion"
            yield _data(form.frame(kind, [], usage=form.counts(generated)))
        yield DONE
    finally:
        await pieces.aclose()


async def _chained(first: tuple[int, Piece], rest: Any) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for item in rest:
        yield item


def _event(form: Form, index: int, said: dict[str, Any], shown: Any = None, finish: str | None = None) -> bytes:
    choice = {"index": index, **said, "logprobs": shown, "finish_reason": finish}
    more = {"usage": None} if form.usage else {}
    return _data(form.frame("chat.completion.chunk" if form.chat else "text_completion", [choice], **more))


def _data(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for end, escaped in LINE_ENDS:
        text = text.replace(end, escaped)
    return b"data: " + text.encode() + b"\n\n"


def chat_logprobs(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Probabilities as chat completions show them."""
    return [
        {**_named(token.text, token.logprob), "top_logprobs": [_named(text, logprob) for _, text, logprob in token.top]}
        for token in tokens
    ]


def _named(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _json_logprob(logprob), "bytes": list(text.encode())}


def text_logprobs(tokens: Sequence[Token], start: int) -> dict[str, Any]:
    """Probabilities as completions show them; ``start`` is where in the text the first token begins."""
    offsets, at = [], start
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_json_logprob(token.logprob) for token in tokens],
        "top_logprobs": [{text: _json_logprob(logprob) for _, text, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _json_logprob(logprob: float | None) -> float:
    """JSON has no infinity: a token that could not be drawn has OpenAI's -9999."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else logprob
