"""PEFT's own cases: nothing is wrong, and every refusal has a reason that a user can act on."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from tests.peft_cases import matching, several, ways
from tests.peft_cases.page import page, unexplained
from tests.peft_cases.rows import Row, rows
from tests.peft_cases.ways import EQUAL, REFUSED, WRONG, Result
from tests.support.cells import covering

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def _quick(row: Row) -> bool:
    return (row.model, row.tuner, frozenset(row.fields)) in QUICK


def _cells() -> set:
    """Cases on small models in which every option meets every kind of layer that it meets at all, once."""
    small = [row for row in rows() if row.family == "LoRA, small models" and not row.converted]
    return {
        (row.model, row.tuner, frozenset(row.fields))
        for row in small
        if row.name in {name for name, _ in covering([(row.name, row.model) for row in small])}
    }


ROWS = rows()
QUICK: set = set()


def right(results: list[Result]) -> None:
    assert results
    assert [result for result in results if result.status == WRONG] == []
    assert unexplained(results) == []
