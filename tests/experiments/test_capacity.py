"""The rows to remember, and which pairs of a rank and a size each claim is about."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from experiments.capacity import BITS, KEY, LENGTH, SYMBOLS, claims, loss_of, rows_of


def test_keys_differ_and_completions_are_of_other_symbols():
    rows = rows_of(500, 3)
    assert rows.shape == (500, KEY + LENGTH)
    assert len(rows[:, :KEY].unique(dim=0)) == 500
    assert rows[:, :KEY].min() >= SYMBOLS > rows[:, KEY:].max()
    assert torch.equal(rows, rows_of(500, 3))
    assert not torch.equal(rows[:, KEY:], rows_of(500, 4)[:, KEY:])


@pytest.mark.parametrize(("sure", "bits"), [(0.0, 5.0), (1e3, 0.0)])
def test_the_loss_is_that_of_completions_alone(sure, bits):
    """Of a model that gives each next symbol of a completion `sure`, and chance to the keys."""
    rows = rows_of(7, 0)

    def model(input_ids):
        logits = torch.zeros(*input_ids.shape, SYMBOLS)
        known = rows[:, 1:].clamp(max=SYMBOLS - 1)
        logits[:, KEY - 1 :].scatter_(2, known[:, KEY - 1 :, None], sure)
        return SimpleNamespace(logits=logits)

    assert loss_of(model, rows).item() / math.log(2) == pytest.approx(bits)


def run(rows, rank, share, *, of_bits=1.0, longer=None):
    numbers = round(of_bits * rows * BITS)
    found = {
        "rows": rows,
        "rank": rank,
        "numbers": numbers,
        "judged": [{"share": share}],
        "steps": 1,
        "rate": 1e-3,
    }
    return {**found, "longer": [{"share": longer}] if longer is not None else []}


def test_a_claim_is_about_its_own_pairs():
    full = [run(64, 0, 1.0), run(256, 0, 0.99), run(1024, 0, 0.5)]
    runs = [
        *full, run(64, 1, 0.96), run(256, 1, 0.7, of_bits=0.25), run(1024, 4, 0.1), run(256, 4, 0.98, longer=0.99),
    ]  # fmt: skip
    enough, few, tokens, floor = claims(runs)
    assert enough.held  # 64 and 256 rows; what full fine-tuning did not learn is left out
    assert "1,024" not in enough.found
    assert few.held
    assert few.found == "rank 1, 256 rows: 0.290 less"
    assert tokens.held is False  # a quarter of the bits is more than the tokens, a fifth
    assert floor.held


def test_a_gap_at_enough_numbers_is_told():
    enough, few, _, floor = claims([run(64, 0, 1.0), run(64, 1, 0.9)])
    assert enough.held is False
    assert few.held is None
    assert floor.held is None
    assert claims([run(64, 0, 0.5), run(64, 1, 0.5)])[0].held is None
