"""The server's log: one line for each HTTP request, as text or as JSON, with the time at which it
was written.

    ``Guard`` puts a ``RequestRecord`` into a context variable ──▶ ``Answers`` or ``Embedder`` adds
    tokens and times ──▶ ``Guard`` logs one line, and sends one OpenTelemetry span (``tracing.py``)

A record contains names, numbers and times. For privacy, it never contains a prompt, an answer, a
header or an API key; it contains only the key's name.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from veneer.errors import escape_controls

if TYPE_CHECKING:
    from veneer.serve.request_state import RequestState
    from veneer.serve.requests import Piece, Sampling

FORMATS = ("text", "json")
ID_HEADER = "x-request-id"
#: request ids that are accepted from clients: ASCII characters without spaces, short enough for the
#: log
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(client_ids: Sequence[str]) -> str:
    """The id of a request: the client's, if ``client_ids`` (all values of the header
    ``x-request-id``) is exactly one valid id; otherwise a new random id."""
    is_valid = len(client_ids) == 1 and _VALID_ID.fullmatch(client_ids[0])
    return client_ids[0] if is_valid else uuid.uuid4().hex


@dataclass
class RequestRecord:
    """The log record of one HTTP request.

    Fields:
        path: the URL path, in which secret segments are masked.
        key: the name of the client's API key.
        status: the HTTP status of the response; 0 before it begins.
        blend: weights by name of the adapters that answer the request, empty for the base alone;
            None if the request needs no model.
        sampling: the sampling settings of its first answer.
        cached_tokens: number of prompt tokens whose keys and values were in the prefix cache.
        queue_seconds: the longest time that one of its answers waited for a row of the batch.
        first_token_seconds: the time from its arrival to the first token of any of its answers.
        started: its arrival, by ``time.monotonic``.
    """

    request_id: str
    method: str
    path: str
    key: str | None = None
    status: int = 0
    blend: Mapping[str, float] | None = None
    sampling: Sampling | None = None
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # nanoseconds since 1970

    def ask(
        self, blend: Mapping[str, float], prompt_tokens: int, sampling: Sampling | None = None
    ) -> None:
        """Record that the model will answer the request with the adapters of ``blend`` (weights by
        name), and count the tokens of its prompts."""
        self.blend, self.sampling = blend, sampling
        self.prompt_tokens += prompt_tokens

    def add(self, piece: Piece, request_state: RequestState) -> None:
        """Record a piece of an answer. ``request_state``: the state of the answer's request, which
        ``Engine.submit`` returned."""
        self.generated_tokens += len(piece.tokens)
        if piece.tokens and self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.started
        if piece.finish is not None:
            self.end(piece.finish)
            self.cached_tokens += request_state.cached
            if request_state.started_at is not None:
                wait_seconds = request_state.started_at - request_state.submitted_at
                self.queue_seconds = max(wait_seconds, self.queue_seconds or 0.0)

    def end(self, reason: str) -> None:
        """Record the reason why an answer ended, unless another answer ended for that reason."""
        if reason not in self.finish_reasons:
            self.finish_reasons.append(reason)

    @property
    def adapter(self) -> str | None:
        """The adapters that answered, as a text for the log: "base", "french" or
        "french*0.7+german*0.3"; None if no model was needed."""
        if self.blend is None:
            return None
        if len(self.blend) > 1:
            return "+".join(f"{name}*{weight:g}" for name, weight in self.blend.items())
        return next(iter(self.blend), "base")

    def fields(self) -> dict[str, Any]:
        """The fields of the request's line in a JSON log. Every request has all of these fields;
        those that do not apply to it are None or 0."""
        return {
            "request_id": self.request_id,
            "key": self.key,
            "method": self.method,
            "endpoint": self.path,
            "status": self.status or None,
            "adapter": self.adapter,
            "finish_reason": ",".join(self.finish_reasons) or None,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "queue_ms": _milliseconds(self.queue_seconds),
            "first_token_ms": _milliseconds(self.first_token_seconds),
            "total_ms": _milliseconds(self.total_seconds),
        }

    def line(self) -> str:
        """The request's line in a text log, without its time and level. Fields that do not apply to
        the request are left out."""
        line_parts = [self.key or "-", self.method, self.path, str(self.status or "gone")]
        line_parts += [f"{self.total_seconds:.3f}s", f"id={self.request_id}"]
        if self.blend is not None:
            reasons = ",".join(self.finish_reasons) or "-"
            line_parts += [
                f"adapter={self.adapter}",
                f"finish={reasons}",
                f"prompt={self.prompt_tokens}",
                f"cached={self.cached_tokens}",
                f"generated={self.generated_tokens}",
            ]
        for name, seconds in (("queue", self.queue_seconds), ("first", self.first_token_seconds)):
            line_parts += [] if seconds is None else [f"{name}={_milliseconds(seconds):g}ms"]
        return " ".join(line_parts)


#: the record of the HTTP request that the current asyncio task answers; threads that work for the
#: task get a copy of its context and so see the same record
CURRENT_RECORD: ContextVar[RequestRecord | None] = ContextVar("veneer_request", default=None)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def formatter_of(log_format: str) -> logging.Formatter:
    """The formatter for ``log_format``, the value of ``--log-format``: "json" or "text"."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def _timestamp(record: logging.LogRecord) -> str:
    """The time of a log line, in UTC with milliseconds: "2026-03-01T12:00:00.123Z"."""
    utc_time = datetime.fromtimestamp(record.created, UTC)
    return utc_time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """Formats log records as text. The line of a request is, for example: 2026-03-01T12:00:00.123Z
    INFO alice POST /v1/completions 200 0.482s id=…"""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname} {record.getMessage()}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return escape_controls(line)


class JsonFormatter(logging.Formatter):
    """Formats log records as JSON, one object on each line. The line of a request has the fields of
    its ``RequestRecord`` in place of a message."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        request_fields = getattr(record, "request", None)
        entry |= {"message": record.getMessage()} if request_fields is None else request_fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
