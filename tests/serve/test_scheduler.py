"""Who runs next: fairness between keys and adapters, order within one, a bounded queue."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.serve import scheduler
from veneer.serve.requests import Busy
from veneer.serve.scheduler import PLACES_PER_FREE_PLACE, Scheduler, counted_as, fit_budget, key_of


@dataclass(eq=False)
class RequestState:
    blend: dict
    number: int = 0
    owner: str = ""
    priority: int = 0
    blend_key: tuple = field(init=False)
    counted_adapter: str = field(init=False)

    def __post_init__(self):
        self.blend_key, self.counted_adapter = key_of(self.blend), counted_as(self.blend)


def entry(name: str, number: int = 0, owner: str = "") -> RequestState:
    return RequestState({name: 1.0} if name else {}, number, owner)


def simulated(clients, rows: int, steps: int, ahead: int = 4) -> dict:
    """Tokens that each client got. ``clients`` is {name: (requests it has at any time, what makes
    one, its tokens)}.

    As in the engine: some entries are taken before a row is free for them, and a step is a token
    for each row.
    """
    queue: Scheduler[RequestState] = Scheduler(100_000)
    got, taken, running = Counter(), [], []

    def ask(name):
        one = clients[name][1]()
        one.client, one.left = name, clients[name][2]
        queue.add(one)

    for name, (count, _, _) in clients.items():
        for _ in range(count):
            ask(name)
    for _ in range(steps):
        while len(taken) < rows - len(running) + ahead and (one := queue.take()) is not None:
            taken.append(one)
        while len(running) < rows and taken:
            running.append(taken.pop(0))
        for one in list(running):
            queue.charge(one, 1)
            got[one.client] += 1
            one.left -= 1
            if not one.left:
                running.remove(one)
                queue.ended(one)
                ask(one.client)
    return got


def makes(blend: dict, owner: str = ""):
    return lambda: RequestState(blend, owner=owner)


def test_a_mix_is_one_however_it_is_written():
    assert key_of({"a": 0.5, "b": 0.5}) == key_of({"b": 0.5, "a": 0.5})
    assert key_of({}) == ()


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    costs=st.integers(1, 9),
    rows=st.integers(1, 4),
)
def test_adapters_get_as_many_tokens_as_long_as_they_ask(counts, costs, rows):
    """With requests of one size, adapters that still wait never lie more than the running requests
    apart."""
    queue: Scheduler[RequestState] = Scheduler(1000)
    for number in range(max(counts)):
        for name, count in enumerate(counts):
            if number < count:
                queue.add(entry(str(name), number))
    served, running, waiting = Counter(), [], Counter(dict(enumerate(counts)))
    last = {}
    while queue.waiting or running:
        while len(running) < rows and queue.waiting:
            taken = queue.take()
            name = int(taken.blend_key[0][0])
            assert taken.number == last.get(name, -1) + 1  # first come, first served
            last[name] = taken.number
            waiting[name] -= 1
            running.append([taken, costs])
        for one in running:
            queue.charge(one[0], 1)
            served[int(one[0].blend_key[0][0])] += 1
            one[1] -= 1
        for one in [one for one in running if not one[1]]:
            running.remove(one)
            queue.ended(one[0])
        asking = [served[name] for name in waiting if waiting[name]]
        if len(asking) > 1:
            assert max(asking) - min(asking) <= rows * costs
    assert served == Counter({name: count * costs for name, count in enumerate(counts)})


def test_idleness_is_no_credit():
    queue: Scheduler[RequestState] = Scheduler(100)
    for number in range(20):
        queue.add(entry("busy", number))
    for _ in range(10):
        queue.charge(queue.take(), 100)
    for number in range(10):
        queue.add(entry("late", number))
    order = []
    for _ in range(10):
        taken = queue.take()
        order.append(taken.blend_key[0][0])
        queue.charge(taken, 100)
    assert order.count("late") == 5  # not ten, as it would with the 1,000 tokens it never asked for


def test_a_mix_can_be_left_out_and_an_entry_put_back():
    queue: Scheduler[RequestState] = Scheduler(100)
    first, second, other = entry("a", 0), entry("a", 1), entry("b")
    for one in (first, second, other):
        queue.add(one)
    assert queue.take() is first
    queue.push_back(first)
    assert queue.take(excluded={first.blend_key}) is other
    assert queue.take(excluded={first.blend_key, other.blend_key}) is None
    assert [queue.take(), queue.take(), queue.take()] == [first, second, None]


def test_a_lower_priority_goes_first_among_requests_of_one_key_and_adapter():
    queue: Scheduler[RequestState] = Scheduler(100)
    for number, priority in enumerate([0, 5, 0, -1, 5]):
        queue.add(RequestState({"a": 1.0}, number, priority=priority))
    queue.add(RequestState({"b": 1.0}, 9, priority=7))
    order = []
    while (taken := queue.take()) is not None:
        order.append(taken.number)
        queue.charge(taken, 10)
    assert order == [3, 9, 0, 2, 1, 4]  # another adapter's turn comes as it did


def test_what_waits_can_be_removed_once():
    queue: Scheduler[RequestState] = Scheduler(4)
    one = entry("a")
    queue.add(one)
    assert queue.remove(one)
    assert not queue.remove(one)
    assert queue.take() is None
    assert queue.waiting == 0


def test_one_mix_leaves_room_for_others():
    queue: Scheduler[RequestState] = Scheduler(100)
    with pytest.raises(Busy):
        for number in range(101):
            queue.add(entry("greedy", number))
    assert queue.waiting == 75
    for name in "bcdef":
        queue.add(entry(name))
    assert queue.waiting == 80
    assert PLACES_PER_FREE_PLACE == 3


@given(places=st.integers(1, 20), names=st.lists(st.sampled_from("abcd"), max_size=60))
def test_the_queue_never_holds_more_than_its_places(places, names):
    queue: Scheduler[RequestState] = Scheduler(places)
    refused = 0
    for name in names:
        try:
            queue.add(entry(name))
        except Busy:
            refused += 1
        assert queue.waiting <= places
    assert queue.waiting + refused == len(names)
    assert queue.waiting >= min(1, len(names))


def test_retry_after_follows_the_rate_at_which_requests_begin():
    queue: Scheduler[RequestState] = Scheduler(100)
    assert queue.retry_after() == 1
    for number in range(20):
        queue.add(entry("a", number))
    for second in range(10):
        queue.began(second * 0.5)
    assert queue.retry_after() == 5  # ten of the twenty, each 0.5 s
    for second in range(50):
        queue.began(second * 100.0)
    assert queue.retry_after() == 60


def test_nothing_is_kept_when_nobody_has_anything_to_do():
    queue: Scheduler[RequestState] = Scheduler(100)
    for number in range(50):
        queue.add(entry(str(number), owner=str(number % 3)))
        taken = queue.take()
        queue.charge(taken, 5)
        queue.ended(taken)
    assert (len(queue._owner_shares), queue._adapter_shares, queue._queues) == (0, {}, {})


def test_a_count_is_kept_until_virtual_time_has_passed_it():
    queue: Scheduler[RequestState] = Scheduler(100)
    for number in range(3):
        queue.add(entry("busy", number))
    queue.add(entry("gone"))
    while (taken := queue.take()).counted_adapter != "gone":
        continue
    queue.charge(taken, 50)
    queue.ended(taken)
    adapter_shares = queue._adapter_shares[""]
    assert len(adapter_shares) == 2  # its count lies ahead
    for number in range(8):
        queue.add(entry("busy", number))
        taken = queue.take()
        queue.charge(taken, 20)
        queue.ended(taken)
    queue.add(entry("other"))
    queue.remove(next(one for one in queue.waiting_requests() if one.counted_adapter == "other"))
    assert len(adapter_shares) == 1


def test_counts_of_the_idle_are_bounded(monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_IDLE_COUNTS", 8)
    queue: Scheduler[RequestState] = Scheduler(100)
    queue.add(entry("busy"))
    queue.charge(queue.take(), 1)
    for number in range(100):
        queue.add(entry(str(number)))
        taken = queue.take()
        queue.charge(taken, 50)
        queue.ended(taken)
    assert len(queue._adapter_shares[""]) <= 9


# ----------------------------------------------------------------------------------------------
# shares


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_an_adapter_with_a_backlog_gets_its_share_beside_24_that_come_and_go(rows):
    clients = {"busy": (60, makes({"busy": 1.0}), 10)}
    clients |= {str(i): (1, makes({str(i): 1.0}), 10) for i in range(24)}
    got = simulated(clients, rows, 20_000 // rows)
    fair = sum(got.values()) / 25
    assert got["busy"] >= 0.95 * fair
    assert min(got.values()) >= 0.9 * fair


def test_many_weights_of_one_blend_are_one_adapters_share():
    clients = {"busy": (60, makes({"french": 1.0}), 10)}
    for i in range(24):
        clients[f"blend {i}"] = (1, makes({"german": 1.0, "dutch": i / 100}), 10)
    got = simulated(clients, 4, 5000)
    assert got["busy"] >= 0.95 * sum(got.values()) / 2


@pytest.mark.parametrize("tokens", [10, 3])
def test_a_key_gets_one_share_whatever_it_names(tokens):
    """One key with 24 blends and adapters, one that asks a single adapter, and one whose adapter is
    among the 24's."""
    clients = {
        "one": (20, makes({"a0": 1.0}, "one"), 10),
        "few": (4, makes({"a1": 1.0}, "few"), 10),
    }
    for i in range(24):
        clients[f"many {i}"] = (2, makes({f"a{i}": 1.0, f"a{i + 1}": i / 24}, "many"), tokens)
    got = simulated(clients, 4, 10_000)
    many = sum(count for name, count in got.items() if name.startswith("many"))
    fair = sum(got.values()) / 3
    assert got["one"] >= 0.95 * fair
    assert got["few"] >= 0.95 * fair
    assert many <= 1.05 * fair
    each = [count for name, count in got.items() if name.startswith("many")]
    assert min(each) >= 0.8 * many / 24  # and within the key, each adapter gets its own


