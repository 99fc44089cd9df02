"""The shape of a data row: which columns the task sft reads, and checks of their values.

column names of the first row  ->  the kind of all rows: "messages" (a chat), "prompt" (a prompt
                                   and its completion) or "text"
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

#: the column that holds the tools (functions) that the assistant of a chat may call
TOOLS = "tools"
#: names of columns that usually hold labels, which sft does not learn but other tasks do
LABEL_COLUMN_NAMES = ("label", "labels", "label_text")


@dataclass(frozen=True)
class Columns:
    """For each field of a row, the name of the column that the user chose for it. None: the user
    chose none, so the column with the field's name is used if it exists; for ``messages`` else
    ``conversations``."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


def detect_columns(
    column_names: list[str], first_row: dict[str, Any], columns: Columns, source: str
) -> tuple[Kind, dict[str, str]]:
    """Find the kind of the rows, and for each of its fields the name of the column: for example
    ("prompt", {"prompt": "question", "completion": "completion"}).

    A column that the user chose in ``columns`` decides the kind. Without one, the usual column
    names decide: first those of a chat, then prompt and completion, then text. If the user chose
    only one column of a prompt and its completion, the other has its usual name.

    Args:
        column_names: the names of all columns of the data.
        source: the file or the id of the data set, for errors.

    Raises:
        DataError: a chosen column does not exist, the columns are of no known kind, or they hold
            preferences or labels, which are for tasks other than sft.
    """
    for field, column in vars(columns).items():
        if column is not None and column not in column_names:
            raise DataError(
                f"{source} has no column {column!r}{nearest(column, column_names)} (asked for as"
                f" the {field} column); it has {list_names(column_names)}.\nDo: name one that"
                f" exists, for example --{field}-column"
                f" {column_names[0] if column_names else 'COLUMN'}."
            )
    if not any(vars(columns).values()):
        _refuse_other_tasks(column_names, first_row, source)
    if columns.messages is not None:
        return "messages", {"messages": columns.messages}
    if columns.text is not None:
        return "text", {"text": columns.text}
    is_pair_unspecified = columns.prompt is None and columns.completion is None
    if is_pair_unspecified and (chat_column := _chat_column(column_names)):
        return "messages", {"messages": chat_column}
    prompt_column, completion_column = (
        columns.prompt or "prompt",
        columns.completion or "completion",
    )
    if prompt_column in column_names and completion_column in column_names:
        return "prompt", {"prompt": prompt_column, "completion": completion_column}
    if is_pair_unspecified and "text" in column_names:
        return "text", {"text": "text"}
    sft_columns = ("messages", "prompt", "completion", "text")
    suggestions = [
        f"{name!r} looks like {match[0]!r}"
        for name in column_names
        if (match := difflib.get_close_matches(name.lower(), sft_columns, 1, 0.6))
        and name not in sft_columns
    ]
    raise DataError(
        f"{source} has the columns {list_names(column_names)}.\n"
        "Expected `messages` (a chat), or `prompt` and `completion`, or `text`."
        f"{' ' + '; '.join(suggestions) + '.' if suggestions else ''}\n"
        f"Do: {advise_columns(column_names, first_row, columns.prompt, columns.completion)}"
    )


def _chat_column(column_names: list[str]) -> str | None:
    return next((name for name in ("messages", "conversations") if name in column_names), None)


def _refuse_other_tasks(column_names: list[str], first_row: dict[str, Any], source: str) -> None:
    """Raise `DataError` for rows with preferences or labels, because the task sft would silently
    ignore them. It is called only if the user chose no columns: a user who chooses columns knows
    that sft ignores the others."""
    if {"chosen", "rejected"} <= {*column_names}:
        advised_flags = (
            "--messages-column chosen"
            if isinstance(first_row["chosen"], list)
            else "--text-column chosen"
        )
        prompt_column = find_likely_column("prompt", column_names)
        advised_flags = (
            advised_flags
            if prompt_column is None
            else f"--prompt-column {prompt_column} --completion-column chosen"
        )
        raise DataError(
            f"{source} holds preferences: the columns {list_names(column_names)}.\nExpected"
            " examples to imitate, as the task is sft.\nDo: to learn that one answer is better"
            " than another, choose --task dpo, orpo or reward; or imitate the chosen answers alone:"
            f" {advised_flags}."
        )
    if label_columns := [name for name in column_names if name.lower() in LABEL_COLUMN_NAMES]:
        other_columns = [name for name in column_names if name not in label_columns]
        text_column = next(
            (name for name in ("text", *other_columns) if name in column_names), "TEXT"
        )
        advised_flags = (
            "--prompt-column prompt --completion-column completion"
            if "prompt" in column_names
            else f"--text-column {text_column}"
        )
        advised_flags = (
            f"--messages-column {chat_column}"
            if (chat_column := _chat_column(column_names))
            else advised_flags
        )
        raise DataError(
            f"{source} has the column {label_columns[0]!r} beside"
            f" {list_names(other_columns) if other_columns else 'no other'}.\nExpected examples to"
            " imitate, as the task is sft, which would leave the labels out.\nDo: to learn the"
            " labels, choose --task classify (kto, if they judge completions), or write each as"
            " text into `completion`, with its text in `prompt`; to leave them out, name the"
            f" columns to read: {advised_flags}."
        )


