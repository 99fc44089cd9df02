"""Adapters of models that transformers 5 builds from other modules than transformers 4: experts
that were linear layers become changes of stacked parameters, and routers and renamed modules get
the names of today.

    …experts.3.gate_proj   A₁ B₁ s₁       gate_up_proj[3] += [s₁ B₁    0 ] [A₁]    [out, in] of one
    …experts.3.up_proj     A₂ B₂ s₂                          [   0  s₂ B₂] [A₂]    expert: gate, up
    …experts.3.down_proj   A₃ B₃ s₃       down_proj[3]    += s₃ B₃ A₃

The result is exact. The rank of a stack is the largest rank of its experts; A and B of the others,
and of experts without a change, are padded with zeros. Transformers' rules for converting
checkpoints (``models/meta.py``) tell which slice of which parameter a layer is.
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
from veneer.attach import Names
from veneer.errors import sentence
from veneer.formats import peft
from veneer.formats._base import PAIR
from veneer.layers import GENERAL_KIND, kind_for
from veneer.models.meta import map_checkpoint_names

#: …experts.<number>.<projection>
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
#: the projections of an expert, in two naming schemes; a file may hold some of them
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))


class _Piece(NamedTuple):
    """The change of some output rows of one expert's matrix in a stack."""

    expert: int
    rows: slice
    layer: peft.PeftLayer


def stack_experts(saved: AdapterFiles, names: Names, problems: list[str]) -> AdapterFiles:
    """The folder with one change for each stack in place of the changes of its experts, and with
    renamed layers under their names of today. A folder without any is returned unchanged."""
    if saved.record is not None:
        return saved
    old = {
        path: match
        for path in saved.low
        if (match := _EXPERT.fullmatch(path)) and path not in names.canonical
    }
    renamed = _map_renamed_layers(saved, names, old)
    if not old and not renamed:
        return saved
    stacks, stacked_paths = _collect_pieces(saved, names, old) if old else ({}, set())
    rooted = bool(saved.peft_config.get("use_rslora"))
    stack_layers = {
        weight_path: _stack_pieces(weight_path, pieces, names, rooted, problems)
        for weight_path, pieces in stacks.items()
    }
    new_layers = {
        weight_path: layer for weight_path, layer in stack_layers.items() if layer is not None
    }
    modules: dict[str, peft.PeftLayer] = {}
    for path, weight_path in renamed.items():
        above, _, name = weight_path.rpartition(".")
        layer, kind = saved.low[path], kind_for(names.modules[names.canonical[above]], name)
        if kind is not GENERAL_KIND:
            modules[above] = replace(layer, target_path=above)
        elif layer.extras:
            problem = f"{path!r} with {' '.join(layer.extras)}"
            problems.append(
                sentence(problem, f"a plain pair for {weight_path!r}", "use PEFT for it")
            )
        else:
            new_layers[weight_path] = replace(layer, target_path=weight_path)
    config = dict(saved.peft_config)
    config["target_parameters"] = [*(config.get("target_parameters") or ()), *new_layers]
    for field, value in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        patterns = {
            f"^{re.escape(weight_path)}$": getattr(layer, value)
            for weight_path, layer in {**new_layers, **modules}.items()
        }
        config[field] = {**patterns, **(config.get(field) or {})}
    low = {
        path: layer
        for path, layer in saved.low.items()
        if path not in stacked_paths and path not in renamed
    }
    return replace(
        saved,
        peft_config=config,
        low={**low, **modules, **_add_wrappers(new_layers, names, config)},
    )


def _map_renamed_layers(
    saved: AdapterFiles, names: Names, experts: Collection[str]
) -> dict[str, str]:
    """The path of today's parameter, by path in the file, of each layer that transformers 5
    renamed or replaced by a bare parameter, such as a router."""
    parameter_paths = {}
    for path, layer in saved.low.items():
        is_module = path in names.canonical
        if (
            is_module
            and kind_for(names.modules[names.canonical[path]], "weight") is not GENERAL_KIND
        ):
            continue
        if path not in experts and layer.suffixes == PAIR and not peft.targets_parameter(path, layer):
            parameter_paths[path] = f"{path}.weight"
    locations = (
        map_checkpoint_names(names.model, parameter_paths.values()) if parameter_paths else {}
    )
    location_lists = {
        path: locations[parameter_path]
        for path, parameter_path in parameter_paths.items()
        if parameter_path in locations
    }
    return {
        path: location.path
        for path, (location, *further) in location_lists.items()
        if not (further or location.index or location.within)
        and names.model.get_parameter(location.path).dim() == 2
    }


