"""Answers in OpenAI's form from the engine's pieces, complete or as a stream of events.

    engine's thread ── Piece ──▶ call_soon_threadsafe ──▶ queue ──▶ ``Answers.pieces()`` ──▶
    ``whole`` or ``events``

The queue needs no bound, since an answer has at most ``max_tokens`` pieces. When a client
disconnects, the task that reads is cancelled or closed, and ``Answers`` cancels the requests that
still run.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import accumulate
from typing import Any

from veneer.errors import sentence
from veneer.serve.refusal import RETRY, Refusal
from veneer.serve.request_log import CURRENT
from veneer.serve.requests import Cause, Piece, Request, Token
from veneer.serve.schemas import Asked, ChatRequest
from veneer.serve.tools.choose import CallReading
from veneer.serve.tools.deltas import Call, Delta, TextDelta, join_deltas

Pieces = AsyncGenerator[tuple[int, Piece], None]


class Answers:
    """The answers to several requests, which were submitted all or none."""

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
        self._record = CURRENT.get()
        if self._record is not None:
            prompts = {
                id(request.prompt): request.prompt for request in requests
            }  # once for each n
            prompt_tokens = sum(map(len, prompts.values()))
            self._record.ask(requests[0].blend, prompt_tokens, requests[0].sampling)
        try:
            for index, request in enumerate(requests):
                self._tickets.append(engine.submit(request, partial(self._deliver, index)))
        except BaseException:
            self._charge = self._record = None
            self.cancel()
            raise

    def _deliver(self, index: int, piece: Piece) -> None:
        with suppress(RuntimeError):  # the event loop has ended, so nothing reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self) -> Pieces:
        """Yield (index of the request, piece) up to the last piece of each. If it is left early,
        cancel the running requests."""
        try:
            while self._open:
                index, piece = await self._queue.get()
                self._open -= piece.finish is not None
                self._tokens += len(piece.tokens)
                if self._record is not None:
                    self._record.add(piece, self._tickets[index])
                yield index, piece
                await asyncio.sleep(
                    0
                )  # reading a full queue never waits, and other tasks need their turn
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self._open:
            for ticket in self._tickets:
                ticket.cancel()
            if self._record is not None:
                self._record.end("cancelled")
        charge, self._charge = self._charge, None
        if charge is not None:
            charge(self._tokens)


class Form:
    """The form of the answers to one call. ``heads``: the text before each answer (``echo``), or
    empty. ``candid``: whether the client may see the text of internal errors. ``reading``: how tool
    calls are parsed from the answers, or None."""

    def __init__(
        self, body: Asked, prompts: Sequence[Sequence[int]], heads: Sequence[str], candid: bool,
        reading: CallReading | None = None,
    ) -> None:  # fmt: skip
        self.chat, self.model, self.created = (
            isinstance(body, ChatRequest),
            body.model,
            int(time.time()),
        )
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{body.request_id or uuid.uuid4().hex}"
        self.count, self.prompt_tokens = body.n * len(prompts), sum(map(len, prompts))
        self.choices = body.n  # answers to a prompt
        self.heads, self.candid = heads or [""] * self.count, candid
        self.alternatives, self.prompt_logprobs = body.alternatives(), body.prompt_logprobs
        self.logprobs = self.alternatives is not None
        # the prompt's tokens come before those of the answer
        self.echo_logprobs = body.echo and self.logprobs and not self.chat
        # seconds of work, perhaps
        self.large = self.logprobs or self.prompt_logprobs is not None
        options = body.stream_options
        self.usage = options is not None and options.include_usage
        self.continuous_usage = options is not None and options.continuous_usage_stats
        self.ids_as_tokens = body.return_tokens_as_token_ids
        # by answer, where they are asked for
        self.prompt_ids = (
            [list(prompt) for prompt in prompts for _ in range(body.n)]
            if body.return_token_ids
            else None
        )
        #: fields of ``Sampling`` that the calls in the answers need
        self.sampling: dict[str, Any] = {} if reading is None else {"markers": reading.markers}
        if reading is not None and reading.grammar is not None:
            self.sampling["grammar"] = reading.grammar
        self.parsers = [] if reading is None else [reading.new_parser() for _ in range(self.count)]

    async def complete(self, answers: Answers) -> dict[str, Any]:
        return await whole(answers, self)

    def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
        return events(self, first, pieces)

    def deltas(self, index: int, piece: Piece) -> list[Delta]:
        """The text and tool calls that a piece of answer ``index`` makes certain."""
        if not self.parsers:
            return [TextDelta(piece.text)] if piece.text else []
        parser = self.parsers[index]
        deltas = parser.feed(piece.text)
        return deltas + parser.end() if piece.finish else deltas

    def finish(self, index: int, piece: Piece) -> str | None:
        """OpenAI's ``finish_reason`` of an answer, from its last piece."""
        return self.parsers[index].finish(piece.finish) if self.parsers else piece.finish

    def name(self, id: int, text: str) -> str:
        """The name of a token in answers."""
        return f"token_id:{id}" if self.ids_as_tokens else text

    def show_tokens(self, index: int, tokens: Sequence[Token], *, first: bool) -> dict[str, Any]:
        """The ids of an answer's tokens, and where it is the ``first`` part of a completion, those
        of its prompt; of a chat, the prompt's are beside the choices (``show_prompt``)."""
        if self.prompt_ids is None:
            return {}
        prompt = {"prompt_token_ids": self.prompt_ids[index]} if first and not self.chat else {}
        return {**prompt, "token_ids": [token.id for token in tokens]}

    def show_prompt(self, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        """The fields of a chat's answer about its one prompt. ``tokens``: with their
        log-probabilities."""
        if not self.chat:
            return {}
        ids = {} if self.prompt_ids is None else {"prompt_token_ids": self.prompt_ids[0]}
        return {**ids, **self.show_prompt_logprobs(tokens)}

    def show_prompt_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The field ``prompt_logprobs`` as vLLM has it: entries by token id, none for the first
        token."""
        count = self.prompt_logprobs
        if count is None or not tokens:
            return {}

        def entry(text: str, logprob: float | None, rank: int | None) -> dict[str, Any]:
            return {"logprob": _json_logprob(logprob), "rank": rank, "decoded_token": text}

        shown: list[dict[str, Any] | None] = [None]
        for token in tokens[1:]:
            entries = {str(token.id): entry(token.text, token.logprob, token.rank)}
            for rank, (id, text, logprob) in enumerate(token.top[:count], 1):
                entries.setdefault(str(id), entry(text, logprob, rank))
            shown.append(entries)
        return {"prompt_logprobs": shown}

    def counts(self, generated: int, cached: Mapping[int, int]) -> dict[str, Any]:
        """The usage of the call. ``cached``: of each answer, tokens of its prompt that were in the
        cache; of a prompt with several answers, the first of them finds the least."""
        least: dict[int, int] = {}
        for index, tokens in cached.items():
            prompt = index // self.choices
            least[prompt] = min(tokens, least.get(prompt, tokens))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(least.values())},
        }

    def frame(self, choices: list[Any], *, chunk: bool = False, **more: Any) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' * chunk}" if self.chat else "text_completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "choices": choices, **more,
        }  # fmt: skip


def failure(piece: Piece, candid: bool) -> Refusal | None:
    """The error of an answer that failed; None for one that ended."""
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
    """The error of a failure, with the status that it has before an answer begins
    (``refusal.of``)."""
    match cause:
        case "bad_request":
            return Refusal(400, why, param="response_format")
        case (
            "grammar_limit" | "no_token_left"
        ):  # of what the client asked for, in words that say it
            return Refusal(400, why, code=cause)
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

    def content() -> dict[str, Any]:
        choices = [_choice(form, index, some) for index, some in enumerate(pieces_by_answer)]
        prompt = [token for piece in pieces_by_answer[0] for token in piece.prompt]
        cached = {index: some[-1].cached for index, some in enumerate(pieces_by_answer)}
        usage = form.counts(generated, cached)
        return form.frame(choices, usage=usage, **form.show_prompt(prompt))

    # in a thread: 16 answers of 2,000 tokens with 20 alternatives each take seconds
    return await asyncio.to_thread(content) if form.large else content()


def _choice(form: Form, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    head, text = form.heads[index], "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    prompt = [token for piece in pieces for token in piece.prompt]
    echoed = prompt if form.echo_logprobs else []
    shown = _logprobs(form, [*echoed, *tokens], 0 if echoed else len(head))
    message: dict[str, Any] = {"role": "assistant", "content": head + text, "refusal": None}
    if form.parsers:
        deltas = [delta for piece in pieces for delta in form.deltas(index, piece)]
        message |= _message_fields(head, join_deltas(deltas))
    content = {"message": message} if form.chat else {"text": head + text}
    extras = form.show_tokens(index, tokens, first=True)
    extras |= {} if form.chat else form.show_prompt_logprobs(prompt)
    finish = form.finish(index, pieces[-1])
    return {"index": index, **content, "logprobs": shown, "finish_reason": finish, **extras}


def _message_fields(head: str, answer: Sequence[str | Call]) -> dict[str, Any]:
    """The fields of a message: ``head`` and the answer's text, and its tool calls."""
    text = head + "".join(block for block in answer if isinstance(block, str))
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


def _tool_events(
    form: Form, index: int, piece: Piece, shown: Any, usage: Mapping[str, Any] | None
) -> Iterator[bytes]:
    """The events of one piece of an answer that may contain tool calls. The first event has the
    piece's tokens, even if they give no text or call yet."""
    tokens = form.show_tokens(index, piece.tokens, first=False)
    deltas = [_chat_delta(delta) for delta in form.deltas(index, piece)]
    for delta in deltas or [{}] * bool(piece.tokens):
        yield _event(form, index, {"delta": delta, **tokens}, shown, usage=usage)
        shown, tokens = None, {}
    if piece.finish:
        finish = form.finish(index, piece)
        yield _event(form, index, {"delta": {}}, finish=finish, usage=usage)


def _logprobs(form: Form, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
    if form.alternatives is None:
        return None
    return (
        {"content": chat_logprobs(tokens, form.name), "refusal": None}
        if form.chat
        else text_logprobs(tokens, start, form.alternatives, form.name)
    )


async def events(form: Form, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
    """The answers as server-sent events. ``first`` was already taken from ``pieces``, to see
    whether there is an answer. An answer that fails ends the stream with an event {"error": …} and
    without [DONE]."""
    generated, offsets = 0, [0 if form.echo_logprobs else len(head) for head in form.heads]
    begun = [form.chat] * form.count  # whose prompt's ids were told
    item: tuple[int, Piece] | None = first
    cached: dict[int, int] = {}
    async with aclosing(pieces):
        for index, head in enumerate(form.heads):
            if form.chat:
                delta = {"delta": {"role": "assistant", "content": head}}
                yield _event(form, index, delta, **form.show_prompt())
            elif head and not form.echo_logprobs:
                yield _event(form, index, {"text": head, **form.show_tokens(index, (), first=True)})
                begun[index] = True
        while item is not None:
            index, piece = item
            if refusal := failure(piece, form.candid):
                yield _data(refusal.body())
                return
            generated += len(piece.tokens)
            cached[index] = piece.cached
            tokens, text = piece.tokens, piece.text
            if form.echo_logprobs and piece.prompt:
                tokens, text = (*piece.prompt, *tokens), form.heads[index] + text
            shown = _logprobs(form, tokens, offsets[index])
            offsets[index] += sum(len(token.text) for token in tokens)
            usage = form.counts(generated, cached) if form.continuous_usage else None
            if form.parsers:
                for event in _tool_events(form, index, piece, shown, usage):
                    yield event
                item = await anext(pieces, None)
                continue
            if text or tokens or (piece.finish and not form.chat):
                content = {"delta": {"content": text}} if form.chat else {"text": text}
                content |= form.show_tokens(index, piece.tokens, first=not begun[index])
                begun[index] = True
                finish = None if form.chat else piece.finish
                yield _event(form, index, content, shown, finish, usage)
            if form.chat and piece.finish:
                yield _event(form, index, {"delta": {}}, None, piece.finish, usage)
            item = await anext(pieces, None)
        if form.usage:
            yield _data(form.frame([], chunk=True, usage=form.counts(generated, cached)))
        yield b"data: [DONE]\n\n"


def _event(
    form: Form,
    index: int,
    content: dict[str, Any],
    shown: Any = None,
    finish: str | None = None,
    usage: Mapping[str, Any] | None = None,
    **more: Any,
) -> bytes:
    choice = {"index": index, **content, "logprobs": shown, "finish_reason": finish}
    if form.usage:
        if form.continuous_usage:
            more["usage"] = form.counts(0, {}) if usage is None else usage
        else:
            more["usage"] = None
    return _data(form.frame([choice], chunk=True, **more))


def _data(content: dict[str, Any]) -> bytes:
    """An event, in ASCII: some clients treat U+2028 as the end of a line, and a model could then
    write its own event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


Name = Callable[[int, str], str]


def chat_logprobs(tokens: Sequence[Token], name: Name) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chats. ``name(id, text)`` is the shown name of a token."""

    def entry(id: int, text: str, logprob: float | None) -> dict[str, Any]:
        token = {"token": name(id, text), "logprob": _json_logprob(logprob)}
        return {**token, "bytes": list(text.encode())}

    return [
        {
            **entry(token.id, token.text, token.logprob),
            "top_logprobs": [entry(*alternative) for alternative in token.top],
        }
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[Token], start: int, count: int, name: Name) -> dict[str, Any]:
    """Log-probabilities in the form of completions, with ``count`` alternatives. ``start``: the
    offset of the first token in the text. The first token of a prompt has none."""
    offsets = [*accumulate((len(token.text) for token in tokens), initial=start)][: len(tokens)]
    top: list[dict[str, float] | None] = []
    for token in tokens:
        shown: dict[str, float] = {}
        for id, text, logprob in token.top[
            :count
        ]:  # of two alternatives with equal text, the more likely one
            shown.setdefault(name(id, text), _json_logprob(logprob))
        top.append(None if token.logprob is None else shown)
    return {
        "tokens": [name(token.id, token.text) for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else _json_logprob(token.logprob) for token in tokens
        ],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _json_logprob(logprob: float | None) -> float:
    """A log-probability for JSON, which has no infinity: a token with probability 0 has OpenAI's
    -9999."""
    return -9999.0 if logprob is None or not logprob > -9999.0 else logprob
