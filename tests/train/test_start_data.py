"""Variants that start from data take the first rows of the training data in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import veneer
from veneer import models
from veneer.errors import ConfigError
from veneer.train import adapter_setup
from veneer.train.prepare import Rows
from veneer.train.run import fit
from veneer.train.tasks import TASKS


class AtStart(TrainerCallback):
    """Copies what the adapter holds before the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.found = adapter_of(model)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        key: value.detach().clone() for key, value in model.state_dict().items() if "veneer" in key
    }


@pytest.mark.parametrize("variant", ["eva", "corda", "lora_ga"])
def test_a_run_starts_where_attach_starts_with_the_first_rows(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(adapter_setup, "CALIBRATION_ROWS", 5)
    config, seen = make(variant=variant, max_steps=1, targets=["q_proj", "down_proj"]), AtStart()
    run = fit(config, callbacks=[seen], quiet=True)
    assert len(run.losses) == 1

    base = models.load_base(config.base, precision="fp32")
    task = TASKS["sft"](config)
    task.open_base()
    rows = task.prepare().train
    batches = [
        {name: torch.tensor([rows[i][name]]) for name in ("input_ids", "labels")} for i in range(5)
    ]
    torch.manual_seed(config.seed)
    lora = veneer.LoraConfig(rank=4, variant=variant, targets=["q_proj", "down_proj"], dropout=0.1)
    veneer.attach(base.model, lora, batches=batches)
    expected = adapter_of(base.model)
    assert seen.found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(seen.found[key], value, rtol=0, atol=0, msg=key)


def test_rows_of_which_nothing_is_learnt_are_passed_by(make: Callable[..., Any]) -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},
        {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]},
    ]
    examples = Rows(rows, [3, 3], [0, 1], [0, 2])
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    task = TASKS["sft"](make(variant="lora_ga"))
    (batch,) = adapter_setup.calibration_arguments(task, examples, model)["batches"]
    assert batch["input_ids"].tolist() == [[4, 5, 6]]
    assert adapter_setup.calibration_arguments(TASKS["sft"](make()), examples, model) == {}


def test_what_is_no_part_of_the_data_is_asked_for(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no original="):
        fit(make(variant="loftq"), quiet=True)
