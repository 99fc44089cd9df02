"""A base as conversions ask for it: the names and shapes of its weights, its config, and the model itself only where
numbers are needed.

    open_base(model | "folder" | "file.gguf" | "package:NAME" | "owner/name")  ->  Opened(facts, module)

A folder of safetensors is read by its headers, and so is that of a diffusers pipeline, part by part. Everything else is
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from veneer.adapted import weight_of
from veneer.attach import parameter_path
from veneer.bases import storage_of
from veneer.errors import AdapterError, ConfigError, listing, sentence
from veneer.filing import all_slots
from veneer.formats._base import Base
from veneer.formats.parts import PARTS
from veneer.targets import Names


@dataclass(frozen=True)
class Opened:
    """A base: what its files say, and how to have the model itself."""

    facts: Base
    module: Callable[[], nn.Module]


def open_base(base: nn.Module | str | Path) -> Opened:
    """What a base says of itself. A folder is read by its headers; the model is loaded when it is asked for."""
    if isinstance(base, nn.Module):
        return Opened(_facts_of(base), lambda: _numbered(base))
    path = Path(base)
    if path.is_dir() and any(path.rglob("*.safetensors")):
        return Opened(_facts_in(path), lambda: _load(base))
    model = _load(base)
    return Opened(_facts_of(model, str(base)), lambda: model)


def _load(base: str | Path) -> nn.Module:
    from veneer.models import load_base

    return load_base(base, precision="stored", device="cpu").model


def _numbered(model: nn.Module) -> nn.Module:
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        found = f"a base on the meta device ({listing(empty, 2)})"
        raise AdapterError(sentence(found, "its weights", "load them first"))
    return model


def _facts_of(model: nn.Module, name: str | None = None) -> Base:
    names = Names(model)
    held = {parameter_path(*slot): weight_of(names.modules[slot[0]], slot[1]) for slot in all_slots(names)}
    shapes = {at: tuple(storage_of(weight).shape(weight)) for at, weight in held.items() if weight is not None}
    config: Any = getattr(model, "config", None)
    name = name or getattr(config, "_name_or_path", "") or None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    return Base(shapes, said, name)


def _facts_in(path: Path) -> Base:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        shapes |= _shapes(file, "")
    for part in PARTS:
        for file in sorted((path / part).glob("*.safetensors")):
            shapes |= _shapes(file, f"{part}.")
    try:
        config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
    except json.JSONDecodeError as error:
        found = f"{path / 'config.json'}, which is not JSON ({error})"
        raise ConfigError(sentence(found, "a model's config", "get the file again")) from error
    return Base(shapes, config.get("text_config") or config, str(path))


def _shapes(file: Path, start: str) -> dict[str, tuple[int, ...]]:
    header_of(file)  # one clear error for a damaged file
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()  # a list: safe_open is no mapping
        return {f"{start}{name}": tuple(opened.get_slice(name).get_shape()) for name in names}


def header_of(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The keys and the header of a safetensors file, without its tensors."""
    try:
        with safe_open(path, framework="pt") as opened:
            return tuple(opened.keys()), opened.metadata() or {}
    except (SafetensorError, ValueError, RuntimeError) as error:
        found = f"{path}, which cannot be read ({error})"
        do = "get the file again; it may be cut short"
        raise AdapterError(sentence(found, "a whole safetensors file", do)) from error
