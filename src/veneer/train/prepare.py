"""Read, check, split and encode the data of a run, and count its steps."""

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
from veneer.train.processes import count_shares

if TYPE_CHECKING:
    from veneer.train.config import TrainConfig

#: default maximal length of an example in tokens, if the model's context is longer
DEFAULT_MAX_LENGTH = 2048
#: maximal number of characters of a text that `sample_prompt` returns
MAX_PROMPT_CHARACTERS = 200


@dataclass(frozen=True)
class Rows(Dataset[dict[str, Any]]):
    """The encoded rows of a data set. `Task.collate` joins several of them to a batch.

    Fields:
        rows: by row, its tensors or lists by name, such as "input_ids" and "labels".
        lengths: by row, the number of tokens that the model computes for it, in all its texts and
            answers together; 0 for images. They serve to group rows of similar length and to
            estimate memory.
        record_indices: by row, the index of the record of the data from which it was encoded.
        head_token_counts: by row, the number of its tokens whose hidden states pass through the
            output head; [] if the task does not count them.
        dropped, truncated: number of records that were dropped or cut because they were too long.
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
        """The number of tokens of all rows whose hidden states pass through the output head."""
        return sum(self.head_token_counts)


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer, and the number of steps.

    Fields:
        train, evaluation: the encoded rows to train and to evaluate on; `evaluation` is None if the
            run does not evaluate.
        train_set, eval_set: the same rows in the type of data set that the trainer takes, packed
            (several examples in one row) if the run packs.
        max_length: maximal number of tokens of a row.
        steps: number of optimiser steps of the run.
        hashes: hashes of the inputs that must not have changed when a run is resumed, by name:
            the data ("train", "eval"), the adapter that the run trains further ("adapter"), and
            the files of reward functions, by their paths.
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
    """The maximal number of tokens of an example of a run. Raises the errors of `check_length`."""
    return check_length(config.max_length, models.context_length(config.base), config.base)


def check_length(length: int | None, context_length: int | None, base: str) -> int:
    """The maximal number of tokens of an example: `length`, or if it is None, the smaller of
    `DEFAULT_MAX_LENGTH` and the base's context length.

    Args:
        context_length: the number of positions that the base supports; None if it has no limit.
        base: the name of the base, for the error.

    Raises:
        ConfigError: `length` exceeds `context_length`.
    """
    length = length or min(context_length or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if context_length is not None and length > context_length:
        raise ConfigError(
            f"max_length {length:,}",
            f"at most {context_length:,}, the context of {base}",
            "lower it",
        )
    return length


def prepare(
    config: TrainConfig,
    read_records: Callable[[str, str], data.Records],
    encode_records: Callable[[data.Records], Rows],
    length_limit: int,
    make_dataset: Callable[[Rows, int], Any] | None = None,
) -> Prepared:
    """Read, check, split and encode the data of `config`, and count the steps. Raises the errors of
    `read_records` and `encode_records`, and `ConfigError` if `eval_fraction` leaves no row to train
    on, or if the evaluation would read the split of a hub data set that the run trains on.

    Args:
        read_records: reads the records of (source, split), a file or data set and its split.
        encode_records: turns records into rows.
        length_limit: the maximal number of tokens of a row.
        make_dataset: turns (rows, `length_limit`) into the data set that the trainer takes; by
            default the rows are this data set.
    """
    if (config.eval_data, config.eval_split) == (config.data, config.split) and not data.is_local(
        config.data
    ):
        raise ConfigError(
            f"eval_data {config.eval_data}, split {config.eval_split}, which are the training data",
            "other rows",
            "name another split with eval_split, or set eval_fraction instead of eval_data",
        )
    train_records = read_records(config.data, config.split)
    held_out_records = (
        read_records(config.eval_data, config.eval_split) if config.eval_data is not None else None
    )
    if config.eval_fraction:
        train_records, held_out_records = split(
            train_records,
            config.eval_fraction,
            config.seed if config.eval_seed is None else config.eval_seed,
        )
    records_by_split = (
        {"train": train_records}
        if held_out_records is None
        else {"train": train_records, "eval": held_out_records}
    )
    rows_by_split = {
        name: encode_records(split_records) for name, split_records in records_by_split.items()
    }
    datasets_by_split = {
        name: encoded_rows if make_dataset is None else make_dataset(encoded_rows, length_limit)
        for name, encoded_rows in rows_by_split.items()
    }
    share_count = count_shares(config.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    steps = config.max_steps or math.ceil(
        config.epochs * steps_an_epoch(config, len(datasets_by_split["train"]), share_count)
    )
    hashes = {name: split_records.sha256 for name, split_records in records_by_split.items()}
    prompt = sample_prompt([train_records.rows[i] for i in rows_by_split["train"].record_indices])
    return Prepared(
        train=rows_by_split["train"],
        evaluation=rows_by_split.get("eval"),
        train_set=datasets_by_split["train"],
        eval_set=datasets_by_split.get("eval"),
        max_length=length_limit,
        steps=steps,
        hashes=hashes,
        unused=train_records.unused,
        prompt=prompt,
    )


def steps_an_epoch(config: TrainConfig, row_count: int, share_count: int = 1) -> int:
    """The number of optimiser steps of an epoch of `row_count` rows. `share_count`: the number of
    shares into which the rows of a step are divided; `batch_size` is that of one share."""
    return math.ceil(math.ceil(row_count / (config.batch_size * share_count)) / config.grad_accum)


def sample_prompt(rows: Sequence[dict[str, Any]]) -> str | list[Any] | None:
    """A prompt from the data that shows how to use the adapter: the chat of the first row if it has
    one, else the text prompt with the fewest lines, and among equals the shortest. None if no text
    prompt is printable, not blank and at most `MAX_PROMPT_CHARACTERS` long."""
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
    """The prompt or chat of a row. For a row that has neither, the first five words of its text or
    of its chosen answer (or the answer itself, if it is a chat); None if it has no text."""
    for column in ("messages", "prompt"):
        if column in row:
            return row[column]
    text = row.get("chosen", row.get("text"))
    return " ".join(text.split(maxsplit=5)[:5]) if isinstance(text, str) else text


def split(records: data.Records, fraction: float, seed: int) -> tuple[data.Records, data.Records]:
    """Split records into (training records, held-out records), each in the original order. A random
    `fraction` of the records, at least one, is held out; equal seeds give equal splits. Raises
    `ConfigError` if no record would be left to train on."""
    held_out_count = max(1, round(len(records) * fraction))
    if held_out_count >= len(records):
        raise ConfigError(
            f"eval_fraction {fraction} of {len(records)} examples leaves none to train on",
            "at least one",
            "lower it",
        )
    held_out_indices = set(random.Random(seed).sample(range(len(records)), held_out_count))
    return records.select(
        [i for i in range(len(records)) if i not in held_out_indices]
    ), records.select(sorted(held_out_indices))


def pack(dataset: Any, max_length: int) -> Any:
    """Pack a data set of `datasets` by trl's best-fit decreasing: each row of the result holds
    several examples, at most `max_length` tokens in all. Its column seq_lengths holds the lengths
    of the examples in a row, so that attention can keep them apart. No progress bar is printed."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )
    from trl.data_utils import pack_dataset

    was_progress_bar_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return pack_dataset(dataset, max_length, "bfd")
    finally:
        if was_progress_bar_enabled:
            enable_progress_bar()
