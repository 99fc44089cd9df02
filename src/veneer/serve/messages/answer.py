"""Write the answers of ``/v1/messages``, complete or as a stream of events.

    message_start
      content_block_start  content_block_delta …  content_block_stop     for each text or tool call
    message_delta  message_stop

If the answer fails, the stream ends with an event ``error``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from veneer.fileio.untrusted import parse
from veneer.serve.answers import (
    Answers,
    AnswerWriter,
    Pieces,
    collect_pieces,
    encode_event,
    failure,
)
from veneer.serve.messages.request import MessagesRequest
from veneer.serve.requests import Piece
from veneer.serve.tools.deltas import Call, Delta, TextDelta, join_deltas, random_id

Event = dict[str, Any]


class MessagesView:
    """Writes the answer to one request, from the pieces of text and tokens that the engine
    delivers. Use an instance for one call of ``complete`` or of ``events``."""

    def __init__(self, writer: AnswerWriter, body: MessagesRequest) -> None:
        self._writer, self._model_name = writer, body.model
        self._message_id = random_id("msg")
        self._block_type = ""  # type of the content block that may still grow; "" if none
        self._block_index = -1  # index of the last content block; -1 before the first
        self._generated_token_count = self._cached_token_count = 0

    async def complete(self, answers: Answers) -> dict[str, Any]:
        """The response body, once the answer has ended. Raises ``Refusal`` if the answer failed."""
        (pieces,) = await collect_pieces(answers, self._writer)
        self._generated_token_count = sum(len(piece.tokens) for piece in pieces)
        self._cached_token_count = pieces[-1].cached
        deltas = [delta for piece in pieces for delta in self._writer.deltas(0, piece)]
        content = [_content_block(text_or_call) for text_or_call in join_deltas(deltas)]
        end_fields = self._end_fields(pieces[-1])
        has_call = any(block["type"] == "tool_use" for block in content)
        # if all calls have invalid arguments, the message has text blocks in their place
        if end_fields["stop_reason"] == "tool_use" and not has_call:
            end_fields["stop_reason"] = "end_turn"
        return {**self._empty_message(), "content": content, **end_fields}

    async def events(
        self, first_indexed_piece: tuple[int, Piece], pieces: Pieces
    ) -> AsyncIterator[bytes]:
        """Yield the encoded events of a streamed answer. ``first_indexed_piece``: (index of the
        answer, which is 0, and its first piece), which the caller has already taken from
        ``pieces``. ``pieces`` is closed at the end, which cancels an answer that still runs."""
        indexed_piece: tuple[int, Piece] | None = first_indexed_piece
        self._cached_token_count = first_indexed_piece[1].cached
        async with aclosing(pieces):
            yield encode_event({"type": "message_start", "message": self._empty_message()})
            while indexed_piece is not None:
                for event in self._piece_events(indexed_piece[1]):
                    yield encode_event(event)
                indexed_piece = await anext(pieces, None)

    def _piece_events(self, piece: Piece) -> Iterator[Event]:
        """Yield the events of one piece of the answer."""
        refusal = failure(piece, self._writer)
        if refusal is not None:
            yield refusal.messages_body()
            return
        self._generated_token_count += len(piece.tokens)
        self._cached_token_count = piece.cached
        for delta in self._writer.deltas(0, piece):
            yield from self._delta_events(delta)
        if piece.finish is None:
            return
        yield from self._end_block()
        end_fields = self._end_fields(piece)
        usage = end_fields.pop("usage")
        yield {"type": "message_delta", "delta": end_fields, "usage": usage}
        yield {"type": "message_stop"}

    def _delta_events(self, delta: Delta) -> Iterator[Event]:
        """Yield the events of a piece of text or of a tool call. If it does not belong to the open
        content block, that block is ended and a new one is started."""
        if isinstance(delta, TextDelta):
            if self._block_type != "text":
                yield from self._start_block({"type": "text", "text": ""})
            yield self._delta_event({"type": "text_delta", "text": delta.text})
            return
        if delta.name is not None:
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            yield from self._start_block(block)
        if delta.arguments:
            yield self._delta_event({"type": "input_json_delta", "partial_json": delta.arguments})

    def _start_block(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._end_block()
        self._block_index, self._block_type = self._block_index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._block_index, "content_block": block}

    def _end_block(self) -> Iterator[Event]:
        """Yield the event that ends the open content block; nothing if no block is open."""
        if self._block_type:
            self._block_type = ""
            yield {"type": "content_block_stop", "index": self._block_index}

    def _delta_event(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._block_index, "delta": delta}

    def _empty_message(self) -> dict[str, Any]:
        """The message object without content, as in the first event of a stream."""
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _end_fields(self, piece: Piece) -> dict[str, Any]:
        """The fields of the message that are known when the answer has ended: why it ended, and its
        usage. ``piece``: the last piece of the answer."""
        finish_reason = self._writer.finish_reason(0, piece)
        stop_reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
        stop_reason = stop_reasons.get(
            finish_reason or "", "stop_sequence" if piece.stop else "end_turn"
        )
        stop_sequence = piece.stop if stop_reason == "stop_sequence" else None
        return {"stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """The field ``usage``. Unlike in OpenAI's API, the input tokens do not include the tokens
        that were read from the prefix cache."""
        counts = self._writer.usage_counts(
            self._generated_token_count, {0: self._cached_token_count}
        )
        return {
            "input_tokens": counts["prompt_tokens"] - self._cached_token_count,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached_token_count,
            "output_tokens": counts["completion_tokens"],
        }


def _content_block(text_or_call: str | Call) -> dict[str, Any]:
    """The content block of a text or of a tool call. A call whose arguments are not a JSON object,
    because the model wrote invalid JSON or the answer ended within the call, becomes a text
    block."""
    if isinstance(text_or_call, str):
        return {"type": "text", "text": text_or_call}
    try:
        arguments = parse(text_or_call.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return {"type": "text", "text": f"{text_or_call.name} {text_or_call.arguments}"}
    return {
        "type": "tool_use",
        "id": text_or_call.id,
        "name": text_or_call.name,
        "input": arguments,
    }
