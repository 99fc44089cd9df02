"""Tokenise records: token ids, and labels at the tokens that the loss counts.

    row  ->  input_ids [s], labels [s]      labels = input_ids where the loss counts, else -100

The loss counts the tokens that the model must learn to write: the completion, the assistant's
turns, or all of a row that is only a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from jinja2 import TemplateError

from veneer.errors import DataError, first_line
from veneer.train.data import TOOLS, Records
from veneer.train.prepare import Rows

IGNORED = -100  # the label that torch's cross-entropy skips

#: the errors of rendering a chat template: jinja2's, which includes the template's own
#: `raise_exception`, and those of values that the template cannot use
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)


def tokenise(
    rows: Records,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: Literal["error", "truncate", "drop"] = "error",
    completion_only: bool = True,
) -> Rows:
    """The rows {"input_ids", "labels"} of every record, at most `max_length` tokens each.
    `Rows.head_token_counts` leaves out the first token of a row, which has no context to be
    predicted from.

    Args:
        too_long: what to do with a longer row. "truncate" keeps the beginning of a row if the
            beginning has a label, and else drops the row.
        completion_only: label only completions and assistant turns, not prompts.

    Raises:
        DataError: a row is too long and `too_long` is "error", a row has no label, no row is left,
            or some rows are texts and others chats; or for chats, the tokenizer has no chat
            template, or the template refuses a chat or would omit its tools.
    """
    encode, labels_all = _make_encoder(rows, tokenizer), rows.kind != "text" and not completion_only
    examples: list[dict[str, Any]] = []
    record_indices: list[int] = []
    long_rows: list[tuple[int, int]] = []
    truncated = 0
    for i, row in enumerate(rows.rows):
        tokens, is_labelled = encode(row, f"{rows.source}, {rows.locations[i]}")
        targets = [
            token if flag or labels_all else IGNORED
            for token, flag in zip(tokens, is_labelled, strict=True)
        ]
        has_label = any(target != IGNORED for target in targets[1:max_length])
        if len(tokens) > max_length:
            long_rows.append((len(tokens), i))
            if too_long != "truncate" or not has_label:
                continue
            truncated += 1
        elif not has_label:
            field = {"messages": "assistant's part", "prompt": "completion", "text": "text"}[
                rows.kind
            ]
            raise DataError(
                f"{rows.source}, {rows.locations[i]} has nothing to learn from: its {field} is"
                " empty.\nExpected at least one token that the loss counts.\nDo: fix or remove"
                " that row."
            )
        examples.append({"input_ids": tokens[:max_length], "labels": targets[:max_length]})
        record_indices.append(i)
    if not examples or (long_rows and too_long == "error"):
        raise _length_error(rows, long_rows, max_length, too_long)
    return Rows(
        examples,
        [len(example["input_ids"]) for example in examples],
        record_indices,
        [sum(label != IGNORED for label in example["labels"][1:]) for example in examples],
        dropped=len(rows) - len(examples),
        truncated=truncated,
    )


def _length_error(
    rows: Records, long_rows: list[tuple[int, int]], max_length: int, too_long: str
) -> DataError:
    """The error for rows that are too long. ``long_rows``: (number of tokens, index) of each."""
    length, row_index = max(long_rows, default=(0, 0))
    if long_rows and too_long == "error":
        return DataError(
            f"{len(long_rows)} of {len(rows)} examples of {rows.source}"
            f" {'is' if len(long_rows) == 1 else 'are'} longer than the context of {max_length:,}"
            f" tokens; the longest, {rows.locations[row_index]}, has {length:,}.\nExpected at most"
            f" {max_length:,} tokens.\nDo: raise it with --max-length {length} (if the model allows"
            " it), or choose --too-long truncate (cuts the end) or --too-long drop (leaves them"
            " out)."
        )
    return DataError(
        f"Nothing is left of {rows.source}: all {len(rows)} examples are longer than"
        f" {max_length} tokens.\nDo: raise max_length (the longest has {length:,} tokens)."
    )


#: (row, its location for errors) -> (token ids, by token whether it is labelled)
Encoder = Callable[[dict[str, Any], str], tuple[list[int], list[bool]]]


def _make_encoder(rows: Records, tokenizer: Any) -> Encoder:
    """The encoder for the shape of the rows. Raises `DataError` for chats that the tokenizer cannot
    encode, and for rows that are partly texts and partly chats."""
    _must_share_form(rows)
    if rows.kind == "text":
        return lambda row, location: _encode_text(row["text"], tokenizer)
    if rows.kind == "prompt" and isinstance(rows.rows[0]["prompt"], str):
        return lambda row, location: _encode_pair(row["prompt"], row["completion"], tokenizer)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{rows.source} holds chat messages, and the base model's tokenizer has no chat"
            " template.\nExpected a chat model.\nDo: choose its instruct version, or give `prompt`"
            " and `completion` as text."
        )
    _must_show_tools(rows, tokenizer)
    if rows.kind == "prompt":
        return lambda row, location: _encode_turns(
            row["prompt"], row["completion"], tokenizer, location, row.get(TOOLS)
        )
    template = _training_template(tokenizer)
    if template is not None:
        return lambda row, location: _encode_by_template(
            row["messages"], tokenizer, template, location, row.get(TOOLS)
        )
    return lambda row, location: _encode_turns(
        [], row["messages"], tokenizer, location, row.get(TOOLS)
    )


def _must_share_form(rows: Records) -> None:
    """Raise `DataError` for a row that is a text if the first row is a chat, or the reverse."""
    forms = [
        "text" if isinstance(row.get("prompt", row.get("text")), str) else "lists of messages"
        for row in rows.rows
    ]
    for form, location in zip(forms, rows.locations, strict=True):
        if form != forms[0]:
            raise DataError(
                f"{rows.source}, {location} holds {form}, but {rows.locations[0]} holds {forms[0]}",
                "one form in all rows",
                "bring them into one form",
            )


def _must_show_tools(rows: Records, tokenizer: Any) -> None:
    """Raise `DataError` for tools and tool calls that the chat template would silently omit."""
    template = str(tokenizer.chat_template)
    for row, location in zip(rows.rows, rows.locations, strict=True):
        messages = [
            message
            for value in (row.get(field) for field in ("messages", "prompt", "completion"))
            for message in value or []
        ]
        occurs = {
            TOOLS: bool(row.get(TOOLS)),
            "tool_calls": any("tool_calls" in message for message in messages),
        }
        if omitted := [
            word for word, is_in_row in occurs.items() if is_in_row and word not in template
        ]:
            raise DataError(
                f"{rows.source}, {location} holds {omitted[0]}, and the base's chat template has no"
                " place for them",
                f"a chat template that shows {omitted[0]}",
                "choose a base whose template has, or write the calls as the content of the"
                " messages",
            )


def _append_end(
    tokens: list[int], is_labelled: list[bool], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Append the tokenizer's end-of-text token, unless it is there, to teach the model to stop."""
    end_token = tokenizer.eos_token_id
    return (
        (tokens, is_labelled)
        if end_token is None or tokens[-1:] == [end_token]
        else ([*tokens, end_token], [*is_labelled, True])
    )


