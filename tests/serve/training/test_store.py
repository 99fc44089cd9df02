"""The index: who waits for whom, and what another version has written."""

from __future__ import annotations

import logging
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from veneer.errors import ConfigError, SelectionError
from veneer.serve.training.operations import adapter_folder, parse_current_run
from veneer.serve.training.run_trainer import ADAPTER_FOLDER
from veneer.serve.training.sqlite_index import Index
from veneer.serve.training.store import INDEX, Checkpoint, Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    store.require_base("tiny", "mark")
    yield store
    store.close()


def reads(store, session, run):
    """What the event loop asks while a client's request is written."""
    return [
        store.session(session)["id"], store.run(run)["id"], store.request(run, 0)["done"], store.next_seq(run),
        store.count_runs(""), store.tokens_today(""), store.checkpoint_bytes(""), store.failure_of(run),
    ]  # fmt: skip


def test_a_read_waits_for_no_writer(store):
    session = store.new_session("", None, None)
    run = "r"
    store.new_run(run, session, "", {}, 0, None)
    store.add_request(run, 0, "create", b"{}")
    expected = [session, run, 0, 0, 1, 0, 0, None]
    assert reads(store, session, run) == expected
    written, go = threading.Event(), threading.Event()

    def write():
        with store._index.transaction() as connection:
            connection.execute("UPDATE requests SET done = 1")
            written.set()
            assert go.wait(20)  # as while a disk is slow

    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(write)
        assert written.wait(20)
        try:
            assert pool.submit(reads, store, session, run).result(timeout=5) == expected
        finally:
            go.set()
        writing.result()
    assert store.request(run, 0)["done"] == 1  # what a call has written, the next one reads


def test_a_sampling_session_that_is_begun_again_counts_its_clients_on(store):
    session = store.new_session("", None, None)
    store.add_sampler("s", session, "", None)
    assert store.add_sampler_client("s") == 1
    store.add_sampler("s", session, "", "tinker://r/weights/last")
    assert store.add_sampler_client("s") == 2
    assert store.sampler("s")["path"] == "tinker://r/weights/last"


def test_checkpoints_are_adapters_by_name(store):
    """One that is called "now" is not taken for its run as it is at that moment."""
    run = "s:train:0"
    store.new_run(run, store.new_session("", None, None), "", {}, 0, None)
    place = Checkpoint(run, "weights", "now")
    with pytest.raises(SelectionError, match="a checkpoint that is there"):
        adapter_folder(store, place.path)
    store.add_checkpoint(place, "", "{}")
    folder = store.folder_of(run)
    assert adapter_folder(store, place.path) == folder / "weights" / "now" / ADAPTER_FOLDER
    assert adapter_folder(store, f"tinker://{run}/now") == folder / "now" / ADAPTER_FOLDER
    assert parse_current_run(f"tinker://{run}/now") == run
    assert parse_current_run(place.path) is None


def test_threads_that_read_at_once_each_have_a_connection(store):
    store.new_session("", None, None)
    barrier = threading.Barrier(8)

    def read(_):
        barrier.wait(20)
        return [len(store.sessions(None)) for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [[1] * 50] * 8
    store.close()
    with pytest.raises(sqlite3.ProgrammingError):
        store.sessions(None)


def change_fact(folder, name, value):
    with sqlite3.connect(folder / INDEX) as connection:
        if value is None:
            connection.execute("DELETE FROM facts WHERE name = ?", (name,))
        else:
            connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
    connection.close()


@pytest.mark.parametrize("value", ["2", "0", None])
def test_a_folder_of_another_format_is_refused_with_the_version_that_wrote_it(
    store, tmp_path, value
):
    store.close()
    change_fact(tmp_path, "format", value)
    change_fact(tmp_path, "veneer", "9.9")
    again = Store(tmp_path)
    try:
        with pytest.raises(ConfigError, match=r"veneer 9\.9.*Expected: format 1"):
            again.require_base("tiny", "mark")
    finally:
        again.close()
    change_fact(tmp_path, "format", "1")  # nothing else has changed
    again = Store(tmp_path)
    again.require_base("tiny", "mark")
    again.close()


@pytest.mark.parametrize(("name", "told"), [("torch", True), ("veneer", True), (None, False)])
def test_a_folder_of_other_versions_of_the_libraries_says_so(store, tmp_path, caplog, name, told):
    store.close()
    if name is not None:
        change_fact(tmp_path, name, "0.0.1")
    caplog.set_level(logging.WARNING, "veneer.serve.training")
    for expected in (told, False):  # once: from now on it is this version's
        again = Store(tmp_path)
        again.require_base("tiny", "mark")
        again.close()
        words = [record.getMessage() for record in caplog.records]
        assert [f"{name} 0.0.1" in text for text in words] == [True] * expected
        caplog.clear()


def test_a_folder_of_an_earlier_release_without_versions_is_read(store, tmp_path, caplog):
    store.close()
    for name in ("veneer", "torch"):
        change_fact(tmp_path, name, None)
    again = Store(tmp_path)
    again.require_base("tiny", "mark")
    again.close()
    assert not caplog.records


def test_a_commit_that_a_full_disk_refuses_leaves_no_transaction_open(tmp_path):
    index = Index(tmp_path / "index.sqlite")
    index.create_tables("CREATE TABLE numbers (number INTEGER)")
    connection = index._writer

    class Full:
        """The connection, whose commits fail as on a full disk."""

        def __getattr__(self, name):
            return getattr(connection, name)

        def execute(self, statement, *parameters):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return connection.execute(statement, *parameters)

    index._writer = Full()
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        index.execute("INSERT INTO numbers VALUES (?)", 1)
    index._writer = connection
    index.execute("INSERT INTO numbers VALUES (?)", 2)
    assert [row["number"] for row in index.rows("SELECT number FROM numbers")] == [2]
    index.close()


def test_a_disk_that_fails_as_a_reservation_ends_keeps_only_the_used_tokens(store, monkeypatch):
    store.reserve_tokens("a", 32_000)
    with monkeypatch.context() as failing:

        def refuse(*arguments):
            raise sqlite3.OperationalError("database or disk is full")

        failing.setattr(store._index, "execute", refuse)
        with pytest.raises(sqlite3.OperationalError):
            store.settle_tokens("a", 32_000, 10)
    assert store.tokens_today("a") == 10
    store.reserve_tokens("a", 500)
    store.settle_tokens("a", 500, 20)
    assert store.tokens_today("a") == 30
