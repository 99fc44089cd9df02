"""The memory that tensors lie in between reading and writing: bounded, and used again.

    take(bytes)  ->  buffer(bytes), once or twice within what was taken  ->  give(bytes, buffer)

A buffer that was given back serves the next tensor of its size. Fresh memory costs the system a fault for each page of
it and zeros that nobody reads, as much time as the bytes take to copy; the tensors of a model have few sizes. Rejected:
telling malloc to keep what is freed, which is a setting of the whole process.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Memory:
    """``limit`` bytes; who wants more waits. What lies free counts as well, and makes way."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.free = limit, 0, 0
        self._buffers: dict[int, list[Tensor]] = {}
        self._changed = threading.Condition()

    def take(self, count: int, stopped: threading.Event) -> None:
        """Reserve so many bytes; what is larger than the limit goes alone."""
        with self._changed:
            while self.used and self.used + count > self.limit and not stopped.is_set():
                self._changed.wait(0.1)
            self.used += count
            for size in list(self._buffers):
                while self.free and self.used + self.free > self.limit and self._buffers[size]:
                    self._buffers[size].pop()
                    self.free -= size

    def buffer(self, count: int) -> Tensor:
        """Bytes [count] of what was taken, with whatever was in them."""
        with self._changed:
            if self._buffers.get(count):
                self.free -= count
                return self._buffers[count].pop()
        return torch.empty(count, dtype=torch.uint8, device="cpu")

    def give(self, count: int, buffer: Tensor | None = None) -> None:
        """Give back what was taken, with the buffer that was part of it, in which nothing is read any more."""
        with self._changed:
            self.used -= count
            if buffer is not None:
                self._buffers.setdefault(buffer.numel(), []).append(buffer)
                self.free += buffer.numel()
            self._changed.notify_all()
