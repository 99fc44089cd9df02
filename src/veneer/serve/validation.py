"""What is said of a body that is not what the API takes: which field, what was found there, what was expected.

pydantic lists an error for each form that a field may have (a text; a list of texts; …), the one for a text first. The
one that says most is of the form that came nearest: not "no text", but "a list of 17, at most 16".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from veneer.errors import sentence
from veneer.serve.refusal import Refusal

#: the type of errors that have their own words
OWN = "bad_value"
#: errors that say only that a value is not of this form
OTHER_FORM = {
    "string_type", "list_type", "dict_type", "int_type", "float_type", "bool_type", "model_type",
    "model_attributes_type", "int_parsing",
}  # fmt: skip
_EXPECTED = re.compile(r"(?:Input|List|String|Dictionary) should (?:be|have) (.*?)(?: after validation, not \d+)?")


def wrong(found: str, expected: str, do: str) -> PydanticCustomError:
    """An error for a validator to raise."""
    return PydanticCustomError(OWN, "{words}", {"words": sentence(found, expected, do)})


def kind(value: Any) -> str:
    """A value in words, without what is in it but for a number."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}" if abs(value) < 2**63 else "a number that is too large"
        case str():
            return f"a text of {_count(len(value), 'character')}"
        case list():
            return f"a list of {_count(len(value), 'item')}"
        case _:
            return "an object"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def refusal_of(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """The answer to what pydantic found in a body; never what was sent."""
    first = _telling(errors, body)
    where = _path(first["loc"], body)
    param, path = (where[0][:200] if where else None), ".".join(where)[:200]
    if first["type"] == OWN:
        message = first["msg"]
    elif first["type"] == "extra_forbidden":
        message = sentence(f"the field {path!r}, which is not supported", "the fields of the docs", "leave it out")
    elif not where and first["type"] in ("missing", *OTHER_FORM):
        message = sentence("no JSON object", "one, with Content-Type: application/json", "send it")
    elif first["type"] == "missing":
        message = sentence(f"no field {path!r}", "one", "add it")
    else:
        said = first["msg"].removeprefix("Value error, ")
        match = _EXPECTED.fullmatch(said)
        expected = (match[1] if match else said)[:300]
        message = sentence(f"{kind(first.get('input'))} in {path or 'the body'}", expected, "change it")
    return Refusal(400, message, param=param, code=first["type"])


def _telling(errors: Sequence[Mapping[str, Any]], body: Any) -> Mapping[str, Any]:
    """Of the errors of the first field that is wrong, the one of the form that came nearest."""
    field = errors[0]["loc"][:2]
    return max(
        (error for error in errors if error["loc"][:2] == field),
        key=lambda error: (len(_path(error["loc"], body)), error["type"] not in OTHER_FORM),
    )


def _path(loc: Sequence[str | int], body: Any) -> list[str]:
    """A place in the body. pydantic's also names the forms that it tried, which are in no body."""
    path: list[str] = []
    at: Any = body
    for part in loc[1:] if loc[:1] == ("body",) else loc:
        index = isinstance(at, list) and isinstance(part, int) and part < len(at)
        if index or (isinstance(at, dict) and part in at):
            at = at[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif not (isinstance(at, dict) and part == loc[-1]):  # a field that is missing
            continue
        path.append(str(part))
    return path
