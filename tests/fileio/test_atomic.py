"""A new file or folder has the mode that anybody's has, replaces what it may replace and nothing
else, and what a killed writer left is settled."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import OutputExistsError
from veneer.fileio import atomic, locks, temporary
from veneer.fileio.atomic import EVERYTHING, new_file, new_folder
from veneer.fileio.locks import acquire
from veneer.fileio.temporary import NEW, recover, recover_all, write_plan

OURS = ("config", "tensors", "more")


@pytest.fixture(params=["exchanged", "file by file"])
def way(request, monkeypatch) -> str:
    """With a system that exchanges folders in one step, and without."""
    if request.param == "file by file":
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    return request.param


def fill(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    """It belongs to the process: another thread's files would get another mode meanwhile, and two
    threads that set and restore it at once may leave it at 0."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    with new_file(tmp_path / "file") as file:
        file.write_text("x")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_text("x")


# ----------------------------------------------------------------------------------------------
# what is replaced


def test_files_of_others_stay_and_ours_are_replaced(tmp_path, way):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    fill(path, "theirs", "notes.txt", "step_100/optimizer.bin")
    (path / "link").symlink_to(tmp_path)
    theirs = {
        name: (path / name).stat().st_ino
        for name in ("notes.txt", "step_100", "step_100/optimizer.bin")
    }
    with new_folder(path, overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", "config", "tensors")
        assert content(path)["config"] == "old"
    assert content(path) == {
        "config": "new", "tensors": "new", "notes.txt": "theirs", "step_100/optimizer.bin": "theirs",
    }  # fmt: skip
    assert {name: (path / name).stat().st_ino for name in theirs} == theirs, (
        "they were not touched at all"
    )
    assert (path / "link").is_symlink()
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert sorted(one.name for one in path.iterdir()) == [
        "config",
        "link",
        "notes.txt",
        "step_100",
        "tensors",
    ]


def test_a_folder_of_ours_alone_is_replaced_whole(tmp_path, way):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    with new_folder(path, overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", "config", "tensors")
    assert content(path) == {"config": "new", "tensors": "new"}
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_folder_to_which_nobody_else_writes_is_replaced_whole(tmp_path, way):
    path = tmp_path / "object"
    fill(path, "old", "a", "deep/b", "deep/er/c")
    with new_folder(path, overwrite=True, replaces=[EVERYTHING]) as folder:
        fill(folder, "new", "deep/d", "e")
    assert content(path) == {"deep/d": "new", "e": "new"}
    assert not (path / "deep" / "er").exists()


def test_files_that_come_while_we_write_stay(tmp_path, way):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    with new_folder(path, overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", *OURS)
        fill(path, "theirs", "notes.txt", "step_100/optimizer.bin")
    assert content(path) == {
        **dict.fromkeys(OURS, "new"), "notes.txt": "theirs", "step_100/optimizer.bin": "theirs",
    }  # fmt: skip


def test_files_that_come_as_folders_are_exchanged_stay(tmp_path, monkeypatch):
    path, exchange = tmp_path / "run", atomic._exchange
    fill(path, "old", *OURS)

    def late(one, other):
        fill(path, "theirs", "notes.txt")
        return exchange(one, other)

    monkeypatch.setattr(atomic, "_exchange", late)
    with new_folder(path, overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", *OURS)
    assert content(path) == {**dict.fromkeys(OURS, "new"), "notes.txt": "theirs"}


def test_a_folder_in_which_we_work_is_not_taken_away(tmp_path, monkeypatch):
    fill(tmp_path / "run", "old", *OURS)
    monkeypatch.chdir(tmp_path / "run")
    with new_folder(".", overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", *OURS)
    assert Path("config").read_text() == "new"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(tmp_path, overwrite):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputExistsError, match=r"notes.txt, which"):
        new_folder(tmp_path / "notes.txt", overwrite=overwrite).__enter__()
    with pytest.raises(OutputExistsError, match="the folder"):
        new_file(tmp_path / "folder", overwrite=overwrite).__enter__()
    fill(tmp_path / "run", "theirs", "config/mine")
    words = "config is a folder" if overwrite else "which exists"
    with (
        pytest.raises(OutputExistsError, match=words),
        new_folder(tmp_path / "run", overwrite=overwrite) as made,
    ):
        fill(made, "new", "config")
    assert content(tmp_path) == {"notes.txt": "mine", "run/config/mine": "theirs"}


@pytest.mark.parametrize("others", [["original"], ["notes.txt", "original"]], ids=len)
def test_a_file_of_others_is_not_replaced_by_a_folder_of_ours(tmp_path, way, others):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    fill(path, "theirs", *others)
    before = content(path)
    with (
        pytest.raises(OutputExistsError, match="original is a file"),
        new_folder(path, overwrite=True, replaces=OURS) as folder,
    ):
        fill(folder, "new", "config", "original/config")
    recover(path)
    assert content(path) == before
    with new_folder(path, overwrite=True, replaces=(*OURS, "original")) as folder:
        fill(folder, "new", "config", "original/config")
    theirs = dict.fromkeys(set(others) - {"original"}, "theirs")
    assert content(path) == {"config": "new", "original/config": "new", **theirs}


# ----------------------------------------------------------------------------------------------
# what appears meanwhile


def appears(path: Path, what: str) -> None:
    if what == "a file":
        path.write_text("theirs")
    else:
        fill(path, "theirs", "config")


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_what_appears_while_we_write_is_not_replaced_without_leave(tmp_path, way, what):
    path = tmp_path / "out"
    with pytest.raises(OutputExistsError), new_folder(path) as folder:
        fill(folder, "new", "config")
        appears(path, what)
    with pytest.raises(OutputExistsError), new_file(path := tmp_path / "out2") as file:
        file.write_text("new")
        appears(path, what)
    assert set(content(tmp_path).values()) == {"theirs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out2"]


def test_without_a_rename_that_replaces_nothing_we_look(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_rename", lambda *_: False)
    with new_file(tmp_path / "a") as file:
        file.write_text("new")
    with pytest.raises(OutputExistsError), new_file(tmp_path / "b") as file:
        file.write_text("new")
        appears(tmp_path / "b", "a file")
    assert content(tmp_path) == {"a": "new", "b": "theirs"}


def test_an_empty_folder_gives_way(tmp_path, way):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        fill(folder, "new", "config")
    assert content(tmp_path / "out") == {"config": "new"}


# ----------------------------------------------------------------------------------------------
# killed, and living


def killed(path: Path, *, within: bool, steps: int) -> None:
    """Leave ``path`` as a writer does that dies after so many steps of moving its files: the entry
    is gone first."""
    kept = temporary.temporary(path, within=within)
    container = kept.__enter__()
    fill(container / NEW, "new", "config", "tensors")
    write_plan(container, "config", ["config", "tensors"], ["more"])
    done = [
        (path / "config").unlink,
        (path / "more").unlink,
        partial((container / NEW / "tensors").replace, path / "tensors"),
        partial((container / NEW / "config").replace, path / "config"),
    ]
    for step in done[:steps]:
        step()
    (container / temporary.LOCK).unlink()  # the system lets go of it


@pytest.mark.parametrize("within", [True, False], ids=["within", "beside"])
@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("by", ["recover", "sweep", "new_folder"])
def test_what_was_being_replaced_is_the_old_or_the_new(tmp_path, within, steps, by):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    fill(path, "theirs", "notes.txt")
    killed(path, within=within, steps=steps)
    if by == "recover" or within:
        recover(path)
    elif by == "sweep":
        recover_all(tmp_path)
    else:
        with pytest.raises(OutputExistsError):
            new_folder(path).__enter__()
    new = {"config": "new", "tensors": "new", "notes.txt": "theirs"}
    assert content(path) == (
        new if steps else {**dict.fromkeys(OURS, "old"), "notes.txt": "theirs"}
    )
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_plan_whose_folder_somebody_wrote_anew_is_dropped(tmp_path):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    killed(path, within=False, steps=2)
    fill(path, "theirs", "config")
    recover(path)
    assert content(path) == {"config": "theirs", "tensors": "old"}
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


# ----------------------------------------------------------------------------------------------
# folders of strangers


def plan_of(*writes: Any, removes: Any = ()) -> dict[str, Any]:
    return {"entry": "config", "writes": ["config", *writes], "removes": list(removes)}


#: "OUTSIDE" stands for a folder beside the target folder
HOSTILE_PLANS = {
    "no JSON": "{",
    "a list": [],
    "no fields": {},
    "no entry": {"writes": ["config"], "removes": []},
    "an entry that is not written": {"entry": "more", "writes": ["config"], "removes": []},
    "a text for a list": {"entry": "config", "writes": "config", "removes": []},
    "no list of removals": {"entry": "config", "writes": ["config"]},
    "a number for a name": plan_of(1),
    "an empty name": plan_of(""),
    "a name that no system takes": plan_of(removes=["a\0b"]),
    "an absolute removal": plan_of(removes=["OUTSIDE/secret"]),
    "a removal outside": plan_of(removes=["../OUTSIDE/secret"]),
    "a removal through a link": plan_of(removes=["linked/secret"]),
    "a file to a place outside": plan_of("../escaped"),
    "a file to an absolute place": plan_of("OUTSIDE/escaped"),
    "a file through a link": plan_of("linked/escaped"),
    "a file from a link": plan_of("hidden/secret"),
    "a link among the files": plan_of("link"),
    "a folder among the files": plan_of("hiding"),
}


def plant(path: Path, plan: Any) -> Path:
    """A temporary folder in ``path`` as a stranger may send one: no writer has left it."""
    outside, container = path.parent / "outside", path / ".veneer-abc12345.tmp"
    fill(path, "theirs", "tensors")
    fill(outside, "theirs", "secret", "config")
    (path / "linked").symlink_to(outside)
    fill(container / NEW, "new", "config", "linked/escaped", "hiding/x")
    fill(container, "new", "escaped")
    (container / NEW / "hidden").symlink_to(outside)
    (container / NEW / "link").symlink_to(outside / "secret")
    text = plan if isinstance(plan, str) else json.dumps(plan)
    text = text.replace("../OUTSIDE", "../outside").replace("OUTSIDE", str(outside))
    (container / temporary.PLAN).write_text(text)
    return container


@pytest.mark.parametrize("plan", HOSTILE_PLANS.values(), ids=list(HOSTILE_PLANS))
def test_a_plan_that_leads_elsewhere_is_not_followed(tmp_path, plan):
    """Nothing is moved, removed or created, whatever the plan says."""
    plant(tmp_path / "run", plan)
    before = content(tmp_path)
    recover(tmp_path / "run")
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", [temporary.LOCK, temporary.PLAN, NEW, "."])
def test_a_temporary_folder_with_links_is_left_alone(tmp_path, name):
    container = plant(tmp_path / "run", plan_of())
    linked = container / name
    target = tmp_path / "outside" / ("secret" if name in (temporary.LOCK, temporary.PLAN) else "")
    temporary.remove(linked)
    linked.symlink_to(target)
    before = content(tmp_path)
    recover(tmp_path / "run")
    assert content(tmp_path) == before
    assert linked.is_symlink()


def test_a_name_that_stands_for_another_folder_is_not_recovered(tmp_path):
    """ "....x.tmp" is that of a writer of "..", and ".link.x.tmp" that of a writer of a link."""
    folder, outside = tmp_path / "runs", tmp_path / "outside"
    fill(outside, "theirs", "secret")
    for name in ("....abc12345.tmp", ".link.abc12345.tmp"):
        fill(folder / name / NEW, "new", "fresh")
        (folder / name / temporary.PLAN).write_text(
            json.dumps({"entry": "fresh", "writes": ["fresh"], "removes": ["secret"]})
        )
    (folder / "link").symlink_to(outside)
    before = content(tmp_path)
    recover_all(folder)
    assert content(tmp_path) == before


@pytest.mark.parametrize("within", [True, False])
def test_a_lock_that_is_no_file_is_no_error(tmp_path, within):
    container = plant(tmp_path / "run", plan_of())
    lock = container / temporary.LOCK if within else tmp_path / "run" / temporary.FOLDER_LOCK
    lock.mkdir()
    before = content(tmp_path)
    recover(tmp_path / "run")
    assert content(tmp_path) == before


def test_a_replacement_that_the_system_refuses_is_told(tmp_path):
    plant(tmp_path / "run", plan_of("tensors"))
    (tmp_path / "run" / "tensors").unlink()
    fill(tmp_path / "run", "theirs", "tensors/x")
    fill(tmp_path / "run" / ".veneer-abc12345.tmp" / NEW, "new", "tensors")
    (text,) = temporary.recovery_problems(tmp_path / "run")
    assert "a replacement of files that cannot be finished" in text
    assert content(tmp_path / "run")["tensors/x"] == "theirs"


def test_what_a_living_process_writes_is_not_swept(tmp_path):
    fill(tmp_path / "within", "theirs", "notes.txt")
    for path in (tmp_path / "run", tmp_path / "within"):
        with new_folder(path, overwrite=True, replaces=OURS) as folder:
            fill(folder, "new", "config")
            recover_all(tmp_path)
            recover(path)
            assert content(folder) == {"config": "new"}
        assert content(path)["config"] == "new"
    with new_file(tmp_path / "file") as file:
        file.write_text("new")
        recover_all(tmp_path)
    assert content(tmp_path)["file"] == "new"


def test_a_folder_of_a_similar_name_is_none_of_ours(tmp_path):
    fill(tmp_path / "run.v2", "old", "config", "more")
    fill(tmp_path / "run", "old", *OURS)
    (tmp_path / ".run.v2.abc12345.tmp").mkdir()
    recover(tmp_path / "run")
    assert (tmp_path / ".run.v2.abc12345.tmp").exists()
    recover(tmp_path / "run.v2")
    assert not (tmp_path / ".run.v2.abc12345.tmp").exists()


def test_two_writers_of_one_folder_take_turns(tmp_path, monkeypatch):
    path = tmp_path / "run"
    fill(path, "old", *OURS)
    fill(path, "theirs", "notes.txt")
    lock = acquire(path / temporary.FOLDER_LOCK)
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    writing = new_folder(path, overwrite=True, replaces=OURS)
    with pytest.raises(TimeoutError, match="locked by another process"), writing as folder:
        fill(folder, "new", "config")
    assert content(path)["config"] == "old"
    lock.release()
    with new_folder(path, overwrite=True, replaces=OURS) as folder:
        fill(folder, "new", "config")
    assert content(path) == {"config": "new", "notes.txt": "theirs"}
    assert sorted(one.name for one in path.iterdir()) == ["config", "notes.txt"]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTEMPTY])
def test_two_processes_may_remove_a_folder_at_the_same_time(number, tmp_path, monkeypatch):
    folder, removals, rmtree = tmp_path / "folder", [], shutil.rmtree
    (folder / "new").mkdir(parents=True)

    def interrupted(path):
        removals.append(path)
        if len(removals) == 1 or number == errno.ENOENT:
            if number == errno.ENOENT:
                rmtree(path)  # by the other process
            raise OSError(number, os.strerror(number), str(path))
        rmtree(path)

    monkeypatch.setattr(temporary.shutil, "rmtree", interrupted)
    temporary.remove(folder)
    assert not folder.exists()
    assert len(removals) == (1 if number == errno.ENOENT else 2)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EEXIST])
def test_a_leftover_that_goes_meanwhile_is_no_error(tmp_path, monkeypatch, number):
    leftover = tmp_path / ".adapter.abc.tmp"
    leftover.mkdir()

    def gone(path):
        leftover.rmdir()
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(temporary, "acquire", gone)
    temporary.recover(tmp_path / "adapter")
    assert not leftover.exists()
