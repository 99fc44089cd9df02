"""Names that columns have in data sets that people share, for the advice of an error: nothing is
read by a guess.

advice(["instruction", "input", "output"], first_row)   what to do, with the flags that name the columns
likely("label", ["sentence", "intent"])                 the column that plays a part by its name, or None
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from veneer.errors import listing

#: usual names of a part, the most usual first
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
#: data sets with a column that belongs to the prompt where it holds something: (name, prompt, that
#: column, completion)
FORMS = (
    ("alpaca", "instruction", "input", "output"),
    ("dolly", "instruction", "context", "response"),
)


def likely(part: str, names: Sequence[str]) -> str | None:
    """The column that plays a part by its name, as usual or nearly so; None if there is none."""
    lower = {name.lower(): name for name in reversed(names)}
    for usual in NAMES.get(part, (part,)):
        if usual in lower:
            return lower[usual]
    near = difflib.get_close_matches(part, lower, 1, 0.75)
    return lower[near[0]] if near else None


def advice(
    names: Sequence[str], first: Mapping[str, Any], prompt: str | None, completion: str | None
) -> str:
    """What to do about columns that no shape of sft has. ``prompt``, ``completion``: those that
    were named already."""
    chats = [name for name in names if _is_chat(first.get(name))]
    if prompt is None and completion is None and (chats or likely("messages", names)):
        chat = chats[0] if chats else likely("messages", names)
        return f"name the column of the chats: --messages-column {chat}."
    for form, asked, context, answer in FORMS:
        if prompt is None and completion is None and {asked, answer} <= {*names}:
            flags = f"--prompt-column {asked} --completion-column {answer}"
            if context not in names:
                return f"name these columns of {form}: {flags}."
            return (
                f"these are the columns of {form}, whose `{context}` belongs to the prompt where it"
                f" holds something: write both into one column `prompt`, and `{answer}` into"
                f" `completion`; {flags} would leave `{context}` out."
            )
    asked = prompt or likely("prompt", [name for name in names if name != completion])
    answer = completion or likely(
        "completion", [name for name in names if name not in (asked, prompt)]
    )
    if asked is not None and answer is not None:
        guess = "" if prompt and completion else " (by their names: check that they mean it)"
        return (
            f"rename the columns, or name them: --prompt-column {asked} --completion-column"
            f" {answer}{guess}."
        )
    if len(names) == 1:
        return f"if it is plain text, name it: --text-column {names[0]}."
    known = (
        f"--prompt-column {asked} " if asked else f"--completion-column {answer} " if answer else ""
    )
    open_ = "completion" if asked else "prompt" if answer else "prompt and which the completion"
    rest = listing((repr(name) for name in names if name not in (asked, answer)), 8)
    flags = known or "--prompt-column COLUMN "
    flags += "--prompt-column COLUMN" if answer and not asked else "--completion-column COLUMN"
    return (
        f"it is not clear which of {rest} is the {open_}: name them: {flags} (or --text-column,"
        " --messages-column)."
    )


def _is_chat(value: Any) -> bool:
    turns = (
        isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)
    )
    return turns and all(
        {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys() for turn in value
    )
