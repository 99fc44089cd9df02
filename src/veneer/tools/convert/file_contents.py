"""Build the contents of a file (kohya, diffusers, gguf or dense) from an adapter folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from veneer.adapter_files.folder import AdapterFiles
from veneer.attach import ModelIndex
from veneer.errors import AdapterError
from veneer.formats import Adapter, BaseFacts, LowRankChange, peft
from veneer.formats._base import kind_of_change
from veneer.layers import parameter_path
from veneer.tools.convert import deltas
from veneer.tools.convert.base_info import BaseInfo
from veneer.tools.convert.token_changes import replace_token_changes, split_head, token_fingerprints


def build_adapter(
    saved_adapter: AdapterFiles,
    target_format: str,
    changes: tuple[LowRankChange, ...],
    base_info: BaseInfo,
    adapted_base: Callable[[], AbstractContextManager[nn.Module]],
) -> Adapter:
    """The adapter in the form that ``Format.write`` takes.

    Args:
        changes: the low-rank changes of the adapter's folder, as ``list_changes`` returns them.
        adapted_base: opens a context whose value is the base with the adapter installed on it.

    Raises:
        AdapterError: the layout of a change is only known with the base, which is missing.
    """
    if peft.not_for_peft(saved_adapter.peft_config) is not None and not base_info.facts.shapes:
        raise AdapterError(
            f"{saved_adapter.path}, with layers that only Veneer and its base know",
            "the base that it was made for",
            "give the base",
        )

    def compute_deltas() -> tuple[Mapping[str, Tensor], list[str]]:
        if base_info.load_model is None:
            return deltas.deltas_of_file(changes, saved_adapter.full)
        with adapted_base() as model:
            model_deltas = deltas.deltas_of_model(model, deltas.ADAPTER_NAME)
            split_head_refs = (
                split_head(ModelIndex(model), saved_adapter) if saved_adapter.tokens else None
            )
        if split_head_refs is not None:
            embedding_path, head_path = (parameter_path(*ref) for ref in split_head_refs)
            model_deltas = {**model_deltas, head_path: model_deltas[embedding_path]}
        return model_deltas, []

    base_record: Mapping[str, Any] = saved_adapter.metadata.get("base") or {
        "name": saved_adapter.peft_config.get("base_model_name_or_path")
    }
    if saved_adapter.tokens:
        with adapted_base() as model:
            base_record = {
                **base_record,
                "weights": {
                    **base_record.get("weights", {}),
                    **token_fingerprints(ModelIndex(model), saved_adapter),
                },
            }
            if target_format != "dense":  # for "dense", ``compute_deltas`` includes the token rows
                changes = replace_token_changes(model, deltas.ADAPTER_NAME, saved_adapter, changes)
    return Adapter(
        changes=changes,
        full=saved_adapter.full,
        metadata={
            "base": base_record,
            "provenance": saved_adapter.metadata.get("provenance", {}),
            "variant": saved_adapter.config.variant,
        },
        deltas=compute_deltas,
    )


def list_changes(saved_adapter: AdapterFiles, facts: BaseFacts) -> tuple[LowRankChange, ...]:
    """The low-rank changes of a folder, with the path of each changed weight and its kind of layer.
    ``facts``: the shapes of the base's weights, which are used where the adapter's record does not
    tell the path or the kind; they may be empty."""
    recorded_changes = saved_adapter.metadata.get("changes") or {}
    attention_paths = (peft.attention_of(path) for path in saved_adapter.low)
    fused_module_paths = {attention for attention in attention_paths if attention is not None}
    may_be_transposed = peft.may_be_transposed(saved_adapter.peft_config)
    changes = []
    for path, layer in saved_adapter.low.items():
        weight_path = _weight_name(path, layer, recorded_changes, fused_module_paths, facts)
        recorded_kind = recorded_changes.get(weight_path, {}).get("kind")
        if recorded_kind is not None:
            is_transposed = recorded_kind == "conv1d_transformers"
        else:
            is_transposed = None if may_be_transposed else False
        layer_kind = kind_of_change(
            path, layer, weight_path, is_transposed, facts.shapes.get(weight_path)
        )
        changes.append(LowRankChange(weight_path, layer, layer_kind))
    return tuple(changes)


def _weight_name(
    path: str,
    layer: peft.PeftLayer,
    recorded_weights: Iterable[str],
    fused_module_paths: set[str],
    facts: BaseFacts,
) -> str:
    """The path of the parameter that an entry of the folder changes. It is taken from the adapter's
    record, else from the base. If neither lists it, it is the path of the module with ".weight", or
    with ".in_proj_weight" for a module in ``fused_module_paths``, which are the paths of attention
    modules with one weight for query, key and value."""
    target_path = layer.target_path
    if (
        peft.targets_parameter(path, layer)
        or target_path in recorded_weights
        or target_path in facts.shapes
    ):
        return target_path
    candidate_names = [
        weight for weight in recorded_weights if weight.rpartition(".")[0] == target_path
    ]
    if len(candidate_names) == 1:
        return candidate_names[0]
    is_fused = target_path in fused_module_paths or f"{target_path}.in_proj_weight" in facts.shapes
    return f"{target_path}.{'in_proj_weight' if is_fused else 'weight'}"
