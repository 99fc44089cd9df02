"""The files beside the weights that a merged checkpoint needs too: configuration and tokenizer.

Not copied are weights in other formats, which would be those of the base, folders with such files,
and hidden folders (of git and the hub's client). config.json is rewritten if the merge changes the
dtype, the size of the vocabulary or the labels of a classifier. The tokenizer is the adapter's if
the adapter added tokens to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.adapter_files.file_names import TOKENIZER
from veneer.models.safetensors_dir import Checkpoint
from veneer.tools.merge_checkpoint.growth import Head

RECORD, CONFIG = "veneer_merge.json", "config.json"
#: files that hold the same weights in other formats
WEIGHT_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".onnx",
    ".gguf",
    ".safetensors",
)


def list_aux_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """(the files to copy, relative to the folder; the names in it that are left out)."""
    files, left_out, folder = [], [], checkpoint.folder
    for path in sorted(folder.iterdir()):
        if path.name in checkpoint.files or path.name in (checkpoint.index_name, RECORD):
            continue
        contents = (
            [path]
            if not path.is_dir()
            else []
            if path.name.startswith(".")
            else list(path.rglob("*"))
        )
        # links to folders are not followed, so they may lead to weights
        has_weights = any(
            file.name.endswith(WEIGHT_SUFFIXES) or (file.is_dir() and file.is_symlink())
            for file in contents
        )
        if has_weights or not contents:
            left_out.append(path.name)
        else:
            files += sorted(file.relative_to(folder) for file in contents if not file.is_dir())
    return files, left_out


@dataclass(frozen=True)
class ConfigChanges:
    """The differences from the base's files. ``dtype`` (None: unchanged), ``vocabulary``: rows of
    the vocabulary (None: unchanged), ``tokenizer``: folder of a tokenizer with added tokens (None:
    the base's), ``head``: of a classifier (None: the adapters have none)."""

    dtype: torch.dtype | None = None
    vocabulary: int | None = None
    tokenizer: Path | None = None
    head: Head | None = None

    @property
    def of_config(self) -> bool:
        return (self.dtype, self.vocabulary, self.head) != (None, None, None)


def write_aux_files(checkpoint: Checkpoint, changes: ConfigChanges, target: Path) -> list[str]:
    """Write the files into the folder ``target``; returns the names of those that were left out."""
    files, left_out = _sources(checkpoint, changes)
    for file, source in files.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file == Path(CONFIG) and changes.of_config:
            (target / file).write_bytes(_expected_content(source, changes, file))
        else:
            shutil.copyfile(source, target / file)
    return left_out


def list_differences(checkpoint: Checkpoint, changes: ConfigChanges, target: Path) -> Iterator[str]:
    """Differences between ``target`` and what ``write_aux_files`` would write."""
    for file, source in _sources(checkpoint, changes)[0].items():
        if not (target / file).is_file():
            yield f"{file} is not there"
        elif (target / file).read_bytes() != _expected_content(source, changes, file):
            yield f"{file} is another file than the base's"


def _sources(checkpoint: Checkpoint, changes: ConfigChanges) -> tuple[dict[Path, Path], list[str]]:
    """(the source of each file of the result, the names of those that are left out)."""
    files, left_out = list_aux_files(checkpoint)
    sources = {file: checkpoint.folder / file for file in files}
    if changes.tokenizer is not None:
        sources = {file: source for file, source in sources.items() if file.name not in TOKENIZER}
        sources |= {
            Path(name): changes.tokenizer / name
            for name in TOKENIZER
            if (changes.tokenizer / name).is_file()
        }
    return sources, left_out


def _expected_content(source: Path, changes: ConfigChanges, file: Path) -> bytes:
    content = source.read_bytes()
    if file != Path(CONFIG) or not changes.of_config:
        return content
    config = json.loads(content)
    if changes.dtype is not None:
        config = _with_dtype(config, str(changes.dtype).removeprefix("torch."))
    if changes.vocabulary is not None:
        config = _with_vocab_size(config, changes.vocabulary)
    if changes.head is not None:
        config = _with_labels(config, changes.head)
        if config == json.loads(content):
            return content
    return (json.dumps(config, indent=2) + "\n").encode()


def _with_vocab_size(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The config with another vocabulary size, in its ``text_config`` if it has one without its own
    size."""
    if "vocab_size" in config or not isinstance(config.get("text_config"), dict):
        return {**config, "vocab_size": rows}
    return {**config, "text_config": {**config["text_config"], "vocab_size": rows}}


def _with_labels(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """The config with the class and the labels of ``head``."""
    names = config.get("id2label") or {}
    if [str(names.get(str(number))) for number in range(len(names))] != [*head.labels]:
        names = {str(number): label for number, label in enumerate(head.labels)}
        config = {
            **config,
            "id2label": names,
            "label2id": {label: number for number, label in enumerate(head.labels)},
        }
        config.pop("num_labels", None)
    return {**config, "architectures": [head.architecture]}


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config with ``dtype`` wherever it names one."""
    if isinstance(config, dict):
        return {
            k: dtype if k in ("dtype", "torch_dtype") and v else _with_dtype(v, dtype)
            for k, v in config.items()
        }
    return [_with_dtype(each, dtype) for each in config] if isinstance(config, list) else config
