"""Tokenise records of texts or chats: token ids, and labels at the tokens that the loss counts.

    record  ->  row: input_ids [s], labels [s] for s tokens

A label equals the token id at the tokens that the model must learn to write: those of the
completion, of the assistant's messages, or all tokens of a record that is only a text. Elsewhere it
is -100, which the loss skips.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from jinja2 import TemplateError

from veneer.errors import DataError, first_line
from veneer.train.data import TOOLS, Records
from veneer.train.prepare import Rows

IGNORED = -100  # the label that torch's cross-entropy skips

#: the errors that a chat template can raise: jinja2's (also for `raise_exception` in a template),
#: and errors of Python for values that the template cannot use
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)


def tokenise(
    records: Records,
    tokenizer: Any,
    *,
    max_length: int,
    too_long: Literal["error", "truncate", "drop"] = "error",
    completion_only: bool = True,
    end_ids: Collection[int] | None = (),
) -> Rows:
    """Tokenise records into rows {"input_ids", "labels"} of at most `max_length` tokens.
    `Rows.head_token_counts` does not count the label of a row's first token, which nothing
    predicts.

    Args:
        tokenizer: a tokenizer of transformers.
        too_long: what to do with a longer record. "truncate" keeps its first `max_length` tokens if
            they have a label, and else drops the record.
        completion_only: label only completions and the assistant's messages, not prompts.
        end_ids: the token ids that end an answer of the base, besides the tokenizer's
            (`base_end_tokens`), so that each chat ends with one; None if the model writes no
            answers.

    Raises:
        DataError: a record is too long and `too_long` is "error", a record has no label, no record
            is left, or some records are texts and others chats; or for chats, the tokenizer has no
            chat template, or the template raises an error or would omit the tools of a chat.
    """
    encode, labels_all = (
        _make_encoder(records, tokenizer, end_ids),
        records.kind != "text" and not completion_only,
    )
    rows: list[dict[str, Any]] = []
    record_indices: list[int] = []
    long_records: list[tuple[int, int]] = []
    truncated_count = 0
    for i, record in enumerate(records.rows):
        token_ids, is_labelled = encode(record, f"{records.source}, {records.locations[i]}")
        labels = [
            token if is_token_labelled or labels_all else IGNORED
            for token, is_token_labelled in zip(token_ids, is_labelled, strict=True)
        ]
        has_label = any(label != IGNORED for label in labels[1:max_length])
        if len(token_ids) > max_length:
            long_records.append((len(token_ids), i))
            if too_long != "truncate" or not has_label:
                continue
            truncated_count += 1
        elif not has_label:
            part_name = {"messages": "assistant's part", "prompt": "completion", "text": "text"}[
                records.kind
            ]
            raise DataError(
                f"{records.source}, {records.locations[i]} has nothing to learn from: its"
                f" {part_name} is empty.\nExpected at least one token that the loss counts.\nDo:"
                " fix or remove that row."
            )
        rows.append({"input_ids": token_ids[:max_length], "labels": labels[:max_length]})
        record_indices.append(i)
    if not rows or (long_records and too_long == "error"):
        raise _length_error(records, long_records, max_length, too_long)
    return Rows(
        rows,
        [len(row["input_ids"]) for row in rows],
        record_indices,
        [sum(label != IGNORED for label in row["labels"][1:]) for row in rows],
        dropped=len(records) - len(rows),
        truncated=truncated_count,
    )


def _length_error(
    records: Records, long_records: list[tuple[int, int]], max_length: int, too_long: str
) -> DataError:
    """The error for records that are too long: that there are some, or that no others are left.
    ``long_records``: (number of tokens, index in `records`) of each record that is too long."""
    longest_length, longest_index = max(long_records, default=(0, 0))
    if long_records and too_long == "error":
        return DataError(
            f"{len(long_records)} of {len(records)} examples of {records.source}"
            f" {'is' if len(long_records) == 1 else 'are'} longer than the context of"
            f" {max_length:,} tokens; the longest, {records.locations[longest_index]}, has"
            f" {longest_length:,}.\nExpected at most {max_length:,} tokens.\nDo: raise it with"
            f" --max-length {longest_length} (if the model allows it), or choose --too-long"
            " truncate (cuts the end) or --too-long drop (leaves them out)."
        )
    return DataError(
        f"Nothing is left of {records.source}: all {len(records)} examples are longer than"
        f" {max_length} tokens.\nDo: raise max_length (the longest has {longest_length:,} tokens)."
    )


#: (record, its location for errors) -> (token ids; for each token, whether it gets a label)
Encoder = Callable[[dict[str, Any], str], tuple[list[int], list[bool]]]


def _make_encoder(records: Records, tokenizer: Any, end_ids: Collection[int] | None) -> Encoder:
    """The function that tokenises one record, chosen by the kind of the records. Raises `DataError`
    if the tokenizer has no chat template for chats, if the template would omit their tools, or if
    some records are texts and others chats."""
    _must_share_form(records)
    if records.kind == "text":
        return lambda row, row_location: _encode_text(row["text"], tokenizer)
    if records.kind == "prompt" and isinstance(records.rows[0]["prompt"], str):
        return lambda row, row_location: _encode_pair(row["prompt"], row["completion"], tokenizer)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{records.source} holds chat messages, and the base model's tokenizer has no chat"
            " template.\nExpected a chat model.\nDo: choose its instruct version, or give `prompt`"
            " and `completion` as text."
        )
    must_show_tools(records, tokenizer)
    training_template = None if records.kind == "prompt" else _training_template(tokenizer)

    def encode_chat(row: dict[str, Any], row_location: str) -> tuple[list[int], list[bool]]:
        prompt, messages = row.get("prompt", []), row.get("messages") or row.get("completion", [])
        encoded = (
            _encode_turns(prompt, messages, tokenizer, row_location, row.get(TOOLS))
            if training_template is None
            else _encode_by_template(
                messages, tokenizer, training_template, row_location, row.get(TOOLS)
            )
        )
        if end_ids is None or not messages or messages[-1]["role"] != "assistant":
            return encoded
        return _label_end(*encoded, tokenizer, end_ids)

    return encode_chat


def _must_share_form(records: Records) -> None:
    """Raise `DataError` unless all records are texts or all are chats, as the first one is."""
    forms = [
        "text" if isinstance(row.get("prompt", row.get("text")), str) else "lists of messages"
        for row in records.rows
    ]
    for form, row_location in zip(forms, records.locations, strict=True):
        if form != forms[0]:
            raise DataError(
                f"{records.source}, {row_location} holds {form}, but {records.locations[0]} holds"
                f" {forms[0]}",
                "one form in all rows",
                "bring them into one form",
            )


def must_show_tools(records: Records, tokenizer: Any) -> None:
    """Raise `DataError` for a record with tools or tool calls if the chat template does not contain
    the word "tools" or "tool_calls", since it would then silently omit them."""
    template = str(tokenizer.chat_template)
    for row, row_location in zip(records.rows, records.locations, strict=True):
        messages = [
            message
            for value in (row.get(field) for field in ("messages", "prompt", "completion"))
            for message in value or []
        ]
        occurs_in_row = {
            TOOLS: bool(row.get(TOOLS)),
            "tool_calls": any("tool_calls" in message for message in messages),
        }
        if omitted_words := [
            template_word
            for template_word, is_in_row in occurs_in_row.items()
            if is_in_row and template_word not in template
        ]:
            raise DataError(
                f"{records.source}, {row_location} holds {omitted_words[0]}, and the base's chat"
                " template has no place for them",
                f"a chat template that shows {omitted_words[0]}",
                "choose a base whose template has, or write the calls as the content of the"
                " messages",
            )


def _append_end(
    token_ids: list[int], is_labelled: list[bool], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Append the tokenizer's end-of-text token with a label, so that the model learns to stop.
    Without such a token, or if the row ends with it, return the arguments unchanged."""
    end_token = tokenizer.eos_token_id
    return (
        (token_ids, is_labelled)
        if end_token is None or token_ids[-1:] == [end_token]
        else ([*token_ids, end_token], [*is_labelled, True])
    )


