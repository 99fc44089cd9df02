"""Adapter folders for a bank, and the outputs that a bank must give."""

from __future__ import annotations

import torch
from tests.support.toys import randomise
from torch import nn

import veneer

# transformers' Conv1D is a kind of layer only after transformers was imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip


def save_adapters(model, folder, *names, config=None, size=0.3, **options):
    """Save adapters of ``model`` with random values, each in the folder of its name. Returns the
    model, which is unchanged."""
    for name in names:
        handle = veneer.attach(
            model, config or veneer.LoraConfig(rank=2, targets="all"), name="own", **options
        )
        randomise(handle, size)
        handle.save(folder / name)
        handle.detach()
    return model


def alone(model, folder, name, *args, **kwargs):
    """The output of a model under one adapter, attached without a bank."""
    if name is None:
        with torch.no_grad():
            return model(*args, **kwargs)
    handle = veneer.load(model, folder / name, name="alone")
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        handle.detach()


class Linears(nn.Module):
    """Three layers. Two of them read the same input; the last one has a bias."""

    def __init__(self, width=12):
        super().__init__()
        self.one, self.two = nn.Linear(width, 10, bias=False), nn.Linear(width, 10, bias=False)
        self.last = nn.Linear(10, 7)

    def forward(self, x):
        return self.last(torch.tanh(self.one(x)) * self.two(x))
