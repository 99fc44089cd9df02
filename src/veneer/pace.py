"""Long Python work beside somebody who must not wait for it: loops that pause, if their thread was told to give way.

Python runs one thread at a time. Whoever prepares an adapter for tens of milliseconds while another thread computes
takes about as much from its next step, whatever the system's scheduler does. In slices it takes a little from each of
many steps.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: seconds of work, and of the pause behind it
SLICE, PAUSE = 0.001, 0.008

_THREAD = threading.local()


def give_way(busy: Callable[[], bool]) -> None:
    """From now on this thread has the time that others leave, and pauses in ``paced`` loops while ``busy()``. Where the
    system's scheduler does not know a single thread, it has its share of the cores."""
    _THREAD.busy, _THREAD.since = busy, time.thread_time()
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def paced(items: Iterable[Item]) -> Iterable[Item]:
    """``items``; with pauses between them in a thread that gives way."""
    return items if getattr(_THREAD, "busy", None) is None else _paced(items)


def _paced(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        if time.thread_time() - _THREAD.since > SLICE:
            if _THREAD.busy():
                time.sleep(PAUSE)
            _THREAD.since = time.thread_time()
        yield item
