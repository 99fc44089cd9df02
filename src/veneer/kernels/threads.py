"""Run independent tasks on as many threads as torch may use, with one torch thread each.

By default, torch splits each operation over its threads and waits for all of them. A chain of short
operations on data that fits into one core's cache is faster if each chunk of data has one thread.
So each worker thread calls ``torch.set_num_threads(1)``. A new thread inherits the number that any
thread has set last. The caller therefore sets its own number again as soon as all workers have set
theirs, so that threads that are started later do not inherit 1.
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


def threads_for(tensor: Tensor, max_threads: int) -> int:
    """The number of worker threads for ``map_on_threads`` on the data of ``tensor``. On a CPU, it
    is torch's number of threads, but at most ``max_threads``, because each thread needs buffers of
    its own and all threads share the memory's bandwidth. On other devices it is 0: the calling
    thread does all work, because it can keep the device busy alone."""
    return min(torch.get_num_threads(), max_threads) if tensor.device.type == "cpu" else 0


def map_on_threads(
    tasks: Sequence[Task],
    make_state: Callable[[], State],
    run_task: Callable[[Task, State], Result],
    thread_count: int,
) -> list[Result]:
    """``[run_task(task, state) for task in tasks]``, in this order, without autograd.

    Args:
        make_state: creates the state, such as buffers, that one thread passes to all its tasks.
        thread_count: the number of worker threads. The calling thread runs all tasks if it is 0, or
            if torch has a single thread.

    The first exception of a task is raised here, after all threads have ended.
    """
    thread_count = min(thread_count, len(tasks))
    if thread_count == 0 or torch.get_num_threads() == 1:
        with torch.no_grad():
            thread_state = make_state()
            return [run_task(task, thread_state) for task in tasks]
    results_by_index: dict[int, Result] = {}
    task_indices, stop_event = itertools.count(), threading.Event()
    ready_barrier = threading.Barrier(thread_count + 1)
    is_inference, torch_thread_count = torch.is_inference_mode_enabled(), torch.get_num_threads()

    def run_worker() -> None:
        # The first call of torch in a new thread overwrites the number of threads by the number
        # that any thread has set last, so a first call is made before the number is set.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready_barrier.wait()
        with torch.inference_mode(is_inference), torch.no_grad():
            thread_state = make_state()
            for index in task_indices:  # shared by all threads: `next` of a counter is atomic
                if index >= len(tasks) or stop_event.is_set():
                    return
                results_by_index[index] = run_task(tasks[index], thread_state)

    with ThreadPoolExecutor(thread_count) as pool:
        try:
            workers = [pool.submit(run_worker) for _ in range(thread_count)]
            ready_barrier.wait()
        except BaseException:
            # The system has no more threads, or the user interrupts. Release the workers that wait
            # at the barrier, which would wait for ever.
            ready_barrier.abort()
            pool.shutdown()  # first, so that no worker sets torch's number of threads after us
            raise
        finally:
            torch.set_num_threads(torch_thread_count)
        try:
            for worker in as_completed(workers):
                worker.result()
        except BaseException:
            stop_event.set()
            raise
    return [results_by_index[index] for index in range(len(tasks))]
