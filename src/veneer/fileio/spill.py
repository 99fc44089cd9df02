"""Put tensors aside outside of the memory that computes: in the host's, and past a few MiB in a
temporary file.

What is put aside is read again only if something goes wrong, so its place need not be fast: the
file has no name, and is gone with its last reader. Plain reads and writes: the pages of a memory
map would count as the process's memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

#: bytes that stay in memory before the first goes to a file
ROOM = 1 << 20


@dataclass(frozen=True, eq=False)
class Spilled:
    """A tensor in the file of a ``Spill``, from ``offset`` on."""

    spill: Spill
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, in memory of the processor, with the strides that it had. ``OSError``: the
        file cannot be read."""
        size = self.shape.numel() * self.dtype.itemsize
        self.spill.file.seek(self.offset)
        raw = numpy.fromfile(self.spill.file, numpy.uint8, size)
        if len(raw) != size:
            raise OSError(
                f"a temporary file ended at {self.offset + len(raw):,} bytes: something has cut it"
            )
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        return made.copy_(torch.from_numpy(raw).view(self.dtype).view(self.shape))

    def __deepcopy__(self, memo: Any) -> Spilled:
        return self  # nobody writes to it

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.clone, (self.read(),)


class Spill:
    """Where ``put`` leaves its tensors: ``ROOM`` bytes in memory, then a file without a name,
    closed with the last who refers to it. Where none can be written (a disk that is full, or
    read-only), they stay in memory."""

    def __init__(self) -> None:
        self.held = 0
        self.end = 0
        self.file: Any = None

    def put(self, tensor: Tensor) -> Tensor | Spilled:
        """A copy of ``tensor``, which may change afterwards."""
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.numel() == 0:
            return aside(tensor)
        if self.held + tensor.nbytes > ROOM:
            try:
                return self._written(tensor)
            except OSError:
                pass  # as it is without a file: what has been written of it lies past the end, where it harms nobody
        self.held += tensor.nbytes
        return aside(tensor)

    def _written(self, tensor: Tensor) -> Spilled:
        if self.file is None:
            # The usual folder is memory on many systems; /var/tmp is for what is large, unless the
            # user named another.
            named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
            folder = "/var/tmp" if not named and os.access("/var/tmp", os.W_OK) else None
            self.file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
            weakref.finalize(self, self.file.close)
        self.file.seek(self.end)
        tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy().tofile(self.file)
        strides = torch.empty_like(tensor, device="meta").stride()  # as a copy in memory would lie
        made = Spilled(self, self.end, tensor.dtype, tensor.shape, strides)
        self.end += tensor.nbytes
        return made


def aside(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in memory of the processor."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type in ("cpu", "meta") else tensor.to("cpu", copy=True)
