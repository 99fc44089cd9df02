"""Bases whose weights are stored packed by another library."""

from __future__ import annotations

import torch
from torch import nn

#: the libraries that a storage needs
LIBRARIES = {
    "bitsandbytes_8bit": ("bitsandbytes",),
    "bitsandbytes_4bit": ("bitsandbytes",),
    "torchao": ("torchao",),
    "gguf": ("gguf", "diffusers"),
}


def x_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the inputs that a layer with a packed weight takes."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    dtype = state.dtype if state is not None else module.weight.dtype
    return dtype if dtype.is_floating_point else torch.float32
