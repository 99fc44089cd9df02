"""The data sets of a run, ready for the trainer, and the number of steps."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from veneer import models
from veneer.errors import ConfigError
from veneer.train import data

if TYPE_CHECKING:
    from veneer.train.config import TrainConfig

#: default maximal length of an example in tokens, if the model's context is longer
DEFAULT_MAX_LENGTH = 2048
#: maximal number of characters of a sample prompt that is a text
MAX_PROMPT_CHARACTERS = 200


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Any]]):
    """The rows of a data set, each an input of the task's `collate`.

    Fields:
        lengths: by row, the number of tokens that the model computes for it, of all its texts and
            answers; 0 for images. For grouping rows of similar length, and for estimates.
        record_indices: by row, the index of its record in the data.
        head_token_counts: by row, the number of its tokens that reach the output head; [] if the
            task does not count them.
        dropped, truncated: number of records that were dropped or cut, because they were too long.
    """

    rows: list[dict[str, Any]]
    lengths: list[int]
    record_indices: list[int]
    head_token_counts: list[int] = field(default_factory=list)
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def head_token_count(self) -> int:
        """The number of tokens that reach the output head."""
        return sum(self.head_token_counts)


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer, and the number of steps.

    Fields:
        train, evaluation: the rows.
        train_set, eval_set: the same rows as the trainer's data sets, packed if the run packs.
        max_length: maximal number of tokens of a row.
        steps: number of optimiser steps of the run.
        hashes: hashes of what a resumed run must find unchanged, by name: the sources "train" and
            "eval", the initial "adapter", and the files of reward functions by their paths.
        unused: columns of the data that the task does not read.
        prompt: a sample prompt from the data, a text or a chat; None if no prompt is short enough.
    """

    train: Rows
    evaluation: Rows | None
    train_set: Any
    eval_set: Any
    max_length: int
    steps: int
    hashes: dict[str, str]
    unused: tuple[str, ...]
    prompt: str | list[Any] | None = None


def max_length(config: TrainConfig) -> int:
    """The maximal length of a run's examples in tokens. Errors are those of `check_length`."""
    return check_length(config.max_length, models.context_length(config.base), config.base)


def check_length(length: int | None, context: int | None, base: str) -> int:
    """The maximal length of an example in tokens: `length`, or by default the context of the base,
    at most `DEFAULT_MAX_LENGTH`. Raises `ConfigError` if it exceeds the context."""
    length = length or min(context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if context is not None and length > context:
        raise ConfigError(
            f"max_length {length:,}", f"at most {context:,}, the context of {base}", "lower it"
        )
    return length


def prepare(
    config: TrainConfig,
    read: Callable[[str, str], data.Records],
    encode: Callable[[data.Records], Rows],
    length: int,
    make_dataset: Callable[[Rows, int], Any] | None = None,
) -> Prepared:
    """Read, check, split and encode the data of `config`, and count the steps.

    Args:
        read: (source, split) -> records.
        encode: records -> examples.
        length: the maximal number of tokens of a row.
        make_dataset: (examples, length) -> the trainer's data set; by default the examples.
    """
    rows = read(config.data, config.split)
    held_out_records = read(config.eval_data, "train") if config.eval_data is not None else None
    if config.eval_fraction:
        rows, held_out_records = split(
            rows,
            config.eval_fraction,
            config.seed if config.eval_seed is None else config.eval_seed,
        )
    records = (
        {"train": rows} if held_out_records is None else {"train": rows, "eval": held_out_records}
    )
    examples = {name: encode(split_records) for name, split_records in records.items()}
    sets = {
        name: encoded if make_dataset is None else make_dataset(encoded, length)
        for name, encoded in examples.items()
    }
    process_count = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.max_steps or math.ceil(
        config.epochs * steps_an_epoch(config, len(sets["train"]), process_count)
    )
    hashes = {name: split_records.sha256 for name, split_records in records.items()}
    prompt = sample_prompt([rows.rows[i] for i in examples["train"].record_indices])
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


def sample_prompt(rows: Sequence[dict[str, Any]]) -> str | list[Any] | None:
    """A sample prompt: the chat of the first row, if it has one. Else the printable prompt with the
    fewest lines, and among these the shortest; None if no prompt is printable."""
    prompts = [_prompt_of_row(row) for row in rows]
    if isinstance(prompts[0], list):
        return prompts[0]
    printable = [
        text
        for text in prompts
        if isinstance(text, str)
        and len(text) <= MAX_PROMPT_CHARACTERS
        and text.strip()
        and text.replace("\n", "").isprintable()
    ]
    return min(printable, key=lambda text: (text.count("\n"), len(text)), default=None)


def _prompt_of_row(row: dict[str, Any]) -> Any:
    """The prompt or chat of a row. For a row that has only a text, the first five words of it."""
    for column in ("messages", "prompt"):
        if column in row:
            return row[column]
    text = row.get("chosen", row.get("text"))
    return " ".join(text.split(maxsplit=5)[:5]) if isinstance(text, str) else text


def split(rows: data.Records, fraction: float, seed: int) -> tuple[data.Records, data.Records]:
    """Split rows into (training rows, held-out rows), each in the original order. A random
    `fraction` of the rows, at least one row, is held out; equal seeds give equal splits."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise ConfigError(
            f"eval_fraction {fraction} of {len(rows)} examples leaves none to train on",
            "at least one",
            "lower it",
        )
    held_out_indices = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if i not in held_out_indices]), rows.select(
        sorted(held_out_indices)
    )


def pack(dataset: Any, max_length: int) -> Any:
    """Pack several examples into each row of at most `max_length` tokens. The column seq_lengths
    holds the lengths of a row's examples."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )
    from trl.data_utils import pack_dataset

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return pack_dataset(dataset, max_length, "bfd")
    finally:
        if was_enabled:
            enable_progress_bar()
