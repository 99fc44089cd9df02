"""Tokens that a run adds or trains. They are added to the tokenizer, the base's embeddings get rows
for them, and the adapter trains these rows.

An added token is ordinary text to the tokenizer, not a special token, so that clients may write it
(``serve/prompts.py`` removes special tokens from texts). transformers initialises new rows near the
mean of the other rows, at random. Here the run's seed decides these values, because a resumed run
must begin with the same rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veneer.errors import ConfigError, raise_all, sentence
from veneer.train.config import TrainConfig
from veneer.train.prepare import Rows


def add_tokens(config: TrainConfig, tokenizer: Any) -> tuple[int, ...]:
    """Add the tokens of a configuration to its tokenizer, and return the ids of all tokens to train
    in ascending order. Raises ``ConfigError`` for a token to train that the tokenizer lacks, and if
    the task's processor is not a tokenizer."""
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
    token_ids = tokenizer.get_vocab()
    trained_texts = [*config.add_tokens, *config.trainable_tokens]
    unknown_texts = [text for text in trained_texts if text not in token_ids]
    problems = [
        sentence(
            f"trainable_tokens {text!r}",
            f"a token of the {len(token_ids):,} of {config.base}",
            "use add_tokens",
        )
        for text in unknown_texts
    ]
    raise_all(ConfigError, "These tokens cannot be trained", problems)
    return tuple(sorted({token_ids[text] for text in trained_texts}))


def invocation_ids(config: TrainConfig, tokenizer: Any, rows: Rows) -> tuple[int, ...]:
    """The token ids of ``config.invocation``; none if there is no invocation. ``rows``: the rows of
    the training data. They are searched for the invocation if they have ``input_ids``, which only
    rows of the task sft have. Raises ``ConfigError`` if none of them contains the invocation,
    because then nothing would train."""
    if config.invocation is None:
        return ()
    ids = tuple(tokenizer.encode(config.invocation, add_special_tokens=False))
    examples = [row["input_ids"] for row in rows.rows if "input_ids" in row]
    if not ids or (examples and not any(map(partial(_contains_tokens, ids), examples))):
        raise ConfigError(
            f"invocation {config.invocation!r}, tokens {list(ids)}, in none of the rows",
            "rows that hold these tokens one after the other",
            "write it as it stands in the tokenised rows (`--dry-run` prints one), between texts"
            " that no token joins with it, such as special tokens",
        )
    return ids


def _contains_tokens(ids: tuple[int, ...], row: list[int]) -> bool:
    """Whether a row of token ids contains ``ids`` as consecutive tokens."""
    return any(
        tuple(row[start : start + len(ids)]) == ids
        for start, token in enumerate(row)
        if token == ids[0]
    )


def add_embedding_rows(
    model: Any, tokenizer: Any, ids: tuple[int, ...], seed: int
) -> dict[str, tuple[int, ...]]:
    """Give the base's embeddings a row for each token of the tokenizer. Returns the value of
    ``LoraConfig.trainable_tokens``: ``ids``, by the path of the embedding, and by the path of the
    head if it is not tied to the embedding."""
    if not ids:
        return {}
    if len(model.get_input_embeddings().weight) <= max(ids):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    is_untied = head is not None and head.weight is not embedding.weight
    trained_modules = [embedding, head] if is_untied else [embedding]
    return {paths[id(module)]: ids for module in trained_modules}
