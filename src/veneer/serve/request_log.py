"""The server's log: one line for each request, as text or as JSON. Each line begins with a time.

    ``Guard`` puts a ``RequestRecord`` into a context variable ──▶ ``Answers`` or ``Embedder`` adds
    tokens and times ──▶ ``Guard`` logs one line, and sends one span (``tracing.py``)

A record has names, numbers and times. It never has a prompt, an answer or a header, and of an API
key only the name.
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
from typing import Any

from veneer.errors import escape_controls

FORMATS = ("text", "json")
ID_HEADER = "x-request-id"
#: request ids that a client may send: printable, and short enough for the log
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(client_ids: Sequence[str]) -> str:
    """The id of a request: the id in the client's header if there is one valid id, or a new id."""
    is_valid = len(client_ids) == 1 and _VALID_ID.fullmatch(client_ids[0])
    return client_ids[0] if is_valid else uuid.uuid4().hex


@dataclass
class RequestRecord:
    """The log record of one HTTP request. Only the event loop changes it.

    Fields:
        path: the URL path, without secrets.
        key: the name of the client's API key.
        status: the HTTP status of the answer; 0 before it begins.
        blend: the adapters that answered, with their weights; None if no model was needed.
        sampling: the sampling settings of the first answer (``requests.Sampling``).
        queue_seconds: the longest time that one of its answers waited for a row of the batch.
        first_token_seconds: the time from its arrival to the first token of any of its answers.
    """

    request_id: str
    method: str
    path: str
    key: str | None = None
    status: int = 0
    blend: Mapping[str, float] | None = None
    sampling: Any = None
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # nanoseconds since 1970

    def ask(self, blend: Mapping[str, float], prompt_tokens: int, sampling: Any = None) -> None:
        """Record that the model will answer the request with the adapters of ``blend``."""
        self.blend, self.sampling = blend, sampling
        self.prompt_tokens += prompt_tokens

    def add(self, piece: Any, request_state: Any) -> None:
        """Record a piece of an answer. ``request_state``: the result of ``Engine.submit``."""
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
        """Record why an answer ended. A reason that several answers share is listed once."""
        if reason not in self.finish_reasons:
            self.finish_reasons.append(reason)

    @property
    def adapter(self) -> str | None:
        """The name of the blend in the log, such as "base", "french" or "french*0.7+german*0.3";
        None if no model was needed."""
        if self.blend is None:
            return None
        if len(self.blend) > 1:
            return "+".join(f"{name}*{weight:g}" for name, weight in self.blend.items())
        return next(iter(self.blend), "base")

    def fields(self) -> dict[str, Any]:
        """The fields of a JSON line, which are the same for every request."""
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
        """The record as text, without the fields that do not apply to the request."""
        words = [self.key or "-", self.method, self.path, str(self.status or "gone")]
        words += [f"{self.total_seconds:.3f}s", f"id={self.request_id}"]
        if self.blend is not None:
            reasons = ",".join(self.finish_reasons) or "-"
            words += [
                f"adapter={self.adapter}",
                f"finish={reasons}",
                f"prompt={self.prompt_tokens}",
                f"cached={self.cached_tokens}",
                f"generated={self.generated_tokens}",
            ]
        for name, seconds in (("queue", self.queue_seconds), ("first", self.first_token_seconds)):
            words += [] if seconds is None else [f"{name}={_milliseconds(seconds):g}ms"]
        return " ".join(words)


#: the record of the request that the current task, or a thread that works for the task, answers
CURRENT_RECORD: ContextVar[RequestRecord | None] = ContextVar("veneer_request", default=None)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def formatter_of(log_format: str) -> logging.Formatter:
    """The formatter for a value of ``--log-format``."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def _timestamp(record: logging.LogRecord) -> str:
    """The time of a log line in UTC, to the millisecond."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """Text lines: 2026-03-01T12:00:00.123Z INFO alice POST /v1/completions 200 0.482s id=…"""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname} {record.getMessage()}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return escape_controls(line)


class JsonFormatter(logging.Formatter):
    """JSON lines. The line of a request has the fields of its record, and no message."""

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
