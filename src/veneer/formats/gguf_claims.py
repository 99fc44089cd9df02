"""What a GGUF file says of its own sizes, compared with its size on the disk before anything is
read by it.

    "GGUF"  version u32   tensors u64   pairs u64
    pair    key, type u32, value                    key: length u64 and its bytes; value: by the type
    tensor  name, axes u32, sizes u64 …, type u32, offset u64
    data    from the next multiple of the alignment on

The gguf package goes by what the file claims: an array of 2⁶⁰ numbers makes it loop and fill the
memory long after the file has ended. Layout:
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
#: pairs, tensors and values of arrays, all together: each costs the gguf package some objects
MAX_COUNT = 100_000
#: the same of a model, whose vocabulary is there as several arrays
MAX_MODEL_COUNT = 2_000_000
MAX_AXES = 4


def check(path: Path, most: int = MAX_COUNT) -> None:
    """Go through everything in front of the numbers. ``AdapterError``: the file is cut short, or
    claims what its size does not allow. ``most``: pairs, tensors and values of arrays."""
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _check(data, most)
    except (ValueError, struct.error) as error:  # of an empty file too
        why = "it ends within its header" if isinstance(error, struct.error) else str(error)
        found = f"{path}, which cannot be read as GGUF ({why})"
        raise AdapterError(found, "a whole GGUF file", "get the file again") from error


def _check(data: mmap.mmap, most: int) -> None:
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, of which 2 and 3 are known, of little-endian files")
    at, left = 24, _spent(most, pairs + tensors, data)
    for _ in range(pairs):
        at = _text(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        at, left = _value(data, at + 4, kind, left)
    for _ in range(tensors):
        at = _text(data, at)
        (axes,) = struct.unpack_from("<I", data, at)
        if axes > MAX_AXES:
            raise ValueError(f"a tensor of {axes:,} axes, of {MAX_AXES} at most")
        sizes = struct.unpack_from(f"<{axes}Q", data, at + 4)
        if math.prod(sizes) > 8 * len(data):  # no type has less than a bit for a number
            raise ValueError(f"a tensor of {list(sizes)} numbers in {len(data):,} bytes")
        at = _within(data, at + 4 + 8 * axes, 12)


def _spent(left: int, count: int, data: mmap.mmap) -> int:
    if count > min(left, len(data)):
        raise ValueError(
            f"it claims {count:,} values in {len(data):,} bytes, of {left:,} that may be left"
        )
    return left - count


def _text(data: mmap.mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    return _within(data, at + 8, length)


def _within(data: mmap.mmap, at: int, size: int) -> int:
    if size > len(data) - at:
        raise ValueError(f"it claims {size:,} bytes where {max(0, len(data) - at):,} are left")
    return at + size


def _value(data: mmap.mmap, at: int, kind: int, left: int) -> tuple[int, int]:
    """(where a value ends, how many may follow)."""
    if kind in SIZES:
        return _within(data, at, SIZES[kind]), left
    if kind == TEXT:
        return _text(data, at), left
    if kind != ARRAY:
        raise ValueError(f"a value of the unknown type {kind}")
    inner, count = struct.unpack_from("<IQ", data, at)
    at, left = at + 12, _spent(left, count, data)
    if inner in SIZES:
        return _within(data, at, count * SIZES[inner]), left
    if inner != TEXT:
        raise ValueError(f"an array of the type {inner}")
    for _ in range(count):
        at = _text(data, at)
    return at, left
