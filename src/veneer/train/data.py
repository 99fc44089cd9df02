"""Records from a file or the hub, checked.

    source (jsonl json csv tsv parquet txt | hub id) -> rows of one shape (chat | prompt +
    completion | text)

Every row is checked before any model is loaded, and the error names the line. Files are read with
the plainest reader there is (`json`, `csv`, `pyarrow.parquet`): a type guesser would turn the
completion `42` into a number. A `.txt` file holds one example a line; empty lines are skipped.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from veneer.errors import DataError, listing, nearest
from veneer.models.messages import first_line, quiet
from veneer.train.column_names import advice, likely

log = logging.getLogger("veneer.data")

Kind = Literal["messages", "prompt", "text", "columns"]
#: the folder of the data that the examples name, which a program writes
DEMO = ".demo"
#: the column with the tools that a chat may call
TOOLS = "tools"
#: columns that hold what a classifier (or a preference) should learn
LABELS = ("label", "labels", "label_text")


@dataclass(frozen=True)
class Columns:
    """Which column plays which part; None means the column of that very name, if there is one."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Records:
    """Raw rows of one shape. `kind` is "messages" (each row {"messages": [{"role", "content"},
    ...]}), "prompt" (each row {"prompt", "completion"}, both strings or both message lists), "text"
    (each row {"text"}), or "columns" (each row by the parts of another task). A row of chats may
    hold "tools". `places[i]` says where row i came from ("line 12"), `sha256` is the hash of the
    source's bytes (of the rows themselves for a hub data set), `unused` are the columns of the
    first row that play no part."""

    kind: Kind
    rows: list[dict[str, Any]]
    places: list[str]
    source: str
    sha256: str
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> Records:
        return replace(
            self, rows=[self.rows[i] for i in indices], places=[self.places[i] for i in indices]
        )


def read(source: str | Path, columns: Columns | None = None, *, split: str = "train") -> Records:
    """Read and check every row of `source`: a file (see `READERS`) or the id of a data set on the
    hub. Raises `DataError` for a missing, unreadable or empty source, a line that is not JSON (with
    its number), missing columns (with the names found and the nearest) and wrong types."""
    raw, digest = raw_rows(source, split)
    return _shape(raw, columns or Columns(), str(source), digest)


def raw_rows(source: str | Path, split: str = "train") -> tuple[list[tuple[str, Any]], str]:
    """([(place, row)], hash of the bytes) of a source as it lies; at least one row, each an object.
    Raises as `read`, but for columns."""
    if is_local(source):
        raw, digest = _read_file(Path(source).expanduser())
    else:
        raw, digest = _read_hub(str(source), split)
    if not raw:
        raise DataError(
            f"The data set {source} is empty: it holds no example.\nExpected at least one row.\nDo:"
            " check that the path is right and that the file was written completely."
        )
    for place, row in raw:
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, {place} is a JSON {_name(row)}: {_snippet(_written(row))}\n"
                'Expected an object, such as {"text": "..."}.\nDo: fix or remove that line.'
            )
    return raw, digest


def is_local(source: str | Path) -> bool:
    """Whether a source is a file or a folder here, or would be one; otherwise it is a data set of
    the hub."""
    path = Path(source).expanduser()
    return (
        path.suffix.lower() in READERS or path.exists() or str(source).startswith((".", "/", "~"))
    )


