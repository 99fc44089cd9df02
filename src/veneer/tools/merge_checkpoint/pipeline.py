"""The work of a merge: while one tensor is computed, the next is read and hashed, and the one
before is written.

    reading ──► tensor ──► computed ──► writing ──► flushing, then a line of the journal
                   └─────► hashing, compared before anything of it is written

A thread each. How many bytes may lie between reading and writing is bounded (``MergeJob.room``):
what would be too much is not read ahead. What no adapter changes is read straight into what is
written.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from veneer.attach.merge_report import LayerMerge
from veneer.errors import CheckpointError
from veneer.kernels.threads import apart
from veneer.models.safetensors_dir import in_order
from veneer.tools.merge_checkpoint.direct_writer import DirectWriter
from veneer.tools.merge_checkpoint.job import MergeJob, computed
from veneer.tools.merge_checkpoint.journal import JOURNAL

#: bytes that are written between two lines of the journal
STEP = 128 * 2**20

#: called as (bytes done, bytes in all, name of the tensor)
Progress = Callable[[int, int, str], object]
# : a tensor that was read, and whether its fingerprint is that of the adapters' base; None for what
# is copied
Loaded = tuple[Tensor, Future[None] | None] | None


class Pipeline:
    """One run of a merge. ``journal`` is what earlier runs have done."""

    def __init__(
        self, job: MergeJob, folder: Path, journal: list[dict[str, Any]], progress: Progress | None
    ) -> None:
        self.job, self.folder, self.progress = job, folder, progress
        self.done = {line["file"]: line["tensors"] for line in journal}
        self.layers = [LayerMerge(*layer) for line in journal for layer in line["layers"]]
        self.resumed = sum(self.done.values())
        self._limit, self._compiled = job.room()
        order = {name: number for number, name in enumerate(job.checkpoint.where)}
        #: the parameters whose fingerprint can be told once a tensor is read, by its name
        self._last_of_each: dict[str, list[str]] = {}
        for path, (tensors, *_) in job.merge_plan.fingerprints.items() if job.verify_base else ():
            self._last_of_each.setdefault(max(tensors, key=order.__getitem__), []).append(path)
        self._reading, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def run(self) -> None:
        """Everything that is left to do. ``BaseMismatchError``, ``MergeError``,
        ``CheckpointError``, ``OSError``: the first that is met; what the journal says is done then,
        is."""
        names = list(self._left())
        starts = {
            name: at
            for file in self.job.checkpoint.files
            for name, at in self.job.layout(file)[1].items()
        }
        with (
            self._reading,
            self._hashing,
            apart(),
            _Writer(self) as writer,
            ThreadPoolExecutor(1) as writing,
        ):
            pending: deque[tuple[int, Future[None]]] = (
                deque()
            )  # bytes of each tensor that is to be written
            ahead = self._reading.submit(self._read, names[0]) if names else None
            for name, following in zip_longest(names, names[1:]):
                loaded = (ahead or self._reading.submit(self._read, name)).result()
                needed = self._bytes(name, both=True) + (self._bytes(following) if following else 0)
                while pending and (
                    pending[0][1].done() or sum(size for size, _ in pending) + needed > self._limit
                ):
                    pending.popleft()[1].result()
                ahead = (
                    self._reading.submit(self._read, following)
                    if following and needed <= self._limit
                    else None
                )
                result, layers = None, []
                if loaded is not None:
                    result, layers = computed(
                        self.job, name, loaded[0], self._compiled, starts[name]
                    )
                if loaded is not None and loaded[1] is not None:
                    loaded[1].result()  # what is not of the base goes no further
                loaded = None
                pending.append(
                    (self._bytes(name), writing.submit(writer.store, name, result, layers))
                )
                result = None
                if ahead is None:
                    pending.pop()[1].result()
            for _, written in pending:
                written.result()

    def _left(self) -> Iterator[str]:
        """The tensors that are not done, in the order of writing."""
        for file, header in self.job.checkpoint.files.items():
            yield from in_order(header)[self.done.get(file, 0) :]

    def _bytes(self, name: str, both: bool = False) -> int:
        """The most that a tensor takes while it is read or written, or (``both``) computed."""
        if self.job.copied(name):
            return 0  # it passes through the writer's buffer
        return (
            self.job.both(name)
            if both
            else max(self.job.checkpoint.bytes(name), self.job.written(name))
        )

    def _read(self, name: str) -> Loaded:
        if self.job.copied(name):
            return None
        tensor = self.job.checkpoint.read(name)
        paths = self._last_of_each.get(name)
        return tensor, self._hashing.submit(
            self.job.compare, paths, {name: tensor}
        ) if paths else None


class _Writer:
    """The files of the result, written one after the other, each from its first byte on or from
    where it was left."""

    def __init__(self, run: Pipeline) -> None:
        self.run, self.job = run, run.job
        self._total = sum(map(run.job.checkpoint.bytes, run.job.checkpoint.where))
        self._passed = self._total - sum(map(run.job.checkpoint.bytes, run._left()))
        self._flushing = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._file, self._target = "", None
        self._since, self._count, self._layers = 0, 0, []
        self._failed: list[BaseException] = []

    def __enter__(self) -> _Writer:
        self._journal = (self.run.folder / JOURNAL).open("a")
        for file, header in self.job.checkpoint.files.items():
            if not header.tensors:
                (self.run.folder / file).write_bytes(self.job.layout(file)[0])
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._journal, self._flushing:
            if self._target is not None:
                self._target.close()
            if self._flushed is not None and kind is None:
                self._flushed.result()

    def store(self, name: str, result: Tensor | None, layers: list[LayerMerge]) -> None:
        """Write the next tensor; None copies it from the base. After one that failed, none is
        written."""
        if self._failed:
            raise self._failed[0]
        try:
            self._store(name, result, layers)
        except BaseException as error:
            self._failed.append(error)
            raise

    def _store(self, name: str, result: Tensor | None, layers: list[LayerMerge]) -> None:
        file, size = self.job.checkpoint.where[name], self.job.checkpoint.bytes(name)
        if file != self._file or self._target is None:
            head, starts = self.job.layout(file)
            self._file, done = (
                file,
                self.run.done.get(file, 0),
            )  # what is behind these was not flushed
            self._target = DirectWriter(self.run.folder / file, starts[name] if done else 0)
            self._target.write(b"" if done else head)
        if result is None:
            self._copy(self._target, name)
        else:
            self._target.write(memoryview(as_bytes(result).numpy().data))
        self._since, self._count, self._layers = (
            self._since + size,
            self._count + 1,
            [*self._layers, *layers],
        )
        last = in_order(self.job.checkpoint.files[file])[-1] == name
        if last or self._since >= STEP:
            self._target.finish() if last else self._target.flush()
            self._flush(self._target.descriptor)
        if last:
            self._target.close()
            self._target = None
        self._passed += size
        if self.run.progress is not None:
            self.run.progress(self._passed, self._total, name)

    def _copy(self, target: DirectWriter, name: str) -> None:
        checkpoint = self.job.checkpoint
        with (checkpoint.folder / checkpoint.where[name]).open("rb", buffering=0) as source:
            source.seek(checkpoint.start(name))
            if target.copy(source, checkpoint.bytes(name)) < checkpoint.bytes(name):
                found = "a file that became shorter while it was read"
                raise CheckpointError(
                    found, "the base as it was", "let nobody write to it meanwhile"
                )

    def _flush(self, target: int) -> None:
        """Let what was written be flushed to the disk, then said in the journal, while the next
        tensors are merged."""
        if self._flushed is not None:
            self._flushed.result()
        line = {
            "file": self._file,
            "tensors": self._count,
            "layers": [astuple(layer) for layer in self._layers],
        }
        self._flushed = self._flushing.submit(
            _flushed, os.dup(target), self._journal, json.dumps(line)
        )
        self.run.layers += self._layers
        self._since, self._count, self._layers = 0, 0, []


def _flushed(target: int, journal: TextIO, line: str) -> None:
    try:
        os.fsync(target)
    finally:
        os.close(target)
    journal.write(line + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
