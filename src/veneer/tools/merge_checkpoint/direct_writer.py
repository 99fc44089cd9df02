"""Bytes that go to a file one after the other, past the system's cache where it lets them.

Direct writes begin and end at multiples of ``BLOCK``, in the file and in memory. Large tensors that
lie as they must (``fileio.pages``) are written from where they are; all else is gathered in one
buffer. Where the file system does not have direct writes, the same writes go through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

#: what disks and file systems ask for at most, and bytes that are written at once
BLOCK, ROOM = 1 << 12, 1 << 23
DIRECT = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """A file from byte ``start`` on; what was there is cut off."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._buffer = memoryview(
            mmap.mmap(-1, ROOM)
        )  # begins at a page, which is a multiple of a block
        self._first = start // BLOCK * BLOCK  # of the buffer, in the file
        self._filled = start - self._first
        with path.open("a+b") as file:
            file.truncate(start)
            file.seek(self._first)
            self._buffer[: self._filled] = file.read()
        self.descriptor = self._open(DIRECT)

    def write(self, data: memoryview | bytes) -> None:
        data = memoryview(data)
        first = -self._filled % BLOCK
        if (
            len(data) > ROOM and (_address(data) + first) % BLOCK == 0
        ):  # as in the file: whole blocks go as they are
            last = first + (len(data) - first) // BLOCK * BLOCK
            self.write(data[:first])
            self.flush()
            self._put(data[first:last], self._first)
            self._first, data = self._first + last - first, data[last:]
        while len(data):
            count = min(len(data), ROOM - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            data = data[count:]
            self._fill(count)

    def copy(self, source: Any, count: int) -> int:
        """The next ``count`` bytes of a file; returns how many were there."""
        left = count
        while left and (
            read := source.readinto(self._buffer[self._filled : min(self._filled + left, ROOM)])
        ):
            left -= read
            self._fill(read)
        return count - left

    def _fill(self, count: int) -> None:
        self._filled += count
        if self._filled == ROOM:
            self._put(self._buffer, self._first)
            self._first, self._filled = self._first + ROOM, 0

    def flush(self) -> None:
        """Hand everything to the system, with zeros up to the end of a block. What follows writes
        that block again."""
        whole = -(-self._filled // BLOCK) * BLOCK
        self._buffer[self._filled : whole] = bytes(whole - self._filled)
        self._put(self._buffer[:whole], self._first)
        full = self._filled // BLOCK * BLOCK
        self._buffer[: self._filled - full] = bytes(self._buffer[full : self._filled])
        self._first, self._filled = self._first + full, self._filled - full

    def finish(self) -> None:
        """As ``flush``, for a file that is whole: it ends where its bytes do."""
        self.flush()
        os.ftruncate(self.descriptor, self._first + self._filled)

    def close(self) -> None:
        os.close(self.descriptor)

    def _put(self, data: memoryview, first: int) -> None:
        done = 0
        while done < len(data):
            os.lseek(self.descriptor, first + done, os.SEEK_SET)
            try:
                done += os.write(self.descriptor, data[done:])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                os.close(
                    self.descriptor
                )  # the file system wants other blocks, or part of one was written
                self.descriptor = self._open(0)

    def _open(self, direct: int) -> int:
        self._direct = direct
        try:
            return os.open(self._path, os.O_RDWR | getattr(os, "O_BINARY", 0) | direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            return self._open(0)


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data
