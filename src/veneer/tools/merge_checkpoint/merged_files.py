"""Write the files of a merged checkpoint: several tensors at a time, each at its place in its file.

    read ──► compare the fingerprint ──► merge ──► write at the tensor's offset

The header of a safetensors file fixes the offset of each tensor, so workers need no order among
themselves. The bytes that they hold together are bounded (``MergeJob.memory_limit``). Tensors that
no adapter changes are copied in blocks.
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

#: bytes that are copied at once, and workers at most
BLOCK, WORKERS = 1 << 22, 4

#: called as (bytes done, bytes in all, name of the tensor)
Progress = Callable[[int, int, str], object]


class _ByteBudget:
    """A limit on the bytes that all workers hold together. A tensor above the limit waits until no
    other is held."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + count <= self._limit)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


class CheckpointWriter:
    """Writes the result of a merge into ``folder``."""

    def __init__(self, job: MergeJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        limit, self._compiled = job.memory_limit()
        self._budget = _ByteBudget(limit)
        self._offsets: dict[str, int] = {}
        order = {name: number for number, name in enumerate(job.checkpoint.file_of)}
        #: parameters whose fingerprint is complete once a tensor is read, by the tensor's name
        self._parameters: dict[str, list[str]] = {}
        for path, (tensors, *_) in job.merge_plan.fingerprints.items() if job.verify_base else ():
            self._parameters.setdefault(max(tensors, key=order.__getitem__), []).append(path)

    def write(self, progress: Progress | None) -> list[LayerMerge]:
        """Write every file, and return the report of each weight that changed. The first error in
        the order of tensors is raised: ``BaseMismatchError``, ``MergeError``, ``CheckpointError``
        or ``OSError``."""
        for file in self.job.checkpoint.files:
            header, offsets = self.job.layout(file)
            (self.folder / file).write_bytes(header)
            self._offsets |= offsets
        names, layers, done = list(self.job.checkpoint.file_of), [], 0
        total = sum(map(self.job.checkpoint.bytes, names))
        with _worker_pool() as pool:
            for name, reports in zip(names, pool.map(self._write_tensor, names), strict=True):
                layers += reports
                done += self.job.checkpoint.bytes(name)
                if progress is not None:
                    progress(done, total, name)
        return layers

    def _write_tensor(self, name: str) -> list[LayerMerge]:
        job = self.job
        with (self.folder / job.checkpoint.file_of[name]).open("r+b", buffering=0) as target:
            target.seek(self._offsets[name])
            if job.is_copied(name):
                self._copy(target, name)
                return []
            with self._budget.reserve(job.buffer_bytes(name)):
                tensor = job.checkpoint.read(name)
                job.check_fingerprints(self._parameters.get(name, ()), {name: tensor})
                result, reports = merge_tensor(job, name, tensor, self._compiled)
                write_all(target, memoryview(as_bytes(result).numpy().data))
        return reports

    def _copy(self, target: BinaryIO, name: str) -> None:
        checkpoint, remaining = self.job.checkpoint, self.job.checkpoint.bytes(name)
        with (checkpoint.folder / checkpoint.file_of[name]).open("rb", buffering=0) as source:
            source.seek(checkpoint.start(name))
            while remaining:
                block = source.read(min(remaining, BLOCK))
                if not block:
                    problem = f"{checkpoint.file_of[name]}, which became shorter while it was read"
                    do = "let nobody write to it meanwhile"
                    raise CheckpointError(problem, "the base as it was", do)
                write_all(target, memoryview(block))
                remaining -= len(block)


@contextmanager
def _worker_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of workers that share torch's threads. After an error the waiting tensors are
    dropped."""
    threads = torch.get_num_threads()
    workers = min(threads, WORKERS)
    share = math.ceil(threads / workers)
    pool = ThreadPoolExecutor(workers, "veneer-merge", _limit_threads, (share,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that start later begin with the last setting


def _limit_threads(count: int) -> None:
    torch.get_num_threads()  # the first use in a thread takes over the last setting made anywhere
    torch.set_num_threads(count)


def write_all(target: BinaryIO, data: memoryview) -> None:
    """Write ``data`` to an unbuffered file, whose ``write`` may take only some of it."""
    while data:
        data = data[target.write(data) :]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
