"""What other libraries get wrong, Veneer gets right: every case of benchmarks/torture, and proof
that its judges can fail."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from torture_cases.cases import CASES, run_case
from torture_cases.judges import is_refusal
from torture_cases.library import CRASHES, REFUSES, RIGHT, UNCHECKED, WRONG, NotOffered
from torture_cases.veneer_library import Veneer

#: what the numbers behind a result may be at most
BOUNDS = {
    "merged": 2e-6,  # forward - merged, relative, in float32
    "unmerged": 0.0,  # the base before - after merging and unmerging
    "blind": 0.0,  # adapter tensors without a gradient
    "wrong": 0.0,  # wrongly rounded weights
    "off": 1e-6,
    "rows": 1e-6,
    "after": 1e-6,
}


def find_case(name):
    (case,) = [case for case in CASES if case.name == name]
    return case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_veneer_gets_it_right(case):
    result = run_case(case, Veneer())
    assert result.outcome == RIGHT, result.text
    for name, bound in BOUNDS.items():
        assert result.measures.get(name, 0.0) <= bound, f"{name}: {result.measures[name]}"


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


class Faulty:
    """Something of Veneer in which some methods are others; they get it as their first argument."""

    def __init__(self, own: Any, **faults: Any) -> None:
        self._own, self._faults = own, faults

    def __getattr__(self, name: str) -> Any:
        if name in self._faults:
            return lambda *args, **options: self._faults[name](self._own, *args, **options)
        return getattr(self._own, name)


def adapter(**faults):
    """A library whose adapters have these faults."""
    return Faulty(
        Veneer(),
        attach=lambda library, *args, **options: Faulty(library.attach(*args, **options), **faults),
    )


def library(**faults):
    return Faulty(Veneer(), **faults)


def nothing(*_, **__):
    """Silently does nothing."""


def add_delta_in_bfloat16(adapter, **_):
    adapter.weights()["layer.weight"].data.add_(adapter.delta("layer").bfloat16())


def add_nan(adapter, **_):
    weights = list(adapter.weights().values())
    weights[0].data.fill_(float("nan"))


def restore_nearly(adapter):
    adapter.unmerge()
    adapter.weights()["layer.weight"].data.mul_(1.01)


def a_stranger(adapter):
    return [*adapter.parameters(), nn.Parameter(torch.ones(2))]


def copies(adapter):
    return [nn.Parameter(parameter.detach().clone()) for parameter in adapter.parameters()]


def twice_as_much(library, *args, **options):
    combined = library.combine(*args, **options)
    combined.parameters()[1].data.mul_(2)
    return combined


SHARED: dict[str, Any] = {}


def select_and_leak(library, model, x, selection):
    """As a library that does not clean up after an exception: what failed is what runs next."""
    selection = SHARED.pop("leaked", selection)
    try:
        return library.call(model, x, selection)
    except ArithmeticError:
        SHARED["leaked"] = None
        raise


def crash(*_, **__):
    raise IndexError("list index out of range")


def refuse(*_, **__):
    raise ValueError("no such layer")


def do_not_offer(*_, **__):
    raise NotOffered("has no such layer")


FAULTS = [
    ("conv2d_circular", adapter(merge=nothing, unmerge=nothing), WRONG, "differs from merged"),
    ("conv2d_circular", adapter(unmerge=nothing), WRONG, "off by .* after unmerging"),
    ("conv2d_circular", adapter(parameters=lambda _: []), UNCHECKED, "attaches nothing"),
    ("conv2d_circular", adapter(parameters=a_stranger), WRONG, "no gradient for 1 of"),
    ("conv2d_circular", adapter(parameters=copies), WRONG, "no effect in forward"),
    ("conv2d_circular", adapter(merge=crash), CRASHES, "IndexError"),
    ("conv2d_circular", library(attach=refuse), REFUSES, "ValueError: no such layer"),
    ("conv2d_circular", library(attach=do_not_offer), REFUSES, "not offered"),
    ("merge_100_times", adapter(unmerge=restore_nearly), WRONG, "off by"),
    ("safe_merge_rounds_once", adapter(merge=add_delta_in_bfloat16), WRONG, "not correctly"),
    ("safe_merge_is_atomic", adapter(merge=add_nan), UNCHECKED, "is merged"),
    ("merge_of_nan", adapter(merge=add_nan, unmerge=nothing), UNCHECKED, "not finite"),
    ("adapter_edited_while_merged", adapter(unmerge=nothing), UNCHECKED, "off by"),
    ("weighted_rslora", library(combine=twice_as_much), WRONG, "2.00 times as large"),
    ("weighted_under_an_existing_name", library(combine=nothing), UNCHECKED, "accepted"),
    ("exception_in_a_mixed_batch", library(call=select_and_leak), WRONG, "next plain call"),
    ("load_on_another_base", library(load=nothing), UNCHECKED, "accepted"),
    ("rank_1000_on_16_by_16", library(attach=nothing), UNCHECKED, "accepted"),
    ("rank_1000_on_16_by_16", library(attach=crash), CRASHES, "IndexError"),
    ("rank_1000_on_16_by_16", library(attach=refuse), RIGHT, "refused"),
]


@pytest.mark.parametrize(
    ("name", "broken", "outcome", "text"),
    FAULTS,
    ids=lambda value: value if isinstance(value, str) else "broken",
)
def test_the_judges_can_fail(name, broken, outcome, text):
    result = run_case(find_case(name), broken)
    assert result.outcome == outcome
    assert re.search(text, result.text)


@pytest.mark.parametrize(
    ("action", "refuses"),
    [(crash, False), (refuse, True), (lambda: torch.ones(2) @ torch.ones(3), False)],
)
def test_a_raise_with_a_message_is_a_refusal(action, refuses):
    with pytest.raises((IndexError, ValueError, RuntimeError)) as raised:
        action()
    assert is_refusal(raised.value) is refuses
