"""Tensors that a merged checkpoint has and the base's files lack: rows of embedding and head for
tokens that adapters add, and a head that adapters train in full, such as the classifier on an
encoder.

    grow_model(model, adapters)        the rows, in a model without weights
    model_with_head(folder, adapters)  the model without weights, with the labels of the adapters
    Head(architecture, labels)         the entries of the head in the config of the result
    grow_checkpoint, add_tensors       a checkpoint with these rows and tensors

The new values are zeros until the merge writes the trained ones. ``saved_token_rows.grown_size``
refuses adapters that do not train every new row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import models
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.record import labels_in
from veneer.adapter_files.saved_token_rows import grown_size
from veneer.errors import MergeError, listing
from veneer.fileio.untrusted import Entry
from veneer.models.safetensors_dir import NAMES, Checkpoint


def grow_model(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """Give a model without weights the rows of its vocabulary that the adapters need. Returns their
    number, or None if none are added."""
    sizes = [size for saved in saved_adapters if (size := grown_size(model, saved)) is not None]
    if not sizes:
        return None
    # a buffer of BART with a column for each token
    if getattr(model, "final_logits_bias", None) is not None:
        problem, expected = (
            "'final_logits_bias', which grows with the vocabulary",
            "an embedding and a head alone",
        )
        do = (
            f"call model.resize_token_embeddings({max(sizes)}), save_pretrained it, and merge into"
            " that"
        )
        raise MergeError(problem, expected, do)
    grown_weights: dict[int, nn.Parameter] = {}
    for side in ("input", "output"):
        layer = getattr(model, f"get_{side}_embeddings")()
        if layer is None:
            continue
        old = layer.weight
        if id(old) not in grown_weights:
            weight = torch.empty(max(sizes), old.shape[1], dtype=old.dtype, device="meta")
            grown_weights[id(old)] = nn.Parameter(weight, old.requires_grad)
        layer.weight = grown_weights[id(old)]
        name = "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features"
        setattr(layer, name, max(sizes))
    models.materialize_meta(model)
    return max(sizes)


@dataclass(frozen=True)
class GrownCheckpoint(Checkpoint):
    """A checkpoint with tensors that have more rows than in their files. ``grown``: the number of
    rows in the files by name; 0 for a tensor that the files lack."""

    grown: Mapping[str, int]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self.grown:
            return super().read(name, rows)
        file_rows, shape = self.grown[name], self.shape(name)
        value = torch.zeros(shape, dtype=self.dtype(name))
        if file_rows:  # 0: the files lack this tensor
            value[:file_rows] = Checkpoint.read(self.with_file_rows(name), name)
        return value if rows is None else value[rows]

    def with_file_rows(self, name: str) -> Checkpoint:
        """The checkpoint with this tensor as its file stores it."""
        return _resize_tensors(self, {name: self.grown[name]})


def grow_checkpoint(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Checkpoint:
    """The checkpoint with these numbers of rows, by name of the tensor."""
    larger = {name: rows for name, rows in sizes.items() if checkpoint.shape(name)[0] < rows}
    if not larger:
        return checkpoint
    resized = _resize_tensors(checkpoint, larger)
    before = {name: checkpoint.shape(name)[0] for name in larger}
    return GrownCheckpoint(
        resized.folder, resized.files, resized.index, resized.index_name, resized.file_of, before
    )


def _resize_tensors(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Checkpoint:
    files = dict(checkpoint.files)
    for name, rows in sizes.items():
        header, old = files[checkpoint.file_of[name]], checkpoint.entry(name)
        shape = rows, *old.shape[1:]
        new = Entry(
            old.dtype, shape, old.start, old.start + prod(shape) * checkpoint.dtype(name).itemsize
        )
        files[checkpoint.file_of[name]] = replace(header, tensors={**header.tensors, name: new})
    return Checkpoint(
        checkpoint.folder, files, checkpoint.index, checkpoint.index_name, checkpoint.file_of
    )


@dataclass(frozen=True)
class Head:
    """The class of a model and the labels of its head, in the order of its outputs."""

    architecture: str
    labels: tuple[str, ...]


def model_with_head(
    folder: Path, saved_adapters: Sequence[AdapterFiles]
) -> tuple[Any, Head | None]:
    """The model of a folder without weights, with the architecture and labels in the adapters'
    records, and its head if they have one. ``MergeError``: the adapters have heads with different
    labels."""
    architecture = saved_adapters[0].metadata.get("base", {}).get("architecture")
    labels_by_adapter = {
        str(saved.path): labels
        for saved in saved_adapters
        if (labels := labels_in(saved.metadata)) is not None
    }
    if len({*labels_by_adapter.values()}) > 1:
        label_lists = "; ".join(
            f"{path}: {listing(labels)}" for path, labels in labels_by_adapter.items()
        )
        raise MergeError(
            f"heads of different labels ({label_lists})", "adapters of one task", "merge them apart"
        )
    labels = next(iter(labels_by_adapter.values()), None)
    model = models.meta_model(folder, architecture, labels)
    count = None if labels is not None else _count_of_labels(model, saved_adapters)
    if count is not None:  # the record is of an earlier Veneer
        labels = tuple(f"LABEL_{number}" for number in range(count))
        model = models.meta_model(folder, architecture, labels)
    return model, None if labels is None else Head(type(model).__name__, labels)


def _count_of_labels(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """The number of outputs of the head that adapters train in full, if the model has another
    number."""
    for saved in saved_adapters if type(model).__name__.endswith("Classification") else ():
        for path, tensors in saved.full.items():
            for name, tensor in tensors.items():
                try:
                    shape = model.get_parameter(f"{path}.{name}").shape
                except AttributeError:
                    continue
                if (
                    shape[0] == model.config.num_labels != tensor.shape[0]
                    and shape[1:] == tensor.shape[1:]
                ):
                    return tensor.shape[0]
    return None


def add_tensors(checkpoint: Checkpoint, tensors: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The checkpoint with tensors of these shapes, in its most common dtype, at the end of its last
    file."""
    if not tensors:
        return checkpoint
    dtypes = [
        checkpoint.dtype(name)
        for name in checkpoint.file_of
        if checkpoint.dtype(name).is_floating_point
    ]
    dtype = max({*dtypes}, key=dtypes.count, default=torch.float32)
    file = [*checkpoint.files][-1]
    header = checkpoint.files[file]
    entries, stop = (
        dict(header.tensors),
        max((entry.stop for entry in header.tensors.values()), default=0),
    )
    for name, shape in tensors.items():
        start, stop = stop, stop + prod(shape) * dtype.itemsize
        entries[name] = Entry(NAMES[dtype], tuple(shape), start, stop)
    index = checkpoint.index
    if index is not None:
        index = {**index, "weight_map": {**index["weight_map"], **dict.fromkeys(tensors, file)}}
    rows = {**getattr(checkpoint, "grown", {}), **dict.fromkeys(tensors, 0)}
    files = {**checkpoint.files, file: replace(header, tensors=entries)}
    file_of_tensor = {**checkpoint.file_of, **dict.fromkeys(tensors, file)}
    return GrownCheckpoint(
        checkpoint.folder, files, index, checkpoint.index_name, file_of_tensor, rows
    )
