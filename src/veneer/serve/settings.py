"""The options of `veneer serve` as one data class, and functions that parse and check their values.
``cli/serve.py`` defines the command-line flags.

Importing this file loads neither torch nor transformers, so that the command line starts quickly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listing, raise_all, sentence
from veneer.serve.request_log import FORMATS

#: bytes by unit of size, in lower case and without the final "b"
_BYTE_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
#: torch's names of dtypes, each with the value of ``--precision`` for that dtype
_PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PRECISIONS = ("auto", "stored", *_PRECISION_OF_DTYPE.values())
#: an origin as browsers send it in the header Origin: scheme, host and perhaps port
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")


#: default values. ROWS: requests that run at one time. LENGTH: tokens of a prompt and its answer
#: (these two only with Veneer's own engine). QUEUE: requests that wait. TEXT_QUEUE: texts that wait
#: for an encoder.
ROWS, LENGTH, QUEUE, TEXT_QUEUE = 16, 2048, 256, 1024


@dataclass(frozen=True)
class Settings:
    """The values of the options of `veneer serve`. Each field has the name of its option."""

    base: str
    name: str  # the base's model name for clients
    adapters: str | None = None  # a folder, a library, or an address such as s3://bucket/adapters
    memory: int | None = None  # the most bytes of adapters in memory
    pin: tuple[str, ...] = ()  # names of adapters that stay in memory
    rows: int | None = None  # requests that run at one time; None: ``ROWS``, or vLLM's default
    #: the most tokens of a prompt and its answer; None: ``LENGTH``, or vLLM's default
    length: int | None = None
    #: the most requests, or texts of an encoder, that wait; None: ``QUEUE``, or ``TEXT_QUEUE``
    queue: int | None = None
    timeout: float = 600.0  # seconds that an answer may take
    precision: Any = "stored"  # dtype of the base's weights (``_PRECISIONS``)
    quantize: Any = None  # how to quantise the base when it is loaded; None: not
    device: str | None = None  # where the base runs, by torch's name; None: chosen automatically
    device_map: str | None = None  # how transformers divides the base among devices; None: not
    attention: str = "auto"  # which implementation of attention the base uses
    #: the most bytes of the KV cache; None: half of the memory that is free after loading the base
    cache_memory: int | None = None
    #: whether requests reuse the keys and values of earlier prompts that begin with the same tokens
    prefix_cache: bool = True
    #: the seconds for which prompts may delay the next token of a running answer; None: in
    #: proportion to the duration of a decode call (``prefill_budget.py``)
    gap: float | None = None
    tool_call_parser: str | None = None  # a parser in serve/tools; None: by the chat template
    trust_remote_code: bool = False  # whether Python files in the base's folder may run
    log_format: str = "text"  # or "json"
    cors: tuple[str, ...] = ()  # origins whose web pages may send requests (CORS)
    docs: bool = False  # whether a page at /docs describes the API
    otlp_endpoint: str | None = None  # the OpenTelemetry collector that gets traces


def settings_of(base: str, **options: Any) -> Settings:
    """Make ``Settings`` from options as a user writes them on a command line or in a file.

    Args:
        options: fields of ``Settings``, of which some may have other forms: ``memory`` and
            ``cache_memory`` such as "2GiB", ``gap`` such as "150ms", ``precision`` as torch's name
            of a dtype, and ``pin`` and ``cors`` as one text or several.

    Raises:
        ConfigError: an option has an invalid value.
    """
    precision = options.get("precision", Settings.precision)
    options["precision"] = precision = _PRECISION_OF_DTYPE.get(precision, precision)
    if precision not in _PRECISIONS:
        raise ConfigError(
            f"--precision {precision!r}",
            f"one of {listing((*_PRECISIONS, *_PRECISION_OF_DTYPE))}",
            "check the spelling",
        )
    options["name"] = options.get("name") or default_name(base)
    options["memory"] = bytes_in(options.get("memory"))
    options["cache_memory"] = bytes_in(options.get("cache_memory"), "--cache-memory")
    options["gap"] = seconds_in(options.get("gap"))
    options["pin"] = _as_texts(options.get("pin"))
    options["cors"] = checked_origins(_as_texts(options.get("cors")))
    if options.get("log_format", "text") not in FORMATS:
        raise ConfigError(
            f"--log-format {options['log_format']!r}",
            f"one of {listing(FORMATS)}",
            "check the spelling",
        )
    for name in ("rows", "length", "queue"):
        count = options.get(name)
        if count is not None and (type(count) is not int or count < 1):
            raise ConfigError(
                f"--{name} {count!r}", "a whole number from 1", "write, for instance, 16"
            )
    return Settings(base, **options)


def _as_texts(value: Any) -> tuple[str, ...]:
    """The value of an option (one text, several texts, or None for no text) as a tuple of texts."""
    value = value or ()
    return (value,) if isinstance(value, str) else tuple(value)


def checked_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """``origins`` without duplicates. ``ConfigError``: one of them is neither "*" nor an origin in
    the form in which browsers send it, so it would never match."""
    origins = tuple(dict.fromkeys(origins))
    problems = [
        sentence(
            f"--cors {origin!r}",
            "an origin: scheme, host and port, in small letters and without a path, or '*'",
            "write, for instance, https://app.example.com or http://localhost:3000",
        )
        for origin in origins
        if origin != "*" and not _ORIGIN.fullmatch(origin)
    ]
    raise_all(ConfigError, "No server was started", problems)
    return origins


def must_have_keys_for_any_origin(settings: Settings, needs_no_keys: bool) -> None:
    """``ConfigError``: the server would accept requests from every web page (``--cors '*'``) and
    need no API keys, so that any page in a user's browser could use it. ``needs_no_keys``: whether
    the server needs no keys."""
    if needs_no_keys and "*" in settings.cors:
        raise ConfigError(
            "--cors '*' without keys",
            "keys, or origins by name",
            "name the origins, or give --keys FILE",
        )


def bytes_in(value: str | int | None, flag: str = "--memory") -> int | None:
    """Parse a number of bytes such as "2GiB" or "500MB"; None stays None. ``flag``: the
    command-line flag of the value, for the error. ``ConfigError``: the value is no positive number
    of bytes."""
    if value is None:
        return None
    text = str(value)
    size_match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    byte_count = (
        int(float(size_match[1]) * _BYTE_UNITS[size_match[2]])
        if size_match and size_match[2] in _BYTE_UNITS
        else 0
    )
    if byte_count < 1:
        raise ConfigError(
            f"{flag} {text!r}", "a number of bytes", "write, for instance, 2GiB or 500MB"
        )
    return byte_count


def seconds_in(value: str | float | None) -> float | None:
    """Parse the value of ``--gap``, a duration such as "150ms" or "0.2s", and return it in seconds;
    None stays None. ``ConfigError``: the value is no positive duration."""
    if value is None:
        return None
    text = str(value)
    duration_match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)\s*", text.lower())
    seconds = (
        float(duration_match[1]) / (1000 if duration_match[2] == "ms" else 1)
        if duration_match
        else 0.0
    )
    if seconds <= 0:
        raise ConfigError(f"--gap {text!r}", "a duration", "write, for instance, 150ms or 0.2s")
    return seconds


def default_name(base: str) -> str:
    """The default name of a base for clients: for a folder, its name; for a GGUF file, its name
    without the suffix; for a package, the package's name; otherwise ``base``, a hub id."""
    if base.startswith("package:"):
        return base.removeprefix("package:")
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else base


def used_flags(options: dict[str, Any]) -> list[str]:
    """The command-line flags of those ``options`` (values by name) that a user has set: their value
    is neither None nor "auto"."""
    return [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value not in (None, "auto")
    ]
