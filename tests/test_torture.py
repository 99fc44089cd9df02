"""What other libraries get wrong, Veneer gets right: every case of benchmarks/torture, and proof
that its judges can fail."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch import nn

from torture_cases.cases import CASES, several
from torture_cases.ours import Veneer

#: what the numbers behind a result may be at most
BOUNDS = {
    "merged": 2e-6,  # forward - merged, relative, in float32
    "merged_bfloat16": 0.01,
    "unmerged": 0.0,  # the base before - after merging and unmerging
    "blind": 0.0,  # trained tensors without a gradient
    "wrong": 0.0,  # wrong results of threads, wrongly rounded weights
    "off": 1e-6,
    "rows": 1e-6,
    "after": 1e-6,
    "calls": 1.1,
}


def marks_of(name):
    """The quick suite leaves a case to the slow one of which a test of ``attach/test_compile.py``
    asks more, and one of which it has fewer layers below."""
    return (
        [pytest.mark.slow]
        if name in ("twelve_adapters_compiled", "adapter_128_on_64_layers")
        else []
    )


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=marks_of(case.name)) for case in CASES]
)
def test_veneer_gets_it_right(case):
    result = case.run(Veneer())
    assert result.ok, result.text
    for name, bound in BOUNDS.items():
        assert result.measures.get(name, 0.0) <= bound, f"{name}: {result.measures[name]}"


def test_the_128th_adapter_costs_what_the_first_does(monkeypatch):
    monkeypatch.setattr(several, "LAYERS", 6)
    (case,) = [case for case in CASES if case.name == "adapter_128_on_64_layers"]
    result = case.run(Veneer())
    assert result.ok, result.text
    assert result.measures["calls"] <= BOUNDS["calls"]


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


def select_globally(library, model, x, selection, through=None):
    """As a library that keeps the selection in the model."""
    SHARED["selection"] = selection
    time.sleep(1e-5)
    return library.call(model, x, SHARED["selection"], through)


def select_and_leak(library, model, x, selection, through=None):
    """As a library that does not clean up after an exception: what failed is what runs next."""
    selection = SHARED.pop("leaked", selection)
    try:
        return library.call(model, x, selection, through)
    except ArithmeticError:
        SHARED["leaked"] = None
        raise


def attach_looking_at_everything(library, model, *args, **options):
    for _ in model.modules():
        pass
    return library.attach(model, *args, **options)


FAULTS = [
    ("conv2d_circular", adapter(merge=nothing, unmerge=nothing), "forward differs from merged"),
    ("conv2d_circular", adapter(unmerge=nothing), "off by .* after unmerging"),
    ("conv2d_circular", adapter(parameters=lambda _: []), "attaches nothing"),
    ("conv2d_circular", adapter(parameters=a_stranger), "no gradient for 1 of"),
    ("conv2d_circular", adapter(parameters=copies), "no effect in forward"),
    ("merge_once", adapter(unmerge=restore_nearly), "off by"),
    ("merge_rounds_once", adapter(merge=add_delta_in_bfloat16), "not correctly rounded"),
    ("merge_is_atomic", adapter(merge=add_nan), "without an error"),
    ("merge_of_nan", adapter(merge=add_nan, unmerge=nothing), "not finite"),
    ("adapter_edited_while_merged", adapter(unmerge=nothing), "off by"),
    ("weighted_rslora_cat", library(combine=twice_as_much), "2.00 times as large"),
    ("weighted_under_an_existing_name", library(combine=nothing), "accepted silently"),
    ("two_threads_one_adapter_each", library(call=select_globally), "of 600 results are wrong"),
    ("exception_during_a_mixed_batch", library(call=select_and_leak), "next plain call"),
    ("load_on_another_base", library(load=nothing), "accepted silently"),
    ("rank_1000_on_16_by_16", library(attach=nothing), "accepted silently"),
    pytest.param(
        "adapter_128_on_64_layers",
        library(attach=attach_looking_at_everything),
        "times the calls",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    FAULTS,
    ids=lambda value: value if isinstance(value, str) else "broken",
)
def test_the_judges_can_fail(name, wrong, said):
    (case,) = [case for case in CASES if case.name == name]
    result = case.run(wrong)
    assert result.ok is False
    assert re.search(said, result.text)
