"""Bases that are stored packed."""

from __future__ import annotations

import torch
from torch import nn

LIBRARIES = {
    "bitsandbytes_8bit": ("bitsandbytes",),
    "bitsandbytes_4bit": ("bitsandbytes",),
    "torchao": ("torchao",),
    "gguf": ("gguf", "diffusers"),
}


def x_dtype(module: nn.Module) -> torch.dtype:
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    dtype = state.dtype if state is not None else module.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32
