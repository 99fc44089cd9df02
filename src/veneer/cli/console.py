"""The two consoles (``out`` for results on stdout, ``err`` for everything else on stderr), and
functions that several commands share."""

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

import veneer
from veneer.errors import AdapterError, ConfigError, escape_controls, raise_all

if TYPE_CHECKING:
    from veneer.models.load import Base
    from veneer.store.library import Library


class SafeConsole(Console):
    """A console that prints escape sequences inside a text as visible characters, so that untrusted
    text, such as a name in an adapter file, cannot control the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(escape_controls(text), style)


# rich's markup, highlighting and emoji are off, because text of users may contain "[…]" or ":x:"
out = SafeConsole(markup=False, highlight=False, emoji=False)
err = SafeConsole(stderr=True, markup=False, highlight=False, emoji=False)


class _StderrHandler(logging.Handler):
    """Prints Veneer's log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), soft_wrap=True)


def setup_logging(formatter: logging.Formatter | None = None) -> None:
    """Print Veneer's log records (level INFO and above) on stderr. With ``formatter`` None, a line
    holds only the message, without time or level. Calling this again only changes the formatter."""
    logger = logging.getLogger("veneer")
    handlers = [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]
    if not handlers:
        handlers = [_StderrHandler()]
        logger.addHandler(handlers[0])
        logger.setLevel(logging.INFO)
        logger.propagate = False
    handlers[0].setFormatter(formatter or logging.Formatter())


def share_log_handlers(name: str) -> None:
    """Print the warnings and errors of the logger ``name``, which belongs to another library, in
    the same format as Veneer's. It replaces the logger's own handlers. Call `setup_logging`
    first."""
    logger = logging.getLogger(name)
    logger.handlers = [*logging.getLogger("veneer").handlers]
    logger.setLevel(logging.WARNING)
    logger.propagate = False


def sampling_options(
    model: Any, temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, Any]:
    """Return temperature, top_p and top_k for `veneer generate` and `veneer chat`, as keyword
    arguments of `train.generate.generate`.

    A flag that is None is replaced by the value in the base's generation_config.json, and a note on
    stderr lists these values. If that file does not set do_sample to true, the default temperature
    is 0 (greedy decoding), whatever temperature it gives."""
    from veneer.models.sampling_defaults import (
        CONFIG_FILE,
        NEUTRAL_VALUES,
        TRANSFORMERS_ONLY,
        sampling_defaults,
    )

    defaults = sampling_defaults(model)
    applied_names = {"repetition_penalty", *NEUTRAL_VALUES} - {*TRANSFORMERS_ONLY}
    if temperature is None:
        temperature = (
            (1.0 if defaults.temperature is None else defaults.temperature)
            if defaults.samples
            else 0.0
        )
        applied_names |= {"temperature"} if defaults.samples else set()
    if temperature:
        flag_values = {"top_p": top_p, "top_k": top_k}
        applied_names |= {name for name, value in flag_values.items() if value is None}
    if description := defaults.describe(applied_names):
        err.print(f"As the base's {CONFIG_FILE} says: {description}.")
    if description := defaults.describe(TRANSFORMERS_ONLY):
        err.print(f"Not applied, of the base's {CONFIG_FILE}: {description}.")
    top_p = defaults.top_p if top_p is None else top_p
    top_k = defaults.top_k if top_k is None else top_k
    return {
        "temperature": temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": top_k or 0,
    }


def echo_json(value: Any) -> None:
    """Print a value as JSON on stdout. Infinities and NaN, which JSON cannot represent, become
    null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    typer.echo(json.dumps(finite, indent=2))


def table_of(*headings: str) -> Table:
    """Create an empty table without borders, with one column for each heading. A heading that
    begins with ">" (which is not printed) marks a column of numbers, which is aligned right."""
    table = Table(box=None, header_style="bold", caption_justify="left")
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(
            heading[is_number:],
            justify="right" if is_number else "left",
            overflow="ellipsis" if is_number else "fold",
        )
    return table


def limit_rows(table: Table, entries: list[Any], max_rows: int, omitted_kind: str) -> list[Any]:
    """Return the first ``max_rows`` entries, or all if ``max_rows`` is 0, as the rows of ``table``.

    If entries are left out, the table's caption says "and 5 ``omitted_kind``", for example "and 5
    layers that differ less"."""
    if 0 < max_rows < len(entries):
        table.caption = f"and {len(entries) - max_rows} {omitted_kind} (--layers 0 shows all)"
    return entries[: max_rows or None]


def open_library(folder: Path | None) -> Library:
    """Open the library in a folder, or the default library."""
    from veneer.store.library import Library, default_folder

    return Library(default_folder() if folder is None else folder)


def open_base_and_adapter(
    base: str, adapter: str | None, verify: bool = True, **loading_options: Any
) -> tuple[Base, Any]:
    """Load a base, and attach one adapter as "default". Return the base and the adapter's handle,
    or None in place of the handle if ``adapter`` is None. For the arguments, see
    `open_base_and_adapters`."""
    loaded_base, handles = open_base_and_adapters(
        base, {} if adapter is None else {"default": adapter}, verify, **loading_options
    )
    return loaded_base, handles.get("default")


