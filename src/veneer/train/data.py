"""Records from a file or the hub, checked.

    source (jsonl json csv tsv parquet txt | hub id)  ->  rows of one shape (chat | prompt + completion | text)

Every row is checked before any model is loaded, and the error names the line: a run that fails after an hour on row
90,000 is the alternative. Files are read with the plainest reader there is (`json`, `csv`, `pyarrow.parquet`): a type
guesser would turn the completion `42` into a number.

A `.txt` file holds one example a line; empty lines are skipped.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError
from veneer.models.messages import quiet

log = logging.getLogger("veneer.data")

Kind = Literal["messages", "prompt", "text"]
#: columns that hold what a classifier (or a preference) should learn
LABELS = ("label", "labels", "label_text")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class Columns:
    """Which column plays which part; None means the column of that very name, if there is one."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Records:
    """Raw rows of one shape.

    `kind` is "messages" (each row {"messages": [{"role", "content"}, ...]}), "prompt" (each row {"prompt",
    "completion"}, both strings or both message lists) or "text" (each row {"text"}). `places[i]` says where row i came
    from ("line 12"), `sha256` is the hash of the source's bytes (of the rows themselves for a hub data set), `unused`
    are the columns of the first row that play no part.
    """

    kind: Kind
    rows: list[dict[str, Any]]
    places: list[str]
    source: str
    sha256: str
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        """The rows at `indices`, in that order."""
        rows, places = [self.rows[i] for i in indices], [self.places[i] for i in indices]
        return replace(self, rows=rows, places=places)


# ---------------------------------------------------------------------------------------------- reading


