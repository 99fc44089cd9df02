"""The kinds of layers, options of modules and versions of PEFT with which PEFT computes another
result than op(x; W + ΔW), the layer's operation with the changed weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

#: How many times PEFT adds the change of an attention's out-projection, in releases up to
#: LATEST_CHECKED. ``MultiheadAttention.merge`` adds the change and calls the ``merge`` of the
#: projection, which adds it again (huggingface/peft#3774).
OUT_PROJ_REPEATS, LATEST_CHECKED = 2, "0.21"


def out_proj_problem(config: Mapping[str, Any]) -> str | None:
    """The reason why it is not known how many times PEFT adds a change of an attention's
    out-projection: a release later than ``LATEST_CHECKED`` wrote the config. None for a config of
    any other release, or without a version."""
    version = str(config.get("peft_version") or LATEST_CHECKED)
    is_later_release = [int(number) for number in re.findall(r"\d+", version)[:2]] > [
        int(number) for number in LATEST_CHECKED.split(".")
    ]
    reason = (
        f"PEFT {LATEST_CHECKED} applies an attention's out-projection {OUT_PROJ_REPEATS} times, and"
        f" of PEFT {version} it is not known"
    )
    return reason if is_later_release else None


def deviation_reason(kind_name: str, module: Any) -> str | None:
    """Why PEFT's change of a module's output differs from a change of the module's weight; None if
    they agree. ``kind_name``: the name of the module's kind (``layers/``)."""
    # PEFT computes A x as a convolution with only the stride and padding of the layer, so the
    # result differs if the layer has groups, a dilation or another padding mode
    if kind_name in ("conv1d", "conv2d", "conv3d"):
        if module.groups != 1:
            return (
                f"PEFT's change of a convolution in {module.groups} groups is no change of its"
                " weight"
            )
        if any(step != 1 for step in module.dilation):
            return f"PEFT leaves out dilation={tuple(module.dilation)}"
        return (
            None
            if module.padding_mode == "zeros"
            else f"PEFT leaves out padding_mode={module.padding_mode!r}"
        )
    if kind_name == "embedding":
        return None if module.max_norm is None else "PEFT bounds the norm of A's rows too"
    if kind_name == "attention":
        return None if module._qkv_same_embed_dim else "PEFT knows one fused in-projection alone"
    return (
        None if kind_name in ("linear", "conv1d_transformers") else f"PEFT has no {kind_name} layer"
    )


#: the attributes of torch's layers that PEFT's wrapper of a layer also has
_WRAPPER_ATTRIBUTES = {
    "weight", "bias", "in_features", "out_features", "training",
    "add_zero_attn", "batch_first", "bias_k", "bias_v", "dropout", "embed_dim", "head_dim",
    "in_proj_bias", "in_proj_weight", "kdim", "num_heads", "out_proj", "vdim",
}  # fmt: skip
#: the kinds of layers for which PEFT supports ``lora_bias``, a trained bias beside B
KINDS_WITH_BIAS = ("linear", "conv1d_transformers", "conv1d", "conv2d", "conv3d")


def wrapper_lacks(attribute: str) -> bool:
    """Whether PEFT's wrapper of a layer lacks an attribute of the layer, so that reading the
    attribute of an adapted layer fails."""
    return attribute not in _WRAPPER_ATTRIBUTES and not hasattr(nn.Module, attribute)


#: the names of an expert's projections and of the router in checkpoints of transformers 4
_EXPERT_LAYERS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def mistakes_for_experts(path: str, parameters: Iterable[str]) -> bool:
    """Whether PEFT may mistake the linear layer at ``path`` for an expert of transformers 4. In
    models with fused experts, PEFT replaces the names of expert layers in ``target_modules`` by the
    fused parameters. A config must therefore name the layer's weight in ``target_parameters``.
    ``parameters``: the names of the model's parameters."""
    return path.rpartition(".")[2] in _EXPERT_LAYERS and any(
        name.endswith(".gate_up_proj") for name in parameters
    )
