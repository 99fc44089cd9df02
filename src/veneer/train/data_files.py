"""Readers of local data files: (location, row) pairs and the hash of the file's bytes.

    jsonl ndjson json csv tsv parquet txt  ->  [("line 12", {"prompt": …, "completion": …}), …]

Each format is read by the plainest reader there is (`json`, `csv`, `pyarrow.parquet`): a reader
that guesses types would turn the completion `42` into a number. A `.txt` file holds one example a
line; empty lines are skipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.errors import DataError, nearest
from veneer.models.messages import first_line
from veneer.train.row_shape import snippet

#: folder of the demo data, which `make demo` writes
DEMO = ".demo"


def read_file(path: Path) -> tuple[list[tuple[str, Any]], str]:
    """([(location, row)], sha256 of the bytes) of a data file. Raises `DataError` for a path that
    does not exist, is a folder, has no known suffix, or cannot be read."""
    suffix, folder = path.suffix.lower(), path.parent
    if not path.exists():
        missing = "" if folder.is_dir() else f" (its folder {folder} does not exist either)"
        suggestion = nearest(path.name, [file.name for file in folder.glob("*")])
        do = "run `make demo`, which writes it" if folder.name == DEMO else "check the path"
        raise DataError(
            f"The data file {path} does not exist{missing}.\nExpected a readable"
            f" file{suggestion}.\nDo: {do}."
        )
    if path.is_dir():
        data_files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        files = (
            f": it holds {', '.join(data_files[:8])}" if data_files else " (it holds no data file)"
        )
        raise DataError(f"{path} is a folder; expected one data file.\nDo: name the file{files}.")
    if suffix not in READERS:
        raise DataError(
            f"Cannot tell the format of {path} from its ending {path.suffix or '(none)'!r}.\n"
            f"Expected one of {', '.join(READERS)}.\nDo: rename the file, or convert it to JSONL."
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return list(READERS[suffix](path)), digest
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is"
            f" 0x{error.object[error.start]:02x}.\nExpected UTF-8.\nDo: convert it, for example:"
            f" iconv -f latin1 -t utf8 {path.name} > utf8-{path.name}"
        ) from error
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}.\nDo: check the file's permissions."
        ) from error


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())


def _read_txt(path: Path) -> Iterator[tuple[str, Any]]:
    return ((location, {"text": line.rstrip("\r\n")}) for location, line in _read_lines(path))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for location, line in _read_lines(path):
        try:
            yield location, _parse_json(line, f"{path}, {location}")
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, {location} is not JSON: {error.msg} at column {error.colno}:"
                f' {snippet(line)}\nExpected one JSON object a line, such as {{"prompt": "...",'
                ' "completion": "..."}.\nDo: fix or remove that line.'
            ) from error


def _parse_json(text: str, location: str) -> Any:
    """The JSON value of a text. Raises `DataError` for valid JSON that Python's parser refuses
    (nesting too deep, integers too long), and `JSONDecodeError` for invalid JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(
            f"{location}, which is nested too deep", "rows of text", "fix or remove it"
        ) from error
    except ValueError as error:
        problem = f"{location}, with a number that cannot be read ({first_line(error)})"
        raise DataError(
            problem, "numbers of a usual size", "fix or remove it, or write it as text"
        ) from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = _parse_json(path.read_text(encoding="utf-8"), str(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is not JSON: {error.msg} at column"
            f" {error.colno}.\nExpected a JSON list of objects.\nDo: fix the file; if it has one"
            " object a line, name it .jsonl."
        ) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        raise DataError(
            f"{path} holds a JSON {type(document).__name__}; expected a list of objects.\n"
            "Do: wrap the rows in [ ], or write one object a line and name it .jsonl."
        )
    return ((f"item {number}", row) for number, row in enumerate(document, 1))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        try:
            names = next(reader, [])
            _check_unique_columns(names, path)
            for row in filter(None, reader):
                if len(row) != len(names):
                    problem = (
                        f"{path}, line {reader.line_num} has {len(row)} fields; expected"
                        f" {len(names)}"
                    )
                    do = "quote fields that hold commas or line breaks"
                    raise DataError(f"{problem}, as in the header.\nDo: {do}.")
                yield f"line {reader.line_num}", dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num} is not CSV: {error}.\nDo: fix the quoting."
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {first_line(error)}\nDo: write the file again."
        ) from error
    _check_unique_columns(table.column_names, path)
    return ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def _check_unique_columns(names: Sequence[str], path: Path) -> None:
    """Refuse two columns of the same name: a row as a dict would keep only the last."""
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        problem = f"{path} has the column {repeated[0]!r} {names.count(repeated[0])} times"
        raise DataError(problem, "columns of different names", "rename or remove one of them")


#: reader by the suffix of a file
READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
