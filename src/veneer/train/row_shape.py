"""The shape of a data row: find which columns the task sft reads, and check their values.

column names of the first row  ->  "messages" | "prompt" (with a completion) | "text"
value of a column              ->  a text, or a list of messages {"role", "content"}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from veneer.errors import DataError, listing, nearest
from veneer.train.column_names import advise_columns, find_likely_column

Kind = Literal["messages", "prompt", "text", "columns"]

#: column with the tools that a chat may call
TOOLS = "tools"
#: columns that hold the labels of a classifier or of a preference task
LABELS = ("label", "labels", "label_text")


@dataclass(frozen=True)
class Columns:
    """By field, the name of its column. None stands for the column with the field's name, if there
    is one; for ``messages``, also for ``conversations``."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def detect_columns(
    names: list[str], first_row: dict[str, Any], columns: Columns, source: str
) -> tuple[Kind, dict[str, str]]:
    """Find the shape of the rows, and by field the name of its column. Columns that the user names
    in ``columns`` decide. Fields that the user does not name are looked up by their usual column
    names: first a chat, then prompt and completion, then a text. Raises `DataError` if no shape
    fits, or if the rows are those of another task than sft."""
    for option, column in vars(columns).items():
        if column is not None and column not in names:
            raise DataError(
                f"{source} has no column {column!r}{nearest(column, names)} (asked for as the"
                f" {option} column); it has {list_names(names)}.\nDo: name one that exists, for"
                f" example --{option}-column {names[0] if names else 'COLUMN'}."
            )
    if not any(vars(columns).values()):
        _refuse_other_tasks(names, first_row, source)
    if columns.messages is not None:
        return "messages", {"messages": columns.messages}
    if columns.text is not None:
        return "text", {"text": columns.text}
    is_pair_unnamed = columns.prompt is None and columns.completion is None
    if is_pair_unnamed and (chat := _chat_column(names)):
        return "messages", {"messages": chat}
    prompt, completion = columns.prompt or "prompt", columns.completion or "completion"
    if prompt in names and completion in names:
        return "prompt", {"prompt": prompt, "completion": completion}
    if is_pair_unnamed and "text" in names:
        return "text", {"text": "text"}
    sft_columns = ("messages", "prompt", "completion", "text")
    suggestions = [
        f"{name!r} looks like {match[0]!r}"
        for name in names
        if (match := difflib.get_close_matches(name.lower(), sft_columns, 1, 0.6))
        and name not in sft_columns
    ]
    raise DataError(
        f"{source} has the columns {list_names(names)}.\n"
        "Expected `messages` (a chat), or `prompt` and `completion`, or `text`."
        f"{' ' + '; '.join(suggestions) + '.' if suggestions else ''}\n"
        f"Do: {advise_columns(names, first_row, columns.prompt, columns.completion)}"
    )


def _chat_column(names: list[str]) -> str | None:
    return next((name for name in ("messages", "conversations") if name in names), None)


def _refuse_other_tasks(names: list[str], first_row: dict[str, Any], source: str) -> None:
    """Raise `DataError` for rows with preferences or labels, because the task sft would ignore the
    preference or the label. Called only if the user names no columns, since a user who names some
    accepts that the others are ignored."""
    if {"chosen", "rejected"} <= {*names}:
        flags = (
            "--messages-column chosen"
            if isinstance(first_row["chosen"], list)
            else "--text-column chosen"
        )
        prompt = find_likely_column("prompt", names)
        flags = flags if prompt is None else f"--prompt-column {prompt} --completion-column chosen"
        raise DataError(
            f"{source} holds preferences: the columns {list_names(names)}.\nExpected examples to"
            " imitate, as the task is sft.\nDo: to learn that one answer is better than another,"
            f" choose --task dpo, orpo or reward; or imitate the chosen answers alone: {flags}."
        )
    if labels := [name for name in names if name.lower() in LABELS]:
        unlabelled = [name for name in names if name not in labels]
        text = next((name for name in ("text", *unlabelled) if name in names), "TEXT")
        flags = (
            "--prompt-column prompt --completion-column completion"
            if "prompt" in names
            else f"--text-column {text}"
        )
        flags = f"--messages-column {chat}" if (chat := _chat_column(names)) else flags
        raise DataError(
            f"{source} has the column {labels[0]!r} beside"
            f" {list_names(unlabelled) if unlabelled else 'no other'}.\nExpected examples to"
            " imitate, as the task is sft, which would leave the labels out.\nDo: to learn the"
            " labels, choose --task classify (kto, if they judge completions), or write each as"
            " text into `completion`, with its text in `prompt`; to leave them out, name the"
            f" columns to read: {flags}."
        )


