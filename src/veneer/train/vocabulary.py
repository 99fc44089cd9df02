"""Tokens that a run adds or trains: the tokenizer learns them, the base grows rows for them, the
adapter trains these.

A token that was added is ordinary text to the tokenizer, so that a client may write it
(``serve/prompts.py`` keeps special tokens from texts). The new rows begin as transformers makes
them, near the mean of the others, by the seed of the run: a run that goes on must begin with the
very rows.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.errors import ConfigError, raise_all, sentence
from veneer.train.config import TrainConfig


def learn(config: TrainConfig, tokenizer: Any) -> tuple[int, ...]:
    """Add the tokens of a configuration to its tokenizer; the ids of all that are to be trained,
    ascending. ``ConfigError``: one is no token of it, and is not added; the processor of the task
    reads no texts."""
    if not (config.add_tokens or config.trainable_tokens):
        return ()
    if not hasattr(tokenizer, "get_vocab"):
        problem = (
            f"add_tokens or trainable_tokens for task {config.task!r}, which learns from its data"
            " how rows are read"
        )
        raise ConfigError(problem, "a task that begins with a tokenizer", "leave them out")
    empty = [text for text in config.add_tokens if not text.strip()]
    if empty:
        raise ConfigError(
            f"add_tokens with {empty[0]!r}", "texts that are not blank", "leave it out"
        )
    tokenizer.add_tokens(config.add_tokens)
    known = tokenizer.get_vocab()
    wanted = [*config.add_tokens, *config.trainable_tokens]
    lacking = [text for text in wanted if text not in known]
    problems = [
        sentence(
            f"trainable_tokens {text!r}",
            f"a token of the {len(known):,} of {config.base}",
            "use add_tokens",
        )
        for text in lacking
    ]
    raise_all(ConfigError, "These tokens cannot be trained", problems)
    return tuple(sorted({known[text] for text in wanted}))


def grow(model: Any, tokenizer: Any, ids: tuple[int, ...], seed: int) -> dict[str, tuple[int, ...]]:
    """Give the base a row for each token of its tokenizer; what ``LoraConfig.trainable_tokens``
    takes: the ids by the path of the embedding, and of a head that is not tied to it."""
    if not ids:
        return {}
    if len(model.get_input_embeddings().weight) <= max(ids):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    ends = [
        embedding,
        *([head] if head is not None and head.weight is not embedding.weight else []),
    ]
    return {paths[id(end)]: ids for end in ends}