def check_texts_or_chats(
    row: Mapping[str, Any], row_location: str, column_by_field: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Check that each value of a row is a text or a chat (a list of messages), and return the row
    with its messages in the form {"role", "content"}.

    Args:
        row: by field ("messages", "prompt", "completion", "text"), its value.
        row_location: where the row is, such as "data.jsonl, line 12", for errors.
        column_by_field: the column of each field, for errors; by default the field's name.

    Raises:
        DataError: a value is neither a text nor a chat, or only one of prompt and completion is a
            text.
    """
    reported_columns = column_by_field or {}
    checked_values = {
        field: _check_text_or_chat(value, field, reported_columns.get(field, field), row_location)
        for field, value in row.items()
    }
    if len({isinstance(value, str) for value in checked_values.values()}) > 1:
        type_list = ", ".join(
            f"{field} is {json_type(value)}" for field, value in checked_values.items()
        )
        raise DataError(
            f"{row_location}: {type_list}",
            "all of them text, or all lists of messages",
            "bring them into one form",
        )
    return checked_values


def _check_text_or_chat(value: Any, field: str, column: str, row_location: str) -> Any:
    """The value of a field of a row: a text unchanged, or a list of messages parsed. ``column`` is
    the field's column, for errors. Raises `DataError` for any other value, an empty list, a text in
    the field "messages" and a list in the field "text"."""
    if field != "messages" and isinstance(value, str):
        return value
    if field != "text" and isinstance(value, list):
        if not value:
            raise DataError(
                f"{row_location} holds an empty list of messages.\nDo: fix or remove that row."
            )
        return [_parse_message(message, row_location) for message in value]
    expected = {"messages": "a list of messages", "text": "text"}.get(
        field, "text or a list of messages"
    )
    raise DataError(
        f"{row_location}: the column {column!r} holds a {json_type(value)}:"
        f" {snippet(to_json(value))}\n"
        f"Expected {expected}.\nDo: fix or remove that row."
    )


def _parse_message(message: Any, row_location: str) -> dict[str, Any]:
    """Parse a chat message into the form {"role", "content"}, to which an assistant's message may
    add "tool_calls". Converts the ShareGPT form {"from", "value"}, and joins a content of several
    texts into one text. Arguments of tool calls that are JSON text (OpenAI's form) become dicts,
    because chat templates expect dicts. Raises `DataError` for any other message."""
    match message:
        case {"from": str(role), "value": content}:
            message = {
                "role": {"human": "user", "gpt": "assistant"}.get(role, role),
                "content": content,
            }
    match message:
        case {"role": str()}:
            # Parquet fills absent keys with None, so remove such values
            message = {key: value for key, value in message.items() if value is not None}
    match message:
        case {"role": str(), "content": [*text_segments]} if text_segments and all(
            map(_is_text, text_segments)
        ):
            content = "".join(text_segment["text"] for text_segment in text_segments)
            message = {**message, "content": content}
    match message:
        case {"role": "assistant", "tool_calls": [_, *_] as tool_calls} if isinstance(
            message.get("content", ""), str
        ):
            return {
                **message,
                "content": message.get("content", ""),
                "tool_calls": [_parse_tool_call(call, row_location) for call in tool_calls],
            }
        case {"role": str(), "content": str()}:
            return message
    raise DataError(
        f"{row_location} holds a message that is not one: {snippet(to_json(message))}\nExpected"
        ' {"role": "user" | "assistant" | "system" | "tool", "content": "text"}, where the'
        ' content may be a list of {"type": "text", "text": "..."}, and an assistant\'s may'
        ' stand beside "tool_calls".\nDo: fix or remove that row.'
    )


def _is_text(text_segment: Any) -> bool:
    """Whether an element of a message's list of contents is a text, not for example an image."""
    return (
        isinstance(text_segment, dict)
        and text_segment.get("type") == "text"
        and isinstance(text_segment.get("text"), str)
    )


def _parse_tool_call(call: Any, row_location: str) -> dict[str, Any]:
    """Parse a tool call of a message into {"type": "function", "function": {"name", "arguments"}},
    with the arguments as a dict. Raises `DataError` for an invalid call."""
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
            f"{row_location} holds a tool call that is not one: {snippet(to_json(call))}\nExpected"
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


def add_tools(row: dict[str, Any], tools: Any, row_location: str) -> None:
    """Add the tools that the assistant may call to a checked row, if it has chats. ``tools``: as
    for `parse_tools`, or None for none. Raises the errors of `parse_tools`."""
    if tools is not None and any(isinstance(value, list) for value in row.values()):
        row[TOOLS] = parse_tools(tools, row_location)


def parse_tools(value: Any, row_location: str) -> list[Any]:
    """The tools of a row, as a list of JSON schemas. ``value`` is this list, or the list as JSON
    text, since a CSV file cannot hold lists. Raises `DataError` for any other value."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    raise DataError(
        f"{row_location} holds {TOOLS} that are none: {snippet(to_json(value))}",
        "a list of JSON schemas of functions",
        "fix it, or remove that row",
    )


def list_names(names: Iterable[str]) -> str:
    return listing(map(repr, names), 12)


def json_type(value: Any) -> str:
    name_by_type = {
        "str": "text",
        "NoneType": "null",
        "dict": "object",
        "float": "number",
        "int": "number",
    }
    return name_by_type.get(type(value).__name__, type(value).__name__)


def to_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"a {json_type(value)} that is nested too deep to be shown"


def snippet(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:59] + "…"
