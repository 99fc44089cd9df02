"""A head that adapters train in full and the base's files lack, such as the classifier on an
encoder.

Head(architecture, labels)         its entries in the config of the result
model_with_head(folder, adapters)  the model without weights, with the labels of the adapters
add_tensors(checkpoint, tensors)   a checkpoint with these tensors, zeros until the merge
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from veneer import models
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.record import labels_in
from veneer.errors import MergeError, listing
from veneer.fileio.untrusted import Entry
from veneer.models.safetensors_dir import NAMES, Checkpoint
from veneer.tools.merge_checkpoint.growth import GrownCheckpoint


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
