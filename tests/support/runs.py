"""Training runs that end early, and their equality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from veneer.train import checkpoint
from veneer.train.run import Result


class Crash(TrainerCallback):
    """Raise at the end of step `step`, after its checkpoint if it has one: what a kill there would
    leave behind."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError("a crash, as the test asked for")


def same(first: Result, second: Result) -> None:
    """Equal to the last bit: losses, evaluations, and the adapter's numbers."""
    assert first.losses == second.losses
    assert first.eval_losses == second.eval_losses
    assert first.tokens == second.tokens
    _same_numbers(first.adapter, second.adapter)


def same_folders(first: Path, second: Path) -> None:
    """The same of the output folders of runs that ended."""
    names = ("step", "loss", "eval_loss", "tokens")
    logs = [
        [[line.get(name) for name in names] for line in checkpoint.read_log(output)]
        for output in (first, second)
    ]
    assert logs[0] == logs[1]
    _same_numbers(first / "adapter", second / "adapter")


def _same_numbers(*adapters: Path) -> None:
    first, second = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
