"""A model with an adapter in other people's trainers: what they save is the adapter, and they go on from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from tests.support.trainers import HALF, HEADS, LINEAR, RUNS, STEPS, Run, token_rows, write_bases

import veneer

# every one of these trainers uses what the next version of a library that it stands on will lack
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder)
    return folder


def loaded(bases: Path, run: Run) -> Any:
    return HEADS[run.head].from_pretrained(bases / run.head, dtype=torch.float32)


def attached(bases: Path, run: Run, seed: int) -> veneer.Handle:
    torch.manual_seed(seed)
    also = ["score"] if run.head == "reward" else []
    return veneer.attach(
        loaded(bases, run), veneer.LoraConfig(rank=16, alpha=16, dropout=0.1, targets=LINEAR, train_also=also)
    )


def wrapped(bases: Path, run: Run) -> Any:
    also = ["score"] if run.head == "reward" else None
    config = peft.LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=LINEAR, modules_to_save=also)
    return peft.get_peft_model(loaded(bases, run), config)


def numbers(handle: veneer.Handle) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in handle.named_parameters()}


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    ids = torch.tensor([row["input_ids"] for row in token_rows(4)])
    return model.eval()(input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {})).logits


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def needs(run: Run) -> None:
    if run.name == "Lightning":
        pytest.importorskip("pytorch_lightning")


class First(NamedTuple):
    """A run that began with a new adapter; tests only read it."""

    run: Run
    handle: veneer.Handle
    before: dict[str, torch.Tensor]
    save: Callable[[Path], None]
    folder: Path


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run.name)
def first(request: pytest.FixtureRequest, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    run, folder = request.param, tmp_path_factory.mktemp("first")
    needs(run)
    handle = attached(bases, run, seed=1)
    before = numbers(handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        save = run.train(handle.model, folder, None)
    return First(run, handle, before, save, folder)


def test_a_run_saves_its_adapter_and_goes_on_from_it_bit_for_bit(first: First, bases: Path, tmp_path: Path):
    run, handle, before, save, folder = first
    after = numbers(handle)
    assert not any(torch.equal(after[name], before[name]) for name in before if name.endswith(".B"))
    save(tmp_path / "saved")

    expected = outputs(handle.model)
    assert not torch.equal(outputs(loaded(bases, run)), expected)
    assert torch.allclose(outputs(HEADS[run.head].from_pretrained(tmp_path / "saved")), expected, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(loaded(bases, run), tmp_path / "saved")
    assert torch.allclose(outputs(theirs), expected, atol=1e-5)
    assert torch.equal(outputs(veneer.load(loaded(bases, run), tmp_path / "saved").model), expected)

    again = attached(bases, run, seed=2)
    run.train(again.model, tmp_path / "again", folder)
    for name, value in numbers(again).items():
        assert torch.equal(value, after[name]), name


def test_a_checkpoint_is_no_larger_than_pefts(first: First, bases: Path, tmp_path: Path):
    run = first.run
    run.train(wrapped(bases, run), tmp_path / "theirs", None)
    for step in (HALF, STEPS):
        ours, theirs = (folder / run.checkpoint.format(step) for folder in (first.folder, tmp_path / "theirs"))
        assert size(ours) <= 1.1 * size(theirs)
        assert run.whole or not list(ours.glob("model*"))