def check_texts_or_chats(
    row: Mapping[str, Any], location: str, column_by_field: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check each value of a row of messages, of prompt and completion, or of text, and return the
    row with parsed messages. Raises `DataError` for a value that is neither a text nor a chat, and
    if a prompt is a text and its completion a chat, or the reverse.

    Args:
        column_by_field: the column of each field, for errors; by default the field's name.
    """
    columns = column_by_field or {}
    checked = {
        field: _check_text_or_chat(value, field, columns.get(field, field), location)
        for field, value in row.items()
    }
    if len({isinstance(value, str) for value in checked.values()}) > 1:
        types = ", ".join(f"{field} is {json_type(value)}" for field, value in checked.items())
        raise DataError(
            f"{location}: {types}",
            "all of them text, or all lists of messages",
            "bring them into one form",
        )
    return checked


def _check_text_or_chat(value: Any, field: str, column: str, location: str) -> Any:
    """The text or the parsed messages in a column of a row. Raises `DataError` for other values."""
    if field != "messages" and isinstance(value, str):
        return value
    if field != "text" and isinstance(value, list):
        if not value:
            raise DataError(
                f"{location} holds an empty list of messages.\nDo: fix or remove that row."
            )
        return [_parse_message(message, location) for message in value]
    expected = {"messages": "a list of messages", "text": "text"}.get(
        field, "text or a list of messages"
    )
    raise DataError(
        f"{location}: the column {column!r} holds a {json_type(value)}: {snippet(to_json(value))}\n"
        f"Expected {expected}.\nDo: fix or remove that row."
    )


def _parse_message(message: Any, location: str) -> dict[str, Any]:
    """Parse a chat message to the form {"role", "content"}. Converts the ShareGPT form {"from",
    "value"}, and joins a content of several texts into one text. Arguments of tool calls that are
    JSON text (OpenAI's form) become dicts, which chat templates expect."""
    match message:
        case {"from": str(role), "value": content}:
            message = {
                "role": {"human": "user", "gpt": "assistant"}.get(role, role),
                "content": content,
            }
    match message:
        case {"role": str()}:
            # Parquet fills absent keys with None
            message = {key: value for key, value in message.items() if value is not None}
    match message:
        case {"role": str(), "content": [*text_segments]} if text_segments and all(
            map(_is_text, text_segments)
        ):
            content = "".join(text_segment["text"] for text_segment in text_segments)
            message = {**message, "content": content}
    match message:
        case {"role": "assistant", "tool_calls": [_, *_] as calls} if isinstance(
            message.get("content", ""), str
        ):
            return {
                **message,
                "content": message.get("content", ""),
                "tool_calls": [_parse_tool_call(call, location) for call in calls],
            }
        case {"role": str(), "content": str()}:
            return message
    raise DataError(
        f"{location} holds a message that is not one: {snippet(to_json(message))}\nExpected"
        ' {"role": "user" | "assistant" | "system" | "tool", "content": "text"}, where the'
        ' content may be a list of {"type": "text", "text": "..."}, and an assistant\'s may'
        ' stand beside "tool_calls".\nDo: fix or remove that row.'
    )


def _is_text(text_segment: Any) -> bool:
    """Whether a part of a message's content is a text."""
    return (
        isinstance(text_segment, dict)
        and text_segment.get("type") == "text"
        and isinstance(text_segment.get("text"), str)
    )


def _parse_tool_call(call: Any, location: str) -> dict[str, Any]:
    """A tool call of a message, with its arguments as a dict. Raises `DataError` for an invalid
    call."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not isinstance(arguments, dict)
    ):
        raise DataError(
            f"{location} holds a tool call that is not one: {snippet(to_json(call))}\nExpected"
            ' {"type": "function", "function": {"name": "...", "arguments": {...}}}.\nDo:'
            " fix or remove that row."
        )
    parsed_function = {
        "name": function["name"],
        "arguments": {name: value for name, value in arguments.items() if value is not None},
    }
    extra_fields = {
        name: value
        for name, value in call.items()
        if name not in ("function", "name", "arguments", "type")
    }
    return {
        "type": "function",
        **{name: value for name, value in extra_fields.items() if value is not None},
        "function": parsed_function,
    }


def parse_tools(value: Any, location: str) -> list[Any]:
    """The tools of a row, as a list of JSON schemas. ``value`` is this list, or its JSON text,
    since a CSV file cannot hold lists. Raises `DataError` for any other value."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    raise DataError(
        f"{location} holds {TOOLS} that are none: {snippet(to_json(value))}",
        "a list of JSON schemas of functions",
        "fix it, or remove that row",
    )


def list_names(names: Iterable[str]) -> str:
    return listing(map(repr, names), 12)


def json_type(value: Any) -> str:
    names = {
        "str": "text",
        "NoneType": "null",
        "dict": "object",
        "float": "number",
        "int": "number",
    }
    return names.get(type(value).__name__, type(value).__name__)


def to_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"a {json_type(value)} that is nested too deep to be shown"


def snippet(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:59] + "…"
