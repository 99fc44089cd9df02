"""The contents of a one-file format (kohya, diffusers, gguf, dense), from an adapter folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import Names
from veneer.errors import AdapterError
from veneer.formats import Adapter, BaseFacts, LowRankChange, peft
from veneer.formats._base import kind_of_change
from veneer.layers import parameter_path
from veneer.tools.convert import deltas
from veneer.tools.convert.base_info import BaseInfo
from veneer.tools.convert.token_changes import replace_token_changes, split_head, token_fingerprints


def build_adapter(
    saved: AdapterFiles,
    target_format: str,
    changes: tuple[LowRankChange, ...],
    base_info: BaseInfo,
    on_model: Callable[[], AbstractContextManager[nn.Module]],
) -> Adapter:
    """The adapter as ``Format.write`` takes it. ``on_model``: a context with the adapter installed
    on its base."""
    if peft.not_for_peft(saved.peft_config) is not None and not base_info.facts.shapes:
        problem = f"{saved.path}, with layers that only Veneer and its base know"
        raise AdapterError(problem, "the base that it was made for", "give the base")

    def all_deltas() -> tuple[Mapping[str, Tensor], list[str]]:
        if base_info.module is None:
            return deltas.deltas_of_file(changes, saved.full)
        with on_model() as model:
            model_deltas = deltas.deltas_of_model(model, deltas.NAME)
            split_refs = split_head(Names(model), saved) if saved.tokens else None
        if split_refs is not None:
            embedding, head = (parameter_path(*ref) for ref in split_refs)
            model_deltas = {**model_deltas, head: model_deltas[embedding]}
        return model_deltas, []

    base: Mapping[str, Any] = saved.metadata.get("base") or {
        "name": saved.peft_config.get("base_model_name_or_path")
    }
    if saved.tokens:
        with on_model() as model:
            fingerprints = token_fingerprints(Names(model), saved)
            base = {**base, "weights": {**base.get("weights", {}), **fingerprints}}
            if target_format != "dense":  # a dense file takes ΔW from the model
                changes = replace_token_changes(model, deltas.NAME, saved, changes)
    about = {
        "base": base,
        "provenance": saved.metadata.get("provenance", {}),
        "variant": saved.config.variant,
    }
    return Adapter(changes, saved.full, about, all_deltas)


def list_changes(saved: AdapterFiles, facts: BaseFacts) -> tuple[LowRankChange, ...]:
    """The low-rank changes of a folder, each with the name of its weight and the kind of its
    layer."""
    recorded_weights = saved.metadata.get("changes") or {}
    attention_paths = (peft.attention_of(path) for path in saved.low)
    fused = {attention for attention in attention_paths if attention is not None}
    transposed = bool(saved.peft_config.get("fan_in_fan_out"))
    changes = []
    for path, layer in saved.low.items():
        weight = _weight_name(path, layer, recorded_weights, fused, facts)
        kind = kind_of_change(path, layer, weight, transposed, facts.shapes.get(weight))
        changes.append(LowRankChange(weight, layer, kind))
    return tuple(changes)


def _weight_name(
    path: str,
    layer: peft.PeftLayer,
    recorded_weights: Iterable[str],
    fused: set[str],
    facts: BaseFacts,
) -> str:
    """The parameter that an entry of the folder changes: from the record, else from the base, else
    by PEFT's rule. ``fused``: attention modules with one weight for query, key and value."""
    name = layer.target_path
    if peft.targets_parameter(path, layer) or name in recorded_weights or name in facts.shapes:
        return name
    candidates = [weight for weight in recorded_weights if weight.rpartition(".")[0] == name]
    if len(candidates) == 1:
        return candidates[0]
    is_fused = name in fused or f"{name}.in_proj_weight" in facts.shapes
    return f"{name}.{'in_proj_weight' if is_fused else 'weight'}"
