"""Convert adapters for the layers of a model in transformers 4 to its layers in transformers 5.

Experts were linear layers in transformers 4 and are slices of stacked parameters in transformers 5,
so that changes of experts become changes of stacked parameters. Routers and renamed modules get
their new names.

    …experts.3.gate_proj   A₁ B₁ s₁       gate_up_proj[3] += [s₁ B₁    0 ] [A₁]
    …experts.3.up_proj     A₂ B₂ s₂                          [   0  s₂ B₂] [A₂]
    …experts.3.down_proj   A₃ B₃ s₃       down_proj[3]    += s₃ B₃ A₃

s is the scale of a change. gate_up_proj[3] is the matrix [out, in] of expert 3, with the rows of
gate_proj before those of up_proj. The result is exact if all scales are equal; otherwise B is
multiplied by the ratio of the scales and rounded. The rank of a stacked parameter's change is the
largest rank of its experts' changes (for gate_up_proj, the largest sum of both ranks); A and B of
experts with a smaller rank or no change are padded with zeros.

Transformers' rules for converting checkpoints (``models/meta.py``) tell which slice of which
parameter an old layer has become.
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
from veneer.attach import ModelIndex
from veneer.errors import sentence
from veneer.formats import peft
from veneer.formats._base import LORA_SUFFIXES
from veneer.layers import GENERAL_KIND, kind_for
from veneer.models.meta import map_checkpoint_names

#: the path of an expert's layer in transformers 4: …experts.<number>.<projection>
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.([^.]+)")
#: the names of an expert's projections, in two naming schemes of transformers 4
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"))


class _ExpertChange(NamedTuple):
    """The change of one matrix, or of some of its output rows, in a stack [experts, out, in].

    Fields:
        expert: the index of the matrix.
        rows: its rows that are the expert's layer of transformers 4.
        layer: the change of that layer, as the file has it.
    """

    expert: int
    rows: slice
    layer: peft.PeftLayer


def stack_experts(
    adapter_files: AdapterFiles, model_index: ModelIndex, problems: list[str]
) -> AdapterFiles:
    """The adapter with one change for each stacked parameter of transformers 5, instead of one for
    each expert's layer of transformers 4, and with the new paths of renamed layers.

    An adapter without such layers, or one that Veneer saved, is returned unchanged. If a change
    cannot be converted, an error text is added to ``problems``.
    """
    if adapter_files.record is not None:
        return adapter_files
    expert_matches = {
        path: match
        for path in adapter_files.low
        if (match := _EXPERT.fullmatch(path)) and path not in model_index.canonical
    }
    renamed_paths = _map_renamed_layers(adapter_files, model_index, expert_matches)
    if not expert_matches and not renamed_paths:
        return adapter_files
    changes_by_stack, stacked_paths = _group_by_stack(adapter_files, model_index, expert_matches)
    is_rslora = bool(adapter_files.peft_config.get("use_rslora"))
    parameter_layers = {
        weight_path: layer
        for weight_path, expert_changes in changes_by_stack.items()
        if (layer := _stack_changes(weight_path, expert_changes, model_index, is_rslora, problems))
        is not None
    }
    module_layers: dict[str, peft.PeftLayer] = {}
    for path, weight_path in renamed_paths.items():
        module_path, _, name = weight_path.rpartition(".")
        layer = adapter_files.low[path]
        layer_kind = kind_for(model_index.modules[model_index.canonical[module_path]], name)
        if layer_kind is not GENERAL_KIND:
            module_layers[module_path] = replace(layer, target_path=module_path)
        elif layer.extras:
            problem = f"{path!r} with {' '.join(layer.extras)}"
            problems.append(
                sentence(problem, f"a plain pair for {weight_path!r}", "use PEFT for it")
            )
        else:
            parameter_layers[weight_path] = replace(layer, target_path=weight_path)
    peft_config = dict(adapter_files.peft_config)
    peft_config["target_parameters"] = [
        *(peft_config.get("target_parameters") or ()),
        *parameter_layers,
    ]
    for field, attribute in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        patterns = {
            f"^{re.escape(weight_path)}": getattr(layer, attribute)
            for weight_path, layer in {**parameter_layers, **module_layers}.items()
        }
        peft_config[field] = {**patterns, **(peft_config.get(field) or {})}
    unconverted_layers = {
        path: layer
        for path, layer in adapter_files.low.items()
        if path not in stacked_paths and path not in renamed_paths
    }
    return replace(
        adapter_files,
        peft_config=peft_config,
        low={
            **unconverted_layers,
            **module_layers,
            **_add_wrappers(parameter_layers, model_index, peft_config),
        },
    )


def _map_renamed_layers(
    adapter_files: AdapterFiles, model_index: ModelIndex, expert_paths: Collection[str]
) -> dict[str, str]:
    """{path in the file: path of the parameter in the model} of each layer that transformers 5
    renamed, or replaced by a parameter without a module, such as a router. ``expert_paths``: the
    paths in the file of the experts' layers, which are left out."""
    parameter_paths = {
        path: f"{path}.weight"
        for path, layer in adapter_files.low.items()
        if path not in expert_paths
        and layer.suffixes == LORA_SUFFIXES
        and not peft.targets_parameter(path, layer)
        and (
            path not in model_index.canonical
            or kind_for(model_index.modules[model_index.canonical[path]], "weight") is GENERAL_KIND
        )
    }
    locations = (
        map_checkpoint_names(model_index.model, parameter_paths.values()) if parameter_paths else {}
    )
    locations_by_path = {
        path: locations[parameter_path]
        for path, parameter_path in parameter_paths.items()
        if parameter_path in locations
    }
    return {
        path: location.path
        for path, (location, *more_locations) in locations_by_path.items()
        if not (more_locations or location.index or location.within)
        and model_index.model.get_parameter(location.path).dim() == 2
    }


