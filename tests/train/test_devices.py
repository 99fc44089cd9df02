"""A run where several GPUs are visible to one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainingArguments

from veneer.train.run import fit


def test_a_run_that_sees_two_gpus_trains_on_one(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would wrap the model in `nn.DataParallel`, which trl refuses with an error of
    its own."""
    original: Any = TrainingArguments.__dict__["_setup_devices"].func

    def devices(self: Any) -> Any:
        device = original(self)
        self._n_gpu = 2
        return device

    seen = cached_property(devices)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    console = Console(record=True, width=200, stderr=True)
    result = fit(make(max_steps=2, eval_fraction=0.0), console=console)
    assert len(result.losses) == 2
    assert "2 GPUs are visible; this run trains on cpu" in console.export_text()
