"""Error responses of the server, in the format of OpenAI's API.

    {"error": {"message": …, "type": "invalid_request_error", "param": "model" | null, "code":
    "model_not_found"}}

A ``Refusal`` can be raised anywhere; one exception handler turns it into a response. The errors of
the Veneer library (``VeneerError``) that a client can cause get an HTTP status here as well. All
other errors are bugs: their status is 500, and their message is not sent to the client.
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

#: error types of OpenAI's API by HTTP status; ``Refusal.__init__`` chooses those of other statuses
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
#: the route of Anthropic's API
MESSAGES_PATH = "/v1/messages"
#: the error types of Anthropic's API by HTTP status
MESSAGES_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
#: the route of OpenAI's Responses API
RESPONSES_PATH = "/v1/responses"
#: the name of the response header that says after how many seconds a client may try again
RETRY_AFTER = "Retry-After"
#: the type of the pydantic errors that ``value_error`` makes. ``body_refusal`` sends their messages
#: to the client unchanged.
CUSTOM_ERROR_TYPE = "bad_value"
#: the types of pydantic's errors for a value of another JSON type than expected, such as a number
#: in place of a text
WRONG_JSON_TYPE = {
    "string_type", "list_type", "dict_type", "int_type", "float_type", "bool_type", "model_type",
    "model_attributes_type", "int_parsing",
}  # fmt: skip
#: finds what pydantic expects in its message: "at most 16 items" in "List should have at most 16
#: items after validation, not 17"
_EXPECTATION = re.compile(
    r"(?:Input|List|String|Dictionary) should (?:be|have) (.*?)(?: after validation, not \d+)?"
)


class Refusal(VeneerError, RuntimeError):  # noqa: N818
    """An error response, with an HTTP status of 400 or above.

    Args:
        texts: the message, or three texts that become one: what was found, what was expected, and
            what the client can do (``VeneerError``).
        param, code, error_type: the fields ``param``, ``code`` and ``type`` of the error's JSON.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        *texts: str,
        param: str | None = None,
        code: str | None = None,
        error_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(*texts)
        self.status, self.param, self.code = status, param, code
        self.error_type = error_type or ERROR_TYPES.get(
            status, "server_error" if status >= 500 else "invalid_request_error"
        )
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The body in the format of OpenAI's API."""
        return {
            "error": {
                "message": str(self),
                "type": self.error_type,
                "param": self.param,
                "code": self.code,
            }
        }

    def messages_body(self) -> dict[str, Any]:
        """The body in the format of Anthropic's API."""
        default_type = "api_error" if self.status >= 500 else "invalid_request_error"
        error_type = MESSAGES_ERROR_TYPES.get(self.status, default_type)
        return {"type": "error", "error": {"type": error_type, "message": str(self)}}

    def response(self, path: str = "") -> JSONResponse:
        """The HTTP response to a request for the URL path ``path``: in the format of Anthropic's
        API if the path belongs to that API, otherwise in the format of OpenAI's."""
        body = self.messages_body() if path.startswith(MESSAGES_PATH) else self.body()
        return JSONResponse(body, self.status, self.headers)

    def error_event(self, path: str, event_count: int) -> bytes:
        """The server-sent event that ends the stream of an answer that failed after its response
        had begun, in the format of the API of the route ``path``. ``event_count``: how many events
        were sent before it."""
        event_line, content = "event: error\n", self.messages_body()
        if path.startswith(RESPONSES_PATH):
            content = {
                "type": "error",
                "code": "server_error",
                "message": str(self),
                "param": self.param,
                "sequence_number": event_count,
            }
        elif not path.startswith(MESSAGES_PATH):
            event_line, content = "", self.body()
        return f"{event_line}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def timeout_refusal() -> Refusal:
    """The refusal for an answer that did not end within the time limit. Its header tells OpenAI's
    clients not to retry, since the request would take as long again."""
    return Refusal(
        504,
        "an answer that took too long",
        "one within the time limit",
        "ask for fewer tokens",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def no_such_model(name: str) -> Refusal:
    """The refusal for a model that does not exist, and also for one that the API key may not use,
    so that a client cannot find out which models exist."""
    short_name = name if len(name) <= 120 else f"{name[:120]}…"
    return Refusal(
        404,
        f"The model {short_name!r} does not exist, or you do not have access to it. GET /v1/models"
        " lists yours.",
        param="model",
        code="model_not_found",
    )


def draining_refusal() -> Refusal:
    """The refusal for a request that arrives while the server shuts down."""
    return Refusal(
        503,
        "a server that is shutting down",
        "one that takes requests",
        "send it to another, or try later",
        code="draining",
        headers={RETRY_AFTER: "5"},
    )


def disk_reason(error: Exception) -> str:
    """Why a disk failed, for clients. ``error``: of SQLite or the system. The paths that an
    ``OSError`` names are left out, because they are the server's."""
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__


def error_refusal(error: VeneerError) -> Refusal:
    """The refusal for an error that the library raised while it worked on a request. Errors that
    have no case of their own get status 400."""
    match error:
        case Refusal():
            return error
        case Busy():
            retry_headers = {RETRY_AFTER: str(max(1, min(3600, math.ceil(error.retry_after))))}
            return Refusal(429, str(error), code="queue_full", headers=retry_headers)
        case SelectionError():
            return Refusal(404, str(error), param="model", code="model_not_found")
        case AdapterError() | LibraryError():
            return Refusal(400, str(error), param="lora_path", code="bad_adapter")
        case BankFullError():
            return Refusal(503, str(error), code="out_of_memory", headers={RETRY_AFTER: "5"})
        case _:
            return Refusal(400, str(error))


def value_error(
    problem: str, expected: str, do: str, param: str | None = None
) -> PydanticCustomError:
    """An error for a pydantic validator to raise. Its message says what was found (``problem``),
    what was expected, and what the client can do (``do``), as ``errors.sentence`` puts them.
    ``param``: the name of the invalid field, if the validator checks several fields."""
    return PydanticCustomError(
        CUSTOM_ERROR_TYPE, "{words}", {"words": sentence(problem, expected, do), "param": param}
    )


def raise_first_error(*rules: tuple[object, *tuple[str, ...]]) -> None:
    """Raise the error of the first broken rule, if any. Each rule is a tuple: whether it is broken,
    then the arguments of ``value_error`` for its error."""
    for is_broken, *texts in rules:
        if is_broken:
            raise value_error(*texts)


def describe_value(value: Any) -> str:
    """Describe a JSON value by its type and size for an error message, without repeating a text of
    the client."""
    match value:
        case None | True | False:
            return json.dumps(value)
        case int() | float():
            return f"the number {value}" if abs(value) < 2**63 else "a number that is too large"
        case str() | list():
            noun_format = (
                "a text of {:,} character" if isinstance(value, str) else "a list of {:,} item"
            )
            return noun_format.format(len(value)) + "s" * (len(value) != 1)
        case _:
            return "an object"


def body_refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """The refusal for a request body in which pydantic found ``errors``. Of the body's
    texts, it contains only names of fields, and what a ``value_error`` quotes.

    If a field allows several types, such as a text or a list of texts, pydantic lists an error for
    each of them. Of the errors for the first invalid field, the one whose path leads deepest into
    the body is reported, and of equal ones one that is not about the JSON type. So the error for 17
    stop strings is "at most 16 entries", not "not a text".
    """
    first_error = max(
        (error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]),
        key=lambda error: (
            len(_body_path(error["loc"], body)),
            error["type"] not in WRONG_JSON_TYPE,
        ),
    )
    field_path = _body_path(first_error["loc"], body)
    param, dotted_path = (field_path[0][:200] if field_path else None), ".".join(field_path)[:200]
    if first_error["type"] == CUSTOM_ERROR_TYPE:
        message, param = first_error["msg"], first_error.get("ctx", {}).get("param") or param
    elif first_error["type"] == "extra_forbidden":
        message = sentence(
            f"the field {dotted_path!r}, which is not supported",
            "the fields of the docs",
            "leave it out",
        )
    elif not field_path and first_error["type"] in ("missing", *WRONG_JSON_TYPE):
        message = sentence("no JSON object", "one, with Content-Type: application/json", "send it")
    elif first_error["type"] == "missing":
        message = sentence(f"no field {dotted_path!r}", "one", "add it")
    else:
        pydantic_message = first_error["msg"].removeprefix("Value error, ")
        expectation_match = _EXPECTATION.fullmatch(pydantic_message)
        expected = (expectation_match[1] if expectation_match else pydantic_message)[:300]
        message = sentence(
            f"{describe_value(first_error.get('input'))} in {dotted_path or 'the body'}",
            expected,
            "change it",
        )
    return Refusal(400, message, param=param, code=first_error["type"])


def _body_path(loc: Sequence[str | int], body: Any) -> list[str]:
    """The path of an invalid field in the body: keys of objects and indices in lists, as texts.
    ``loc`` is the path in pydantic's error. It also contains the names of the types that pydantic
    tried; these are not in the body, so they are left out."""
    path: list[str] = []
    value: Any = body
    for step in loc[1:] if loc[:1] == ("body",) else loc:
        is_index = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if is_index or (isinstance(value, dict) and step in value):
            value = value[step]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif not (isinstance(value, dict) and step == loc[-1]):
            continue  # the name of a type, not a missing field
        path.append(str(step))
    return path
