"""Write the files of a merged checkpoint that hold no weights: configuration and tokenizer.

Weights in other formats are not copied, because the adapters are not merged into them. Folders that
contain such files and hidden folders (of git and the Hub's client) are left out as well.
config.json is rewritten if the merge changes the dtype, the size of the vocabulary, or the labels
of a classifier. The tokenizer is the adapter's if the adapter added tokens to it, else the base's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.adapter_files.file_names import TOKENIZER_FILES
from veneer.models.safetensors_dir import Checkpoint
from veneer.tools.merge_checkpoint.growth import Head

#: the record of the merge, and the configuration of the model
MERGE_RECORD, MODEL_CONFIG = "veneer_merge.json", "config.json"
#: suffixes of files that hold weights
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
    """(the paths of the files to copy, relative to the base's folder; the names of the files and
    folders in the base's folder that are left out)."""
    files, left_out, folder = [], [], checkpoint.folder
    for path in sorted(folder.iterdir()):
        if path.name in checkpoint.files or path.name in (checkpoint.index_name, MERGE_RECORD):
            continue
        contained_paths = (
            [path]
            if not path.is_dir()
            else []
            if path.name.startswith(".")
            else list(path.rglob("*"))
        )
        # a link to a folder is not followed, and is left out as if it led to weights
        has_weights = any(
            file.name.endswith(WEIGHT_SUFFIXES) or (file.is_dir() and file.is_symlink())
            for file in contained_paths
        )
        if has_weights or not contained_paths:
            left_out.append(path.name)
        else:
            files += sorted(
                file.relative_to(folder) for file in contained_paths if not file.is_dir()
            )
    return files, left_out


@dataclass(frozen=True)
class FileChanges:
    """How the configuration and the tokenizer of the result differ from the base's.

    Fields:
        dtype: the new dtype in config.json; None: unchanged.
        vocabulary_size: the new number of tokens in config.json; None: unchanged.
        tokenizer: the folder of a tokenizer with added tokens; None: the base's tokenizer stays.
        head: the class and labels of a classifier in the adapters; None: there is none.
    """

    dtype: torch.dtype | None = None
    vocabulary_size: int | None = None
    tokenizer: Path | None = None
    head: Head | None = None

    @property
    def changes_config(self) -> bool:
        """Whether config.json changes."""
        return (self.dtype, self.vocabulary_size, self.head) != (None, None, None)


def write_aux_files(checkpoint: Checkpoint, changes: FileChanges, target: Path) -> list[str]:
    """Write the files that hold no weights into the folder ``target``. Returns the names of the
    base's files and folders that are left out."""
    files, left_out = _sources(checkpoint, changes)
    for file, source in files.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file == Path(MODEL_CONFIG) and changes.changes_config:
            (target / file).write_bytes(_expected_content(source, changes, file))
        else:
            shutil.copyfile(source, target / file)
    return left_out


def list_differences(checkpoint: Checkpoint, changes: FileChanges, target: Path) -> Iterator[str]:
    """Descriptions of the files in ``target`` that ``write_aux_files`` would write differently."""
    for file, source in _sources(checkpoint, changes)[0].items():
        if not (target / file).is_file():
            yield f"{file} is not there"
        elif (target / file).read_bytes() != _expected_content(source, changes, file):
            yield f"{file} is another file than the base's"


def _sources(checkpoint: Checkpoint, changes: FileChanges) -> tuple[dict[Path, Path], list[str]]:
    """(the source of each file of the result, by its path in the result; the names of files and
    folders of the base that are left out)."""
    files, left_out = list_aux_files(checkpoint)
    sources = {file: checkpoint.folder / file for file in files}
    if changes.tokenizer is not None:
        sources = {
            file: source for file, source in sources.items() if file.name not in TOKENIZER_FILES
        }
        sources |= {
            Path(name): changes.tokenizer / name
            for name in TOKENIZER_FILES
            if (changes.tokenizer / name).is_file()
        }
    return sources, left_out


def _expected_content(source: Path, changes: FileChanges, file: Path) -> bytes:
    """The bytes of ``file`` in the result, from the bytes of its ``source``."""
    content = source.read_bytes()
    if file != Path(MODEL_CONFIG) or not changes.changes_config:
        return content
    config = json.loads(content)
    if changes.dtype is not None:
        config = _with_dtype(config, str(changes.dtype).removeprefix("torch."))
    if changes.vocabulary_size is not None:
        config = _with_vocab_size(config, changes.vocabulary_size)
    if changes.head is not None:
        config = _with_labels(config, changes.head)
        if config == json.loads(content):
            return content
    return (json.dumps(config, indent=2) + "\n").encode()


def _with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The config with this vocabulary size. If there is a ``text_config``, transformers reads the
    size there, and the size at the top level is changed only if it exists. Else the size is set at
    the top level."""
    size, text_config = {"vocab_size": vocab_size}, config.get("text_config")
    if not isinstance(text_config, dict):
        return {**config, **size}
    top_size = size if "vocab_size" in config else {}
    return {**config, **top_size, "text_config": {**text_config, **size}}


def _with_labels(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """The config with the class and the labels of ``head``."""
    labels_by_index = config.get("id2label") or {}
    labels = [str(labels_by_index.get(str(index))) for index in range(len(labels_by_index))]
    if labels != [*head.labels]:
        labels_by_index = {str(index): label for index, label in enumerate(head.labels)}
        config = {
            **config,
            "id2label": labels_by_index,
            "label2id": {label: index for index, label in enumerate(head.labels)},
        }
        config.pop("num_labels", None)
    return {**config, "architectures": [head.architecture]}


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config with ``dtype`` instead of each dtype in it, at any depth."""
    if isinstance(config, dict):
        return {
            key: dtype if key in ("dtype", "torch_dtype") and entry else _with_dtype(entry, dtype)
            for key, entry in config.items()
        }
    return [_with_dtype(entry, dtype) for entry in config] if isinstance(config, list) else config
