"""`veneer train --task …` and `veneer eval` of what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.tasks import config_of


@pytest.mark.parametrize("name", ["classify words", "dpo"])
def test_train_a_task_and_measure_its_adapter(veneer: Any, name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    flags = ("--task", config.task, "--epochs", 4, "--batch-size", 8, "--learning-rate", 1e-2, "--no-check")
    done = veneer("train", "--base", config.base, "--data", config.data, "--output", tmp_path / "run", *flags)
    assert done.code == 0, done.err
    adapter = tmp_path / "run" / "adapter"
    shown = veneer("eval", config.base, config.data, "--adapter", adapter, "--precision", "fp32")
    assert shown.code == 0, shown.err
    assert "right" in shown.out
    found = json.loads(veneer("eval", config.base, config.data, "--adapter", adapter, "--json").out)
    assert found["adapter"]["accuracy"] > 0.8
    assert ("base" in found) == (name == "dpo")  # a base with a new head tells nothing
    if name == "dpo":
        assert found["base"]["margin"] == 0


def test_a_head_is_not_measured_without_its_adapter(veneer: Any, tmp_path: Path) -> None:
    config = config_of("classify", tmp_path)
    done = veneer("eval", config.base, config.data, "--task", "classify")
    assert done.code == 2
    assert "task classify without an adapter" in done.err
    done = veneer("eval", config.base, config.data, "--task", "clasify")
    assert done.code == 2
    assert "no such task" in done.err
