"""Answers of the server that refuse a request, in the form of OpenAI's API.

    {"error": {"message": …, "type": "invalid_request_error", "param": "model" | null, "code":
    "model_not_found"}}

A ``Refusal`` is raised where the reason is found and becomes an answer in one place. Errors of the
library that a client can cause have a status here; all others are bugs and answer 500 without their
text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError
from starlette.responses import JSONResponse

from veneer.errors import (
    AdapterError,
    BankFullError,
    LibraryError,
    SelectionError,
    VeneerError,
    sentence,
)
from veneer.serve.requests import Busy

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
#: the route of Anthropic's API, and its names for statuses
MESSAGES = "/v1/messages"
MESSAGES_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
RETRY = "Retry-After"
#: the type of pydantic's errors that have their own words
OWN = "bad_value"
#: errors that say only that a value is not of this form
OTHER_FORM = {
    "string_type", "list_type", "dict_type", "int_type", "float_type", "bool_type", "model_type",
    "model_attributes_type", "int_parsing",
}  # fmt: skip
_EXPECTED = re.compile(
    r"(?:Input|List|String|Dictionary) should (?:be|have) (.*?)(?: after validation, not \d+)?"
)


class Refusal(VeneerError, RuntimeError):  # noqa: N818
    """An answer with a status of 400 or above. ``words`` are those of any error."""

    def __init__(
        self,
        status: int,
        *words: str,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(*words)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or KINDS.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def messages_body(self) -> dict[str, Any]:
        """The body in the form of Anthropic's API."""
        default = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = MESSAGES_KINDS.get(self.status, default)
        return {"type": "error", "error": {"type": kind, "message": str(self)}}

    def response(self, path: str = "") -> JSONResponse:
        """The answer to a request for ``path``, in the form of its API."""
        body = self.messages_body() if path.startswith(MESSAGES) else self.body()
        return JSONResponse(body, self.status, self.headers)


def no_such_model(name: str) -> Refusal:
    """The same answer for a model that does not exist and for one that the key may not use, so that
    a client cannot tell them apart."""
    name = name if len(name) <= 120 else f"{name[:120]}…"
    message = (
        f"The model {name!r} does not exist, or you do not have access to it. GET /v1/models lists"
        " yours."
    )
    return Refusal(404, message, param="model", code="model_not_found")


def draining() -> Refusal:
    message = sentence(
        "a server that is shutting down",
        "one that takes requests",
        "send it to another, or try later",
    )
    return Refusal(503, message, code="draining", headers={RETRY: "5"})


def of(error: VeneerError) -> Refusal:
    match error:
        case Refusal():
            return error
        case Busy():
            wait = {RETRY: str(max(1, min(3600, math.ceil(error.retry_after))))}
            return Refusal(429, str(error), code="queue_full", headers=wait)
        case SelectionError():
            return Refusal(404, str(error), param="model", code="model_not_found")
        case AdapterError() | LibraryError():
            return Refusal(400, str(error), param="lora_path", code="bad_adapter")
        case BankFullError():
            return Refusal(503, str(error), code="out_of_memory", headers={RETRY: "5"})
        case _:
            return Refusal(400, str(error))


def wrong(found: str, expected: str, do: str, param: str | None = None) -> PydanticCustomError:
    """An error for a validator to raise. ``param``: the field, for a validator of several."""
    return PydanticCustomError(
        OWN, "{words}", {"words": sentence(found, expected, do), "param": param}
    )


def kind(value: Any) -> str:
    """Describe a value without its content: its type, and a number's value."""
    match value:
        case None | True | False:
            return json.dumps(value)
        case int() | float():
            return f"the number {value}" if abs(value) < 2**63 else "a number that is too large"
        case str() | list():
            noun = "a text of {:,} character" if isinstance(value, str) else "a list of {:,} item"
            return noun.format(len(value)) + "s" * (len(value) != 1)
        case _:
            return "an object"


def of_body(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """The answer to pydantic's errors in a body; it never repeats the body. pydantic lists an error
    for each form that a field may have (a text; a list of texts; …). Of the first wrong field, the
    error of the form that comes nearest is chosen: not "no text", but "a list of 17, at most
    16"."""
    first = max(
        (error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]),
        key=lambda error: (len(_path(error["loc"], body)), error["type"] not in OTHER_FORM),
    )
    field = _path(first["loc"], body)
    param, path = (field[0][:200] if field else None), ".".join(field)[:200]
    if first["type"] == OWN:
        message, param = first["msg"], first.get("ctx", {}).get("param") or param
    elif first["type"] == "extra_forbidden":
        message = sentence(
            f"the field {path!r}, which is not supported", "the fields of the docs", "leave it out"
        )
    elif not field and first["type"] in ("missing", *OTHER_FORM):
        message = sentence("no JSON object", "one, with Content-Type: application/json", "send it")
    elif first["type"] == "missing":
        message = sentence(f"no field {path!r}", "one", "add it")
    else:
        reason = first["msg"].removeprefix("Value error, ")
        match = _EXPECTED.fullmatch(reason)
        expected = (match[1] if match else reason)[:300]
        message = sentence(
            f"{kind(first.get('input'))} in {path or 'the body'}", expected, "change it"
        )
    return Refusal(400, message, param=param, code=first["type"])


def _path(loc: Sequence[str | int], body: Any) -> list[str]:
    """The path of an error in the body. pydantic's ``loc`` also names the forms that it tried;
    these are left out."""
    path: list[str] = []
    value: Any = body
    for step in loc[1:] if loc[:1] == ("body",) else loc:
        index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if index or (isinstance(value, dict) and step in value):
            value = value[step]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif not (isinstance(value, dict) and step == loc[-1]):  # a field that is missing
            continue
        path.append(str(step))
    return path
