"""Write answers as the JSON of OpenAI's API, complete or as a stream of events, from the pieces
(new text and tokens) that the engine delivers. ``/v1/messages`` and ``/v1/responses`` also take the
texts and tool calls of their answers from here (``AnswerWriter.deltas``).

    engine's thread ── Piece ──▶ call_soon_threadsafe ──▶ queue ──▶ ``Answers.pieces()`` ──▶
    ``AnswerWriter.complete`` or ``AnswerWriter.events``

The queue needs no bound, since an answer has at most ``max_tokens`` pieces. When a client
disconnects, the task that reads the pieces is cancelled or closed, so ``Answers`` cancels the
requests that still run.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from veneer.errors import sentence
from veneer.serve.logprobs import (
    chat_logprobs,
    json_logprob,
    shown_text,
    text_logprobs,
    token_bytes,
    token_offsets,
)
from veneer.serve.refusal import RETRY_AFTER, Refusal, timeout_refusal
from veneer.serve.request_log import CURRENT_RECORD
from veneer.serve.requests import ErrorKind, Piece, Request, Token
from veneer.serve.schemas import ChatRequest, GenerationRequest, StreamOptions
from veneer.serve.tools.choose import CallReading
from veneer.serve.tools.deltas import Call, Delta, TextDelta, join_deltas

Pieces = AsyncGenerator[tuple[int, Piece], None]


class Answers:
    """The answers to several engine requests. If one cannot be submitted, all are cancelled."""

    def __init__(
        self,
        engine: Any,
        requests: Sequence[Request],
        loop: asyncio.AbstractEventLoop,
        on_tokens_used: Callable[[int], None] | None = None,
    ) -> None:
        """Submit the requests to ``engine``. Any thread may call this; the pieces of answers are
        read in ``loop``. ``on_tokens_used`` is called once with the number of tokens of all prompts
        and answers, when all have ended or are cancelled; never if submitting fails."""
        self._loop, self._on_tokens_used, self._open_count = loop, on_tokens_used, len(requests)
        self._token_count = sum(len(request.prompt) for request in requests)
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._request_states: list[Any] = []
        self._log_record = CURRENT_RECORD.get()
        if self._log_record is not None:
            # count a prompt once, although n answers to it are n requests
            prompts = {id(request.prompt): request.prompt for request in requests}
            prompt_token_count = sum(map(len, prompts.values()))
            self._log_record.ask(requests[0].blend, prompt_token_count, requests[0].sampling)
        try:
            for index, request in enumerate(requests):
                self._request_states.append(engine.submit(request, partial(self._deliver, index)))
        except BaseException:
            self._on_tokens_used = self._log_record = None
            self.cancel()
            raise

    def _deliver(self, index: int, piece: Piece) -> None:
        """Put a piece of answer ``index`` into the queue, from the engine's thread."""
        with suppress(RuntimeError):  # the event loop has ended, so nothing reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self) -> Pieces:
        """Yield (index of the request, piece) until all answers have ended. If the caller closes
        the generator before, the requests that still run are cancelled."""
        try:
            while self._open_count:
                index, piece = await self._queue.get()
                self._open_count -= piece.finish is not None
                self._token_count += len(piece.tokens)
                if self._log_record is not None:
                    self._log_record.add(piece, self._request_states[index])
                yield index, piece
                # ``get`` does not suspend if the queue has items, so let other tasks run here
                await asyncio.sleep(0)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the requests that still run. The first call also reports the tokens so far."""
        if self._open_count:
            for request_state in self._request_states:
                request_state.cancel()
            if self._log_record is not None:
                self._log_record.end("cancelled")
        on_tokens_used, self._on_tokens_used = self._on_tokens_used, None
        if on_tokens_used is not None:
            on_tokens_used(self._token_count)


class AnswerWriter:
    """Writes the answers to one HTTP request as JSON.

    Args:
        prompts: the token ids of each prompt, which has ``body.n`` answers.
        echoed_texts: the text before each answer, if the client asks for ``echo``, else empty.
        shows_internal_errors: whether the client may read the messages of internal errors.
        reading: how tool calls are parsed from the answers; None if no tool may be called.
    """

    def __init__(
        self,
        body: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        echoed_texts: Sequence[str],
        shows_internal_errors: bool,
        reading: CallReading | None = None,
    ) -> None:
        self.body, self.is_chat = body, isinstance(body, ChatRequest)
        self.created = int(time.time())
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{body.request_id or uuid.uuid4().hex}"
        self.answer_count, self.prompt_tokens = body.n * len(prompts), sum(map(len, prompts))
        self.echoed_texts = echoed_texts or [""] * self.answer_count
        self.shows_internal_errors = shows_internal_errors
        self.alternative_count = body.alternative_count()
        has_logprobs = self.alternative_count is not None
        self.allows_one_call = isinstance(body, ChatRequest) and not body.parallel_tool_calls
        # whether the prompt's tokens are listed before the answer's, with log-probabilities
        self.echoes_logprobs = body.echo and has_logprobs and not self.is_chat
        # with log-probabilities, building the response body may take seconds
        self.is_large = has_logprobs or body.prompt_logprobs is not None
        self.stream_options = body.stream_options or StreamOptions()
        # the prompt's token ids for each answer; None if the client does not ask for them
        self.prompt_ids: list[list[int]] | None = None
        if body.return_token_ids:
            self.prompt_ids = [list(prompt) for prompt in prompts for _ in range(body.n)]
        #: fields of ``Sampling`` that answers with tool calls need
        self.sampling: dict[str, Any] = (
            {} if reading is None else {"shown_special_tokens": reading.markers}
        )
        self.grammar_param = body.schema_param()
        if reading is not None and reading.grammar is not None:
            self.sampling["grammar"], self.grammar_param = reading.grammar, "tools"
        self.parsers = [reading.new_parser() for _ in range(self.answer_count)] if reading else []

    async def complete(self, answers: Answers) -> dict[str, Any]:
        """The response body, once all answers have ended. ``Refusal``: an answer failed."""
        pieces_by_answer = await collect_pieces(answers, self)

        def build_body() -> dict[str, Any]:
            choices = [_choice(self, i, pieces) for i, pieces in enumerate(pieces_by_answer)]
            token_count = sum(len(piece.tokens) for pieces in pieces_by_answer for piece in pieces)
            prompt_tokens = [token for piece in pieces_by_answer[0] for token in piece.prompt]
            cached = {i: pieces[-1].cached for i, pieces in enumerate(pieces_by_answer)}
            usage = self.usage_counts(token_count, cached)
            return self.response_object(choices, usage=usage, **self.prompt_fields(prompt_tokens))

        # 16 answers of 2,000 tokens with 20 alternatives each take seconds
        return await _call_beside_loop(self.is_large, build_body)

    async def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
        """Yield the answers as server-sent events. ``first``: the first (index, piece), which the
        caller has taken from ``pieces`` to check whether it is an error. An answer that fails ends
        the stream with an event {"error": …} and without [DONE]."""
        token_count = 0
        text_offsets = [0 if self.echoes_logprobs else len(text) for text in self.echoed_texts]
        has_prompt_ids = [False] * self.answer_count  # whether a completion's prompt ids were sent
        indexed_piece: tuple[int, Piece] | None = first
        cached: dict[int, int] = {}
        usage = self._usage_so_far(0, {})
        async with aclosing(pieces):
            for index, echoed_text in enumerate(self.echoed_texts):
                if self.is_chat:
                    content = {"delta": {"role": "assistant", "content": echoed_text}}
                    yield _event(self, index, content, usage=usage, **self.prompt_fields())
                elif echoed_text and not self.echoes_logprobs:
                    content = {"text": echoed_text, **self.token_id_fields(index, (), first=True)}
                    yield _event(self, index, content, usage=usage)
                    has_prompt_ids[index] = True
            while indexed_piece is not None:
                index, piece = indexed_piece
                if refusal := failure(piece, self):
                    yield encode_event(refusal.body())
                    return
                token_count += len(piece.tokens)
                cached[index] = piece.cached
                usage = self._usage_so_far(token_count, cached)
                shown_part = _shown_part(self, index, piece)
                text, tokens = shown_part
                is_large = bool(piece.prompt)  # the table of a long prompt takes seconds
                logprobs = await _call_beside_loop(
                    is_large, _logprobs, self, [shown_part], text_offsets[index]
                )
                text_offsets[index] += len(text)
                if self.is_chat:
                    for event in _chat_events(self, index, piece, logprobs, usage):
                        yield event
                elif text or tokens or piece.finish:
                    is_first = not has_prompt_ids[index]
                    token_ids = self.token_id_fields(index, piece.tokens, first=is_first)
                    has_prompt_ids[index] = True
                    content = {"text": text, **token_ids}
                    yield await _call_beside_loop(
                        is_large, _event, self, index, content, logprobs, piece.finish, usage
                    )
                indexed_piece = await anext(pieces, None)
            if self.stream_options.include_usage:
                usage = self.usage_counts(token_count, cached)
                yield encode_event(self.response_object([], chunk=True, usage=usage))
            yield b"data: [DONE]\n\n"

    def deltas(self, index: int, piece: Piece) -> list[Delta]:
        """The text and the parts of tool calls that ``piece`` adds to answer ``index``. Pass each
        piece once, in order. With ``parallel_tool_calls: false``, only the first call is kept."""
        if not self.parsers:
            return [TextDelta(piece.text)] if piece.text else []
        parser = self.parsers[index]
        deltas = parser.feed(piece.text) + (parser.end() if piece.finish else [])
        if self.allows_one_call:
            deltas = [delta for delta in deltas if isinstance(delta, TextDelta) or not delta.index]
        return deltas

    def finish_reason(self, index: int, piece: Piece) -> str | None:
        """OpenAI's ``finish_reason`` of an answer, from its last piece."""
        return self.parsers[index].finish_reason(piece.finish) if self.parsers else piece.finish

    def token_name(self, id: int, text: str) -> str:
        """How an answer shows a token: its text, or "token_id:…" if the client asks for ids."""
        return f"token_id:{id}" if self.body.return_tokens_as_token_ids else shown_text(text)

    def token_id_fields(
        self, index: int, tokens: Sequence[Token], *, first: bool
    ) -> dict[str, Any]:
        """The fields with the ids of an answer's tokens; none unless the client asks for ids. In
        the ``first`` choice object of a completion's answer, the fields include the ids of its
        prompt. A chat's response has these beside the choices (``prompt_fields``)."""
        if self.prompt_ids is None:
            return {}
        fields = {"prompt_token_ids": self.prompt_ids[index]} if first and not self.is_chat else {}
        return {**fields, "token_ids": [token.id for token in tokens]}

    def prompt_fields(self, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        """The fields about the prompt in a chat's response; none for a completion. ``tokens``: the
        prompt's tokens with log-probabilities."""
        if not self.is_chat:
            return {}
        id_field = {} if self.prompt_ids is None else {"prompt_token_ids": self.prompt_ids[0]}
        return {**id_field, **self.prompt_logprob_fields(tokens)}

    def prompt_logprob_fields(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The field ``prompt_logprobs`` in vLLM's format: for each prompt token a table by token
        id, and None for the first token, which no token precedes."""
        alternative_count = self.body.prompt_logprobs
        if alternative_count is None or not tokens:
            return {}

        def entry(text: str, logprob: float | None, rank: int | None) -> dict[str, Any]:
            decoded_token = token_bytes(text).decode(errors="replace")
            return {"logprob": json_logprob(logprob), "rank": rank, "decoded_token": decoded_token}

        tables: list[dict[str, Any] | None] = [None]
        for token in tokens[1:]:
            entries = {str(token.id): entry(token.text, token.logprob, token.rank)}
            for rank, (id, text, logprob) in enumerate(token.top[:alternative_count], 1):
                entries.setdefault(str(id), entry(text, logprob, rank))
            tables.append(entries)
        return {"prompt_logprobs": tables}

    def usage_counts(self, generated: int, cached: Mapping[int, int]) -> dict[str, Any]:
        """The field ``usage``. ``generated``: the number of tokens of all answers. ``cached``: for
        each answer, how many tokens of its prompt were in the prefix cache. If a prompt has several
        answers, the smallest number counts: the first answer caches the prompt for the others."""
        cached_by_prompt: dict[int, int] = {}
        for index, count in cached.items():
            prompt_index = index // self.body.n
            cached_by_prompt[prompt_index] = min(count, cached_by_prompt.get(prompt_index, count))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached_by_prompt.values())},
        }

    def _usage_so_far(self, generated: int, cached: Mapping[int, int]) -> dict[str, Any] | None:
        """The field ``usage`` of a chunk; None if only the last chunk of a stream has the usage."""
        is_continuous = self.stream_options.continuous_usage_stats
        return self.usage_counts(generated, cached) if is_continuous else None

    def response_object(
        self, choices: list[Any], *, chunk: bool = False, **fields: Any
    ) -> dict[str, Any]:
        object_type = f"chat.completion{'.chunk' * chunk}" if self.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": object_type,
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
            **fields,
        }


def failure(piece: Piece, writer: AnswerWriter) -> Refusal | None:
    """The error response if the last ``piece`` of an answer reports a failure, else None."""
    match piece.finish:
        case "timeout":
            return timeout_refusal()
        case "cancelled":
            return Refusal(
                503,
                "an answer that was cancelled",
                "one that ends",
                "send the request again",
                code="cancelled",
                headers={RETRY_AFTER: "5"},
            )
        case "error":
            reason = piece.error or "no reason given"
            shows_internal_errors, param = writer.shows_internal_errors, writer.grammar_param
            return refusal_of_cause(reason, piece.error_kind, shows_internal_errors, param)
        case _:
            return None


def refusal_of_cause(
    reason: str,
    cause: ErrorKind | None,
    shows_internal_errors: bool,
    grammar_param: str | None = None,
) -> Refusal:
    """The error response for a failure in the engine. Failures that occur before a request is
    submitted are answered by ``error_refusal``, with the same status for the same failure.
    ``grammar_param``: the name of the field with the grammar or schema of the answer."""
    match cause:
        case "bad_request":
            return Refusal(400, reason, param=grammar_param)
        case "bad_blend":
            return Refusal(400, reason, param="adapters")
        case "grammar_limit" | "no_token_left":  # always shown: it says what to change
            return Refusal(400, reason, code=cause)
        case "out_of_memory":
            return Refusal(503, reason, code=cause, headers={RETRY_AFTER: "5"})
        case "bad_adapter":
            texts = (
                "an adapter that cannot be loaded",
                "a whole one of this base",
                "tell whoever runs the server",
            )
            status, param = 400, "model"
        case "model_not_found":
            texts = "an adapter that is served no more", "one that is", "GET /v1/models lists yours"
            status, param = 404, "model"
        case _:
            texts = "an error in the server", "an answer", "tell whoever runs it"
            status, param = 500, None
    message = reason if shows_internal_errors else sentence(*texts)
    return Refusal(status, message, param=param, code=cause or "engine_error")


async def collect_pieces(answers: Answers, writer: AnswerWriter) -> list[list[Piece]]:
    """Wait until all answers have ended; return the pieces of each. ``Refusal``: one failed."""
    pieces_by_answer: list[list[Piece]] = [[] for _ in range(writer.answer_count)]
    async with aclosing(answers.pieces()) as pieces:
        async for index, piece in pieces:
            if refusal := failure(piece, writer):
                raise refusal
            pieces_by_answer[index].append(piece)
    return pieces_by_answer


def _choice(writer: AnswerWriter, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """The choice object of answer ``index``, from all of its pieces."""
    echoed_text, text = writer.echoed_texts[index], "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.tokens]
    prompt_tokens = [token for piece in pieces for token in piece.prompt]
    shown_parts = [_shown_part(writer, index, piece) for piece in pieces]
    logprobs = _logprobs(writer, shown_parts, 0 if writer.echoes_logprobs else len(echoed_text))
    content: dict[str, Any] = {"text": echoed_text + text}
    if writer.is_chat:
        content = {"message": {"role": "assistant", "content": echoed_text + text, "refusal": None}}
    if writer.parsers:  # only chats have any
        blocks = join_deltas(delta for piece in pieces for delta in writer.deltas(index, piece))
        content["message"] |= _message_fields(echoed_text, blocks)
    return {
        "index": index,
        **content,
        "logprobs": logprobs,
        "finish_reason": writer.finish_reason(index, pieces[-1]),
        **writer.token_id_fields(index, tokens, first=True),
        **({} if writer.is_chat else writer.prompt_logprob_fields(prompt_tokens)),
    }


def _message_fields(echoed_text: str, blocks: Sequence[str | Call]) -> dict[str, Any]:
    """The fields of a message: ``echoed_text`` and the answer's text as one, and its tool calls."""
    text = echoed_text + "".join(block for block in blocks if isinstance(block, str))
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.arguments},
        }
        for block in blocks
        if isinstance(block, Call)
    ]
    return {"content": text or None, "tool_calls": calls} if calls else {"content": text}


