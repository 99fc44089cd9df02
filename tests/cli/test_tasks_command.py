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
    flags = (
        "--task",
        config.task,
        "--epochs",
        4,
        "--batch-size",
        8,
        "--learning-rate",
        1e-2,
        "--no-check",
    )
    done = veneer(
        "train", "--base", config.base, "--data", config.data, "--output", tmp_path / "run", *flags
    )
    assert done.code == 0, done.err
    adapter = tmp_path / "run" / "adapter"
    shown = veneer("eval", config.base, config.data, "--adapter", adapter, "--precision", "fp32")
    assert shown.code == 0, shown.err
    assert "right" in shown.out
    found = json.loads(veneer("eval", config.base, config.data, "--adapter", adapter, "--json").out)
    assert found["adapter"]["accuracy"] > 0.8
    assert f"veneer {'generate' if name == 'dpo' else 'eval'} {config.base}" in done.err.replace(
        "\n", " "
    )
    assert ("base" in found) == (name == "dpo")  # a base with a new head tells nothing
    if name == "dpo":
        assert found["base"]["margin"] == 0


def test_a_preference_is_measured_from_the_adapter_that_was_trained_further(
    veneer: Any, tmp_path: Path
) -> None:
    config = config_of("dpo", tmp_path)
    common = ("train", "--base", config.base, "--data", config.data, "--no-check", "--task", "dpo")
    common += ("--max-steps", 2, "--precision", "fp32")
    first, second = tmp_path / "first", tmp_path / "second"
    done = veneer(*common, "--output", first, "--learning-rate", 0.1)
    assert done.code == 0, done.err
    start = ("--adapter", first / "adapter", "--learning-rate", 1e-12)
    done = veneer(*common, "--output", second, *start)
    assert done.code == 0, done.err
    measure = ("eval", config.base, config.data, "--adapter", second / "adapter", "--json")
    measure += ("--precision", "fp32")
    assert json.loads(veneer(*measure).out)["adapter"]["margin"] == pytest.approx(0, abs=1e-4)
    newest = max(second.glob("checkpoint-*"))
    saved = json.loads(veneer(*measure[:4], newest / "adapter", *measure[5:]).out)
    assert saved["adapter"]["margin"] == pytest.approx(0, abs=1e-4)
    (first / "adapter").rename(first / "moved")
    done = veneer(*measure)
    assert abs(json.loads(done.out)["adapter"]["margin"]) > 1e-2
    assert "is gone or has changed; the loss compares with the base" in done.err.replace("\n", " ")


def test_a_head_is_not_measured_without_its_adapter(veneer: Any, tmp_path: Path) -> None:
    config = config_of("classify", tmp_path)
    done = veneer("eval", config.base, config.data, "--task", "classify")
    assert done.code == 2
    assert "task classify without an adapter" in done.err
    done = veneer("eval", config.base, config.data, "--task", "clasify")
    assert done.code == 2
    assert "no such task" in done.err


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("dpo", ("--exact", 3)),
        ("dpo", ("--whole",)),
        ("dpo", ("--prompt-column", "prompt")),
        ("sft", ("--columns", "prompt=question")),
        ("sft", ("--reward", "a.py:f")),
    ],
)
def test_a_flag_of_another_task_is_refused(
    veneer: Any, task: str, flags: tuple[Any, ...], tmp_path: Path
) -> None:
    config = config_of("dpo", tmp_path)
    done = veneer("eval", config.base, config.data, "--task", task, *flags)
    assert done.code == 2
    assert f"{flags[0]} for task {task}" in done.err


def test_an_encoder_decoder_is_measured_with_the_tokens_that_its_adapter_adds(
    veneer: Any, tmp_path: Path
) -> None:
    config = config_of("seq2seq", tmp_path, eval_fraction=0.0)
    common = (
        "--task",
        "seq2seq",
        "--max-steps",
        12,
        "--batch-size",
        8,
        "--learning-rate",
        1e-2,
        "--no-check",
    )
    words = ("--add-tokens", "aaa,bbb", "--eval-data", config.data, "--precision", "fp32")
    run = tmp_path / "run"
    done = veneer(
        "train", "--base", config.base, "--data", config.data, "--output", run, *common, *words
    )
    assert done.code == 0, done.err
    shown = veneer(
        "eval",
        config.base,
        config.data,
        "--adapter",
        run / "adapter",
        "--precision",
        "fp32",
        "--json",
    )
    assert shown.code == 0, shown.err
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads(shown.out)["adapter"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
