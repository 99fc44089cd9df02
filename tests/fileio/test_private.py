"""What holds users' data is for its owner alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from veneer.fileio.private import private_file, private_folder
from veneer.serve.training.operations import Operations
from veneer.serve.training.store import INDEX, Store


@pytest.fixture(autouse=True)
def _open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("there", [False, True])
def test_the_journal_of_the_training_service(tmp_path, there):
    folder = tmp_path / "state"
    if there:  # as an earlier version made it
        folder.mkdir(mode=0o755)
    store = Store(folder)
    try:
        store.require_base("base", "mark")
        assert mode(folder) == 0o700
        data = [path for path in folder.iterdir() if path.name.startswith(INDEX)]
        assert len(data) == 3, "SQLite's log lies beside it"
        assert {mode(path) for path in data} == {0o600}
    finally:
        store.close()


def test_files_and_folders(tmp_path):
    assert mode(private_folder(tmp_path / "a" / "b")) == 0o700
    assert mode(private_file(tmp_path / "file")) == 0o600
    (tmp_path / "shared").touch(mode=0o644)
    assert mode(private_file(tmp_path / "shared")) == 0o644, "its owner has decided"


def test_a_copy_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    source, target, flushed = tmp_path / "source", tmp_path / "runs" / "target", set()
    (source / "adapter").mkdir(parents=True)
    (source / "adapter" / "tensors").write_text("numbers")
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), fsync(file)))
    store = SimpleNamespace(checkpoint=lambda place: True, files_of=lambda place: place)
    operations = SimpleNamespace(store=store, _update_bank=lambda target: None)
    Operations.copy(operations, source, target)  # type: ignore[arg-type]
    assert (target / "adapter" / "tensors").read_text() == "numbers"
    assert {path.stat().st_ino for path in (target.parent, target, *target.rglob("*"))} <= flushed
