"""Run independent work on as many threads as torch may use, with one torch thread each.

torch splits each operation over its threads and waits for all of them. A chain of short operations
on data that fits into one core's cache is faster with one thread per chunk of data. So each worker
sets torch to a single thread. New threads inherit the last such setting made by any thread, so the
caller restores its own setting as soon as all workers have made theirs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
State = TypeVar("State")
Result = TypeVar("Result")


def threads_for(tensor: Tensor, most: int) -> int:
    """The number of threads for work on ``tensor``: on a CPU torch's count, at most ``most`` (each
    needs memory, and they share its bandwidth); on another device 0, which means the calling
    thread, because one stream suffices."""
    return min(torch.get_num_threads(), most) if tensor.device.type == "cpu" else 0


def spread(
    items: Sequence[Item],
    state: Callable[[], State],
    work: Callable[[Item, State], Result],
    threads: int,
) -> list[Result]:
    """``[work(item, …) for item in items]``, in this order, on ``threads`` threads, without
    autograd. The calling thread does the work itself if torch has a single thread or ``threads`` is
    0.

    ``state`` creates the object that one thread keeps for all its items. The first exception ends
    all threads and is raised.
    """
    threads = min(threads, len(items))
    if threads == 0 or torch.get_num_threads() == 1:
        with torch.no_grad():
            thread_state = state()
            return [work(item, thread_state) for item in items]
    results: dict[int, Result] = {}
    order, ready, stop = itertools.count(), threading.Barrier(threads + 1), threading.Event()
    inference, before = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def run() -> None:
        # the first call in a thread inherits the last setting, so it must precede ours
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        with torch.inference_mode(inference), torch.no_grad():
            thread_state = state()
            for index in order:  # `next` of a counter is atomic for all threads
                if index >= len(items) or stop.is_set():
                    return
                results[index] = work(items[index], thread_state)

    with ThreadPoolExecutor(threads) as pool:
        try:
            workers = [pool.submit(run) for _ in range(threads)]
            ready.wait()
        except BaseException:
            # the system has no more threads, or an interrupt: release the threads that wait
            ready.abort()
            pool.shutdown()  # before torch's setting is restored, because the last setting counts
            raise
        finally:
            torch.set_num_threads(before)
        try:
            for worker in as_completed(workers):
                worker.result()
        except BaseException:
            stop.set()
            raise
    return [results[index] for index in range(len(items))]
