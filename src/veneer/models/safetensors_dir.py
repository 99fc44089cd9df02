"""A checkpoint folder of safetensors files, read tensor by tensor.

    model.safetensors                                   one file, or
    model-00001-of-00002.safetensors, …                 several files, and
    model.safetensors.index.json                        an index: the file of each tensor

Tensors are read into newly allocated memory. The files are not mapped into memory, because their
pages would count as memory of the process.
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

#: the endings of the names of weight files and of an index
ENDING, INDEX = ".safetensors", ".safetensors.index.json"

#: the dtypes that a model's weights may have, by their names in safetensors files
_WEIGHT_DTYPES = (
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
#: {name in a safetensors file: torch dtype}, and the reverse
DTYPES = {name: tensors.DTYPES[name] for name in _WEIGHT_DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: patterns of a model's files, which are overwritten or removed if another model replaces the model
MODEL_FILES = (
    "config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json", "consolidated*.safetensors",
)  # fmt: skip
#: the files of a tokenizer, which an adapter that trains added tokens has in its folder, too
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
#: names of the files beside a model's weights with which transformers generates and tokenizes
TEXT_FILES = (
    *TOKENIZER_FILES, "generation_config.json", "chat_template.json", "bpe.codes", "spiece.model",
    "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "tekken.json",
)  # fmt: skip
#: names of the files with which transformers prepares images, videos and sound for a model
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def must_hold_no_adapter(folder: Path) -> None:
    """Raise ``OutputExistsError`` if ``folder``, to which a model is to be written, holds an
    adapter: transformers would load both, and so apply the adapter to the written model."""
    if (folder / peft.CONFIG).exists():
        raise OutputExistsError(
            f"{folder}, which holds an adapter, for a whole model",
            "a folder of its own: from_pretrained would load both, and change the weights twice",
            "choose another folder",
        )


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files.

    Fields:
        files: {name of a file: its header}.
        index, index_name: the parsed index and the name of its file; None if there is no index.
        file_of: {name of a tensor: name of its file}, in the order of files and offsets.
    """

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
        """Size of a tensor in bytes."""
        entry = self.entry(name)
        return entry.stop - entry.start

    def start(self, name: str) -> int:
        """Offset of a tensor's data in its file, in bytes."""
        return self.files[self.file_of[name]].data_start + self.entry(name).start

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or ``rows`` of its first axis, in new memory. ``KeyError``: there is no
        tensor of this name. ``CheckpointError``: the file is shorter than its header claims."""
        shape, size, start = self.shape(name), self.bytes(name), self.start(name)
        if rows is not None:
            first_row, stop_row, _ = rows.indices(shape[0])
            row_size = size // shape[0] if shape[0] else 0
            shape = (stop_row - first_row, *shape[1:])
            size, start = (stop_row - first_row) * row_size, start + first_row * row_size
        with (self.folder / self.file_of[name]).open("rb") as stream:
            raw_bytes = tensors.read_bytes(stream, start, size)
        if raw_bytes is None:
            raise CheckpointError(
                f"{self.file_of[name]}, which ended within {name!r}",
                "the file as it was",
                "let nobody write to it meanwhile",
            )
        return raw_bytes.view(self.dtype(name)).reshape(shape)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open the checkpoint in a folder and check the headers of its files. No tensor is read.

    Raises:
        CheckpointError: the folder has no safetensors file, several without an index, an index that
            does not match the files or tensors, a damaged file, or a dtype that is not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}", "the folder of a model", "check the path")
    raise_problems = partial(raise_all, CheckpointError, f"The checkpoint {folder} cannot be used")
    index, index_name = None, None
    entry_names = sorted(path.name for path in folder.iterdir())
    index_names = [name for name in entry_names if name.endswith(INDEX)]
    file_names = [name for name in entry_names if name.endswith(ENDING)]
    if len(index_names) > 1:
        raise CheckpointError(
            f"{listing(index_names)} in {folder}", "one index", "keep the files of one model"
        )
    if index_names:
        index_name = index_names[0]
        raise_problems(location_problems(folder, index_names))
        index = _call_reader(read_json, folder / index_name)
        file_names = _listed_files(folder / index_name, index)
    elif len(file_names) != 1:
        raise CheckpointError(_missing_index_problem(folder, file_names))
    raise_problems(location_problems(folder, file_names))
    missing_files = [name for name in file_names if not (folder / name).is_file()]
    if missing_files:
        raise CheckpointError(
            f"no {listing(missing_files)} in {folder}",
            "the files that the index names",
            "get the whole model",
        )
    files = {name: _call_reader(read_header, folder / name) for name in file_names}
    raise_problems(list(_problems(files, index)))
    file_of_tensor = {
        tensor_name: file_name
        for file_name, header in files.items()
        for tensor_name in names_by_offset(header)
    }
    return Checkpoint(folder, files, index, index_name, file_of_tensor)


def names_by_offset(header: Header) -> list[str]:
    """The names of a file's tensors, sorted by their offsets in the file."""
    return sorted(
        header.tensors, key=lambda name: (header.tensors[name].start, header.tensors[name].stop)
    )


