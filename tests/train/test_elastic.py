"""A process of several that is killed at any moment: the others end, and the same command ends at
the same losses."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.launched import reach, steps, train, wait_for_all
from tests.support.runs import same_folders

from veneer.train import checkpoint

Make = Callable[..., Any]

#: with dropout, whose random state each process has for itself
CHANGES = {"eval_every": 50, "save_every": 5, "epochs": 6, "batch_size": 8}


def killed_run(config: Any, folder: Path, processes: int, kills: int, seed: int) -> None:
    """`kills` times a random process dies at a random moment, also within a checkpoint; then the
    run is left alone."""
    moments, end = random.Random(seed), 30
    for _ in range(kills):
        programs = train(config, folder, processes)
        last = steps(config.output)
        target = last + moments.randint(1, max(1, (end - last) // 2))
        reach(programs[0], config.output, target, moments.random() * 0.03)
        moments.choice(programs).kill()
        said = wait_for_all(programs, 1, 2, -signal.SIGKILL)
        newest = checkpoint.newest(config.output)
        assert steps(config.output) - (newest[1] if newest else 0) <= 5 + 1, (
            f"more was lost than since it\n{said}"
        )
    wait_for_all(train(config, folder, processes))


@pytest.mark.parametrize(
    ("parallel", "kills"),
    [
        ("ddp", 1),
        pytest.param("ddp", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
    ],
)
def test_a_process_is_killed(make: Make, tmp_path: Path, parallel: str, kills: int) -> None:
    whole, config = (make(name, **CHANGES, parallel=parallel) for name in ("whole", "killed"))
    wait_for_all(train(whole, tmp_path, 2))
    killed_run(config, tmp_path, processes=2, kills=kills, seed=4)
    same_folders(config.output, whole.output)


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(make: Make, tmp_path: Path) -> None:
    whole, config = (make(name, **CHANGES) for name in ("whole", "killed"))
    wait_for_all(train(whole, tmp_path, 2))
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(config.content()))
    dies = tmp_path / "dies.py"
    dies.write_text(
        "import os, signal, torch\nfrom transformers import Trainer\ntorch.set_num_threads(1)\n"
        "step = Trainer.training_step\n"
        "def dying(self, *args, **kwargs):\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':\n"
        "        if self.state.global_step == 13:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.training_step = dying\n"
        "from veneer.cli import main\nmain()\n"
    )
    line = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line += ["--standalone", "--max-restarts", "2", str(dies), "train", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Resuming from step 10" in done.stderr
    same_folders(config.output, whole.output)
