"""Answers of ``/v1/messages``: whole, or as events.

    message_start
      content_block_start  content_block_delta …  content_block_stop     a text, or a call
    message_delta  message_stop

A stream that breaks off ends with an event ``error``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from veneer.fileio.untrusted import parse
from veneer.serve.answers import AnswerForm, Answers, Pieces, collect, failure
from veneer.serve.messages.request import MessagesRequest
from veneer.serve.requests import Piece
from veneer.serve.tools.deltas import Call, Delta, TextDelta, call_id, join_deltas

Event = dict[str, Any]


class MessagesView:
    """The answer to one request, written as it comes."""

    def __init__(self, form: AnswerForm, body: MessagesRequest) -> None:
        self._form, self._model = form, body.model
        self._id = call_id("msg")
        self._block = ""  # the type of the block that is open
        self._index = -1
        self._generated = self._cached = 0

    async def complete(self, answers: Answers) -> dict[str, Any]:
        (pieces,) = await collect(answers, self._form)
        self._generated = sum(len(piece.tokens) for piece in pieces)
        self._cached = pieces[-1].cached
        deltas = [delta for piece in pieces for delta in self._form.deltas(0, piece)]
        content = [_block(answer) for answer in join_deltas(deltas)]
        return {**self._message(), "content": content, **self._end(pieces[-1])}

    async def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[bytes]:
        """The events; ``first`` was taken from ``pieces`` already."""
        step: tuple[int, Piece] | None = first
        self._cached = first[1].cached
        async with aclosing(pieces):
            yield _encode({"type": "message_start", "message": self._message()})
            while step is not None:
                for event in self._of_piece(step[1]):
                    yield _encode(event)
                step = await anext(pieces, None)

    def _of_piece(self, piece: Piece) -> Iterator[Event]:
        refusal = failure(piece, self._form.shows_internal_errors)
        if refusal is not None:
            yield refusal.messages_body()
            return
        self._generated += len(piece.tokens)
        self._cached = piece.cached
        for delta in self._form.deltas(0, piece):
            yield from self._of_delta(delta)
        if piece.finish is None:
            return
        yield from self._end_block()
        end = self._end(piece)
        usage = end.pop("usage")
        yield {"type": "message_delta", "delta": end, "usage": usage}
        yield {"type": "message_stop"}

    def _of_delta(self, delta: Delta) -> Iterator[Event]:
        if isinstance(delta, TextDelta):
            if self._block != "text":
                yield from self._begin_block({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.text})
            return
        if delta.name is not None:
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            yield from self._begin_block(block)
        if delta.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": delta.arguments})

    def _begin_block(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._end_block()
        self._index, self._block = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _end_block(self) -> Iterator[Event]:
        if self._block:
            self._block = ""
            yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model,
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _end(self, piece: Piece) -> dict[str, Any]:
        """Why the answer ended with this piece, and what it cost."""
        finish = self._form.finish_reason(0, piece)
        reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        reason = reasons.get(finish or "", "stop_sequence" if piece.stop else "end_turn")
        stop = piece.stop if reason == "stop_sequence" else None
        return {"stop_reason": reason, "stop_sequence": stop, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        counts = self._form.usage_counts(self._generated, {0: self._cached})
        return {
            "input_tokens": counts["prompt_tokens"] - self._cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": counts["completion_tokens"],
        }


def _block(answer: str | Call) -> dict[str, Any]:
    """A text or a call as a block. Arguments that are no JSON object, which a model wrote wrongly
    or which were cut off, stay the text that they are."""
    if isinstance(answer, str):
        return {"type": "text", "text": answer}
    try:
        arguments = parse(answer.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return {"type": "text", "text": f"{answer.name} {answer.arguments}"}
    return {"type": "tool_use", "id": answer.id, "name": answer.name, "input": arguments}


def _encode(event: Event) -> bytes:
    data = json.dumps(event, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()