def by_part(
    raw: list[tuple[str, Any]], source: str, digest: str, wanted: Sequence[str], optional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Records:  # fmt: skip
    """Rows of a task other than sft: the columns that are `wanted`, and those that are `optional`
    if the first row has them, by part. `renamed` maps a part to its column. Values are as they lie.
    Raises `DataError` for a part or a column that there is not, with the nearest, and for a row
    without a column of the first."""
    renamed, names = renamed or {}, list(raw[0][1])
    if unknown := [part for part in renamed if part not in (*wanted, *optional)]:
        problem = (
            f"columns names the part {unknown[0]!r}{nearest(unknown[0], [*wanted, *optional])}"
        )
        raise DataError(problem, f"one of {', '.join([*wanted, *optional])}", "correct it")
    picked = {part: renamed.get(part, part) for part in wanted}
    picked |= {
        part: renamed.get(part, part) for part in optional if part in renamed or part in names
    }
    if lacking := [column for column in picked.values() if column not in names]:
        parts = [part for part, column in picked.items() if column in lacking]
        problem = (
            f"{source} has no column {lacking[0]!r}{nearest(lacking[0], names)}; it has"
            f" {_list(names)}"
        )
        free = [name for name in names if name not in picked.values()]
        pairs = [f"{part}={likely(part, free) or 'COLUMN'}" for part in parts]
        do = f"rename it, or name the columns that play these parts: --columns {','.join(pairs)}"
        raise DataError(problem, f"the columns {_list(picked.values())}", do)
    for place, row in raw:
        if lost := [column for column in picked.values() if row.get(column) is None]:
            problem = f"{source}, {place} holds nothing in {lost[0]!r}; it has {_list(row)}"
            raise DataError(
                problem, f"{lost[0]!r} in every row, as in the first", "add it, or remove that row"
            )
    rows = [{part: row[column] for part, column in picked.items()} for _, row in raw]
    unused = tuple(name for name in names if name not in picked.values())
    return Records("columns", rows, [place for place, _ in raw], source, digest, unused)


def _read_file(path: Path) -> tuple[list[tuple[str, Any]], str]:
    suffix, folder = path.suffix.lower(), path.parent
    if not path.exists():
        where = "" if folder.is_dir() else f" (its folder {folder} does not exist either)"
        near = nearest(path.name, [file.name for file in folder.glob("*")])
        do = "run `make demo`, which writes it" if folder.name == DEMO else "check the path"
        raise DataError(
            f"The data file {path} does not exist{where}.\nExpected a readable file{near}.\nDo:"
            f" {do}."
        )
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix.lower() in READERS)
        raise DataError(
            f"{path} is a folder; expected one data file.\n"
            "Do: name the"
            f" file{': it holds ' + ', '.join(inside[:8]) if inside else ' (it holds no data file)'}."
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


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())


def _txt(path: Path) -> Iterator[tuple[str, Any]]:
    return ((place, {"text": line.rstrip("\r\n")}) for place, line in _lines(path))


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        try:
            yield place, _parsed(line, f"{path}, {place}")
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, {place} is not JSON: {error.msg} at column {error.colno}:"
                f' {_snippet(line)}\nExpected one JSON object a line, such as {{"prompt": "...",'
                ' "completion": "..."}.\nDo: fix or remove that line.'
            ) from error


