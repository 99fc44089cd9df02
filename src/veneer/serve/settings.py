"""The options of `veneer serve`. Nothing of a model is loaded for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError, listing

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
    tool_call_parser: str | None = None  # a name of serve/tools; None: by the chat template
    trust_remote_code: bool = False  # code beside the base may run


def settings_of(base: str, **words: Any) -> Settings:
    """``Settings`` as somebody writes them, on a command line or in a file: ``memory`` as "2GiB",
    torch's words for a ``precision``, one ``pin`` or several. ``ConfigError``: a word that means
    nothing."""
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
    words["pin"] = (pin,) if isinstance(pin, str) else tuple(pin)
    return Settings(base, **{**words, "precision": precision})


def bytes_in(text: str | None) -> int | None:
    """A number of bytes such as "2GiB" or "500MB"."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise ConfigError(
            f"--memory {text!r}", "a number of bytes", "write, for instance, 2GiB or 500MB"
        )
    return count


def called_by_default(base: str) -> str:
    """The name of a base for clients: the last part of its path or package; a hub id as it is."""
    if base.startswith("package:"):
        return base.removeprefix("package:")
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else base


def given(options: dict[str, Any]) -> list[str]:
    """The flags of these options that were given."""
    return [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if value not in (None, "auto")
    ]
