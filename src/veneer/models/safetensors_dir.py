"""A checkpoint folder of safetensors files, read tensor by tensor.

    model.safetensors                                   one file, or
    model-00001-of-00002.safetensors, …                 shards, and
    model.safetensors.index.json                        the shard of each tensor

Tensors are read into new memory. With a memory map, the mapped pages would count as memory of the
process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import (
    AdapterError,
    CheckpointError,
    OutputExistsError,
    listing,
    raise_all,
    sentence,
)
from veneer.fileio import tensors
from veneer.fileio.untrusted import Entry, Header, location_problems, read_header, read_json
from veneer.formats import peft

ENDING, INDEX = ".safetensors", ".safetensors.index.json"

#: the dtypes of models' weights in safetensors files
_WEIGHTS = (
    "F64",
    "F32",
    "BF16",
    "F16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
)
DTYPES = {name: tensors.DTYPES[name] for name in _WEIGHTS}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: patterns of a model's files, which another model that replaces it overwrites
MODEL_FILES = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "consolidated*.safetensors",
)  # fmt: skip


def must_hold_no_adapter(folder: Path) -> None:
    """Raise ``OutputExistsError`` if a model is to be written to a folder with an adapter."""
    if (folder / peft.CONFIG).exists():
        problem = f"{folder}, which holds an adapter, for a whole model"
        expected = (
            "a folder of its own: from_pretrained would load both, and change the weights twice"
        )
        raise OutputExistsError(problem, expected, "choose another folder")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files. ``files``: their headers by name; ``index``: the parsed index
    (None for a single file); ``file_of``: the file of each tensor, in the order of files and
    offsets."""

    folder: Path
    files: Mapping[str, Header]
    index: Mapping[str, Any] | None
    index_name: str | None
    file_of: Mapping[str, str]

    def entry(self, name: str) -> Entry:
        return self.files[self.file_of[name]].tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entry(name).dtype]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def bytes(self, name: str) -> int:
        entry = self.entry(name)
        return entry.stop - entry.start

    def start(self, name: str) -> int:
        return self.files[self.file_of[name]].data_start + self.entry(name).start

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or ``rows`` of its first axis, in new memory. ``KeyError``: no such tensor.
        ``CheckpointError``: the file is shorter than its header claims."""
        shape, size, start = self.shape(name), self.bytes(name), self.start(name)
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row = size // shape[0] if shape[0] else 0
            shape, size, start = (
                (last - first, *shape[1:]),
                (last - first) * row,
                start + first * row,
            )
        with (self.folder / self.file_of[name]).open("rb") as stream:
            flat = tensors.read_bytes(stream, start, size)
        if flat is None:
            problem = f"{self.file_of[name]}, which ended within {name!r}"
            raise CheckpointError(problem, "the file as it was", "let nobody write to it meanwhile")
        return flat.view(self.dtype(name)).reshape(shape)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder and check its headers; no tensor is read.
    ``CheckpointError``: no safetensors, several without an index, an index for other files or
    tensors, or a damaged file; the error lists every problem."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}", "the folder of a model", "check the path")
    refuse = partial(raise_all, CheckpointError, f"The checkpoint {folder} cannot be used")
    index, index_name, names = None, None, sorted(path.name for path in folder.iterdir())
    indices, names = (
        [name for name in names if name.endswith(ending)] for ending in (INDEX, ENDING)
    )
    if len(indices) > 1:
        raise CheckpointError(
            f"{listing(indices)} in {folder}", "one index", "keep the files of one model"
        )
    if indices:
        index_name = indices[0]
        refuse(location_problems(folder, indices))
        index = _read_checked(read_json, folder / index_name)
        names = _listed_files(folder / index_name, index)
    elif len(names) != 1:
        raise CheckpointError(_missing_index_problem(folder, names))
    refuse(location_problems(folder, names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        problem = f"no {listing(missing)} in {folder}"
        raise CheckpointError(problem, "the files that the index names", "get the whole model")
    files = {name: _read_checked(read_header, folder / name) for name in names}
    refuse(list(_problems(files, index)))
    file_of_tensor = {tensor: file for file, header in files.items() for tensor in in_order(header)}
    return Checkpoint(folder, files, index, index_name, file_of_tensor)


def in_order(header: Header) -> list[str]:
    return sorted(
        header.tensors, key=lambda name: (header.tensors[name].start, header.tensors[name].stop)
    )


def _read_checked(reader: Any, path: Path) -> Any:
    """Call a reader of headers; its errors become ``CheckpointError``."""
    try:
        return reader(path)
    except AdapterError as error:
        raise CheckpointError(str(error)) from error


def _listed_files(path: Path, index: Mapping[str, Any]) -> list[str]:
    """The file names in an index, which must be plain names in its folder."""
    weights = index.get("weight_map")
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) for name in weights.values())
    ):
        raise CheckpointError(f"no weight_map of names in {path}", "one", "get the file again")
    names = sorted(set(weights.values()))
    invalid_names = [name for name in names if Path(name).name != name or not name.endswith(ENDING)]
    if invalid_names:
        problem = f"{listing(map(repr, invalid_names))} in {path}"
        raise CheckpointError(problem, f"names of {ENDING} files beside it", "get the file again")
    return names


def _problems(files: Mapping[str, Header], index: Mapping[str, Any] | None) -> Iterator[str]:
    file_of_name: dict[str, str] = {}
    weight_map = index["weight_map"] if index is not None else {}
    for file, header in files.items():
        for name, entry in header.tensors.items():
            if name in file_of_name:
                yield sentence(
                    f"{name!r} in {file_of_name[name]} and in {file}",
                    "one of them",
                    "get the whole model again",
                )
            if index is not None and weight_map.get(name) != file:
                problem = f"{name!r} in {file}, where the index says {weight_map.get(name)!r}"
                yield sentence(
                    problem, "an index of these files", "get the index and its shards together"
                )
            if entry.dtype not in DTYPES:
                yield sentence(
                    f"{name!r} of dtype {entry.dtype}", listing(DTYPES), "convert the model first"
                )
            file_of_name[name] = file
    missing_names = sorted(weight_map.keys() - file_of_name.keys())
    if missing_names:
        yield sentence(
            f"no {listing(missing_names, 3)}, of which the index speaks",
            "it",
            "get the whole model",
        )


def _missing_index_problem(folder: Path, names: list[str]) -> str:
    if names:
        problem = f"{len(names)} files ending in {ENDING} in {folder} and no index"
        return sentence(
            problem, f"one, or *{INDEX} beside them", "keep the files of one model there"
        )
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    problem = f"no {ENDING} file in {folder}" + (
        f", but {listing(pickles, 3)}, which are pickles" if pickles else ""
    )
    do = "save the model with save_pretrained of a current transformers, which writes safetensors"
    return sentence(
        problem, f"a model as {ENDING}", do if pickles else "name the folder that holds the weights"
    )