def _parsed(text: str, place: str) -> Any:
    """A JSON value. Raises `DataError` for what Python's reader gives up at, besides what is no
    JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(
            f"{place}, which is nested too deep", "rows of text", "fix or remove it"
        ) from error
    except ValueError as error:
        problem = f"{place}, with a number that cannot be read ({first_line(error)})"
        raise DataError(
            problem, "numbers of a usual size", "fix or remove it, or write it as text"
        ) from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = _parsed(path.read_text(encoding="utf-8"), str(path))
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


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        try:
            names = next(reader, [])
            _must_differ(names, path)
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


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {first_line(error)}\nDo: write the file again."
        ) from error
    _must_differ(table.column_names, path)
    return ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def _must_differ(names: Sequence[str], path: Path) -> None:
    """Refuse two columns of one name, of which a row would keep the last."""
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        problem = f"{path} has the column {twice[0]!r} {names.count(twice[0])} times"
        raise DataError(problem, "columns of different names", "rename or remove one of them")


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _txt,
}  # fmt: skip


def _read_hub(name: str, split: str) -> tuple[list[tuple[str, Any]], str]:
    """A data set of the hub; "owner/name:config" chooses a configuration."""
    from datasets import load_dataset

    identifier, _, config = name.partition(":")
    log.info("Asking the hub for the data set %s …", name)
    try:
        with quiet():
            table = load_dataset(identifier, config or None, split=split)
    except (
        Exception
    ) as error:  # `datasets` raises a score of unrelated types here; all mean the same to the user
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


def _shape(raw: list[tuple[str, Any]], columns: Columns, source: str, digest: str) -> Records:
    """Decide which columns hold what, from the first row, and bring every row into that shape."""
    names = list(raw[0][1])
    kind, picked = _detect(names, raw[0][1], columns, source)
    rows = []
    for place, row in raw:
        for column in picked.values():
            if column not in row:
                raise DataError(
                    f"{source}, {place} has no column {column!r}; it has {_list(row)}.\nExpected"
                    f" {column!r} in every row, as in the first.\nDo: add it, or remove that row."
                )
        shaped = {
            part: _value(row[column], part, column, f"{source}, {place}")
            for part, column in picked.items()
        }
        if kind == "prompt" and isinstance(shaped["prompt"], str) is not isinstance(
            shaped["completion"], str
        ):
            raise DataError(
                f"{source}, {place}: prompt is {_name(shaped['prompt'])}, completion"
                f" {_name(shaped['completion'])}.\nExpected both to be text, or both to be lists of"
                " messages.\nDo: bring both into one form."
            )
        chat = any(isinstance(value, list) for value in shaped.values())
        if chat and row.get(TOOLS) is not None:
            shaped[TOOLS] = _tools(row[TOOLS], f"{source}, {place}")
        rows.append(shaped)
    read = {*picked.values(), *(TOOLS for row in rows if TOOLS in row)}
    unused = tuple(name for name in names if name not in read)
    return Records(kind, rows, [place for place, _ in raw], source, digest, unused)


def _detect(
    names: list[str], first: dict[str, Any], columns: Columns, source: str
) -> tuple[Kind, dict[str, str]]:
    """Which of the three shapes: what the options name, else the usual names, most specific
    first."""
    for option, column in vars(columns).items():
        if column is not None and column not in names:
            raise DataError(
                f"{source} has no column {column!r}{nearest(column, names)} (asked for as the"
                f" {option} column); it has {_list(names)}.\nDo: name one that exists, for example"
                f" --{option}-column {names[0]}."
            )
    if not any(vars(columns).values()):
        _refuse_other_tasks(names, first, source)
    if columns.messages is not None:
        return "messages", {"messages": columns.messages}
    if columns.text is not None:
        return "text", {"text": columns.text}
    usual = columns.prompt is None and columns.completion is None
    if usual and (chat := _chat(names)):
        return "messages", {"messages": chat}
    prompt, completion = columns.prompt or "prompt", columns.completion or "completion"
    if prompt in names and completion in names:
        return "prompt", {"prompt": prompt, "completion": completion}
    if usual and "text" in names:
        return "text", {"text": "text"}
    wanted = ("messages", "prompt", "completion", "text")
    near = [
        f"{name!r} looks like {match[0]!r}"
        for name in names
        if (match := difflib.get_close_matches(name.lower(), wanted, 1, 0.6)) and name not in wanted
    ]
    raise DataError(
        f"{source} has the columns {_list(names)}.\n"
        "Expected `messages` (a chat), or `prompt` and `completion`, or `text`."
        f"{' ' + '; '.join(near) + '.' if near else ''}\n"
        f"Do: {advice(names, first, columns.prompt, columns.completion)}"
    )


def _chat(names: list[str]) -> str | None:
    return next((name for name in ("messages", "conversations") if name in names), None)


def _refuse_other_tasks(names: list[str], first: dict[str, Any], source: str) -> None:
    """Records of other tasks (preferences, labels), of which a language model would learn something
    else than they say. Whoever names the columns to read has said what the others are worth."""
    if {"chosen", "rejected"} <= {*names}:
        alone = (
            "--messages-column chosen"
            if isinstance(first["chosen"], list)
            else "--text-column chosen"
        )
        asked = likely("prompt", names)
        alone = alone if asked is None else f"--prompt-column {asked} --completion-column chosen"
        raise DataError(
            f"{source} holds preferences: the columns {_list(names)}.\nExpected examples to"
            " imitate, as the task is sft.\nDo: to learn that one answer is better than another,"
            f" choose --task dpo, orpo or reward; or imitate the chosen answers alone: {alone}."
        )
    if labels := [name for name in names if name.lower() in LABELS]:
        others = [name for name in names if name not in labels]
        text = next((name for name in ("text", *others) if name in names), "TEXT")
        shown = (
            "--prompt-column prompt --completion-column completion"
            if "prompt" in names
            else f"--text-column {text}"
        )
        shown = f"--messages-column {chat}" if (chat := _chat(names)) else shown
        raise DataError(
            f"{source} has the column {labels[0]!r} beside"
            f" {_list(others) if others else 'no other'}.\nExpected examples to imitate, as the"
            " task is sft, which would leave the labels out.\nDo: to learn the labels, choose"
            " --task classify (kto, if they judge completions), or write each as text into"
            " `completion`, with its text in `prompt`; to leave them out, name the columns to"
            f" read: {shown}."
        )


def shaped(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row of prompt and completion, or of text, whose values are texts or chats, checked. Raises
    `DataError`."""
    checked = {part: _value(value, part, part, where) for part, value in row.items()}
    if len({isinstance(value, str) for value in checked.values()}) > 1:
        problem = (
            f"{where}: {', '.join(f'{part} is {_name(value)}' for part, value in checked.items())}"
        )
        raise DataError(
            problem, "all of them text, or all lists of messages", "bring them into one form"
        )
    return checked


