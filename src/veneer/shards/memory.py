"""The memory that tensors lie in between reading and writing: bounded, and used again.

    take(counts)  ->  leases: so many bytes each, and a buffer of that size at least        give(lease, what lies in it)

A buffer that was given back serves the next tensor that fits. Fresh memory costs the system a fault for each page of
it and zeros that nobody reads, as much time as the bytes take to copy. Rejected:
telling malloc to keep what is freed, which is a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lease:
    """``size`` bytes that one may use, beginning at ``address``. Who wants the buffer pops it from ``lent``; who needs
    another memory of that size instead takes it out and forgets it."""

    size: int
    address: int
    lent: list[Tensor]

    def holds(self, one: Tensor) -> bool:
        """Whether a tensor lies in the buffer."""
        whole = one.untyped_storage()
        return whole.data_ptr() == self.address and whole.nbytes() == self.size


class Memory:
    """``limit`` bytes; who wants more waits. What lies free counts as well, and makes way."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._free: list[Tensor] = []  # by size
        self._changed = threading.Condition()

    def take(self, counts: Sequence[int], stopped: threading.Event) -> list[Lease]:
        """Buffers of at least so many bytes [size], with whatever is in them. What is larger than the limit goes
        alone."""
        with self._changed:
            while self.used and self.used + sum(counts) > self.limit and not stopped.is_set():
                self._changed.wait(0.1)
            buffers = self._fitting(counts)
            self.used += sum(map(len, buffers))
            while self._free and self.used + sum(map(len, self._free)) > self.limit:
                del self._free[0]
            return [Lease(len(one), one.data_ptr(), [one]) for one in buffers]

    def _fitting(self, counts: Sequence[int]) -> list[Tensor]:
        """Free buffers, the smallest that do, and new ones, which take no memory until they are written."""
        left, buffers = list(self._free), []
        for count in counts:
            at = next((at for at, one in enumerate(left) if len(one) >= count), None)
            buffers.append(_new(count) if at is None else left.pop(at))
        if self.used + sum(map(len, buffers)) > self.limit:  # too much of them would lie idle
            return [_new(count) for count in counts]
        self._free = left
        return buffers

    def give(self, lease: Lease, lies: Tensor | None) -> None:
        """Give back what was taken. Where ``lies``, of which nobody reads any more, is in its buffer, that serves
        again."""
        with self._changed:
            self.used -= lease.size
            if lies is not None and lease.holds(lies):
                self._free.append(torch.empty(0, dtype=torch.uint8, device="cpu").set_(lies.untyped_storage()))
                self._free.sort(key=len)
            self._changed.notify_all()


def _new(count: int) -> Tensor:
    """From the system itself, which gets it back at once; malloc keeps a part of what is freed. In large pages where
    there are some, of which each is one fault."""
    if not count:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
