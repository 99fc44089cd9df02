"""A checkpoint is a row and its files: a crash, a deletion or an expiry at any moment leaves both
or neither."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.serve.training.test_service import TEXT, crash, opened, texts, trained_run
from tests.support.api_server import listening, until
from tests.support.service import open_service
from tests.support.training_client import Client, Failed, Run, datum

from veneer.serve.training import training_service as training_
from veneer.serve.training import worker as worker_
from veneer.serve.training.store import parse_checkpoint_path
from veneer.serve.training.training_service import training_of


def files(training, path):
    return sorted(
        file.name
        for file in training.store.files_of(parse_checkpoint_path(path)).rglob("*")
        if file.is_file()
    )


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("save_weights", {"path": "a"}),
        ("save_weights", {}),
        ("save_weights", {"path": "a", "overwrite": True}),
        ("save_weights_external", {"path": "a"}),
        ("save_weights_for_sampler", {"path": "a"}),
    ],
)
def test_a_save_whose_answer_a_crash_swallowed_has_succeeded(
    base, tmp_path, monkeypatch, route, fields
):
    """It is done again when the server is back: the same request."""
    service = open_service(base, None, train=str(tmp_path))
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        gone, real = threading.Event(), training_of(service).store.store_answer

        def swallow(*args):
            if args[1] == run.number:
                gone.set()
                raise sqlite3.OperationalError("the process ends here")
            real(*args)

        monkeypatch.setattr(worker_, "PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(training_of(service).store, "store_answer", swallow)
        promised = run.ask(route, **fields)
        assert gone.wait(30)
        crash(service)
    with opened(base, tmp_path) as (url, _):
        again = Client(url)
        again.session = client.session
        back = Run(again, run.id, run.number)
        path = again.result(promised)["path"]
        assert [one["tinker_path"] for one in again.get("checkpoints")["checkpoints"]] == [path]
        if "overwrite" not in fields and route != "save_weights_for_sampler":
            with pytest.raises(Failed, match="which exists"):  # another request
                again.result(back.ask(route, **{**fields, "path": path.rpartition("/")[2]}))


def test_an_index_of_an_earlier_release_is_taken_along(base, tmp_path):
    with opened(base, tmp_path) as (url, _):
        run = trained_run(Client(url), 1)
        run.save("a")
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.execute("ALTER TABLE checkpoints DROP COLUMN request")
    index.close()
    with opened(base, tmp_path) as (url, _):
        client = Client(url)
        client.session = run.client.session
        back = Run(client, run.id, run.number)
        with pytest.raises(Failed, match="which exists"):
            back.save("a")
        assert back.save("b")


def test_a_checkpoint_that_expired_and_was_saved_anew_stays(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        path = run.save("a", ttl_seconds=3600)
        training.store.change_checkpoint(parse_checkpoint_path(path), expires=1.0)
        whole, looked, go, threads = files(training, path), threading.Event(), threading.Event(), []
        real = training.store.expired_checkpoints

        def slow():
            rows = real()
            threads.append(threading.current_thread())
            looked.set()
            go.wait(20)
            return rows

        monkeypatch.setattr(training.store, "expired_checkpoints", slow)
        with ThreadPoolExecutor(2) as pool:
            swept = pool.submit(training.clean_up)
            assert looked.wait(20)
            saved = pool.submit(run.save, "a")
            if threads[0] is not training.worker._thread:  # else the save comes after
                saved.result()
            go.set()
            swept.result()
            assert saved.result() == path
        training.worker.submit(lambda: None).result(20)
        assert client.post("weights_info", tinker_path=path)["lora_rank"] == 4
        assert files(training, path) == whole


def test_a_deletion_against_a_save_leaves_both_or_neither(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        path = run.save("a")
        real, written, go = training.store.add_checkpoint, threading.Event(), threading.Event()

        def slow(*args, **options):  # its files are there, its row is the old one
            written.set()
            go.wait(20)
            return real(*args, **options)

        monkeypatch.setattr(training.store, "add_checkpoint", slow)
        with ThreadPoolExecutor(2) as pool:
            saved = pool.submit(run.save, "a", overwrite=True)
            assert written.wait(20)
            place = f"/training_runs/{run.id}/checkpoints/weights/a"
            deleted = pool.submit(client.http.delete, place)
            until(lambda: deleted.done() or training.worker._tasks)
            go.set()
            assert saved.result() == path
            assert deleted.result().status_code == 204
        there = client.send("weights_info", tinker_path=path).status_code == 200
        assert there == bool(files(training, path))


def test_a_copy_of_what_is_deleted_meanwhile_is_whole_or_none(base, tmp_path, monkeypatch):
    service = open_service(base, None, train=str(tmp_path))
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        path = run.save("a")
        whole, held = files(training, path), threading.Event()
        training.worker.submit(held.wait)
        with ThreadPoolExecutor(2) as pool:
            deleted = pool.submit(
                client.http.delete, f"/training_runs/{run.id}/checkpoints/weights/a"
            )
            until(lambda: training.worker._tasks)
            copied = pool.submit(client.send, "copy_weights", source_path=path)
            until(lambda: len(training.worker._tasks) == 2)
            held.set()
            assert deleted.result().status_code == 204
            assert copied.result().status_code == 404
        path = run.save("b")
        copied = client.post("copy_weights", source_path=path)["tinker_path"]
        assert (
            client.http.delete(f"/training_runs/{run.id}/checkpoints/weights/b").status_code == 204
        )
        assert files(training, copied) == whole
        asked = client.post(
            "load_weights", session_id=client.session, model_seq_id=9, path=copied, optimizer=True
        )
        assert Run(client, client.result(asked)["model_id"]).pass_(texts(0)).loss > 0


@pytest.mark.parametrize("kind", ["weights", "external", "copy"])
def test_samples_of_a_checkpoint_that_was_replaced_are_of_its_new_weights(client, it, kind):
    run = trained_run(client, 1)

    def save():
        if kind == "external":
            return client.result(run.ask("save_weights_external", path="a"))["path"]
        path = run.save("a", overwrite=True)
        copied = {"session_id": client.session, "model_seq_id": 9, "source_path": path}
        return client.post("copy_weights", **copied)["tinker_path"] if kind == "copy" else path

    path = save()
    sampler = {"session_id": client.session, "sampling_session_seq_id": 0, "model_path": path}
    session = client.post("create_sampling_session", **sampler)["sampling_session_id"]
    client.sample(session, TEXT)
    assert path in it.training.bank
    run.pass_(texts(9)), run.step(0.3)
    if kind != "weights":  # these are replaced only after they have expired
        it.training.store.change_checkpoint(parse_checkpoint_path(path), expires=1.0)
    assert save() == path
    trained = run.pass_([datum(TEXT)], backward=False).logprobs[0]
    found = client.sample(session, TEXT, number=1, prompt_logprobs=True).prompt
    np.testing.assert_allclose(found[1:], trained, atol=1e-4)


def test_a_checkpoint_that_was_replaced_by_an_encrypted_one_is_not_sampled(client, it):
    pyrage = pytest.importorskip("pyrage")
    run, recipient = trained_run(client, 1), str(pyrage.x25519.Identity.generate().to_public())
    path = client.result(run.ask("save_weights_external", path="a"))["path"]
    it.training.register_checkpoint(path)
    it.training.store.change_checkpoint(parse_checkpoint_path(path), expires=1.0)
    asked = run.ask("save_weights_external", path="a", age_encryption_recipients=[recipient])
    assert client.result(asked)["path"] == path
    assert path not in it.training.bank


def test_weights_without_a_name_are_deleted_while_others_are_sampled(base, tmp_path, monkeypatch):
    """Also those that make room in the bank for others."""
    monkeypatch.setattr(training_, "MAX_UNNAMED", 1)
    monkeypatch.setattr(training_, "UNUSED_SECONDS", 0.0)
    service = open_service(base, None, train=str(tmp_path), runs=1)
    training = training_of(service)
    with listening(service) as (url, _):
        client = Client(url)
        run = trained_run(client, 1)
        sessions = [run.sampler(number) for number in range(3)]
        for number in range(3):
            training.clean_up()
            training.worker.submit(lambda: None).result(20)
            client.sample(sessions[2], TEXT, number=number)
        assert len(training.store.hidden_checkpoints()) == 1
        assert training._last_uses.keys() == {training.store.sampler(sessions[2])["path"]}


def test_a_server_that_shuts_down_leaves_nobody_waiting_for_a_change(base, tmp_path):
    service = open_service(base, None, train=str(tmp_path))
    with listening(service):
        worker, held = training_of(service).worker, threading.Event()
        worker.submit(held.wait)
        last = worker.submit(lambda: "done")
        with ThreadPoolExecutor(1) as pool:
            closed = pool.submit(worker.close)
            until(lambda: worker._closing)
            late = worker.submit(lambda: "never")
            held.set()
            closed.result()
        assert last.result(20) == "done"
        assert "shutting down" in str(late.exception(20))
