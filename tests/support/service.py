"""A service on a tiny base with adapters on the disk."""

from __future__ import annotations

import torch
from tests.support.tiny import tiny_model

import veneer
from veneer.serve.access import Keyring
from veneer.serve.settings import Settings
from veneer.serve.start import start
from veneer.serve.training.registration import TrainingPlugin


def make_adapter(path, seed, base_seed=0, **config):
    """Save an adapter with random values that are large enough to change answers."""
    model = tiny_model(base_seed)
    with torch.random.fork_rng():  # A begins with random numbers
        torch.manual_seed(seed)
        handle = veneer.attach(model, veneer.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    handle.save(path)
    return path


def open_service(base, adapters, *, keys=None, train=None, runs=50, **fields):
    """A service. ``train``: the folder of the training runs of clients (None: no training);
    ``runs``: how many of them stay in memory."""
    options = {"rows": 8, "length": 200, "timeout": 60.0, "precision": "fp32", **fields}
    return start(
        Settings(str(base), "tiny", None if adapters is None else str(adapters), **options),
        keys or Keyring(),
        None if train is None else TrainingPlugin(train, runs),
    )
