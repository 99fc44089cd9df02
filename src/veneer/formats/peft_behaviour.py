"""Where PEFT's result differs from a change of a weight: kinds of layers, options of modules, and
versions of PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

#: how many times PEFT adds the change of an attention's out-projection, in releases up to
#: LATEST_CHECKED: ``MultiheadAttention.merge`` adds it, and calls the projection's own merge, which
#: adds it again (huggingface/peft#3774)
OUT_PROJ_REPEATS, LATEST_CHECKED = 2, "0.21"


def out_proj_problem(config: Mapping[str, Any]) -> str | None:
    """The reason why it is unknown how many times the PEFT release that wrote this config adds the
    change of an out-projection; None if it is known."""
    version = str(config.get("peft_version") or LATEST_CHECKED)
    later = [int(number) for number in re.findall(r"\d+", version)[:2]] > [
        int(number) for number in LATEST_CHECKED.split(".")
    ]
    reason = (
        f"PEFT {LATEST_CHECKED} applies an attention's out-projection {OUT_PROJ_REPEATS} times, and"
        f" of PEFT {version} it is not known"
    )
    return reason if later else None


def deviation_reason(kind: str, module: Any) -> str | None:
    """Why PEFT's change at a module of this kind differs from a change of its weight; None if it
    does not."""
    # the convolution of A inherits stride and padding only
    if kind.startswith("conv") and kind[4:] in (
        "1d",
        "2d",
        "3d",
    ):
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
    if kind == "embedding":
        return None if module.max_norm is None else "PEFT bounds the norm of A's rows too"
    if kind == "attention":
        return None if module._qkv_same_embed_dim else "PEFT knows one fused in-projection alone"
    return None if kind in ("linear", "conv1d_transformers") else f"PEFT has no {kind} layer"


#: the attributes of a layer that PEFT's wrappers forward; they lack all others
_OF_WRAPPERS = {
    "weight", "bias", "in_features", "out_features", "training",
    "add_zero_attn", "batch_first", "bias_k", "bias_v", "dropout", "embed_dim", "head_dim",
    "in_proj_bias", "in_proj_weight", "kdim", "num_heads", "out_proj", "vdim",
}  # fmt: skip
#: the kinds of layers for which PEFT supports a bias beside B
KINDS_WITH_BIAS = ("linear", "conv1d_transformers", "conv1d", "conv2d", "conv3d")


def wrapper_lacks(attribute: str) -> bool:
    """Whether PEFT's wrapper of a layer lacks an attribute of the layer, so that reading it
    fails."""
    return attribute not in _OF_WRAPPERS and not hasattr(nn.Module, attribute)


#: names of the projections and the router of experts in checkpoints from before transformers 5
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def mistakes_for_experts(path: str, parameters: Iterable[str]) -> bool:
    """Whether PEFT may take a linear layer for an expert of transformers 4: in a model with fused
    experts, it replaces these names among the targets by the fused parameters. Such a layer must be
    targeted as a parameter."""
    return path.rpartition(".")[2] in _EXPERTS and any(
        name.endswith(".gate_up_proj") for name in parameters
    )
