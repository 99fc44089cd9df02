"""What stands beside the weights of a checkpoint and belongs to the merged one too: its
configuration, its tokenizer.

Left out are the weights in other formats, which would be those of the base, and folders that hold
such or are hidden (what git and the hub's client keep). A configuration that names a dtype is
written anew where the merge has another, one that names the size of a vocabulary where that grew,
and that of a classifier where the adapters say its labels. The tokenizer is then the adapter's, if
it has one.
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
from veneer.tools.merge_checkpoint.head import Head

RECORD, CONFIG = "veneer_merge.json", "config.json"
#: files that hold the same weights again for others
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".safetensors")


def companions(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """(the files to copy, relative to the folder; the names in it that are left out)."""
    files, left_out, folder = [], [], checkpoint.folder
    for path in sorted(folder.iterdir()):
        if path.name in checkpoint.files or path.name in (checkpoint.index_name, RECORD):
            continue
        inside = (
            [path]
            if not path.is_dir()
            else []
            if path.name.startswith(".")
            else list(path.rglob("*"))
        )
        # links to folders are not gone into
        odd = any(
            one.name.endswith(OTHERS) or (one.is_dir() and one.is_symlink()) for one in inside
        )
        if odd or not inside:
            left_out.append(path.name)
        else:
            files += sorted(one.relative_to(folder) for one in inside if not one.is_dir())
    return files, left_out


@dataclass(frozen=True)
class Changes:
    """What differs from the base's files: the dtype (None: it stays), the number of rows of the
    vocabulary (None: as it is), a folder with the tokenizer that knows tokens which were added
    (None: the base's), and the head of a classifier (None: the adapters say nothing of one)."""

    dtype: torch.dtype | None = None
    vocabulary: int | None = None
    tokenizer: Path | None = None
    head: Head | None = None

    @property
    def of_config(self) -> bool:
        return (self.dtype, self.vocabulary, self.head) != (None, None, None)


def put(checkpoint: Checkpoint, changes: Changes, target: Path) -> list[str]:
    """Copy them into the folder ``target``; the names of what is left out."""
    files, left_out = _sources(checkpoint, changes)
    for file, source in files.items():
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if file == Path(CONFIG) and changes.of_config:
            (target / file).write_bytes(_expected(source, changes, file))
        else:
            shutil.copyfile(source, target / file)
    return left_out


def differing(checkpoint: Checkpoint, changes: Changes, target: Path) -> Iterator[str]:
    """What is not in ``target`` as ``put`` writes it."""
    for file, source in _sources(checkpoint, changes)[0].items():
        if not (target / file).is_file():
            yield f"{file} is not there"
        elif (target / file).read_bytes() != _expected(source, changes, file):
            yield f"{file} is another file than the base's"


def _sources(checkpoint: Checkpoint, changes: Changes) -> tuple[dict[Path, Path], list[str]]:
    """(where each file of the result comes from, the names of what is left out)."""
    files, left_out = companions(checkpoint)
    found = {file: checkpoint.folder / file for file in files}
    if changes.tokenizer is not None:
        found = {file: source for file, source in found.items() if file.name not in TOKENIZER}
        found |= {
            Path(name): changes.tokenizer / name
            for name in TOKENIZER
            if (changes.tokenizer / name).is_file()
        }
    return found, left_out


def _expected(source: Path, changes: Changes, file: Path) -> bytes:
    content = source.read_bytes()
    if file != Path(CONFIG) or not changes.of_config:
        return content
    said = json.loads(content)
    if changes.dtype is not None:
        said = _retyped(said, str(changes.dtype).removeprefix("torch."))
    if changes.vocabulary is not None:
        said = _resized(said, changes.vocabulary)
    if changes.head is not None:
        said = _with_labels(said, changes.head)
        if said == json.loads(content):
            return content
    return (json.dumps(said, indent=2) + "\n").encode()


def _resized(said: dict[str, Any], rows: int) -> dict[str, Any]:
    """A configuration with another size of the vocabulary, that of its text model where it has
    several."""
    if "vocab_size" in said or not isinstance(said.get("text_config"), dict):
        return {**said, "vocab_size": rows}
    return {**said, "text_config": {**said["text_config"], "vocab_size": rows}}


def _with_labels(said: dict[str, Any], head: Head) -> dict[str, Any]:
    """A configuration of a model of this class, with these labels: the base's own where it has as
    many."""
    names = said.get("id2label") or {}
    if [str(names.get(str(number))) for number in range(len(names))] != [*head.labels]:
        names = {str(number): label for number, label in enumerate(head.labels)}
        said = {
            **said,
            "id2label": names,
            "label2id": {label: number for number, label in enumerate(head.labels)},
        }
        said.pop("num_labels", None)
    return {**said, "architectures": [head.architecture]}


def _retyped(said: Any, dtype: str) -> Any:
    """A configuration that names another dtype, wherever it names one."""
    if isinstance(said, dict):
        return {
            k: dtype if k in ("dtype", "torch_dtype") and v else _retyped(v, dtype)
            for k, v in said.items()
        }
    return [_retyped(each, dtype) for each in said] if isinstance(said, list) else said