def read(source: str | Path, columns: Columns | None = None, *, split: str = "train") -> Records:
    """Read and check every row of `source`: a file (see `SUFFIXES`) or the id of a data set on the hub.

    Raises `DataError` for a missing, unreadable or empty source, a line that is not JSON (with its number), missing
    columns (with the names found and the nearest) and wrong types.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES or path.exists() or str(source).startswith((".", "/", "~")):
        raw, digest = _read_file(path)
    else:
        raw, digest = _read_hub(str(source), split)
    if not raw:
        raise DataError(
            f"The data set {source} is empty: it holds no example.\n"
            "Expected at least one row.\nDo: check that the path is right and that the file was written completely."
        )
    return _shape(raw, columns or Columns(), str(source), digest)


def _read_file(path: Path) -> tuple[list[tuple[str, Any]], str]:
    """[(place, row)] and the SHA-256 of the file."""
    if not path.exists():
        raise DataError(_missing(path))
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        raise DataError(
            f"{path} is a folder; expected one data file.\n"
            f"Do: name the file{': it holds ' + ', '.join(inside[:8]) if inside else ' (it holds no data file)'}."
        )
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".txt": _txt,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Cannot tell the format of {path} from its ending {path.suffix or '(none)'!r}.\n"
            f"Expected one of {', '.join(SUFFIXES)}.\nDo: rename the file, or convert it to JSONL."
        )
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return list(reader(path)), digest
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}.\n"
            f"Expected UTF-8.\nDo: convert it, for example: iconv -f latin1 -t utf8 {path.name} > utf8-{path.name}"
        ) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.\nDo: check the file's permissions.") from error


def _missing(path: Path) -> str:
    folder = path.parent if str(path.parent) else Path()
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f" Near it there is: {', '.join(near)}." if near else ""
    where = "" if folder.is_dir() else f" (its folder {folder} does not exist either)"
    return f"The data file {path} does not exist{where}.\nExpected a readable file.{hint}\nDo: check the path."


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}: {_snippet(line)}\n"
                    'Expected one JSON object a line, such as {"prompt": "...", "completion": "..."}.\n'
                    "Do: fix or remove that line."
                ) from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}.\n"
            "Expected a JSON list of objects.\nDo: fix the file; if it has one object a line, name it .jsonl."
        ) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        raise DataError(
            f"{path} holds a JSON {type(document).__name__}; expected a list of objects.\n"
            "Do: wrap the rows in [ ], or write one object a line and name it .jsonl."
        )
    for number, row in enumerate(document, 1):
        yield f"item {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    width = len(reader.fieldnames or ())
                    found = sum(value is not None for key, value in row.items() if key is not None)
                    found += len(row.get(None, ()))  # type: ignore[call-overload]
                    raise DataError(
                        f"{path}, {place} has {found} fields; expected {width}, as in the header.\n"
                        "Do: quote fields that hold commas or line breaks."
                    )
                yield place, row
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}.\nDo: fix the quoting.") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}\nDo: write the file again."
        ) from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", {"text": line.rstrip("\r\n")}


def _read_hub(name: str, split: str) -> tuple[list[tuple[str, Any]], str]:
    """A data set of the hub; "owner/name:config" chooses a configuration."""
    from datasets import load_dataset

    identifier, _, config = name.partition(":")
    log.info("Asking the hub for the data set %s …", name)
    try:
        with quiet():
            table = load_dataset(identifier, config or None, split=split)
    except Exception as error:  # `datasets` raises a score of unrelated types here; all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"No data at {name!r}: there is no such file here, and the hub says: {reason}\n"
            f"Expected a file ({', '.join(SUFFIXES)}) or the id of a data set on the Hugging Face hub.\n"
            "Do: check the path or the id; for a private data set log in with `hf auth login`."
        ) from error
    rows = [(f"row {number}", row) for number, row in enumerate(table, 1)]
    digest = hashlib.sha256(json.dumps([row for _, row in rows], sort_keys=True, default=str).encode()).hexdigest()
    return rows, digest


# ---------------------------------------------------------------------------------------------- checking


def _shape(raw: list[tuple[str, Any]], columns: Columns, source: str, digest: str) -> Records:
    """Decide which columns hold what, from the first row, and bring every row into that shape."""
    place, first = raw[0]
    _object(first, source, place)
    names = list(first)
    kind, picked = _detect(names, first, columns, source)
    rows = []
    for place, row in raw:
        _object(row, source, place)
        shaped = {}
        for part, column in picked.items():
            if column not in row:
                raise DataError(
                    f"{source}, {place} has no column {column!r}; it has {_list(row)}.\n"
                    f"Expected {column!r} in every row, as in the first.\nDo: add it, or remove that row."
                )
            shaped[part] = _value(row[column], part, column, source, place)
        if kind == "prompt" and isinstance(shaped["prompt"], str) is not isinstance(shaped["completion"], str):
            raise DataError(
                f"{source}, {place}: prompt is {_name(shaped['prompt'])}, completion {_name(shaped['completion'])}.\n"
                "Expected both to be text, or both to be lists of messages.\nDo: bring both into one form."
            )
        rows.append(shaped)
    unused = tuple(name for name in names if name not in picked.values())
    return Records(kind, rows, [place for place, _ in raw], source, digest, unused)


def _object(row: Any, source: str, place: str) -> None:
    if not isinstance(row, dict):
        raise DataError(
            f"{source}, {place} is a JSON {_name(row)}: {_snippet(json.dumps(row))}\n"
            'Expected an object, such as {"text": "..."}.\nDo: fix or remove that line.'
        )


def _detect(names: list[str], first: dict[str, Any], columns: Columns, source: str) -> tuple[Kind, dict[str, str]]:
    """Which of the three shapes: what the options name, else the usual names, most specific first."""
    for option, column in vars(columns).items():
        if column is not None and column not in names:
            raise DataError(
                f"{source} has no column {column!r} (asked for as the {option} column); it has {_list(names)}."
                f"{_nearest(column, names)}\nDo: name one that exists, for example --{option}-column {names[0]}."
            )
    if not any(vars(columns).values()):
        _refuse_other_tasks(names, first, source)
    if columns.messages is not None:
        return "messages", {"messages": columns.messages}
    if columns.text is not None:
        return "text", {"text": columns.text}
    prompt, completion = columns.prompt or "prompt", columns.completion or "completion"
    if columns.prompt is None and columns.completion is None:
        for name in ("messages", "conversations"):
            if name in names:
                return "messages", {"messages": name}
    if prompt in names and completion in names:
        return "prompt", {"prompt": prompt, "completion": completion}
    if columns.prompt is None and columns.completion is None and "text" in names:
        return "text", {"text": "text"}
    raise DataError(_wrong_columns(names, columns, source))


def _refuse_other_tasks(names: list[str], first: dict[str, Any], source: str) -> None:
    """Records of other tasks (preferences, labels), of which a language model would learn something else than they say.
    Whoever names the columns to read has said what the others are worth."""
    if {"chosen", "rejected"} <= {*names}:
        chat = isinstance(first["chosen"], list)
        alone = "--messages-column chosen" if chat and "prompt" not in names else "--text-column chosen"
        alone = "--prompt-column prompt --completion-column chosen" if "prompt" in names else alone
        raise DataError(
            f"{source} holds preferences: the columns {_list(names)}.\n"
            "Expected examples to imitate; this command cannot learn that one answer is better than another.\n"
            "Do: give the model that veneer.attach has prepared to trl.DPOTrainer, in Python; or imitate the chosen "
            f"answers alone: {alone}."
        )
    labels = [name for name in names if name.lower() in LABELS]
    if labels:
        chat = next((name for name in ("messages", "conversations") if name in names), None)
        others = [name for name in names if name not in labels]
        shown = f"--text-column {'text' if 'text' in names else others[0] if others else 'TEXT'}"
        shown = "--prompt-column prompt --completion-column completion" if "prompt" in names else shown
        shown = f"--messages-column {chat}" if chat else shown
        raise DataError(
            f"{source} has the column {labels[0]!r} beside {_list(others) or 'no other'}.\n"
            "Expected examples to imitate; this command trains no classifier, and would leave the labels out.\n"
            f"Do: to learn the labels, write each as text into `completion`, with its text in `prompt`, or train a "
            f"classifier with veneer.attach in Python; to leave them out, name the columns to read: {shown}."
        )


def _wrong_columns(names: list[str], columns: Columns, source: str) -> str:
    wanted = ("messages", "prompt", "completion", "text")
    near = [
        f"{name!r} looks like {match[0]!r}"
        for name in names
        if (match := difflib.get_close_matches(name.lower(), wanted, 1, 0.6)) and name not in wanted
    ]
    two = (*names, "PROMPT", "COMPLETION") if len(names) < 2 else names
    return (
        f"{source} has the columns {_list(names)}.\n"
        "Expected `messages` (a chat), or `prompt` and `completion`, or `text`."
        f"{' ' + '; '.join(near) + '.' if near else ''}\n"
        "Do: rename the columns, or name them: "
        f"--prompt-column {columns.prompt or two[0]} --completion-column {columns.completion or two[1]} "
        "(or --text-column, --messages-column)."
    )


def _value(value: Any, part: str, column: str, source: str, place: str) -> Any:
    if part != "messages" and isinstance(value, str):
        return value
    if isinstance(value, list) and part in ("messages", "prompt", "completion"):
        return [_message(message, source, place) for message in value] or _no_messages(source, place)
    expected = (
        "a list of messages" if part == "messages" else "text" if part == "text" else "text or a list of messages"
    )
    raise DataError(
        f"{source}, {place}: the column {column!r} holds a {_name(value)}: {_snippet(json.dumps(value, default=str))}\n"
        f"Expected {expected}.\nDo: fix or remove that row."
    )


def _no_messages(source: str, place: str) -> Any:
    raise DataError(f"{source}, {place} holds an empty list of messages.\nDo: fix or remove that row.")


def _message(message: Any, source: str, place: str) -> dict[str, Any]:
    """One chat message; the ShareGPT form {"from", "value"} is brought into {"role", "content"}."""
    if isinstance(message, dict) and "from" in message and "value" in message:
        roles = {"human": "user", "gpt": "assistant"}
        message = {"role": roles.get(message["from"], message["from"]), "content": message["value"]}
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ):
        raise DataError(
            f"{source}, {place} holds a message that is not one: {_snippet(json.dumps(message, default=str))}\n"
            'Expected {"role": "user" | "assistant" | "system", "content": "text"}.\nDo: fix or remove that row.'
        )
    return {key: value for key, value in message.items() if value is not None}  # parquet fills absent keys with None


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f" The nearest is {near[0]!r}." if near else ""


def _list(names: Any) -> str:
    found = list(names)
    return ", ".join(repr(name) for name in found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")


def _name(value: Any) -> str:
    names = {"str": "text", "NoneType": "null", "dict": "object", "float": "number", "int": "number"}
    return names.get(type(value).__name__, type(value).__name__)


def _snippet(text: str, width: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= width else text[: width - 1] + "…"
