"""Read untrusted headers of safetensors files and untrusted JSON, and check that the files of a
folder lie in the folder.

    8 bytes          n, the length of the header in bytes, little-endian
    n bytes          {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …,
                      "__metadata__": {…}}
    the data         the tensors' bytes, each tensor in its own range, without gaps

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
BITS_PER_VALUE = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
#: the largest accepted header, in bytes (the limit of the safetensors library), and the most
#: characters of its metadata, keys and values together
MAX_HEADER_BYTES, MAX_METADATA_CHARACTERS = 100_000_000, 16 * 2**20
#: the largest accepted JSON file, in bytes; its deepest nesting; and the most commas, colons and
#: opening brackets in it. Their number estimates the number of values, which is limited because a
#: list of empty lists takes thirty times more memory than its text.
MAX_JSON_BYTES, MAX_DEPTH, MAX_SEPARATORS = 16 * 2**20, 64, 1_000_000
#: the most characters of a tensor's name, and the most axes of a tensor
MAX_NAME_CHARACTERS, MAX_AXES = 512, 64
#: the most values of a tensor: more cannot be addressed
MAX_NUMEL = 2**63 - 1

#: files that hold an adapter's tensors as a pickle
PICKLES = tuple(
    f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "ckpt", "pkl", "pickle")
)
#: first bytes of a file -> what it is
_MAGIC_NUMBERS = {
    b"PK\x03\x04": (
        "a zip archive, as torch.save writes one: a pickle, which runs code when it is read"
    ),
    b"version https://": "a pointer of Git LFS, not the file that it points to (run git lfs pull)",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}
_TENSOR_FIELDS = {"dtype", "shape", "data_offsets"}
_SEPARATORS = (b",", b":", b"[", b"{")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. Its data are the bytes [start, stop), counted from the end of the
    header, which is ``Header.data_start``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The validated header of a safetensors file. ``data_start``: the offset in the file at which
    the tensors' data begin, in bytes."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: str | Path) -> Header:
    """Read and validate the header of a safetensors file, without the tensors' data.

    Raises:
        AdapterError: the header is invalid. The error names the file, and the tensors whose entries
            are invalid.
        OSError: the file cannot be read."""
    path = Path(path)
    if not path.is_file():  # opening a pipe or a device could wait forever
        raise AdapterError(_unreadable(path, "it is no regular file"))
    with path.open("rb") as stream:
        file_size = os.fstat(stream.fileno()).st_size
        first_bytes = stream.read(16)
        header_length = int.from_bytes(first_bytes[:8], "little")
        is_too_long = header_length > min(file_size - 8, MAX_HEADER_BYTES)
        if file_size < 8 or is_too_long or first_bytes[8:9] != b"{":
            reason = _not_a_header(first_bytes, file_size, header_length)
            raise AdapterError(_unreadable(path, reason))
        stream.seek(8)
        header_json = stream.read(header_length)
    try:
        content = parse(header_json)
    except ValueError as error:
        raise AdapterError(_unreadable(path, f"its header is not JSON: {error}")) from error
    metadata = content.pop("__metadata__", {})
    data_size = file_size - 8 - header_length
    tensors = {
        name: _validate_entry(name, claim, data_size) for name, claim in throttle(content.items())
    }
    tensor_problems = [entry for entry in tensors.values() if isinstance(entry, str)]
    problems = [
        _metadata_problem(metadata),
        *(tensor_problems or [_layout_problem(tensors, data_size)]),
    ]
    if any(problems):
        raise AdapterError(_unreadable(path, listing(filter(None, problems), 3)))
    return Header(tensors, metadata, 8 + header_length)  # pyright: ignore[reportArgumentType]


def _unreadable(path: Path, reason: str) -> str:
    return sentence(
        f"{path} cannot be read ({reason})", "a whole safetensors file", "get the file again"
    )


def _not_a_header(first_bytes: bytes, file_size: int, header_length: int) -> str:
    """Return the reason why a file does not begin with a header of safetensors."""
    format_name = describe_format(first_bytes)
    if format_name:
        return f"it is {format_name}"
    if file_size < 8:
        return f"it has {file_size} bytes, and is cut short"
    if header_length > MAX_HEADER_BYTES:
        return f"its header claims {header_length:,} bytes, of {MAX_HEADER_BYTES:,} at most"
    if header_length > file_size - 8:
        claim_text = f"its header claims {header_length:,} bytes in a file of {file_size:,}"
        return f"{claim_text}: it is cut short, or no safetensors file"
    return "its header does not begin with {"


def describe_format(first_bytes: bytes) -> str | None:
    """Describe a file's format by its first bytes, if it is a format that users mistake for
    safetensors (a pickle, a zip archive, a Git LFS pointer, GGUF, HTML); otherwise return None."""
    pickle_protocols = (b"\x02", b"\x03", b"\x04", b"\x05")
    is_pickle = first_bytes[:1] == b"\x80" and first_bytes[1:2] in pickle_protocols
    if is_pickle and first_bytes[2:8] != bytes(6):
        return "a pickle, which runs code when it is read"
    return next(
        (
            description
            for magic_bytes, description in _MAGIC_NUMBERS.items()
            if first_bytes.startswith(magic_bytes)
        ),
        None,
    )


def _metadata_problem(metadata: Any) -> str | None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        return "its __metadata__ is no mapping of text to text"
    text_length = sum(len(key) + len(value) for key, value in metadata.items())
    return (
        f"its __metadata__ has {text_length:,} characters, of {MAX_METADATA_CHARACTERS:,} at most"
        if text_length > MAX_METADATA_CHARACTERS
        else None
    )


def _validate_entry(name: str, claim: Any, data_size: int) -> Entry | str:
    """Validate ``claim``, the header's entry of one tensor. Return an ``Entry``, or a description
    of the problem.

    ``data_size`` is the number of bytes of tensor data in the file."""
    label = f"tensor {name[:80]!r}"
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        return (
            f"{label} has a name that is empty, longer than {MAX_NAME_CHARACTERS} characters or"
            " not printable"
        )
    if not isinstance(claim, dict) or claim.keys() != _TENSOR_FIELDS:
        return f"{label} is not described by dtype, shape and data_offsets alone"
    dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_PER_VALUE:
        return f"{label} has the unknown dtype {str(dtype)[:40]!r}"
    if not _are_counts(shape) or len(shape) > MAX_AXES:
        return f"{label} has a shape that is no list of at most {MAX_AXES} whole numbers"
    if not _are_counts(offsets) or len(offsets) != 2:
        return f"{label} has data_offsets that are no two whole numbers"
    start, stop = offsets
    if not start <= stop <= data_size:
        return f"{label} claims the bytes {start:,} to {stop:,} of {data_size:,}"
    # An axis of size 0 counts as 1: torch computes the strides of an empty tensor, too, and they
    # would overflow if the other axes were too large.
    if math.prod(axis or 1 for axis in shape) > MAX_NUMEL:
        return f"{label} has a shape {_shorten(shape)} that no memory can hold"
    bits = math.prod(shape) * BITS_PER_VALUE[dtype]
    if bits != 8 * (stop - start):
        expected = f"{-(-bits // 8):,} by its shape {_shorten(shape)} of {dtype}"
        return f"{label} claims {stop - start:,} bytes, and {expected}"
    return Entry(dtype, tuple(shape), start, stop)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(count) is int and count >= 0 for count in value)


def _shorten(shape: list[int]) -> str:
    return str(shape) if len(shape) <= 8 else f"[{', '.join(map(str, shape[:8]))}, …]"


def _layout_problem(tensors: Mapping[str, Any], data_size: int) -> str | None:
    """Describe the first overlap of two tensors, or the first bytes that belong to no tensor;
    return None if every byte belongs to one tensor."""
    end_offset, previous_text = 0, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end_offset:
            return f"tensor {name!r} overlaps {previous_text}"
        if entry.start > end_offset:
            return f"{entry.start - end_offset:,} bytes before tensor {name!r} belong to none"
        end_offset, previous_text = entry.stop, f"tensor {name!r}"
    if end_offset != data_size:
        return f"{data_size - end_offset:,} bytes behind {previous_text} belong to none"
    return None


def parse(text: str | bytes) -> Any:
    """Parse JSON (ASCII or UTF-8) more strictly than ``json``.

    It refuses duplicate keys, NaN and infinity, integers beyond 64 bits, lone surrogates (which
    UTF-8 cannot encode), nesting beyond ``MAX_DEPTH``, and texts that would take too much memory
    (``MAX_SEPARATORS``). Raises ValueError with the reason.
    """
    json_bytes = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    if (
        len(json_bytes) > MAX_HEADER_BYTES
        or sum(map(json_bytes.count, _SEPARATORS)) > MAX_SEPARATORS
    ):
        raise ValueError(f"more than {MAX_SEPARATORS:,} values")
    try:
        value = json.loads(
            json_bytes.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_parse_float,
            parse_int=_parse_integer,
            parse_float=_parse_float,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    nested_values = [value]  # all values at one depth; each step of the loop goes one level deeper
    for _ in range(MAX_DEPTH + 1):
        nested = (
            container.values() if isinstance(container, dict) else container
            for container in nested_values
            if isinstance(container, dict | list)
        )
        nested_values = [child for children in nested for child in children]
    if nested_values:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if b"\\ud" in json_bytes or b"\\uD" in json_bytes:
        # this raises UnicodeEncodeError, a ValueError, if there is a lone surrogate
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        visited_keys: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in visited_keys or visited_keys.add(key))
        raise ValueError(f"the key {duplicate[:80]!r} is there twice")
    return values


def _parse_integer(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else 2**64
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return number


def _parse_float(digits: str) -> float:
    if digits.endswith(("NaN", "Infinity")):
        raise ValueError(f"{digits}, which is no JSON")
    number = float(digits) if len(digits) <= 400 else float("inf")
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]}, which no float holds")
    return number


def read_json(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json_object(stream.read(MAX_JSON_BYTES + 1), str(file))


def json_object(text: str | bytes, file: str, do: str = "get the file again") -> dict[str, Any]:
    """Parse a JSON object of at most ``MAX_JSON_BYTES`` bytes.

    Raises AdapterError, which names ``file`` and the reason, if the text is larger, is not JSON, or
    is not an object. ``do`` is the advice in the error."""
    if len(text) > MAX_JSON_BYTES:
        raise AdapterError(
            f"{file}, a JSON file of more than {MAX_JSON_BYTES:,} bytes", "a smaller one", do
        )
    try:
        content = parse(text)
    except ValueError as error:
        raise AdapterError(f"{file}, which is not JSON ({error})", "a JSON object", do) from error
    if not isinstance(content, dict):
        raise AdapterError(f"{file}, a JSON {type(content).__name__}", "a JSON object", do)
    return content


def location_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """Return an error text for each file in ``names`` that is neither a regular file in the folder
    nor a link to a regular file in the folder. Missing files are accepted.

    One exception: ``huggingface_hub`` stores ``models--…/snapshots/<revision>/file`` as a link into
    ``models--…/blobs``, so files of a snapshot may be in the blobs of the same repository."""
    allowed_folders, problems = _allowed_folders(folder), []
    for name in names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        target_path = Path(os.path.realpath(file))
        if not any(target_path.is_relative_to(parent) for parent in allowed_folders):
            problems.append(
                sentence(
                    f"{file}, a link to {target_path}, which lies outside the folder",
                    "files of the folder's own",
                    "put a copy of the file in its place",
                )
            )
        elif not file.is_file():
            target_mode = target_path.stat().st_mode if target_path.exists() else 0
            file_type = (
                "a folder"
                if stat.S_ISDIR(target_mode)
                else "no regular file"
                if target_mode
                else "a link to nothing"
            )
            problems.append(
                sentence(f"{file}, {file_type}", "a regular file", "get the folder again")
            )
    return problems


def _allowed_folders(folder: Path) -> list[Path]:
    """The folders in which the files of ``folder`` may lie: the folder itself and, for a snapshot
    in the cache of ``huggingface_hub``, the folder ``blobs`` of its repository."""
    folder = Path(os.path.realpath(folder))
    repository_folders = (
        snapshot_folder.parent.parent
        for snapshot_folder in (folder, *folder.parents)
        if snapshot_folder.parent.name == "snapshots"
    )
    return [
        folder,
        *(path / "blobs" for path in repository_folders if path.name.startswith("models--")),
    ]


def pickle_problems(folder: Path) -> list[str]:
    """Return one error text if the folder contains an adapter's pickles, else an empty list. No
    pickle is opened."""
    names = [name for name in PICKLES if os.path.lexists(folder / name)]
    problem = (
        f"{', '.join(names)} in {folder}: a pickle, "
        "which runs whatever code its author put into it when it is read"
    )
    advice = (
        "remove it if adapter_model.safetensors is there; if not, and you trust its author, "
        "let PEFT write it anew (PeftModel.from_pretrained, then save_pretrained)"
    )
    return (
        [sentence(problem, "tensors as adapter_model.safetensors alone", advice)] if names else []
    )
