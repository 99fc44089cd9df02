"""Choose the next request: from the API key that was served least, within it from the adapter that
was served least, and within an adapter in the order of arrival.

    key ("alice")  →  adapter ("french")  →  requests by priority, then first come, first served

This is start-time fair queueing (Goyal, Vin and Cheng 1996) of tokens;
``docs/decisions/serve.md`` has the rules and the reasons. A server without keys
has one key. The queue is bounded: each adapter and each key may hold at most three times as many
places as are still free.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from veneer.serve.requests import Busy

#: a blend as a value: its (adapter name, weight) pairs, sorted (``key_of``)
Key = tuple[tuple[str, float], ...]

#: places of the queue that an adapter or a key may hold for each free place
SHARE = 3

#: the cost of a prompt token in generated tokens: less, since many are computed in one call
PROMPT = 0.25

#: counts that are kept for idle adapters or keys: more than a server has adapters
KEPT = 4096


def key_of(blend: Mapping[str, float]) -> Key:
    """A blend as a hashable value; () for the base."""
    return tuple(sorted(blend.items()))


def counted_as(blend: Mapping[str, float]) -> str:
    """The adapter that a blend is charged to: the one whose weight has the largest magnitude; ""
    for the base."""
    return min(
        (name for name in blend if blend[name]),
        key=lambda name: (-abs(blend[name]), name),
        default="",
    )


class Waiting(Protocol):
    """The fields of a request that the scheduler reads."""

    key: Key  # identifies its blend (``key_of``)
    flow: str  # the adapter that it is charged to (``counted_as``)
    owner: str  # the name of its API key; "" on a server without keys
    priority: int  # lower runs first, within its line


E = TypeVar("E", bound=Waiting)


class Shares:
    """The tokens served to each of several competitors (keys, or adapters), by name. A name is busy
    from ``enter`` until ``leave``: it has requests that wait or run."""

    def __init__(self) -> None:
        self.now = 0.0  # virtual time
        self._served: dict[str, float] = {}
        self._since: dict[str, int] = {}  # order of the last turns: decides between equal counts
        self._busy: Counter[str] = Counter()
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._served)

    def enter(self, name: str) -> None:
        """Count one more request of ``name``."""
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
        """The least served of the busy ``names``."""
        return min(names, key=lambda name: (self._served[name], self._since[name]))

    def count_of(self, name: str) -> float:
        """The tokens that were charged to a busy name."""
        return self._served[name]

    def turn(self, name: str) -> None:
        """Give ``name`` its turn, and advance virtual time to its count."""
        self.now = max(self.now, self._served[name])
        self._since[name] = next(self._order)

    def charge(self, name: str, tokens: float) -> None:
        self._served[name] += tokens

    def _forget(self) -> None:
        """Drop the counts of idle names that virtual time has passed. If more than ``KEPT`` idle
        names remain, drop the smallest counts too."""
        idle = [name for name in self._served if name not in self._busy]
        gone = [name for name in idle if not self._busy or self._served[name] <= self.now]
        if len(idle) - len(gone) > KEPT:
            gone = sorted(idle, key=self._served.__getitem__)[: len(idle) - KEPT]
        for name in gone:
            del self._served[name], self._since[name]


class Scheduler(Generic[E]):
    """The queue, with room for ``places`` requests. It is not thread-safe: the caller holds a
    lock."""

    def __init__(self, places: int) -> None:
        self.places, self.waiting = places, 0
        self._lines: dict[str, dict[str, deque[E]]] = {}  # by owner and flow; none is empty
        self._owners = Shares()
        self._flows: dict[str, Shares] = {}  # by busy owner
        self._starts: deque[float] = deque(maxlen=33)  # when the last requests began

    def add(self, request: E) -> None:
        """Put a request at the end of its line, but before requests of a higher ``priority``
        number. ``Busy``: there is no place for it."""
        lines = self._lines.get(request.owner, {})
        theirs, flow_length = sum(map(len, lines.values())), len(lines.get(request.flow, ()))
        room = float(self.places - self.waiting)
        if request.owner:  # places that the key may still take under the bound of its share
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
        """Put a request that was taken back to the front of its line."""
        self._grow(request).appendleft(request)

    def go_on(self, request: E) -> None:
        """Put a request that was taken, and has more work, to the end of its line."""
        self._grow(request).append(request)

    def take(self, without: Collection[Key] = ()) -> E | None:
        """Remove and return the next request whose blend is not in ``without``. Call ``ended`` when
        it is over."""
        first: dict[str, dict[str, E]] = {}  # by owner and flow, the next request
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
        """Running requests, sorted stably: the least served key and adapter first."""
        return sorted(
            requests,
            key=lambda request: (
                self._owners.count_of(request.owner),
                self._flows[request.owner].count_of(request.flow),
            ),
        )

    def charge(self, request: E, tokens: float) -> None:
        """Charge the tokens that were computed for a running request."""
        self._owners.charge(request.owner, tokens)
        self._flows[request.owner].charge(request.flow, tokens)

    def began(self, moment: float) -> None:
        """Record the time, in seconds, at which a request left the queue for good."""
        self._starts.append(moment)

    def ended(self, request: E) -> None:
        self._owners.leave(request.owner)
        self._flows[request.owner].leave(request.flow)
        if not len(self._flows[request.owner]):
            del self._flows[request.owner]

    def retry_after(self) -> float:
        """Seconds until half of the queue has begun, at the recent rate; between 1 and 60."""
        if len(self._starts) < 2:
            return 1.0
        each = (self._starts[-1] - self._starts[0]) / (len(self._starts) - 1)
        return min(60.0, max(1.0, each * self.waiting / 2))

    def _grow(self, request: E) -> deque[E]:
        """Return the line of a request that is about to be added, and count it."""
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
    """The indices of the prompts that the next call computes, padded to the longest. The first
    prompt is always one of them. Others join while rows × longest stays within ``budget`` tokens
    and at most a quarter of it is padding."""
    chosen: list[int] = []
    longest = real = 0
    for position, length in enumerate(lengths):
        width = max(longest, length)
        area = width * (len(chosen) + 1)
        if not chosen or (area <= budget and (real + length) * 4 >= area * 3):
            chosen.append(position)
            longest, real = width, real + length
    return chosen
