"""Usual column names of public data sets, for the advice in error messages. They are never used to
choose the columns that are read.

advise_columns(["instruction", "input"], first_row, …)      what to do, with the flags to use
find_likely_column("label", ["sentence", "intent"])         the likely column of a field, or None
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import listing

#: by field of a row, the usual names of its column, the most usual first
USUAL_NAMES = {
    "messages": (
        "messages",
        "conversations",
        "conversation",
        "chat",
        "dialog",
        "dialogue",
        "turns",
    ),
    "prompt": (
        "prompt",
        "instruction",
        "question",
        "query",
        "problem",
        "input",
        "user",
        "human",
        "source",
    ),
    "completion": (
        "completion",
        "output",
        "response",
        "answer",
        "solution",
        "target",
        "assistant",
        "reply",
    ),
    "text": ("text", "sentence", "content", "document", "body"),
    "chosen": ("chosen", "preferred", "accepted", "winner", "better"),
    "rejected": ("rejected", "dispreferred", "loser", "worse"),
    "label": ("label", "labels", "class", "category", "intent", "sentiment", "target"),
    "labels": ("labels", "tags", "ner_tags", "pos_tags"),
    "words": ("words", "tokens"),
    "image": ("image", "img", "picture", "file_name", "path"),
    "audio": ("audio", "sound", "file_name", "path"),
    "anchor": ("anchor", "query", "question", "sentence1", "premise"),
    "positive": ("positive", "pos", "answer", "passage", "document", "sentence2", "hypothesis"),
}
#: data sets with an optional context column that belongs to the prompt: (name of the data set,
#: prompt column, context column, completion column)
PROMPT_DATA_SETS = (
    ("alpaca", "instruction", "input", "output"),
    ("dolly", "instruction", "context", "response"),
)


def find_likely_column(field: str, columns: Sequence[str]) -> str | None:
    """The column among ``columns`` that has the most usual name for a field, in upper or lower
    case; else a column whose name is similar to the field's; else None."""
    by_lower_name = {column.lower(): column for column in reversed(columns)}
    for usual_name in USUAL_NAMES.get(field, (field,)):
        if usual_name in by_lower_name:
            return by_lower_name[usual_name]
    close_names = difflib.get_close_matches(field, by_lower_name, 1, 0.75)
    return by_lower_name[close_names[0]] if close_names else None


def advise_columns(
    columns: Sequence[str],
    first_row: Mapping[str, Any],
    named_prompt: str | None,
    named_completion: str | None,
) -> str:
    """Advice to the user, as a sentence with the flags to use, if the columns of a data set fit no
    form of rows of the task sft: a chat, a prompt with a completion, or a text.

    Args:
        columns: the names of the columns of the data.
        first_row: the first row of the data, by the names of the columns.
        named_prompt, named_completion: the columns that the user has named by flags; None for a
            flag that was not given.
    """
    if named_prompt is None and named_completion is None:
        chat_columns = [column for column in columns if _is_chat(first_row.get(column))]
        chat_columns += [column] if (column := find_likely_column("messages", columns)) else []
        if chat_columns:
            return f"name the column of the chats: --messages-column {chat_columns[0]}."
        if data_set_advice := _advise_known_data_set(columns):
            return data_set_advice
    prompt_column = named_prompt or find_likely_column(
        "prompt", [column for column in columns if column != named_completion]
    )
    completion_column = named_completion or find_likely_column(
        "completion", [column for column in columns if column not in (prompt_column, named_prompt)]
    )
    if prompt_column is not None and completion_column is not None:
        guess_note = (
            ""
            if named_prompt and named_completion
            else " (by their names: check that they mean it)"
        )
        return (
            f"rename the columns, or name them: --prompt-column {prompt_column} --completion-column"
            f" {completion_column}{guess_note}."
        )
    if len(columns) == 1:
        return f"if it is plain text, name it: --text-column {columns[0]}."
    unclear_columns = [
        column for column in columns if column not in (prompt_column, completion_column)
    ]
    if prompt_column:
        unclear_fields = "completion"
        flags = f"--prompt-column {prompt_column} --completion-column COLUMN"
    elif completion_column:
        unclear_fields = "prompt"
        flags = f"--completion-column {completion_column} --prompt-column COLUMN"
    else:
        unclear_fields = "prompt and which the completion"
        flags = "--prompt-column COLUMN --completion-column COLUMN"
    return (
        f"it is not clear which of {listing(map(repr, unclear_columns), 8)} is the"
        f" {unclear_fields}: name them: {flags} (or --text-column, --messages-column)."
    )


def _advise_known_data_set(columns: Sequence[str]) -> str | None:
    """The advice for the columns of a known data set (``PROMPT_DATA_SETS``); None if they are those
    of none."""
    for data_set, prompt_column, context_column, completion_column in PROMPT_DATA_SETS:
        if not {prompt_column, completion_column} <= {*columns}:
            continue
        flags = f"--prompt-column {prompt_column} --completion-column {completion_column}"
        if context_column not in columns:
            return f"name these columns of {data_set}: {flags}."
        return (
            f"these are the columns of {data_set}, whose `{context_column}` belongs to the"
            " prompt where it holds something: write both into one column `prompt`, and"
            f" `{completion_column}` into `completion`; {flags} would leave `{context_column}`"
            " out."
        )
    return None


def _is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages: a nonempty list of objects with "role" and
    "content", or with "from" and "value" (the names of ShareGPT)."""
    is_list_of_objects = (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    )
    return is_list_of_objects and all(
        {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in value
    )
