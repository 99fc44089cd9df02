"""A thousand runs of which fifty are in memory: a step on any of them, memory that stays."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import pytest
from tests.serve.training.conftest import Local
from tests.serve.training.test_service import texts
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.training_client import Client, Run

from veneer.serve.training.training_service import training_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RUNS, RESIDENT, EARLY = 1000, 50, 200


def resident_bytes() -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def step(run: Run, number: int) -> tuple[float, float]:
    """A step of a run that is at its ``number``-th: its loss, and the seconds until it is made."""
    start = time.perf_counter()
    passed, stepped = run.ask_pass(texts(number)), run.ask_step(0.02)
    loss = run.wait_for_pass(passed).loss
    run.client.result(stepped)
    return loss, time.perf_counter() - start


def test_a_thousand_runs_of_which_fifty_are_in_memory(base, tmp_path, capsys):
    service = open_service(base, None, train=str(tmp_path), runs=RESIDENT)
    held = training_of(service).worker.trainer.runs
    with listening(service) as (url, _):
        client, runs, early = Client(url), [], 0
        for number in range(RUNS):
            runs.append(client.run(number, seed=number))
            step(runs[-1], 0)
            assert len(held) <= RESIDENT
            if number == EARLY:
                early = resident_bytes()
        grown = (resident_bytes() - early) / (RUNS - EARLY)
        size = sum(parameter.nbytes for parameter in next(iter(held.values())).parameters())
        warm = [step(runs[-1 - number], 1)[1] for number in range(20)]
        cold, chosen = [], random.Random(1).sample(range(RUNS - RESIDENT), 40)
        for number in chosen:
            loss, seconds = step(runs[number], 1)
            cold.append(seconds)
            if len(cold) <= 5:
                local = Local(seed=number)
                local.pass_(texts(0)), local.step(0.02)
                assert loss == pytest.approx(local.pass_(texts(1)), rel=1e-3)
        with capsys.disabled():
            print(
                f"\n{RUNS} runs of {size / 1e3:.0f} kB and as much twice of their optimiser: {grown / 1e3:.1f} kB more"
            )
            print(
                f"memory each; a step {statistics.median(warm) * 1e3:.0f} ms, of one that comes back",
                end=" ",
            )
            print(f"{statistics.median(cold) * 1e3:.0f} ms (at most {max(cold) * 1e3:.0f})")
        assert grown < size  # of each, were it held, there would be three times as much
