"""The rows to remember, and the arms that each claim is about."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from experiments.capacity import (
    BITS,
    KEY,
    LENGTH,
    PLAN,
    SYMBOLS,
    arm_name,
    claims,
    draw_rows,
    loss_of,
)
from experiments.study import FAILED, HELD, OPEN, cell_id


def test_keys_differ_and_completions_are_of_other_symbols():
    rows = draw_rows(500, 3)
    assert rows.shape == (500, KEY + LENGTH)
    assert len(rows[:, :KEY].unique(dim=0)) == 500
    assert rows[:, :KEY].min() >= SYMBOLS > rows[:, KEY:].max()
    assert torch.equal(rows, draw_rows(500, 3))
    assert not torch.equal(rows[:, KEY:], draw_rows(500, 4)[:, KEY:])


@pytest.mark.parametrize(("logit", "bits"), [(0.0, 5.0), (1e3, 0.0)])
def test_the_loss_is_that_of_completions_alone(logit, bits):
    """Of a model that gives each next symbol of a completion `logit`, and chance to the keys."""
    rows = draw_rows(7, 0)

    def model(input_ids):
        logits = torch.zeros(*input_ids.shape, SYMBOLS)
        targets = rows[:, 1:].clamp(max=SYMBOLS - 1)
        logits[:, KEY - 1 :].scatter_(2, targets[:, KEY - 1 :, None], logit)
        return SimpleNamespace(logits=logits)

    assert loss_of(model, rows).item() / math.log(2) == pytest.approx(bits)


def make_runs(shares, longer=0.6):
    """Runs with these shares by arm; the middle rate is the best. `longer`: of the arm that goes
    on."""
    numbers = {0: 115_008, 1: 2_560, 4: 10_240}
    runs = []
    for arm, setting in PLAN.arms.items():
        cells = [PLAN.cell(arm, rate, 100) for rate in PLAN.rates[arm]]
        cells += [PLAN.cell(arm, PLAN.rates[arm][1], seed) for seed in PLAN.seeds]
        for cell in cells:
            share = shares[arm] + 0.0001 * (cell["seed"] % 3)
            aside = abs(cell["rate"] - PLAN.rates[arm][1])
            extra = {"longer_share": longer + 0.001 * cell["seed"]} if setting["longer"] else {}
            result = {"share": share, "aside": aside, "numbers": numbers[setting["rank"]], **extra}
            runs.append({**cell, **result, "cell": cell_id(cell)})
    return runs


SHARES = {
    arm_name(0, 64): 0.999,
    arm_name(1, 64): 0.98,
    arm_name(4, 64): 0.995,
    arm_name(0, 256): 0.998,
    arm_name(1, 256): 0.4,
    arm_name(4, 256): 0.97,
}


def test_a_claim_is_about_its_arms():
    enough, few, tokens, floor = claims(make_runs(SHARES))
    assert [claim.verdict for claim in (enough, few, tokens, floor)] == [HELD, HELD, FAILED, HELD]
    assert "rank 1, 256 rows" not in enough.evidence
    assert few.evidence.startswith("LoRA, rank 1, 256 rows: 0.598")
    assert "rank 1, 256 rows" in tokens.evidence  # a quarter of the bits is more than the tokens


def test_sizes_that_full_fine_tuning_does_not_learn_tell_nothing():
    runs = make_runs({**SHARES, arm_name(0, 256): 0.9})
    assert [claim.verdict for claim in claims(runs)] == [OPEN, OPEN, OPEN, HELD]


def test_a_gap_at_enough_numbers_is_reported():
    runs = make_runs({**SHARES, arm_name(4, 256): 0.8}, longer=0.401)
    enough, _, _, floor = claims(runs)
    assert enough.verdict == FAILED
    assert floor.verdict == FAILED
    assert BITS == 40
