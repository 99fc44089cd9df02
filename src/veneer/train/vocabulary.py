"""Tokens that a run adds or trains. New tokens are added to the tokenizer, the base's embedding and
head get rows for them, and the adapter trains the rows of the new and of other chosen tokens.

A new token is ordinary text to the tokenizer, not a special token, so that clients of a server may
write it (``serve/prompts.py`` removes special tokens from their texts). transformers initialises
new rows at random, near the mean of the other rows. The run's seed determines these values, because
a resumed run must begin with the same rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veneer.errors import ConfigError, raise_all, sentence
from veneer.train.config import TrainConfig
from veneer.train.prepare import Rows


def add_tokens(config: TrainConfig, tokenizer: Any) -> tuple[int, ...]:
    """Add ``config.add_tokens`` to the tokenizer, in place. Returns the ids of all tokens to train
    (``add_tokens`` and ``trainable_tokens``) in ascending order; () if the run trains none.

    Args:
        tokenizer: the task's processor, which is an image processor in some tasks.

    Raises:
        ConfigError: the processor is not a tokenizer, a token to add is blank, or the tokenizer
            lacks a token of ``trainable_tokens``.
    """
    if not (config.add_tokens or config.trainable_tokens):
        return ()
    if not hasattr(tokenizer, "get_vocab"):
        raise ConfigError(
            f"add_tokens or trainable_tokens for task {config.task!r}, which learns from its data"
            " how rows are read",
            "a task that begins with a tokenizer",
            "leave them out",
        )
    blank_texts = [text for text in config.add_tokens if not text.strip()]
    if blank_texts:
        raise ConfigError(
            f"add_tokens with {blank_texts[0]!r}", "texts that are not blank", "leave it out"
        )
    tokenizer.add_tokens(config.add_tokens)
    id_by_text = tokenizer.get_vocab()
    trained_texts = [*config.add_tokens, *config.trainable_tokens]
    unknown_texts = [text for text in trained_texts if text not in id_by_text]
    problems = [
        sentence(
            f"trainable_tokens {text!r}",
            f"a token of the {len(id_by_text):,} of {config.base}",
            "use add_tokens",
        )
        for text in unknown_texts
    ]
    raise_all(ConfigError, "These tokens cannot be trained", problems)
    return tuple(sorted({id_by_text[text] for text in trained_texts}))


def invocation_ids(config: TrainConfig, tokenizer: Any, rows: Rows) -> tuple[int, ...]:
    """The token ids of ``config.invocation``, a text in the model's input at which the adapter
    begins to act (activated LoRA); () if the run has no invocation.

    Args:
        rows: the training data, which is searched for the invocation.

    Raises:
        ConfigError: the invocation has no tokens, or no searched row contains it (`must_occur`).
    """
    if config.invocation is None:
        return ()
    token_ids = tuple(tokenizer.encode(config.invocation, add_special_tokens=False))
    must_occur(token_ids, repr(config.invocation), rows)
    return token_ids


def must_occur(token_ids: tuple[int, ...], invocation: str, rows: Rows) -> None:
    """Raise `ConfigError` if an adapter's invocation has no tokens, or no row of token ids contains
    them, so that nothing would train. ``invocation``: its name in the error. Rows of grpo are not
    searched, because an answer may contain the invocation."""
    id_rows = [
        ids
        for row in rows.rows
        for ids in (row.get("input_ids"), *(row[n][0] for n in ("chosen", "rejected") if n in row))
        if ids is not None
    ] + [row["ids"] for row in rows.rows if "good" in row]
    if not token_ids or (id_rows and not any(map(partial(_contains_tokens, token_ids), id_rows))):
        raise ConfigError(
            f"invocation {invocation}, tokens {list(token_ids)}, in none of the rows",
            "rows that hold these tokens one after the other",
            "write it as it stands in the tokenised rows (`--dry-run` prints one), between texts"
            " that no token joins with it, such as special tokens",
        )


def _contains_tokens(searched_ids: tuple[int, ...], row_ids: list[int]) -> bool:
    """Whether a row of token ids contains ``searched_ids`` as consecutive ids."""
    return any(
        tuple(row_ids[start : start + len(searched_ids)]) == searched_ids
        for start, token in enumerate(row_ids)
        if token == searched_ids[0]
    )


def add_embedding_rows(
    model: Any, tokenizer: Any, trained_ids: tuple[int, ...], seed: int
) -> dict[str, tuple[int, ...]]:
    """Give the base's embedding and head, in place, a row for each token of the tokenizer, if they
    lack rows for ``trained_ids``. Returns the value of ``LoraConfig.trainable_tokens``:
    {path of a module: ``trained_ids``} for the embedding, and for the head if it is not tied to the
    embedding; {} if no tokens train.

    Args:
        trained_ids: ids of the tokens to train.
        seed: determines the random values of new rows.
    """
    if not trained_ids:
        return {}
    if len(model.get_input_embeddings().weight) <= max(trained_ids):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    path_by_id = {id(module): path for path, module in model.named_modules()}
    is_untied = head is not None and head.weight is not embedding.weight
    trained_modules = [embedding, head] if is_untied else [embedding]
    return {path_by_id[id(module)]: trained_ids for module in trained_modules}
