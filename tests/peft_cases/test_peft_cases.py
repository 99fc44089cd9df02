"""PEFT's own cases: nothing is wrong, and every refusal has a reason that a user can act on."""

from __future__ import annotations

import pytest
from tests.peft_cases import matching, several, ways
from tests.peft_cases.__main__ import WAYS
from tests.peft_cases.page import page, unexplained
from tests.peft_cases.rows import Row, rows
from tests.peft_cases.ways import EQUAL, REFUSED, WRONG, Result

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

ROWS = rows()


def quick() -> set[str]:
    """The rows that bring a small model or an option that no row before them had, and one of
    transformers' models."""
    names, seen = (
        {"llama: lora, task_type=CAUSAL_LM, target_modules=all-linear, use_dora=True"},
        set[str](),
    )
    assert names <= {row.name for row in ROWS}
    for row in ROWS:
        values = {
            row.model,
            *(f"{key}={value}" if key[:3] == "use" else key for key, value in row.fields.items()),
        }
        if row.family == "LoRA, small models" and not values <= seen:
            names.add(row.name)
            seen |= values
    return names


QUICK = quick()


def right(results: list[Result]) -> None:
    assert results
    assert [result for result in results if result.status == WRONG] == []
    assert unexplained(results) == []


def _row(row: Row):
    return pytest.param(row, id=row.name, marks=[] if row.name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("row", [_row(row) for row in ROWS])
def test_a_case_of_peft(row):
    right(list(ways.results(row)))


_QUICK_PAIRS = (
    "mlp of four: lora, target_modules=[lin1] | target_modules=[lin1], r=4",
    "llama: lora, target_modules=[q_proj]",
)


def _pair(pair: several.Pair):
    slow = not pair.name.startswith(_QUICK_PAIRS)
    return pytest.param(pair, id=pair.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("pair", [_pair(pair) for pair in several.PAIRS])
def test_two_adapters_of_peft(pair):
    right(list(several.results(pair)))


def test_a_config_of_peft_means_the_same_modules():
    right(list(matching.results()))


def test_the_harness_sees_what_is_wrong(monkeypatch):
    """Half of the change, and a row that changes nothing."""
    row = next(row for row in ROWS if row.name == "mlp: lora, target_modules=[lin0]")
    load = ways.veneer.load

    def half(model, folder, **options):
        handle = load(model, folder, **options)
        next(iter(handle.changes.values())).adapter_parameters["A"].data.mul_(0.5)
        return handle

    monkeypatch.setattr(ways.veneer, "load", half)
    found = {result.way: result for result in ways.results(row)}
    assert found["load"].status == WRONG
    assert "apart" in found["load"].text
    assert found["save"].status == EQUAL
    still = Row(row.family, row.model, row.tuner, row.fields, noise=0.0)
    assert [(result.way, result.status) for result in ways.results(still)] == [("PEFT", WRONG)]


def test_the_page_counts_and_explains():
    results = [
        Result("A family", "a case", "load", EQUAL),
        Result("A family", "a case", "around", EQUAL),
        Result(
            "A family",
            "another",
            "load",
            REFUSED,
            "Found: peft_type 'IA3'. Expected: 'LORA'. Do: convert it.",
        ),
        Result("A family", "a third", "load", REFUSED, "no reason that is known"),
        Result("A family", "a fourth", "load", WRONG, "loaded: 1e-1 apart"),
    ]
    text = page(results, WAYS, "")
    assert "| A family | load | 1 | 2 | 1 |" in text
    assert "### Other tuners of PEFT: 1" in text
    assert "### Without a reason: 1" in text
    assert "| a fourth | load | loaded: 1e-1 apart |" in text
    assert [result.name for result in unexplained(results)] == ["a third"]
