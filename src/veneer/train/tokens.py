"""Records -> token ids with a label where the loss counts.

    row  ->  input_ids [s], labels [s]            labels = input_ids where the loss counts, -100 elsewhere

The loss counts on what the model must write: the completion, the assistant's turns, or the whole of
a plain text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from veneer.errors import DataError
from veneer.train.data import TOOLS, Records

IGNORED = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True)
class Examples:
    """Tokenised rows: `input_ids[i]` and `labels[i]` are lists of equal length; `index[i]` is the
    row it came from."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    index: list[int]
    dropped: int = 0
    truncated: int = 0

    @cached_property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.input_ids]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for labels in self.labels for label in labels[1:])

    def dataset(self) -> Any:
        """A `datasets.Dataset` with the columns input_ids and labels, which `trl.SFTTrainer` takes
        as prepared."""
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.input_ids, "labels": self.labels})


def tokenise(
    rows: Records,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: Literal["error", "truncate", "drop"] = "error",
    completion_only: bool = True,
) -> Examples:
    """Token ids and labels of every row, at most `max_length` tokens each. `too_long` says what
    happens to a longer row; "truncate" keeps the start, if there is a token to learn from in it.
    Raises `DataError` when a row is too long and `too_long` is "error", when a row has nothing to
    learn from, and when chat rows meet a tokenizer without a chat template."""
    encode, learn_all = _encoder(rows, tokenizer), rows.kind != "text" and not completion_only
    kept: list[tuple[list[int], list[int], int]] = []
    long: list[tuple[int, int]] = []
    truncated = 0
    for i, row in enumerate(rows.rows):
        tokens, learn = encode(row, rows.places[i])
        targets = [
            token if flag or learn_all else IGNORED
            for token, flag in zip(tokens, learn, strict=True)
        ]
        # a first token has no context to be predicted from, so it never counts
        learns = any(target != IGNORED for target in targets[1:max_length])
        if len(tokens) > max_length:
            long.append((len(tokens), i))
            if too_long != "truncate" or not learns:
                continue
            truncated += 1
        elif not learns:
            part = {"messages": "assistant's part", "prompt": "completion", "text": "text"}[
                rows.kind
            ]
            raise DataError(
                f"{rows.source}, {rows.places[i]} has nothing to learn from: its {part} is empty.\n"
                "Expected at least one token that the loss counts.\nDo: fix or remove that row."
            )
        kept.append((tokens[:max_length], targets[:max_length], i))
    length, where = max(long, default=(0, 0))
    if long and too_long == "error":
        raise DataError(
            f"{len(long)} of {len(rows)} examples of {rows.source}"
            f" {'is' if len(long) == 1 else 'are'} longer than the context of {max_length:,}"
            f" tokens; the longest, {rows.places[where]}, has {length:,}.\nExpected at most"
            f" {max_length:,} tokens.\nDo: raise it with --max-length {length} (if the model allows"
            " it), or choose --too-long truncate (cuts the end) or --too-long drop (leaves them"
            " out)."
        )
    if not kept:
        raise DataError(
            f"Nothing is left of {rows.source}: all {len(rows)} examples are longer than"
            f" {max_length} tokens.\nDo: raise max_length (the longest has {length:,} tokens)."
        )
    ids, labels, index = map(list, zip(*kept, strict=True))
    return Examples(ids, labels, index, dropped=len(rows) - len(ids), truncated=truncated)


Encoder = Callable[[dict[str, Any], str], tuple[list[int], list[bool]]]


def _encoder(rows: Records, tokenizer: Any) -> Encoder:
    """The function from one row (and its place, for errors) to its tokens and which of them are of
    completions."""
    if rows.kind == "text":
        return lambda row, place: _encode_text(row["text"], tokenizer)
    if rows.kind == "prompt" and isinstance(rows.rows[0]["prompt"], str):
        return lambda row, place: _encode_pair(row["prompt"], row["completion"], tokenizer)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{rows.source} holds chat messages, and the base model's tokenizer has no chat"
            " template.\nExpected a chat model.\nDo: choose its instruct version, or give `prompt`"
            " and `completion` as text."
        )
    _must_show_tools(rows, tokenizer)
    if rows.kind == "prompt":
        return lambda row, place: _encode_turns(
            row["prompt"], row["completion"], tokenizer, place, row.get(TOOLS)
        )
    template = _training_template(tokenizer)
    if template is not None:
        return lambda row, place: _encode_marked(
            row["messages"], tokenizer, template, row.get(TOOLS)
        )
    return lambda row, place: _encode_turns([], row["messages"], tokenizer, place, row.get(TOOLS))


