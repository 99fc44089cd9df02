"""What the processes of a run hear from their launcher: where they meet, and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.launched import train, wait_for_all
from torch._C._distributed_c10d import HashStore, TCPStore
from transformers import TrainerCallback

from veneer.errors import TrainingError
from veneer.train import checkpoint
from veneer.train.processes import fresh_store
from veneer.train.run import fit


def met(store: Any, count: int) -> list[Any]:
    """The stores in which so many processes meet, each a thread here."""
    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(lambda rank: fresh_store(store, rank, count, 20.0), range(count))]


def test_processes_that_are_started_again_meet_among_themselves() -> None:
    store: Any = HashStore()
    for count in (3, 3, 2, 4):  # torchrun starts any number again
        stores = met(store, count)
        assert not any(one.check(["said"]) for one in stores)
        stores[-1].set("said", f"by {count}")
        assert [one.get("said").decode() for one in stores] == [f"by {count}"] * count


def test_nobody_meets_those_that_are_gone() -> None:
    store: Any = HashStore()
    met(store, 2)
    for rank, absent in ((0, "1 of 1 other processes"), (1, "the first process")):
        with pytest.raises(TrainingError, match=absent):
            fresh_store(store, rank, 2, 0.05)


class Signals(TrainerCallback):
    """Sends this process signals within its second step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def test_sigterm_may_come_twice(make: Callable[..., Any]) -> None:
    """Slurm sends it to every process of a job step, and torchrun, which gets it too, to those that
    it started."""
    stopped = fit(
        make("run", save_every=1000),
        callbacks=[Signals(signal.SIGTERM, signal.SIGTERM)],
        quiet=True,
    )
    assert stopped.interrupted
    assert stopped.steps == 2
    assert stopped.checkpoint is not None


def test_ctrl_c_after_that_stops_at_once(make: Callable[..., Any]) -> None:
    config = make("run", save_every=1000)
    with pytest.raises(KeyboardInterrupt):
        fit(config, callbacks=[Signals(signal.SIGTERM, signal.SIGINT)], quiet=True)


def launched(port: int, world: int = 2, **told: str) -> str:
    """Code that sees the environment of a process that torchrun has started, with a store at this
    port."""
    fields = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **told,
    }
    return f"import os\nos.environ.update({fields!r}, RANK=str(rank), LOCAL_RANK=str(rank))\n"


def test_one_process_of_torchrun_is_alone(make: Callable[..., Any], tmp_path: Path) -> None:
    """accelerate would make it a group, and wrap the model into torch's DDP."""
    alone = "import torch.distributed as dist\ndef join(*args, **kwargs):\n    raise RuntimeError('a group of one')\n"
    before = launched(1, world=1) + alone + "dist.init_process_group = join\n"
    config = make("run", max_steps=2, save_every=1000, eval_every=1000)
    wait_for_all(train(config, tmp_path, 1, before=before))


@pytest.mark.slow
def test_processes_whose_launcher_is_gone_end(make: Callable[..., Any], tmp_path: Path) -> None:
    """It would be given again, and start others beside them."""
    gone = "import os\nfrom transformers import Trainer\nstep, parent = Trainer.training_step, os.getppid()\n"
    gone += "def orphaned(self, *args, **kwargs):\n"
    gone += "    os.getppid = lambda: parent if self.state.global_step < 3 else 1\n"
    gone += "    return step(self, *args, **kwargs)\nTrainer.training_step = orphaned\n"
    config = make("run", save_every=1000)
    assert "the launcher of this process is gone" in wait_for_all(
        train(config, tmp_path, 2, before=gone), 1, 2
    )
    assert len(checkpoint.read_log(config.output)) == 3


@pytest.mark.slow
def test_a_run_that_is_finished_is_not_refused_where_a_process_failed_later(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failing = "import veneer.cli.train as command\nleave = command.leave\ndef fails(*args):\n    leave(*args)\n"
    failing += "    if rank == 1:\n        os.kill(os.getpid(), 9)\ncommand.leave = fails\n"
    config = make("run", max_steps=2, save_every=1000, eval_every=1000)
    again = launched(store.port)
    wait_for_all(train(config, tmp_path, 2, before=again + failing), 0, -signal.SIGKILL)
    assert f"The run in {config.output} is finished." in wait_for_all(
        train(config, tmp_path, 2, before=again)
    )
    assert "holds a finished run" in wait_for_all(train(config, tmp_path, 2), 2)
