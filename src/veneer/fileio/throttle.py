"""Loops of long Python work that pause while another thread computes, if their thread was told to
give way.

Python runs one thread at a time. Preparing an adapter for tens of milliseconds delays the next step
of a thread that computes by about as much; in slices it delays each of many steps a little.
Rejected: the lowest priority for the thread on top of that. It made the pauses of the others
longer, as it keeps Python while it waits for a core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

#: seconds of work, and of the pause behind it
SLICE, PAUSE = 0.001, 0.012

_THREAD = threading.local()


def throttle_loads(busy: Callable[[], bool]) -> None:
    """From now on this thread pauses in ``throttled`` loops while ``busy()``."""
    _THREAD.busy, _THREAD.since = busy, time.thread_time()


def gives_way() -> bool:
    return getattr(_THREAD, "busy", None) is not None


def throttled(items: Iterable[Item]) -> Iterator[Item]:
    """``items``; with pauses between them in a thread that gives way."""
    for item in items:
        if gives_way() and time.thread_time() - _THREAD.since > SLICE:
            if _THREAD.busy():
                time.sleep(PAUSE)
            _THREAD.since = time.thread_time()
        yield item
