"""Run independent tasks on as many threads as torch may use, with one torch thread each.

By default, torch splits each operation over its threads and waits for all of them. A chain of short
operations on data that fits into one core's cache is faster if each chunk of data has one thread.
So each worker thread sets torch's number of threads to 1. A new thread inherits the setting that
any thread has made last, so the caller restores its own setting as soon as all workers have made
theirs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from torch import Tensor

Task = TypeVar("Task")
State = TypeVar("State")
Result = TypeVar("Result")


def threads_for(tensor: Tensor, limit: int) -> int:
    """The number of threads for work on ``tensor``. On a CPU this is torch's number, at most
    ``limit``, because each thread needs memory of its own and all share the memory's bandwidth. On
    other devices it is 0, which means the calling thread, because one stream suffices."""
    return min(torch.get_num_threads(), limit) if tensor.device.type == "cpu" else 0


def map_on_threads(
    tasks: Sequence[Task],
    new_state: Callable[[], State],
    work: Callable[[Task, State], Result],
    threads: int,
) -> list[Result]:
    """``[work(task, state) for task in tasks]``, in this order, on ``threads`` threads, without
    autograd. The calling thread does the work if torch has a single thread or ``threads`` is 0.

    ``new_state`` creates the state that one thread uses for all its tasks. The first exception ends
    all threads and is raised.
    """
    threads = min(threads, len(tasks))
    if threads == 0 or torch.get_num_threads() == 1:
        with torch.no_grad():
            thread_state = new_state()
            return [work(task, thread_state) for task in tasks]
    results: dict[int, Result] = {}
    task_indices, stop = itertools.count(), threading.Event()
    all_ready = threading.Barrier(threads + 1)
    is_inference, thread_setting = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def run_worker() -> None:
        # the first call of torch in a thread inherits the last setting, so set it only afterwards
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_ready.wait()
        with torch.inference_mode(is_inference), torch.no_grad():
            thread_state = new_state()
            for index in task_indices:  # threads share it; `next` of a counter is atomic
                if index >= len(tasks) or stop.is_set():
                    return
                results[index] = work(tasks[index], thread_state)

    with ThreadPoolExecutor(threads) as pool:
        try:
            workers = [pool.submit(run_worker) for _ in range(threads)]
            all_ready.wait()
        except BaseException:
            # no more threads in the system, or an interrupt: release the workers that wait
            all_ready.abort()
            pool.shutdown()  # before torch's setting is restored, because the last setting counts
            raise
        finally:
            torch.set_num_threads(thread_setting)
        try:
            for worker in as_completed(workers):
                worker.result()
        except BaseException:
            stop.set()
            raise
    return [results[index] for index in range(len(tasks))]
