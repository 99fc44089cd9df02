"""Run `veneer train` in several processes, with the environment that torchrun gives them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml
from tests.support.forked import LARGE, Program
from torch.distributed import TCPStore

CODE = """
import sys, torch
torch.set_num_threads(1)
{before}
sys.argv = {arguments!r}
from veneer.cli import main
main()
"""


def train(
    config: Any, folder: Path, processes: int, *flags: str, before: str = ""
) -> list[Program]:
    """Start `veneer train` with a configuration. `before`: code that runs first, in which `rank` is
    the rank of the process."""
    file = folder / f"{config.output.name}.yaml"
    file.write_text(yaml.safe_dump(config.content()))
    return start(["train", str(file), *flags], processes, before)


def start(arguments: list[str], processes: int, before: str = "") -> list[Program]:
    return code(CODE.format(arguments=["veneer", *arguments], before=before), processes)


def code(text: str, processes: int) -> list[Program]:
    """Start Python code in each process; in the code, `rank` is the rank of the process."""
    variables: dict[str, str] = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    store: Any = None
    if processes > 1:  # torchrun holds the store that they share, and outlives them
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables |= {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
        }
        variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    programs = []
    for rank in range(processes):
        rank_variables = (
            {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            if processes > 1
            else variables
        )
        programs.append(Program(f"rank = {rank}\n{text}", *LARGE, **rank_variables))
        programs[-1].__dict__["store"] = store
    return programs


def steps(output: Path) -> int:
    """The number of steps in the log of a run."""
    log = output / "log.jsonl"
    return log.read_text().count('"loss"') if log.is_file() else 0


def reach(program: Program, output: Path, step: int, delay: float = 0.0) -> None:
    """Wait until `delay` seconds after the log shows `step` steps. This may be any moment, also
    while a checkpoint is written."""
    Program.until(lambda: steps(output) >= step or not program.alive)
    time.sleep(delay)


def wait_for_all(programs: list[Program], *expected: int) -> str:
    """Wait until all programs have ended; assert that their exit codes are among `expected`
    (default: 0). Returns their output."""
    codes = [program.wait() for program in programs]
    output = "\n".join(f"--- rank {rank}\n{program.said}" for rank, program in enumerate(programs))
    assert {*codes} <= {*(expected or (0,))}, f"exit codes {codes}\n{output}"
    return output
