"""The data sets of a run, ready for the trainer, and the number of steps."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer import models
from veneer.errors import ConfigError
from veneer.train import data
from veneer.train.config import TrainConfig

#: default maximal length of an example in tokens, if the model's context is longer
DEFAULT_MAX_LENGTH = 2048
#: maximal number of characters of a sample prompt
SHORT = 200


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer, and the number of steps. `train` and `evaluation`
    are `tokens.Examples` or `tasks.Rows`. `unused`: columns that the task does not read. `prompt`:
    a sample prompt from the data, a text or a chat; None if no prompt fits into a line."""

    train: Any
    evaluation: Any
    train_set: Any
    eval_set: Any
    max_length: int
    steps: int
    hashes: dict[str, str]
    unused: tuple[str, ...]
    prompt: str | list[Any] | None = None


def max_length(config: TrainConfig) -> int:
    """The maximal length of a run's examples in tokens. Raises `ConfigError` if it exceeds the
    context of the base."""
    context = models.context_length(config.base)
    length = config.max_length or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if context is not None and length > context:
        raise ConfigError(
            f"max_length {length:,}",
            f"at most {context:,}, the context of {config.base}",
            "lower it",
        )
    return length


def prepare(
    config: TrainConfig,
    read: Callable[[str, str], data.Records],
    encode: Callable[[data.Records], Any],
    length: int,
    dataset: Callable[[Any, int], Any] | None = None,
) -> Prepared:
    """Read, check, split and encode the data of `config`, and count the steps. ``read``: (source,
    split) to records; ``encode``: records to examples; ``dataset``: (examples, length) to the
    trainer's data set, in place of the examples' `dataset()`."""
    rows = read(config.data, config.split)
    held_out = read(config.eval_data, "train") if config.eval_data is not None else None
    if config.eval_fraction:
        rows, held_out = split(
            rows,
            config.eval_fraction,
            config.seed if config.eval_seed is None else config.eval_seed,
        )
    records = {"train": rows} if held_out is None else {"train": rows, "eval": held_out}
    examples = {name: encode(split_records) for name, split_records in records.items()}
    sets = {
        name: encoded.dataset() if dataset is None else dataset(encoded, length)
        for name, encoded in examples.items()
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.max_steps or math.ceil(
        config.epochs * steps_an_epoch(config, len(sets["train"]), world)
    )
    hashes = {name: split_records.sha256 for name, split_records in records.items()}
    prompt = prompt_of([rows.rows[i] for i in examples["train"].record_indices])
    return Prepared(
        train=examples["train"],
        evaluation=examples.get("eval"),
        train_set=sets["train"],
        eval_set=sets.get("eval"),
        max_length=length,
        steps=steps,
        hashes=hashes,
        unused=rows.unused,
        prompt=prompt,
    )


def steps_an_epoch(config: TrainConfig, rows: int, processes: int = 1) -> int:
    return math.ceil(math.ceil(rows / (config.batch_size * processes)) / config.grad_accum)


def prompt_of(rows: Sequence[dict[str, Any]]) -> str | list[Any] | None:
    """A sample prompt: the chat of the first row, if it has one; else the shortest printable prompt
    of the fewest lines, or None."""
    prompts = [_prompt_in(row) for row in rows]
    if isinstance(prompts[0], list):
        return prompts[0]
    printable = [
        text
        for text in prompts
        if isinstance(text, str)
        and len(text) <= SHORT
        and text.strip()
        and text.replace("\n", "").isprintable()
    ]
    return min(printable, key=lambda text: (text.count("\n"), len(text)), default=None)


def _prompt_in(row: dict[str, Any]) -> Any:
    """The prompt or chat of a row; of a row with only a text, its first five words."""
    for field in ("messages", "prompt"):
        if field in row:
            return row[field]
    text = row.get("chosen", row.get("text"))
    return " ".join(text.split(maxsplit=5)[:5]) if isinstance(text, str) else text


def split(rows: data.Records, fraction: float, seed: int) -> tuple[data.Records, data.Records]:
    """(training rows, held-out rows), each in the original order. A random `fraction` of the rows,
    at least one, is held out; the same rows for the same seed."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        problem = f"eval_fraction {fraction} of {len(rows)} examples leaves none to train on"
        raise ConfigError(problem, "at least one", "lower it")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if i not in chosen]), rows.select(
        sorted(chosen)
    )


def pack(dataset: Any, max_length: int) -> Any:
    """Pack several examples into rows of at most `max_length` tokens, with their lengths in the
    column seq_lengths."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )
    from trl.data_utils import pack_dataset

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return pack_dataset(dataset, max_length, "bfd")
    finally:
        if shown:
            enable_progress_bar()
