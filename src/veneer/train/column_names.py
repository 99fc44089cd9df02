"""Usual column names of public data sets, for the advice in errors. Data is never read by a guess.

advice(["instruction", "input"], first_row)     what to do, with the flags that name the columns
likely("label", ["sentence", "intent"])         the likely column of a field, or None
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import listing

#: usual column names of a field, the most usual first
NAMES = {
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
#: data sets with an optional context column that belongs to the prompt: (name, prompt, context,
#: completion)
FORMS = (
    ("alpaca", "instruction", "input", "output"),
    ("dolly", "instruction", "context", "response"),
)


def likely(field: str, names: Sequence[str]) -> str | None:
    """The column whose name is usual for a field, or close to the field's name; else None."""
    lower = {name.lower(): name for name in reversed(names)}
    for usual in NAMES.get(field, (field,)):
        if usual in lower:
            return lower[usual]
    near = difflib.get_close_matches(field, lower, 1, 0.75)
    return lower[near[0]] if near else None


def advice(
    names: Sequence[str], first: Mapping[str, Any], prompt: str | None, completion: str | None
) -> str:
    """What to do about columns that fit no shape of sft. ``first``: the first row. ``prompt``,
    ``completion``: the columns that the user has already named."""
    chats = [name for name in names if _is_chat(first.get(name))]
    if prompt is None and completion is None and (chats or likely("messages", names)):
        chat = chats[0] if chats else likely("messages", names)
        return f"name the column of the chats: --messages-column {chat}."
    for form, prompt_column, context, completion_column in FORMS:
        if prompt is None and completion is None and {prompt_column, completion_column} <= {*names}:
            flags = f"--prompt-column {prompt_column} --completion-column {completion_column}"
            if context not in names:
                return f"name these columns of {form}: {flags}."
            return (
                f"these are the columns of {form}, whose `{context}` belongs to the prompt where it"
                f" holds something: write both into one column `prompt`, and `{completion_column}`"
                f" into `completion`; {flags} would leave `{context}` out."
            )
    prompt_column = prompt or likely("prompt", [name for name in names if name != completion])
    completion_column = completion or likely(
        "completion", [name for name in names if name not in (prompt_column, prompt)]
    )
    if prompt_column is not None and completion_column is not None:
        guess = "" if prompt and completion else " (by their names: check that they mean it)"
        return (
            f"rename the columns, or name them: --prompt-column {prompt_column} --completion-column"
            f" {completion_column}{guess}."
        )
    if len(names) == 1:
        return f"if it is plain text, name it: --text-column {names[0]}."
    named_flag = (
        f"--prompt-column {prompt_column} "
        if prompt_column
        else f"--completion-column {completion_column} "
        if completion_column
        else ""
    )
    unclear_fields = (
        "completion"
        if prompt_column
        else "prompt"
        if completion_column
        else "prompt and which the completion"
    )
    candidates = listing(
        (repr(name) for name in names if name not in (prompt_column, completion_column)), 8
    )
    flags = named_flag or "--prompt-column COLUMN "
    flags += (
        "--prompt-column COLUMN"
        if completion_column and not prompt_column
        else "--completion-column COLUMN"
    )
    return (
        f"it is not clear which of {candidates} is the {unclear_fields}: name them: {flags} (or"
        " --text-column, --messages-column)."
    )


def _is_chat(value: Any) -> bool:
    turns = (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    )
    return turns and all(
        {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in value
    )
