"""Bytes that go to a file one after the other, past the system's cache where it lets them.

What a merge writes is flushed before anybody reads it. Through the cache each byte is copied to fresh pages, which the
system must find, and is written from there later; directly, the disk takes it from here: a tenth of the time of a core,
and the cache keeps the files that are read. Direct writes begin and end at multiples of ``BLOCK``, in the file and in
memory, so bytes are gathered in one buffer, but for those that lie in memory as they will in the file (``lag``), as a
large tensor can: these are written from where they are. Where the file system does not have them, the same writes go
through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

from veneer.errors import CheckpointError, sentence

#: what disks and file systems ask for at most, and bytes that are written at once
BLOCK, ROOM = 1 << 12, 1 << 23
DIRECT = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """A file from byte ``start`` on; what was there is cut off."""

    def __init__(self, path: Path, start: int) -> None:
        self.descriptor = _opened(path)
        pages = mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a page is a multiple of a block
        self._room = memoryview(pages)
        self._first = start // BLOCK * BLOCK  # of the buffer, in the file
        self._filled = start - self._first
        os.ftruncate(self.descriptor, start)
        if self._filled:
            with path.open("rb") as own:
                own.seek(self._first)
                self._room[: self._filled] = own.read(self._filled)

    def write(self, data: memoryview) -> None:
        while len(data):
            large = len(data) >= ROOM and not data.readonly
            if large and not self._filled % BLOCK and not lag(_address(data), 0):
                self._put(self._filled)
                self._first, self._filled = self._first + self._filled, 0
                count = len(data) // BLOCK * BLOCK
                self._put(count, data)
                data, self._first = data[count:], self._first + count
                continue
            count = min(len(data), ROOM - self._filled, -self._filled % BLOCK or ROOM)
            self._room[self._filled : self._filled + count] = data[:count]
            data = data[count:]
            self._more(count)

    def copy(self, source: int, start: int, count: int) -> None:
        """So many bytes of another file.

        Raises:
            CheckpointError: it ends before.
        """
        while count:
            size = min(count, ROOM - self._filled)
            moved = os.preadv(source, [self._room[self._filled : self._filled + size]], start)
            if not moved:
                found = "a file that became shorter while it was read"
                raise CheckpointError(sentence(found, "the base as it was", "let nobody write to it meanwhile"))
            count, start = count - moved, start + moved
            self._more(moved)

    def flush(self) -> None:
        """Hand everything to the system, with zeros up to the end of a block. What follows writes that block again; a
        file that is whole must be cut to its size."""
        whole = -(-self._filled // BLOCK) * BLOCK
        self._room[self._filled : whole] = bytes(whole - self._filled)
        self._put(whole)
        full = self._filled // BLOCK * BLOCK
        self._room[: self._filled - full] = bytes(self._room[full : self._filled])
        self._first, self._filled = self._first + full, self._filled - full

    def close(self) -> None:
        os.close(self.descriptor)

    def _more(self, count: int) -> None:
        self._filled += count
        if self._filled == ROOM:
            self._put(ROOM)
            self._first, self._filled = self._first + ROOM, 0

    def _put(self, count: int, data: memoryview | None = None) -> None:
        """Write so many bytes of the buffer, or of other memory."""
        done, data = 0, self._room if data is None else data
        while done < count:
            try:
                done += os.pwrite(self.descriptor, data[done:count], self._first + done)
            except OSError as error:
                flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & DIRECT:
                    raise
                fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~DIRECT)  # other blocks, or part of one was written


def lag(address: int, place: int) -> int:
    """The bytes from an address on up to one that lies within a block as ``place`` does in the file; 0 for a place
    where no number may lie in memory."""
    return 0 if place % 8 else (place - address) % BLOCK


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
