"""The fair queue of requests: choose the request that starts next, and refuse requests if the queue
is full (HTTP status 429).

    API key ("alice")  →  adapter ("french")  →  requests by priority, then first come, first served

The next request is of the key that was served the fewest tokens, and among the requests of this key
of the adapter that was served the fewest. This is start-time fair queueing (Goyal, Vin and Cheng
1996), measured in tokens; ``docs/decisions/serve.md`` has the rules and the reasons. On a server
without keys, all requests belong to one key. To keep one client from filling the queue, each key
may have at most three times as many requests in it as the queue has free places, and each adapter
of a key at most three times as many as the key may still add.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from veneer.serve.requests import Busy

#: a blend (a weighted sum of adapters) as a hashable value: its (adapter name, weight) pairs,
#: sorted by name (``key_of``)
BlendKey = tuple[tuple[str, float], ...]

#: how many places of the queue the requests of a key, or of an adapter of a key, may take for each
#: place that is free
PLACES_PER_FREE_PLACE = 3

#: how much a prompt token counts in comparison to a generated token. It costs less, because one
#: forward call computes many prompt tokens.
PROMPT_TOKEN_COST = 0.25

#: the most names of adapters or keys without requests whose counts are remembered. It is larger
#: than the number of adapters of a server.
MAX_IDLE_COUNTS = 4096


def key_of(blend: Mapping[str, float]) -> BlendKey:
    """A blend, given as weights by adapter name, as a hashable value; () for the base."""
    return tuple(sorted(blend.items()))


def counted_as(blend: Mapping[str, float]) -> str:
    """The name of the adapter for which the tokens of a blend are counted: the one whose weight has
    the largest magnitude, or "" for the base."""
    return min(
        (name for name in blend if blend[name]),
        key=lambda name: (-abs(blend[name]), name),
        default="",
    )


class Waiting(Protocol):
    """A request in the queue: the attributes that the scheduler reads."""

    blend_key: BlendKey  # the request's blend as a hashable value (``key_of``)
    counted_adapter: str  # the adapter for which its tokens are counted (``counted_as``)
    owner: str  # the name of the client's API key; "" on a server without keys
    priority: int  # of the same owner and adapter, the lowest runs first


RequestT = TypeVar("RequestT", bound=Waiting)


class Shares:
    """Counts the tokens that were served to each of several competitors (keys, or adapters of one
    key), by name. A name is busy while it has requests that wait or run: after ``enter``, until
    ``leave`` was called as often. A name has its turn when one of its requests is chosen. Virtual
    time is the largest count of any name at its turn."""

    def __init__(self) -> None:
        self.virtual_time = 0.0  # in tokens
        self._served_tokens: dict[str, float] = {}
        # the number of the last turn, by name; of names with equal counts, the one whose last turn
        # is longest ago comes first
        self._last_turn: dict[str, int] = {}
        self._request_counts: Counter[str] = Counter()
        self._turn_numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._served_tokens)

    def enter(self, name: str) -> None:
        """Count one more request of ``name``. If the name was idle, its count of tokens is raised
        to virtual time, so that it has no advantage from the time in which it had no requests."""
        if not self._request_counts[name]:
            self._served_tokens[name] = max(self._served_tokens.get(name, 0.0), self.virtual_time)
            self._last_turn.setdefault(name, next(self._turn_numbers))
        self._request_counts[name] += 1

    def leave(self, name: str) -> None:
        """Count one request of ``name`` less. Without requests, the name is idle, and its count of
        tokens may be dropped."""
        self._request_counts[name] -= 1
        if not self._request_counts[name]:
            del self._request_counts[name]
            self._drop_idle_counts()

    def least(self, names: Iterable[str]) -> str:
        """Of ``names``, which must all be busy, the one that was served the fewest tokens."""
        return min(names, key=lambda name: (self._served_tokens[name], self._last_turn[name]))

    def count_of(self, name: str) -> float:
        """The count of tokens of a busy name: the tokens served to it; but whenever it became busy,
        a count below virtual time was raised to virtual time."""
        return self._served_tokens[name]

    def turn(self, name: str) -> None:
        """Record that a request of ``name`` was chosen, and advance virtual time to the name's
        count."""
        self.virtual_time = max(self.virtual_time, self._served_tokens[name])
        self._last_turn[name] = next(self._turn_numbers)

    def charge(self, name: str, tokens: float) -> None:
        """Add ``tokens`` that were computed for the busy ``name`` to its count."""
        self._served_tokens[name] += tokens

    def _drop_idle_counts(self) -> None:
        """Drop the counts of idle names that are not above virtual time, since ``enter`` would
        raise them to it in any case. If no name is busy, drop all counts. If more than
        ``MAX_IDLE_COUNTS`` idle names remain, drop those with the smallest counts as well."""
        idle_names = [name for name in self._served_tokens if name not in self._request_counts]
        dropped_names = [
            name
            for name in idle_names
            if not self._request_counts or self._served_tokens[name] <= self.virtual_time
        ]
        if len(idle_names) - len(dropped_names) > MAX_IDLE_COUNTS:
            names_by_count = sorted(idle_names, key=self._served_tokens.__getitem__)
            dropped_names = names_by_count[: len(idle_names) - MAX_IDLE_COUNTS]
        for name in dropped_names:
            del self._served_tokens[name], self._last_turn[name]


class Scheduler(Generic[RequestT]):
    """The queue, with places for ``capacity`` requests. It is not thread-safe: callers must hold a
    lock of their own. The key and the adapter of a request are busy from ``add`` until
    ``ended``."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.waiting = capacity, 0
        # the waiting requests in order, by owner and then by counted adapter; an empty queue is
        # deleted
        self._queues: dict[str, dict[str, deque[RequestT]]] = {}
        self._owner_shares = Shares()
        # by owner with requests: the counts of its adapters
        self._adapter_shares: dict[str, Shares] = {}
        # when the last 33 requests began to run (``began``), in seconds
        self._start_times: deque[float] = deque(maxlen=33)

    def add(self, request: RequestT) -> None:
        """Put a request at the end of the queue of its owner and adapter, but before requests with
        a higher ``priority`` number. ``Busy``: the queue has no place for it."""
        owner_queues = self._queues.get(request.owner, {})
        owner_waiting = sum(map(len, owner_queues.values()))
        adapter_waiting = len(owner_queues.get(request.counted_adapter, ()))
        free_count = float(self.capacity - self.waiting)
        if request.owner:  # how many requests the key may still add
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
        queue_position = sum(entry.priority <= request.priority for entry in queue)
        queue.insert(queue_position, request)

    def push_back(self, request: RequestT) -> None:
        """Put a request that ``take`` has returned back to the front of the queue of its owner and
        adapter, for example because there is no memory for it."""
        self._count_in_queue(request).appendleft(request)

    def requeue(self, request: RequestT) -> None:
        """Put a request that ``take`` has returned at the end of the queue of its owner and
        adapter, because a part of its work is done and more is left."""
        self._count_in_queue(request).append(request)

    def take(self, excluded: Collection[BlendKey] = ()) -> RequestT | None:
        """Choose the next request by the counts of its owner and adapter, among those whose blend
        is not in ``excluded``. Remove it from the queue and return it; None if there is none. The
        caller must call ``ended`` when the request has ended."""
        # the next request of each owner and counted adapter
        next_requests: dict[str, dict[str, RequestT]] = {}
        for owner, owner_queues in self._queues.items():
            for adapter, queue in owner_queues.items():
                eligible_requests = (entry for entry in queue if entry.blend_key not in excluded)
                if (request := next(eligible_requests, None)) is not None:
                    next_requests.setdefault(owner, {})[adapter] = request
        if not next_requests:
            return None
        owner = self._owner_shares.least(next_requests)
        adapter_shares = self._adapter_shares[owner]
        adapter = adapter_shares.least(next_requests[owner])
        self._owner_shares.turn(owner)
        adapter_shares.turn(adapter)
        self._remove_from_queue(next_requests[owner][adapter])
        return next_requests[owner][adapter]

    def remove(self, request: RequestT) -> bool:
        """Remove a request that ended while it waited. Returns False, and does nothing, if it does
        not wait."""
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
        """Sort running requests by the count of tokens of their key, and for the same key by that
        of their adapter, the smallest first. Requests with equal counts stay in order."""
        return sorted(
            requests,
            key=lambda request: (
                self._owner_shares.count_of(request.owner),
                self._adapter_shares[request.owner].count_of(request.counted_adapter),
            ),
        )

    def charge(self, request: RequestT, tokens: float) -> None:
        """Add ``tokens`` that were computed for a running request to the counts of its key and its
        adapter."""
        self._owner_shares.charge(request.owner, tokens)
        self._adapter_shares[request.owner].charge(request.counted_adapter, tokens)

    def began(self, started_at: float) -> None:
        """Record when (``started_at``, in seconds) a request began to run, and so will not be put
        back into the queue. ``retry_after`` needs these times."""
        self._start_times.append(started_at)

    def ended(self, request: RequestT) -> None:
        """Record that a request has ended. If it was the last one of its key or of its adapter,
        that is idle from now on."""
        self._owner_shares.leave(request.owner)
        self._adapter_shares[request.owner].leave(request.counted_adapter)
        if not len(self._adapter_shares[request.owner]):
            del self._adapter_shares[request.owner]

    def retry_after(self) -> float:
        """The seconds, from 1 to 60, after which a refused client may try again: the time until
        half of the waiting requests have begun, at the rate of the last 33 starts."""
        if len(self._start_times) < 2:
            return 1.0
        duration = self._start_times[-1] - self._start_times[0]
        seconds_per_start = duration / (len(self._start_times) - 1)
        return min(60.0, max(1.0, seconds_per_start * self.waiting / 2))

    def _count_in_queue(self, request: RequestT) -> deque[RequestT]:
        """Count a request as waiting, and return the queue of its owner and adapter, to which the
        caller must add it."""
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
    """Choose the prompts that the next forward call computes together. All are padded to the
    longest of them. The first prompt is always chosen. Each further prompt is chosen if the call
    then has at most ``budget`` tokens with padding, of which at most a quarter is padding.

    Args:
        lengths: the number of tokens of each prompt, in the order of preference.

    Returns:
        The indices of the chosen prompts in ``lengths``.
    """
    chosen_indices: list[int] = []
    longest_chosen = token_count = 0
    for index, length in enumerate(lengths):
        padded_length = max(longest_chosen, length)
        padded_total = padded_length * (len(chosen_indices) + 1)
        has_little_padding = (token_count + length) * 4 >= padded_total * 3
        if not chosen_indices or (padded_total <= budget and has_little_padding):
            chosen_indices.append(index)
            longest_chosen, token_count = padded_length, token_count + length
    return chosen_indices
