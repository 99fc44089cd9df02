"""Two models side by side: each parameter of the base with the one that it became, and their
difference.

open_both(base, tuned, model) -> Both      structure, base values, tuned values
pair_weights(both) -> [WeightPair]         every name and shape checked
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
from veneer.adapter_files.peft_mapping import kind_for
from veneer.attach.adapted_module import base_class
from veneer.attach.lookup import adapters_of, unwrap
from veneer.attach.targets import Names
from veneer.errors import ExtractError, listing, raise_all, sentence
from veneer.layers import Dims, Layer
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
    """Two models. ``model`` is the structure of the base: as a ``meta_model`` it holds no numbers
    and is nobody's."""

    model: nn.Module
    meta_model: bool
    name: str | None
    old: BaseWeights
    new: BaseWeights


@dataclass(frozen=True)
class WeightPair:
    """One parameter or lasting buffer in both models. ``kind`` says how it lies as [g, out, in]."""

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
    def stacked(self) -> bool:
        """Whether each row of the first axis is a matrix with a change of its own."""
        return (
            self.kind.name == GENERAL
            and len(self.old.shape) == 3
            and self.dims.groups == self.old.shape[0]
        )

    @property
    def rows(self) -> list[slice | None]:
        """What is read at once: a matrix of a stack, or all."""
        return [slice(g, g + 1) for g in range(self.old.shape[0])] if self.stacked else [None]

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, tuned), matrix by matrix if this is a stack, else as a whole."""
        for rows in self.rows:
            yield self.old.read(rows), self.new.read(rows)

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(base, tuned) in ``pieces`` of one dtype."""
        return (pair for base, tuned in self.parts() for pair in pieces(base, tuned))

    def matrices(self) -> Iterator[Tensor]:
        """ΔW [out, in] of one group after the other, in memory of its own, at least float32."""
        for base, tuned in self.parts():
            delta = difference(base, tuned)
            del base, tuned
            yield from self.kind.unfold(
                delta, self.dims._replace(groups=1) if self.stacked else self.dims
            )

    def compare(self) -> tuple[bool, bool]:
        """(whether anything changed, whether all of it is finite)."""
        changed, finite = False, True
        for one, other in self.pieces():
            changed = changed or not torch.equal(one, other)
            finite = finite and _all_finite(one) and _all_finite(other)
        return changed, finite

    def change(self) -> float:
        return math.sqrt(
            sum((b.double() - a.double()).square().sum().item() for a, b in self.pieces())
        )


