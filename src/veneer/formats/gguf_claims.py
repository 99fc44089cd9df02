"""Check the sizes that the header of a GGUF file claims against the size of the file, before any
tensor is read.

    header      "GGUF", version u32, number of tensors u64, number of key-value pairs u64
    pair        key (its length u64, then its bytes), type u32, value (encoded by its type)
    tensor      name (encoded like a key), number of axes u32, a size u64 for each axis, type u32,
                offset u64
    data        the values of the tensors, from the next multiple of the alignment on

The gguf package trusts these sizes: if a file claims an array of 2⁶⁰ values, the package reads on
past the end of the file until memory is full. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from veneer.errors import AdapterError

#: the bytes of one value, by GGUF's number of the value's type
BYTES_BY_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
#: GGUF's numbers of the value types string and array
TEXT_TYPE, ARRAY_TYPE = 8, 9
#: the largest total of pairs, tensors and array values in an adapter's file: the gguf package makes
#: a Python object for each of them
MAX_COUNT = 100_000
#: the largest such total in a model's file, which stores its vocabulary in several arrays
MAX_MODEL_COUNT = 2_000_000
MAX_AXES = 4


def check(path: Path, max_count: int = MAX_COUNT) -> None:
    """Check all sizes in the header of the GGUF file ``path``. ``AdapterError``: the file is
    truncated, has an unknown version or type, or claims more than its size allows, or more than
    ``max_count`` pairs, tensors and array values in total."""
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file_bytes,
        ):
            _check_header(file_bytes, max_count)
    except (ValueError, struct.error) as error:  # mmap raises ValueError for an empty file
        reason = "it ends within its header" if isinstance(error, struct.error) else str(error)
        raise AdapterError(
            f"{path}, which cannot be read as GGUF ({reason})",
            "a whole GGUF file",
            "get the file again",
        ) from error


def _check_header(file_bytes: mmap.mmap, max_count: int) -> None:
    version, tensor_count, pair_count = struct.unpack_from("<IQQ", file_bytes, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, of which 2 and 3 are known, of little-endian files")
    offset, remaining_count = 24, _subtract_count(max_count, pair_count + tensor_count, file_bytes)
    for _ in range(pair_count):
        offset = _skip_text(file_bytes, offset)
        (type_number,) = struct.unpack_from("<I", file_bytes, offset)
        offset, remaining_count = _skip_value(file_bytes, offset + 4, type_number, remaining_count)
    for _ in range(tensor_count):
        offset = _skip_text(file_bytes, offset)
        (axis_count,) = struct.unpack_from("<I", file_bytes, offset)
        if axis_count > MAX_AXES:
            raise ValueError(f"a tensor of {axis_count:,} axes, of {MAX_AXES} at most")
        sizes = struct.unpack_from(f"<{axis_count}Q", file_bytes, offset + 4)
        if math.prod(sizes) > 8 * len(file_bytes):  # the smallest type has one bit per number
            raise ValueError(f"a tensor of {list(sizes)} numbers in {len(file_bytes):,} bytes")
        offset = _checked_end(file_bytes, offset + 4 + 8 * axis_count, 12)


def _subtract_count(remaining_count: int, count: int, file_bytes: mmap.mmap) -> int:
    """``remaining_count``, the number of values that a file may still claim, less ``count``.
    ``ValueError``: ``count`` exceeds ``remaining_count`` or the file's number of bytes."""
    if count > min(remaining_count, len(file_bytes)):
        raise ValueError(
            f"it claims {count:,} values in {len(file_bytes):,} bytes, of {remaining_count:,} that"
            " may be left"
        )
    return remaining_count - count


def _skip_text(file_bytes: mmap.mmap, offset: int) -> int:
    """The offset behind a text whose length field begins at ``offset``. ``ValueError``: the text
    ends past the end of the file."""
    (length,) = struct.unpack_from("<Q", file_bytes, offset)
    return _checked_end(file_bytes, offset + 8, length)


def _checked_end(file_bytes: mmap.mmap, offset: int, size: int) -> int:
    """The offset behind ``size`` bytes. ``ValueError``: it lies past the end of the file."""
    if size > len(file_bytes) - offset:
        raise ValueError(
            f"it claims {size:,} bytes where {max(0, len(file_bytes) - offset):,} are left"
        )
    return offset + size


def _skip_value(
    file_bytes: mmap.mmap, offset: int, type_number: int, remaining_count: int
) -> tuple[int, int]:
    """(the offset behind a value of this type, the number of values that the file may still claim:
    ``remaining_count`` less the values of an array)."""
    if type_number in BYTES_BY_TYPE:
        return _checked_end(file_bytes, offset, BYTES_BY_TYPE[type_number]), remaining_count
    if type_number == TEXT_TYPE:
        return _skip_text(file_bytes, offset), remaining_count
    if type_number != ARRAY_TYPE:
        raise ValueError(f"a value of the unknown type {type_number}")
    element_type, count = struct.unpack_from("<IQ", file_bytes, offset)
    offset, remaining_count = offset + 12, _subtract_count(remaining_count, count, file_bytes)
    if element_type in BYTES_BY_TYPE:
        return _checked_end(
            file_bytes, offset, count * BYTES_BY_TYPE[element_type]
        ), remaining_count
    if element_type != TEXT_TYPE:
        raise ValueError(f"an array of the type {element_type}")
    for _ in range(count):
        offset = _skip_text(file_bytes, offset)
    return offset, remaining_count
