"""Every kind of layer with every variant, on a device: the numbers are those of float64, and nothing costs more launches,
waits or bytes than ``limits.txt`` says."""

from __future__ import annotations

import pytest
from tests.cuda import limits
from tests.support.emulated_device import G0

import gpu_checks
from gpu_place import Place, Skipped
from veneer.layers import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = Place(G0, quick=True)
LIMITS = limits.read() if limits.FILE.exists() else {}


def kept_or_written(found: dict[str, limits.Costs]) -> None:
    if limits.WRITE:
        limits.write(found)
        return
    problems = [one for name, costs in found.items() for one in limits.exceeded(name, costs, LIMITS)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("kind", LAYERS.names())
def test_every_variant(kind):
    found: dict[str, limits.Costs] = {}

    def watch(number, variant):
        return limits.watching(found.setdefault(f"{kind} {variant}", {}) if number == 0 else {})

    text = gpu_checks.cells(PLACE, kind, watch)
    assert "kernel" not in text
    kept_or_written(found)


@pytest.mark.parametrize("kind", LAYERS.names())
def test_rows_and_banks(kind):
    costs: limits.Costs = {}
    try:
        gpu_checks.rows(PLACE, kind, limits.watching(costs))
    except Skipped as why:
        assert kind == "parameter"
        assert "no rows" in str(why)
        return
    kept_or_written({f"{kind} rows": costs})