def _label_end(
    token_ids: list[int], is_labelled: list[bool], tokenizer: Any, end_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Label the token that ends the last message of the assistant, so that the model learns to
    stop. If the template writes no token there that ends an answer, append the tokenizer's
    end-of-text token. (The template may end the message with a token that the base does not stop
    at, or with the header of the next message.) An empty chat is returned unchanged."""
    if True not in is_labelled:
        return token_ids, is_labelled
    end_ids = {*end_ids, tokenizer.eos_token_id}
    label_end = len(is_labelled) - is_labelled[::-1].index(True)
    label_start = max((i + 1 for i in range(label_end) if not is_labelled[i]), default=0)
    if not end_ids.isdisjoint(token_ids[label_start:label_end]):
        return token_ids, is_labelled
    for index in range(label_end, len(token_ids)):
        if token_ids[index] in end_ids:
            labelled = [*is_labelled[:label_end], *[True] * (index + 1 - label_end)]
            return token_ids, labelled + is_labelled[index + 1 :]
    return _append_end(token_ids, is_labelled, tokenizer)


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """The token ids of a text. If the text itself begins with the token that begins texts, as one
    that a chat template has rendered, the tokenizer adds no second one."""
    token_ids, begin_token = list(tokenizer(text)["input_ids"]), tokenizer.bos_token_id
    has_two = begin_token is not None and token_ids[:2] == [begin_token, begin_token]
    adds_one = has_two and list(tokenizer("")["input_ids"][:1]) == [begin_token]
    return token_ids[1:] if adds_one else token_ids


def _encode_text(text: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode a record that is only a text; all its tokens are labelled. An empty text gets no label
    and no end-of-text token, so that `tokenise` reports it."""
    token_ids = text_tokens(text, tokenizer)
    return (
        _append_end(token_ids, [True] * len(token_ids), tokenizer)
        if text
        else (token_ids, [False] * len(token_ids))
    )


def _encode_pair(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Encode a prompt and a completion that are texts, and label the completion. If the tokenizer
    would join the end of the prompt and the beginning of the completion in one token, they are
    encoded separately, so that the prompt has the same tokens as in generation. An empty completion
    gets no end-of-text token, so that `tokenise` reports it."""
    prompt_ids = text_tokens(prompt, tokenizer)
    token_ids = text_tokens(prompt + completion, tokenizer)
    if token_ids[: len(prompt_ids)] != prompt_ids:
        token_ids = prompt_ids + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    is_labelled = [False] * len(prompt_ids) + [True] * (len(token_ids) - len(prompt_ids))
    return (
        _append_end(token_ids, is_labelled, tokenizer) if completion else (token_ids, is_labelled)
    )


def _training_template(tokenizer: Any) -> str | None:
    """A chat template that marks the tokens of the assistant's messages ({% generation %}): the
    tokenizer's own if it does, else trl's version of it; None if trl has none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    if isinstance(template, str) and has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # trl has no training version of this template; `_encode_turns` needs none
        return None


def _encode_by_template(
    messages: list[Any], tokenizer: Any, training_template: str, row_location: str, tools: Any
) -> tuple[list[int], list[bool]]:
    """Encode a chat with a template that marks the tokens of the assistant's messages, and label
    them. ``tools``: JSON schemas of the functions that the chat may call, or None."""
    encoded = render_chat(
        messages,
        tokenizer,
        row_location,
        tools=tools,
        chat_template=training_template,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [
        bool(is_token_labelled) for is_token_labelled in encoded["assistant_masks"]
    ]


def _encode_turns(
    prompt_messages: list[Any],
    completion_messages: list[Any],
    tokenizer: Any,
    row_location: str,
    tools: Any,
) -> tuple[list[int], list[bool]]:
    """Encode a chat with the tokenizer's template, which need not mark anything, and label the
    assistant's messages in `completion_messages`.

    The tokens of such a message are those by which the encoded chat that ends with it is longer
    than the encoded chat that ends before it. Chats that end elsewhere are not encoded, since a
    template may raise an error for them, for example for a system prompt alone.

    Args:
        tools: JSON schemas of the functions that the chat may call, or None.

    Raises:
        DataError: the template renders earlier messages differently once a message follows, or
            raises an error.
    """
    messages = [*prompt_messages, *completion_messages]
    full_ids = chat_tokens(messages, tokenizer, row_location, tools=tools)
    is_labelled = [False] * len(full_ids)
    for turn_index in range(len(prompt_messages), len(messages)):
        if messages[turn_index]["role"] != "assistant":
            continue
        # the header before the message ("<|im_start|>assistant") gets no label, because generation
        # appends it to the prompt
        ids_before_turn = chat_tokens(
            messages[:turn_index], tokenizer, row_location, header=True, tools=tools
        )
        ids_through_turn = full_ids
        if turn_index + 1 < len(messages):
            ids_through_turn = chat_tokens(
                messages[: turn_index + 1], tokenizer, row_location, tools=tools
            )
        start_index, end_index = (
            _prefix_length(prefix_ids, full_ids, row_location)
            for prefix_ids in (ids_before_turn, ids_through_turn)
        )
        is_labelled[start_index:end_index] = [True] * (end_index - start_index)
    return full_ids, is_labelled


def chat_tokens(
    messages: list[Any],
    tokenizer: Any,
    chat_location: str,
    *,
    header: bool = False,
    tools: Any = None,
) -> list[int]:
    """The token ids of a chat by the tokenizer's chat template; [] for no messages. Raises
    `DataError` if the template raises an error.

    Args:
        chat_location: where the chat is, such as "data.jsonl, line 12", for the error.
        header: whether to append the header of the assistant's next message, as for generation.
        tools: JSON schemas of the functions that the chat may call, or None.
    """
    if not messages:
        return []
    encoded = render_chat(
        messages, tokenizer, chat_location, tools=tools, add_generation_prompt=header
    )
    return list(encoded["input_ids"])


def render_chat(messages: list[Any], tokenizer: Any, chat_location: str, **options: Any) -> Any:
    """Encode a chat by the tokenizer's chat template; returns a mapping with "input_ids". Raises
    `DataError` with the location of the chat if the template raises an error.

    Args:
        options: further keyword arguments of transformers' `apply_chat_template`.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TEMPLATE_ERRORS as error:
        raise DataError(
            f"{chat_location}: a chat that the base's chat template refuses ({first_line(error)})",
            "roles, and an order of them, that it takes",
            "change the messages of this chat, or remove it",
        ) from error


def _prefix_length(prefix_ids: list[int], full_ids: list[int], row_location: str) -> int:
    """The number of tokens of `prefix_ids`, the beginning of a chat. Raises `DataError` if
    `full_ids`, the complete chat, does not begin with them."""
    if full_ids[: len(prefix_ids)] == prefix_ids:
        return len(prefix_ids)
    raise DataError(
        f"{row_location}: the chat template rewrites earlier turns when a turn follows, so its"
        " assistant turns cannot be told apart.\nExpected a template that only appends, or one"
        " with {% generation %} marks.\nDo: give each row as `prompt` and `completion` (one"
        " answer a row), or set completion_only to false."
    )


def label_runs(token_ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Split a row into segments whose tokens all have a label or all have none (label -100). Yields
    (whether the segment's tokens have labels, its token ids), in order."""
    segment_start = 0
    for segment_end in range(1, len(token_ids) + 1):
        if segment_end == len(token_ids) or (labels[segment_end] == IGNORED) != (
            labels[segment_start] == IGNORED
        ):
            yield labels[segment_start] != IGNORED, token_ids[segment_start:segment_end]
            segment_start = segment_end
