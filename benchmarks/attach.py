"""Adding the 128th adapter beside adding the first, on 64 linear layers. Predicted: 1.0, as nothing walks the
adapters that are there."""

from __future__ import annotations

import time

import torch

import veneer
from report import compare


def model(adapters: int) -> torch.nn.Module:
    made = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(64)))
    for number in range(adapters):
        veneer.attach(made, veneer.LoraConfig(rank=4), f"a{number}")
    return made


def add(made: torch.nn.Module) -> float:
    start = time.perf_counter()
    handle = veneer.attach(made, veneer.LoraConfig(rank=4), "new")
    seconds = time.perf_counter() - start
    handle.detach()
    return seconds


if __name__ == "__main__":
    none, many = model(0), model(127)
    compare(
        "attach", {"1st adapter": lambda: add(none), "128th adapter": lambda: add(many)}, floor="1st adapter", runs=15
    )
