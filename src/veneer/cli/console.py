"""The two consoles (results to stdout, everything else to stderr), and what several commands share."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from veneer.errors import ConfigError, sentence

if TYPE_CHECKING:
    from veneer.models import Base

# What is printed may hold brackets and numbers of the user's: no markup, no colours on them.
out = Console(markup=False, highlight=False)
err = Console(stderr=True, markup=False, highlight=False)


class _Notes(logging.Handler):
    """Veneer's log records as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), soft_wrap=True)


def setup_logging() -> None:
    """Show Veneer's own notes, once."""
    logger = logging.getLogger("veneer")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def open_pair(base: str, adapter: Path | None, precision: str, verify: bool = True) -> tuple[Base, Any]:
    """The base and, if `adapter` is given, the handle of that adapter on it. Reads the adapter first: it is the
    quicker to fail."""
    import veneer
    from veneer.models import load_base

    setup_logging()
    if adapter is not None:
        veneer.adapter.read(adapter)
    loaded = load_base(base, precision=precision)  # type: ignore[arg-type]
    if adapter is None:
        return loaded, None
    return loaded, veneer.load(loaded.model, adapter, verify_base=verify)


def split_weight(text: str) -> tuple[str, float]:
    """A path and its weight; a path that exists may hold an equals sign itself."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    return path, number_in(weight, text)


def number_in(word: str, text: str) -> float:
    """The number behind an equals sign."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(sentence(f"{word!r} in {text!r}", "a number after '='", "write, for instance, 0.5"))
    return number
