"""Every kind of layer with every variant, on a device: the numbers are those of float64, forward,
backward, rows and banks never wait, and nothing costs more launches, waits or bytes than
``limits.txt`` says."""

from __future__ import annotations

import pytest
from tests.cuda import gpu_checks, limits
from tests.support.emulated_device import G0

from gpu_place import Place
from veneer.layers import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = Place(G0, quick=True)
#: whose inputs hold no rows
ROWLESS = ("parameter",)


def no_waits(found: dict[str, limits.Costs]) -> None:
    waits = {
        (name, operation): cost.waits
        for name, costs in found.items()
        for operation, cost in costs.items()
        if cost.waits and operation not in ("merge", "unmerge")
    }
    assert not waits


@pytest.mark.parametrize("kind", LAYERS.names())
def test_every_variant(kind):
    found: dict[str, limits.Costs] = {}

    def watch(number, variant):
        return limits.watching(found.setdefault(f"{kind}[{number}]-{variant}", {}))

    text = gpu_checks.cells(PLACE, kind, watch)
    assert "kernel" not in text
    no_waits(found)
    limits.kept({name: costs for name, costs in found.items() if "[0]" in name})


@pytest.mark.parametrize("kind", [kind for kind in LAYERS.names() if kind not in ROWLESS])
def test_rows_and_banks(kind):
    costs: limits.Costs = {}
    gpu_checks.rows(PLACE, kind, limits.watching(costs))
    no_waits({kind: costs})
    limits.kept({f"{kind}-rows": costs})
