"""A run that is stopped or killed and started again ends at the very losses of one that was not."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.support.launched import reach, steps, train, wait_for_all
from tests.support.runs import Crash, same, same_folders
from transformers import TrainerCallback

from veneer.errors import ConfigError, OutputExistsError
from veneer.train import checkpoint
from veneer.train.run import fit
from veneer.train.trainer import AdapterTrainerBase

Make = Callable[..., Any]


class StopAfter(TrainerCallback):
    """Send this process a signal at the end of step `step`, as Ctrl-C would."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


class Count(TrainerCallback):
    """How many steps this session computed."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


# : what decides which row comes next goes on over the end of an epoch; the others need some steps.
# The quick suite takes
#: the first and the fifth
VARIATIONS = {
    "plain": {},
    "accumulation": {"grad_accum": 2, "batch_size": 3, "epochs": 2},
    "bf16": {"precision": "bf16", "epochs": 1},
    "checkpointing": {"activation_checkpointing": True, "epochs": 1},
    "grouped": {"group_by_length": True, "epochs": 2},
    "packing": {"packing": True, "max_length": 64, "batch_size": 1, "epochs": 2},
    "rslora-train-also": {"variant": "rslora", "train_also": ["norm"], "epochs": 1},
    "no-shuffle-of-state": {"optimiser": "adafactor", "epochs": 1},
    "loha": {"variant": "loha", "epochs": 1},
}


@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS.keys())
def test_a_crash_and_a_resume_change_nothing(make: Make, changes: dict[str, Any]) -> None:
    whole = fit(make("whole", **changes), quiet=True)
    assert len(whole.losses) >= 6
    config = make("broken", **{"save_every": 2, **changes})
    for step in (4, len(whole.losses) - 1):
        with pytest.raises(ZeroDivisionError):
            fit(config, callbacks=[Crash(step)], quiet=True)
    same(fit(config, quiet=True), whole)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(9, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(9, signal.SIGTERM, marks=pytest.mark.slow),
        (13, signal.SIGINT),
        pytest.param(13, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_checkpoint_of_that_very_step(
    make: Make, whole: Any, step: int, number: int
) -> None:
    stopped = fit(make("stopped"), callbacks=[StopAfter(step, number)], quiet=True)
    assert stopped.interrupted
    assert stopped.steps == step
    assert stopped.losses == whole.losses[:step]
    assert checkpoint.read_json(stopped.output / "run.json")["status"] == "interrupted"
    assert (stopped.adapter / "adapter_model.safetensors").is_file()
    same(fit(make("stopped"), quiet=True), whole)


def set_evaluation_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Replace the loss of the evaluation at each step."""
    evaluation_loop = AdapterTrainerBase.evaluation_loop

    def replace_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[self.state.global_step]
        return output

    monkeypatch.setattr(AdapterTrainerBase, "evaluation_loop", replace_loss)


def must_hold_adapter_of_step(run: Any, step: int) -> None:
    """Assert that the adapter of a run is that of its checkpoint of `step`."""
    kept, saved = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (checkpoint.path_of(run.output, step), run.output)
    )
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[key], saved[key]) for key in kept)


def test_the_best_evaluation_is_saved_between_two_checkpoints(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_evaluation_losses(monkeypatch, {2: 1.0, 4: 2.0, 6: 3.0})
    run = fit(make(early_stopping=2, eval_every=2, save_every=4, epochs=1), quiet=True)
    assert run.steps == 6
    must_hold_adapter_of_step(run, 2)


def test_a_stopped_run_keeps_the_newest_checkpoint_beside_the_best(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_evaluation_losses(monkeypatch, {2: 1.0, 4: 2.0})
    config = make(early_stopping=9, eval_every=2, save_every=2, keep_checkpoints=1, epochs=1)
    stopped = fit(config, callbacks=[StopAfter(5)], quiet=True)
    assert stopped.interrupted
    assert stopped.adapter == checkpoint.path_of(config.output, 5) / "adapter"
    assert {path.name for path in config.output.glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-5",
    }


def test_the_best_is_loaded_after_the_output_folder_moved(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_evaluation_losses(monkeypatch, {2: 1.0, 4: 2.0, 6: 3.0})
    changes = {"early_stopping": 2, "eval_every": 2, "save_every": 4, "epochs": 1}
    config = make("before", **changes)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(5)], quiet=True)
    moved = make("after", **changes)
    config.output.rename(moved.output)
    run = fit(moved, quiet=True)
    assert run.steps == 6
    must_hold_adapter_of_step(run, 2)


def test_a_resumed_run_saves_as_often_as_it_is_told_now(make: Make) -> None:
    stopped = fit(make("run", save_every=1000), callbacks=[StopAfter(3)], quiet=True)
    assert stopped.steps == 3
    config = make("run", save_every=2)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(9)], quiet=True)
    newest = checkpoint.newest(config.output)
    assert newest is not None
    assert newest[1] == 8