def _must_show_tools(rows: Records, tokenizer: Any) -> None:
    """Refuse tools, or calls of them, that the chat template would leave out without a word."""
    template = str(tokenizer.chat_template)
    for row, place in zip(rows.rows, rows.places, strict=True):
        messages = [
            message
            for value in (row.get(part) for part in ("messages", "prompt", "completion"))
            for message in value or []
        ]
        used = {
            TOOLS: bool(row.get(TOOLS)),
            "tool_calls": any("tool_calls" in message for message in messages),
        }
        if lost := [word for word, there in used.items() if there and word not in template]:
            problem = (
                f"{rows.source}, {place} holds {lost[0]}, and the base's chat template has no place"
                " for them"
            )
            do = (
                "choose a base whose template has, or write the calls as the content of the"
                " messages"
            )
            raise DataError(problem, f"a chat template that shows {lost[0]}", do)


def _ended(tokens: list[int], learn: list[bool], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """With the end-of-text token, which teaches the model to stop."""
    end = tokenizer.eos_token_id
    return (
        (tokens, learn) if end is None or tokens[-1:] == [end] else ([*tokens, end], [*learn, True])
    )


def _encode_text(text: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    tokens = list(tokenizer(text)["input_ids"])
    return (
        _ended(tokens, [True] * len(tokens), tokenizer) if text else (tokens, [False] * len(tokens))
    )


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Prompt and completion as text. Where tokens merge across the border, the completion is
    encoded by itself: the prompt's tokens are those that generation will see."""
    head = list(tokenizer(prompt)["input_ids"])
    tokens = list(tokenizer(prompt + completion)["input_ids"])
    if tokens[: len(head)] != head:
        tokens = head + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    learn = [False] * len(head) + [True] * (len(tokens) - len(head))
    return _ended(tokens, learn, tokenizer) if completion else (tokens, learn)


def _training_template(tokenizer: Any) -> str | None:
    """A chat template that marks the assistant's turns: the tokenizer's own, or trl's version, if
    there is one."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    if isinstance(template, str) and has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # trl knows no training version of this template; `_encode_turns` needs none
        return None


def _encode_marked(
    messages: list[Any], tokenizer: Any, template: str, tools: Any
) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _encode_turns(
    prompt: list[Any], completion: list[Any], tokenizer: Any, place: str, tools: Any
) -> tuple[list[int], list[bool]]:
    """Chat by prefixes: what a turn adds to the chat before it is that turn; the assistant's in
    `completion` are learnt. A template that rewrites earlier turns is an error."""
    messages = [*prompt, *completion]
    cuts: list[tuple[int, bool]] = [(0, False)]
    full = chat_tokens(messages, tokenizer, tools=tools)
    for number, message in enumerate(messages):
        learn = number >= len(prompt) and message["role"] == "assistant"
        if learn:  # the header ("<|im_start|>assistant") is given at generation, not learnt
            cuts.append(
                (
                    _prefix(
                        chat_tokens(messages[:number], tokenizer, header=True, tools=tools),
                        full,
                        place,
                    ),
                    False,
                )
            )
        cuts.append(
            (
                _prefix(chat_tokens(messages[: number + 1], tokenizer, tools=tools), full, place),
                learn,
            )
        )
    flags = [False] * len(full)
    for (start, _), (end, learn) in pairwise(cuts):
        flags[start:end] = [learn] * (end - start)
    return full, flags


def chat_tokens(
    messages: list[Any], tokenizer: Any, *, header: bool = False, tools: Any = None
) -> list[int]:
    """A chat through the tokenizer's template; with `header`, up to where the assistant's next turn
    begins."""
    options = {
        "tools": tools,
        "tokenize": True,
        "return_dict": True,
        "add_generation_prompt": header,
    }
    return list(tokenizer.apply_chat_template(messages, **options)["input_ids"]) if messages else []


def _prefix(start: list[int], full: list[int], place: str) -> int:
    if full[: len(start)] == start:
        return len(start)
    raise DataError(
        f"{place}: the chat template rewrites earlier turns when a turn follows, so its assistant"
        " turns cannot be told apart.\nExpected a template that only appends, or one with {%"
        " generation %} marks.\nDo: give each row as `prompt` and `completion` (one answer a"
        " row), or set completion_only to false."
    )


def stretches(ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """(whether they are learnt, token ids) of each stretch of an example."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            yield labels[start] != IGNORED, ids[start:end]
            start = end
