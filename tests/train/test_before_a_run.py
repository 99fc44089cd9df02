"""What `veneer train` does instead of a run: `--dry-run`, `--find-rate`. Neither writes
anything."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.support.tasks import config_of
from tests.support.tiny import write_rows

from veneer import models
from veneer.errors import ConfigError, DataError, OutputExistsError, TargetError, TrainingError
from veneer.models.load import meta_base
from veneer.models.locate import config_of as base_config
from veneer.train.dry_run import dry_run
from veneer.train.find_rate import HIGHEST_RATE, LOWEST_RATE, RateSweep, find_rate
from veneer.train.order import EpochSampler
from veneer.train.run import fit
from veneer.train.tasks import TASKS

Make = Callable[..., Any]


def said(what: Callable[..., Any], config: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    what(config, console=console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def about(text: str) -> list[str]:
    """What a run says of itself before its first step."""
    lines = text.splitlines()
    return lines[lines.index(next(line for line in lines if line.startswith("Base"))) :]


def test_a_dry_run_says_what_the_run_says_and_writes_nothing(make: Make, tmp_path: Path) -> None:
    config = make(max_steps=1, eval_fraction=0.0, check=False, parallel="fsdp")
    dry = said(dry_run, config)
    assert not (tmp_path / "run").exists()
    run = about(said(fit, config))
    ours = about(dry)
    head = ours.index(next(line for line in ours if line.startswith("Time")))
    assert ours[:head] == run[:head]
    assert "Time     at least 0 s" in dry
    assert "parallel fsdp does nothing here: this is one process" in dry
    assert "  read   │ 3 + 5 =\n  learnt │  8<|im_end|>" in dry


def test_a_dry_run_loads_no_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_head", None)
    assert "Nothing was written" in said(
        dry_run, make(variant="dora", cache_lower=True, layers=[1])
    )
    meta = meta_base(make().base, precision="bf16")
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}


def test_the_least_time_counts_backward_above_the_first_weight_that_trains_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.train.dry_run._measure_speed", lambda *_: 1e6)
    monkeypatch.setattr("veneer.train.dry_run.format_duration", lambda seconds: f"{seconds:.6f}")

    def least_seconds(**changes: Any) -> float:
        line = next(line for line in said(dry_run, make(**changes)).splitlines() if "Time" in line)
        return float(line.split("at least ")[1].split()[0])

    every, upper = least_seconds(layers=[0, 1]), least_seconds(layers=[1])
    kept = least_seconds(layers=[1], cache_lower=True)
    assert 0 < kept < upper < every
    assert upper < 0.9 * every


def test_a_dry_run_refuses_what_the_run_would(make: Make, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for error, changes in (
        (TargetError, {"targets": "nothing_of_it"}),
        (TargetError, {"rank": 1000, "targets": ["q_proj"]}),
        (OutputExistsError, {"output": "full"}),
        (ConfigError, {"optimiser": "adamm"}),
        (DataError, {"data": str(tmp_path / "none.jsonl")}),
    ):
        for what in (dry_run, fit):
            with pytest.raises(error):
                what(make(**changes), console=Console(file=io.StringIO()))


def test_a_dry_run_of_an_unfinished_run_says_where_it_goes_on(make: Make) -> None:
    class StopError(Exception):
        pass

    from transformers import TrainerCallback

    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                raise StopError

    with pytest.raises(StopError):
        fit(make(), callbacks=[Cut()], quiet=True)
    assert "Resuming from step 5" in said(dry_run, make())


def test_a_sweep_writes_nothing_and_a_run_at_the_found_rate_learns(
    make: Make, tmp_path: Path
) -> None:
    config = make(max_steps=30, eval_fraction=0.0, check=False, dropout=0.0)
    sweep = find_rate(config, console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    assert sweep.rates[0] == pytest.approx(LOWEST_RATE)
    assert sweep.rates[-1] <= HIGHEST_RATE * 1.001
    assert len(sweep.rates) == len(sweep.losses)
    assert len(sweep.lines()) == 17
    losses = fit(make(max_steps=30, eval_fraction=0.0, check=False, dropout=0.0, learning_rate=sweep.suggested_rate),
                 quiet=True).losses  # fmt: skip
    assert sum(losses[-5:]) / 5 < sum(losses[:3]) / 3 - 0.1


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_sweep_orders_rows_as_the_run_does(
    make: Make, monkeypatch: pytest.MonkeyPatch, is_grouped: bool
) -> None:
    orders = []

    def make_sampler(*arguments: Any) -> EpochSampler:
        orders.append(arguments[-1])
        return EpochSampler(*arguments)

    monkeypatch.setattr("veneer.train.trainer.EpochSampler", make_sampler)
    monkeypatch.setattr("veneer.train.find_rate.STEPS", 2)
    find_rate(
        make(eval_fraction=0.0, group_by_length=is_grouped), console=Console(file=io.StringIO())
    )
    assert {*orders} == {is_grouped}


def sweep_of(loss: Callable[[float], float]) -> RateSweep:
    rates = tuple(LOWEST_RATE * (HIGHEST_RATE / LOWEST_RATE) ** (k / 79) for k in range(80))
    return RateSweep(rates, tuple(map(loss, rates)))


def test_a_suggestion_is_a_tenth_of_the_rate_at_the_lowest_loss() -> None:
    valley = sweep_of(lambda rate: 3 + 0.2 * (math.log10(rate) + 2) ** 2)
    assert 1e-3 <= valley.suggested_rate <= 4e-3  # the mean lags behind
    with pytest.raises(TrainingError, match="no rate from 1e-06 to 1e\\+00 brings down"):
        sweep_of(lambda rate: 3 + rate).suggested_rate  # noqa: B018
    assert valley.smoothed_losses[0] == pytest.approx(valley.losses[0])


@pytest.mark.parametrize("name", ["classify images", "classify words", "dpo", "embed", "seq2seq"])
def test_a_dry_run_of_a_task_says_what_its_run_says(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path, max_steps=1, eval_fraction=0.0, check=False)
    ours, run = about(said(dry_run, config)), about(said(fit, config))
    head = next(i for i, line in enumerate(ours) if line.startswith(("Time", "Example")))
    assert ours[:head] == run[:head]
    assert ours[head].startswith("Time") == (name in ("classify words", "dpo", "embed"))


PAIR = ["read prompt b?", "learnt chosen  bbb<|im_end|>", "learnt rejected  aaaa<|im_end|>"]
#: what of the first example is read, and what is learnt
SHOWN = {
    "classify": ["read text bbb bb bbb", "learnt label is b"],
    "classify words": ["read words b aa aa b", "learnt labels b → B, aa → A, aa → A, b → B"],
    "classify images": ["read image 8 × 8 pixels", "learnt label 1"],
    "dpo": PAIR, "orpo": PAIR,
    "reward": [*(line.replace("learnt", "read") for line in PAIR), "learnt score higher for chosen than for rejected"],
    "kto": ["read prompt b?", "learnt completion  aaa<|im_end|>", "learnt label bad"],
    "grpo": ["read prompt b?", "learnt answers 4 that the model draws, at most 6 tokens each, judged by {}",
             "read wanted b (for the judge)"],
    "embed": ["read anchor 0 b", "read positive b 0", "read negative 0",
              "learnt nearest positive, of all in the batch"],
    "embed by cosine": ["read anchor b", "read positive bb", "learnt cosine 0.5"],
    "seq2seq": ["read prompt bbb bb bbb", "learnt completion bbb<|im_end|>"],
    "speech": ["read audio 0.12 s at 16,000 samples a second", "learnt text bb<|im_end|>"],
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_is_shown_as_one_reads_it(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path, eval_fraction=0.0)
    task = TASKS[config.task](config)
    task.open_base()
    shown = task.segments(task.prepare().train[0])
    told = [f"{'learnt' if learnt else 'read'} {part} {text}" for learnt, part, text in shown]
    assert told == [line.format(*config.reward) for line in SHOWN[name]]


def test_the_parts_of_an_example_stand_below_each_other(tmp_path: Path) -> None:
    text = said(dry_run, config_of("dpo", tmp_path, eval_fraction=0.0))
    assert (
        "Example  row 1 of the data:\n  read   prompt   │ b?\n  learnt chosen   │  bbb<|im_end|>\n"
        in text
    )


def test_a_prompt_of_several_turns_is_shown_once(tmp_path: Path) -> None:
    """Also where only the chats' common beginning says what it is."""
    first = {"role": "user", "content": "a"}
    answers = [[first, {"role": "assistant", "content": text}] for text in ("b", "c")]
    data = write_rows(
        tmp_path / "chats.jsonl", [dict(zip(("chosen", "rejected"), answers, strict=True))]
    )
    config = config_of("dpo", tmp_path, data=str(data), eval_fraction=0.0)
    task = TASKS["dpo"](config)
    task.open_base()
    prompt, chosen, rejected = task.segments(task.prepare().train[0])
    assert prompt == (False, "prompt", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert (chosen.is_trained, chosen.name, chosen.text[0]) == (True, "chosen", "b")
    assert (rejected.is_trained, rejected.name, rejected.text[0]) == (True, "rejected", "c")


def test_a_base_that_is_quantised_already_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):  # noqa: N818
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(models, "load_head", load)
    config = base_config(make().base)
    config.quantization_config = {"quant_method": "any"}
    monkeypatch.setattr("veneer.train.dry_run.config_of", lambda _: config)
    with pytest.raises(Loaded):
        said(dry_run, make())


def test_no_rate_is_sought_where_the_loss_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grpo, whose loss is zero at every rate"):
        said(find_rate, config_of("grpo", tmp_path))
