"""Killed at any moment, a process leaves whole adapters, a whole index, and nothing that the next one cannot clean up.
Several at once lose nothing of each other's."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from tests.support import crashes
from tests.support.crashes import DIED, OPERATIONS, make
from tests.support.processes import CONTEXT

import veneer
from veneer.errors import AdapterError
from veneer.fileio import atomic
from veneer.store.library import COPY, INDEX, LOCK, OBJECTS, Library


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number in range(4):
        make(folder / str(number), number)
    return folder


@pytest.fixture
def folder(tmp_path, sources) -> Path:
    """An adapter and a library with two names, as every crash finds them."""
    (tmp_path / "sources").symlink_to(sources)
    make(tmp_path / "adapter", 0)
    library = Library(tmp_path / "library")
    library.add(sources / "0", "kept", tags=["t0"])
    library.add(sources / "1", "replaced")
    return tmp_path


def whole(folder: Path) -> None:
    """What must hold after any crash, and what must be possible."""
    veneer.adapter_files.read(folder / "adapter")
    library = Library(folder / "library")
    entries = library.list()
    assert {"kept", "replaced"} <= {entry.name for entry in entries}
    for entry in entries:
        assert veneer.adapter_files.read(library.get(entry.name)).config.rank == entry.rank
    (last,) = library.entry("kept").tags  # a tag is replaced by another in one change
    for path in folder.iterdir():  # what is left of a save that died is no adapter, or all of one
        if path.name.startswith(".adapter."):
            try:
                veneer.adapter_files.read(path)
            except AdapterError:
                continue
    library.gc(grace=0)
    used = {entry.object for entry in entries}
    assert {path.name for path in (library.folder / OBJECTS).iterdir()} == used
    assert {path.name for path in library.folder.iterdir()} == {INDEX, COPY, LOCK, OBJECTS}
    library.add(folder / "sources" / "2", "next", tags=[last], overwrite=True)
    veneer.adapter_files.read(library.get("next"))
    library.remove("next")
    library.gc(grace=0)
    make(folder / "adapter", 1)


# ---------------------------------------------------------------------------------------------- before every step


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_death_before_any_step_on_the_disk(folder, operation):
    """Each step in turn: rename, replace, fsync, mkdir, unlink, … does not happen, and nothing after it does."""
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=crashes.die_at_each, args=(theirs, operation, folder), daemon=True)
    process.start()
    theirs.close()
    for step in range(200):
        number = 1000 + step
        if operation == "tag":  # which goes on from the tag that is there
            (last,) = Library(folder / "library").entry("kept").tags
            number = int(last[1:]) + 1
        pipe.send((number, step))
        ended = pipe.recv()
        whole(folder)
        if ended == 0:
            assert step >= 4, "the steps were counted"
            break
        assert ended == DIED
    else:
        pytest.fail("it did not come to an end")
    pipe.close()
    process.join()


def test_everything_is_on_the_disk_before_it_gets_its_name(folder, monkeypatch):
    """For a loss of power, which no kill can show: each file and folder is flushed before the rename, the folder that
    holds the new name after it."""
    flushed: set[int] = set()
    renamed: list[Path] = []
    fsync, put, replace = os.fsync, atomic._put, os.replace

    def flush(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def about_to_rename(source: Path, target: Path):
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= flushed
        flushed.discard(target.parent.stat().st_ino)
        renamed.append(target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(atomic, "_put", lambda *paths: (about_to_rename(*paths), put(*paths)))
    monkeypatch.setattr(os, "replace", lambda *paths: (about_to_rename(*paths), replace(*paths)))
    for operation in (crashes.save, crashes.add):
        flushed.clear()
        renamed.clear()
        operation(folder, 2)
        assert renamed
        assert {path.parent.stat().st_ino for path in renamed} <= flushed
    assert {path.name for path in renamed} >= {INDEX, COPY}


# ---------------------------------------------------------------------------------------------- at any moment


def kill(folder: Path, operation: str, delay: float) -> None:
    ready = CONTEXT.Event()
    child = CONTEXT.Process(target=crashes.loop, args=(operation, folder, ready))
    child.start()
    assert ready.wait(60)
    time.sleep(delay)
    child.kill()
    child.join()
    assert child.exitcode == -9, "it was killed, not finished"
    whole(folder)


def kills(folder: Path, count: int, seed: int) -> None:
    moments = random.Random(seed)
    operations = list(OPERATIONS)
    for number in range(count):
        kill(folder, operations[number % len(operations)], moments.uniform(0, 0.08))


def test_killed_at_18_moments(folder):
    kills(folder, 18, seed=1)


@pytest.mark.slow
def test_killed_at_200_moments(folder):
    kills(folder, 200, seed=int(time.time()))


# ---------------------------------------------------------------------------------------------- several at once


def test_several_processes_lose_nothing(folder):
    """Four writers that add, tag, remove and collect at once, and two readers beside them."""
    count, failed, seen, stop = 6, CONTEXT.Queue(), CONTEXT.Queue(), CONTEXT.Event()
    writers = [CONTEXT.Process(target=crashes.work, args=(folder, who, count, failed)) for who in range(4)]
    readers = [CONTEXT.Process(target=crashes.look, args=(folder, stop, seen, failed)) for _ in range(2)]
    for process in (*readers, *writers):
        process.start()
    for process in writers:
        process.join(120)
    stop.set()
    counted = [seen.get(timeout=60) for _ in readers] if all(p.exitcode == 0 for p in writers) else [0]
    for process in readers:
        process.join(60)
    assert failed.empty(), failed.get()
    assert [process.exitcode for process in (*writers, *readers)] == [0] * 6
    assert min(counted) > 10
    library = Library(folder / "library")
    expected = {f"p{who}-{number}" for who in range(4) for number in range(0, count, 2)}
    expected |= {f"own-{who}" for who in range(4)} | {"kept", "replaced"}
    assert {entry.name for entry in library.list()} == expected
    every = {f"p{who}-{number}" for who in range(4) for number in range(count)}
    assert set(library.entry("kept").tags) == {"t0"} | every, "no tag was lost"
    for entry in library.list():
        veneer.adapter_files.read(library.get(entry.name))
    library.gc(grace=0)
    used = {entry.object for entry in library.list()}
    assert {path.name for path in (library.folder / OBJECTS).iterdir()} == used
