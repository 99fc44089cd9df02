"""Check the sizes that a GGUF file claims against its size on disk, before any tensor is read.

    "GGUF"  version u32   tensors u64   pairs u64
    pair    key, type u32, value                    key: length u64 and its bytes; value: by the
                                                    type
    tensor  name, axes u32, sizes u64 …, type u32, offset u64
    data    from the next multiple of the alignment on

The gguf package trusts these sizes: a claimed array of 2⁶⁰ numbers makes it loop and fill the
memory long after the end of the file. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from veneer.errors import AdapterError

#: bytes of one value, by the type's number
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
#: the most pairs, tensors and array values in total: the gguf package creates objects for each
MAX_COUNT = 100_000
#: the same for a model, whose vocabulary is stored in several arrays
MAX_MODEL_COUNT = 2_000_000
MAX_AXES = 4


def check(path: Path, most: int = MAX_COUNT) -> None:
    """Check everything before the tensors' data. ``AdapterError``: the file is truncated, or claims
    sizes that exceed it. ``most``: the largest total of pairs, tensors and array values."""
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _check(data, most)
    except (ValueError, struct.error) as error:  # also raised for an empty file
        why = "it ends within its header" if isinstance(error, struct.error) else str(error)
        problem = f"{path}, which cannot be read as GGUF ({why})"
        raise AdapterError(problem, "a whole GGUF file", "get the file again") from error


def _check(data: mmap.mmap, most: int) -> None:
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, of which 2 and 3 are known, of little-endian files")
    offset, remaining = 24, _subtract_count(most, pairs + tensors, data)
    for _ in range(pairs):
        offset = _text(data, offset)
        (kind,) = struct.unpack_from("<I", data, offset)
        offset, remaining = _value(data, offset + 4, kind, remaining)
    for _ in range(tensors):
        offset = _text(data, offset)
        (axes,) = struct.unpack_from("<I", data, offset)
        if axes > MAX_AXES:
            raise ValueError(f"a tensor of {axes:,} axes, of {MAX_AXES} at most")
        sizes = struct.unpack_from(f"<{axes}Q", data, offset + 4)
        if math.prod(sizes) > 8 * len(data):  # no type has less than a bit per number
            raise ValueError(f"a tensor of {list(sizes)} numbers in {len(data):,} bytes")
        offset = _end_within(data, offset + 4 + 8 * axes, 12)


def _subtract_count(remaining: int, count: int, data: mmap.mmap) -> int:
    if count > min(remaining, len(data)):
        raise ValueError(
            f"it claims {count:,} values in {len(data):,} bytes, of {remaining:,} that may be left"
        )
    return remaining - count


def _text(data: mmap.mmap, offset: int) -> int:
    (length,) = struct.unpack_from("<Q", data, offset)
    return _end_within(data, offset + 8, length)


def _end_within(data: mmap.mmap, offset: int, size: int) -> int:
    if size > len(data) - offset:
        raise ValueError(f"it claims {size:,} bytes where {max(0, len(data) - offset):,} are left")
    return offset + size


def _value(data: mmap.mmap, offset: int, kind: int, remaining: int) -> tuple[int, int]:
    """(offset of the end of a value, remaining count)."""
    if kind in SIZES:
        return _end_within(data, offset, SIZES[kind]), remaining
    if kind == TEXT:
        return _text(data, offset), remaining
    if kind != ARRAY:
        raise ValueError(f"a value of the unknown type {kind}")
    inner, count = struct.unpack_from("<IQ", data, offset)
    offset, remaining = offset + 12, _subtract_count(remaining, count, data)
    if inner in SIZES:
        return _end_within(data, offset, count * SIZES[inner]), remaining
    if inner != TEXT:
        raise ValueError(f"an array of the type {inner}")
    for _ in range(count):
        offset = _text(data, offset)
    return offset, remaining
