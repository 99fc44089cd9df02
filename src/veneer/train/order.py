"""The order of the rows in an epoch, and their distribution over several processes.

    epoch       every row once, in an order that depends on (seed, epoch) only
    batches     0 1 2 3 4 5 6 …                  consecutive rows, the same number in each
    process p   p, p + n, p + 2n, …              of n processes: n consecutive batches run at once

A step takes the same number of batches from each process, so its rows are those of a step in one
process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

#: key of a batch that carries no weight
SPARE = "veneer_spare"


class EpochSampler(Sampler[int]):
    """Every index once, in an order that depends on (seed, epoch) only. `grouped`: neighbours have
    similar lengths. transformers sorts each group of fifty batches by falling length; this sampler
    then shuffles the batches, except for the first one, which holds the longest example and shows
    at once whether the memory suffices. `batch`: number of examples in a step."""

    def __init__(self, lengths: list[int], batch: int, seed: int, grouped: bool = True) -> None:
        self.lengths, self.batch, self.seed, self.grouped = lengths, batch, seed, grouped
        self.epoch = 0

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
        # a short last batch stays last, because it would shift all batches after it
        last = batches.pop() if batches and len(indices) % self.batch else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return chain(first, *(batches[number] for number in order), last)


class ShareSampler(BatchSampler):
    """The batches of one of several processes; all have the same number. At the end of an epoch,
    accelerate repeats earlier rows for processes without a batch. Here such a process gets one row
    without weight, written ~index, so that the other processes do not wait for it."""

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
    """Rows by index; by ~index as rows without weight."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else {**self.rows[~index], SPARE: True}


def share_loader(
    loader: DataLoader[Any],
    rank: int,
    processes: int,
    spare: Callable[[dict[str, Any]], dict[str, Any]],
) -> DataLoader[Any]:
    """A loader of one process's share of the rows of `loader`, which is accelerate's loader for
    that process. `spare`: a function that removes the weight of a batch."""
    sampler: Any = loader.batch_sampler
    batches = ShareSampler(sampler.batch_sampler.sampler, sampler.batch_size, rank, processes)
    collate: Callable[[Any], Any] = loader.collate_fn

    def collate_and_mark(rows: list[dict[str, Any]]) -> Any:
        batch = collate(
            [{name: value for name, value in row.items() if name != SPARE} for row in rows]
        )
        return {**spare(batch), SPARE: True} if SPARE in rows[0] else batch

    rows = _WithSpare(loader.dataset)
    return DataLoader(
        rows, batch_sampler=batches, collate_fn=collate_and_mark, pin_memory=loader.pin_memory
    )
