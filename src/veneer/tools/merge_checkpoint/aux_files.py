"""Write the files of a merged checkpoint that hold no weights: configuration and tokenizer.

Weights in other formats than safetensors are not copied, because the adapters are not merged into
them. A folder that contains weights is left out as a whole, and so are hidden folders (of git and
the Hub's client).
config.json is rewritten if the merge changes the dtype, the size of the vocabulary, or the labels
or the padding token of a classifier. The tokenizer is the adapter's if the adapter added tokens to
it, else the base's.
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
from veneer.errors import AdapterError
from veneer.fileio.untrusted import read_json
from veneer.models.load import padding_token, tokenizer_at
from veneer.models.safetensors_dir import PROCESSOR_FILES, TEXT_FILES, Checkpoint
from veneer.tools.merge_checkpoint.growth import Head

#: file names: the record that a merge writes, and the configuration of the model
MERGE_RECORD, MODEL_CONFIG = "veneer_merge.json", "config.json"
#: the field of the record that lists the files without weights
FILES_FIELD = "files"
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
    """(the paths of the files without weights, relative to the base's folder, which are copied to
    the result; the names of the files and folders in the base's folder that are left out: those
    with weights in other formats, hidden folders and empty folders). Neither has the files that the
    merge writes itself: the checkpoint's own files, their index and ``MERGE_RECORD``."""
    copied_paths, left_out, folder = [], [], checkpoint.folder
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
        # ``rglob`` does not follow a link to a folder. The linked folder may hold weights, so the
        # folder with the link is left out.
        has_weights = any(
            contained_path.name.endswith(WEIGHT_SUFFIXES)
            or (contained_path.is_dir() and contained_path.is_symlink())
            for contained_path in contained_paths
        )
        if has_weights or not contained_paths:
            left_out.append(path.name)
        else:
            copied_paths += sorted(
                contained_path.relative_to(folder)
                for contained_path in contained_paths
                if not contained_path.is_dir()
            )
    return copied_paths, left_out


@dataclass(frozen=True)
class FileChanges:
    """How the configuration and the tokenizer of the result differ from the base's.

    Fields:
        dtype: the new dtype in config.json; None: unchanged.
        vocabulary_size: the new number of tokens in config.json; None: unchanged.
        tokenizer_folder: the folder of a tokenizer with added tokens; None: the base's tokenizer
            stays.
        head: the model class and labels for config.json if the adapters have a classification head;
            None: both stay unchanged.
    """

    dtype: torch.dtype | None = None
    vocabulary_size: int | None = None
    tokenizer_folder: Path | None = None
    head: Head | None = None

    @property
    def changes_config(self) -> bool:
        """Whether config.json changes."""
        return (self.dtype, self.vocabulary_size, self.head) != (None, None, None)


def write_aux_files(checkpoint: Checkpoint, changes: FileChanges, target_folder: Path) -> list[str]:
    """Write the files that hold no weights into ``target_folder``. Returns the names of the base's
    files and folders that are not copied (``list_aux_files``)."""
    source_paths, left_out = _sources(checkpoint, changes)
    for relative_path, source_path in source_paths.items():
        (target_folder / relative_path).parent.mkdir(parents=True, exist_ok=True)
        if relative_path == Path(MODEL_CONFIG) and changes.changes_config:
            (target_folder / relative_path).write_bytes(
                _expected_content(source_path, changes, relative_path)
            )
        else:
            shutil.copyfile(source_path, target_folder / relative_path)
    return left_out


def list_written_files(checkpoint: Checkpoint, changes: FileChanges) -> list[str]:
    """The paths, relative to the result, of the files that ``write_aux_files`` writes."""
    return sorted(relative_path.as_posix() for relative_path in _sources(checkpoint, changes)[0])


def list_earlier_files(merged_folder: Path) -> list[str]:
    """The names of the files of a tokenizer, a processor or generation that an earlier merge wrote
    to ``merged_folder``, as its record says; empty without a valid record. transformers would use
    them with the weights of another merge."""
    record_path = merged_folder / MERGE_RECORD
    try:
        listed_names = read_json(record_path).get(FILES_FIELD) if record_path.is_file() else None
    except (AdapterError, OSError):
        return []
    known_names = (*TEXT_FILES, *PROCESSOR_FILES)
    return [name for name in known_names if isinstance(listed_names, list) and name in listed_names]