def _call_reader(reader: Any, path: Path) -> Any:
    """The result of ``reader(path)``, a function that reads a header or an index. An
    ``AdapterError`` that it raises becomes a ``CheckpointError``."""
    try:
        return reader(path)
    except AdapterError as error:
        raise CheckpointError(str(error)) from error


def _listed_files(path: Path, index: Mapping[str, Any]) -> list[str]:
    """The names of the weight files in an index, sorted. ``path``: the path of the index, for
    errors. ``CheckpointError``: there is no valid weight_map, or a name contains a folder, which
    could lead out of the folder of the index, or does not end in ".safetensors"."""
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"no weight_map of names in {path}", "one", "get the file again")
    names = sorted(set(weight_map.values()))
    invalid_names = [name for name in names if Path(name).name != name or not name.endswith(ENDING)]
    if invalid_names:
        raise CheckpointError(
            f"{listing(map(repr, invalid_names))} in {path}",
            f"names of {ENDING} files beside it",
            "get the file again",
        )
    return names


def _problems(files: Mapping[str, Header], index: Mapping[str, Any] | None) -> Iterator[str]:
    """The problems of a checkpoint, as error texts: tensors that the index names and no file has,
    tensors in several files or in another file than the index states, and dtypes that are not
    supported."""
    file_of_tensor: dict[str, str] = {}
    weight_map = index["weight_map"] if index is not None else {}
    for file_name, header in files.items():
        for tensor_name, entry in header.tensors.items():
            if tensor_name in file_of_tensor:
                yield sentence(
                    f"{tensor_name!r} in {file_of_tensor[tensor_name]} and in {file_name}",
                    "one of them",
                    "get the whole model again",
                )
            if index is not None and weight_map.get(tensor_name) != file_name:
                indexed_file = weight_map.get(tensor_name)
                problem = f"{tensor_name!r} in {file_name}, where the index says {indexed_file!r}"
                yield sentence(
                    problem, "an index of these files", "get the index and its shards together"
                )
            if entry.dtype not in DTYPES:
                yield sentence(
                    f"{tensor_name!r} of dtype {entry.dtype}",
                    listing(DTYPES),
                    "convert the model first",
                )
            file_of_tensor[tensor_name] = file_name
    missing_names = sorted(weight_map.keys() - file_of_tensor.keys())
    if missing_names:
        yield sentence(
            f"no {listing(missing_names, 3)}, of which the index speaks",
            "it",
            "get the whole model",
        )


def _missing_index_problem(folder: Path, file_names: list[str]) -> str:
    if file_names:
        problem = f"{len(file_names)} files ending in {ENDING} in {folder} and no index"
        return sentence(
            problem, f"one, or *{INDEX} beside them", "keep the files of one model there"
        )
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    problem = f"no {ENDING} file in {folder}" + (
        f", but {listing(pickles, 3)}, which are pickles" if pickles else ""
    )
    remedy = (
        "save the model with save_pretrained of a current transformers, which writes safetensors"
    )
    return sentence(
        problem,
        f"a model as {ENDING}",
        remedy if pickles else "name the folder that holds the weights",
    )
