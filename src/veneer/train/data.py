"""Training records from a local file or the hub, checked row by row.

    source (jsonl json csv tsv parquet txt | hub id)
        -> rows of one shape (chat | prompt + completion | text)

Every row is checked before any model is loaded, and each error names the line of the row.
`row_shape` decides which columns are used and checks their values.

Each file format is read by a simple reader (`json`, `csv`, `pyarrow.parquet`), because a reader
that guesses types would turn the completion `42` into a number. A `.txt` file holds one
example a line; empty lines are skipped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.errors import DataError, first_line, nearest
from veneer.models.messages import quiet
from veneer.train.column_names import find_likely_column
from veneer.train.row_shape import (
    TOOLS,
    Columns,
    Kind,
    add_tools,
    check_texts_or_chats,
    detect_columns,
    json_type,
    list_names,
    snippet,
    to_json,
)

log = logging.getLogger("veneer.data")


@dataclass(frozen=True)
class Records:
    """The rows of a data set, all of one kind.

    Fields:
        kind: the fields of a row: "messages" ({"messages": [{"role", "content"}, ...]}), "prompt"
            ({"prompt", "completion"}, both texts or both message lists), "text" ({"text"}), or
            "columns" (the fields of a task other than sft). A row with a chat may also hold
            "tools".
        locations: by row, its location in the source, such as "line 12".
        source: the file or the id of the data set on the hub.
        sha256: the hash of the source's bytes; for a hub data set, the hash of its rows.
        unused: the columns of the first row that the task does not read.
    """

    kind: Kind
    rows: list[dict[str, Any]]
    locations: list[str]
    source: str
    sha256: str
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        return replace(
            self,
            rows=[self.rows[i] for i in indices],
            locations=[self.locations[i] for i in indices],
        )


def read(source: str | Path, columns: Columns | None = None, *, split: str = "train") -> Records:
    """Read and check every row of `source`, for the task sft. The first row decides which columns
    are read.

    Args:
        source: a file (see `READERS`) or the id of a data set on the hub.
        columns: the columns that the user has named; all others are found by their usual names.
        split: the split of a data set on the hub.

    Raises:
        DataError: a missing, unreadable or empty source, a line that is not JSON, a missing column
            or a value of a wrong type. The error names the line, or the columns of the source and
            the one with the nearest name.
    """
    located_rows, digest = raw_rows(source, split)
    data_columns = list(located_rows[0][1])
    kind, column_by_field = detect_columns(
        data_columns, located_rows[0][1], columns or Columns(), str(source)
    )
    rows = []
    for location, row in located_rows:
        for column in column_by_field.values():
            if column not in row:
                raise DataError(
                    f"{source}, {location} has no column {column!r}; it has"
                    f" {list_names(row)}.\nExpected {column!r} in every row, as in the first.\nDo:"
                    " add it, or remove that row."
                )
        fields = {field: row[column] for field, column in column_by_field.items()}
        checked_row = check_texts_or_chats(fields, f"{source}, {location}", column_by_field)
        add_tools(checked_row, row.get(TOOLS), f"{source}, {location}")
        rows.append(checked_row)
    used_columns = {*column_by_field.values(), *(TOOLS for row in rows if TOOLS in row)}
    unused_columns = tuple(column for column in data_columns if column not in used_columns)
    locations = [location for location, _ in located_rows]
    return Records(kind, rows, locations, str(source), digest, unused_columns)


def raw_rows(source: str | Path, split: str = "train") -> tuple[list[tuple[str, Any]], str]:
    """Read the rows of a source (a file or a data set on the hub) without checking or renaming
    their columns.

    Args:
        split: the split of a data set on the hub.

    Returns:
        ([(location, row)], the SHA-256 of the file's bytes or of the hub data set's rows). There is
        at least one row, and each row is a dict. A location is a text such as "line 12".

    Raises:
        DataError: the source is missing, unreadable or empty, or holds a row that is not an object.
    """
    if is_local(source):
        located_rows, digest = read_file(Path(source).expanduser())
    else:
        located_rows, digest = _read_hub(str(source), split)
    if not located_rows:
        raise DataError(
            f"The data set {source} is empty: it holds no example.\nExpected at least one row.\nDo:"
            " check that the path is right and that the file was written completely."
        )
    for location, row in located_rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, {location} is a JSON {json_type(row)}: {snippet(to_json(row))}\n"
                'Expected an object, such as {"text": "..."}.\nDo: fix or remove that line.'
            )
    return located_rows, digest


def is_local(source: str | Path) -> bool:
    """Whether a source names a local file or folder, which need not exist. Otherwise it names a
    data set on the hub."""
    path = Path(source).expanduser()
    return (
        path.suffix.lower() in READERS or path.exists() or str(source).startswith((".", "/", "~"))
    )


def select_fields(
    located_rows: list[tuple[str, Any]],
    source: str,
    digest: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    column_names: Mapping[str, str] | None = None,
    sparse: Sequence[str] = (),
) -> Records:
    """The records of a task other than sft. Each row has the `required` fields, and the `optional`
    fields for which any row has a column. A row has a `sparse` field if it has a value for it.
    Values are not changed.

    Args:
        located_rows: [(location, row)] as from `raw_rows`; a row is a dict by column.
        source: the file or data set, for errors and for `Records.source`.
        digest: the hash of the source, for `Records.sha256`.
        required, optional, sparse: names of fields.
        column_names: by required or optional field, the name of its column, if that is another.

    Raises:
        DataError: `column_names` has an unknown field, a column is missing (the error names the
            nearest column), or a row has no value in one of the columns that are read.
    """
    column_names = column_names or {}
    data_columns = list(dict.fromkeys(column for _, row in located_rows for column in row))
    if unknown_fields := [field for field in column_names if field not in (*required, *optional)]:
        raise DataError(
            f"columns names the part {unknown_fields[0]!r}"
            f"{nearest(unknown_fields[0], [*required, *optional])}",
            f"one of {', '.join([*required, *optional])}",
            "correct it",
        )
    column_by_field = {field: column_names.get(field, field) for field in required}
    column_by_field |= {
        field: column_names.get(field, field)
        for field in optional
        if field in column_names or field in data_columns
    }
    read_columns = [*column_by_field.values()]
    unused_columns = [column for column in data_columns if column not in (*read_columns, *sparse)]
    if missing_columns := [column for column in read_columns if column not in data_columns]:
        problem = (
            f"{source} has no column {missing_columns[0]!r}"
            f"{nearest(missing_columns[0], data_columns)}; it has {list_names(data_columns)}"
        )
        flag_pairs = [
            f"{field}={find_likely_column(field, unused_columns) or 'COLUMN'}"
            for field, column in column_by_field.items()
            if column in missing_columns
        ]
        raise DataError(
            problem,
            f"the columns {list_names(read_columns)}",
            "rename it, or name the columns that play these parts: --columns"
            f" {','.join(flag_pairs)}",
        )
    for location, row in located_rows:
        if missing_columns := [column for column in read_columns if row.get(column) is None]:
            raise DataError(
                f"{source}, {location} holds nothing in {missing_columns[0]!r};"
                f" it has {list_names(row)}",
                f"{missing_columns[0]!r} in every row, as in others",
                "add it, or remove that row",
            )
    rows = [
        {field: row[column] for field, column in column_by_field.items()}
        | {field: row[field] for field in sparse if row.get(field) is not None}
        for _, row in located_rows
    ]
    locations = [location for location, _ in located_rows]
    return Records("columns", rows, locations, source, digest, tuple(unused_columns))


def _read_hub(data_set_id: str, split: str) -> tuple[list[tuple[str, Any]], str]:
    """([(location, row)], hash of the rows) of a hub data set. An id of the form
    "owner/name:config" selects a configuration of the data set. Raises `DataError` if the data set
    cannot be loaded."""
    from datasets import load_dataset

    repository_id, _, config_name = data_set_id.partition(":")
    log.info("Asking the hub for the data set %s …", data_set_id)
    try:
        with quiet():
            dataset = load_dataset(repository_id, config_name or None, split=split)
    # `datasets` raises about twenty unrelated error types here; for the user, all mean "no data"
    except Exception as error:
        raise DataError(
            f"No data at {data_set_id!r}: there is no such file here, and the hub says:"
            f" {first_line(error)}\nExpected a file ({', '.join(READERS)}) or the id of a data set"
            " on the Hugging Face hub.\nDo: check the path or the id; for a private data set log"
            " in with `hf auth login`."
        ) from error
    located_rows = [(f"row {number}", row) for number, row in enumerate(dataset, 1)]
    digest = hashlib.sha256(
        json.dumps(
            [row for _, row in located_rows], sort_keys=True, default=_describe_value
        ).encode()
    ).hexdigest()
    return located_rows, digest


def _describe_value(value: Any) -> Any:
    """Convert a value that JSON cannot hold, for the hash of a data set. `str` of an image or an
    array does not show all of its contents, so the result is a list of its mode, dtype, size,
    shape, and a hash of its bytes. For any other value, the result is its `str`."""
    if not hasattr(value, "tobytes"):
        return str(value)
    form_texts = [str(getattr(value, name, None)) for name in ("mode", "dtype", "size", "shape")]
    return [*form_texts, hashlib.sha256(value.tobytes()).hexdigest()]


#: name of the folder of the demo data, which `make demo` writes
DEMO_FOLDER = ".demo"


def read_file(path: Path) -> tuple[list[tuple[str, Any]], str]:
    """Read a data file: ([(location, row)], sha256 of its bytes). Raises `DataError` for a path
    that does not exist, is a folder, has no known suffix, or cannot be read or parsed."""
    suffix, folder = path.suffix.lower(), path.parent
    if not path.exists():
        folder_note = "" if folder.is_dir() else f" (its folder {folder} does not exist either)"
        suggestion = nearest(path.name, [file.name for file in folder.glob("*")])
        remedy = (
            "run `make demo`, which writes it" if folder.name == DEMO_FOLDER else "check the path"
        )
        raise DataError(
            f"The data file {path} does not exist{folder_note}.\nExpected a readable"
            f" file{suggestion}.\nDo: {remedy}."
        )
    if path.is_dir():
        data_files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        file_list_text = (
            f": it holds {', '.join(data_files[:8])}" if data_files else " (it holds no data file)"
        )
        raise DataError(
            f"{path} is a folder; expected one data file.\nDo: name the file{file_list_text}."
        )
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
    """Parse a JSON text. Raises `JSONDecodeError` for invalid JSON. Raises `DataError`, which names
    the `location`, for valid JSON with too deep nesting, with too long integers, or with lone
    surrogates, which no tokenizer can encode."""
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError
        return value
    except json.JSONDecodeError:
        raise
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{location}, with {surrogate}, one half of a surrogate pair",
            "text that UTF-8 can encode",
            "write both halves, or remove this one",
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{location}, which is nested too deep", "rows of text", "fix or remove it"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{location}, with a number that cannot be read ({first_line(error)})",
            "numbers of a usual size",
            "fix or remove it, or write it as text",
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
            column_names = next(reader, [])
            _check_unique_columns(column_names, path)
            for row in filter(None, reader):
                if len(row) != len(column_names):
                    raise DataError(
                        f"{path}, line {reader.line_num} has {len(row)} fields; expected"
                        f" {len(column_names)}, as in the header.\nDo: quote fields that hold"
                        " commas or line breaks."
                    )
                yield f"line {reader.line_num}", dict(zip(column_names, row, strict=True))
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


def _check_unique_columns(column_names: Sequence[str], path: Path) -> None:
    """Raise `DataError` if two columns have the same name, because a row is a dict by column name
    and would hold only the last of them."""
    if repeated_names := [
        name for name in dict.fromkeys(column_names) if column_names.count(name) > 1
    ]:
        raise DataError(
            f"{path} has the column {repeated_names[0]!r}"
            f" {column_names.count(repeated_names[0])} times",
            "columns of different names",
            "rename or remove one of them",
        )


#: by the suffix of a file, its reader, which yields (location, row)
READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
