"""What a merge of a checkpoint is built from: files that are written directly, buffers that serve again, fingerprints
that are taken ahead."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from veneer.errors import CheckpointError
from veneer.fileio.hashing import fingerprint
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.merge_checkpoint import direct_writer, fingerprints
from veneer.tools.merge_checkpoint.direct_writer import BLOCK, DirectWriter
from veneer.tools.merge_checkpoint.memory import Memory

# ---------------------------------------------------------------------------------------------- files

STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "lying", "copy", "flush", "again"]), st.integers(0, 5 * BLOCK)), max_size=12
)


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=40, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 255))
def test_a_stream_holds_what_was_written(direct, steps, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    source = os.urandom(1 << 15)
    (folder / "source").write_bytes(source)
    expected, sure = bytearray(), 0
    with pytest.MonkeyPatch.context() as patch, (folder / "source").open("rb") as other:
        patch.setattr(direct_writer, "ROOM", 2 * BLOCK)
        if not direct:
            patch.setattr(direct_writer, "DIRECT", 0)
        own = DirectWriter(folder / "file", 0)
        for step, count in steps:
            if step == "write":
                own.write(memoryview(source[seed : seed + count]))
            elif step == "lying":  # in memory as it will in the file
                pages = memoryview(mmap.mmap(-1, 1 << 16))
                first = direct_writer.lag(direct_writer._address(pages), len(expected))
                pages[first : first + len(source[seed : seed + count])] = source[seed : seed + count]
                own.write(pages[first : first + len(source[seed : seed + count])])
            elif step == "copy":
                own.copy(other.fileno(), seed, min(count, len(source) - seed))
            if step in ("write", "lying", "copy"):
                expected += source[seed : seed + count]
                continue
            own.flush()
            sure = len(expected)
            written = (folder / "file").read_bytes()
            assert written[:sure] == expected
            assert len(written) == -(-sure // BLOCK) * BLOCK
            assert not any(written[sure:])
            if step == "again":  # another run goes on from what is sure, after bytes that are not
                own.close()
                with (folder / "file").open("ab") as torn:
                    torn.write(b"torn")
                own = DirectWriter(folder / "file", sure)
        own.flush()
        os.ftruncate(own.descriptor, len(expected))
        own.close()
    assert (folder / "file").read_bytes() == expected


def test_what_lies_as_in_the_file_is_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_writer, "ROOM", 2 * BLOCK)
    pages = memoryview(mmap.mmap(-1, 10 * BLOCK))
    pages[:] = os.urandom(len(pages))
    written, put = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: written.append((len(data), at)) or put(to, data, at))
    own = DirectWriter(tmp_path / "file", 0)
    own.write(memoryview(b"head" * 10))
    first = direct_writer.lag(direct_writer._address(pages), 40)
    own.write(pages[first : first + 6 * BLOCK])
    own.flush()
    own.close()
    assert written == [(BLOCK, 0), (5 * BLOCK, BLOCK), (BLOCK, 6 * BLOCK)]
    whole = (tmp_path / "file").read_bytes()
    assert whole[: 40 + 6 * BLOCK] == b"head" * 10 + bytes(pages[first : first + 6 * BLOCK])
    assert direct_writer.lag(4096, 41) == 0


def test_a_file_system_that_refuses_direct_writes(tmp_path, monkeypatch):
    refused, put = [], os.pwrite

    def refusing(descriptor, data, at):
        if direct_writer.fcntl.fcntl(descriptor, direct_writer.fcntl.F_GETFL) & direct_writer.DIRECT:
            refused.append(at)
            raise OSError(direct_writer.errno.EINVAL, "Invalid argument")
        return put(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", refusing)
    own = DirectWriter(tmp_path / "file", 0)
    own.write(memoryview(b"x" * 100))
    own.flush()
    own.close()
    assert (tmp_path / "file").read_bytes()[:101] == b"x" * 100 + b"\0"
    assert len(refused) == 1


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(direct_writer.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    own = DirectWriter(tmp_path / "file", 0)
    own.write(memoryview(b"x"))
    with pytest.raises(OSError, match="No space"):
        own.flush()
    own.close()


def test_a_source_that_ends_too_early(tmp_path):
    (tmp_path / "source").write_bytes(b"abc")
    own = DirectWriter(tmp_path / "file", 0)
    with (tmp_path / "source").open("rb") as source, pytest.raises(CheckpointError, match="became shorter"):
        own.copy(source.fileno(), 1, 3)
    own.close()


# ---------------------------------------------------------------------------------------------- memory


def test_a_buffer_serves_again_if_something_still_lies_in_it():
    room, stopped = Memory(1000), threading.Event()
    old = room.ahead(400, 400, stopped)
    new = room.take(stopped)
    one, other = old.lent.pop()[:400], new.lent.pop()
    room.give(old, one.view(torch.int16))
    room.give(new, torch.zeros(400, dtype=torch.uint8))  # it lies elsewhere: the buffer may be in use
    del other
    small = room.ahead(300, 0, stopped)
    assert small.address == one.data_ptr()
    assert small.size == 400
    room.give(small, None)
    assert (room.used, sum(map(len, room._free))) == (0, 0)


def waits(action, release):
    """What ``action`` returns, which must not before ``release`` was called."""
    found = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(0.2)
    assert not found
    release()
    thread.join(20)
    return found[0]


def test_who_wants_more_than_there_is_waits():
    room, stopped = Memory(100), threading.Event()
    first = room.ahead(60, 10, stopped)
    result = room.take(stopped)
    second = waits(lambda: room.ahead(50, 10, stopped), lambda: room.give(first, None))
    assert (result.size, second.size) == (10, 50)
    room.give(result, None)
    room.take(stopped)
    assert waits(lambda: room.ahead(500, 0, stopped), stopped.set).size == 500  # who is to stop does not wait


def test_what_is_larger_than_the_limit_goes_alone():
    room, stopped = Memory(100), threading.Event()
    large = room.ahead(500, 700, stopped)
    assert large.size == 500
    assert room.take(stopped).size == 700


def test_who_reads_ahead_leaves_room_for_a_result():
    room, stopped = Memory(100), threading.Event()
    first = room.ahead(30, 30, stopped)
    second = room.ahead(30, 30, stopped)
    result = room.take(stopped)
    assert room.used == 90
    room.give(first, None)
    room.give(result, None)  # the second has 30; with 40 for a third, the 31 that this one wants would be too many
    third = waits(lambda: room.ahead(40, 31, stopped), lambda: room.take(stopped))
    assert (second.size, third.size) == (30, 40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3)), max_size=40))
def test_nobody_waits_for_ever_and_the_limit_holds(wanted):
    """A reader, whoever computes, and a writer, as a merge has them: all of it ends, within the limit."""
    room, stopped = Memory(130), threading.Event()
    read, written, most = queue.Queue(), queue.Queue(), []

    def look():
        with room._changed:
            most.append(room.used + sum(map(len, room._free)))

    def reading():
        for count, later, _ in wanted:
            read.put(room.ahead(count, later, stopped))
            look()
        read.put(None)

    def writing():
        while (lease := written.get()) is not None:
            room.give(lease, lease.lent.pop())

    threads = [threading.Thread(target=part, daemon=True) for part in (reading, writing)]
    for thread in threads:
        thread.start()
    for _, later, swapped in wanted:
        old, new = read.get(timeout=20), room.take(stopped)
        look()
        assert old.address != new.address
        assert new.size >= later
        spare, kept = (new, old) if swapped else (old, new)
        room.give(spare, spare.lent.pop() if swapped == 2 else None)
        written.put(kept)
    written.put(None)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert room.used == 0
    assert max(most, default=0) <= room.limit


# ---------------------------------------------------------------------------------------------- fingerprints


def base(folder):
    tensors = {
        "a": torch.randn(300, 70).bfloat16(),
        "b": torch.randn(5, 7),
        "c": torch.randn(9).bfloat16(),
        "d": torch.zeros(0, 4).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors, open_checkpoint(folder)


def recipe(name, shape):
    work = SimpleNamespace(path=name, place=SimpleNamespace(within=()))
    return SimpleNamespace(fingerprints={name: ((name,), torch.Size(shape), {})}, works={name: (work,)})


def test_fingerprints_are_taken_ahead(tmp_path, monkeypatch):
    tensors, checkpoint = base(tmp_path)
    monkeypatch.setattr(fingerprints, "PIECE", 1 << 12)
    known = {}
    fingerprints._hash(checkpoint, ["a", "c", "d"], known, threading.Event())
    assert {name: one[2] for name, one in known.items()} == {name: fingerprint(tensors[name]) for name in "acd"}
    with fingerprints.ahead(checkpoint, {"a", "b", "elsewhere"}) as found:
        pass
    assert set(found) <= {"a"}  # float32 is rounded first: when it is read


def test_a_file_that_changed_since_is_hashed_again(tmp_path):
    tensors, checkpoint = base(tmp_path)
    known = {}
    fingerprints._hash(checkpoint, ["a", "c"], known, threading.Event())
    path = tmp_path / "model.safetensors"
    descriptor = os.open(path, os.O_RDONLY)

    def found(name="a", shape=(300, 70), loaded=None):
        return fingerprints.printed(recipe(name, shape), checkpoint, name, lambda _: descriptor, loaded or {}, known)

    untouched = {"a": torch.zeros(300, 70).bfloat16()}  # nobody looks at it
    assert found(loaded=untouched) == fingerprint(tensors["a"])
    assert found(shape=(70, 300)) == fingerprint(tensors["a"].reshape(70, 300))  # the model has it so
    whole = bytearray(path.read_bytes())
    whole[checkpoint.start("a")] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(0, 1))  # clocks of file systems are coarse
    changed = checkpoint.read("a")
    assert found() == fingerprint(changed) != fingerprint(tensors["a"])
    os.close(descriptor)


def test_hashing_ends_with_the_block(tmp_path, monkeypatch):
    _, checkpoint = base(tmp_path)
    monkeypatch.setattr(fingerprints, "PIECE", 16)
    before = threading.active_count()
    with pytest.raises(CheckpointError), fingerprints.ahead(checkpoint, {"a"}):
        raise CheckpointError("no")
    assert threading.active_count() == before
    known, over = {}, threading.Event()
    over.set()
    fingerprints._hash(checkpoint, ["a"], known, over)
    assert not known
