"""Choose the next request of the queue, and refuse requests if the queue is full (429). The API key
that was served least comes first; within the key, the adapter that was served least; and within the
adapter, requests come in the order of arrival.

    key ("alice")  →  adapter ("french")  →  requests by priority, then first come, first served

This is start-time fair queueing (Goyal, Vin and Cheng 1996), measured in tokens;
``docs/decisions/serve.md`` has the rules and the reasons. A server without keys counts as one key.
The queue is bounded: each key may have at most three times as many requests in it as there are free
places, and each adapter of a key three times as many as the key has places left.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from veneer.serve.requests import Busy

#: a blend as a hashable value: its sorted (adapter name, weight) pairs (``key_of``)
BlendKey = tuple[tuple[str, float], ...]

#: places in the queue that an adapter or a key may take for each free place
PLACES_PER_FREE_PLACE = 3

#: the cost of a prompt token, as a fraction of a generated token's: one call computes many of them
PROMPT_TOKEN_COST = 0.25

#: the most idle adapters or keys whose counts are remembered: more than a server has adapters
MAX_IDLE_COUNTS = 4096


def key_of(blend: Mapping[str, float]) -> BlendKey:
    """A blend as a hashable value; () for the base."""
    return tuple(sorted(blend.items()))


def counted_as(blend: Mapping[str, float]) -> str:
    """The adapter that the tokens of a blend count for: the adapter whose weight has the largest
    magnitude, or "" for the base."""
    return min(
        (name for name in blend if blend[name]),
        key=lambda name: (-abs(blend[name]), name),
        default="",
    )


class Waiting(Protocol):
    """The fields of a request that the scheduler reads."""

    blend_key: BlendKey  # identifies the request's blend (``key_of``)
    counted_adapter: str  # the adapter that its tokens count for (``counted_as``)
    owner: str  # the name of the client's API key; "" on a server without keys
    priority: int  # lower runs first, among requests of the same owner and adapter


RequestT = TypeVar("RequestT", bound=Waiting)


class Shares:
    """Counts the tokens served to each of several competitors (keys, or adapters), by name. A name
    is busy while it has requests that wait or run, from ``enter`` until ``leave``."""

    def __init__(self) -> None:
        self.virtual_time = 0.0  # the largest count, in tokens, of a name at its turn
        self._served_tokens: dict[str, float] = {}
        # number of the last turn, by name: of equal counts, the name with the older turn is first
        self._last_turn: dict[str, int] = {}
        self._request_counts: Counter[str] = Counter()
        self._turn_numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._served_tokens)

    def enter(self, name: str) -> None:
        """Count one more request of ``name``. If the name was idle, its count of tokens is raised
        to virtual time, so that it gets no credit for the time in which it had no requests."""
        if not self._request_counts[name]:
            self._served_tokens[name] = max(self._served_tokens.get(name, 0.0), self.virtual_time)
            self._last_turn.setdefault(name, next(self._turn_numbers))
        self._request_counts[name] += 1

    def leave(self, name: str) -> None:
        """Count one request of ``name`` less."""
        self._request_counts[name] -= 1
        if not self._request_counts[name]:
            del self._request_counts[name]
            self._forget()

    def least(self, names: Iterable[str]) -> str:
        """The name that was served the fewest tokens, among busy ``names``."""
        return min(names, key=lambda name: (self._served_tokens[name], self._last_turn[name]))

    def count_of(self, name: str) -> float:
        """The count of a busy name: the tokens served to it, raised to virtual time whenever it
        became busy."""
        return self._served_tokens[name]

    def turn(self, name: str) -> None:
        """Give ``name`` its turn, and advance virtual time to its count."""
        self.virtual_time = max(self.virtual_time, self._served_tokens[name])
        self._last_turn[name] = next(self._turn_numbers)

    def charge(self, name: str, tokens: float) -> None:
        """Count tokens that were computed for ``name``."""
        self._served_tokens[name] += tokens

    def _forget(self) -> None:
        """Drop the counts of idle names that virtual time has passed, since such a name would
        start at the current virtual time anyway. If more than ``MAX_IDLE_COUNTS`` idle names
        remain, drop the smallest counts too."""
        idle = [name for name in self._served_tokens if name not in self._request_counts]
        expired = [
            name
            for name in idle
            if not self._request_counts or self._served_tokens[name] <= self.virtual_time
        ]
        if len(idle) - len(expired) > MAX_IDLE_COUNTS:
            by_count = sorted(idle, key=self._served_tokens.__getitem__)
            expired = by_count[: len(idle) - MAX_IDLE_COUNTS]
        for name in expired:
            del self._served_tokens[name], self._last_turn[name]


class Scheduler(Generic[RequestT]):
    """The queue, with room for ``capacity`` requests. It is not thread-safe: callers need a lock of
    their own."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.waiting = capacity, 0
        # waiting requests in order, by owner and counted adapter; no queue is empty
        self._queues: dict[str, dict[str, deque[RequestT]]] = {}
        self._owner_shares = Shares()
        # for each busy owner, the counts of its adapters
        self._adapter_shares: dict[str, Shares] = {}
        # times in seconds at which the last requests left the queue
        self._start_times: deque[float] = deque(maxlen=33)

    def add(self, request: RequestT) -> None:
        """Put a request at the end of its adapter's queue, but before requests with a higher
        ``priority`` number. ``Busy``: the queue has no place for it."""
        owner_queues = self._queues.get(request.owner, {})
        owner_waiting = sum(map(len, owner_queues.values()))
        adapter_waiting = len(owner_queues.get(request.counted_adapter, ()))
        free_count = float(self.capacity - self.waiting)
        if request.owner:  # the places that the bound leaves for the key
            free_count = (PLACES_PER_FREE_PLACE * free_count - owner_waiting) / (
                1 + PLACES_PER_FREE_PLACE
            )
        if free_count <= 0 or adapter_waiting >= PLACES_PER_FREE_PLACE * free_count:
            queued_text = (
                f"{owner_waiting} of them of the same key and {adapter_waiting}"
                if request.owner
                else f"{adapter_waiting} of them"
            )
            raise Busy(
                f"Found: {self.waiting} requests that wait, {queued_text} for the same adapter."
                f" Expected: at most {self.capacity}, with room for others. Do: try again in"
                f" {self.retry_after():.0f} seconds.",
                self.retry_after(),
            )
        self._owner_shares.enter(request.owner)
        self._adapter_shares.setdefault(request.owner, Shares()).enter(request.counted_adapter)
        queue = self._count_in_queue(request)
        position = sum(entry.priority <= request.priority for entry in queue)
        queue.insert(position, request)

    def push_back(self, request: RequestT) -> None:
        """Put a request that ``take`` has returned back to the front of its queue."""
        self._count_in_queue(request).appendleft(request)

    def requeue(self, request: RequestT) -> None:
        """Put a request that ``take`` has returned, and that has more work, at its queue's end."""
        self._count_in_queue(request).append(request)

    def take(self, excluded: Collection[BlendKey] = ()) -> RequestT | None:
        """Remove and return the next request whose blend is not in ``excluded``. Call ``ended``
        when the request has ended."""
        # by owner and counted adapter, the next request
        candidates: dict[str, dict[str, RequestT]] = {}
        for owner, owner_queues in self._queues.items():
            for adapter, queue in owner_queues.items():
                allowed = (entry for entry in queue if entry.blend_key not in excluded)
                if (request := next(allowed, None)) is not None:
                    candidates.setdefault(owner, {})[adapter] = request
        if not candidates:
            return None
        owner = self._owner_shares.least(candidates)
        adapter_shares = self._adapter_shares[owner]
        adapter = adapter_shares.least(candidates[owner])
        self._owner_shares.turn(owner)
        adapter_shares.turn(adapter)
        self._remove_from_queue(candidates[owner][adapter])
        return candidates[owner][adapter]

    def remove(self, request: RequestT) -> bool:
        """Remove a waiting request; returns whether it was waiting."""
        if request not in self._queues.get(request.owner, {}).get(request.counted_adapter, ()):
            return False
        self._remove_from_queue(request)
        self.ended(request)
        return True

    def waiting_requests(self) -> list[RequestT]:
        return [
            request
            for owner_queues in self._queues.values()
            for queue in owner_queues.values()
            for request in queue
        ]

    def by_service(self, requests: Iterable[RequestT]) -> list[RequestT]:
        """Sort running requests by the tokens served to their key, then to their adapter, with the
        fewest first. Requests with equal counts stay in order."""
        return sorted(
            requests,
            key=lambda request: (
                self._owner_shares.count_of(request.owner),
                self._adapter_shares[request.owner].count_of(request.counted_adapter),
            ),
        )

    def charge(self, request: RequestT, tokens: float) -> None:
        """Count tokens that were computed for a running request, for its key and its adapter."""
        self._owner_shares.charge(request.owner, tokens)
        self._adapter_shares[request.owner].charge(request.counted_adapter, tokens)

    def began(self, time: float) -> None:
        """Record the time, in seconds, at which a request left the queue for good."""
        self._start_times.append(time)

    def ended(self, request: RequestT) -> None:
        """Record that a request has ended, so that its key or its adapter may be idle now."""
        self._owner_shares.leave(request.owner)
        self._adapter_shares[request.owner].leave(request.counted_adapter)
        if not len(self._adapter_shares[request.owner]):
            del self._adapter_shares[request.owner]

    def retry_after(self) -> float:
        """Seconds after which a client may try again, between 1 and 60: half of the queue has begun
        by then, at the recent rate."""
        if len(self._start_times) < 2:
            return 1.0
        duration = self._start_times[-1] - self._start_times[0]
        seconds_per_start = duration / (len(self._start_times) - 1)
        return min(60.0, max(1.0, seconds_per_start * self.waiting / 2))

    def _count_in_queue(self, request: RequestT) -> deque[RequestT]:
        """Return the queue to which the caller adds a request, and count the request."""
        self.waiting += 1
        return self._queues.setdefault(request.owner, {}).setdefault(
            request.counted_adapter, deque()
        )

    def _remove_from_queue(self, request: RequestT) -> None:
        owner_queues = self._queues[request.owner]
        owner_queues[request.counted_adapter].remove(request)
        if not owner_queues[request.counted_adapter]:
            del owner_queues[request.counted_adapter]
        if not owner_queues:
            del self._queues[request.owner]
        self.waiting -= 1


def fit_budget(lengths: list[int], budget: int) -> list[int]:
    """Choose the prompts that the next forward call computes; returns their indices. ``lengths``:
    tokens of each prompt. All are padded to the longest. The first prompt is always chosen. Others
    join while rows × longest stays within ``budget`` tokens and at most a quarter of that is
    padding."""
    chosen: list[int] = []
    longest = token_count = 0
    for index, length in enumerate(lengths):
        padded_length = max(longest, length)
        padded_count = padded_length * (len(chosen) + 1)
        is_dense = (token_count + length) * 4 >= padded_count * 3
        if not chosen or (padded_count <= budget and is_dense):
            chosen.append(index)
            longest, token_count = padded_length, token_count + length
    return chosen
