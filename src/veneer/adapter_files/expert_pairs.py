"""Adapters of what transformers 4 had otherwise: experts, a linear layer each, as changes of the
stacks that they are now; routers and modules that have other names, or are none, today.

    …experts.3.gate_proj   A₁ B₁ s₁       gate_up_proj[3] += [s₁ B₁    0 ] [A₁]       [out, in] of one expert: gate's
    …experts.3.up_proj     A₂ B₂ s₂                          [   0  s₂ B₂] [A₂]       rows, then those of up
    …experts.3.down_proj   A₃ B₃ s₃       down_proj[3]    += s₃ B₃ A₃

That is exact. The rank of a stack is the largest that one of its experts needs; others are filled
up with zeros, and so is an expert that the file leaves alone. Which part of which parameter such a
layer is, transformers' own rules for weights say (``models/meta.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapter_files.folder import AdapterFiles
from veneer.attach.refusals import GENERAL_KIND, kind_for
from veneer.attach.targets import Names
from veneer.errors import sentence
from veneer.formats import peft
from veneer.formats._base import PAIR
from veneer.models.meta import map_checkpoint_names

#: …experts.<number>.<projection>
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
#: the projections of an expert; a file may hold some of them
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))


class _Piece(NamedTuple):
    """The change of some outputs of one matrix of a stack."""

    expert: int
    rows: slice
    layer: peft.PeftLayer


def with_stacks(saved: AdapterFiles, names: Names, problems: list[str]) -> AdapterFiles:
    """The folder with a change for each stack in place of those of its experts; as it is, if it has
    none."""
    if saved.record is not None:
        return saved
    old = {
        path: match
        for path in saved.low
        if (match := _EXPERT.fullmatch(path)) and path not in names.canonical
    }
    renamed = _renamed(saved, names, old)
    if not old and not renamed:
        return saved
    stacks, taken = _pieces(saved, names, old) if old else ({}, set())
    rooted = bool(saved.peft_config.get("use_rslora"))
    ranked = {at: _stacked(at, pieces, names, rooted, problems) for at, pieces in stacks.items()}
    made = {at: layer for at, layer in ranked.items() if layer is not None}
    modules: dict[str, peft.PeftLayer] = {}
    for path, at in renamed.items():
        above, _, name = at.rpartition(".")
        layer, kind = saved.low[path], kind_for(names.modules[names.canonical[above]], name)
        if kind is not GENERAL_KIND:
            modules[above] = replace(layer, at=above)
        elif layer.extras:
            problem = f"{path!r} with {' '.join(layer.extras)}"
            problems.append(sentence(problem, f"a plain pair for {at!r}", "use PEFT for it"))
        else:
            made[at] = replace(layer, at=at)
    config = dict(saved.peft_config)
    config["target_parameters"] = [*(config.get("target_parameters") or ()), *made]
    for field, value in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        own = {
            f"^{re.escape(at)}$": getattr(layer, value) for at, layer in {**made, **modules}.items()
        }
        config[field] = {**own, **(config.get(field) or {})}
    low = {
        path: layer
        for path, layer in saved.low.items()
        if path not in taken and path not in renamed
    }
    return replace(
        saved, peft_config=config, low={**low, **modules, **_nested(made, names, config)}
    )


def _renamed(saved: AdapterFiles, names: Names, experts: Collection[str]) -> dict[str, str]:
    """The parameter of today, by the path in the file, of each layer that transformers calls
    otherwise by now, or that is no layer any more: a router is a parameter of its own."""
    found = {}
    for path, layer in saved.low.items():
        known = path in names.canonical
        if known and kind_for(names.modules[names.canonical[path]], "weight") is not GENERAL_KIND:
            continue
        if path not in experts and layer.suffixes == PAIR and not peft.of_parameter(path, layer):
            found[path] = f"{path}.weight"
    places = map_checkpoint_names(names.model, found.values()) if found else {}
    plain = {path: places[own] for path, own in found.items() if own in places}
    return {
        path: place.path
        for path, (place, *more) in plain.items()
        if not (more or place.index or place.within)
        and names.model.get_parameter(place.path).dim() == 2
    }


def _pieces(
    saved: AdapterFiles, names: Names, old: Mapping[str, re.Match[str]]
) -> tuple[dict[str, list[_Piece]], set[str]]:
    """The changes of the experts by the path of their stack, and the paths of those that have
    one."""
    model = names.model
    count = max((len(p) for p in model.parameters() if p.dim() == 3), default=0)
    asked = {
        f"{match[1]}.{number}.{projection}.weight"
        for match in old.values()
        for projection in next((known for known in _PROJECTIONS if match[3] in known), (match[3],))
        for number in range(count)
    }
    places, stacks = map_checkpoint_names(model, asked), {}
    taken: set[str] = set()
    for path in old:
        found = places.get(f"{path}.weight", ())
        if len(found) != 1 or not found[0].index or found[0].within or len(found[0].index) > 2:
            continue
        at, index = found[0].path, list(found[0].index)
        piece = _Piece(index[0].start, index[1] if len(index) > 1 else slice(None), saved.low[path])
        stacks.setdefault(at, []).append(piece)
        taken.add(path)
    return stacks, taken


def _stacked(
    at: str, pieces: list[_Piece], names: Names, rooted: bool, problems: list[str]
) -> peft.PeftLayer | None:
    """The change of a stack, as PEFT's file would hold it. ``rooted``: its scale is alpha by the
    root of the rank."""
    weight: Any = names.model.get_parameter(at)
    experts, out, in_ = weight.shape
    first = pieces[0].layer
    for piece in pieces:
        A, B = piece.layer.A, piece.layer.B
        height = len(range(out)[piece.rows])
        if (
            piece.layer.extras
            or A.dim() != 2
            or B.dim() != 2
            or (len(B), A.shape[1]) != (height, in_)
        ):
            problem = (
                f"{piece.layer.at!r} with A {tuple(A.shape)}, B {tuple(B.shape)}"
                f" {' '.join(piece.layer.extras)}"
            )
            problems.append(
                sentence(
                    problem.rstrip(),
                    f"a plain pair for [{height}, {in_}] of {at!r}",
                    "use PEFT for it",
                )
            )
            return None
    by_expert: dict[int, list[_Piece]] = {}
    for piece in pieces:
        by_expert.setdefault(piece.expert, []).append(piece)
    scale = next((piece.layer.scale for piece in pieces if piece.layer.scale), 0.0)
    rank = max(sum(len(piece.layer.A) for piece in own) for own in by_expert.values())
    A, B = first.A.new_zeros(experts, rank, in_), first.B.new_zeros(experts, out, rank)
    for expert, own in by_expert.items():
        start = 0
        for _, rows, layer in sorted(own, key=lambda piece: piece.rows.start or 0):
            after = start + len(layer.A)
            A[expert, start:after] = layer.A
            B[expert, rows, start:after] = _scaled(layer.B, layer.scale / (scale or 1))
            start = after
    rate = math.sqrt(rank) if rooted else rank
    stacked = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return replace(first, at=at, A=stacked[0], B=stacked[1], rank=rank, alpha=scale * rate)


def _scaled(B: Tensor, factor: float) -> Tensor:
    return B if factor == 1 else (B.to(torch.float64) * factor).to(B.dtype)


def _nested(
    made: Mapping[str, peft.PeftLayer], names: Names, config: Mapping[str, Any]
) -> dict[str, peft.PeftLayer]:
    """The stacks' changes under the paths that PEFT gives to several parameters of one module."""
    found = {}
    for at, layer in made.items():
        path, _, name = at.rpartition(".")
        module = names.modules[names.canonical[path]]
        meant = [
            other
            for other in module._parameters
            if f"{path}.{other}" in config["target_parameters"]
        ]
        depth = len(meant) - 1 - meant.index(name)
        found[".".join([path, *["base_layer"] * depth])] = layer
    return found
