"""A thread that gives way pauses in its loops while others are busy, and in no other case."""

from __future__ import annotations

import threading
import time

import pytest
from tests.support.banks import Linears, save_adapters

import veneer
from veneer.fileio import throttle


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def run(busy, items=20):
    """(items that came, pauses that were taken) of a thread that gives way while ``busy()``."""
    came, pauses = [], []

    def loop():
        if busy is not None:
            throttle.throttle_loads(busy)
        for item in throttle.throttle(range(items)):
            came.append(item)
            work(throttle.SLICE_SECONDS / 2)

    before = time.sleep
    throttle.time.sleep = pauses.append
    try:
        thread = threading.Thread(target=loop)
        thread.start()
        thread.join()
    finally:
        throttle.time.sleep = before
    return came, pauses


@pytest.mark.parametrize("busy", [None, True, False])
def test_pauses(busy):
    came, pauses = run(None if busy is None else lambda: busy)
    assert came == list(range(20))
    assert (5 <= len(pauses) <= 10) if busy else not pauses
    assert list(throttle.throttle(range(3))) == [0, 1, 2]  # this thread was not told to


def test_a_bank_loads_slowly_beside_calls_and_fast_alone(tmp_path, monkeypatch):
    model, pauses = save_adapters(Linears(), tmp_path, "a", "b", "c"), []
    bank = veneer.Bank(model)
    for name in "abc":
        bank.register(name, tmp_path / name)
    monkeypatch.setattr(throttle, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(throttle, "PAUSE_SECONDS", 1e-4)
    sleep = time.sleep
    monkeypatch.setattr(
        throttle.time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds))
    )
    bank.acquire({"a": 1.0}).result(60).release()
    assert not pauses
    with bank.rows([None]):
        bank.acquire({"b": 1.0}).result(60).release()
    assert len(pauses) > 10