def _value(value: Any, part: str, column: str, where: str) -> Any:
    if part != "messages" and isinstance(value, str):
        return value
    if part != "text" and isinstance(value, list):
        if not value:
            raise DataError(
                f"{where} holds an empty list of messages.\nDo: fix or remove that row."
            )
        return [_message(message, where) for message in value]
    expected = {"messages": "a list of messages", "text": "text"}.get(
        part, "text or a list of messages"
    )
    raise DataError(
        f"{where}: the column {column!r} holds a {_name(value)}: {_snippet(_written(value))}\n"
        f"Expected {expected}.\nDo: fix or remove that row."
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    """One chat message; the ShareGPT form {"from", "value"} is brought into {"role", "content"}, a
    content of text parts into one text, and arguments of tool calls from JSON text (OpenAI's form)
    into tables, as templates do."""
    match message:
        case {"from": str(role), "value": content}:
            message = {
                "role": {"human": "user", "gpt": "assistant"}.get(role, role),
                "content": content,
            }
    match message:
        case {"role": str()}:
            # parquet's absent keys
            message = {key: value for key, value in message.items() if value is not None}
    match message:
        case {"role": str(), "content": [*parts]} if parts and all(map(_is_text, parts)):
            message = {**message, "content": "".join(part["text"] for part in parts)}
    match message:
        case {"role": "assistant", "tool_calls": [_, *_] as calls} if isinstance(
            message.get("content", ""), str
        ):
            return {
                **message,
                "content": message.get("content", ""),
                "tool_calls": [_call(one, where) for one in calls],
            }
        case {"role": str(), "content": str()}:
            return message
    raise DataError(
        f"{where} holds a message that is not one: {_snippet(_written(message))}\nExpected"
        ' {"role": "user" | "assistant" | "system" | "tool", "content": "text"}, where the'
        ' content may be a list of {"type": "text", "text": "..."}, and an assistant\'s may'
        ' stand beside "tool_calls".\nDo: fix or remove that row.'
    )


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not isinstance(arguments, dict)
    ):
        raise DataError(
            f"{where} holds a tool call that is not one: {_snippet(_written(call))}\nExpected"
            ' {"type": "function", "function": {"name": "...", "arguments": {...}}}.\nDo:'
            " fix or remove that row."
        )
    own = {
        "name": function["name"],
        "arguments": {name: value for name, value in arguments.items() if value is not None},
    }
    more = {
        name: value
        for name, value in call.items()
        if name not in ("function", "name", "arguments", "type")
    }
    return {
        "type": "function",
        **{name: value for name, value in more.items() if value is not None},
        "function": own,
    }


def _tools(value: Any, where: str) -> list[Any]:
    """The tools of a row: a list of JSON schemas, or that list as JSON text, as a table's column
    must hold it."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tools = None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        return tools
    problem = f"{where} holds {TOOLS} that are none: {_snippet(_written(value))}"
    raise DataError(problem, "a list of JSON schemas of functions", "fix it, or remove that row")


def _list(names: Iterable[str]) -> str:
    return listing(map(repr, names), 12)


def _name(value: Any) -> str:
    names = {
        "str": "text",
        "NoneType": "null",
        "dict": "object",
        "float": "number",
        "int": "number",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _written(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except RecursionError:
        return f"a {_name(value)} that is nested too deep to be shown"


def _snippet(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else text[:59] + "…"
