"""Which rows a forward pass takes: in which order, and, of several processes, which of them are
whose.

    epoch       every row once, in an order that depends on (seed, epoch) alone
    batches     0 1 2 3 4 5 6 …                  in that order, as many rows in each
    process p   p, p + n, p + 2n, …              of n processes: the n that follow each other run at once

A step takes as many batches from each process, so the rows of a step are those that one process
would take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

#: the key under which a batch says that it counts for nothing
SPARE = "veneer_spare"


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on (seed, epoch) alone; neighbours, if `grouped`,
    are of like length. transformers sorts each stretch of fifty batches by length, longest first,
    so the batches of a stretch come in falling order of length; here the batches are shuffled after
    that, all but the first, which holds the longest example and so shows at once whether memory
    suffices. `batch`: the examples of a step."""

    def __init__(self, lengths: list[int], batch: int, seed: int, grouped: bool = True) -> None:
        self.lengths, self.batch, self.seed, self.grouped, self.epoch = (
            lengths,
            batch,
            seed,
            grouped,
            0,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's loader before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        if not self.grouped:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        first, *batches = (indices[i : i + self.batch] for i in range(0, len(indices), self.batch))
        # short: it would shift all the others
        last = batches.pop() if batches and len(indices) % self.batch else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return chain(first, *(batches[number] for number in order), last)


class ShareSampler(BatchSampler):
    """The batches of one of several processes: as many for each. accelerate fills up the end of an
    epoch with rows that were there before; here a process for which no batch is left gets one row
    that counts for nothing, written ~index, so that no other process waits for it."""

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, processes: int) -> None:
        self.sampler: Any = sampler
        self.batch_size, self.drop_last = batch_size, False
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        order, size = [*self.sampler], self.batch_size
        for number in range(len(self)):
            start = (number * self.processes + self.rank) * size
            yield order[start : start + size] or [~order[-1]]


class _WithSpare(Dataset[Any]):
    """Rows by their index, and by ~index as rows that count for nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else {**self.rows[~index], SPARE: True}


def shared(
    loader: DataLoader[Any],
    rank: int,
    processes: int,
    spare: Callable[[dict[str, Any]], dict[str, Any]],
) -> DataLoader[Any]:
    """What one of several processes loads of what `loader`, accelerate's of such a process, has.
    `spare`: makes a batch one that counts for nothing."""
    whole: Any = loader.batch_sampler
    batches = ShareSampler(whole.batch_sampler.sampler, whole.batch_size, rank, processes)
    collate: Callable[[Any], Any] = loader.collate_fn

    def marked(rows: list[dict[str, Any]]) -> Any:
        batch = collate(
            [{name: value for name, value in row.items() if name != SPARE} for row in rows]
        )
        return {**spare(batch), SPARE: True} if SPARE in rows[0] else batch

    rows = _WithSpare(loader.dataset)
    return DataLoader(rows, batch_sampler=batches, collate_fn=marked, pin_memory=loader.pin_memory)
