"""What the server answers when it does not do what was asked, in the form of OpenAI's API.

    {"error": {"message": …, "type": "invalid_request_error", "param": "model" | null, "code": "model_not_found"}}

A ``Refusal`` is raised where the reason is found and becomes an answer in one place. Errors of the library that a
client can cause have a status here; all others are bugs of ours and answer 500 without their text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from veneer.errors import AdapterError, BankFullError, LibraryError, SelectionError, VeneerError, sentence
from veneer.serve.requests import Busy, RequestError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY = "Retry-After"


class Refusal(VeneerError, RuntimeError):  # noqa: N818
    """An answer with a status of 400 or above."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def no_such_model(name: str) -> Refusal:
    """One answer to what is not there and to what this key may not use, so that a key cannot find out which it is."""
    message = f"The model {_short(name)!r} does not exist, or you do not have access to it. GET /v1/models lists yours."
    return Refusal(404, message, param="model", code="model_not_found")


def draining() -> Refusal:
    message = sentence("a server that is shutting down", "one that takes requests", "send it to another, or try later")
    return Refusal(503, message, code="draining", headers={RETRY: "5"})


def of(error: VeneerError) -> Refusal:
    """The answer to an error of the library."""
    match error:
        case Refusal():
            return error
        case Busy():
            wait = {RETRY: str(max(1, min(3600, math.ceil(error.retry_after))))}
            return Refusal(429, str(error), code="queue_full", headers=wait)
        case RequestError():
            return Refusal(400, str(error))
        case SelectionError():
            return Refusal(404, str(error), param="model", code="model_not_found")
        case AdapterError() | LibraryError():
            return Refusal(400, str(error), param="lora_path", code="bad_adapter")
        case BankFullError():
            return Refusal(503, str(error), code="out_of_memory", headers={RETRY: "5"})
        case _:
            return Refusal(400, str(error))


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
