"""What fails of one run stays with that run: its owner is told, the others go on, the server ends
cleanly."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from tests.serve.training.conftest import Local
from tests.serve.training.test_service import TEXT, opened, texts, trained_run
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.training_client import Client, Failed, Run, datum

from veneer.errors import AdapterError
from veneer.serve.training import training_service as training_
from veneer.serve.training.operations import adapter_folder
from veneer.serve.training.training_service import training_of
from veneer.serve.training.worker import PASS, Worker

#: settings of a step that are allowed, and take a run out of all bounds at the second time
WILD = {"rate": 10.0, "beta2": 0.0, "eps": 1e-20}


def failure_of(ask):
    """(words, category) of the error that a request comes to. The error itself would keep its
    client for long."""
    try:
        ask()
    except Failed as error:
        return str(error), error.category
    raise AssertionError("it did not fail")


def diverge(run):
    """Two steps, of which the second fails; its error."""
    run.pass_(texts(0)), run.step(**WILD), run.pass_(texts(1))
    return failure_of(lambda: run.step(**WILD))


def continued(run, url):
    """The same run by a client of another server."""
    client = Client(url)
    client.session = run.client.session
    return Run(client, run.id, run.number)


def fail_saves(monkeypatch, trainer, name, error):
    """Let no state of a run be written."""
    real = trainer.save

    def save(run, *args, **options):
        if run == name:
            raise error
        return real(run, *args, **options)

    monkeypatch.setattr(trainer, "save", save)


def test_a_run_that_diverges_is_told_and_holds_up_nobody(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    with listening(service) as (url, _):
        diverged = trained_run(Client(url))
        saved = diverged.save("good")
        failed = diverge(diverged)
        assert failed[1] == "user"
        assert "load a checkpoint" in failed[0]
        assert str(tmp_path) not in failed[0]
        assert not training_of(service).worker.trainer.runs
        other = Client(url).run(seed=1)
        assert other.pass_(texts(0)).loss == pytest.approx(Local(seed=1).pass_(texts(0)), rel=1e-4)
        for ask in (
            diverged.step,
            lambda: diverged.pass_(texts(0)),
            lambda: diverged.save("bad"),
            diverged.sampler,
        ):
            assert failure_of(ask) == failed
        assert [*training_of(service).worker.trainer.runs] == [
            training_of(service).worker.active_runs[other.id].adapter_name
        ]
        bodies = [row["body"] for row in training_of(service).store.requests_after(diverged.id, -1)]
        assert all(bodies[-8:])  # the journal is kept
    with opened(base, tmp_path, runs=1) as (url, _):
        diverged = continued(diverged, url)
        assert failure_of(lambda: diverged.pass_(texts(0))) == failed
        diverged.client.result(diverged.ask("load_weights", path=saved, optimizer=True))
        revived = diverged.pass_(texts(2)).loss
    with opened(base, tmp_path, runs=1) as (url, _):
        client = Client(url)
        twin = client.run(seed=1)
        client.result(twin.ask("load_weights", path=saved, optimizer=True))
        assert twin.pass_(texts(2)).loss == pytest.approx(revived, rel=1e-4)
        assert continued(diverged, url).pass_(texts(2), backward=False).loss == pytest.approx(
            revived, rel=1e-4
        )


def test_a_run_that_diverged_can_be_unloaded(base, tmp_path):
    with opened(base, tmp_path, runs=1) as (url, _):
        run = Client(url).run()
        diverge(run)
        assert (
            run.client.result(run.client.post("unload_model", model_id=run.id))["model_id"]
            == run.id
        )


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        sqlite3.OperationalError("disk I/O error"),
        RuntimeError("a fault"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_state_that_cannot_be_written_now_costs_time_alone(
    base, tmp_path, monkeypatch, caplog, error
):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    worker = training_of(service).worker
    with listening(service) as (url, _):
        run, local = Client(url).run(seed=1), Local(seed=1)
        run.pass_(texts(0)), run.step(0.02)
        local.pass_(texts(0)), local.step(0.02)
        fail_saves(monkeypatch, worker.trainer, worker.active_runs[run.id].adapter_name, error)
        other = Client(url).run(seed=2)
        assert other.pass_(texts(1)).loss == pytest.approx(Local(seed=2).pass_(texts(1)), rel=1e-4)
        assert run.pass_(texts(1)).loss == pytest.approx(
            local.pass_(texts(1)), rel=1e-3
        )  # out of the journal
    records = [record for record in caplog.records if "not be written" in record.getMessage()]
    assert records
    # a full disk needs no traceback; a fault does
    assert all(bool(record.exc_info) is isinstance(error, RuntimeError) for record in records)


def test_numbers_that_no_state_can_hold_are_their_runs_failure(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    worker = training_of(service).worker
    with listening(service) as (url, _):
        run = trained_run(Client(url))
        path = str(tmp_path / "runs" / "1")
        fail_saves(
            monkeypatch,
            worker.trainer,
            worker.active_runs[run.id].adapter_name,
            AdapterError(f"{path} was not written"),
        )
        other = trained_run(Client(url), 5)
        assert [*worker.trainer.runs] == [worker.active_runs[other.id].adapter_name]
        words, category = failure_of(run.step)
        assert "cannot be kept" in words
        assert path not in words
        assert category == "user"
        other.step()


def test_a_checkpoint_that_a_full_disk_refuses_names_no_path(base, tmp_path, monkeypatch, caplog):
    service = open_service(base, None, train=str(tmp_path))
    trainer = training_of(service).worker.trainer
    with listening(service) as (url, _):
        run = trained_run(Client(url))
        with monkeypatch.context() as full_disk:
            path = str(tmp_path / "runs" / "1" / "weights")
            error = OSError(28, "No space left on device", path)
            full_disk.setattr(trainer, "export", Mock(side_effect=error))
            words, category = failure_of(lambda: run.save("first"))
        assert "No space left on device" in words
        assert "Do: try again" in words
        assert str(tmp_path) not in words
        assert category == "server"
        (record,) = [record for record in caplog.records if "No space left" in record.getMessage()]
        assert not record.exc_info  # a full disk needs no traceback
        assert run.save("first").endswith("first")


def test_a_server_that_ends_writes_each_state_that_can_be_written(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    worker, store = training_of(service).worker, training_of(service).store
    with listening(service) as (url, _):
        runs = [trained_run(Client(url), number) for number in range(3)]
        fail_saves(
            monkeypatch,
            worker.trainer,
            worker.active_runs[runs[0].id].adapter_name,
            OSError("no space left"),
        )
        service.drain(1.0)  # as SIGTERM does, before the server is closed
        states = [store.run(run.id)["state"] for run in runs]
        assert states == [-1, runs[1].number, runs[2].number]


def test_a_load_whose_state_cannot_be_written_holds_up_nobody(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    worker = training_of(service).worker
    with listening(service) as (url, _):
        run, other = (trained_run(Client(url), number) for number in range(2))
        saved = run.save("a")
        fail_saves(
            monkeypatch,
            worker.trainer,
            worker.active_runs[run.id].adapter_name,
            OSError("no space left"),
        )
        turns = []
        monkeypatch.setattr("veneer.serve.training.worker.PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(
            "veneer.serve.training.worker.log.exception", lambda *args: turns.append(args)
        )
        run.client.result(run.ask("load_weights", path=saved, optimizer=True))
        other.pass_(texts(0)), run.pass_(texts(0))
        assert not [words for words in turns if "a turn" in words[0]]


def test_a_run_of_an_older_journal_that_diverges_as_it_is_computed_again_is_told_once(
    base, tmp_path, monkeypatch
):
    """A server that did not look at what a step made has acknowledged it."""
    service = open_service(base, None, train=str(tmp_path), runs=1)
    trainer = training_of(service).worker.trainer
    with listening(service) as (url, _):
        run = Client(url).run()
        failed = diverge(run)
    base_ = sqlite3.connect(Path(tmp_path) / "index.sqlite")
    with base_:
        base_.execute(
            "UPDATE requests SET done = 1, answer = ? WHERE done = 2", (b'{"metrics": {}}',)
        )
        base_.execute("DELETE FROM failed_runs")
    base_.close()
    assert not trainer.runs
    service = open_service(base, None, train=str(tmp_path), runs=1)
    steps, real = [], training_of(service).worker.trainer.step
    monkeypatch.setattr(
        training_of(service).worker.trainer, "step", lambda *args: steps.append(args) or real(*args)
    )
    with listening(service) as (url, _):
        run = continued(run, url)
        for _ in range(2):
            with pytest.raises(Failed, match="load a checkpoint"):
                run.pass_(texts(0))
        assert len(steps) == 2  # of one return
        assert "load a checkpoint" in failed[0]


def test_a_folder_of_a_run_that_is_gone_is_that_runs_failure(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    with listening(service) as (url, _):
        run = trained_run(Client(url))
        other = trained_run(Client(url), 5)  # the first one is let go
        shutil.rmtree(training_of(service).store.folder_of(run.id))
        assert other.id not in failure_of(lambda: run.pass_(texts(0)))[0]
        other.step()


def test_an_adapter_that_cannot_be_read_any_more_is_not_the_failure_of_who_pushes_it_out(
    base, tmp_path
):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    with listening(service) as (url, _):
        clients = [Client(url) for _ in range(2)]
        sessions = [trained_run(client, 1).sampler() for client in clients]
        clients[0].sample(sessions[0], TEXT)
        path = training_of(service).store.sampler(sessions[0])["path"]
        shutil.rmtree(adapter_folder(training_of(service).store, path))
        assert clients[1].sample(sessions[1], TEXT).sequences[0].tokens
        assert path not in service.bank


def test_a_checkpoint_that_cannot_be_deleted_leaves_the_others_to_be_deleted(
    base, tmp_path, monkeypatch
):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        run = trained_run(Client(url), 1)
        for name in ("a", "b", "c"):
            run.save(name)
        with training.store._index.transaction() as connection:
            connection.execute("UPDATE checkpoints SET expires = 1")
        real = training.operations.delete

        def delete(place):
            if place.name == "a":
                raise OSError("a stale file handle")
            real(place)

        monkeypatch.setattr(training.operations, "delete", delete)
        training.clean_up()
        training.worker.submit(lambda: None).result(timeout=20)
        assert [place.name for place in training.store.expired_checkpoints()] == ["a"]


def test_a_client_that_comes_during_a_look_at_the_sessions_fails_none(it, monkeypatch):
    training, come, looked = it.training, threading.Event(), threading.Event()

    class Walked(dict):
        def items(self):
            for entry in super().items():
                come.set()
                looked.wait(0.2)  # in which a client is seen, unless a lock keeps it out
                yield entry

    with monkeypatch.context() as patch:
        patch.setattr(training, "_heartbeats", Walked({"gone": -1e9}))
        patch.setattr(training_, "SILENT_SECONDS", 60.0)

        def seen():
            come.wait(20)
            training.record_heartbeat("new")
            looked.set()

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(seen)
            training.clean_up()
            coming.result(timeout=20)
        assert training._heartbeats.keys() == {"new"}


# ----------------------------------------------------------------------------------------------
# room in memory


@pytest.mark.parametrize("kind", ["step", "save", "sampler", "create", "load", "now"])
def test_what_needs_room_waits_while_all_runs_in_memory_are_computed(
    base, tmp_path, monkeypatch, kind
):
    service = open_service(base, None, train=str(tmp_path), runs=1)
    worker, started, go = training_of(service).worker, threading.Event(), threading.Event()
    with listening(service) as (url, _), ThreadPoolExecutor(1) as pool:
        client = Client(url)
        run, local = trained_run(client), Local(seed=3)
        for step in range(3):
            local.pass_(texts(step)), local.step(0.03)
        saved = run.save("a")
        run.pass_(texts(3)), local.pass_(texts(3))
        computed = client.run(1)
        real = worker.trainer.compute

        def compute(passes):
            started.set()
            assert go.wait(20)
            return real(passes)

        monkeypatch.setattr(worker.trainer, "compute", compute)
        monkeypatch.setattr(worker.trainer, "batch_tokens", 16)  # of one row in a batch
        passed = computed.ask_pass(texts(0, count=4))
        assert started.wait(20)
        create = {
            "session_id": client.session,
            "model_seq_id": 2,
            "base_model": "tiny",
            "lora_config": {"rank": 4},
        }
        now = {"model": f"tinker://{run.id}/now", "prompt": "a", "max_tokens": 2}
        asks = {
            "step": lambda: run.ask_step(0.03),
            "save": lambda: run.ask("save_weights", path="b"),
            "sampler": lambda: run.ask("save_weights_for_sampler", path="c"),
            "create": lambda: client.post("create_model", **create),
            "load": lambda: run.ask("load_weights", path=saved, optimizer=True),
            "now": lambda: pool.submit(
                httpx.post, f"{url}/v1/completions", json=now, timeout=60, trust_env=False
            ),
        }
        asked = asks[kind]()
        if kind == "now":
            until(lambda: worker._tasks)
        go.set()
        if kind == "now":
            assert asked.result(timeout=60).status_code == 200
        else:
            client.result(asked)
        assert computed.wait_for_pass(passed).loss > 0
        if kind == "step":
            local.step(0.03)
            assert run.pass_(texts(4)).loss == pytest.approx(local.pass_(texts(4)), rel=1e-3)


@pytest.mark.parametrize("kind", ["pass", "step"])
def test_a_run_that_goes_on_and_on_keeps_no_other_from_its_place(base, tmp_path, monkeypatch, kind):
    """The older run has a pass whenever one of its passes is over."""
    with opened(base, tmp_path, runs=1) as (url, _):
        runs = [trained_run(Client(url), 1) for _ in range(2)]
        for run in runs:
            run.pass_(texts(1))
    monkeypatch.setattr(Worker, "start", lambda worker: None)  # its turns are made here
    service = open_service(base, None, train=str(tmp_path), runs=1)
    worker = training_of(service).worker
    try:
        endless, other = runs
        promises = [endless.next() for _ in range(8)]
        for number in promises:
            worker.queue.accept(
                endless.id,
                number,
                PASS,
                endless.body(texts(2), "cross_entropy").SerializeToString(),
            )
        worker.run_once()  # the first one has the place
        body = (
            other.body(texts(3), "cross_entropy").SerializeToString()
            if kind == "pass"
            else b'{"rate": 0.01}'
        )
        worker.queue.accept(other.id, other.next(), PASS if kind == "pass" else "step", body)
        promise = worker.queue.promise(other.id, other.number)
        while not promise.done():
            worker.run_once()
        left = [
            number for number in promises if not worker.queue.promise(endless.id, number).done()
        ]
        assert len(left) >= 4
        while worker.queue.ready_runs():
            worker.run_once()
        assert all(worker.queue.promise(endless.id, number).result().binary for number in promises)
    finally:
        service.close()


@pytest.mark.parametrize("backward", [True, False])
def test_a_run_that_goes_on_and_on_keeps_no_other_of_its_key_from_a_batch(
    base, tmp_path, monkeypatch, backward
):
    """Both are in memory, and no batch can hold rows of both."""
    with opened(base, tmp_path) as (url, _):
        runs = [trained_run(Client(url), 1) for _ in range(2)]
    monkeypatch.setattr(Worker, "start", lambda worker: None)  # its turns are made here
    service = open_service(base, None, train=str(tmp_path))
    worker = training_of(service).worker
    monkeypatch.setattr(worker.trainer, "batch_tokens", 16)  # of one row in a batch

    def ask(run, **options):
        body = run.body([datum(TEXT)], "cross_entropy", **options).SerializeToString()
        worker.queue.accept(run.id, run.next(), PASS, body)
        return worker.queue.promise(run.id, run.number)

    try:
        endless, other = runs
        promises = [ask(endless) for _ in range(8)]
        worker.run_once()
        promise = ask(other, backward=backward)
        while not promise.done():
            worker.run_once()
        assert sum(not one.done() for one in promises) >= 4
        while worker.queue.ready_runs():
            worker.run_once()
        assert all(one.result().binary for one in [promise, *promises])
    finally:
        service.close()
