"""The two consoles (results to stdout, everything else to stderr), and what several commands share."""

from __future__ import annotations

import json
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from veneer.errors import ConfigError, sentence

if TYPE_CHECKING:
    from veneer.models.load import Base
    from veneer.store.library import Library

# What is printed may hold brackets, numbers and ":x:" of the user's: no markup, no colours, no pictures for them.
out = Console(markup=False, highlight=False, emoji=False)
err = Console(stderr=True, markup=False, highlight=False, emoji=False)


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


def echo_json(value: Any) -> None:
    """A result on stdout, as JSON that is indented."""
    typer.echo(json.dumps(value, indent=2))


def open_library(folder: Path | None) -> Library:
    """The library in a folder, or the default one."""
    from veneer.store.library import Library, default_folder

    return Library(default_folder() if folder is None else folder)


def open_base_and_adapter(base: str, adapter: str | None, precision: str, verify: bool = True) -> tuple[Base, Any]:
    """The base and, if `adapter` is given, the handle of that adapter on it. Reads the adapter first: it is the
    quicker to fail."""
    import veneer
    from veneer.models.encoders import must_be_causal
    from veneer.models.load import load_base
    from veneer.store.library import resolve

    setup_logging()
    folder = None if adapter is None else resolve(adapter)
    if folder is not None:
        veneer.adapter_files.read(folder)
    must_be_causal(base)
    loaded = load_base(base, precision=precision)  # type: ignore[arg-type]
    if folder is None:
        return loaded, None
    return loaded, veneer.load(loaded.model, folder, verify_base=verify)


def base_and_adapter(handle: Any, base: bool) -> list[tuple[str, str | None]]:
    """(label, adapter to select) of each model that a command runs: the base if ``base``, the adapter if any."""
    labels: list[tuple[str, str | None]] = [("base", None)] if base or handle is None else []
    return labels if handle is None else [*labels, ("adapter", handle.name)]


def selected(model: Any, handle: Any, name: str | None) -> AbstractContextManager[Any]:
    """The adapter ``name``, or the base for None, selected on a model that may have no adapter at all."""
    import veneer

    return nullcontext() if handle is None else veneer.use(model, name)


def split_weight(text: str) -> tuple[str, float]:
    """An adapter (a folder, library:NAME, a remote place) and its weight; a path that exists may hold an equals sign
    itself."""
    from veneer.store.library import resolve

    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        path, weight = text, "1"
    return str(resolve(path)), number_in(weight, text)


def number_in(word: str, text: str) -> float:
    """The number behind an equals sign."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(sentence(f"{word!r} in {text!r}", "a number after '='", "write, for instance, 0.5"))
    return number
