"""Who runs next: the mix that was served least, and within a mix who came first.

Each mix of adapters has a count of the tokens that were computed for it. A free row goes to the mix with the smallest
count among those that have somebody waiting; so an adapter with a thousand requests gets as many tokens as one with
ten. A mix that had nobody waiting or running begins at the smallest count of those that do: idleness is no credit.

The queue is bounded. So that one mix cannot fill it before the others come, a mix may hold at most three times as
many places as are left: alone, it gets three quarters of the queue.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Mapping
from typing import Generic, Protocol, TypeVar

from veneer.serve.requests import Busy

Key = tuple[tuple[str, float], ...]

#: places of the queue that a mix may hold for each place that is left
SHARE = 3

#: tokens that a prompt's token counts as: it is computed with others in one call
PROMPT = 0.25


def key_of(mix: Mapping[str, float]) -> Key:
    """A mix as a value: the base is ()."""
    return tuple(sorted(mix.items()))


class Waiting(Protocol):
    """What the scheduler reads of an entry."""

    key: Key


E = TypeVar("E", bound=Waiting)


class Scheduler(Generic[E]):
    """The queue. It knows no thread: who calls holds a lock.

    Args:
        places: of the queue.
    """

    def __init__(self, places: int) -> None:
        self.places, self.waiting = places, 0
        self._queues: dict[Key, deque[E]] = {}
        self._served: dict[Key, float] = {}
        self._running: dict[Key, int] = {}
        self._order = itertools.count()
        self._since: dict[Key, int] = {}  # of equally served mixes, the one that has waited longest
        self._starts: deque[float] = deque(maxlen=33)  # when the last ones began

    def add(self, entry: E) -> None:
        """Put an entry at the end of its mix.

        Raises:
            Busy: no place for this mix.
        """
        queue = self._queues.get(entry.key)
        own, left = len(queue) if queue else 0, self.places - self.waiting
        if left <= 0 or own >= SHARE * left:
            raise Busy(
                f"Found: {self.waiting} requests that wait, {own} of them for the same adapter. Expected: at most "
                f"{self.places}, with room for other adapters. Do: try again in {self.retry_after():.0f} seconds.",
                self.retry_after(),
            )
        if queue is None:
            self._awake(entry.key)
            queue = self._queues[entry.key] = deque()
        queue.append(entry)
        self.waiting += 1

    def push_back(self, entry: E) -> None:
        """Put an entry that was taken before all others of its mix again."""
        self._running[entry.key] -= 1
        self._queues.setdefault(entry.key, deque()).appendleft(entry)
        self.waiting += 1

    def take(self, without: Collection[Key] = ()) -> E | None:
        """Remove and return who runs next, of other mixes than ``without``. It counts as running until ``ended``."""
        keys = [key for key in self._queues if key not in without]
        if not keys:
            return None
        key = min(keys, key=lambda key: (self._served[key], self._since[key]))
        queue = self._queues[key]
        entry = queue.popleft()
        if not queue:
            del self._queues[key]
        self._since[key] = next(self._order)
        self._running[key] = self._running.get(key, 0) + 1
        self.waiting -= 1
        return entry

    def remove(self, entry: E) -> bool:
        """Remove an entry that still waits; whether it did."""
        queue = self._queues.get(entry.key)
        if queue is None or entry not in queue:
            return False
        queue.remove(entry)
        self.waiting -= 1
        if not queue:
            del self._queues[entry.key]
            self._forget(entry.key)
        return True

    def entries(self) -> list[E]:
        """All that wait."""
        return [entry for queue in self._queues.values() for entry in queue]

    def charge(self, key: Key, tokens: float) -> None:
        """Count tokens that were computed for a mix."""
        self._served[key] = self._served.get(key, 0.0) + tokens

    def began(self, now: float) -> None:
        """Note that an entry left the queue for good at ``now``, in seconds."""
        self._starts.append(now)

    def ended(self, key: Key) -> None:
        """An entry that was taken is over."""
        self._running[key] -= 1
        self._forget(key)

    def retry_after(self) -> float:
        """Seconds in which half of the queue begins, at the rate of late; between 1 and 60."""
        if len(self._starts) < 2:
            return 1.0
        each = (self._starts[-1] - self._starts[0]) / (len(self._starts) - 1)
        return min(60.0, max(1.0, each * self.waiting / 2))

    def _awake(self, key: Key) -> None:
        """A mix has somebody again: it is served no less than those that had."""
        if not self._running.get(key):
            busy = [served for other, served in self._served.items() if other != key]
            self._served[key] = max(self._served.get(key, 0.0), min(busy, default=0.0))
        self._since.setdefault(key, next(self._order))

    def _forget(self, key: Key) -> None:
        """Drop what is known of a mix that has nobody, so that the names of a year do not pile up."""
        if not self._running.get(key) and key not in self._queues:
            for known in (self._running, self._served, self._since):
                known.pop(key, None)


def fitting(lengths: list[int], budget: int) -> list[int]:
    """Which of the waiting prompts are computed in the next call, padded to the longest of them.

    The first always is. Others join while rows × longest stays within ``budget`` tokens and at most a quarter of
    it is padding.

    Returns:
        Places in ``lengths``.
    """
    if not lengths:
        return []
    taken, longest, real = [0], lengths[0], lengths[0]
    for place, length in enumerate(lengths[1:], 1):
        width = max(longest, length)
        area = width * (len(taken) + 1)
        if area <= budget and (real + length) * 4 >= area * 3:
            taken.append(place)
            longest, real = width, real + length
    return taken
