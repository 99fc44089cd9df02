"""Who runs next: fairness between mixes, order within one, a bounded queue."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.serve.requests import Busy
from veneer.serve.scheduler import SHARE, Scheduler, fitting, key_of


@dataclass(eq=False)
class Entry:
    key: tuple
    number: int = 0


def entry(name: str, number: int = 0) -> Entry:
    return Entry(key_of({name: 1.0} if name else {}), number)


def test_a_mix_is_one_however_it_is_written():
    assert key_of({"a": 0.5, "b": 0.5}) == key_of({"b": 0.5, "a": 0.5})
    assert key_of({}) == ()


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), costs=st.integers(1, 9), rows=st.integers(1, 4))
def test_mixes_get_as_many_tokens_as_long_as_they_ask(counts, costs, rows):
    """With requests of one size, mixes that still wait never lie more than the running requests apart."""
    queue: Scheduler[Entry] = Scheduler(1000)
    for number in range(max(counts)):
        for name, count in enumerate(counts):
            if number < count:
                queue.add(entry(str(name), number))
    served, running, waiting = Counter(), [], Counter(dict(enumerate(counts)))
    last = {}
    while queue.waiting or running:
        while len(running) < rows and queue.waiting:
            taken = queue.take()
            name = int(taken.key[0][0])
            assert taken.number == last.get(name, -1) + 1  # first come, first served
            last[name] = taken.number
            waiting[name] -= 1
            running.append([taken, costs])
        for one in running:
            queue.charge(one[0].key, 1)
            served[int(one[0].key[0][0])] += 1
            one[1] -= 1
        for one in [one for one in running if not one[1]]:
            running.remove(one)
            queue.ended(one[0].key)
        asking = [served[name] for name in waiting if waiting[name]]
        if len(asking) > 1:
            assert max(asking) - min(asking) <= rows * costs
    assert served == Counter({name: count * costs for name, count in enumerate(counts)})


def test_idleness_is_no_credit():
    queue: Scheduler[Entry] = Scheduler(100)
    for number in range(20):
        queue.add(entry("busy", number))
    for _ in range(10):
        queue.charge(queue.take().key, 100)
    for number in range(10):
        queue.add(entry("late", number))
    order = []
    for _ in range(10):
        taken = queue.take()
        order.append(taken.key[0][0])
        queue.charge(taken.key, 100)
    assert order.count("late") == 5  # not ten, as it would with the 1,000 tokens it never asked for


def test_a_mix_can_be_left_out_and_an_entry_put_back():
    queue: Scheduler[Entry] = Scheduler(100)
    first, second, other = entry("a", 0), entry("a", 1), entry("b")
    for one in (first, second, other):
        queue.add(one)
    assert queue.take() is first
    queue.push_back(first)
    assert queue.take(without={first.key}) is other
    assert queue.take(without={first.key, other.key}) is None
    assert [queue.take(), queue.take(), queue.take()] == [first, second, None]


def test_what_waits_can_be_removed_once():
    queue: Scheduler[Entry] = Scheduler(4)
    one = entry("a")
    queue.add(one)
    assert queue.remove(one)
    assert not queue.remove(one)
    assert queue.take() is None
    assert queue.waiting == 0


def test_one_mix_leaves_room_for_others():
    queue: Scheduler[Entry] = Scheduler(100)
    with pytest.raises(Busy):
        for number in range(101):
            queue.add(entry("greedy", number))
    assert queue.waiting == 75
    for name in "bcdef":
        queue.add(entry(name))
    assert queue.waiting == 80
    assert SHARE == 3


@given(places=st.integers(1, 20), names=st.lists(st.sampled_from("abcd"), max_size=60))
def test_the_queue_never_holds_more_than_its_places(places, names):
    queue: Scheduler[Entry] = Scheduler(places)
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
    queue: Scheduler[Entry] = Scheduler(100)
    assert queue.retry_after() == 1
    for number in range(20):
        queue.add(entry("a", number))
    for second in range(10):
        queue.began(second * 0.5)
    assert queue.retry_after() == 5  # ten of the twenty, each 0.5 s
    for second in range(50):
        queue.began(second * 100.0)
    assert queue.retry_after() == 60


def test_nothing_is_kept_of_a_mix_that_is_gone():
    queue: Scheduler[Entry] = Scheduler(100)
    for number in range(50):
        queue.add(entry(str(number)))
        taken = queue.take()
        queue.charge(taken.key, 5)
        queue.ended(taken.key)
    assert not queue._served
    assert not queue._running
    assert not queue._since


@given(lengths=st.lists(st.integers(1, 300), max_size=20), budget=st.integers(1, 512))
def test_prompts_of_one_call_fit_and_are_hardly_padded(lengths, budget):
    taken = fitting(lengths, budget)
    assert taken[:1] == ([0] if lengths else [])
    assert taken == sorted(set(taken))
    if len(taken) > 1:
        area = len(taken) * max(lengths[i] for i in taken)
        assert area <= budget
        assert sum(lengths[i] for i in taken) >= 0.75 * area


def test_prompts_of_one_length_share_a_call():
    assert fitting([100] * 9, 512) == [0, 1, 2, 3, 4]
    assert fitting([600, 5], 512) == [0]
    assert fitting([100, 20, 90], 512) == [0, 2]
