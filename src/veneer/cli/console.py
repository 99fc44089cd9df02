"""The two consoles (results to stdout, everything else to stderr), and what several commands
share."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.segment import Segment
from rich.table import Table

from veneer.errors import ConfigError, escape_controls

if TYPE_CHECKING:
    from veneer.models.load import Base
    from veneer.store.library import Library


class SafeConsole(Console):
    """A console on which texts of strangers steer nothing: escape sequences in them are shown, not
    sent."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(escape_controls(text), style)


# What is printed may hold brackets, numbers and ":x:" of the user's: no markup, no colours, no
# pictures for them.
out = SafeConsole(markup=False, highlight=False, emoji=False)
err = SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


class _Notes(logging.Handler):
    """Veneer's log records as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), soft_wrap=True)


def setup_logging() -> None:
    logger = logging.getLogger("veneer")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def sampling_options(
    model: Any, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """How `veneer generate` and `veneer chat` sample: as they are told, else as the base's file
    says, with a note of what it says. A file without do_sample = true asks for the most likely
    token, whatever else it holds."""
    from veneer.models.sampling_defaults import FILE, NEUTRAL, SAMPLER, sampling_defaults

    base = sampling_defaults(model)
    applied = {"repetition_penalty", *NEUTRAL} - {*SAMPLER}
    if temperature is None:
        temperature = (
            (1.0 if base.temperature is None else base.temperature) if base.samples else 0.0
        )
        applied |= {"temperature"} if base.samples else set()
    if temperature:
        applied |= {name for name, value in (("top_p", top_p), ("top_k", top_k)) if value is None}
    if words := base.describe(applied):
        err.print(f"As the base's {FILE} says: {words}.")
    if words := base.describe(SAMPLER):
        err.print(f"Not applied, of the base's {FILE}: {words}.")
    top_p = base.top_p if top_p is None else top_p
    top_k = base.top_k if top_k is None else top_k
    return {
        "temperature": temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": top_k or 0,
    }


def echo_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def table_of(*heads: str) -> Table:
    """A plain table. A head that begins with ">" is that of a column of numbers."""
    table = Table(box=None, header_style="bold", caption_justify="left")
    for head in heads:
        number = head.startswith(">")
        table.add_column(
            head[number:],
            justify="right" if number else "left",
            overflow="ellipsis" if number else "fold",
        )
    return table


def shown(table: Table, ordered: list[Any], count: int, others: str) -> list[Any]:
    """The first ``count`` entries, all if it is 0; what is left out is counted under the table."""
    if 0 < count < len(ordered):
        table.caption = f"and {len(ordered) - count} {others} (--layers 0 shows all)"
    return ordered[: count or None]


def open_library(folder: Path | None) -> Library:
    """The library in a folder, or the default one."""
    from veneer.store.library import Library, default_folder

    return Library(default_folder() if folder is None else folder)


def open_base_and_adapter(
    base: str, adapter: str | None, verify: bool = True, **loading: Any
) -> tuple[Base, Any]:
    """The base and the handle of `adapter` on it, if given: read first, since it is the quicker to
    fail. `loading`: as `load_base` takes it."""
    loaded, handles = open_base_and_adapters(
        base, {} if adapter is None else {"default": adapter}, verify, **loading
    )
    return loaded, handles.get("default")


def open_base_and_adapters(
    base: str,
    adapters: Mapping[str, str],
    verify: bool = True,
    trusted: bool = False,
    **loading: Any,
) -> tuple[Base, dict[str, Any]]:
    """The same for several adapters, by name. ``trusted``: code beside the base may run."""
    import veneer
    from veneer.models.encoders import must_be_causal
    from veneer.models.load import load_base
    from veneer.models.remote_code import trust_remote_code
    from veneer.store.library import resolve

    setup_logging()
    folders = {name: resolve(adapter) for name, adapter in adapters.items()}
    for folder in folders.values():
        veneer.adapter_files.read(folder)
    tokenizer = _tokenizer_of_all(folders)
    with trust_remote_code(base if trusted else None):
        must_be_causal(base)
        loaded = load_base(base, **loading)
    names = folders.items()
    handles = {
        name: veneer.load(loaded.model, folder, name=name, verify_base=verify, grow=True)
        for name, folder in names
    }
    return loaded if tokenizer is None else loaded._replace(tokenizer=tokenizer), handles


def must_be_adapters(folders: Iterable[str | Path]) -> None:
    """Refuse folders that hold no adapter, before a base is converted or read for them."""
    from veneer.adapter_files.folder import folder_problems
    from veneer.errors import AdapterError, raise_all

    for folder in folders:
        raise_all(AdapterError, f"{folder} cannot be read", folder_problems(Path(folder)))


def tokenizer_for(base: str, adapter: str | None) -> Any:
    """The tokenizer of a base, or that beside the adapter which trains tokens of its own."""
    from veneer.models.load import load_tokenizer
    from veneer.store.library import resolve

    setup_logging()
    return (None if adapter is None else tokenizer_beside(resolve(adapter))) or load_tokenizer(base)


def tokenizer_beside(folder: Path) -> Any:
    """The tokenizer in the folder of an adapter that trains tokens, or None."""
    return _tokenizer_of_all({"": folder})


def _tokenizer_of_all(folders: Mapping[str, Path]) -> Any:
    """The one with all tokens of these adapters' own, or None."""
    from veneer.adapter_files.file_names import common_tokenizer
    from veneer.models.load import tokenizer_at

    place = common_tokenizer(folders)
    return None if place is None else tokenizer_at(str(place), str(place))


def base_and_adapter(handle: Any, base: bool) -> list[tuple[str, AbstractContextManager[Any]]]:
    """(label, what selects it) of each model that a command runs: the base if ``base``, the adapter
    if any."""
    import veneer

    if handle is None:
        return [("base", nullcontext())]
    return [
        *([("base", veneer.use(handle.model, None))] if base else []),
        ("adapter", handle.use()),
    ]


def base_files(base: str, adapter: str | Path) -> dict[str, Any]:
    """A base as the tools take it: {"base", "model"}. Of a folder they read the weights that they
    need; what is packed in the files, or no safetensors, only the model itself can tell."""
    from veneer import models
    from veneer.adapter_files.folder import read
    from veneer.adapter_files.record import labels_in
    from veneer.fileio.untrusted import read_json
    from veneer.models.base_weights import folder_weights

    setup_logging()
    folder = models.folder_of(base)
    if read_json(folder / "config.json").get("quantization_config") or not any(
        folder.glob("*.safetensors")
    ):
        return {"base": models.load_base(base, precision="stored", device="cpu").model}
    record = read(adapter).metadata
    structure = models.meta_model(
        folder, record.get("base", {}).get("architecture"), labels_in(record)
    )
    return {"base": folder_weights(structure, folder).read, "model": structure}


def split_weight(text: str) -> tuple[str, float]:
    """An adapter (a folder, library:NAME, a remote place) and its weight; a path that exists may
    hold an equals sign itself."""
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
        raise ConfigError(f"{word!r} in {text!r}", "a number after '='", "write, for instance, 0.5")
    return number
