"""The tree of cached prefixes: what is found, for whom, and what goes first."""

from __future__ import annotations

import gc

import torch
from tests.support.serving import Adapter

from veneer.models.decode.attention import BLOCK
from veneer.models.decode.slots import Budget
from veneer.serve.prefixes import Namespace, Prefixes

BASE = Namespace((), "")


def ids_of(*numbers: int) -> list[int]:
    """The tokens of blocks, each by a number of its own."""
    return [1000 * number + i for number in numbers for i in range(BLOCK)]


def open_cache(blocks: int | None = None) -> Prefixes:
    return Prefixes(10, Budget(None if blocks is None else 10 * blocks))


def add(prefixes: Prefixes, *numbers: int, namespace: Namespace = BASE) -> None:
    def read(first: int, stop: int):
        return [torch.tensor(numbers[index]) for index in range(first, stop)]

    prefixes.add(namespace, ids_of(*numbers), BLOCK * len(numbers), read)


def find_numbers(prefixes: Prefixes, *numbers: int, namespace: Namespace = BASE) -> list[int]:
    """The numbers of the cached blocks with which a prompt of these and another token begins."""
    return [int(block.data) for block in prefixes.find(namespace, [*ids_of(*numbers), 7])]


def test_the_longest_beginning_is_found():
    prefixes = open_cache()
    add(prefixes, 1, 2, 3)
    add(prefixes, 1, 2, 4, 5)
    assert find_numbers(prefixes, 1, 2, 3) == [1, 2, 3]
    assert find_numbers(prefixes, 1, 2, 4, 6) == [1, 2, 4]
    assert find_numbers(prefixes, 2, 3) == []
    assert len(prefixes) == 5
    assert prefixes.budget.prefix_bytes == 50


def test_the_last_token_of_a_prompt_is_never_found():
    prefixes = open_cache()
    add(prefixes, 1, 2)
    assert len(prefixes.find(BASE, ids_of(1, 2))) == 1
    assert len(prefixes.find(BASE, ids_of(1, 2)[:-1])) == 1
    assert len(prefixes.find(BASE, ids_of(1)[:1])) == 0


def test_blocks_are_only_of_whole_ones():
    prefixes = open_cache()
    prefixes.add(BASE, ids_of(1, 2), 2 * BLOCK - 1, lambda first, stop: [torch.tensor(1)])
    assert find_numbers(prefixes, 1, 2) == [1]


def test_what_was_used_longest_ago_goes_first_and_never_before_what_is_behind_it():
    prefixes = open_cache(4)
    add(prefixes, 1, 2)
    add(prefixes, 3, 4)
    assert find_numbers(prefixes, 1, 2) == [1, 2]
    add(prefixes, 5)
    assert find_numbers(prefixes, 3, 4) == [3]
    add(prefixes, 6)
    assert find_numbers(prefixes, 3, 4) == [3]  # it had been asked for since
    assert find_numbers(prefixes, 1, 2) == [1]
    assert prefixes.budget.prefix_bytes == 40


def test_a_beginning_longer_than_the_budget_is_cached_as_far_as_it_fits():
    prefixes = open_cache(3)
    add(prefixes, 1, 2, 3, 4, 5)
    assert find_numbers(prefixes, 1, 2, 3, 4, 5) == [1, 2, 3]
    add(prefixes, 1, 2, 3, 4, 5)
    assert find_numbers(prefixes, 1, 2, 3, 4, 5) == [1, 2, 3]
    prefixes.budget.row_bytes = 30
    add(prefixes, 9)
    assert find_numbers(prefixes, 9) == []
    assert len(prefixes) == 0  # rows have taken all of it


def test_bytes_are_given_up_when_others_need_them():
    prefixes = open_cache()
    add(prefixes, 1, 2, 3)
    prefixes.evict(11)
    assert find_numbers(prefixes, 1, 2, 3) == [1]
    prefixes.evict(1000)
    assert (len(prefixes), prefixes.budget.prefix_bytes, prefixes._roots) == (0, 0, {})


def test_what_nobody_asks_for_expires():
    prefixes = open_cache()
    add(prefixes, 1, 2)
    prefixes.expire(60)
    assert find_numbers(prefixes, 1, 2) == [1, 2]
    prefixes.expire(0)
    assert prefixes.oldest_use is None


def test_nothing_is_shared_between_adapters_weights_or_salts():
    prefixes = open_cache()
    first, second = Adapter("1"), Adapter("2")
    add(prefixes, 1, namespace=Namespace([(first, 1.0)], "a"))
    assert find_numbers(prefixes, 1, namespace=Namespace([(first, 1.0)], "a")) == [1]
    assert find_numbers(prefixes, 1, namespace=Namespace([(first, 1.0), (second, 0.0)], "a")) == [1]
    for adapters, salt in (
        ([(first, 1.0)], "b"),
        ([(first, 0.5)], "a"),
        ([(second, 1.0)], "a"),
        ([(first, 1.0), (second, 1.0)], "a"),
        ([], "a"),
    ):
        assert find_numbers(prefixes, 1, namespace=Namespace(adapters, salt)) == []


def test_what_was_computed_with_an_adapter_goes_with_it():
    prefixes, adapter = open_cache(), Adapter("1")
    add(prefixes, 1, 2, namespace=Namespace([(adapter, 1.0)], ""))
    add(prefixes, 1)
    assert len(prefixes) == 3
    del adapter
    gc.collect()
    assert find_numbers(prefixes, 1) == [1]
    assert (len(prefixes), prefixes.budget.prefix_bytes) == (1, 10)


def test_blocks_before_an_invocation_are_the_base_s():
    prefixes, adapters = open_cache(), [(Adapter("a"), 1.0)]
    invoked = [Namespace(adapters, "", start) for start in (2 * BLOCK, BLOCK + 3, BLOCK + 5)]
    add(prefixes, 1, 2)
    assert [find_numbers(prefixes, 1, 2, namespace=each) for each in invoked] == [[1, 2], [1], [1]]
    add(prefixes, 1, 2, 3, namespace=invoked[0])
    add(prefixes, 1, 2, 3, namespace=invoked[1])
    assert len(prefixes) == 5  # 1 and 2 of the base; 3 of the first; 2 and 3 of the second
    assert find_numbers(prefixes, 1, 2, 3) == [1, 2]
    assert [find_numbers(prefixes, 1, 2, 3, namespace=each) for each in invoked] == [
        [1, 2, 3], [1, 2, 3], [1],
    ]  # fmt: skip
    assert find_numbers(prefixes, 1, 2, namespace=Namespace(adapters, "")) == []
    assert find_numbers(prefixes, 1, 2, namespace=Namespace(adapters, "other", 2 * BLOCK)) == []
    assert find_numbers(prefixes, 1, 2, namespace=Namespace((), "", float("inf"))) == [1, 2]


def test_equal_tokens_have_equal_keys_up_to_an_invocation():
    first, second = (Namespace([(Adapter(name), 1.0)], "", BLOCK) for name in "ab")
    assert first.shared_length(BLOCK, second) == BLOCK
    assert first.shared_length(BLOCK, BASE) == BLOCK
    for other in (second, BASE, Namespace([(Adapter("c"), 1.0)], "", 2 * BLOCK)):
        assert first.shared_length(2 * BLOCK + 1, other) == BLOCK
        assert other.shared_length(2 * BLOCK + 1, first) == BLOCK
    assert first.shared_length(2 * BLOCK, first) == 2 * BLOCK
    assert first.shared_length(BLOCK, Namespace([(Adapter("a"), 1.0)], "")) == 0