def _encode_text(text: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode a row that is only a text; all its tokens are labelled."""
    tokens = list(tokenizer(text)["input_ids"])
    return (
        _append_end(tokens, [True] * len(tokens), tokenizer)
        if text
        else (tokens, [False] * len(tokens))
    )


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode a prompt and a completion that are texts. If a token would span both, the completion
    is encoded separately, so that the prompt has the same tokens as in generation."""
    prompt_tokens = list(tokenizer(prompt)["input_ids"])
    tokens = list(tokenizer(prompt + completion)["input_ids"])
    if tokens[: len(prompt_tokens)] != prompt_tokens:
        tokens = prompt_tokens + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    is_labelled = [False] * len(prompt_tokens) + [True] * (len(tokens) - len(prompt_tokens))
    return _append_end(tokens, is_labelled, tokenizer) if completion else (tokens, is_labelled)


def _training_template(tokenizer: Any) -> str | None:
    """A chat template that marks the assistant's turns: the tokenizer's template, or trl's version
    of it, or None."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    if isinstance(template, str) and has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # trl has no training version of this template; `_encode_turns` needs none
        return None


def _encode_by_template(
    messages: list[Any], tokenizer: Any, template: str, location: str, tools: Any
) -> tuple[list[int], list[bool]]:
    """Encode a chat with a template that marks the assistant's turns."""
    encoded = render_chat(
        messages,
        tokenizer,
        location,
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _encode_turns(
    prompt: list[Any], completion: list[Any], tokenizer: Any, location: str, tools: Any
) -> tuple[list[int], list[bool]]:
    """Encode a chat, and label the assistant's turns in `completion`. The tokens of a turn are
    found by encoding the chat up to the turn and through the turn. Other prefixes of the chat are
    not rendered, since a template may refuse them, for example a system prompt alone. Raises
    `DataError` for a template that changes earlier turns."""
    messages = [*prompt, *completion]
    full_tokens = chat_tokens(messages, tokenizer, location, tools=tools)
    is_labelled = [False] * len(full_tokens)
    for turn in range(len(prompt), len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        # the header ("<|im_start|>assistant") is not learnt, because generation provides it
        before = chat_tokens(messages[:turn], tokenizer, location, header=True, tools=tools)
        through = full_tokens
        if turn + 1 < len(messages):
            through = chat_tokens(messages[: turn + 1], tokenizer, location, tools=tools)
        start, end = (_prefix_length(ids, full_tokens, location) for ids in (before, through))
        is_labelled[start:end] = [True] * (end - start)
    return full_tokens, is_labelled


def chat_tokens(
    messages: list[Any], tokenizer: Any, location: str, *, header: bool = False, tools: Any = None
) -> list[int]:
    """The token ids of a chat by the tokenizer's template; with `header`, including the header of
    the assistant's next turn."""
    if not messages:
        return []
    encoded = render_chat(messages, tokenizer, location, tools=tools, add_generation_prompt=header)
    return list(encoded["input_ids"])


def render_chat(messages: list[Any], tokenizer: Any, location: str, **options: Any) -> Any:
    """The encoding of a chat by the tokenizer's template. Raises `DataError` with the location of
    the chat if the template refuses it.

    Args:
        options: arguments of `apply_chat_template`.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"{location}: a chat that the base's chat template refuses ({first_line(error)})",
            "roles, and an order of them, that it takes",
            "change the messages of this chat, or remove it",
        ) from error


def _prefix_length(prefix: list[int], full_tokens: list[int], location: str) -> int:
    """The length of `prefix`. Raises `DataError` if it is not a prefix of `full_tokens`."""
    if full_tokens[: len(prefix)] == prefix:
        return len(prefix)
    raise DataError(
        f"{location}: the chat template rewrites earlier turns when a turn follows, so its"
        " assistant turns cannot be told apart.\nExpected a template that only appends, or one"
        " with {% generation %} marks.\nDo: give each row as `prompt` and `completion` (one"
        " answer a row), or set completion_only to false."
    )


def label_runs(ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Split a row where labels begin or end: (whether the tokens have labels, token ids) of each
    segment, in order."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            yield labels[start] != IGNORED, ids[start:end]
            start = end
