"""The options of `veneer serve`. Nothing of a model is loaded for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listing, raise_all, sentence
from veneer.serve.request_log import FORMATS

_UNITS = {
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
#: torch's words for what a base is loaded in, and ``load_base``'s
_TORCH = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PRECISIONS = ("auto", "stored", *_TORCH.values())
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Settings:
    """The options of `veneer serve` of the same names."""

    base: str
    name: str  # what clients call the base
    adapters: str | None = None  # a folder, a library, or a place such as s3://bucket/adapters
    memory: int | None = None  # bytes that adapters may take
    pin: tuple[str, ...] = ()
    rows: int = 16
    length: int = 2048
    queue: int = 256
    timeout: float = 600.0
    precision: Any = "stored"
    quantize: Any = None
    device: str | None = None
    device_map: str | None = None
    attention: str = "auto"
    #: bytes that keys and values may take; None: half of what is free
    cache_memory: int | None = None
    prefix_cache: bool = True  # requests that begin alike share what was computed
    #: seconds that prompts may take between two tokens of a running answer; None: as decoding takes
    gap: float | None = None
    tool_call_parser: str | None = None  # a name of serve/tools; None: by the chat template
    trust_remote_code: bool = False  # code beside the base may run
    log_format: str = "text"  # or "json"
    cors: tuple[str, ...] = ()  # origins of web pages that may send requests
    docs: bool = False  # a page at /docs that describes the API
    otlp_endpoint: str | None = None  # a collector of OpenTelemetry, for traces


def settings_of(base: str, **words: Any) -> Settings:
    """``Settings`` as somebody writes them, on a command line or in a file: ``memory`` and
    ``cache_memory`` as "2GiB", ``gap`` as "150ms", torch's words for a ``precision``, one ``pin``
    or ``cors`` or several. ``ConfigError``: a word that means nothing."""
    memory, pin, precision = (
        words.get("memory"),
        words.get("pin") or (),
        words.get("precision", Settings.precision),
    )
    precision = _TORCH.get(precision, precision)
    if precision not in _PRECISIONS:
        problem, expected = (
            f"--precision {precision!r}",
            f"one of {listing((*_PRECISIONS, *_TORCH))}",
        )
        raise ConfigError(problem, expected, "check the spelling")
    words["name"] = words.get("name") or called_by_default(base)
    words["memory"] = bytes_in(None if memory is None else str(memory))
    cache_memory, gap = words.get("cache_memory"), words.get("gap")
    words["cache_memory"] = bytes_in(
        None if cache_memory is None else str(cache_memory), "--cache-memory"
    )
    words["gap"] = seconds_in(None if gap is None else str(gap))
    words["pin"] = (pin,) if isinstance(pin, str) else tuple(pin)
    origins = words.get("cors") or ()
    words["cors"] = checked_origins((origins,) if isinstance(origins, str) else origins)
    if words.get("log_format", "text") not in FORMATS:
        problem = f"--log-format {words['log_format']!r}"
        raise ConfigError(problem, f"one of {listing(FORMATS)}", "check the spelling")
    return Settings(base, **{**words, "precision": precision})


def checked_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Origins as browsers send them. ``ConfigError``: one that no browser would send."""
    origins = tuple(dict.fromkeys(origins))
    wrong = [origin for origin in origins if origin != "*" and not _ORIGIN.fullmatch(origin)]
    problems = [
        sentence(
            f"--cors {origin!r}",
            "an origin: scheme, host and port, in small letters and without a path, or '*'",
            "write, for instance, https://app.example.com or http://localhost:3000",
        )
        for origin in wrong
    ]
    raise_all(ConfigError, "No server was started", problems)
    return origins


def must_have_keys_for_any_origin(settings: Settings, open_to_all: bool) -> None:
    """``ConfigError``: every page on the web could use a server that is open to all."""
    if open_to_all and "*" in settings.cors:
        do = "name the origins, or give --keys FILE"
        raise ConfigError("--cors '*' without keys", "keys, or origins by name", do)


def bytes_in(text: str | None, flag: str = "--memory") -> int | None:
    """A number of bytes such as "2GiB" or "500MB", the value of an option."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ConfigError(
            f"{flag} {text!r}", "a number of bytes", "write, for instance, 2GiB or 500MB"
        )
    return count


def seconds_in(text: str | None) -> float | None:
    """A duration such as "150ms" or "0.2s", in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s)\s*", text.lower())
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"--gap {text!r}", "a duration", "write, for instance, 150ms or 0.2s")
    return seconds


def called_by_default(base: str) -> str:
    """The name of a base for clients: the last part of its path or package; a hub id as it is."""
    if base.startswith("package:"):
        return base.removeprefix("package:")
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else base


def used_flags(options: dict[str, Any]) -> list[str]:
    """The flags of the options that have another value than None or "auto"."""
    return [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value not in (None, "auto")
    ]
