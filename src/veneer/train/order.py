"""The order of the rows in an epoch, and their distribution over several processes.

    epoch       every row once, in an order that depends on (seed, epoch) only
    batches     0 1 2 3 4 5 6 …              batches of consecutive rows, of equal size
    process p   p, p + n, p + 2n, …          the batches of process p of n: n batches run at once

A step takes the same number of batches from each process. The rows of a step are therefore the same
for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

#: Key that marks a weightless row or batch. A process that has no row left at the end of an epoch
#: computes one, so that the other processes do not wait for it; its loss is not counted.
WEIGHTLESS = "veneer_spare"


class EpochSampler(Sampler[int]):
    """A sampler that yields every row index once, in an order that depends on the seed and the
    epoch only.

    Args:
        lengths: by row, its number of tokens.
        step_rows: number of rows in an optimiser step, over all processes.
        grouped: whether the rows of a step have similar lengths, which saves padding. transformers'
            `get_length_grouped_indices` sorts each group of at most fifty steps' rows by falling
            length; this sampler then shuffles the steps. The first step stays first: it holds the
            longest row, so a lack of memory shows at once.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int, grouped: bool = True) -> None:
        self.lengths, self.step_rows, self.seed, self.grouped = lengths, step_rows, seed, grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order `__iter__` returns. accelerate's loader calls this method
        before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        if not self.grouped:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.step_rows, generator=generator)
        first_batch, *batches = (
            indices[i : i + self.step_rows] for i in range(0, len(indices), self.step_rows)
        )
        # a short last batch stays last: anywhere else it would shift the rows of all later steps
        last_batch = batches.pop() if batches and len(indices) % self.step_rows else []
        batch_order = torch.randperm(len(batches), generator=generator).tolist()
        return chain(first_batch, *(batches[index] for index in batch_order), last_batch)


class ShareSampler(BatchSampler):
    """The batches, as lists of row indices, of one of several processes. All processes have the
    same number of batches.

    At the end of an epoch, a process may have no row left for its last batch. accelerate would then
    repeat earlier rows, which would count twice. This sampler instead returns a batch of one
    weightless row: the process computes the row, so that the others do not wait for it, but the row
    is not counted in the loss. The batch holds ~index, a negative number, for the row `index`.

    Args:
        sampler: the order of the rows, the same in all processes.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, rank: int, process_count: int
    ) -> None:
        self.sampler: Any = sampler
        self.batch_size, self.drop_last = batch_size, False
        self.rank, self.process_count = rank, process_count

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.batch_size * self.process_count))

    def __iter__(self) -> Iterator[list[int]]:
        row_order, batch_size = [*self.sampler], self.batch_size
        for round_index in range(len(self)):
            start_index = (round_index * self.process_count + self.rank) * batch_size
            yield row_order[start_index : start_index + batch_size] or [~row_order[-1]]


class _RowsWithWeightless(Dataset[Any]):
    """A data set that returns a row by its index, and by ~index the same row marked as weightless
    (not counted in the loss)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index] if index >= 0 else {**self.dataset[~index], WEIGHTLESS: True}


def share_loader(
    loader: DataLoader[Any],
    rank: int,
    process_count: int,
    remove_weight: Callable[[dict[str, Any]], dict[str, Any]],
) -> DataLoader[Any]:
    """A loader of the batches of process `rank`, by `ShareSampler`.

    Args:
        loader: accelerate's loader for this process; its data set, order and collation are used.
        remove_weight: takes a weightless batch, which this process computes only to keep step with
            the others, and returns it with labels that the loss skips; it may return it unchanged
            if the trainer itself discards the loss.
    """
    batch_sampler_shard: Any = loader.batch_sampler
    share_sampler = ShareSampler(
        batch_sampler_shard.batch_sampler.sampler,
        batch_sampler_shard.batch_size,
        rank,
        process_count,
    )
    collate: Callable[[Any], Any] = loader.collate_fn

    def collate_and_mark(rows: list[dict[str, Any]]) -> Any:
        batch = collate(
            [{name: value for name, value in row.items() if name != WEIGHTLESS} for row in rows]
        )
        return {**remove_weight(batch), WEIGHTLESS: True} if WEIGHTLESS in rows[0] else batch

    dataset = _RowsWithWeightless(loader.dataset)
    return DataLoader(
        dataset,
        batch_sampler=share_sampler,
        collate_fn=collate_and_mark,
        pin_memory=loader.pin_memory,
    )
