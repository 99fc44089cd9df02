"""Memory for whole weights, in large pages where the system has them.

A weight that is read or merged gets fresh memory, and the system hands that out a page at a time,
with an interruption each: a tenth of the time of a merge in pages of 4 KiB.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

#: bytes from which on it pays: two of the large pages
LARGE = 1 << 22
HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_bytes(count: int, offset: int = 0) -> Tensor:
    """So many bytes in main memory, [count] in uint8: zeros or whatever lies there. They do not
    grow (no ``resize_``). Many of them begin ``offset`` bytes behind a page, so that they can be
    written there in a file past its cache."""
    if count < LARGE or HUGE is None:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    offset %= mmap.PAGESIZE
    pages = mmap.mmap(-1, offset + count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that was built without them: the same memory, in small pages
        pages.madvise(HUGE)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=offset)
