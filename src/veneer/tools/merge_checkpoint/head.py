"""A head that adapters train in full and that the files of the base lack, as those of an encoder
lack a classifier's.

Head(architecture, labels)          what the configuration of the result says of it
model_with_head(folder, adapters)   the model without weights, with as many labels as the adapters have
with_added(checkpoint, tensors)     a checkpoint with these tensors too, of zeros until the merge fills them
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
    """The model of a folder without its weights, as the adapters' records say it, and its head
    where they know of one. ``MergeError``: they have heads of different labels."""
    architecture = saved_adapters[0].metadata.get("base", {}).get("architecture")
    known = {
        str(saved.path): labels
        for saved in saved_adapters
        if (labels := labels_in(saved.metadata)) is not None
    }
    if len({*known.values()}) > 1:
        found = "; ".join(f"{path}: {listing(labels)}" for path, labels in known.items())
        raise MergeError(
            f"heads of different labels ({found})", "adapters of one task", "merge them apart"
        )
    labels = next(iter(known.values()), None)
    model = models.meta_model(folder, architecture, labels)
    count = None if labels is not None else _count_of_labels(model, saved_adapters)
    if count is not None:  # the record is of an earlier Veneer
        labels = tuple(f"LABEL_{number}" for number in range(count))
        model = models.meta_model(folder, architecture, labels)
    return model, None if labels is None else Head(type(model).__name__, labels)


def _count_of_labels(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """How many outputs the head has that adapters train in full, where that is another number than
    the model's."""
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


def with_added(checkpoint: Checkpoint, tensors: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint with more tensors, of these shapes and of the dtype that most of it has, at the
    end of its last file."""
    if not tensors:
        return checkpoint
    dtypes = [
        checkpoint.dtype(name)
        for name in checkpoint.where
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
    where = {**checkpoint.where, **dict.fromkeys(tensors, file)}
    return GrownCheckpoint(checkpoint.folder, files, index, checkpoint.index_name, where, rows)