def _collect_pieces(
    saved: AdapterFiles, names: Names, old: Mapping[str, re.Match[str]]
) -> tuple[dict[str, list[_Piece]], set[str]]:
    """(the pieces by the path of their stack, the paths in the file that these pieces come
    from)."""
    model = names.model
    count = max((len(p) for p in model.parameters() if p.dim() == 3), default=0)
    expected_names = {
        f"{match[1]}.{number}.{projection}.weight"
        for match in old.values()
        for projection in next(
            (names_of_version for names_of_version in _PROJECTIONS if match[3] in names_of_version),
            (match[3],),
        )
        for number in range(count)
    }
    locations, stacks = map_checkpoint_names(model, expected_names), {}
    stacked_paths: set[str] = set()
    for path in old:
        matches = locations.get(f"{path}.weight", ())
        if (
            len(matches) != 1
            or not matches[0].index
            or matches[0].within
            or len(matches[0].index) > 2
        ):
            continue
        weight_path, index = matches[0].path, list(matches[0].index)
        piece = _Piece(index[0].start, index[1] if len(index) > 1 else slice(None), saved.low[path])
        stacks.setdefault(weight_path, []).append(piece)
        stacked_paths.add(path)
    return stacks, stacked_paths


def _stack_pieces(
    weight_path: str, pieces: list[_Piece], names: Names, rooted: bool, problems: list[str]
) -> peft.PeftLayer | None:
    """The change of a stack, as PEFT's file would hold it; None, with a problem added, if a piece
    does not fit. ``rooted``: the scale is alpha / √rank (``use_rslora``)."""
    weight: Any = names.model.get_parameter(weight_path)
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
                f"{piece.layer.target_path!r} with A {tuple(A.shape)}, B {tuple(B.shape)}"
                f" {' '.join(piece.layer.extras)}"
            )
            problems.append(
                sentence(
                    problem.rstrip(),
                    f"a plain pair for [{height}, {in_}] of {weight_path!r}",
                    "use PEFT for it",
                )
            )
            return None
    by_expert: dict[int, list[_Piece]] = {}
    for piece in pieces:
        by_expert.setdefault(piece.expert, []).append(piece)
    scale = next((piece.layer.scale for piece in pieces if piece.layer.scale), 0.0)
    rank = max(
        sum(len(piece.layer.A) for piece in expert_pieces) for expert_pieces in by_expert.values()
    )
    A, B = first.A.new_zeros(experts, rank, in_), first.B.new_zeros(experts, out, rank)
    for expert, expert_pieces in by_expert.items():
        start = 0
        for _, rows, layer in sorted(expert_pieces, key=lambda piece: piece.rows.start or 0):
            after = start + len(layer.A)
            A[expert, start:after] = layer.A
            B[expert, rows, start:after] = _scale_matrix(layer.B, layer.scale / (scale or 1))
            start = after
    rate = math.sqrt(rank) if rooted else rank
    stacked = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return replace(
        first, target_path=weight_path, A=stacked[0], B=stacked[1], rank=rank, alpha=scale * rate
    )


def _scale_matrix(B: Tensor, factor: float) -> Tensor:
    return B if factor == 1 else (B.to(torch.float64) * factor).to(B.dtype)


def _add_wrappers(
    new_layers: Mapping[str, peft.PeftLayer], names: Names, config: Mapping[str, Any]
) -> dict[str, peft.PeftLayer]:
    """The changes of stacks by their path in PEFT's file, where each further parameter of one
    module has one more wrapper."""
    wrapped = {}
    for weight_path, layer in new_layers.items():
        path, _, name = weight_path.rpartition(".")
        module = names.modules[names.canonical[path]]
        targeted_names = [
            parameter_name
            for parameter_name in module._parameters
            if f"{path}.{parameter_name}" in config["target_parameters"]
        ]
        depth = len(targeted_names) - 1 - targeted_names.index(name)
        wrapped[".".join([path, *["base_layer"] * depth])] = layer
    return wrapped
