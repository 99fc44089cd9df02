"""A checkpoint whose vocabulary grows for the tokens that adapters train: more rows of its
embedding and head.

The rows that are added are zeros until the merge puts the trained ones in their place; a row that
no adapter trains is refused before (``token_rows.growth``).
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
from veneer.adapter_files.token_rows import grown_size
from veneer.errors import MergeError
from veneer.fileio.untrusted import Entry
from veneer.models.safetensors_dir import Checkpoint


def grow_model(model: Any, saved_adapters: Sequence[AdapterFiles]) -> int | None:
    """Let a model without weights have as many rows of its vocabulary as the adapters need; the
    number, or None."""
    sizes = [size for saved in saved_adapters if (size := grown_size(model, saved)) is not None]
    if not sizes:
        return None
    # BART's, which has a column for each token
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
    made: dict[int, nn.Parameter] = {}
    for side in ("input", "output"):
        end = getattr(model, f"get_{side}_embeddings")()
        if end is None:
            continue
        old = end.weight
        if id(old) not in made:
            weight = torch.empty(max(sizes), old.shape[1], dtype=old.dtype, device="meta")
            made[id(old)] = nn.Parameter(weight, old.requires_grad)
        end.weight = made[id(old)]
        name = "num_embeddings" if isinstance(end, nn.Embedding) else "out_features"
        setattr(end, name, max(sizes))
    models.filled(model)
    return max(sizes)


@dataclass(frozen=True)
class GrownCheckpoint(Checkpoint):
    """A checkpoint of which some tensors have more rows than their files hold: ``grown``, how many
    these do, which are none of a tensor that the files lack."""

    grown: Mapping[str, int]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self.grown:
            return super().read(name, rows)
        there, shape = self.grown[name], self.shape(name)
        value = torch.zeros(shape, dtype=self.dtype(name))
        if there:  # none of a tensor that the files lack
            value[:there] = Checkpoint.read(self.as_it_is(name), name)
        return value if rows is None else value[rows]

    def as_it_is(self, name: str) -> Checkpoint:
        """One with this tensor as its file holds it."""
        return _resized(self, {name: self.grown[name]})


def grown(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Checkpoint:
    """A checkpoint in which tensors have so many rows, by their names."""
    larger = {name: rows for name, rows in sizes.items() if checkpoint.shape(name)[0] < rows}
    if not larger:
        return checkpoint
    made = _resized(checkpoint, larger)
    before = {name: checkpoint.shape(name)[0] for name in larger}
    return GrownCheckpoint(made.folder, made.files, made.index, made.index_name, made.where, before)


def _resized(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Checkpoint:
    files = dict(checkpoint.files)
    for name, rows in sizes.items():
        header, old = files[checkpoint.where[name]], checkpoint.entry(name)
        shape = rows, *old.shape[1:]
        new = Entry(
            old.dtype, shape, old.start, old.start + prod(shape) * checkpoint.dtype(name).itemsize
        )
        files[checkpoint.where[name]] = replace(header, tensors={**header.tensors, name: new})
    return Checkpoint(
        checkpoint.folder, files, checkpoint.index, checkpoint.index_name, checkpoint.where
    )
