"""A variant and a layer kind as a user would add them: tests find them through the registries, as they find Veneer's
own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from veneer.layers import LAYERS, Dims, Layer
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS
from veneer.variants.lora import LORA


def _init(groups, out, in_, rank, fan_in, base):
    return {**LORA.init(groups, out, in_, rank, fan_in, base), "gain": torch.ones(groups * out)}


def _resolve(numbers, scale, base):
    assert base().shape[0] == numbers["A"].shape[0]  # the frozen weight can be asked for
    return LowRank(numbers["A"], numbers["B"], scale), numbers["gain"]


#: rescales every output row: the ``gain`` of the equation, which no variant of Veneer's own uses yet
SCALED = replace(LORA, name="toy_scaled", init=_init, resolve=_resolve, peft=None)


class Squared(nn.Linear):
    """A linear layer with a forward of its own, which is not even linear in its weight."""

    def forward(self, input):
        return F.linear(input, self.weight * self.weight.abs(), self.bias)


class Diagonal(nn.Module):
    """A layer that Veneer does not know: y = x · scale for each row of a table."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, width))

    def forward(self, x):
        return (x[..., None, :] * self.table).sum(-1)


class DiagonalKind(Layer):
    """The few lines that CONTRIBUTING shows."""

    name = "toy_diagonal"
    weight = "table"

    def types(self):
        return (Diagonal,)

    def dims(self, module):
        return Dims(1, *module.table.shape)

    def op(self, module, x, weight, bias):
        return (x[..., None, :] * weight).sum(-1)

    def update(self, module, x, low, y):
        change = F.linear(F.linear(x, low.A[0]), low.B[0] * low.scale)
        return change if y is None else y + change

    def examples(self):
        yield Diagonal(5, 7), torch.randn(3, 7)


def register_toys() -> None:
    if SCALED.name not in VARIANTS.names():
        VARIANTS.add(SCALED.name, SCALED)
        LAYERS.add(DiagonalKind.name, DiagonalKind())


def randomise(handle, size: float = 0.3) -> None:
    """Give every trained number of an adapter a random value, so that nothing is hidden by a zero."""
    for part in handle.layers.values():
        for name, parameter in part.named_parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64) * size
            parameter.data.copy_(noise + (1 if name == "gain" else 0))
        if part.layer is not None:
            A = part._parameters["A"].data
            A.copy_(part.layer.mask_init(_layer_at(handle, part), A))


def _layer_at(handle, part):
    from veneer.attach import adapters

    return next(module for _, module, own in adapters(handle.model, handle.name) if own is part)


def error(actual, expected) -> float:
    """Relative error in the Frobenius norm, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()
