"""A library: names stand for whole adapters, nothing leads out of its folder, nothing that is in
use goes away."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.adapter_files.file_names import content_hash
from veneer.errors import AdapterError, LibraryError, OutputExistsError
from veneer.fileio.atomic import new_file
from veneer.fileio.temporary import NEW, write_plan
from veneer.store.library import (
    COPY,
    GRACE_SECONDS,
    INDEX,
    LOCK,
    OBJECTS,
    Library,
    default_folder,
    resolve,
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Three adapters of different numbers, for two bases."""
    folder, made = tmp_path_factory.mktemp("adapters"), []
    for number in range(3):
        handle = veneer.attach(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(rank=1 + number))
        randomise(handle)
        made.append(handle.save(folder / f"a{number}", base_name=f"base{number % 2}"))
    return made


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def files(folder: Path) -> set[str]:
    return (
        {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()
    )


# ----------------------------------------------------------------------------------------------
# adding and finding


def test_what_was_added_is_found_and_loads(library, adapters):
    for number, path in enumerate(adapters):
        entry = library.add(path, f"name-{number}", tags=["a", f"t{number}", "a"])
        assert (entry.rank, entry.base, entry.variant) == (number + 1, f"base{number % 2}", "lora")
        assert entry.tags == ("a", f"t{number}")
        assert entry.size == sum(file.stat().st_size for file in path.iterdir())
        assert entry == library.entry(entry.name)
        found = library.get(entry.name)
        assert {file.name: file.read_bytes() for file in found.iterdir()} == {
            file.name: file.read_bytes() for file in path.iterdir()
        }
        veneer.load(nn.Sequential(nn.Linear(4, 4)), found, verify_base=False)
    assert [entry.name for entry in library.list()] == ["name-0", "name-1", "name-2"]
    assert [entry.name for entry in library.list(tag="t1")] == ["name-1"]
    assert [entry.name for entry in library.list(base="base0")] == ["name-0", "name-2"]
    assert library.list(tag="t1", base="base0") == ()


def test_the_same_content_is_stored_once(library, adapters):
    one, two = library.add(adapters[0], "one"), library.add(adapters[0], "two")
    assert one.object == two.object
    assert len(list((library.folder / OBJECTS).iterdir())) == 1
    library.remove("one")
    library.gc(grace=0)
    veneer.adapter_files.read(library.get("two"))


def test_only_an_adapters_own_files_are_copied(library, adapters, tmp_path):
    import shutil

    path = shutil.copytree(adapters[0], tmp_path / "mixed")
    (path / "optimizer.pt").write_bytes(b"x")
    (path / "link").symlink_to(path / "veneer.json")
    assert library.add(path, "x").object == library.add(adapters[0], "y").object
    assert not {"optimizer.pt", "link"} & {file.name for file in library.get("x").iterdir()}


def test_a_name_is_not_replaced_by_accident(library, adapters):
    library.add(adapters[0], "x", tags=["good"])
    with pytest.raises(OutputExistsError, match="an adapter 'x' in"):
        library.add(adapters[1], "x")
    assert library.entry("x").rank == 1
    assert library.add(adapters[1], "x", overwrite=True).tags == (), "what was said of the old one"
    assert library.entry("x").rank == 2


def test_a_damaged_adapter_does_not_get_in(library, adapters, tmp_path):
    import shutil

    path = shutil.copytree(adapters[0], tmp_path / "bad")
    with (path / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    for bad in (path, tmp_path / "nothing", tmp_path):
        with pytest.raises(AdapterError):
            library.add(bad, "x")
    assert files(library.folder) == set()


def test_an_adapter_that_changes_while_it_is_copied_does_not_get_in(library, adapters, monkeypatch):
    def torn(source, folder):
        (folder / "README.md").write_text("half")

    library.add(adapters[0], "x")
    before = files(library.folder)
    monkeypatch.setattr("veneer.store.library.copy_files", torn)
    with pytest.raises(AdapterError, match="changed while they were copied"):
        library.add(adapters[1], "y")
    assert files(library.folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a\\b",
        "a b",
        "-x",
        ".x",
        "a\0",
        "a\n",
        "ü",
        "a" * 129,
        "~",
        "a:b",
        "$(x)",
    ],
)
def test_no_name_leads_out_of_the_folder(library, adapters, tmp_path, name):
    before = files(tmp_path)
    with pytest.raises(LibraryError, match="letters, digits"):
        library.add(adapters[0], name)
    with pytest.raises(LibraryError, match="letters, digits"):
        library.add(adapters[0], "x", tags=["fine", name])
    assert files(tmp_path) == before
    library.add(adapters[0], "x")
    for ask in (library.get, library.entry, library.remove, lambda name: library.tag(name, "t")):
        with pytest.raises(LibraryError, match=r"no adapter|cannot take"):
            ask(name)
    with pytest.raises(LibraryError, match="letters, digits"):
        library.tag("x", name)


@pytest.mark.parametrize(
    "name", ["a", "A", "_x", "9", "a.b", "qwen-2.5_r8", "a" * 128, "con", "index.json"]
)
def test_names_that_are_taken(library, adapters, name):
    library.add(adapters[0], name)
    veneer.adapter_files.read(library.get(name))


def test_an_unknown_name_is_an_error_that_names_the_nearest(library, adapters):
    library.add(adapters[0], "french")
    with pytest.raises(LibraryError, match="nearest: 'french'"):
        library.get("frensh")


def test_a_library_that_is_not_there(library, adapters):
    assert library.list() == ()
    for ask in (lambda: library.get("x"), lambda: library.remove("x"), library.gc, library.rebuild):
        with pytest.raises(LibraryError, match=r"no adapter 'x'|no library in"):
            ask()
    assert not library.folder.exists(), "a mistyped folder does not appear"


# ----------------------------------------------------------------------------------------------
# tags, removing


def test_tags(library, adapters):
    library.add(adapters[0], "x", tags=["a"])
    assert library.tag("x", "b", "a", "c").tags == ("a", "b", "c")
    assert library.tag("x", "d", remove=["a", "c"]).tags == ("b", "d")
    assert library.entry("x").tags == ("b", "d")
    with pytest.raises(LibraryError, match="no tag 'z' at 'x', which has b, d"):
        library.tag("x", "e", remove=["z"])
    with pytest.raises(LibraryError, match="at least one"):
        library.tag("x")
    assert library.entry("x").tags == ("b", "d")


def test_removing_takes_the_name_and_leaves_the_files(library, adapters):
    entry = library.add(adapters[0], "x")
    path = library.get("x")
    assert library.remove("x") == entry
    assert library.list() == ()
    veneer.adapter_files.read(path)
    with pytest.raises(LibraryError):
        library.remove("x")


# ----------------------------------------------------------------------------------------------
# collecting


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_gc_keeps_what_has_a_name_and_what_lost_it_lately(library, adapters):
    paths = {
        name: library.add(path, name) and library.get(name)
        for name, path in zip("abc", adapters, strict=True)
    }
    for path in paths.values():
        age(path, 10 * GRACE_SECONDS)  # added long ago
    assert library.gc().objects == ()
    library.remove("a")
    library.add(adapters[0], "b", overwrite=True)
    library.remove("b")
    assert library.gc().objects == (), "the grace period runs from the moment when the name went"
    for path in paths.values():
        veneer.adapter_files.read(path)
    age(paths["a"], GRACE_SECONDS + 1)
    done = library.gc()
    assert done.objects == (paths["a"].name,)
    assert done.freed > 1000
    assert not paths["a"].exists()
    assert len(library.gc(grace=0).objects) == 1
    veneer.adapter_files.read(library.get("c"))


def test_gc_deletes_what_killed_writers_left_and_nothing_of_others(library, adapters):
    library.add(adapters[0], "x")
    objects = library.folder / OBJECTS
    (objects / ".abc.xyz.tmp").mkdir()
    (objects / ".abc.xyz.tmp" / "adapter_model.safetensors").write_bytes(b"12345")
    (library.folder / ".index.json.abc.tmp").write_text("{}")
    (objects / "notes.txt").write_text("mine")
    (library.folder / "README").write_text("mine")
    done = library.gc()
    assert (done.leftovers, done.freed, done.objects) == (2, 7, ())
    assert {"notes.txt", library.entry("x").object} == {path.name for path in objects.iterdir()}
    assert {path.name for path in library.folder.iterdir()} == {
        INDEX,
        COPY,
        LOCK,
        OBJECTS,
        "README",
    }


def test_gc_leaves_what_a_running_server_is_writing(library, adapters):
    library.add(adapters[0], "x")
    with new_file(library.folder / "served.json") as file:
        file.write_text("{}")
        done = library.gc(grace=0)
    assert (done.leftovers, done.freed) == (0, 0)
    assert (library.folder / "served.json").read_text() == "{}"


def test_gc_finishes_an_object_that_was_being_replaced(library, adapters):
    """By a writer that was killed on a system that exchanges no folders: its files are in two
    places."""
    name, objects = library.add(adapters[0], "x").object, library.folder / OBJECTS
    whole, container = objects / name, objects / f".{name}.abc12345.tmp"
    shutil.copytree(whole, container / NEW)
    write_plan(container, "adapter_config.json", sorted(path.name for path in whole.iterdir()), [])
    (whole / "adapter_config.json").unlink()
    library.gc(grace=0)
    assert content_hash(library.get("x")) == name
    assert [path.name for path in objects.iterdir()] == [name]


def test_a_file_that_is_open_stays_readable(library, adapters):
    library.add(adapters[0], "x")
    with (library.get("x") / "adapter_model.safetensors").open("rb") as file:
        library.remove("x")
        library.gc(grace=0)
        assert file.read() == (adapters[0] / "adapter_model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------
# damage


DAMAGE = {
    "empty": "",
    "torn": '{"format": 1, "names": {"a"',
    "no object": "[]",
    "no names": '{"format": 1}',
    "names are a list": '{"format": 1, "names": []}',
    "a field is missing": '{"format": 1, "names": {"a": {"name": "a", "tags": []}}}',
    "bytes": b"\xff\x00\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_one_error_and_can_be_rebuilt(library, adapters, damage):
    for name, path in zip("abc", adapters, strict=True):
        library.add(path, name, tags=[f"t{name}"])
    before = library.list()
    index = library.folder / INDEX
    index.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    for ask in (
        library.list, lambda: library.get("a"), lambda: library.add(adapters[0], "d"), lambda: library.remove("a"),
        lambda: library.tag("a", "t"), lambda: library.gc(grace=0),
    ):  # fmt: skip
        with pytest.raises(LibraryError, match=r"veneer gc --rebuild --library"):
            ask()
    made = library.rebuild()
    assert (made.kept, made.recovered, made.lost) == (("a", "b", "c"), (), ())
    assert library.list() == before
    assert library.gc(grace=0).objects == ()


def test_an_index_that_is_gone_is_damage_too(library, adapters):
    library.add(adapters[0], "a")
    (library.folder / INDEX).unlink()
    for ask in (library.list, lambda: library.add(adapters[1], "b"), lambda: library.gc(grace=0)):
        with pytest.raises(LibraryError, match="is not there"):
            ask()
    library.rebuild()
    assert [entry.name for entry in library.list()] == ["a"]
    (library.folder / INDEX).unlink()
    (library.folder / COPY).unlink()
    with pytest.raises(LibraryError, match="is not there"):
        library.gc(grace=0)
    (recovered,) = library.rebuild().recovered
    assert recovered.startswith("recovered-")
    assert library.entry(recovered).tags == ("recovered",)
    veneer.adapter_files.read(library.get(recovered))


def test_a_rebuild_gives_up_what_is_altered(library, adapters):
    for name, path in zip("abc", adapters, strict=True):
        library.add(path, name)
    (library.get("a") / "README.md").write_text("altered")
    (library.folder / INDEX).write_text("x")
    made = library.rebuild()
    assert (made.kept, made.recovered, made.lost) == (("b", "c"), (), ("a",))


@pytest.mark.parametrize("index", [None, "x"], ids=["a sound index", "a damaged one"])
def test_what_a_rebuild_gives_up_is_not_deleted_at_once(library, adapters, index):
    """As `veneer gc --rebuild` does one after the other."""
    library.add(adapters[0], "a")
    path = library.get("a")
    (path / "README.md").write_text("my notes")
    age(path, 10 * GRACE_SECONDS)
    if index is not None:
        (library.folder / INDEX).write_text(index)
    assert library.rebuild().lost == ("a",)
    assert library.gc().objects == ()
    assert veneer.adapter_files.read(path).config.rank == 1
    age(path, GRACE_SECONDS + 1)
    assert library.gc().objects == (path.name,)


def test_what_nobody_here_can_read_is_not_deleted_at_once(library, adapters, monkeypatch):
    """An object that only the damaged index named, of a variant that this installation lacks."""
    library.add(adapters[0], "a")
    path = library.get("a")
    age(path, 10 * GRACE_SECONDS)
    for file in (INDEX, COPY):
        (library.folder / file).write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(
            "veneer.store.library.read",
            lambda path: (_ for _ in ()).throw(AdapterError("another variant")),
        )
        assert library.rebuild().lost == (path.name,)
    assert library.gc().objects == ()
    assert veneer.adapter_files.read(path).config.rank == 1


def test_a_recovered_name_takes_none_that_is_in_use(library, adapters):
    first = library.add(adapters[0], "a").object
    library.add(adapters[1], f"recovered-{first[:12]}")
    library.remove("a")
    (library.folder / INDEX).write_text(
        "x"
    )  # its copy is whole: the object of "a" has no name there
    made = library.rebuild()
    assert made.kept == (f"recovered-{first[:12]}",)
    assert made.recovered == (f"recovered-{first}",)
    assert library.entry(made.kept[0]).rank == 2
    assert library.entry(made.recovered[0]).rank == 1


def test_a_rebuild_of_a_sound_library_changes_nothing(library, adapters):
    library.add(adapters[0], "a")
    library.add(adapters[1], "b")
    library.remove("b")
    before = library.list()
    made = library.rebuild()
    assert (made.kept, made.recovered, made.lost) == (("a",), (), ()), (
        "what waits for gc is not brought back"
    )
    assert library.list() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("object", "../../etc"), ("object", "x" * 64), ("name", "b"), ("tags", None), ("tags", [1]), ("base", 5),
        ("size", "1"), ("rank", None), ("variant", None), ("added", 3), ("more", 1),
    ],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_the_folder_or_hold_what_is_no_entry(
    library, adapters, field, value
):
    library.add(adapters[0], "a")
    content = json.loads((library.folder / INDEX).read_text())
    content["names"]["a"][field] = value
    (library.folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(LibraryError, match="is damaged"):
        library.get("a")


def test_an_index_of_a_newer_veneer_is_left_alone(library, adapters):
    library.add(adapters[0], "a")
    text = (library.folder / INDEX).read_text().replace('"format": 1', '"format": 2')
    for file in (INDEX, COPY):
        (library.folder / file).write_text(text)
    for ask in (library.list, library.rebuild, library.gc):
        with pytest.raises(LibraryError, match="newer Veneer"):
            ask()
    assert (library.folder / INDEX).read_text() == text


def test_adding_again_mends_an_altered_object(library, adapters):
    library.add(adapters[0], "a")
    (library.get("a") / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError):
        veneer.adapter_files.read(library.get("a"))
    library.add(adapters[0], "b")
    veneer.adapter_files.read(library.get("a"))


def test_a_folder_that_is_gone_is_an_error_that_says_so(library, adapters):
    import shutil

    library.add(adapters[0], "a")
    shutil.rmtree(library.get("a"))
    with pytest.raises(LibraryError, match="which 'a' stands for"):
        library.get("a")
    library.add(adapters[0], "b")
    veneer.adapter_files.read(library.get("a"))


# ----------------------------------------------------------------------------------------------
# places and help


def test_reading_needs_no_right_to_write(library, adapters):
    library.add(adapters[0], "a")
    before = files(library.folder)
    (library.folder / LOCK).unlink()
    veneer.adapter_files.read(library.get("a"))
    library.list()
    assert files(library.folder) == before - {LOCK}, "readers take no lock and make nothing"


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("VENEER_LIBRARY", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_folder() == Path.home() / ".local" / "share" / "veneer" / "adapters"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_folder() == tmp_path / "data" / "veneer" / "adapters"
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.setenv("VENEER_LIBRARY", "s3://bucket/adapters")
    with pytest.raises(LibraryError, match=r"s3://bucket/adapters, a remote library.*--library"):
        default_folder()


def test_resolve(monkeypatch, tmp_path, library, adapters):
    library.add(adapters[0], "french")
    assert resolve("library:french", library) == library.get("french")
    monkeypatch.setenv("VENEER_LIBRARY", str(library.folder))
    assert resolve("library:french") == library.get("french")
    assert resolve("some/folder") == Path("some/folder")
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(LibraryError):
        resolve("library:../french")


def test_a_pulled_copy_outlives_the_library(library, adapters, tmp_path):
    library.add(adapters[0], "french")
    with pytest.raises(LibraryError, match="no adapter 'german'"):
        library.pull("german", cache=tmp_path / "cache")
    copy = library.pull("french", cache=tmp_path / "cache")
    assert copy == library.pull("french", cache=tmp_path / "cache")
    assert copy.name == library.entry("french").object
    with (library.get("french") / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert library.pull("french", cache=tmp_path / "cache") == copy, (
        "an intact copy is not taken from there again"
    )
    with pytest.raises(AdapterError, match=rf"other files at .*{copy.name} than were put there"):
        library.pull("french", cache=tmp_path / "another")
    assert not (tmp_path / "another").exists() or not any(
        (tmp_path / "another" / "library").iterdir()
    )
    library.remove("french")
    library.gc(grace=0)
    assert len(veneer.adapter_files.read(copy).layers) == 1


def test_entries_are_values(library, adapters):
    entry = library.add(adapters[0], "a")
    assert Library(str(library.folder)) == library
    assert json.loads(json.dumps(dataclasses.asdict(entry)))["name"] == "a"
    assert hash(entry) == hash(library.entry("a"))


def test_a_system_without_flock_is_told_so(library, adapters, monkeypatch):
    import filelock

    library.add(adapters[0], "a")
    monkeypatch.setattr(
        filelock, "FileLock", filelock.SoftFileLock
    )  # as filelock has it where there is no fcntl
    with pytest.raises(LibraryError, match="without flock"):
        library.add(adapters[1], "b")
    veneer.adapter_files.read(library.get("a"))
