"""How many tokens of prompts a step has time for."""

from __future__ import annotations

import pytest

from veneer.serve.attention import BLOCK
from veneer.serve.pace import Pace


def settle_call(gap, decode, *, fixed=0.04, token=0.002, running=8, filling=1) -> float:
    """Seconds of a call for prompts, once its size has settled, on a machine on which a call takes
    ``fixed`` seconds and ``token`` for each token."""
    pace = Pace(gap, 512)
    pace.note_fill(512, fixed + 512 * token)
    for _ in range(20):
        pace.note_decode(decode)
        tokens = pace.tokens(running, filling)
        pace.note_fill(tokens, fixed + tokens * token)
    return fixed + pace.tokens(running, filling) * token


def test_nothing_is_held_back_while_nobody_is_kept_waiting():
    pace = Pace(0.1, 512)
    pace.note_fill(512, 100.0)
    assert pace.tokens(0, 3) == 512


@pytest.mark.parametrize("gap", [0.08, 0.15, 0.5])
def test_a_call_takes_no_longer_than_the_gap(gap):
    assert gap - 2 * BLOCK * 0.002 <= settle_call(gap, decode=0.05) <= gap


def test_a_gap_is_kept_however_many_wait():
    assert settle_call(0.15, decode=0.05, filling=30, running=2) <= 0.15


def test_a_gap_that_is_too_short_still_lets_prompts_through():
    assert settle_call(0.001, decode=0.05) == 0.04 + BLOCK * 0.002


def test_without_a_gap_prompts_take_as_long_as_decoding():
    assert 0.1 - 2 * BLOCK * 0.002 <= settle_call(None, decode=0.1) <= 0.1


def test_where_more_wait_than_run_they_take_more():
    assert 0.3 <= settle_call(None, decode=0.1, filling=32, running=8) <= 0.4
    assert settle_call(None, decode=0.1, filling=400, running=1) == 0.04 + 512 * 0.002
