"""Add tensors and rows that adapters need and the base's files lack: rows of the embedding and the
output layer for new tokens, and a head that adapters train in full, such as a classifier.

    grow_model(model, saved_adapters)        adds the rows to a model without weights
    model_with_head(folder, saved_adapters)  builds a model without weights, with the adapters' head
    Head(architecture, labels)               the model class and labels in the result's config
    grow_checkpoint, add_tensors             return a checkpoint with these rows and tensors

The new rows and tensors are zeros until the merge writes the trained values. An adapter that does
not train every new row is refused (``saved_token_rows.grown_row_count``).
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
from veneer.adapter_files.saved_token_rows import grown_row_count
from veneer.errors import MergeError, listing
from veneer.fileio.untrusted import Entry
from veneer.models.safetensors_dir import DTYPE_NAMES, Checkpoint


def grow_model(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """Grow a model without weights, in place, to the vocabulary of the adapters, which may have
    added tokens: the embedding, the output head and its bias get a row for each new token. Returns
    the new number of rows; None if the model has enough rows already.

    Raises:
        AdapterError: an adapter does not train every new row.
        MergeError: the model has a buffer that would have to grow too.
    """
    row_counts = [
        row_count
        for saved_adapter in saved_adapters
        if (row_count := grown_row_count(model, saved_adapter)) is not None
    ]
    if not row_counts:
        return None
    # BART has a buffer with a column for each token, for which the adapters hold no new columns
    if getattr(model, "final_logits_bias", None) is not None:
        raise MergeError(
            "'final_logits_bias', which grows with the vocabulary",
            "an embedding and a head alone",
            f"call model.resize_token_embeddings({max(row_counts)}), save_pretrained it, and merge"
            " into that",
        )
    grown_parameters = {
        parameter_id: nn.Parameter(
            torch.empty(
                max(row_counts), *parameter.shape[1:], dtype=parameter.dtype, device="meta"
            ),
            parameter.requires_grad,
        )
        for parameter_id, parameter in vocabulary_parameters(model).items()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = grown_parameters.get(id(parameter), parameter)
    for layer in _vocabulary_layers(model):
        size_attribute = "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features"
        setattr(layer, size_attribute, max(row_counts))
    models.materialize_meta(model)
    return max(row_counts)


def vocabulary_parameters(model: Any) -> dict[int, nn.Parameter]:
    """The parameters of a model that have a row for each token, by Python ``id``: the weights of
    the input embedding and the output head, and the head's bias. Tied weights occur once."""
    parameters = [
        getattr(layer, name, None)
        for layer in _vocabulary_layers(model)
        for name in ("weight", "bias")
    ]
    return {id(parameter): parameter for parameter in parameters if parameter is not None}


def _vocabulary_layers(model: Any) -> list[Any]:
    """The input embedding and the output head of a model; one that it lacks is left out."""
    return [
        layer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
    ]


@dataclass(frozen=True)
class GrownCheckpoint(Checkpoint):
    """A checkpoint with tensors that have more rows than the files store; ``read`` fills the
    missing rows with zeros. ``file_row_counts``: by name of such a tensor, the number of rows in
    its file; 0 if the files lack the tensor."""

    file_row_counts: Mapping[str, int]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self.file_row_counts:
            return super().read(name, rows)
        row_count, shape = self.file_row_counts[name], self.shape(name)
        tensor = torch.zeros(shape, dtype=self.dtype(name))
        if row_count:  # otherwise the files lack this tensor, and all of it stays zero
            tensor[:row_count] = _resize_tensors(self, {name: row_count}).read(name)
        return tensor if rows is None else tensor[rows]


def grow_checkpoint(checkpoint: Checkpoint, row_counts: Mapping[str, int]) -> Checkpoint:
    """The checkpoint with more rows in some tensors; the new rows read as zeros. ``row_counts``:
    the new number of rows, by name of the tensor. A tensor that has as many rows is unchanged."""
    grown_row_counts = {
        name: row_count
        for name, row_count in row_counts.items()
        if checkpoint.shape(name)[0] < row_count
    }
    if not grown_row_counts:
        return checkpoint
    resized = _resize_tensors(checkpoint, grown_row_counts)
    return GrownCheckpoint(
        folder=resized.folder,
        files=resized.files,
        index=resized.index,
        index_name=resized.index_name,
        file_of=resized.file_of,
        file_row_counts={name: checkpoint.shape(name)[0] for name in grown_row_counts},
    )


