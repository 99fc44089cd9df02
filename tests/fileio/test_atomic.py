"""A new file or folder has the mode that anybody's has, whoever else makes files at the same time."""

from __future__ import annotations

import os
import stat

import pytest

from veneer.fileio.atomic import new_file, new_folder


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with new_file(tmp_path / "file") as file:
            file.write_text("x")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "inner").write_text("x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "folder") == 0o777 & ~mask
    assert mode(tmp_path / "file") == mode(tmp_path / "folder" / "inner") == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inner"]


def test_the_umask_is_not_touched(tmp_path, monkeypatch):
    """It belongs to the process: another thread's files would get another mode meanwhile, and two threads that set and
    restore it at once may leave it at 0."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    with new_file(tmp_path / "file") as file:
        file.write_text("x")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("x")
