"""Let long Python loops in one thread pause while another thread computes.

Because of the GIL, a thread that prepares an adapter for tens of milliseconds delays the next step
of a computing thread by about as long. With pauses, it delays many steps by a little each instead.
Rejected: also giving the preparing thread the lowest priority. That delayed the computing threads
more, because the preparing thread holds the GIL while it waits for a core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: seconds of a slice of work, and of the pause after it
SLICE_SECONDS, PAUSE_SECONDS = 0.001, 0.012

#: for each thread that called ``throttle_loads``: the argument ``is_busy`` of that call, and
#: ``slice_start``, the thread's CPU time in seconds at which its slice of work began
_THREAD = threading.local()


def throttle_loads(is_busy: Callable[[], bool]) -> None:
    """From now on, let ``throttle`` pause this thread after each slice of work at whose end
    ``is_busy()`` returns True, which means that another thread computes."""
    _THREAD.is_busy, _THREAD.slice_start = is_busy, time.thread_time()


def is_throttled() -> bool:
    """Return whether this thread called ``throttle_loads``."""
    return getattr(_THREAD, "is_busy", None) is not None


def throttle(items: Iterable[Item]) -> Iterator[Item]:
    """Yield ``items``. In a thread that called ``throttle_loads``, pause after each
    ``SLICE_SECONDS`` of CPU time at whose end another thread computes."""
    for item in items:
        if is_throttled() and time.thread_time() - _THREAD.slice_start > SLICE_SECONDS:
            if _THREAD.is_busy():
                time.sleep(PAUSE_SECONDS)
            _THREAD.slice_start = time.thread_time()
        yield item