def open_base_and_adapters(
    base: str,
    adapters: Mapping[str, str],
    verify: bool = True,
    trusted: bool = False,
    **loading_options: Any,
) -> tuple[Base, dict[str, Any]]:
    """Load a base and attach adapters to it. Return the base and {name: handle of the adapter}. The
    adapters are read first, so that an error in one is reported before the base is loaded, which
    takes longer.

    Args:
        base: a folder, a .gguf file, package:NAME or a hub id.
        adapters: {name: folder, library:NAME or remote place}.
        verify: whether to refuse adapters that were trained on another base.
        trusted: whether Python code in the base's folder may run.
        loading_options: further arguments of `load_base`.
    """
    from veneer.models.encoders import must_be_causal
    from veneer.models.load import load_base
    from veneer.models.remote_code import trust_remote_code
    from veneer.store.library import resolve

    setup_logging()
    folders = {name: resolve(adapter) for name, adapter in adapters.items()}
    for folder in folders.values():
        veneer.adapter_files.read(folder, with_base=True)
    tokenizer = adapter_tokenizer(folders)
    with trust_remote_code(base, trusted):
        must_be_causal(base)
        loaded_base = load_base(base, **loading_options)
    handles = {
        name: veneer.load(loaded_base.model, folder, name=name, verify_base=verify, grow=True)
        for name, folder in folders.items()
    }
    return loaded_base if tokenizer is None else loaded_base._replace(tokenizer=tokenizer), handles


def must_be_adapters(folders: Iterable[str | Path]) -> None:
    """Raise AdapterError if one of the folders holds no adapter. Commands call this before they
    read or convert a base, so that this error comes at once."""
    from veneer.adapter_files.folder import folder_problems

    for folder in folders:
        raise_all(AdapterError, f"{folder} cannot be read", folder_problems(Path(folder)))


def tokenizer_for(base: str, adapter: str | None) -> Any:
    """Load the tokenizer for a base with an adapter: the one in the adapter's folder if there is
    one, because the adapter may have added tokens, else the base's."""
    from veneer.models.load import load_tokenizer
    from veneer.store.library import resolve

    setup_logging()
    folders = {} if adapter is None else {"default": resolve(adapter)}
    return adapter_tokenizer(folders) or load_tokenizer(base)


def adapter_tokenizer(folders: Mapping[str, Path]) -> Any:
    """Load a tokenizer that fits all adapters in ``folders``, {name: folder}: the one with all
    tokens that they added. Return None if no folder has a tokenizer, so that the base's fits."""
    from veneer.adapter_files.file_names import common_tokenizer
    from veneer.models.load import tokenizer_at

    tokenizer_folder = common_tokenizer(folders)
    return (
        None
        if tokenizer_folder is None
        else tokenizer_at(str(tokenizer_folder), str(tokenizer_folder))
    )


def base_and_adapter(
    handle: Any, include_base: bool
) -> list[tuple[str, AbstractContextManager[Any]]]:
    """Return the models that a command compares, as pairs (label for the output, context manager in
    which calls use this model).

    ``handle``: the handle of the attached adapter; None for the base alone. ``include_base``:
    whether to include the base beside the adapter."""
    if handle is None:
        return [("base", nullcontext())]
    return [
        *([("base", veneer.use(handle.model, None))] if include_base else []),
        ("adapter", handle.use()),
    ]


def base_files(base: str, adapter: str | Path) -> dict[str, Any]:
    """Return the keyword arguments ``base`` and ``model`` with which `tools.compose.compose`,
    `repair` and `examine` read weights of the base ``base``.

    If the base is a folder of unquantised safetensors files, weights are read from the files only
    when they are needed: ``base`` is a function from a weight's name to its tensor, and ``model``
    is the model with zeros for weights, for its modules and shapes. Any other base is loaded in
    full: ``base`` is the model, and there is no ``model``."""
    from veneer import models
    from veneer.adapter_files.folder import read
    from veneer.adapter_files.record import labels_in
    from veneer.fileio.untrusted import read_json
    from veneer.models.base_weights import folder_weights

    setup_logging()
    base_folder = models.folder_of(base)
    if read_json(base_folder / "config.json").get("quantization_config") or not any(
        base_folder.glob("*.safetensors")
    ):
        return {"base": models.load_base(base, precision="stored", device="cpu").model}
    adapter_record = read(adapter).metadata
    meta_model = models.meta_model(
        base_folder, adapter_record.get("base", {}).get("architecture"), labels_in(adapter_record)
    )
    return {"base": folder_weights(meta_model, base_folder).read, "model": meta_model}


def split_weight(text: str) -> tuple[str, float]:
    """Split ADAPTER[=WEIGHT] into the adapter's folder and the factor of its ΔW, by default 1. An
    adapter in a library or at a remote place is resolved to a local folder.

    A text that is an existing path is not split, because a path may contain an equals sign."""
    from veneer.store.library import resolve

    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        path, weight = text, "1"
    return str(resolve(path)), parse_number(weight, text)


def parse_number(number_text: str, argument: str) -> float:
    """Parse the number after "=" in a command-line argument. ``argument``: the whole argument, for
    the error message. ``ConfigError``: ``number_text`` is no finite number."""
    try:
        number = float(number_text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"{number_text!r} in {argument!r}", "a number after '='", "write, for instance, 0.5"
        )
    return number
