"""End training runs early, and compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from veneer.train import checkpoint
from veneer.train.run import Result


class Crash(TrainerCallback):
    """Raise at the end of step `step`, after its checkpoint if it has one. The run leaves the same
    files as after a kill at this moment."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError("a crash, as the test asked for")


def same(first: Result, second: Result) -> None:
    """Assert that two runs have bit-equal losses, evaluations and adapters."""
    assert first.losses == second.losses
    assert first.eval_losses == second.eval_losses
    assert first.tokens == second.tokens
    _assert_equal_tensors(first.adapter, second.adapter)


def same_folders(first: Path, second: Path) -> None:
    """Assert that the output folders of two complete runs have equal logs and adapters."""
    names = ("step", "loss", "eval_loss", "tokens")
    logs = [
        [[line.get(name) for name in names] for line in checkpoint.read_log(output)]
        for output in (first, second)
    ]
    assert logs[0] == logs[1]
    _assert_equal_tensors(first / "adapter", second / "adapter")


def _assert_equal_tensors(*adapters: Path) -> None:
    first, second = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
