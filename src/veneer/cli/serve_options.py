"""Options of `veneer serve` for its operation, and the file that may hold all of its options.

veneer serve --config serve.yaml --port 8001      a flag wins over the file
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import CallbackParam, Context, Option

from veneer.cli.options import MANY
from veneer.errors import ConfigError, nearest, raise_all, sentence

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


def _read_file(ctx: Context, param: CallbackParam, value: Path | None) -> Path | None:
    """Take the values of a file for the parameters that the command line does not give."""
    if value is not None:
        ctx.default_map = file_values(value, ctx.command.params)
    return value


def file_values(path: Path, params: Sequence[Any]) -> dict[str, Any]:
    """The values of a YAML file by the names of a command's parameters, as the command line would
    give them: texts, lists of them, and true or false. ``ConfigError``: an option that there is
    not, or that is there twice, or a value that is no such thing."""
    from veneer.train.config import read_yaml

    names = {
        spelling.lstrip("-").replace("-", "_"): param
        for param in params
        for spelling in (param.name, *param.opts)
        if param.name != "config" and len(spelling.lstrip("-")) > 1
    }
    values, problems = {}, []
    for key, value in read_yaml(path).items():
        param = names.get(key.replace("-", "_"))
        if param is None:
            near = nearest(key, names, 1)
            problem = f"the option {key!r}{near} in {path}"
            problems.append(sentence(problem, "one of `veneer serve --help`", "check the spelling"))
        elif param.name in values:
            problem = f"{key!r} and another spelling of it in {path}"
            problems.append(sentence(problem, "one of them", "leave one out"))
        elif value is not None:
            try:
                values[param.name] = _as_words(value, param.multiple)
            except TypeError as error:
                problem, expected = (
                    f"{error} for {key!r} in {path}",
                    "a value, as the flag takes it",
                )
                problems.append(sentence(problem, expected, "write one"))
    raise_all(ConfigError, f"{path} was not taken", problems)
    return values


def _as_words(value: Any, multiple: bool) -> Any:
    """A value of YAML as the command line has it. ``TypeError``: it is a table, or a list for an
    option that takes one value."""
    if isinstance(value, dict):
        raise TypeError("a table")
    if multiple:
        entries = value if isinstance(value, list) else [value]
        return [_as_words(entry, False) for entry in entries]
    if isinstance(value, list):
        raise TypeError("a list")
    return value if isinstance(value, bool) else str(value)


CacheMemory = Annotated[
    str | None,
    Option(
        help=(
            "Bytes that keys and values may take, of running answers and of cached prefixes, such"
            " as 2GiB. Default: half of what is free."
        )
    ),
]
PrefixCache = Annotated[
    bool,
    Option(
        "--prefix-cache/--no-prefix-cache",
        help="Whether requests that begin alike share what was computed.",
    ),
]
Gap = Annotated[
    str | None,
    Option(
        help=(
            "Time that prompts may take between two tokens of running answers, such as 150ms."
            " Default: 0.7 of the time that computing these tokens takes."
        )
    ),
]
ConfigFile = Annotated[
    Path | None,
    Option(
        "--config",
        help="YAML file of options, such as `rows: 8`; a flag wins over it.",
        is_eager=True,
        callback=_read_file,
    ),
]
LogFormat = Annotated[
    Literal["text", "json"], Option(help="Lines of the log, of which each request has one.")
]
Cors = Annotated[
    list[str] | None,
    Option(
        help=f"Origin of web pages that may send requests, such as https://app.example.com; {MANY}."
    ),
]
ApiDocs = Annotated[
    bool, Option("--docs", help="Describe the API on a page at /docs, as /openapi.json does.")
]
OtlpEndpoint = Annotated[
    str | None,
    Option(
        help="Send traces to this OpenTelemetry collector, such as http://localhost:4318.",
        envvar=OTLP_VARIABLE,
    ),
]
