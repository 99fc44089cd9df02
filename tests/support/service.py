"""A service on a tiny base with adapters on the disk."""

from __future__ import annotations

import torch
from tests.support.tiny import tiny_model

import veneer
from veneer.cli.serve import _service
from veneer.serve.access import Keyring


def make_adapter(path, seed, base_seed=0, **config):
    """An adapter with random numbers large enough for answers to differ."""
    model = tiny_model(base_seed)
    handle = veneer.attach(model, veneer.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    handle.save(path)
    return path


def open_service(base, adapters, **fields):
    options = {"keys": Keyring(), "budget": None, "pins": [], "rows": 8, "length": 200, "queue": 256, "timeout": 60.0}
    options = {**options, "loading": {"precision": "fp32"}, **fields}
    return _service(str(base), "tiny", adapters, *options.values())