def _resize_tensors(checkpoint: Checkpoint, row_counts: Mapping[str, int]) -> Checkpoint:
    """A ``Checkpoint`` whose headers, in memory, give each tensor in ``row_counts`` this number of
    rows. The files are unchanged, so a tensor can be read only up to the rows in its file."""
    headers = dict(checkpoint.files)
    for name, row_count in row_counts.items():
        header, old_entry = headers[checkpoint.file_of[name]], checkpoint.entry(name)
        shape = row_count, *old_entry.shape[1:]
        new_entry = Entry(
            old_entry.dtype,
            shape,
            old_entry.start,
            old_entry.start + prod(shape) * checkpoint.dtype(name).itemsize,
        )
        headers[checkpoint.file_of[name]] = replace(
            header, tensors={**header.tensors, name: new_entry}
        )
    return Checkpoint(
        checkpoint.folder, headers, checkpoint.index, checkpoint.index_name, checkpoint.file_of
    )


@dataclass(frozen=True)
class Head:
    """The name of a model's class in transformers, and the labels of its classification head in the
    order of the head's outputs."""

    architecture: str
    labels: tuple[str, ...]


def model_with_head(
    folder: Path, saved_adapters: Sequence[AdapterFiles]
) -> tuple[Any, Head | None]:
    """(the model of a folder, built without weights; the class and labels of its classification
    head, or None if the adapters were not trained with such a head). The model class comes from the
    record of the first adapter, or else from the config in the folder. The labels come from the
    adapters' records.

    Raises:
        ConfigError: transformers does not know the model.
        MergeError: the adapters have heads with different labels.
    """
    architecture = saved_adapters[0].metadata.get("base", {}).get("architecture")
    labels_by_adapter = {
        str(saved_adapter.path): labels
        for saved_adapter in saved_adapters
        if (labels := labels_in(saved_adapter.metadata)) is not None
    }
    if len({*labels_by_adapter.values()}) > 1:
        label_lists_text = "; ".join(
            f"{path}: {listing(labels)}" for path, labels in labels_by_adapter.items()
        )
        raise MergeError(
            f"heads of different labels ({label_lists_text})",
            "adapters of one task",
            "merge them apart",
        )
    labels = next(iter(labels_by_adapter.values()), None)
    model = models.meta_model(folder, architecture, labels)
    label_count = None if labels is not None else _count_labels(model, saved_adapters)
    # An adapter without a record, or with a record of an earlier Veneer, stores a head without
    # labels. So use the names that transformers gives to unnamed labels.
    if label_count is not None:
        labels = tuple(f"LABEL_{number}" for number in range(label_count))
        model = models.meta_model(folder, architecture, labels)
    return model, None if labels is None else Head(type(model).__name__, labels)


def _count_labels(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """The number of outputs of the classification head that the adapters train in full; None if the
    adapters train no such head, or if the head of ``model`` has the same number of outputs."""
    for saved_adapter in saved_adapters if type(model).__name__.endswith("Classification") else ():
        for path, tensors in saved_adapter.full.items():
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


def add_tensors(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """The checkpoint with additional tensors, which read as zeros, at the end of its last file.
    Their dtype is the most common floating-point dtype of the checkpoint. ``shapes``: the shapes of
    the additional tensors, by name. The files are unchanged."""
    if not shapes:
        return checkpoint
    dtypes = [
        checkpoint.dtype(name)
        for name in checkpoint.file_of
        if checkpoint.dtype(name).is_floating_point
    ]
    dtype = max({*dtypes}, key=dtypes.count, default=torch.float32)
    file_name = [*checkpoint.files][-1]
    header = checkpoint.files[file_name]
    entries = dict(header.tensors)
    end_offset = max((entry.stop for entry in header.tensors.values()), default=0)
    for name, shape in shapes.items():
        start, end_offset = end_offset, end_offset + prod(shape) * dtype.itemsize
        entries[name] = Entry(DTYPE_NAMES[dtype], tuple(shape), start, end_offset)
    index = checkpoint.index
    if index is not None:
        index = {**index, "weight_map": {**index["weight_map"], **dict.fromkeys(shapes, file_name)}}
    return GrownCheckpoint(
        folder=checkpoint.folder,
        files={**checkpoint.files, file_name: replace(header, tensors=entries)},
        index=index,
        index_name=checkpoint.index_name,
        file_of={**checkpoint.file_of, **dict.fromkeys(shapes, file_name)},
        file_row_counts={**getattr(checkpoint, "file_row_counts", {}), **dict.fromkeys(shapes, 0)},
    )
