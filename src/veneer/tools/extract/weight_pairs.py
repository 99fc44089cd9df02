"""Pair the weights of a base and a tuned model, and compute their differences.

open_both(base, tuned, model) -> Both      structure, base weights, tuned weights
pair_weights(both) -> [WeightPair]         names and shapes are checked
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer import models
from veneer.attach import Names, adapters_of, unwrap
from veneer.distributed import base_class
from veneer.errors import ExtractError, listing, raise_all, sentence
from veneer.layers import Dims, Layer, kind_for
from veneer.layers._base import GENERAL
from veneer.models.base_weights import (
    BaseWeight,
    BaseWeights,
    ModuleWeight,
    ReadRows,
    folder_weights,
    list_weights,
    module_weights,
    state_dict_weights,
)

Source = str | Path | nn.Module | Mapping[str, Tensor]

#: how many numbers of a pair are cast at once
PIECE = 1 << 21


class Both(NamedTuple):
    """Two models. ``model``: the structure of the base; if ``meta_model`` is True it has no values
    and belongs to no caller."""

    model: nn.Module
    meta_model: bool
    name: str | None
    old: BaseWeights
    new: BaseWeights


@dataclass(frozen=True)
class WeightPair:
    """One parameter or persistent buffer in both models. ``kind``: its layout as [g, out, in]."""

    entry: ModuleWeight
    old: BaseWeight
    new: BaseWeight
    module: nn.Module
    kind: Layer

    @property
    def path(self) -> str:
        return self.entry.path

    @property
    def dims(self) -> Dims:
        return self.kind.dims(self.module, torch.Size(self.old.shape))

    @property
    def is_stack(self) -> bool:
        """Whether each row of the first axis is a matrix with a change of its own."""
        return (
            self.kind.name == GENERAL
            and len(self.old.shape) == 3
            and self.dims.groups == self.old.shape[0]
        )

    @property
    def rows(self) -> list[slice | None]:
        """The rows to read at a time: one matrix of a stack, or everything."""
        return [slice(g, g + 1) for g in range(self.old.shape[0])] if self.is_stack else [None]

    def matrix_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, tuned), matrix by matrix for a stack, else in one piece."""
        for rows in self.rows:
            yield self.old.read(rows), self.new.read(rows)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, tuned) in ``pieces`` of one dtype."""
        return (pair for base, tuned in self.matrix_pairs() for pair in pieces(base, tuned))

    def matrices(self) -> Iterator[Tensor]:
        """ΔW [out, in] of each group, in new memory, at least float32."""
        for base, tuned in self.matrix_pairs():
            delta = difference(base, tuned)
            del base, tuned
            yield from self.kind.unfold(
                delta, self.dims._replace(groups=1) if self.is_stack else self.dims
            )

    def compare(self) -> tuple[bool, bool]:
        """(whether anything changed, whether all of it is finite)."""
        changed, finite = False, True
        for base_piece, tuned_piece in self.pieces():
            changed = changed or not torch.equal(base_piece, tuned_piece)
            finite = finite and _all_finite(base_piece) and _all_finite(tuned_piece)
        return changed, finite

    def change(self) -> float:
        return math.sqrt(
            sum((b.double() - a.double()).square().sum().item() for a, b in self.pieces())
        )


def pieces(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors as flat pieces of one dtype that can hold either. If the tuned dtype is coarser,
    the base is rounded to it first."""
    tuned = tuned.to(base.device)
    floating = base.is_floating_point() and tuned.is_floating_point()
    rounds = floating and torch.finfo(tuned.dtype).eps > torch.finfo(base.dtype).eps
    common_dtype = torch.promote_types(base.dtype, tuned.dtype)
    flat_base, flat_tuned = base.reshape(-1), tuned.reshape(-1)
    for start in range(0, flat_base.numel(), PIECE):
        piece = flat_base[start : start + PIECE]
        piece = piece.to(tuned.dtype) if rounds else piece
        yield piece.to(common_dtype), flat_tuned[start : start + PIECE].to(common_dtype)


def _all_finite(values: Tensor) -> bool:
    """Whether all values are finite, from minimum and maximum (NaN if any is): 16 times faster than
    ``isfinite`` in bfloat16."""
    return not values.is_floating_point() or all(
        bool(end.isfinite()) for end in torch.aminmax(values)
    )


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """tuned − base in float32, or in float64 if either is float64, cast as ``pieces`` does."""
    dtype = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    delta = torch.empty(base.shape, dtype=dtype, device=base.device)
    flat, start = delta.view(-1), 0
    for base_piece, tuned_piece in pieces(base, tuned):
        torch.sub(
            tuned_piece.to(dtype),
            base_piece.to(dtype),
            out=flat[start : start + base_piece.numel()],
        )
        start += base_piece.numel()
    return delta


def open_both(base: Source, tuned: Source, model: nn.Module | None) -> Both:
    """Open two models; weights in folders are not read yet.

    Raises:
        ConfigError, CheckpointError: a folder is not a model.
        ExtractError: the base is a state dict without ``model``, or the tuned model has unmerged
            adapters.
    """
    name = None
    if isinstance(tuned, str | Path) and not Path(tuned).expanduser().is_dir():
        # report a wrong path before the base is loaded, which takes longer
        models.folder_of(tuned)
    if isinstance(base, nn.Module):
        structure = unwrap(base)
        old = module_weights(structure, "the base")
    elif isinstance(base, Mapping):
        if model is None:
            raise ExtractError(
                "a state dict for the base and no model", "the model that it is of", "give model=…"
            )
        structure = unwrap(model)
        old = state_dict_weights(structure, base, "the base")
    else:
        folder, name = _folder(base, model), str(base)
        structure = models.meta_model(folder) if model is None else unwrap(model)
        old = folder_weights(structure, folder)
    tuned_weights = _read_tuned(tuned, structure, model is None)
    both = Both(structure, name is not None and model is None, name, old, tuned_weights)
    for source in (base, tuned):
        if isinstance(source, nn.Module) and (
            meta := [path for path, p in source.named_parameters() if p.is_meta]
        ):
            problem = f"{listing(meta, 3)} on the meta device"
            raise ExtractError(
                problem, "weights that hold numbers", "load the model first, or name its folder"
            )
    return both


