"""torchrun itself: it is told to end, a process of it dies, a machine is lost and replaced,
machines come and go. Two machines are two torchruns here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tests.support.forked import Program
from tests.support.launched import steps, train, wait_for_all
from tests.support.runs import same_folders
from tests.train.test_distributed import equals

from veneer.train import checkpoint

Make = Callable[..., Any]
Start = Callable[..., subprocess.Popen[bytes]]
pytestmark = pytest.mark.slow

CHANGES = {"epochs": 10, "batch_size": 12, "save_every": 5, "eval_every": 100}
#: as docs/distributed.md asks for where machines may be replaced
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# : where a machine is expected to come (its output is named so), the other one waits for it before
# its eleventh step
PROGRAM = """
import time
from transformers import Trainer
from veneer.cli import main
step = Trainer.training_step
def waiting(self, *args, **kwargs):
    alone = self.processes.count == 1 and self.args.output_dir.endswith("grows")
    while alone and self.state.global_step == 10 and not self.stop.requested:
        time.sleep(0.05)
    return step(self, *args, **kwargs)
Trainer.training_step = waiting
main()
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """`torchrun(config, "a", nodes="2", processes=1)`: one, whose output is in a.log. All meet at
    one port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:

        def start(
            config: Any, name: str, nodes: str, processes: int, **environment: str
        ) -> subprocess.Popen[bytes]:
            file = tmp_path / f"{name}.yaml"
            file.write_text(yaml.safe_dump(config.content()))
            line = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "torch.distributed.run",
                "--nnodes",
                nodes,
            ]
            line += [
                "--nproc-per-node",
                str(processes),
                "--max-restarts",
                "3",
                "--rdzv-backend",
                "c10d",
            ]
            line += [
                "--rdzv-endpoint",
                f"127.0.0.1:{port}",
                "--rdzv-id",
                "test",
                "--rdzv-conf",
                "last_call_timeout=2",
            ]
            told = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            program = tmp_path / "program.py"
            program.write_text(PROGRAM)
            line += [str(program), "train", str(file)]
            return stack.enter_context(
                ending(subprocess.Popen(line, env=told, stdout=log, stderr=log))
            )

        yield start


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        lose(process)


def lose(process: subprocess.Popen[bytes]) -> None:
    """As a machine is lost: torchrun and its processes at once."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *children):
            one.kill()
        process.wait()


def reach(config: Any, step: int, *running: subprocess.Popen[bytes]) -> None:
    Program.until(
        lambda: steps(config.output) >= step or any(one.poll() is not None for one in running), 250
    )
    assert all(one.poll() is None for one in running)


def undisturbed(config: Any, folder: Path) -> Path:
    wait_for_all(train(config, folder, 2))
    return config.output


def test_told_to_end(make: Make, tmp_path: Path, torchrun: Start) -> None:
    """With a checkpoint of that very step; and the same command goes on."""
    config = make("run", **CHANGES)
    first = torchrun(config, "first", "1", 2)
    reach(config, 7, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(100) != 0
    newest = checkpoint.newest(config.output)
    assert newest is not None
    assert newest[1] == steps(config.output)
    assert checkpoint.read_json(config.output / "run.json")["status"] == "interrupted"
    assert torchrun(config, "second", "1", 2).wait(250) == 0
    same_folders(config.output, undisturbed(make("whole", **CHANGES), tmp_path))


def test_a_process_of_one_machine_dies(make: Make, tmp_path: Path, torchrun: Start) -> None:
    """Twice; each machine counts the restarts of its own processes."""
    config = make("run", **CHANGES)
    machines = [torchrun(config, name, "2", 1) for name in ("a", "b")]
    for step, machine in ((8, 1), (18, 0)):
        reach(config, step, *machines)
        psutil.Process(machines[machine].pid).children()[0].kill()
        assert steps(config.output) < 30
    assert [machine.wait(250) for machine in machines] == [0, 0]
    same_folders(config.output, undisturbed(make("whole", **CHANGES), tmp_path))


def test_a_machine_is_replaced(make: Make, tmp_path: Path, torchrun: Start) -> None:
    """Not the one at which they meet: with that one all are lost, and the command is given
    again."""
    config = make("run", **CHANGES)
    stays = torchrun(config, "stays", "2", 1, **OWN_STORE)
    Program.until(lambda: listens(stays), 100)
    lost = torchrun(config, "lost", "2", 1, **OWN_STORE)
    reach(config, 8, stays, lost)
    lose(lost)
    new = torchrun(config, "new", "2", 1, **OWN_STORE)
    assert [stays.wait(250), new.wait(250)] == [0, 0]
    same_folders(config.output, undisturbed(make("whole", **CHANGES), tmp_path))


def listens(process: subprocess.Popen[bytes]) -> bool:
    return any(
        one.status == psutil.CONN_LISTEN for one in psutil.Process(process.pid).net_connections()
    )


def test_machines_come_and_go(make: Make, tmp_path: Path, torchrun: Start) -> None:
    """1 → 2 → 1, with --nnodes 1:2."""
    changes = {**CHANGES, "dropout": 0.0}
    config = make("grows", **changes)
    stays = torchrun(config, "stays", "1:2", 1, **OWN_STORE)
    reach(config, 10, stays)
    comes = torchrun(config, "comes", "1:2", 1, **OWN_STORE)
    reach(config, 18, stays, comes)
    lose(comes)
    assert stays.wait(250) == 0
    log = (tmp_path / "stays.log").read_text()
    assert "in each of 2 processes" in log
    assert log.count("Resuming from step") == 2
    equals(config.output, undisturbed(make("whole", **changes), tmp_path))
