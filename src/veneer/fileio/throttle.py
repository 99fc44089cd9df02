"""Long Python loops that pause while another thread computes.

Because of the GIL, preparing an adapter for tens of milliseconds delays the next step of a
computing thread by about as much. With pauses, the work delays each of many steps a little.
Rejected: also giving the loading thread the lowest priority. That delayed the other threads more,
because the thread holds the GIL while it waits for a core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: seconds of work, and of the pause after it
SLICE, PAUSE = 0.001, 0.012

_THREAD = threading.local()


def throttle_loads(busy: Callable[[], bool]) -> None:
    """Make this thread pause in ``throttle`` loops while ``busy()`` returns True."""
    _THREAD.busy, _THREAD.since = busy, time.thread_time()


def is_throttled() -> bool:
    """Return whether this thread called ``throttle_loads``."""
    return getattr(_THREAD, "busy", None) is not None


def throttle(items: Iterable[Item]) -> Iterator[Item]:
    """Yield ``items``, with pauses between them in a thread that called ``throttle_loads``."""
    for item in items:
        if is_throttled() and time.thread_time() - _THREAD.since > SLICE:
            if _THREAD.busy():
                time.sleep(PAUSE)
            _THREAD.since = time.thread_time()
        yield item
