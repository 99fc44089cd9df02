"""Run independent pieces of work on as many threads as torch may use, each piece on one.

torch splits a single operation over its threads, and waits for all of them after each; a chain of
short operations on a piece that fits into one core's cache is faster with a thread a piece. So each
worker tells torch to use no other threads than itself. Threads that start later begin with the last
such setting made anywhere: so the caller makes its own again as soon as all workers have made
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

Item = TypeVar("Item")
State = TypeVar("State")
Result = TypeVar("Result")


def threads_for(tensor: Tensor, most: int) -> int:
    """How many threads to spread work on ``tensor`` over: on a CPU torch's count, but not more than
    ``most`` (each needs memory, and they share its bandwidth); 0, the caller itself, on another
    device, where one stream is enough."""
    return min(torch.get_num_threads(), most) if tensor.device.type == "cpu" else 0


def spread(
    items: Sequence[Item],
    state: Callable[[], State],
    work: Callable[[Item, State], Result],
    threads: int,
) -> list[Result]:
    """``[work(item, …) for item in items]``, in this order, over so many ``threads``, without
    autograd. The caller does it itself where torch has one thread anyway, or if there is to be
    none.

    ``state`` makes what one thread keeps from piece to piece. The first exception ends all threads
    and is raised.
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
        # the first use in a thread takes over the last setting: so it comes before ours
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        with torch.inference_mode(inference), torch.no_grad():
            thread_state = state()
            for index in order:  # `next` of a count is one step for all threads
                if index >= len(items) or stop.is_set():
                    return
                results[index] = work(items[index], thread_state)

    with ThreadPoolExecutor(threads) as pool:
        try:
            workers = [pool.submit(run) for _ in range(threads)]
            ready.wait()
        except BaseException:
            # the system gives no more threads, or an interrupt: let those that wait go
            ready.abort()
            pool.shutdown()  # before torch's setting is made again, as the last one counts
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
