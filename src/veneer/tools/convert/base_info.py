"""Read from a base what a conversion needs: names and shapes of the weights, the config, and the
model if the values of weights are needed.

    open_base(model | "folder" | "file.gguf" | "package:NAME" | "owner/name") -> BaseInfo

For a folder of a transformers model, names and shapes come from the model, built without weights,
because a weight's name in the files may differ from its name in the model. For another folder of
safetensors files, or a diffusers pipeline, they come from the headers of the files. Any other base
is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from veneer import models
from veneer.adapter_files.peft_mapping import all_refs
from veneer.attach import ModelIndex
from veneer.bases import storage_of, weight_of
from veneer.errors import AdapterError, ConfigError, listing
from veneer.fileio.untrusted import read_header, read_json
from veneer.formats._base import BaseFacts
from veneer.formats.parts import PARTS
from veneer.layers import parameter_path
from veneer.models.meta import without_meta


@dataclass(frozen=True)
class BaseInfo:
    """The base of a conversion.

    Fields:
        facts: names and shapes of its weights, and its config.
        load_model: a function that loads the model; None if the conversion has no base.
        structure: the model, possibly with zeros for weights; None if only ``facts`` are known.
    """

    facts: BaseFacts
    load_model: Callable[[], nn.Module] | None
    structure: nn.Module | None


def open_base(base: nn.Module | str | Path | None) -> BaseInfo:
    """Names, shapes and config of a base. The weights of a folder are loaded only when
    ``BaseInfo.load_model`` is called."""
    if base is None:
        return BaseInfo(BaseFacts(), None, None)
    if isinstance(base, nn.Module):
        return BaseInfo(_model_facts(base), lambda: _require_weights(base), without_meta(base))
    path = Path(base)
    if path.is_dir() and any(path.rglob("*.safetensors")):
        load_model = cache(lambda: models.load_base(base, precision="stored", device="cpu").model)
        facts, structure = _folder_facts(path)
        return BaseInfo(facts, load_model, structure)
    model = models.load_base(base, precision="stored", device="cpu").model
    return BaseInfo(_model_facts(model, str(base)), lambda: model, model)


def _require_weights(model: nn.Module) -> nn.Module:
    """Return ``model`` unchanged. ``AdapterError``: some of its weights are on the meta device."""
    meta_names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta_names:
        raise AdapterError(
            f"a base on the meta device ({listing(meta_names, 2)})",
            "its weights",
            "load them first",
        )
    return model


def _model_facts(model: nn.Module, name: str | None = None) -> BaseFacts:
    """Names, shapes and config of a model. ``name``: the name of the base for the adapter's record;
    None takes the name in the config."""
    model_index = ModelIndex(model)
    weights_by_name = {
        parameter_path(*ref): weight_of(model_index.modules[ref[0]], ref[1])
        for ref in all_refs(model_index)
    }
    shapes = {
        weight_name: tuple(storage_of(weight).shape(weight))
        for weight_name, weight in weights_by_name.items()
        if weight is not None
    }
    config: Any = getattr(model, "config", None)
    name = name or getattr(config, "_name_or_path", "") or None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return BaseFacts(shapes, config.to_dict() if hasattr(config, "to_dict") else {}, name)


def _folder_facts(path: Path) -> tuple[BaseFacts, nn.Module | None]:
    """(names, shapes and config of the base in a folder, the model with zeros for weights). The
    model is None if the folder has no transformers config, or transformers lacks the model's
    class."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if config.get("model_type") and config.get("architectures"):
        try:
            model = models.meta_model(path)
            return _model_facts(model, str(path)), model
        except ConfigError:
            # transformers lacks the class, so names and shapes are read from the files below
            pass
    shapes = {
        parameter_path(component, name): tensor_entry.shape
        for component in ("", *PARTS)
        for file_path in sorted((path / component).glob("*.safetensors"))
        for name, tensor_entry in read_header(file_path).tensors.items()
    }
    return BaseFacts(shapes, config.get("text_config") or config, str(path)), None
