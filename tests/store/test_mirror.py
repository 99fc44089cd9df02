"""Adapters at a remote place, followed: what comes, changes, goes, and cannot be read."""

from __future__ import annotations

import shutil

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

import veneer
from veneer.errors import RemoteError
from veneer.formats import peft
from veneer.store import catalogue
from veneer.store.catalogue import Mirror
from veneer.store.remote import push


def adapter(path, value):
    handle = veneer.attach(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(rank=1, targets="all"))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.fill_(value)
    handle.save(path)
    return path


@pytest.fixture
def made(tmp_path):
    return [adapter(tmp_path / f"made-{value}", value) for value in (1, 2, 3)]


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    return (
        f"file://{tmp_path}/place" if request.param == "file" else f"memory://{tmp_path.name}/place"
    )


def files(folder):
    return {name: (folder / name).read_bytes() for name in (peft.CONFIG, peft.TENSORS)}


def test_what_is_pushed_is_seen_at_the_next_look(place, made, tmp_path, monkeypatch):
    where = Mirror(place, tmp_path / "cache")
    with pytest.raises(RemoteError, match="place"):
        Mirror("hf://owner/name")
    push(made[0], f"{place}/french")
    push(made[1], f"{place}/german")
    assert {name: files(path) for name, path in where.sync().items()} == {
        "french": files(made[0]), "german": files(made[1]),
    }  # fmt: skip
    before = where.sync()
    push(made[2], f"{place}/french")
    pulled, real = [], catalogue.pull
    monkeypatch.setattr(
        catalogue, "pull", lambda name, **options: pulled.append(name) or real(name, **options)
    )
    after = where.sync()
    assert pulled == [f"{place}/french"]  # and german is not read again
    assert files(after["french"]) == files(made[2])
    assert files(before["french"]) == files(made[0])  # who still reads the old one can
    assert after["german"] == before["german"]


def test_what_is_deleted_is_gone(tmp_path, made):
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")
    for name in ("french", "german"):
        push(made[0], f"file://{tmp_path}/place/{name}")
    assert set(where.sync()) == {"french", "german"}
    shutil.rmtree(tmp_path / "place" / "french")
    assert set(where.sync()) == {"german"}
    push(made[1], f"file://{tmp_path}/place/french")
    assert files(where.sync()["french"]) == files(made[1])


def test_files_that_were_copied_there_are_read_when_they_rest(tmp_path, made):
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")
    shutil.copytree(made[0], tmp_path / "place" / "french")
    assert files(where.sync()["french"]) == files(
        made[0]
    )  # at the start there is nothing to compare with
    shutil.copytree(made[1], tmp_path / "place" / "french", dirs_exist_ok=True)
    shutil.copytree(made[1], tmp_path / "place" / "new")
    assert files(where.sync()["french"]) == files(made[0])
    assert {name: files(path) for name, path in where.sync().items()} == dict.fromkeys(
        ("french", "new"), files(made[1])
    )


def test_files_that_are_copied_to_an_empty_place_are_read_when_they_rest(tmp_path, made):
    (tmp_path / "place").mkdir()
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")
    assert where.sync() == {}
    shutil.copytree(made[0], tmp_path / "place" / "french")
    assert where.sync() == {}
    assert files(where.sync()["french"]) == files(made[0])


def test_what_is_damaged_leaves_the_old_one_and_is_said_once(tmp_path, made, caplog):
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")
    push(made[0], f"file://{tmp_path}/place/french")
    before = where.sync()
    key = push(made[1], f"file://{tmp_path}/place/french").rpartition("@")[2]
    (tmp_path / "place" / "french" / key / peft.TENSORS).write_bytes(b"")
    assert where.sync() == where.sync() == before
    assert caplog.text.count("Not served: french") == 1
    shutil.copyfile(made[1] / peft.TENSORS, tmp_path / "place" / "french" / key / peft.TENSORS)
    assert files(where.sync()["french"]) == files(made[1])


@pytest.mark.parametrize("unreadable", ["place", "place/french"])
def test_what_cannot_be_read_is_not_gone(tmp_path, monkeypatch, made, unreadable):
    """fsspec's `find` takes a folder that it may not read for an empty one."""
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")
    for name in ("french", "german"):
        push(made[0], f"file://{tmp_path}/place/{name}")
    before = where.sync()
    list_folder = LocalFileSystem.ls

    def refused(system, path, *args, **options):
        if f"{path}/".startswith(f"{tmp_path}/{unreadable}/"):
            raise PermissionError("Access Denied")
        return list_folder(system, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "ls", refused)
        with pytest.raises(RemoteError, match="no permission to read"):
            where.sync()
        if unreadable == "place":
            with pytest.raises(RemoteError, match="no permission to read"):
                Mirror(where.address, tmp_path / "cache").sync()
    with monkeypatch.context() as patch:  # an error that has passed when the folder is listed again
        patch.setattr(LocalFileSystem, "find", lambda *_, **__: {})
        assert where.sync() == before
    assert where.sync() == before


def test_a_local_place_that_is_gone_is_an_error_and_an_empty_bucket_is_not(tmp_path, made):
    places = f"file://{tmp_path}/place", f"memory://{tmp_path.name}/emptied"
    local, bucket = (Mirror(place, tmp_path / "cache") for place in places)
    assert local.sync() == bucket.sync() == {}
    for place in places:
        push(made[0], f"{place}/french")
    assert set(local.sync()) == set(bucket.sync()) == {"french"}
    shutil.rmtree(tmp_path / "place")
    with pytest.raises(RemoteError, match="nothing at"):
        local.sync()
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}/emptied", recursive=True)
    assert bucket.sync() == {}


def test_a_place_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, made):
    push(made[0], f"file://{tmp_path}/place/french")
    where = Mirror(f"file://{tmp_path}/place", tmp_path / "cache")

    def refused(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.find", refused)
    with pytest.raises(RemoteError, match="no permission to read"):
        where.sync()
