"""Killed at any moment, a process leaves whole adapters, a whole index, and nothing that the next
one cannot clean up. Several at once lose nothing of each other's."""

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
from veneer.fileio import atomic
from veneer.store.library import COPY, INDEX, LOCK, OBJECTS, Library

#: what others keep beside an adapter, and what an adapter without parameters of its own is
THEIRS = ("notes.txt", "step_100/optimizer.bin")
FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "veneer.json")


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
    make(tmp_path / "among", 0)
    (tmp_path / "among" / "step_100").mkdir()
    for name in THEIRS:
        (tmp_path / "among" / name).write_text("theirs")
    library = Library(tmp_path / "library")
    library.add(sources / "0", "kept", tags=["t0"])
    library.add(sources / "1", "replaced")
    return tmp_path


def whole(folder: Path) -> None:
    """What must hold of the adapters after any crash, and what must be possible."""
    for name in ("adapter", "among"):
        veneer.adapter_files.read(folder / name)
    assert {name: (folder / "among" / name).read_text() for name in THEIRS} == dict.fromkeys(
        THEIRS, "theirs"
    )
    for name, expected in (("adapter", {*FILES}), ("among", {*FILES, "notes.txt", "step_100"})):
        litter = any(path.name.startswith(f".{name}.") for path in folder.iterdir())
        if litter or {path.name for path in (folder / name).iterdir()} != expected:
            make(folder / name, 1)
        assert {path.name for path in (folder / name).iterdir()} == expected
    assert {path.name for path in folder.iterdir()} == {"adapter", "among", "library", "sources"}


def whole_library(folder: Path) -> None:
    """The same of the library."""
    library = Library(folder / "library")
    entries = library.list()
    assert {"kept", "replaced"} <= {entry.name for entry in entries}
    for entry in entries:
        assert veneer.adapter_files.read(library.get(entry.name)).config.rank == entry.rank
    (last,) = library.entry("kept").tags  # a tag is replaced by another in one change
    library.gc(grace=0)
    used = {entry.object for entry in entries}
    assert {path.name for path in (library.folder / OBJECTS).iterdir()} == used
    assert {path.name for path in library.folder.iterdir()} == {INDEX, COPY, LOCK, OBJECTS}
    library.add(folder / "sources" / "2", "next", tags=[last], overwrite=True)
    veneer.adapter_files.read(library.get("next"))
    library.remove("next")
    library.gc(grace=0)


# ----------------------------------------------------------------------------------------------
# before every step


@pytest.mark.parametrize(
    ("operation", "exchange"),
    [*((name, True) for name in OPERATIONS), ("save", False), ("save_among", False)],
)
def test_a_death_before_any_step_on_the_disk(folder, operation, exchange):
    """Each step in turn: rename, replace, fsync, mkdir, unlink, … does not happen, and nothing
    after it does."""
    pipe, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=crashes.die_at_each, args=(theirs, operation, folder, exchange), daemon=True
    )
    process.start()
    theirs.close()
    for step in range(200):
        number = 1000 + step
        if operation == "tag":  # which goes on from the tag that is there
            (last,) = Library(folder / "library").entry("kept").tags
            number = int(last[1:]) + 1
        pipe.send((number, step))
        ended = pipe.recv()
        whole(folder) if "save" in operation else whole_library(folder)
        if ended == 0:
            assert step >= 4, "the steps were counted"
            break
        assert ended == DIED
    else:
        pytest.fail("it did not come to an end")
    pipe.close()
    process.join()


def test_everything_is_on_the_disk_before_it_gets_its_name(folder, monkeypatch):
    """For a loss of power, which no kill can show: each file and folder is flushed before the
    rename, the folder that holds the new name after it."""
    flushed: set[int] = set()
    renamed: list[Path] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    exchange = atomic._exchange

    def flush(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def about_to_rename(source: Path, target: Path):
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= flushed
        flushed.discard(target.parent.stat().st_ino)
        renamed.append(target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(
        atomic, "_exchange", lambda *paths: (about_to_rename(*paths), exchange(*paths))[1]
    )
    monkeypatch.setattr(os, "rename", lambda *paths: (about_to_rename(*paths), rename(*paths)))
    monkeypatch.setattr(os, "replace", lambda *paths: (about_to_rename(*paths), replace(*paths)))
    for operation in (crashes.save, crashes.save_among, crashes.add):
        flushed.clear()
        renamed.clear()
        operation(folder, 2)
        assert renamed
        assert {
            path.parent.stat().st_ino for path in renamed if path.parent.suffix != ".tmp"
        } <= flushed
    assert {path.name for path in renamed} >= {INDEX, COPY}


# ---------------------------------------------------------------------------------------------- at
# any moment


def kill(folder: Path, operation: str, delay: float, exchange: bool) -> None:
    ready = CONTEXT.Event()
    child = CONTEXT.Process(target=crashes.loop, args=(operation, folder, ready, exchange))
    child.start()
    assert ready.wait(60)
    time.sleep(delay)
    child.kill()
    child.join()
    assert child.exitcode == -9, "it was killed, not finished"
    whole(folder)
    whole_library(folder)


def kills(folder: Path, count: int, seed: int, exchange: bool) -> None:
    moments = random.Random(seed)
    operations = list(OPERATIONS)
    for number in range(count):
        kill(folder, operations[number % len(operations)], moments.uniform(0, 0.08), exchange)


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_16_moments(folder, exchange):
    kills(folder, 16, seed=1, exchange=exchange)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_200_moments(folder, exchange):
    kills(folder, 200, seed=int(time.time()), exchange=exchange)


# ----------------------------------------------------------------------------------------------
# several at once


def test_several_processes_lose_nothing(folder):
    """Four writers that add, tag, remove and collect at once, and two readers beside them."""
    count, failed, seen, stop = 6, CONTEXT.Queue(), CONTEXT.Queue(), CONTEXT.Event()
    writers = [
        CONTEXT.Process(target=crashes.work, args=(folder, who, count, failed)) for who in range(4)
    ]
    readers = [
        CONTEXT.Process(target=crashes.look, args=(folder, stop, seen, failed)) for _ in range(2)
    ]
    for process in (*readers, *writers):
        process.start()
    for process in writers:
        process.join(120)
    stop.set()
    counted = (
        [seen.get(timeout=60) for _ in readers] if all(p.exitcode == 0 for p in writers) else [0]
    )
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