def _chat_delta(delta: Delta) -> dict[str, Any]:
    """The field ``delta`` of a streamed chunk, for one parsed delta of a chat's answer."""
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
    if delta.name is not None:
        function = {"name": delta.name, "arguments": delta.arguments}
        call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
    return {"tool_calls": [call]}


def _chat_events(
    writer: AnswerWriter, index: int, piece: Piece, logprobs: Any, usage: Mapping[str, Any] | None
) -> Iterator[bytes]:
    """The events of one piece of a chat's answer. The first event has the piece's log-probabilities
    and token ids, even if the text of these tokens is held back and sent later."""
    token_ids = writer.token_id_fields(index, piece.tokens, first=False)
    deltas = [_chat_delta(delta) for delta in writer.deltas(index, piece)]
    # tokens whose text is held back get an event without text, for their log-probabilities
    empty_delta = {} if writer.parsers else {"content": ""}
    for delta in deltas or [empty_delta] * bool(piece.tokens):
        yield _event(writer, index, {"delta": delta, **token_ids}, logprobs, usage=usage)
        logprobs, token_ids = None, {}
    if piece.finish:
        finish_reason = writer.finish_reason(index, piece)
        yield _event(writer, index, {"delta": {}}, finish_reason=finish_reason, usage=usage)


