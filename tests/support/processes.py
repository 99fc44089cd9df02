"""Run functions of the tests in processes that are forked from a server that has imported the large
libraries, so that a process starts in milliseconds. ``forked.py`` runs programs instead, for tests
that depend on what has been imported."""

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
#: without the files of the tests, because the server does not know their folder
CONTEXT.set_forkserver_preload(
    [
        "veneer",
        "veneer.store.library",
        "torch.distributed.fsdp",
        "transformers.models.llama.modeling_llama",
    ]
)

#: a function that each of several processes calls with (rank, a folder that all share)
Task = Callable[[int, Path], None]


def together(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `count` processes that form a process group (gloo)."""
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
    """Run tasks one after the other in two processes, each task in a folder of its own, until one
    fails. Returns a function: for a task that both processes have completed, it returns the folder;
    for another task, it fails with the error of the processes."""
    together(_in_turn, 2, tasks, folder)

    def folder_of(task: Task) -> Path:
        for rank in range(2):
            file = folder / f"{task.__name__}-{rank}.txt"
            text = file.read_text() if file.exists() else "not run: see the task before it"
            assert text == "done", f"rank {rank}: {text}"
        return folder / task.__name__

    return folder_of


def _in_turn(rank: int, tasks: Sequence[Task], folder: Path) -> None:
    import torch.distributed as dist

    for task in tasks:
        try:
            task(rank, folder / task.__name__)
            dist.barrier()
        except BaseException:
            (folder / f"{task.__name__}-{rank}.txt").write_text(traceback.format_exc())
            os._exit(0)  # without waiting for the other rank, which may wait for this one
        (folder / f"{task.__name__}-{rank}.txt").write_text("done")