def test_early_stopping_survives_a_resume_and_keeps_the_best(make: Make) -> None:
    changes = {
        "early_stopping": 2,
        "eval_every": 2,
        "save_every": 2,
        "learning_rate": 0.3,
        "epochs": 6,
    }
    whole = fit(make("whole", **changes), quiet=True)
    assert len(whole.losses) < 54, (
        "the learning rate is meant to be so high that the evaluation gets worse"
    )
    config = make("broken", **changes)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(5)], quiet=True)
    again = fit(config, quiet=True)
    same(again, whole)
    best = min(whole.eval_losses, key=lambda pair: pair[1])[0]
    must_hold_adapter_of_step(whole, best)


def test_a_half_written_checkpoint_is_never_resumed(make: Make, whole: Any) -> None:
    config = make("broken")
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(7)], quiet=True)
    half = config.output / ".checkpoint-6.abc.tmp"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    with (config.output / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')  # the line that a power cut tore
    same(fit(config, quiet=True), whole)
    assert not half.exists()


def remove_end(output: Path) -> None:
    """Leave the files of a run that was killed after its last checkpoint and before its adapter was
    written."""
    shutil.rmtree(output / "adapter")
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**run, "status": "running"}))


def test_the_end_is_not_trained_twice(make: Make, whole: Any) -> None:
    remove_end(fit(make("late"), quiet=True).output)
    same(fit(make("late"), quiet=True), whole)


@pytest.mark.parametrize("patience", [1, 5])
def test_a_run_that_was_killed_before_its_end_delivers_the_best(
    make: Make, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """Also of a run that had stopped early, which trains no further."""
    set_evaluation_losses(monkeypatch, {3: 1.0, 6: 2.0, 9: 3.0})
    config = make(early_stopping=patience, eval_every=3, save_every=3, epochs=1)
    ended = fit(config, quiet=True)
    remove_end(config.output)
    same(fit(config, quiet=True), ended)
    must_hold_adapter_of_step(ended, 3)


def test_rotation_keeps_what_it_should(make: Make) -> None:
    config = make("run", save_every=2, keep_checkpoints=3, epochs=1)
    fit(config, quiet=True)
    steps = sorted(int(path.name.split("-")[1]) for path in config.output.glob("checkpoint-*"))
    assert steps == [6, 8, 9]
    assert not list(config.output.glob(".*"))


def test_checkpoints_hold_the_adapter_and_not_the_base(whole: Any) -> None:
    names = {
        path.name for path in checkpoint.path_of(whole.output, 27).rglob("*") if path.is_file()
    }
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "veneer.json", "README.md", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "trainer_state.json",
    }  # fmt: skip


def test_another_configuration_or_other_data_is_not_resumed(make: Make, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    shutil.copy(make().data, data)
    with pytest.raises(ZeroDivisionError):
        fit(make("run", data=str(data)), callbacks=[Crash(7)], quiet=True)
    with pytest.raises(ConfigError, match="rank: was 4, is 8"):
        fit(make("run", data=str(data), rank=8), quiet=True)
    with pytest.raises(OutputExistsError, match="unfinished run"):
        fit(make("run", data=str(data), resume=False), quiet=True)
    with data.open("a") as file:
        file.write('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    with pytest.raises(ConfigError, match="the data have changed"):
        fit(make("run", data=str(data)), quiet=True)
    assert fit(make("run", data=str(data), overwrite=True), quiet=True).steps > 0


def test_a_run_that_began_before_a_setting_existed_had_its_default(make: Make, whole: Any) -> None:
    config = make("older")
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(7)], quiet=True)
    record = config.output / "run.json"
    run = json.loads(record.read_text())
    lacking = {"task", "columns", "dropout", "early_stopping", "reward"}
    older = {name: value for name, value in run["config"].items() if name not in lacking}
    record.write_text(json.dumps({**run, "config": older}))
    with pytest.raises(
        ConfigError, match=r"another configuration\.\n  dropout: was 0\.0, is 0\.1\nExpected"
    ):
        fit(config, quiet=True)
    record.write_text(json.dumps({**run, "config": {**older, "dropout": 0.1}}))
    same(fit(config, quiet=True), whole)


def test_a_run_that_began_before_rows_came_by_chance_keeps_its_order(make: Make) -> None:
    config = make("older", group_by_length=True)
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(7)], quiet=True)
    record = config.output / "run.json"
    run = json.loads(record.read_text())
    del run["config"]["group_by_length"]
    record.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="group_by_length: was True, is False"):
        fit(make("older"), quiet=True)
    same(fit(config, quiet=True), fit(make("whole-grouped", group_by_length=True), quiet=True))


