"""What a merge of a checkpoint is built from: files that are written directly."""

from __future__ import annotations

import errno
import io
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from veneer.errors import CheckpointError
from veneer.fileio import pages
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.merge_checkpoint import direct_writer
from veneer.tools.merge_checkpoint.direct_writer import BLOCK, DirectWriter
from veneer.tools.merge_checkpoint.pipeline import _Writer

# ----------------------------------------------------------------------------------------------
# files

KINDS = st.sampled_from(["write", "large", "copy", "flush", "again"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 5 * BLOCK)), max_size=12)


@pytest.mark.parametrize("direct", [True, False])
@settings(max_examples=40, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 255))
def test_a_stream_holds_what_was_written(direct, steps, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    source = os.urandom(1 << 15)
    expected, sure = bytearray(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct_writer, "ROOM", 2 * BLOCK)
        patch.setattr(pages, "LARGE", 1)
        if not direct:
            patch.setattr(direct_writer, "DIRECT", 0)
        own = DirectWriter(folder / "file", 0)
        for step, count in steps:
            if step in ("write", "large", "copy"):
                part = source[seed : seed + count]
                if step == "write":
                    own.write(part)
                elif (
                    step == "large"
                ):  # in memory as in the file: whole blocks are written from where they lie
                    memory = pages.empty_bytes(len(part), len(expected)).numpy()
                    memory[:] = list(part)
                    own.write(memory.data)
                else:
                    assert own.copy(io.BytesIO(part + b"behind"), count) == count
                expected += part
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
        own.finish()
        own.close()
    assert (folder / "file").read_bytes() == expected


def test_a_file_system_that_refuses_direct_writes(tmp_path, monkeypatch):
    refused, opened, write = [], {}, os.write

    def opening(path, flags, *arguments, real=os.open):
        descriptor = real(path, flags, *arguments)
        opened[descriptor] = flags
        return descriptor

    def refusing(descriptor, data):
        if opened.get(descriptor, 0) & direct_writer.DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "write", refusing)
    own = DirectWriter(tmp_path / "file", 0)
    own.write(b"x" * 100)
    own.flush()
    own.close()
    assert (tmp_path / "file").read_bytes()[:101] == b"x" * 100 + b"\0"
    assert len(refused) == 1


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    own = DirectWriter(tmp_path / "file", 0)
    own.write(b"x")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        own.flush()
    own.close()


def test_a_source_that_ends_too_early(tmp_path):
    save_file({"a": torch.arange(100.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.truncate(checkpoint.start("a") + 8)
    writer, target = (
        SimpleNamespace(job=SimpleNamespace(checkpoint=checkpoint)),
        DirectWriter(tmp_path / "out", 0),
    )
    with pytest.raises(CheckpointError, match="became shorter"):
        _Writer._copy(writer, target, "a")
    target.finish()
    target.close()
    assert (tmp_path / "out").read_bytes() == torch.arange(2.0).numpy().tobytes()
    with pytest.raises(CheckpointError, match="ended within 'a'"):
        checkpoint.read("a")


def test_after_a_write_that_failed_none_is_written(monkeypatch):
    """Several results may wait to be written: those behind one that failed would lie in its
    place."""
    writer, wrote = _Writer.__new__(_Writer), []
    writer._failed = []

    def failing(name, result, layers):
        wrote.append(name)
        if name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_store", failing)
    writer.store("a", None, [])
    for name in ("b", "c"):
        with pytest.raises(OSError, match="No space"):
            writer.store(name, None, [])
    assert wrote == ["a", "b"]
