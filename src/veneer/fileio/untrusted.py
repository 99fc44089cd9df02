"""Reading untrusted files: headers of safetensors files, JSON, and the locations of a folder's
files.

    8 bytes          n, the length of the header, little-endian
    n bytes          {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
                      "__metadata__": {…}}
    the rest         the tensors' bytes, each tensor in its own range, without gaps

The header is not trusted: every offset and size is compared with the size of the file before memory
is allocated for it. Layout: https://github.com/huggingface/safetensors.

The safetensors library refuses most invalid files, but its errors name neither the file nor the
tensor. JSON has further risks: duplicate keys, NaN, numbers with a million digits, and lists nested
so deeply that a parser overflows the stack.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError, listing, sentence
from veneer.fileio.throttle import throttle

#: dtype name of the format -> bits per value
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
#: bytes of a header (the limit of the safetensors library), and of all strings in its metadata
MAX_HEADER, MAX_METADATA = 100_000_000, 16 * 2**20
#: bytes of a JSON file, its depth, and its commas, colons and brackets (a list of empty lists takes
#: thirty times more memory than its text)
MAX_JSON, MAX_DEPTH, MAX_MARKS = 16 * 2**20, 64, 1_000_000
#: characters of a tensor's name, and number of its axes
MAX_NAME, MAX_AXES = 512, 64
#: values of a tensor: more cannot be addressed
MAX_COUNT = 2**63 - 1

#: files that hold an adapter's tensors as a pickle
PICKLES = tuple(
    f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "ckpt", "pkl", "pickle")
)
_MAGIC_NUMBERS = {
    b"PK\x03\x04": (
        "a zip archive, as torch.save writes one: a pickle, which runs code when it is read"
    ),
    b"version https://": "a pointer of Git LFS, not the file that it points to (run git lfs pull)",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MARKS = (b",", b":", b"[", b"{")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; its data are the bytes [start, stop), counted from
    ``Header.data_start``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, validated against the file's size."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | Path) -> Header:
    """Read and validate the header of a safetensors file, without the tensors' data.

    Raises:
        AdapterError: the header is invalid; names the file and each tensor that does not fit into
            it.
        OSError: the file cannot be read."""
    path = Path(path)
    if not path.is_file():  # opening a pipe or a device could wait forever
        raise AdapterError(_unreadable(path, "it is no regular file"))
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(16)
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER) or head[8:9] != b"{":
            raise AdapterError(_unreadable(path, _not_a_header(head, size, length)))
        stream.seek(8)
        raw = stream.read(length)
    try:
        content = parse(raw)
    except ValueError as error:
        raise AdapterError(_unreadable(path, f"its header is not JSON: {error}")) from error
    metadata = content.pop("__metadata__", {})
    tensors = {
        name: _entry(name, claim, size - 8 - length) for name, claim in throttle(content.items())
    }
    wrong = [claim for claim in tensors.values() if isinstance(claim, str)]
    problems = [_metadata_problem(metadata), *(wrong or [_gap(tensors, size - 8 - length)])]
    if any(problems):
        raise AdapterError(_unreadable(path, listing(filter(None, problems), 3)))
    return Header(tensors, metadata, 8 + length)  # pyright: ignore[reportArgumentType]


def _unreadable(path: Path, why: str) -> str:
    return sentence(
        f"{path} cannot be read ({why})", "a whole safetensors file", "get the file again"
    )


def _not_a_header(head: bytes, size: int, length: int) -> str:
    format_name = describe_format(head)
    if format_name:
        return f"it is {format_name}"
    if size < 8:
        return f"it has {size} bytes, and is cut short"
    if length > MAX_HEADER:
        return f"its header claims {length:,} bytes, of {MAX_HEADER:,} at most"
    if length > size - 8:
        claim = f"its header claims {length:,} bytes in a file of {size:,}"
        return f"{claim}: it is cut short, or no safetensors file"
    return "its header does not begin with {"


def describe_format(head: bytes) -> str | None:
    """Describe a file's format by its first bytes, for formats that are mistaken for safetensors;
    None for all others."""
    if (
        head[:1] == b"\x80"
        and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        and head[2:8] != bytes(6)
    ):
        return "a pickle, which runs code when it is read"
    return next((words for start, words in _MAGIC_NUMBERS.items() if head.startswith(start)), None)


def _metadata_problem(metadata: Any) -> str | None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        return "its __metadata__ is no mapping of text to text"
    size = sum(len(key) + len(value) for key, value in metadata.items())
    return (
        f"its __metadata__ has {size:,} characters, of {MAX_METADATA:,} at most"
        if size > MAX_METADATA
        else None
    )


def _entry(name: str, claim: Any, size: int) -> Entry | str:
    """Validate the header's entry of one tensor; return it, or a description of the problem.

    ``size`` is the number of data bytes in the file."""
    tensor = f"tensor {name[:80]!r}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        return (
            f"{tensor} has a name that is empty, longer than {MAX_NAME} characters or not printable"
        )
    if not isinstance(claim, dict) or claim.keys() != _FIELDS:
        return f"{tensor} is not described by dtype, shape and data_offsets alone"
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"{tensor} has the unknown dtype {str(dtype)[:40]!r}"
    if not _counts(shape) or len(shape) > MAX_AXES:
        return f"{tensor} has a shape that is no list of at most {MAX_AXES} whole numbers"
    if not _counts(offsets) or len(offsets) != 2:
        return f"{tensor} has data_offsets that are no two whole numbers"
    start, stop = offsets
    if not start <= stop <= size:
        return f"{tensor} claims the bytes {start:,} to {stop:,} of {size:,}"
    # strides are computed of an empty tensor too
    if math.prod(axis or 1 for axis in shape) > MAX_COUNT:
        return f"{tensor} has a shape {_short(shape)} that no memory can hold"
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (stop - start):
        expected = f"{-(-bits // 8):,} by its shape {_short(shape)} of {dtype}"
        return f"{tensor} claims {stop - start:,} bytes, and {expected}"
    return Entry(dtype, tuple(shape), start, stop)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _short(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"[{', '.join(map(str, shape[:8]))}, …]"


def _gap(tensors: Mapping[str, Any], size: int) -> str | None:
    """Describe the first overlap of two tensors, or the first bytes of no tensor; None if there are
    none."""
    end, previous = 0, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            return f"tensor {name!r} overlaps {previous}"
        if entry.start > end:
            return f"{entry.start - end:,} bytes before tensor {name!r} belong to none"
        end, previous = entry.stop, f"tensor {name!r}"
    return f"{size - end:,} bytes behind {previous} belong to none" if end != size else None


def parse(text: str | bytes) -> Any:
    """Parse JSON (ASCII or UTF-8) more strictly than ``json``.

    Refuses duplicate keys, NaN and infinity, integers beyond 64 bits, and lone surrogates (which
    cannot be written to a file); bounds depth and memory. Raises ValueError with the reason."""
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if len(raw) > MAX_HEADER or sum(map(raw.count, _MARKS)) > MAX_MARKS:
        raise ValueError(f"more than {MAX_MARKS:,} values")
    decoded = raw.decode("utf-8")
    try:
        hooks = {"parse_constant": _finite, "parse_int": _integer, "parse_float": _finite}
        value = json.loads(decoded, object_pairs_hook=_unique, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = (
            container.values() if isinstance(container, dict) else container
            for container in level
            if isinstance(container, dict | list)
        )
        level = [child for children in nested for child in children]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if b"\\ud" in raw or b"\\uD" in raw:
        json.dumps(value, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        visited: set[str] = set()
        twice = next(key for key, _ in pairs if key in visited or visited.add(key))
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return values


def _integer(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else 2**64
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return number


def _finite(digits: str) -> float:
    if digits.endswith(("NaN", "Infinity")):
        raise ValueError(f"{digits}, which is no JSON")
    number = float(digits) if len(digits) <= 400 else float("inf")
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]}, which no float holds")
    return number


def read_json(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json_object(stream.read(MAX_JSON + 1), str(file))


def json_object(text: str | bytes, file: str, do: str = "get the file again") -> dict[str, Any]:
    """Parse a JSON object of at most ``MAX_JSON`` bytes.

    Raises AdapterError, which names the file and the reason, if the text is larger, is not JSON, or
    is not an object. ``do`` is the advice in that error."""
    if len(text) > MAX_JSON:
        raise AdapterError(
            f"{file}, a JSON file of more than {MAX_JSON:,} bytes", "a smaller one", do
        )
    try:
        content = parse(text)
    except ValueError as error:
        raise AdapterError(f"{file}, which is not JSON ({error})", "a JSON object", do) from error
    if not isinstance(content, dict):
        raise AdapterError(f"{file}, a JSON {type(content).__name__}", "a JSON object", do)
    return content


def location_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the problems of files that are neither regular files in the folder nor links to such.

    One exception: ``huggingface_hub`` stores ``models--…/snapshots/<revision>/file`` as a link into
    ``models--…/blobs``, so files of a snapshot may be in the blobs of the same repository."""
    folders, problems = _allowed_folders(folder), []
    for name in names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        real = Path(os.path.realpath(file))
        if not any(real.is_relative_to(parent) for parent in folders):
            problem = f"{file}, a link to {real}, which lies outside the folder"
            problems.append(
                sentence(
                    problem, "files of the folder's own", "put a copy of the file in its place"
                )
            )
        elif not file.is_file():
            mode = real.stat().st_mode if real.exists() else 0
            kind = (
                "a folder"
                if stat.S_ISDIR(mode)
                else "no regular file"
                if mode
                else "a link to nothing"
            )
            problems.append(sentence(f"{file}, {kind}", "a regular file", "get the folder again"))
    return problems


def _allowed_folders(folder: Path) -> list[Path]:
    real = Path(os.path.realpath(folder))
    cached = (
        above.parent.parent for above in (real, *real.parents) if above.parent.name == "snapshots"
    )
    return [
        real,
        *(repository / "blobs" for repository in cached if repository.name.startswith("models--")),
    ]


def pickle_problems(folder: Path) -> list[str]:
    """Return a problem if the folder contains pickles of an adapter. No pickle is opened."""
    names = [name for name in PICKLES if os.path.lexists(folder / name)]
    problem = (
        f"{', '.join(names)} in {folder}: a pickle, "
        "which runs whatever code its author put into it when it is read"
    )
    do = (
        "remove it if adapter_model.safetensors is there; if not, and you trust its author, "
        "let PEFT write it anew (PeftModel.from_pretrained, then save_pretrained)"
    )
    return [sentence(problem, "tensors as adapter_model.safetensors alone", do)] if names else []
