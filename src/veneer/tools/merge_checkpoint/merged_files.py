"""Write the files of a merged checkpoint, several tensors at a time.

    read ──► compare the fingerprint ──► merge ──► write at the tensor's offset

The header of a safetensors file fixes the offset of each tensor, so the workers may write tensors
in any order. The bytes of all tensors in memory are limited (``MergeJob.memory_limit``). Tensors
that no adapter changes are copied block by block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from veneer.attach import LayerMerge
from veneer.errors import CheckpointError
from veneer.tools.merge_checkpoint.job import MergeJob, merge_tensor

#: number of bytes that are copied at once, and the largest number of worker threads
BLOCK_BYTES, MAX_WORKERS = 1 << 22, 4

#: called with (bytes done, bytes in total, name of the tensor)
Progress = Callable[[int, int, str], object]


class _ByteBudget:
    """A limit of the bytes of all tensors that workers hold in memory. A tensor larger than the
    limit waits until no other tensor is in memory."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used_bytes = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, byte_count: int) -> Iterator[None]:
        """A context that holds ``byte_count`` bytes of the budget; it waits until they are free."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._used_bytes or self._used_bytes + byte_count <= self._limit
            )
            self._used_bytes += byte_count
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= byte_count
                self._changed.notify_all()


class CheckpointWriter:
    """Writes the result of a merge into ``folder``."""

    def __init__(self, job: MergeJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        limit, self._use_numba = job.memory_limit()
        self._budget = _ByteBudget(limit)
        self._offsets: dict[str, int] = {}
        position = {name: index for index, name in enumerate(job.checkpoint.file_of)}
        #: by name of a tensor: the parameters whose fingerprints are checked when it is read. It is
        #: the last tensor, in the order of the files, that holds a part of them
        self._parameters_by_last_tensor: dict[str, list[str]] = {}
        for path, (tensors, *_) in job.merge_plan.fingerprints.items() if job.verify_base else ():
            self._parameters_by_last_tensor.setdefault(
                max(tensors, key=position.__getitem__), []
            ).append(path)

    def write(self, progress: Progress | None) -> list[LayerMerge]:
        """Write every file, and return the report of each weight that changed. If tensors fail, the
        error of the first of them in the order of the files is raised: ``BaseMismatchError``,
        ``MergeError``, ``CheckpointError`` or ``OSError``."""
        for file in self.job.checkpoint.files:
            header, offsets = self.job.layout(file)
            (self.folder / file).write_bytes(header)
            self._offsets |= offsets
        names, layer_reports, bytes_done = list(self.job.checkpoint.file_of), [], 0
        total_bytes = sum(map(self.job.checkpoint.bytes, names))
        with _worker_pool() as pool:
            for name, tensor_reports in zip(
                names, pool.map(self._write_tensor, names), strict=True
            ):
                layer_reports += tensor_reports
                bytes_done += self.job.checkpoint.bytes(name)
                if progress is not None:
                    progress(bytes_done, total_bytes, name)
        return layer_reports

    def _write_tensor(self, name: str) -> list[LayerMerge]:
        job = self.job
        with (self.folder / job.checkpoint.file_of[name]).open("r+b") as target:
            target.seek(self._offsets[name])
            if job.is_copied(name):
                self._copy(target, name)
                return []
            with self._budget.reserve(job.buffer_bytes(name)):
                tensor = job.checkpoint.read(name)
                job.check_fingerprints(
                    self._parameters_by_last_tensor.get(name, ()), {name: tensor}
                )
                result, reports = merge_tensor(job, name, tensor, self._use_numba)
                target.write(as_bytes(result).numpy().data)
        return reports

    def _copy(self, target: BinaryIO, name: str) -> None:
        checkpoint, remaining_bytes = self.job.checkpoint, self.job.checkpoint.bytes(name)
        with (checkpoint.folder / checkpoint.file_of[name]).open("rb", buffering=0) as source:
            source.seek(checkpoint.start(name))
            while remaining_bytes:
                block = source.read(min(remaining_bytes, BLOCK_BYTES))
                if not block:
                    raise CheckpointError(
                        f"{checkpoint.file_of[name]}, which became shorter while it was read",
                        "the base as it was",
                        "let nobody write to it meanwhile",
                    )
                target.write(block)
                remaining_bytes -= len(block)


@contextmanager
def _worker_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of worker threads, among which torch's threads are divided. After an error, the pool
    drops the tensors that no worker has begun."""
    thread_count = torch.get_num_threads()
    worker_count = min(thread_count, MAX_WORKERS)
    threads_per_worker = math.ceil(thread_count / worker_count)
    pool = ThreadPoolExecutor(worker_count, "veneer-merge", _limit_threads, (threads_per_worker,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # torch gives new threads the number that was last set in any thread, so set it back
        torch.set_num_threads(thread_count)


def _limit_threads(count: int) -> None:
    # The first call in a thread replaces the thread's number by the number that was last set in any
    # thread. So it must come before this thread sets its own number.
    torch.get_num_threads()
    torch.set_num_threads(count)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as uint8 [number of bytes]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