def _read_tuned(tuned: Source, structure: nn.Module, own_config: bool) -> BaseWeights:
    """The weights of the tuned model. With ``own_config`` a folder is read by its own config: it
    may tie other weights than the base does."""
    if isinstance(tuned, nn.Module):
        tuned = unwrap(tuned)
        attached = adapters_of(tuned)
        if attached is not None and attached.merged is None:
            problem = (
                f"adapters ({', '.join(attached.configs)}) on the tuned model, whose weights they"
                " do not change"
            )
            raise ExtractError(
                problem, "a fine-tuned model", "merge one first, or save it with veneer.save"
            )
        return module_weights(tuned, "the tuned model")
    if isinstance(tuned, Mapping):
        return state_dict_weights(structure, tuned, "the tuned model")
    folder = _folder(tuned, structure)
    if (
        own_config
        and (folder / "config.json").is_file()
        and hasattr(structure, "base_model_prefix")
    ):
        return folder_weights(models.meta_model(folder, base_class(structure).__name__), folder)
    return folder_weights(structure, folder)


def _folder(source: str | Path, structure: nn.Module | None) -> Path:
    """The folder of a model's files. With a structure it needs no config."""
    path = Path(source).expanduser()
    plain = path.is_dir() and not (path / "adapter_config.json").is_file()
    return path if structure is not None and plain else models.folder_of(source)


def pair_weights(both: Both) -> list[WeightPair]:
    """Each parameter and persistent buffer of the base with its counterpart in the tuned model, in
    the order of the model. ``ExtractError``: names, shapes or dtypes differ, or a tied weight has
    two values; the error lists every problem."""
    names = Names(both.model)
    pairs: list[WeightPair] = []
    missing: dict[str, list[str]] = {both.old.label: [], both.new.label: []}
    shapes, types, untied = [], [], []
    known_names: set[str] = set()
    for entry in list_weights(names):
        known_names.update(entry.names)
        old, new = both.old.find(entry.names), both.new.find(entry.names)
        if old is None or new is None:
            # a buffer that neither file holds is created by the model's constructor
            if old is not None or new is not None or not entry.is_buffer:
                missing[both.old.label] += [entry.path] if old is None else []
                missing[both.new.label] += [entry.path] if new is None else []
            continue
        module, shape = entry.module, entry.shape
        if not old.shape == new.shape == shape:
            shapes.append(
                f"{entry.path} {list(old.shape)} and {list(new.shape)} (the model's: {list(shape)})"
            )
            continue
        if listed := [
            str(value.dtype)
            for value in (old, new)
            if value.dtype not in FLOATS and not entry.is_buffer
        ]:
            types.append(f"{entry.path} ({', '.join(listed)})")
        untied += _untied_problems(both, entry, old, new)
        pairs.append(WeightPair(entry, old, new, module, kind_for(module, entry.ref[1])))
    extra_names = {
        weights.label: sorted(weights.by_name.keys() - known_names)
        for weights in (both.old, both.new)
    }
    problems = _difference_problems(missing, extra_names, shapes, types)
    raise_all(
        ExtractError, f"{both.new.label} is no fine-tune of {both.old.label}", [*problems, *untied]
    )
    return pairs


#: how many names one message lists
LONG = 40
COMPARE = "compare the two models"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESIZE = (
    "extract from models of one architecture; a vocabulary that grew must have grown in both"
    " (call model.resize_token_embeddings on the base, then save_pretrained)"
)


def _difference_problems(
    missing: Mapping[str, list[str]],
    extra_names: Mapping[str, list[str]],
    shapes: list[str],
    types: list[str],
) -> list[str]:
    """Problems of names that one model lacks or has in addition, by the model's label, and of
    weights with other shapes or types."""
    stored = "weights stored as something else than floating-point numbers: "
    floats = "float64, float32, bfloat16 or float16"
    checks = [
        *(
            (paths, "no ", f" in {label}", "the parameters of the base", COMPARE)
            for label, paths in missing.items()
        ),
        *(
            (paths, "", f" in {label}", "the parameters of the base alone", COMPARE)
            for label, paths in extra_names.items()
        ),
        (shapes, "other shapes: ", "", "the same in base and tuned model", RESIZE),
        (types, stored, "", floats, "dequantise the model first"),
    ]
    return [
        sentence(f"{prefix}{listing(names, LONG)}{suffix}", expected, do)
        for names, prefix, suffix, expected, do in checks
        if names
    ]


def _untied_problems(
    both: Both, entry: ModuleWeight, old: BaseWeight, new: BaseWeight
) -> Iterator[str]:
    for weights, value in ((both.old, old), (both.new, new)):
        if not all(_equal(value.read, read) for read in value.duplicates):
            problem = (
                f"{listing(entry.names)}, one weight of the base, with different numbers in"
                f" {weights.label}"
            )
            do = "set tie_word_embeddings to false in the configuration of the base, and save it so"
            yield sentence(problem, "one weight in both models", do)


def _equal(first_reader: ReadRows, second_reader: ReadRows) -> bool:
    first, second = first_reader(None), second_reader(None)
    return first.shape == second.shape and all(torch.equal(a, b) for a, b in pieces(first, second))
