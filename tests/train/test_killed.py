"""A process of several is killed: at any moment of a step, and within a checkpoint. Twenty runs,
each of which ends as the one that nothing disturbed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.forked import Program
from tests.support.launched import steps, train, wait_for_all
from tests.support.runs import same_folders
from tests.train.conftest import config_of

from veneer.adapter_files import folder as adapter_folder
from veneer.train import checkpoint

#: with dropout, whose random state each process has for itself; 24 steps
CHANGES = {"epochs": 8, "batch_size": 12, "save_every": 4, "eval_every": 50}
END = 24
#: a checkpoint takes long enough to be killed in any part of it
SLOWLY = """
import time
from transformers import Trainer
for name in ("_save_optimizer_and_scheduler", "_save_rng_state"):
    def slowly(self, folder, save=getattr(Trainer, name)):
        time.sleep(0.03)
        save(self, folder)
        time.sleep(0.03)
    setattr(Trainer, name, slowly)
"""


@pytest.fixture(scope="module")
def undisturbed(
    base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """The output of a run of so many processes that nothing disturbs."""
    outputs: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in outputs:
            folder = tmp_path_factory.mktemp("undisturbed")
            wait_for_all(train(config_of(base, rows, folder / "run", **CHANGES), folder, processes))
            outputs[processes] = folder / "run"
        return outputs[processes]

    return run


def saves(output: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(output.glob(".checkpoint-*.tmp"))


def kill(programs: list[Program], when: Callable[[], bool], delay: float, victim: Program) -> None:
    """Kill one `delay` seconds after `when`; then the others end, as torchrun ends them."""
    Program.until(lambda: when() or not all(program.alive for program in programs), 200)
    assert all(program.alive for program in programs), "".join(program.said for program in programs)
    time.sleep(delay)
    victim.kill()
    victim.wait()
    for number, patience in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 60.0)):
        for program in programs:
            program.kill(number)
        end = time.monotonic() + patience
        while any(program.alive for program in programs) and time.monotonic() < end:
            time.sleep(0.01)
    wait_for_all(programs, 1, 2, 130, -signal.SIGTERM, -signal.SIGKILL)


def must_be_whole(output: Path, processes: int) -> int:
    """The step of the newest checkpoint. Each has all that a run goes on with, or is not there."""
    for folder in output.glob("checkpoint-*"):
        assert adapter_folder.read(folder / checkpoint.ADAPTER).low
        assert torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert torch.load(folder / "scheduler.pt", weights_only=True)["last_epoch"] == int(
            folder.name.split("-")[1]
        )
        assert {file.name for file in folder.glob("rng*")} == {
            f"rng_state_{rank}.pth" for rank in range(processes)
        }
        assert checkpoint.read_json(folder / checkpoint.STATE)["global_step"] == int(
            folder.name.split("-")[1]
        )
    newest = checkpoint.newest(output)
    return newest[1] if newest else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_whose_processes_are_killed_ends_as_if_they_were_not(
    base: Path, rows: Path, tmp_path: Path, undisturbed: Callable[[int], Path], seed: int
) -> None:
    moments = random.Random(seed)
    processes = moments.choice((2, 2, 2, 3))
    config = config_of(base, rows, tmp_path / "run", **CHANGES)
    output = config.output

    programs = train(config, tmp_path, processes, before=SLOWLY)
    step = moments.randint(1, END // 2)
    kill(programs, lambda: steps(output) >= step, moments.random() * 0.03, moments.choice(programs))
    first = must_be_whole(output, processes)
    assert steps(output) - first <= CHANGES["save_every"] + 1

    programs = train(config, tmp_path, processes, before=SLOWLY)
    saved = moments.randrange(first + CHANGES["save_every"], END + 1, CHANGES["save_every"])
    moment, victim = (
        moments.random() * (0.1 if saved == END else 0.2),
        moments.choice(programs),
    )  # or just after it
    kill(programs, lambda: steps(output) >= saved and saves(output), moment, victim)
    second = must_be_whole(output, processes)
    assert second in (saved - CHANGES["save_every"], saved), "neither the old one nor the new one"
    print(
        f"seed {seed}: {processes} processes, at step {step}, then within {saved}: {second} is there"
    )

    said = wait_for_all(train(config, tmp_path, processes))
    assert f"Resuming from step {second} " in said if second else "Resuming" not in said
    assert not saves(output)
    same_folders(output, undisturbed(processes))