def _group_by_stack(
    adapter_files: AdapterFiles,
    model_index: ModelIndex,
    expert_matches: Mapping[str, re.Match[str]],
) -> tuple[dict[str, list[_ExpertChange]], set[str]]:
    """(the changes of experts by the path of their stacked parameter in the model, the paths of
    these changes in the file). Experts for which the model has no stacked parameter are left out.

    Args:
        expert_matches: the match of ``_EXPERT`` for each path of an expert's layer in the file.
    """
    model = model_index.model
    expert_count = max(
        (len(parameter) for parameter in model.parameters() if parameter.dim() == 3), default=0
    )
    possible_names = {
        f"{match[1]}.{expert}.{projection}.weight"
        for match in expert_matches.values()
        for projection in next(
            (scheme for scheme in _PROJECTIONS if match[3] in scheme),
            (match[3],),
        )
        for expert in range(expert_count)
    }
    locations, changes_by_stack = map_checkpoint_names(model, possible_names), {}
    stacked_paths: set[str] = set()
    for path in expert_matches:
        param_slices = locations.get(f"{path}.weight", ())
        if (
            len(param_slices) != 1
            or not param_slices[0].index
            or param_slices[0].within
            or len(param_slices[0].index) > 2
        ):
            continue
        weight_path, axis_slices = param_slices[0].path, list(param_slices[0].index)
        expert_rows = axis_slices[1] if len(axis_slices) > 1 else slice(None)
        changes_by_stack.setdefault(weight_path, []).append(
            _ExpertChange(
                expert=axis_slices[0].start, rows=expert_rows, layer=adapter_files.low[path]
            )
        )
        stacked_paths.add(path)
    return changes_by_stack, stacked_paths


def _stack_changes(
    weight_path: str,
    expert_changes: list[_ExpertChange],
    model_index: ModelIndex,
    is_rslora: bool,
    problems: list[str],
) -> peft.PeftLayer | None:
    """The changes of experts as one change of the stacked parameter [experts, out, in] at
    ``weight_path``, with A and B in the shapes of PEFT's file. None if the change of an expert does
    not fit the parameter; an error text is then added to ``problems``.

    Args:
        is_rslora: whether the scale of a change is alpha / √rank instead of alpha / rank.
    """
    weight: Any = model_index.model.get_parameter(weight_path)
    expert_count, out, in_ = weight.shape
    first_layer = expert_changes[0].layer
    for change in expert_changes:
        A, B = change.layer.A, change.layer.B
        row_count = len(range(out)[change.rows])
        if (
            change.layer.extras
            or A.dim() != 2
            or B.dim() != 2
            or (len(B), A.shape[1]) != (row_count, in_)
        ):
            problem = (
                f"{change.layer.target_path!r} with A {tuple(A.shape)}, B {tuple(B.shape)}"
                f" {' '.join(change.layer.extras)}"
            )
            problems.append(
                sentence(
                    problem.rstrip(),
                    f"a plain pair for [{row_count}, {in_}] of {weight_path!r}",
                    "use PEFT for it",
                )
            )
            return None
    changes_by_expert: dict[int, list[_ExpertChange]] = {}
    for change in expert_changes:
        changes_by_expert.setdefault(change.expert, []).append(change)
    scale = next((change.layer.scale for change in expert_changes if change.layer.scale), 0.0)
    rank = max(
        sum(len(change.layer.A) for change in same_expert_changes)
        for same_expert_changes in changes_by_expert.values()
    )
    A = first_layer.A.new_zeros(expert_count, rank, in_)
    B = first_layer.B.new_zeros(expert_count, out, rank)
    for expert, same_expert_changes in changes_by_expert.items():
        rank_start = 0
        for _, rows, layer in sorted(
            same_expert_changes, key=lambda change: change.rows.start or 0
        ):
            rank_stop = rank_start + len(layer.A)
            A[expert, rank_start:rank_stop] = layer.A
            B[expert, rows, rank_start:rank_stop] = _scale_matrix(
                layer.B, layer.scale / (scale or 1)
            )
            rank_start = rank_stop
    return replace(
        first_layer,
        target_path=weight_path,
        A=A.flatten(0, 1),
        B=B.permute(1, 2, 0).flatten(1),
        rank=rank,
        alpha=scale * (math.sqrt(rank) if is_rslora else rank),
    )


def _scale_matrix(B: Tensor, factor: float) -> Tensor:
    return B if factor == 1 else (B.to(torch.float64) * factor).to(B.dtype)


def _add_wrappers(
    parameter_layers: Mapping[str, peft.PeftLayer],
    model_index: ModelIndex,
    peft_config: Mapping[str, Any],
) -> dict[str, peft.PeftLayer]:
    """The changes of parameters by their path in PEFT's file. If several parameters of a module
    change, PEFT nests one wrapper for each. So the path of each inner one ends in one segment
    ``base_layer`` more than that of the wrapper around it.

    Args:
        parameter_layers: the changes, by the path of the parameter.
        peft_config: PEFT's config, with all these paths in ``target_parameters``.
    """
    layers_by_peft_path = {}
    for weight_path, layer in parameter_layers.items():
        module_path, _, parameter_name = weight_path.rpartition(".")
        module = model_index.modules[model_index.canonical[module_path]]
        targeted_names = [
            targeted_name
            for targeted_name in module._parameters
            if f"{module_path}.{targeted_name}" in peft_config["target_parameters"]
        ]
        wrapper_count = len(targeted_names) - 1 - targeted_names.index(parameter_name)
        layers_by_peft_path[".".join([module_path, *["base_layer"] * wrapper_count])] = layer
    return layers_by_peft_path
