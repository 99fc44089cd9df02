"""The order of the rows in an epoch, and their distribution over several processes.

    epoch       every row once, in an order that depends on (seed, epoch) only
    batches     0 1 2 3 4 5 6 …              batches of consecutive rows, of equal size
    process p   p, p + n, p + 2n, …          the batches of process p of n: n batches run at once

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

#: key that marks a row or a batch as one without weight in the loss
WEIGHTLESS = "veneer_spare"


class EpochSampler(Sampler[int]):
    """Every row index once, in an order that depends on (seed, epoch) only.

    Args:
        lengths: number of tokens by row.
        step_rows: number of rows in a step.
        grouped: whether neighbouring rows have similar lengths. transformers sorts each group of
            fifty batches by falling length; this sampler then shuffles the batches. The first batch
            stays first: it holds the longest row and shows at once whether the memory suffices.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int, grouped: bool = True) -> None:
        self.lengths, self.step_rows, self.seed, self.grouped = lengths, step_rows, seed, grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the order. accelerate's loader calls it before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        if not self.grouped:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        indices = get_length_grouped_indices(self.lengths, self.step_rows, generator=generator)
        first, *batches = (
            indices[i : i + self.step_rows] for i in range(0, len(indices), self.step_rows)
        )
        # a short last batch stays last, because it would shift all batches after it
        last = batches.pop() if batches and len(indices) % self.step_rows else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        return chain(first, *(batches[index] for index in order), last)


class ShareSampler(BatchSampler):
    """The batches of one of several processes. All processes have the same number of batches. At
    the end of an epoch, a process may have no row for its last batch; accelerate would repeat
    earlier rows. Here such a process gets a single row without weight in the loss, so that the
    other processes do not wait for it. Its index is written ~index, a negative number."""

    def __init__(
        self, sampler: Sampler[int], batch_size: int, rank: int, process_count: int
    ) -> None:
        self.sampler: Any = sampler
        self.batch_size, self.drop_last = batch_size, False
        self.rank, self.process_count = rank, process_count

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.batch_size * self.process_count))

    def __iter__(self) -> Iterator[list[int]]:
        row_order, size = [*self.sampler], self.batch_size
        for round_index in range(len(self)):
            start = (round_index * self.process_count + self.rank) * size
            yield row_order[start : start + size] or [~row_order[-1]]


class _RowsWithWeightless(Dataset[Any]):
    """The rows of a data set by index, and the same rows without weight by ~index."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else {**self.rows[~index], WEIGHTLESS: True}


def share_loader(
    loader: DataLoader[Any],
    rank: int,
    process_count: int,
    remove_weight: Callable[[dict[str, Any]], dict[str, Any]],
) -> DataLoader[Any]:
    """A loader of one process's share of the rows.

    Args:
        loader: accelerate's loader of this process.
        remove_weight: returns a batch changed so that it has no weight in the loss. It is called
            for batches of rows that another process computes.
    """
    sampler: Any = loader.batch_sampler
    batches = ShareSampler(sampler.batch_sampler.sampler, sampler.batch_size, rank, process_count)
    collate: Callable[[Any], Any] = loader.collate_fn

    def collate_and_mark(rows: list[dict[str, Any]]) -> Any:
        batch = collate(
            [{name: value for name, value in row.items() if name != WEIGHTLESS} for row in rows]
        )
        return {**remove_weight(batch), WEIGHTLESS: True} if WEIGHTLESS in rows[0] else batch

    rows = _RowsWithWeightless(loader.dataset)
    return DataLoader(
        rows, batch_sampler=batches, collate_fn=collate_and_mark, pin_memory=loader.pin_memory
    )
