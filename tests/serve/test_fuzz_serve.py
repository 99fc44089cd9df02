"""Hostile bodies of the whole API: no error of the server, no answer that hangs, memory that stays
flat. `make fuzz-serve SEED=1` sends 5,000 of them."""

from __future__ import annotations

import pytest
from tests.stress.fuzz_serve import WARM, run
from tests.support.hostile_bodies import ROUTES, hostile_request

FEW, MANY = 300, 5000


def test_a_seed_has_the_same_bodies_each_time_and_all_routes():
    requests = [hostile_request(1, number) for number in range(FEW)]
    assert requests == [hostile_request(1, number) for number in range(FEW)]
    assert requests != [hostile_request(2, number) for number in range(FEW)]
    assert {request.route for request in requests} == ROUTES.keys()


def test_hostile_bodies(tmp_path):
    report = run(tmp_path, 1, range(FEW))
    assert report.problems == []
    assert report.statuses[200] > FEW / 10  # not all of them are refused at the door


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_hostile_bodies_cost_no_memory(tmp_path):
    report = run(tmp_path, 2, range(MANY))
    assert report.problems == []
    warm, last = report.memory
    assert WARM < MANY
    assert last <= 1.1 * warm
