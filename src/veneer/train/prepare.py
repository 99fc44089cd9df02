"""From a configuration to data that the trainer takes, and the number of steps that they make."""

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

LONGEST = 2048  # tokens: the default limit, where the model's context is longer
SHORT = 200  # characters of a prompt that a line of the terminal shows


@dataclass(frozen=True)
class Prepared:
    """The data of a run, ready for the trainer, and the number of steps. `train` and `evaluation`
    are `tokens.Examples` or `tasks.Rows`. `unused` are columns that nothing reads. `prompt` is what
    one may ask who learnt from the data: a text, or a chat; None where there is none that fits a
    line."""

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
    """The longest example in tokens that a run takes. Raises `ConfigError` for more than the base
    can."""
    context = models.context_length(config.base)
    length = config.max_length or min(context or LONGEST, LONGEST)
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
    """Read, check, split and encode the data of `config`, and count the steps. ``read``: of
    (source, split); ``encode``: records to examples; ``dataset``: what the trainer takes of
    examples, if not their own `dataset()`."""
    rows = read(config.data, config.split)
    held_out = read(config.eval_data, "train") if config.eval_data is not None else None
    if config.eval_fraction:
        rows, held_out = split(
            rows,
            config.eval_fraction,
            config.seed if config.eval_seed is None else config.eval_seed,
        )
    parts = {"train": rows} if held_out is None else {"train": rows, "eval": held_out}
    examples = {name: encode(part) for name, part in parts.items()}
    sets = {
        name: part.dataset() if dataset is None else dataset(part, length)
        for name, part in examples.items()
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = config.max_steps or math.ceil(
        config.epochs * steps_an_epoch(config, len(sets["train"]), world)
    )
    hashes = {name: part.sha256 for name, part in parts.items()}
    prompt = prompt_of([rows.rows[i] for i in examples["train"].index])
    return Prepared(
        examples["train"], examples.get("eval"), sets["train"], sets.get("eval"), length, steps, hashes, rows.unused,
        prompt,
    )  # fmt: skip


def steps_an_epoch(config: TrainConfig, rows: int, processes: int = 1) -> int:
    return math.ceil(math.ceil(rows / (config.batch_size * processes)) / config.grad_accum)


def prompt_of(rows: Sequence[dict[str, Any]]) -> str | list[Any] | None:
    """The chat of the first row if it is one; else the shortest prompt, of one line if there is
    such, that a terminal shows as it is."""
    asked = [_asked(row) for row in rows]
    if isinstance(asked[0], list):
        return asked[0]
    fit = [
        text for text in asked
        if isinstance(text, str) and len(text) <= SHORT and text.strip() and text.replace("\n", "").isprintable()
    ]  # fmt: skip
    return min(fit, key=lambda text: (text.count("\n"), len(text)), default=None)


def _asked(row: dict[str, Any]) -> Any:
    """What is there before what is learnt; of a text that is learnt whole, the first five words."""
    for part in ("messages", "prompt"):
        if part in row:
            return row[part]
    text = row.get("chosen", row.get("text"))
    return " ".join(text.split(maxsplit=5)[:5]) if isinstance(text, str) else text


def split(rows: data.Records, fraction: float, seed: int) -> tuple[data.Records, data.Records]:
    """(the rest, a random share `fraction` of the rows, at least one), each in its original order;
    the same for a seed."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        problem = f"eval_fraction {fraction} of {len(rows)} examples leaves none to train on"
        raise ConfigError(problem, "at least one", "lower it")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if i not in chosen]), rows.select(
        sorted(chosen)
    )


def pack(dataset: Any, max_length: int) -> Any:
    """Several examples in one row of at most `max_length` tokens, with their lengths in the column
    seq_lengths."""
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
