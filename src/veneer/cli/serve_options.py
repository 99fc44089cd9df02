"""Options of `veneer serve` for its operation (memory, logs, traces), and the YAML file that may
hold all its options.

veneer serve --config serve.yaml --port 8001      the flag takes precedence over the file
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import CallbackParam, Context, Option

from veneer.cli.options import REPEATABLE
from veneer.errors import ConfigError, nearest, raise_all, sentence

OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


def _read_file(ctx: Context, param: CallbackParam, value: Path | None) -> Path | None:
    """The callback of --config: make the values in the file ``value`` the defaults of the command's
    parameters, so that flags take precedence. Returns ``value``."""
    if value is not None:
        ctx.default_map = file_values(value, ctx.command.params)
    return value


def file_values(path: Path, params: Sequence[Any]) -> dict[str, Any]:
    """Read the options of a command from a YAML file. Returns {name of a parameter: value}, with
    each value as the command line would give it: a string, a list of strings, or a boolean.

    Args:
        params: click's parameters of the command. A key of the file may be any spelling of a flag,
            without the dashes at its beginning and with "-" or "_" in between.

    Raises:
        ConfigError: an option is unknown or occurs twice, or a value has another form.
    """
    from veneer.train.config import read_yaml

    param_by_spelling = {
        spelling.lstrip("-").replace("-", "_"): param
        for param in params
        for spelling in (param.name, *param.opts)
        if param.name != "config" and len(spelling.lstrip("-")) > 1
    }
    value_by_parameter, problems = {}, []
    for key, value in read_yaml(path).items():
        param = param_by_spelling.get(key.replace("-", "_"))
        if param is None:
            problems.append(
                sentence(
                    f"the option {key!r}{nearest(key, param_by_spelling, 1)} in {path}",
                    "one of `veneer serve --help`",
                    "check the spelling",
                )
            )
        elif param.name in value_by_parameter:
            problems.append(
                sentence(
                    f"{key!r} and another spelling of it in {path}", "one of them", "leave one out"
                )
            )
        elif value is not None:
            try:
                value_by_parameter[param.name] = _as_argument(value, param.multiple)
            except TypeError as error:
                problems.append(
                    sentence(
                        f"{error} for {key!r} in {path}",
                        "a value, as the flag takes it",
                        "write one",
                    )
                )
    raise_all(ConfigError, f"{path} was not taken", problems)
    return value_by_parameter


def _as_argument(yaml_value: Any, takes_list: bool) -> Any:
    """A value of YAML as the command line would give it: a string, a boolean, or a list if
    ``takes_list``. ``TypeError``: the value is a table, or a list although the option takes one
    value. The error's text names the value's type."""
    if isinstance(yaml_value, dict):
        raise TypeError("a table")
    if takes_list:
        entries = yaml_value if isinstance(yaml_value, list) else [yaml_value]
        return [_as_argument(entry, False) for entry in entries]
    if isinstance(yaml_value, list):
        raise TypeError("a list")
    return yaml_value if isinstance(yaml_value, bool) else str(yaml_value)


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
        help=(
            "Origin of web pages that may send requests, such as https://app.example.com;"
            f" {REPEATABLE}."
        )
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
