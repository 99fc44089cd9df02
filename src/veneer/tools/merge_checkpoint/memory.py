"""The memory that tensors lie in between reading and writing: bounded, and used again.

    ahead(count, later)  ->  lease: so many bytes for what is read, and a buffer of that size at least
    take()               ->  lease: the ``later`` bytes that the first of those who read ahead still wants
    give(lease, what lies in it)

What is read ahead waits for its result's memory, and so must leave room for the largest of these. So two large tensors
and a result can be there, one read while the other is computed, where two of each would be too much.

A buffer that was given back serves the next tensor that fits. Fresh memory costs the system a fault for each page of
it and zeros that nobody reads, as much time as the bytes take to copy. Rejected:
telling malloc to keep what is freed, which is a setting of the whole process.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque
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
    """``limit`` bytes; who wants more waits, and goes alone if it is more than all. What lies free counts as well, and
    makes way."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._waiting: deque[tuple[int, int]] = deque()  # (bytes they have, bytes they want) of those who read ahead
        self._free: list[Tensor] = []  # by size
        self._changed = threading.Condition()

    def ahead(self, count: int, later: int, stopped: threading.Event) -> Lease:
        """A buffer of at least so many bytes, with whatever is in them; ``later`` more will be taken."""
        with self._changed:
            while self.used and self._left(later) < count and not stopped.is_set():
                self._changed.wait(0.1)
            lease = self._lease(count, self._left(later))
            self._waiting.append((lease.size, later))
            return lease

    def take(self, stopped: threading.Event) -> Lease:
        """What the first of those who read ahead wants for its result. It waits for results before it alone, which
        wait for nothing here."""
        with self._changed:
            _, later = self._waiting[0]  # it stays among them while it waits, or others would take what is left to it
            while self.used > self._held() and self.used + later > self.limit and not stopped.is_set():
                self._changed.wait(0.1)
            self._waiting.popleft()
            return self._lease(later, self.limit - self.used)

    def _held(self) -> int:
        """Bytes of those who wait for others."""
        return sum(size for size, _ in self._waiting)

    def _left(self, later: int) -> int:
        """The most that one more may have who wants so much for its result: of what is unused, and of what leaves room
        for any one result once only those are there who wait."""
        result = max([later, *(wanted for _, wanted in self._waiting)])
        return self.limit - max(self.used, self._held() + result)

    def _lease(self, count: int, most: int) -> Lease:
        """A free buffer, the smallest that does, or a new one, which takes no memory until it is written."""
        at = next((at for at, one in enumerate(self._free) if count <= len(one) <= most), None)
        buffer = _new(count) if at is None else self._free.pop(at)
        self.used += len(buffer)
        while self._free and self.used + sum(map(len, self._free)) > self.limit:
            del self._free[0]
        self._changed.notify_all()
        return Lease(len(buffer), buffer.data_ptr(), [buffer])

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
