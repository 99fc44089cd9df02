"""Write the files of a merged checkpoint, several tensors at a time.

    read ──► compare the fingerprint ──► merge ──► write at the tensor's offset

All headers are written first. The header of a safetensors file fixes the offset of each tensor, so
the worker threads may write tensors in any order. The bytes of all tensors in memory are limited
(``MergeJob.memory_limit``). Tensors that keep their values and their dtype are copied block by
block, so they do not count.
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

#: number of bytes of a file that are copied at once, and the largest number of worker threads
BLOCK_BYTES, MAX_WORKERS = 1 << 22, 4

#: called after each tensor, with (bytes of the base's tensors that are done, bytes of all of them,
#: name of the tensor)
Progress = Callable[[int, int, str], object]


class _ByteBudget:
    """A limit of the bytes of all tensors that workers hold in memory. A tensor larger than the
    limit waits until no other tensor is in memory."""

    def __init__(self, byte_limit: int) -> None:
        self._byte_limit, self._used_bytes = byte_limit, 0
        self._condition = threading.Condition()

    @contextmanager
    def reserve(self, byte_count: int) -> Iterator[None]:
        """A context that holds ``byte_count`` bytes of the budget. Entering it waits until so many
        bytes are free. If ``byte_count`` exceeds the whole budget, it waits until nothing else is
        reserved."""
        with self._condition:
            self._condition.wait_for(
                lambda: not self._used_bytes or self._used_bytes + byte_count <= self._byte_limit
            )
            self._used_bytes += byte_count
        try:
            yield
        finally:
            with self._condition:
                self._used_bytes -= byte_count
                self._condition.notify_all()


class CheckpointWriter:
    """Writes the tensors of a merge's result, as safetensors files, into the existing folder
    ``folder``."""

    def __init__(self, job: MergeJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        byte_limit, self._use_numba = job.memory_limit()
        self._budget = _ByteBudget(byte_limit)
        self._offsets: dict[str, int] = {}
        index_by_name = {name: index for index, name in enumerate(job.checkpoint.file_of)}
        #: the paths of the parameters whose fingerprints are checked when a tensor is read, by name
        #: of the tensor. The files may hold one parameter in several tensors. Then its fingerprint
        #: is checked only once, when the last of these tensors is read.
        self._parameters_by_last_tensor: dict[str, list[str]] = {}
        for path, (tensor_names, *_) in (
            job.merge_plan.fingerprints.items() if job.verify_base else ()
        ):
            self._parameters_by_last_tensor.setdefault(
                max(tensor_names, key=index_by_name.__getitem__), []
            ).append(path)

    def write(self, progress: Progress | None) -> list[LayerMerge]:
        """Write every file, and return a report of each low-rank change, in the order of the files.

        Args:
            progress: see ``Progress``; None reports nothing.

        Raises:
            BaseMismatchError, MergeError, CheckpointError, OSError: a tensor could not be merged,
                read or written. If several tensors fail, the error is that of the first one in the
                order of the files.
        """
        for file_name in self.job.checkpoint.files:
            header, offsets = self.job.layout(file_name)
            (self.folder / file_name).write_bytes(header)
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
        with (self.folder / job.checkpoint.file_of[name]).open("r+b") as target_stream:
            target_stream.seek(self._offsets[name])
            if job.is_copied(name):
                self._copy_tensor(target_stream, name)
                return []
            with self._budget.reserve(job.buffer_bytes(name)):
                tensor = job.checkpoint.read(name)
                job.check_fingerprints(
                    self._parameters_by_last_tensor.get(name, ()), {name: tensor}
                )
                result, reports = merge_tensor(job, name, tensor, self._use_numba)
                target_stream.write(as_bytes(result).numpy().data)
        return reports

    def _copy_tensor(self, target_stream: BinaryIO, name: str) -> None:
        checkpoint, remaining_bytes = self.job.checkpoint, self.job.checkpoint.bytes(name)
        with (checkpoint.folder / checkpoint.file_of[name]).open(
            "rb", buffering=0
        ) as source_stream:
            source_stream.seek(checkpoint.start(name))
            while remaining_bytes:
                block = source_stream.read(min(remaining_bytes, BLOCK_BYTES))
                if not block:
                    raise CheckpointError(
                        f"{checkpoint.file_of[name]}, which became shorter while it was read",
                        "the base as it was",
                        "let nobody write to it meanwhile",
                    )
                target_stream.write(block)
                remaining_bytes -= len(block)


@contextmanager
def _worker_pool() -> Iterator[ThreadPoolExecutor]:
    """A context with a pool of worker threads, among which torch's intra-op threads are divided.
    When the context ends, it waits for the tensors that workers have begun. The tensors that no
    worker has begun are dropped, which happens only after an error."""
    thread_count = torch.get_num_threads()
    worker_count = min(thread_count, MAX_WORKERS)
    threads_per_worker = math.ceil(thread_count / worker_count)
    pool = ThreadPoolExecutor(worker_count, "veneer-merge", _limit_threads, (threads_per_worker,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # The workers have changed the number of intra-op threads that torch gives to each thread
        # that starts later, because it is the number last set in any thread. So set it back.
        torch.set_num_threads(thread_count)


def _limit_threads(thread_count: int) -> None:
    # The first call of get_num_threads in a thread overwrites the thread's own setting with the
    # number that was last set in any thread. So make this call before the setting below.
    torch.get_num_threads()
    torch.set_num_threads(thread_count)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as a uint8 tensor [number of bytes]; without a copy if the tensor is
    contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