def pieces(base: Tensor, tuned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as flat pieces of one dtype: that which holds either; the base rounded to the tuned
    dtype first where that is the coarser."""
    tuned = tuned.to(base.device)
    floating = base.is_floating_point() and tuned.is_floating_point()
    rounds = floating and torch.finfo(tuned.dtype).eps > torch.finfo(base.dtype).eps
    wide = torch.promote_types(base.dtype, tuned.dtype)
    flat, other = base.reshape(-1), tuned.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        piece = piece.to(tuned.dtype) if rounds else piece
        yield piece.to(wide), other[start : start + PIECE].to(wide)


def _all_finite(values: Tensor) -> bool:
    """Whether all are finite, by the smallest and the largest (NaN if one is): 16 times faster in
    bfloat16."""
    return not values.is_floating_point() or all(
        bool(end.isfinite()) for end in torch.aminmax(values)
    )


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """tuned − base in float32, or float64 if one of them is; the two are in ``pieces``' one dtype
    first."""
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    delta = torch.empty(base.shape, dtype=wide, device=base.device)
    flat, start = delta.view(-1), 0
    for one, other in pieces(base, tuned):
        torch.sub(other.to(wide), one.to(wide), out=flat[start : start + one.numel()])
        start += one.numel()
    return delta


def open_both(base: Source, tuned: Source, model: nn.Module | None) -> Both:
    """Open two models; of a folder no number is read. ``ConfigError``, ``CheckpointError``: a
    folder that is no model. ``ExtractError``: a state dict as the base without ``model``; adapters
    on the tuned model that are not merged."""
    name = None
    if isinstance(tuned, str | Path) and not Path(tuned).expanduser().is_dir():
        # before the base: a path that is wrong is told before anything is converted
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
    tuned_weights = _tuned(tuned, structure, model is None)
    both = Both(structure, name is not None and model is None, name, old, tuned_weights)
    for one in (base, tuned):
        if isinstance(one, nn.Module) and (
            meta := [path for path, p in one.named_parameters() if p.is_meta]
        ):
            problem = f"{listing(meta, 3)} on the meta device"
            raise ExtractError(
                problem, "weights that hold numbers", "load the model first, or name its folder"
            )
    return both


def _tuned(tuned: Source, structure: nn.Module, own: bool) -> BaseWeights:
    """The tuned model's values. A folder with a configuration is read by its own (``own``): it may
    tie other weights than the base does."""
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
    if own and (folder / "config.json").is_file() and hasattr(structure, "base_model_prefix"):
        return folder_weights(models.meta_model(folder, base_class(structure).__name__), folder)
    return folder_weights(structure, folder)


def _folder(source: str | Path, structure: nn.Module | None) -> Path:
    """The folder of a model's files. With its structure at hand it needs no configuration."""
    path = Path(source).expanduser()
    plain = path.is_dir() and not (path / "adapter_config.json").is_file()
    return path if structure is not None and plain else models.folder_of(source)


def pair_weights(both: Both) -> list[WeightPair]:
    """Every parameter and lasting buffer of the base with what it is in the tuned model, in the
    model's order. ``ExtractError``: other names, shapes or types, a tied weight with two values;
    with all of them."""
    names = Names(both.model)
    pairs: list[WeightPair] = []
    missing: dict[str, list[str]] = {both.old.label: [], both.new.label: []}
    shapes, types, untied = [], [], []
    known: set[str] = set()
    for entry in list_weights(names):
        known.update(entry.names)
        old, new = both.old.find(entry.names), both.new.find(entry.names)
        if old is None or new is None:
            # else the model makes it itself
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
        if odd := [
            str(value.dtype)
            for value in (old, new)
            if value.dtype not in FLOATS and not entry.is_buffer
        ]:
            types.append(f"{entry.path} ({', '.join(odd)})")
        untied += _untied(both, entry, old, new)
        pairs.append(WeightPair(entry, old, new, module, kind_for(module, entry.ref[1])))
    more = {
        weights.label: sorted(weights.by_name.keys() - known) for weights in (both.old, both.new)
    }
    alike = (
        "extract from models of one architecture; a vocabulary that grew must have grown in both"
        " (call "
    )
    alike += "model.resize_token_embeddings on the base, then save_pretrained)"
    stored = "weights stored as something else than floating-point numbers: "
    floats = "float64, float32, bfloat16 or float16"
    checks = [
        *(
            (paths, "no ", f" in {what}", "the parameters of the base", COMPARE)
            for what, paths in missing.items()
        ),
        *(
            (paths, "", f" in {what}", "the parameters of the base alone", COMPARE)
            for what, paths in more.items()
        ),
        (shapes, "other shapes: ", "", "the same in base and tuned model", alike),
        (types, stored, "", floats, "dequantise the model first"),
    ]
    problems = [
        sentence(f"{a}{listing(odd, LONG)}{z}", expected, do)
        for odd, a, z, expected, do in checks
        if odd
    ]
    raise_all(
        ExtractError, f"{both.new.label} is no fine-tune of {both.old.label}", [*problems, *untied]
    )
    return pairs


#: how many names one message lists
LONG = 40
COMPARE = "compare the two models"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _untied(both: Both, entry: ModuleWeight, old: BaseWeight, new: BaseWeight) -> Iterator[str]:
    for weights, value in ((both.old, old), (both.new, new)):
        if not all(_equal(value.read, read) for read in value.duplicates):
            problem = (
                f"{listing(entry.names)}, one weight of the base, with different numbers in"
                f" {weights.label}"
            )
            do = "set tie_word_embeddings to false in the configuration of the base, and save it so"
            yield sentence(problem, "one weight in both models", do)


def _equal(one: ReadRows, other: ReadRows) -> bool:
    first, second = one(None), other(None)
    return first.shape == second.shape and all(torch.equal(a, b) for a, b in pieces(first, second))
