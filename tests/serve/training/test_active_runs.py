"""Waiting requests of runs: idle runs and clients that poll leave nothing in memory."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.serve.training.test_service import opened, texts, trained_run
from tests.support.api_server import listening
from tests.support.service import open_service
from tests.support.training_client import Client

from veneer.serve.training.active_runs import Promise
from veneer.serve.training.training_service import training_of
from veneer.serve.training.worker import PASS


def test_an_idle_run_is_not_active(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), runs=2)
    worker = training_of(service).worker
    with listening(service) as (url, _):
        client = Client(url)
        runs = [client.run(number) for number in range(5)]
        for run in runs:
            run.pass_(texts(0)), run.step()
        assert worker.active_runs.keys() == {run.id for run in runs[-2:]}
        assert len(worker.queue.runs_by_adapter) == 2
        assert not worker.queue.busy_runs
        for run in runs:
            client.result(client.post("unload_model", model_id=run.id))
        assert not worker.active_runs
        again = worker.queue.accept(runs[0].id, 1, PASS, b"")  # as after a connection that broke
        assert again == 1
        worker.submit(lambda: None).result(timeout=20)
        assert not worker.active_runs
        client.post("session_heartbeat", session_id=client.session)
        trained_run(Client(url))
        assert len(worker.active_runs) == 1


def test_a_request_whose_turn_does_not_come_costs_no_turn_anything(base, tmp_path):
    with opened(base, tmp_path) as (url, server):
        worker = training_of(server.config.app.state.service).worker
        client = Client(url)
        run = client.run()
        body = run.body(texts(0), "cross_entropy")
        body.seq_id = 9
        run.send(body.SerializeToString())
        assert worker.active_runs[run.id].waiting_requests.keys() == {9}
        assert not worker.queue.ready_runs()
        assert not worker.queue.busy_runs


def test_a_request_that_comes_while_its_run_is_dropped_is_done(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    worker, store = training_of(service).worker, training_of(service).store
    with listening(service) as (url, _):
        run = trained_run(Client(url), 1)
        real = store.add_request

        def add_request(*args):
            worker.submit(lambda: worker.memory.evict(worker.active_runs[run.id])).result(
                timeout=20
            )
            assert run.id not in worker.active_runs
            return real(*args)

        monkeypatch.setattr(store, "add_request", add_request)
        assert run.pass_(texts(1)).loss > 0
        assert run.step()["metrics"]["unclipped_grad_l2:mean"] > 0


@pytest.mark.parametrize("times", [1, 100])
def test_a_promise_that_is_asked_for_again_and_again_holds_one_callback(times):
    promise = Promise()

    async def ask():
        for _ in range(times):
            await asyncio.wait([promise.awaitable()], timeout=0)
        callbacks = len(promise._done_callbacks)
        waiting = promise.awaitable()
        threading.Thread(target=promise.set_result, args=[7]).start()
        return callbacks, await waiting

    assert asyncio.run(ask()) == (1, 7)
    assert asyncio.run(ask_again(promise)) == 7


async def ask_again(promise):
    """In another event loop."""
    return await promise.awaitable()


def test_a_client_that_polls_leaves_nothing_at_its_promise(it, client):
    run, go = client.run(), threading.Event()
    worker = it.training.worker
    worker.submit(lambda: go.wait(20))
    promised = run.ask_pass(texts(0))
    worker_promise = worker.queue.promise(run.id, run.number)
    try:
        for _ in range(3):
            with pytest.raises(Exception, match="timed out"):
                client.http.post(
                    "/retrieve_future", json={"request_id": promised["request_id"]}, timeout=0.2
                )
        assert len(worker_promise._done_callbacks) <= 1
    finally:
        go.set()
    assert run.wait_for_pass(promised).loss > 0