def test_a_blend_is_counted_as_the_adapter_that_it_mostly_is():
    assert counted_as({}) == counted_as({"a": 0.0}) == ""
    assert counted_as({"a": 0.2, "b": -0.7}) == "b"
    assert counted_as({"b": 0.5, "a": 0.5}) == counted_as({"a": 0.5, "b": 0.5}) == "a"


def test_no_key_fills_the_queue_and_no_adapter_fills_its_keys_places():
    queue: Scheduler[RequestState] = Scheduler(100)
    with pytest.raises(Busy, match="the same key"):
        for number in range(101):
            queue.add(entry(str(number), owner="greedy"))  # each adapter once
    assert queue.waiting == 75
    queue.add(entry("0", owner="modest"))
    queue = Scheduler(100)
    with pytest.raises(Busy, match="the same adapter"):
        for number in range(101):
            queue.add(entry("a", number, owner="greedy"))
    assert 50 <= queue.waiting <= 60
    queue.add(entry("b", owner="greedy"))


@given(lengths=st.lists(st.integers(1, 300), max_size=20), budget=st.integers(1, 512))
def test_prompts_of_one_call_fit_and_are_hardly_padded(lengths, budget):
    taken = fit_budget(lengths, budget)
    assert taken[:1] == ([0] if lengths else [])
    assert taken == sorted(set(taken))
    if len(taken) > 1:
        area = len(taken) * max(lengths[i] for i in taken)
        assert area <= budget
        assert sum(lengths[i] for i in taken) >= 0.75 * area


def test_prompts_of_one_length_share_a_call():
    assert fit_budget([100] * 9, 512) == [0, 1, 2, 3, 4]
    assert fit_budget([600, 5], 512) == [0]
    assert fit_budget([100, 20, 90], 512) == [0, 2]
