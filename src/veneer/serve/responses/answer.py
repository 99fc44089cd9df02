"""Write the answers of ``/v1/responses``, complete or as a stream of typed and numbered events.

The events of a stream, with those of a text on the left and those of a tool call on the right:

    response.created  response.in_progress
      response.output_item.added
        response.content_part.added                response.function_call_arguments.delta …
        response.output_text.delta …               response.function_call_arguments.done
        response.output_text.done
        response.content_part.done
      response.output_item.done
    response.completed | response.incomplete | response.failed

The response body of an answer that is not streamed is the object ``response`` of the last event.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from veneer.serve.answers import (
    Answers,
    AnswerWriter,
    Pieces,
    collect_pieces,
    encode_event,
    failure,
)
from veneer.serve.requests import Piece
from veneer.serve.responses.request import ResponsesRequest
from veneer.serve.tools.deltas import CallDelta, Delta, random_id

Event = dict[str, Any]


class ResponsesView:
    """Writes the answer to one request, from the pieces of text and tokens that the engine
    delivers. Use an instance for one call of ``complete`` or of ``events``."""

    def __init__(self, writer: AnswerWriter, body: ResponsesRequest) -> None:
        self._writer, self._request_body = writer, body
        self._response_id, self._created_at = random_id("resp"), int(time.time())
        self._output_items: list[dict[str, Any]] = []
        self._item_is_open = False  # whether the last output item may still grow
        self._generated_token_count = self._cached_token_count = self._event_number = 0

    async def complete(self, answers: Answers) -> dict[str, Any]:
        """The response body, once the answer has ended. Raises ``Refusal`` if the answer failed."""
        (pieces,) = await collect_pieces(answers, self._writer)
        events = [event for piece in pieces for event in self._piece_events(piece)]
        return events[-1]["response"]

    async def events(
        self, first_indexed_piece: tuple[int, Piece], pieces: Pieces
    ) -> AsyncIterator[bytes]:
        """Yield the encoded events of a streamed answer. ``first_indexed_piece``: (index of the
        answer, which is 0, and its first piece), which the caller has already taken from
        ``pieces``. ``pieces`` is closed at the end, which cancels an answer that still runs."""
        indexed_piece: tuple[int, Piece] | None = first_indexed_piece
        async with aclosing(pieces):
            for event_type in ("created", "in_progress"):
                yield self._encode({"type": f"response.{event_type}", "response": self._response()})
            while indexed_piece is not None:
                for event in self._piece_events(indexed_piece[1]):
                    yield self._encode(event)
                indexed_piece = await anext(pieces, None)

    def _piece_events(self, piece: Piece) -> Iterator[Event]:
        """Yield the events of one piece of the answer."""
        refusal = failure(piece, self._writer)
        if refusal is not None:
            error = {"code": "server_error", "message": str(refusal)}
            response = self._response("failed", error=error)
            yield {"type": "response.failed", "response": response}
            return
        self._generated_token_count += len(piece.tokens)
        self._cached_token_count = piece.cached
        for delta in self._writer.deltas(0, piece):
            yield from self._delta_events(delta)
        if piece.finish is None:
            return
        if not self._output_items:  # give an answer without text or calls an empty message
            yield from self._start_message()
        yield from self._end_item("completed" if piece.finish == "stop" else "incomplete")
        if piece.finish == "stop":
            yield {"type": "response.completed", "response": self._response("completed")}
        else:
            details = {"reason": "max_output_tokens"}
            response = self._response("incomplete", incomplete_details=details)
            yield {"type": "response.incomplete", "response": response}

    def _delta_events(self, delta: Delta) -> Iterator[Event]:
        """Yield the events of a piece of text or of a tool call. If it does not belong to the open
        output item, that item is ended and a new one is started."""
        if isinstance(delta, CallDelta):
            if delta.name is not None:
                yield from self._end_item("completed")
                call_fields = {"call_id": delta.id, "name": delta.name, "arguments": ""}
                yield from self._start_item("function_call", "fc", call_fields)
            if delta.arguments:
                self._output_items[-1]["arguments"] += delta.arguments
                event_type = "response.function_call_arguments.delta"
                yield self._item_event(event_type, delta=delta.arguments)
            return
        if not (self._item_is_open and self._output_items[-1]["type"] == "message"):
            yield from self._end_item("completed")
            yield from self._start_message()
        self._output_items[-1]["content"][0]["text"] += delta.text
        yield self._content_event("response.output_text.delta", delta=delta.text, logprobs=[])

    def _start_message(self) -> Iterator[Event]:
        yield from self._start_item("message", "msg", {"role": "assistant", "content": []})
        text_part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output_items[-1]["content"] = [text_part]
        yield self._content_event("response.content_part.added", part=dict(text_part))

    def _start_item(
        self, item_type: str, id_prefix: str, fields: dict[str, Any]
    ) -> Iterator[Event]:
        """Add an output item, such as a message or a call, and yield its first event.
        ``id_prefix``: the beginning of the item's id; ``fields``: the fields of this type of
        item."""
        output_item = {
            "type": item_type,
            "id": random_id(id_prefix),
            "status": "in_progress",
            **fields,
        }
        self._output_items.append(output_item)
        self._item_is_open = True
        yield {**self._output_event("response.output_item.added"), "item": dict(output_item)}

    def _end_item(self, status: str) -> Iterator[Event]:
        """Set the status of the last output item and yield the events that end it; do nothing if it
        has already ended."""
        if not self._item_is_open:
            return
        output_item = self._output_items[-1]
        output_item["status"], self._item_is_open = status, False
        if output_item["type"] == "message":
            text_part = output_item["content"][0]
            yield self._content_event(
                "response.output_text.done", text=text_part["text"], logprobs=[]
            )
            yield self._content_event("response.content_part.done", part=dict(text_part))
        else:
            event_type = "response.function_call_arguments.done"
            yield self._item_event(
                event_type, name=output_item["name"], arguments=output_item["arguments"]
            )
        yield {**self._output_event("response.output_item.done"), "item": dict(output_item)}

    def _output_event(self, event_type: str) -> Event:
        """An event about the last output item, which it gives by its index."""
        return {"type": event_type, "output_index": len(self._output_items) - 1}

    def _item_event(self, event_type: str, **fields: Any) -> Event:
        """An event about the last output item, which it gives by its index and its id."""
        return {**self._output_event(event_type), "item_id": self._output_items[-1]["id"], **fields}

    def _content_event(self, event_type: str, **fields: Any) -> Event:
        """An event about the text of the last output item, a message."""
        return {**self._item_event(event_type), "content_index": 0, **fields}

    def _encode(self, event: Event) -> bytes:
        """``event`` as a server-sent event, with the next sequence number."""
        numbered_event = {**event, "sequence_number": self._event_number}
        self._event_number += 1
        return encode_event(numbered_event)

    def _response(self, status: str = "in_progress", **fields: Any) -> dict[str, Any]:
        """The response object with the output items so far. ``fields`` replace its default
        fields."""
        request_body = self._request_body
        text_config = {"format": {"type": "text"}}
        if request_body.text is not None and request_body.text.format is not None:
            text_config = {
                "format": request_body.text.format.model_dump(by_alias=True, exclude_none=True)
            }
        tool_choice = request_body.tool_choice or "auto"
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request_body.instructions,
            "max_output_tokens": request_body.max_output_tokens,
            "model": request_body.model,
            "output": self._output_items,
            "parallel_tool_calls": request_body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request_body.temperature,
            "text": text_config,
            "tool_choice": tool_choice
            if isinstance(tool_choice, str)
            else tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in request_body.tools],
            "top_p": request_body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
            "user": None,
            "metadata": {},
            **fields,
        }

    def _usage(self) -> dict[str, Any]:
        """The field ``usage`` of the response object."""
        counts = self._writer.usage_counts(
            self._generated_token_count, {0: self._cached_token_count}
        )
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": self._cached_token_count,
                "cache_write_tokens": 0,
            },
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
