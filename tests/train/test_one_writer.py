"""One run at a time writes to an output folder; another one is told which process has it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.runs import Crash, same
from transformers import TrainerCallback

from veneer.errors import OutputExistsError
from veneer.fileio.atomic import new_folder
from veneer.fileio.locks import HOLDER_SUFFIX
from veneer.train import checkpoint
from veneer.train.dry_run import dry_run
from veneer.train.processes import Processes
from veneer.train.run import fit
from veneer.train.sweep.sweep_run import sweep
from veneer.train.sweep.sweep_settings import make_sweep

Make = Callable[..., Any]


class AtStep(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self.step, self.call, self.called = step, call, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.call()
            self.called = True


@pytest.mark.parametrize("other", ["train", "train over it", "sweep"])
def test_a_second_run_on_one_output_is_refused_and_the_first_goes_on(
    make: Make, whole: Any, other: str
) -> None:
    config = make("run")
    words = rf"another process \({os.getpid()} on .*\), which writes its run to .*run"

    def start() -> None:
        with pytest.raises(OutputExistsError, match=words):
            if other == "sweep":
                sweep(config, make_sweep({"axes": {"rank": [1, 2]}}), quiet=True)
            else:
                fit(make("run", overwrite=other != "train"), quiet=True)

    at = AtStep(7, start)
    first = fit(config, callbacks=[at], quiet=True)
    assert at.called
    same(first, whole)
    assert not list(config.output.glob(".*")), "no litter"


def test_a_temporary_folder_of_a_living_process_stays(make: Make, whole: Any) -> None:
    """Another program may write a folder in the output of a run that is started again."""
    config = make("run")
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(7)], quiet=True)
    with new_folder(config.output / "mine") as folder:
        (folder / "notes").write_text("mine")
        same(fit(config, quiet=True), whole)
        assert (folder / "notes").read_text() == "mine"
    assert (config.output / "mine" / "notes").read_text() == "mine"


def test_the_lock_of_a_process_that_died_holds_nobody_up(make: Make, whole: Any) -> None:
    config = make("run")
    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=[Crash(7)], quiet=True)
    for name in (checkpoint.LOCK, checkpoint.LOCK + HOLDER_SUFFIX):
        (config.output / name).write_text("process 1 on elsewhere")
    same(fit(config, quiet=True), whole)


def test_a_run_that_cannot_begin_leaves_no_folder(make: Make, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no-such-file"):
        fit(make("run", data=str(tmp_path / "no-such-file.jsonl")), quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_a_run_would_do_can_be_asked_while_another_runs(make: Make) -> None:
    config = make("run")
    with checkpoint.only_writer(config.output, Processes()):
        dry_run(config, console=Console(quiet=True))