async def _call_beside_loop(is_large: bool, function: Callable[..., Any], *args: Any) -> Any:
    """The result of ``function``, which runs in a thread if its work ``is_large``."""
    return await asyncio.to_thread(function, *args) if is_large else function(*args)


def _shown_part(writer: AnswerWriter, index: int, piece: Piece) -> tuple[str, tuple[Token, ...]]:
    """The text and tokens that a piece adds to answer ``index``, those of the prompt included if
    its log-probabilities are listed before the answer's."""
    if writer.echoes_logprobs and piece.prompt:
        return writer.echoed_texts[index] + piece.text, (*piece.prompt, *piece.tokens)
    return piece.text, piece.tokens


def _logprobs(
    writer: AnswerWriter, parts: Sequence[tuple[str, Sequence[Token]]], offset: int
) -> dict[str, Any] | None:
    """The field ``logprobs`` for parts of an answer. ``offset``: where their text begins."""
    if writer.alternative_count is None:
        return None
    tokens = [token for _, part_tokens in parts for token in part_tokens]
    if writer.is_chat:
        return {"content": chat_logprobs(tokens, writer.token_name), "refusal": None}
    offsets: list[int] = []
    for text, part_tokens in parts:
        offsets += token_offsets(text, part_tokens, offset)
        offset += len(text)
    return text_logprobs(tokens, offsets, writer.alternative_count, writer.token_name)


def _event(
    writer: AnswerWriter,
    index: int,
    content: dict[str, Any],
    logprobs: Any = None,
    finish_reason: str | None = None,
    usage: Mapping[str, Any] | None = None,
    **fields: Any,
) -> bytes:
    """The event of a chunk of answer ``index``. ``content``: its text or delta, and token ids."""
    choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
    if writer.stream_options.include_usage:
        fields["usage"] = usage
    return encode_event(writer.response_object([choice], chunk=True, **fields))


def encode_event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event, with a line for the field ``type`` if ``content`` has it. It is ASCII,
    because some clients treat U+2028 as the end of a line: a model that writes U+2028 could then
    forge an event."""
    type_line = f"event: {content['type']}\n" if "type" in content else ""
    return f"{type_line}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()
