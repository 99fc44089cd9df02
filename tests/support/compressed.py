"""A stand-in for the library compressed-tensors. It has the documented interface, and leaves a
model that transformers loads as version 0.20 of the library does.

quantised(linear, rounds_x)     a layer as it is loaded: it has packed tensors instead of a weight,
                                and a wrapper on the instance instead of its forward
packed_model(model)             the first call of the model makes every such weight dense, wraps the
                                forward of every module once more, and replaces every table of
                                parameters by one that moves tensors to their device
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

#: input features that share a scale
GROUP = 32


def quantised(linear: nn.Linear, rounds_x: bool = False) -> nn.Linear:
    """Quantise a layer to W4A16 (``weight_packed`` [out, in / 8], offset 8, a scale for each group
    of 32 inputs), or with ``rounds_x`` to W8A8 (int8 ``weight`` with a scale for each row; each
    token of x is rounded to int8)."""
    weight = linear.weight.detach()
    if rounds_x:
        scale = weight.abs().amax(1, keepdim=True) / 127
        linear.weight = frozen((weight / scale).round().to(torch.int8))
    else:
        groups = weight.view(len(weight), -1, GROUP)
        scale = groups.abs().amax(2) / 7
        numbers = (groups / scale[..., None]).round().clamp(-8, 7).view_as(weight).long() + 8
        words = sum(numbers[:, nibble::8] << 4 * nibble for nibble in range(8))
        del linear.weight
        linear.weight_packed = frozen(torch.where(words >= 2**31, words - 2**32, words).int())
        linear.weight_shape = frozen(torch.tensor(weight.shape))
    linear.weight_scale = frozen(scale)
    linear.quantization_scheme = SimpleNamespace(
        weights="weights", input_activations=rounds_x or None
    )
    linear.quantization_status = "compressed"

    @wraps(type(linear).forward)
    def quantized_forward(self, input):
        weight = self.weight  # an AttributeError while it is packed, as in the library
        if self.quantization_scheme.input_activations:
            input = round_tokens(input)
        data, weight.data = weight.data, weight.data
        try:
            return self.__class__.forward(self, input)
        finally:
            weight.data = data

    linear.forward = quantized_forward.__get__(linear)
    return linear


@torch.no_grad()
def round_tokens(x: Tensor) -> Tensor:
    """``x`` rounded to int8 with a scale for each token, without a gradient."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def decompress_module(module: Any) -> None:
    scale = module.weight_scale
    if "weight_packed" in module._parameters:
        words = module.weight_packed
        numbers = (
            torch.stack([words.long() >> 4 * nibble & 15 for nibble in range(8)], -1).flatten(1) - 8
        )
        dense = (numbers.view(*scale.shape, GROUP) * scale[..., None]).view(
            *module.weight_shape.tolist()
        )
        del module.weight_packed
    else:
        dense = module.weight * scale
        del module.weight
    module.weight = frozen(dense.to(scale.dtype))
    module.quantization_status = "decompressed"


class Cache(MutableMapping):
    """A table of a module's parameters that is no dict, as accelerate's hooks use."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def __setitem__(self, name: str, tensor: Any) -> None:
        self.entries[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.entries[name]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _move_tables(module: Any) -> None:
    module._parameters, module._buffers = Cache(module._parameters), Cache(module._buffers)
    module._original_forward_func = module.forward.__func__

    @wraps(module._original_forward_func)
    def forward(self, *args, **kwargs):
        return self._original_forward_func(self, *args, **kwargs)

    module.forward = forward.__get__(module)


def packed_model(model: nn.Module) -> nn.Module:
    def unpack_on_first_call(model: nn.Module, args: Any) -> None:
        handle.remove()
        for module in list(model.modules()):
            _move_tables(module)
        for module in model.modules():
            if "quantization_scheme" in module.__dict__:
                decompress_module(module)

    handle = model.register_forward_pre_hook(unpack_on_first_call)
    return model


def instead_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make imports of the library import this stand-in."""
    for name in (
        "compressed_tensors",
        "compressed_tensors.compressors",
        "compressed_tensors.compressors.base",
    ):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[name], "decompress_module", decompress_module, raising=False)
