"""A checkpoint whose vocabulary grows for tokens that adapters add: more rows in embedding and
head.

The new rows are zeros until the merge writes the trained rows. ``saved_token_rows.grown_size``
refuses adapters that do not train every new row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from veneer import models
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.saved_token_rows import grown_size
from veneer.errors import MergeError
from veneer.fileio.untrusted import Entry
from veneer.models.safetensors_dir import Checkpoint


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
