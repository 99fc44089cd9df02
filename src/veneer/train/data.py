"""Training records from a local file or the hub, checked row by row.

    source (jsonl json csv tsv parquet txt | hub id)
        -> rows of one shape (chat | prompt + completion | text)

Every row is checked before any model is loaded, and each error names the line. `data_files` reads
the files, `row_shape` decides which columns are used and checks their values.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.errors import DataError, nearest
from veneer.models.messages import first_line, quiet
from veneer.train.column_names import likely
from veneer.train.data_files import READERS, read_file
from veneer.train.row_shape import (
    TOOLS,
    Columns,
    Kind,
    check_text_or_chat,
    detect_columns,
    json_type,
    list_names,
    parse_tools,
    snippet,
    to_json,
)

log = logging.getLogger("veneer.data")


@dataclass(frozen=True)
class Records:
    """Raw rows of one shape. `kind` is "messages" (each row {"messages": [{"role", "content"},
    ...]}), "prompt" (each row {"prompt", "completion"}, both strings or both message lists), "text"
    (each row {"text"}), or "columns" (each row has the fields of a task other than sft). A row with
    a chat may also hold "tools". `locations[i]` locates row i in the source ("line 12"), `sha256`
    is the hash of the source's bytes (for a hub data set, of the rows), and `unused` lists the
    columns of the first row that the task does not read."""

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
    """Read and check every row of `source`: a file (see `READERS`) or the id of a data set on the
    hub. Raises `DataError` for a missing, unreadable or empty source, for a line that is not JSON
    (with its number), for missing columns (with the present names and the nearest one) and for
    values of a wrong type."""
    raw, digest = raw_rows(source, split)
    return _build_records(raw, columns or Columns(), str(source), digest)


def raw_rows(source: str | Path, split: str = "train") -> tuple[list[tuple[str, Any]], str]:
    """([(location, row)], sha256 of the bytes) of a source, with its columns unchanged. There is at
    least one row, and each row is an object. Raises as `read` does, except for columns."""
    if is_local(source):
        raw, digest = read_file(Path(source).expanduser())
    else:
        raw, digest = _read_hub(str(source), split)
    if not raw:
        raise DataError(
            f"The data set {source} is empty: it holds no example.\nExpected at least one row.\nDo:"
            " check that the path is right and that the file was written completely."
        )
    for location, row in raw:
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, {location} is a JSON {json_type(row)}: {snippet(to_json(row))}\n"
                'Expected an object, such as {"text": "..."}.\nDo: fix or remove that line.'
            )
    return raw, digest


def is_local(source: str | Path) -> bool:
    """Whether a source names a local file or folder, existing or not; otherwise it names a data set
    on the hub."""
    path = Path(source).expanduser()
    return (
        path.suffix.lower() in READERS or path.exists() or str(source).startswith((".", "/", "~"))
    )


def select_fields(
    raw: list[tuple[str, Any]],
    source: str,
    digest: str,
    wanted: Sequence[str],
    optional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Records:
    """Records of a task other than sft, by field: the `wanted` fields, and the `optional` ones that
    the first row has. `renamed` maps a field to its column. Values stay unchanged. Raises
    `DataError` for an unknown field or a missing column, with the nearest name, and for a row that
    lacks a column of the first row."""
    renamed, names = renamed or {}, list(raw[0][1])
    if unknown := [field for field in renamed if field not in (*wanted, *optional)]:
        problem = (
            f"columns names the part {unknown[0]!r}{nearest(unknown[0], [*wanted, *optional])}"
        )
        raise DataError(problem, f"one of {', '.join([*wanted, *optional])}", "correct it")
    picked = {field: renamed.get(field, field) for field in wanted}
    picked |= {
        field: renamed.get(field, field) for field in optional if field in renamed or field in names
    }
    if lacking := [column for column in picked.values() if column not in names]:
        problem = (
            f"{source} has no column {lacking[0]!r}{nearest(lacking[0], names)}; it has"
            f" {list_names(names)}"
        )
        free = [name for name in names if name not in picked.values()]
        pairs = [
            f"{field}={likely(field, free) or 'COLUMN'}"
            for field, column in picked.items()
            if column in lacking
        ]
        do = f"rename it, or name the columns that play these parts: --columns {','.join(pairs)}"
        raise DataError(problem, f"the columns {list_names(picked.values())}", do)
    for location, row in raw:
        if lacking := [column for column in picked.values() if row.get(column) is None]:
            problem = (
                f"{source}, {location} holds nothing in {lacking[0]!r}; it has {list_names(row)}"
            )
            expected = f"{lacking[0]!r} in every row, as in the first"
            raise DataError(problem, expected, "add it, or remove that row")
    rows = [{field: row[column] for field, column in picked.items()} for _, row in raw]
    unused = tuple(name for name in names if name not in picked.values())
    return Records("columns", rows, [location for location, _ in raw], source, digest, unused)


def _read_hub(name: str, split: str) -> tuple[list[tuple[str, Any]], str]:
    """Rows and hash of a hub data set; "owner/name:config" chooses a configuration."""
    from datasets import load_dataset

    identifier, _, config = name.partition(":")
    log.info("Asking the hub for the data set %s …", name)
    try:
        with quiet():
            table = load_dataset(identifier, config or None, split=split)
    # `datasets` raises some twenty unrelated types here; to the user they all mean the same
    except Exception as error:
        raise DataError(
            f"No data at {name!r}: there is no such file here, and the hub says:"
            f" {first_line(error)}\nExpected a file ({', '.join(READERS)}) or the id of a data set"
            " on the Hugging Face hub.\nDo: check the path or the id; for a private data set log"
            " in with `hf auth login`."
        ) from error
    rows = [(f"row {number}", row) for number, row in enumerate(table, 1)]
    digest = hashlib.sha256(
        json.dumps([row for _, row in rows], sort_keys=True, default=str).encode()
    ).hexdigest()
    return rows, digest


def _build_records(
    raw: list[tuple[str, Any]], columns: Columns, source: str, digest: str
) -> Records:
    """Detect the columns of sft from the first row, and bring every row into that shape."""
    names = list(raw[0][1])
    kind, picked = detect_columns(names, raw[0][1], columns, source)
    rows = []
    for location, row in raw:
        for column in picked.values():
            if column not in row:
                raise DataError(
                    f"{source}, {location} has no column {column!r}; it has"
                    f" {list_names(row)}.\nExpected {column!r} in every row, as in the first.\nDo:"
                    " add it, or remove that row."
                )
        checked_row = {
            field: check_text_or_chat(row[column], field, column, f"{source}, {location}")
            for field, column in picked.items()
        }
        if kind == "prompt" and isinstance(checked_row["prompt"], str) is not isinstance(
            checked_row["completion"], str
        ):
            raise DataError(
                f"{source}, {location}: prompt is {json_type(checked_row['prompt'])}, completion"
                f" {json_type(checked_row['completion'])}.\nExpected both to be text, or both to be"
                " lists of messages.\nDo: bring both into one form."
            )
        chat = any(isinstance(value, list) for value in checked_row.values())
        if chat and row.get(TOOLS) is not None:
            checked_row[TOOLS] = parse_tools(row[TOOLS], f"{source}, {location}")
        rows.append(checked_row)
    used_columns = {*picked.values(), *(TOOLS for row in rows if TOOLS in row)}
    unused = tuple(name for name in names if name not in used_columns)
    return Records(kind, rows, [location for location, _ in raw], source, digest, unused)
