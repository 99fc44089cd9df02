"""How many tokens of prompts a step has time for."""

from __future__ import annotations

import pytest

from veneer.serve.prefill_budget import (
    MAX_TOKENS_TOGETHER,
    PROMPT_SHARE,
    TOKEN_MULTIPLE,
    PrefillBudget,
)

#: of a machine: seconds of a call, and of a prompt's token in it
CALL, TOKEN = 0.04, 0.002


def settle_step(gap, decode, *, running=8, filling=1) -> tuple[int, float]:
    """The tokens of a step once they have settled, and the seconds that they add to ``decode``."""
    prefill_budget = PrefillBudget(gap, 512)
    prefill_budget.note_fill(512, CALL + 512 * TOKEN)
    tokens, added = 0, 0.0
    for number in range(40):
        if not number % 8:
            prefill_budget.note_decode(running, decode)
        tokens = prefill_budget.tokens(running, filling)
        if tokens <= MAX_TOKENS_TOGETHER:
            added = tokens * TOKEN
            prefill_budget.note_together(tokens, decode + added)
        else:
            added = CALL + tokens * TOKEN
            prefill_budget.note_fill(tokens, added)
    return tokens, added


def test_nothing_is_held_back_while_nobody_is_kept_waiting():
    prefill_budget = PrefillBudget(0.1, 512)
    prefill_budget.note_fill(512, 100.0)
    assert prefill_budget.tokens(0, 3) == 512


def test_it_is_measured_first_how_long_rows_take():
    prefill_budget = PrefillBudget(None, 512)
    prefill_budget.note_fill(512, 1.0)
    assert prefill_budget.tokens(1, 1) == 0
    prefill_budget.note_decode(1, 0.1)
    assert prefill_budget.tokens(1, 1) > 0


def test_the_time_of_further_rows_is_no_time_of_prompts():
    """Prompts arrive without a pause, and the rows that run become 16."""
    prefill_budget, row = PrefillBudget(None, 512), 0.01
    prefill_budget.note_fill(512, CALL + 512 * TOKEN)
    tokens = 0
    for step in range(64):
        rows = 1 + step // 4
        tokens = prefill_budget.tokens(rows, 1)
        if tokens:
            prefill_budget.note_together(tokens, rows * row + tokens * TOKEN)
        else:
            prefill_budget.note_decode(rows, rows * row)
    assert (
        PROMPT_SHARE * 12 * row - 2 * TOKEN_MULTIPLE * TOKEN
        <= tokens * TOKEN
        <= PROMPT_SHARE * 16 * row
    )
    tokens = prefill_budget.tokens(2, 1)  # the others have ended
    assert tokens == 0
    prefill_budget.note_decode(2, 2 * row)
    assert (
        0 < prefill_budget.tokens(2, 1) * TOKEN <= PROMPT_SHARE * 2 * row + TOKEN_MULTIPLE * TOKEN
    )


@pytest.mark.parametrize("gap", [0.08, 0.15, 0.5])
def test_prompts_take_the_gap_and_no_more(gap):
    _, added = settle_step(gap, decode=0.05)
    assert gap - 2 * TOKEN_MULTIPLE * TOKEN <= added <= gap


def test_a_gap_is_kept_however_many_wait():
    assert settle_step(0.15, decode=0.05, filling=30, running=2)[1] <= 0.15


def test_a_gap_that_is_too_short_still_lets_prompts_through():
    assert settle_step(0.001, decode=0.05)[0] == TOKEN_MULTIPLE


def test_without_a_gap_prompts_take_a_share_of_what_decoding_takes():
    assert (
        PROMPT_SHARE * 0.1 - 2 * TOKEN_MULTIPLE * TOKEN
        <= settle_step(None, decode=0.1)[1]
        <= PROMPT_SHARE * 0.1
    )


def test_a_prompt_that_is_scored_has_a_price_of_its_own():
    prefill_budget = PrefillBudget(0.15, 512, max_scored_tokens=64)
    assert prefill_budget.tokens(0, 1, scored=True) == 64
    prefill_budget.note_fill(512, 512 * TOKEN)
    assert prefill_budget.tokens(8, 1, scored=True) == 0  # it is measured first how long rows take
    prefill_budget.note_decode(8, 0.05)
    assert prefill_budget.tokens(8, 1, scored=True) == 64
    prefill_budget.note_fill(64, 64 * 3 * TOKEN, scored=True)
    assert prefill_budget.tokens(8, 1, scored=True) == 24  # 0.15 s of 0.006 s each
    assert prefill_budget.tokens(8, 1) > 64


def test_where_more_wait_than_run_they_take_more():
    _, added = settle_step(None, decode=0.1, filling=16, running=8)
    assert PROMPT_SHARE * 0.3 <= added <= PROMPT_SHARE * 0.4
    assert settle_step(None, decode=0.1, filling=400, running=1)[0] == 512


def test_a_step_of_many_adapters_computes_few_tokens_together():
    prefill_budget = PrefillBudget(None, 512)
    prefill_budget.note_fill(512, CALL + 512 * TOKEN)
    prefill_budget.note_decode(8, 0.1)
    prefill_budget.note_together(
        16, 0.1 + 16 * TOKEN / 8
    )  # which is cheaper than a call of their own
    assert prefill_budget.tokens(8, 1, max_shared_tokens=128) == 56
    assert prefill_budget.tokens(8, 1, max_shared_tokens=32) == 32