def test_overwrite_resumes_what_can_be_resumed(make: Make, whole: Any) -> None:
    """So that the same command, given again after a kill, goes on rather than starting over."""
    with pytest.raises(ZeroDivisionError):
        fit(make("run", overwrite=True), callbacks=[Crash(12)], quiet=True)
    again = fit(make("run", overwrite=True), quiet=True, callbacks=[counter := Count()])
    same(again, whole)
    assert counter.steps == len(whole.losses) - 10
    with pytest.raises(ZeroDivisionError):
        fit(make("new"), callbacks=[Crash(12)], quiet=True)
    same(
        fit(make("new", overwrite=True, resume=False), quiet=True, callbacks=[counter := Count()]),
        whole,
    )
    assert counter.steps == len(whole.losses)


def test_a_kill_while_a_run_is_removed_leaves_none(
    make: Make, whole: Any, monkeypatch: Any
) -> None:
    """Neither a finished one that lacks its adapter, nor an unfinished one with half of a
    checkpoint."""

    def dies(*paths: Path) -> None:
        for path in paths:
            for file in [*path.rglob("*.safetensors")]:
                file.unlink()
        raise ZeroDivisionError

    fit(make("finished", epochs=1), quiet=True)
    with pytest.raises(ZeroDivisionError):
        fit(make("unfinished", rank=2), callbacks=[Crash(12)], quiet=True)
    for name in ("finished", "unfinished"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(checkpoint, "remove", dies)
            fit(make(name, overwrite=True), quiet=True)
        with pytest.raises(ConfigError, match="no run in"):
            fit(make(name, resume=True), quiet=True)
        same(fit(make(name), quiet=True), whole)


def test_a_finished_run_is_not_overwritten_unasked(make: Make) -> None:
    first = fit(make("run", epochs=1), quiet=True)
    with pytest.raises(OutputExistsError, match="finished run"):
        fit(make("run", epochs=1), quiet=True)
    same(fit(make("run", epochs=1, overwrite=True), quiet=True), first)
    with pytest.raises(ConfigError, match="resume"):
        fit(make("new", resume=True), quiet=True)


# ---------------------------------------------------------------------------------------------- a
# process, killed


def killed_run(make: Make, folder: Path, kills: int, seed: int, epochs: int) -> None:
    """Killed so often at random moments of a run of 9 steps an epoch, of which the last ten are
    left to it."""
    changes = {"epochs": epochs, "save_every": 7, "eval_every": 50, "max_length": 64}
    end = 9 * epochs - 10
    torch.set_num_threads(1)  # as the processes have: another number may round another way
    whole = fit(make("whole", **changes), quiet=True)
    config, moments = make("killed", **changes), random.Random(seed)
    for number in range(kills):
        (process,) = train(config, folder, 1)
        step = min(steps(config.output) + moments.randint(1, (end - 8) // kills), end)
        reach(process, config.output, step, moments.random() * 0.03)
        process.kill()
        process.wait()
        if checkpoint.read_json(config.output / "run.json")["status"] == "finished":
            pytest.fail(f"kill {number + 1} came after the end")
        newest = checkpoint.newest(config.output)
        assert steps(config.output) - (newest[1] if newest else 0) <= 7 + 1, (
            "more was lost than the steps since the checkpoint"
        )
    wait_for_all(train(config, folder, 1))
    same_folders(config.output, whole.output)


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_at_two_moments(make: Make, tmp_path: Path) -> None:
    killed_run(make, tmp_path, kills=2, seed=1, epochs=6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_at_ten_moments(make: Make, tmp_path: Path) -> None:
    killed_run(make, tmp_path, kills=10, seed=int(time.time()), epochs=30)


def test_ctrl_c_on_the_command_line(make: Make, tmp_path: Path) -> None:
    config = make("run", epochs=100, save_every=1000, eval_every=1000)
    (process,) = train(config, tmp_path, 1)
    reach(process, config.output, 3)
    process.kill(signal.SIGINT)
    assert process.wait() == 130, process.said
    assert "To go on:  veneer train" in process.said
    assert "Traceback" not in process.said
    assert checkpoint.newest(config.output) is not None


def test_a_resume_says_which_versions_differ(make: Make) -> None:
    """A library that rounds otherwise gives other losses than a run that was not interrupted."""
    said = []
    for recorded in ({}, {"torch": "2.0.0", "veneer": "0.0.1"}):
        with pytest.raises(ZeroDivisionError):
            fit(
                make("run", save_every=2, overwrite=True, resume=False),
                callbacks=[Crash(5)],
                quiet=True,
            )
        record = checkpoint.read_json(make("run").output / checkpoint.RUN)
        assert {"veneer", "torch", "transformers"} <= record["versions"].keys()
        checkpoint.write_json(
            make("run").output / checkpoint.RUN,
            {**record, "versions": {**record["versions"], **recorded}},
        )
        shown = io.StringIO()
        fit(make("run", save_every=2), console=Console(file=shown, width=200))
        said.append(shown.getvalue())
    assert all("Resuming from step 4" in text for text in said)
    assert "Versions" not in said[0]
    assert f"veneer 0.0.1, now {version('veneer')}; torch 2.0.0, now {version('torch')}" in said[1]
