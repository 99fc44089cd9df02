"""What the processes of a run hear from their launcher: where they meet, and signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from transformers import TrainerCallback

from veneer.errors import TrainingError
from veneer.train.processes import meeting
from veneer.train.run import fit


def met(store: Any, count: int) -> list[Any]:
    """The stores in which so many processes meet, each a thread here."""
    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(lambda rank: meeting(store, rank, count, 20.0), range(count))]


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
            meeting(store, rank, 2, 0.05)


class Signals(TrainerCallback):
    """Sends this process signals within its second step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def test_sigterm_may_come_twice(make: Callable[..., Any]) -> None:
    """Slurm sends it to every process of a job step, and torchrun, which gets it too, to those that it started."""
    stopped = fit(make("run", save_every=1000), callbacks=[Signals(signal.SIGTERM, signal.SIGTERM)], quiet=True)
    assert stopped.interrupted
    assert stopped.steps == 2
    assert stopped.checkpoint is not None


def test_ctrl_c_after_that_stops_at_once(make: Callable[..., Any]) -> None:
    config = make("run", save_every=1000)
    with pytest.raises(KeyboardInterrupt):
        fit(config, callbacks=[Signals(signal.SIGTERM, signal.SIGINT)], quiet=True)
