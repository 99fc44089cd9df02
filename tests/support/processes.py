"""Processes that run functions of the tests, forked from a server that has imported everything: one
costs some milliseconds. ``forked.py`` is for programs, to which it matters what has been
imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
#: not the tests' own files: the server does not know their folder
CONTEXT.set_forkserver_preload(
    [
        "veneer",
        "veneer.store.library",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)

#: what one of several processes does: (rank, a folder that all of them have)
Task = Callable[[int, Path], None]


def together(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in so many processes, which have met (gloo)."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(
        _meet, (work, port, count, arguments), nprocs=count, start_method=CONTEXT.get_start_method()
    )


def _meet(
    rank: int, work: Callable[..., None], port: int, count: int, arguments: Sequence[Any]
) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=120))
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def done_by_two(tasks: Sequence[Task], folder: Path) -> Callable[[Task], Path]:
    """Two processes do the tasks, one after the other, each in a folder of its own, until one
    fails. The function that this returns gives the folder of a task that both have done, and fails
    with what they said of one that they have not."""
    together(_in_turn, 2, tasks, folder)

    def of(task: Task) -> Path:
        for rank in range(2):
            file = folder / f"{task.__name__}-{rank}.txt"
            text = file.read_text() if file.exists() else "not run: see the task before it"
            assert text == "done", f"rank {rank}: {text}"
        return folder / task.__name__

    return of


def _in_turn(rank: int, tasks: Sequence[Task], folder: Path) -> None:
    import torch.distributed as dist

    for task in tasks:
        try:
            task(rank, folder / task.__name__)
            dist.barrier()
        except BaseException:
            (folder / f"{task.__name__}-{rank}.txt").write_text(traceback.format_exc())
            os._exit(0)  # not to wait for the other rank, which may wait for this one
        (folder / f"{task.__name__}-{rank}.txt").write_text("done")
