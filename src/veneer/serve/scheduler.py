"""Chooses the next request: of the key that was served least, within it the adapter that was, and
within an adapter who came first.

    key ("alice")  →  adapter ("french")  →  requests by priority, then first come, first served

This is start-time fair queueing (Goyal, Vin and Cheng 1996) of tokens;
``docs/decisions/serve.md`` has the rules and the reasons. A server without keys
has one key. The queue is bounded: an adapter, and each key, may hold at most three times as many
places as are left.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from veneer.serve.requests import Busy

Key = tuple[tuple[str, float], ...]

#: places of the queue that one may hold for each place that is left
SHARE = 3

#: tokens that a prompt's token counts as: it is computed with others in one call
PROMPT = 0.25

#: counts that are kept of those that have nothing to do: more than a server has adapters
KEPT = 4096


def key_of(blend: Mapping[str, float]) -> Key:
    """A blend as a value: the base is ()."""
    return tuple(sorted(blend.items()))


def counted_as(blend: Mapping[str, float]) -> str:
    """The adapter for which a blend is counted: the one with the largest weight, by size; "" for
    the base."""
    return min(
        (name for name in blend if blend[name]),
        key=lambda name: (-abs(blend[name]), name),
        default="",
    )


class Waiting(Protocol):
    """The fields of a request that the scheduler reads."""

    key: Key  # its blend
    flow: str  # what it is counted as (``counted_as``)
    owner: str  # the name of the API key that asks; "" where there are no keys
    priority: int  # a lower one goes first, within its line


E = TypeVar("E", bound=Waiting)


class Shares:
    """Counts of some that share, by name. Somebody is busy from ``enter`` to ``leave``."""

    def __init__(self) -> None:
        self.now = 0.0  # virtual time
        self._served: dict[str, float] = {}
        self._since: dict[str, int] = {}  # of equally served ones, the one that has waited longest
        self._busy: Counter[str] = Counter()
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._served)

    def enter(self, name: str) -> None:
        """One more request of it waits or runs."""
        if not self._busy[name]:
            self._served[name] = max(self._served.get(name, 0.0), self.now)
            self._since.setdefault(name, next(self._order))
        self._busy[name] += 1

    def leave(self, name: str) -> None:
        self._busy[name] -= 1
        if not self._busy[name]:
            del self._busy[name]
            self._forget()

    def least(self, names: Iterable[str]) -> str:
        """The name with the least service, of some that are busy."""
        return min(names, key=lambda name: (self._served[name], self._since[name]))

    def count_of(self, name: str) -> float:
        """The tokens that count for a name that is busy."""
        return self._served[name]

    def turn(self, name: str) -> None:
        """It has its turn, and virtual time goes on to its count."""
        self.now = max(self.now, self._served[name])
        self._since[name] = next(self._order)

    def charge(self, name: str, tokens: float) -> None:
        self._served[name] += tokens

    def _forget(self) -> None:
        """Drop the counts of the idle that virtual time has passed; of more than ``KEPT`` others,
        the smallest."""
        idle = [name for name in self._served if name not in self._busy]
        gone = [name for name in idle if not self._busy or self._served[name] <= self.now]
        if len(idle) - len(gone) > KEPT:
            gone = sorted(idle, key=self._served.__getitem__)[: len(idle) - KEPT]
        for name in gone:
            del self._served[name], self._since[name]


class Scheduler(Generic[E]):
    """The queue, of so many ``places``. It knows no thread: who calls holds a lock."""

    def __init__(self, places: int) -> None:
        self.places, self.waiting = places, 0
        self._lines: dict[str, dict[str, deque[E]]] = {}  # by owner and flow, none of them empty
        self._owners = Shares()
        self._flows: dict[str, Shares] = {}  # of each owner that is busy
        self._starts: deque[float] = deque(maxlen=33)  # when the last ones began

    def add(self, request: E) -> None:
        """Put a request at the end of its line, but before those that have a higher number as
        priority. ``Busy``: no place for it."""
        lines = self._lines.get(request.owner, {})
        theirs, flow_length = sum(map(len, lines.values())), len(lines.get(request.flow, ()))
        room = float(self.places - self.waiting)
        if (
            request.owner
        ):  # what the key may still add, before it has three times as many places as are left
            room = (SHARE * room - theirs) / (1 + SHARE)
        if room <= 0 or flow_length >= SHARE * room:
            whose = (
                f"{theirs} of them of the same key and {flow_length}"
                if request.owner
                else f"{flow_length} of them"
            )
            raise Busy(
                f"Found: {self.waiting} requests that wait, {whose} for the same adapter. Expected:"
                f" at most {self.places}, with room for others. Do: try again in"
                f" {self.retry_after():.0f} seconds.",
                self.retry_after(),
            )
        self._owners.enter(request.owner)
        self._flows.setdefault(request.owner, Shares()).enter(request.flow)
        line = self._grow(request)
        ahead = sum(entry.priority <= request.priority for entry in line)
        line.insert(ahead, request)

    def push_back(self, request: E) -> None:
        """Put a request that was taken before all others of its line again."""
        self._grow(request).appendleft(request)

    def go_on(self, request: E) -> None:
        """Put a request that was taken, and has more to do, behind all others of its line."""
        self._grow(request).append(request)

    def take(self, without: Collection[Key] = ()) -> E | None:
        """Remove and return who runs next, of other blends than ``without``. It counts as running
        until ``ended``."""
        first: dict[str, dict[str, E]] = {}  # by owner and flow, who is next
        for owner, lines in self._lines.items():
            for flow, line in lines.items():
                if (
                    request := next((entry for entry in line if entry.key not in without), None)
                ) is not None:
                    first.setdefault(owner, {})[flow] = request
        if not first:
            return None
        owner = self._owners.least(first)
        flows = self._flows[owner]
        flow = flows.least(first[owner])
        self._owners.turn(owner)
        flows.turn(flow)
        self._out(first[owner][flow])
        return first[owner][flow]

    def remove(self, request: E) -> bool:
        if request not in self._lines.get(request.owner, {}).get(request.flow, ()):
            return False
        self._out(request)
        self.ended(request)
        return True

    def waiting_requests(self) -> list[E]:
        return [
            request for lines in self._lines.values() for line in lines.values() for request in line
        ]

    def by_service(self, requests: Iterable[E]) -> list[E]:
        """Requests that run, those of the least served key and adapter first; equal ones stay in
        their order."""
        return sorted(
            requests,
            key=lambda request: (
                self._owners.count_of(request.owner),
                self._flows[request.owner].count_of(request.flow),
            ),
        )

    def charge(self, request: E, tokens: float) -> None:
        """Count tokens that were computed for a request that runs."""
        self._owners.charge(request.owner, tokens)
        self._flows[request.owner].charge(request.flow, tokens)

    def began(self, moment: float) -> None:
        """Note that a request left the queue for good at ``now``, in seconds."""
        self._starts.append(moment)

    def ended(self, request: E) -> None:
        self._owners.leave(request.owner)
        self._flows[request.owner].leave(request.flow)
        if not len(self._flows[request.owner]):
            del self._flows[request.owner]

    def retry_after(self) -> float:
        """Seconds in which half of the queue begins, at the rate of late; between 1 and 60."""
        if len(self._starts) < 2:
            return 1.0
        each = (self._starts[-1] - self._starts[0]) / (len(self._starts) - 1)
        return min(60.0, max(1.0, each * self.waiting / 2))

    def _grow(self, request: E) -> deque[E]:
        """Its line, which is about to have one more."""
        self.waiting += 1
        return self._lines.setdefault(request.owner, {}).setdefault(request.flow, deque())

    def _out(self, request: E) -> None:
        lines = self._lines[request.owner]
        lines[request.flow].remove(request)
        if not lines[request.flow]:
            del lines[request.flow]
        if not lines:
            del self._lines[request.owner]
        self.waiting -= 1


def fit_budget(lengths: list[int], budget: int) -> list[int]:
    """Which of the waiting prompts (places in ``lengths``) are computed in the next call, padded to
    the longest. The first always is. Others join while rows × longest stays within ``budget``
    tokens and at most a quarter of it is padding."""
    chosen: list[int] = []
    longest = real = 0
    for position, length in enumerate(lengths):
        width = max(longest, length)
        area = width * (len(chosen) + 1)
        if not chosen or (area <= budget and (real + length) * 4 >= area * 3):
            chosen.append(position)
            longest, real = width, real + length
    return chosen