def list_differences(
    checkpoint: Checkpoint, changes: FileChanges, merged_folder: Path
) -> Iterator[str]:
    """An error text for each file that ``write_aux_files`` would write, and that is missing from
    ``merged_folder`` or has other bytes there; and for each other file of a tokenizer, a processor
    or generation in ``merged_folder``, which transformers would use with the merged weights."""
    source_paths, _ = _sources(checkpoint, changes)
    for name in (*TEXT_FILES, *PROCESSOR_FILES):
        if Path(name) not in source_paths and (merged_folder / name).exists():
            yield f"{name} is there, which this merge does not write"
    for relative_path, source_path in source_paths.items():
        if not (merged_folder / relative_path).is_file():
            yield f"{relative_path} is not there"
        elif (merged_folder / relative_path).read_bytes() != _expected_content(
            source_path, changes, relative_path
        ):
            yield f"{relative_path} is another file than the base's"


def _sources(checkpoint: Checkpoint, changes: FileChanges) -> tuple[dict[Path, Path], list[str]]:
    """(for each file to write, by its path in the result: the path of the file that it is copied
    or derived from; the names of files and folders of the base that are not copied)."""
    relative_paths, left_out = list_aux_files(checkpoint)
    source_paths = {
        relative_path: checkpoint.folder / relative_path for relative_path in relative_paths
    }
    if changes.tokenizer_folder is not None:
        source_paths = {
            relative_path: source_path
            for relative_path, source_path in source_paths.items()
            if relative_path.name not in TOKENIZER_FILES
        }
        source_paths |= {
            Path(name): changes.tokenizer_folder / name
            for name in TOKENIZER_FILES
            if (changes.tokenizer_folder / name).is_file()
        }
    return source_paths, left_out


def _expected_content(source_path: Path, changes: FileChanges, relative_path: Path) -> bytes:
    """The bytes that the file at ``relative_path`` has in the result: those of ``source_path``,
    adjusted to ``changes`` if the file is config.json."""
    content = source_path.read_bytes()
    if relative_path != Path(MODEL_CONFIG) or not changes.changes_config:
        return content
    config = json.loads(content)
    if changes.dtype is not None:
        config = _with_dtype(config, str(changes.dtype).removeprefix("torch."))
    if changes.vocabulary_size is not None:
        config = _with_vocab_size(config, changes.vocabulary_size)
    if changes.head is not None:
        config = _with_labels(config, changes.head)
        tokenizer_folder = str(changes.tokenizer_folder or source_path.parent)
        if any(Path(tokenizer_folder, name).is_file() for name in TOKENIZER_FILES[:2]):
            # as in training: classifiers of decoders find a row's last token by the padding token
            tokenizer = tokenizer_at(tokenizer_folder, tokenizer_folder)
            (config.get("text_config") or config)["pad_token_id"] = padding_token(tokenizer)
        if config == json.loads(content):
            return content
    return (json.dumps(config, indent=2) + "\n").encode()


def _with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """A copy of the config with this vocabulary size. If the config has a ``text_config``,
    transformers reads the size there. Then the size is set in ``text_config``, and at the top level
    only if the config has a size there too. Otherwise it is set at the top level."""
    size_entry, text_config = {"vocab_size": vocab_size}, config.get("text_config")
    if not isinstance(text_config, dict):
        return {**config, **size_entry}
    top_level_entry = size_entry if "vocab_size" in config else {}
    return {**config, **top_level_entry, "text_config": {**text_config, **size_entry}}


def _with_labels(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """A copy of the config with the class and the labels of ``head``. If the labels differ from the
    config's, ``num_labels`` is removed, because transformers derives it from the labels."""
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


def _with_dtype(config: Any, dtype_name: str) -> Any:
    """A copy of a config, or of a value in it, in which each entry "dtype" or "torch_dtype" that is
    not empty is ``dtype_name``, at any depth."""
    if isinstance(config, dict):
        return {
            key: dtype_name
            if key in ("dtype", "torch_dtype") and entry
            else _with_dtype(entry, dtype_name)
            for key, entry in config.items()
        }
    return (
        [_with_dtype(entry, dtype_name) for entry in config] if isinstance(config, list) else config
    )
