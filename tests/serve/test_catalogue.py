"""The adapter folder: what is found in it, that nothing leads out of it, and what a restart
remembers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.api_server import BASE, FakeBank, adapter_at, serving, until
from torch import nn

import veneer
from veneer.errors import AdapterError, BankFullError, ConfigError, LibraryError
from veneer.serve.catalogue import Catalogue
from veneer.serve.refusal import Refusal
from veneer.serve.served_state import STATE_FILE
from veneer.store.library import Library


@pytest.fixture
def folder(tmp_path):
    for name in ("french", "german"):
        adapter_at(tmp_path / "dir" / name)
    adapter_at(tmp_path / "dir" / "runs" / "7" / "adapter")
    adapter_at(tmp_path / "outside")
    (tmp_path / "secret").mkdir()
    return tmp_path / "dir"


def opened(folder):
    return Catalogue(folder, FakeBank(), BASE)


def test_the_folders_are_the_adapters(folder):
    (folder / "notes").mkdir()
    adapter_at(folder / ".hidden")
    adapter_at(folder / BASE)  # the base's own name
    catalogue = opened(folder)
    assert catalogue.refresh() == ("french", "german")
    assert set(catalogue._bank.paths) == {"french", "german"}


def test_folders_that_come_and_go(folder):
    catalogue = opened(folder)
    adapter_at(folder / "new")
    shutil.rmtree(folder / "german")
    assert catalogue.refresh() == ("french", "german")  # looked at a moment ago
    assert catalogue.refresh(force=True) == ("french", "new")
    assert set(catalogue._bank.paths) == {"french", "new"}


def test_a_folder_that_is_not_whole_is_served_when_it_is(folder, caplog):
    (adapter_at(folder / "new") / "adapter_model.safetensors").unlink()
    catalogue = opened(folder)
    assert catalogue.refresh(force=True) == ("french", "german")
    assert caplog.text.count("Not served") <= 1
    (folder / "new" / "adapter_model.safetensors").touch()
    assert "new" in catalogue.refresh(force=True)


def test_a_folder_that_may_not_be_read_hides_no_other(folder, monkeypatch):
    """Root may read everything, so the system's answer is given here."""
    adapter_at(folder / "locked")
    is_file = Path.is_file

    def refuses(path):
        if path.parent.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuses)
    catalogue = opened(folder)
    assert catalogue.refresh() == ("french", "german")
    with pytest.raises(Refusal) as caught:
        catalogue.load("mine", "locked")
    assert caught.value.status == 404


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="no adapter folder"):
        opened(tmp_path / "none")
    catalogue = opened(None)
    assert catalogue.refresh() == ()
    with pytest.raises(Refusal, match="--adapters"):
        catalogue.load("a", "a")
    with pytest.raises(Refusal, match="--adapters"):
        catalogue.unload("a")


# ----------------------------------------------------------------------------------------------
# nothing leads out

ESCAPES = [
    "..", "../outside", "french/../../outside", "/etc", "./french", "french/.", "french//", "", "//", "french\0", "\0",
    "..\\outside", "french\n", "\u202e../x", "\uff0e\uff0e/outside", "．．/outside", "%2e%2e/outside", "~", "~root",
    "a" * 5000,    "french/adapter_config.json", "none", "link", "link/x", "dirlink/outside", "loop",
]  # fmt: skip


@pytest.fixture
def linked(folder):
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "dirlink").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    return folder


@pytest.mark.parametrize("where", ESCAPES, ids=lambda where: ascii(where[:30]))
def test_paths_stay_in_the_folder(linked, where):
    catalogue = opened(linked)
    with pytest.raises(Refusal) as caught:
        catalogue.load("mine", where)
    assert caught.value.status in (400, 404)
    assert catalogue._bank.loads == 0
    assert "mine" not in catalogue._bank.paths
    assert not (linked / STATE_FILE).exists()


def test_outside_looks_like_not_there(linked):
    catalogue, said = opened(linked), []
    for where in ("link", "none"):
        with pytest.raises(Refusal) as caught:
            catalogue.load("mine", where)
        said.append((caught.value.status, str(caught.value).replace(where, "X")))
    assert said[0] == said[1]


def test_links_out_of_the_folder_are_no_adapters(linked):
    (linked / "inner").symlink_to(linked / "french")
    assert opened(linked).refresh() == ("french", "german", "inner")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"[./\\a-z\x00]{1,20}", fullmatch=True))
def test_no_path_leaves_the_folder(tmp_path_factory, where):
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        adapter_at(folder / "a")
        adapter_at(folder.parent / "b")
    try:
        path = opened(folder)._served_names.resolve_path(where).path
    except Refusal:
        return
    assert path.is_relative_to(folder.resolve())


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".a", "-a", "a b", "a\0", "é", "a" * 129, BASE, "a:b", "a\n"]
)
def test_names_that_cannot_be(folder, name):
    with pytest.raises(Refusal) as caught:
        opened(folder).load(name, "french")
    assert caught.value.status == 400


def test_a_memory_that_leads_out_is_not_followed(linked):
    content = {
        "format": 1,
        "names": {"evil": {"path": "../outside"}, "e2": {"path": "link"}},
        "pinned": [],
        "hidden": [],
    }
    (linked / STATE_FILE).write_text(json.dumps(content))
    assert opened(linked).refresh() == ("french", "german")


# ----------------------------------------------------------------------------------------------
# load, unload, restart


def test_a_loaded_name_is_there_after_a_restart(folder):
    catalogue = opened(folder)
    catalogue.load("fr", "runs/7/adapter", pin=True)
    assert catalogue.root("fr") == "runs/7/adapter"
    again = opened(folder)
    assert again.refresh() == ("fr", "french", "german")
    again.follow_pins()
    assert again._bank.pinned == {"fr"}
    assert again._bank.paths["fr"] == folder.resolve() / "runs/7/adapter"


def test_a_pinned_adapter_that_is_damaged_later_stops_no_start(folder, monkeypatch, caplog):
    opened(folder).load("french", None, pin=True)
    opened(folder).load("german", None, pin=True)
    again, pin = opened(folder), FakeBank.pin

    def refuses(bank, name):
        if name == "french":
            raise AdapterError("Found: a damaged adapter.")
        pin(bank, name)

    monkeypatch.setattr(FakeBank, "pin", refuses)
    again.follow_pins()
    assert again._bank.pinned == {"german"}
    assert "'french' was pinned" in caplog.text


def test_two_servers_of_one_folder_forget_nothing_of_each_other(folder):
    """Each writes what it read a moment ago, with what is new; in between the other one may not."""
    servers = [opened(folder), opened(folder)]
    with ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(
                lambda s=server, n=number: [
                    s.load(f"s{n}-{i}", "runs/7/adapter") for i in range(25)
                ]
            )
            for number, server in enumerate(servers)
        ]
        for one in done:
            one.result(60)
    assert len(json.loads((folder / STATE_FILE).read_text())["names"]) == 50
    assert len(servers[0].refresh(force=True)) == 52


def test_an_unloaded_name_stays_away_until_it_is_loaded(folder):
    catalogue = opened(folder)
    catalogue.load("fr", "runs/7/adapter")
    for name in ("fr", "german"):
        catalogue.unload(name)
    assert catalogue.refresh(force=True) == ("french",)
    again = opened(folder)
    assert again.refresh() == ("french",)
    with pytest.raises(Refusal) as caught:
        again.unload("german")
    assert caught.value.status == 404
    again.load("german", None)
    assert opened(folder).refresh() == ("french", "german")


def test_what_is_loaded_is_not_loaded_again(folder):
    catalogue = opened(folder)
    catalogue.load("french", "french")  # known, and now in memory
    with pytest.raises(Refusal, match="already been loaded") as caught:
        catalogue.load("french", "french")
    assert caught.value.status == 400
    with pytest.raises(Refusal, match="already been loaded"):
        catalogue.load("french", "german")
    assert catalogue._bank.loads == 1
    catalogue.load("french", "french", pin=True)
    assert catalogue._bank.pinned == {"french"}
    catalogue.load("french", None, pin=False)
    assert catalogue._bank.pinned == set()
    assert catalogue._bank.loads == 1
    catalogue.load("german", None, pin=False)  # to let go of what is not held loads nothing
    assert catalogue._bank.loads == 1


def test_in_place(folder):
    catalogue = opened(folder)
    catalogue.load("french", "french")
    catalogue.load("french", "runs/7/adapter", inplace=True)
    assert catalogue._bank.paths["french"] == folder.resolve() / "runs/7/adapter"
    assert opened(folder)._bank.paths["french"] == folder.resolve() / "runs/7/adapter"


@pytest.mark.parametrize("inplace", [False, True])
def test_an_adapter_that_does_not_load_changes_nothing(folder, inplace):
    adapter_at(folder / "bad", broken=True)
    catalogue = opened(folder)
    catalogue.load("french", "french")
    name = "french" if inplace else "mine"
    with pytest.raises(AdapterError):
        catalogue.load(name, "bad", inplace=inplace)
    assert not (folder / STATE_FILE).exists()
    assert catalogue._bank.paths["french"] == folder.resolve() / "french"
    assert "mine" not in catalogue.refresh(force=True)


def test_a_damaged_memory(folder):
    for text in (
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1, "names": {"../x": {"path": "a"}}, "pinned": [], "hidden": []}',
        '{"format": 1, "names": {}, "pinned": "french", "hidden": []}',
        '{"format": 1, "names": {}, "pinned": [], "hidden": {"french": 1}}',
    ):
        (folder / STATE_FILE).write_text(text)
        with pytest.raises(ConfigError, match="damaged"):
            opened(folder)


@pytest.mark.timeout(20)
def test_a_memory_that_never_ends(folder):
    for make in (lambda file: file.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir):
        make(folder / STATE_FILE)
        with pytest.raises(ConfigError, match="no regular file"):
            opened(folder)
        (folder / STATE_FILE).rmdir() if (folder / STATE_FILE).is_dir() else (
            folder / STATE_FILE
        ).unlink()


def test_a_name_that_is_the_bases_now_is_not_served_twice(folder):
    """The server was started with another --name when it was loaded."""
    Catalogue(folder, FakeBank(), "other").load(BASE, "runs/7/adapter")
    assert opened(folder).refresh() == ("french", "german")
    assert Catalogue(folder, FakeBank(), "other").refresh() == ("french", "german", BASE)


def test_a_memory_that_is_damaged_later_stops_nothing(folder, caplog):
    catalogue = opened(folder)
    (folder / STATE_FILE).write_text("{")
    assert catalogue.refresh(force=True) == ("french", "german")
    assert "damaged" in caplog.text
    catalogue.refresh()
    assert caplog.text.count("cannot be read") == 1  # whoever asks for a name that is not there
    with pytest.raises(ConfigError):
        catalogue.unload("french")
    assert catalogue.known("french")


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    def refuses(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("veneer.serve.served_state.write_whole", refuses)
    catalogue = opened(folder)
    catalogue._bank.pin("french")
    for name in ("fr", "french"):
        with pytest.raises(Refusal, match="nothing was changed") as caught:
            catalogue.load(name, "runs/7/adapter", inplace=True)
        assert caught.value.status == 503
    with pytest.raises(Refusal, match="nothing was changed"):
        catalogue.unload("french")
    assert catalogue.refresh(force=True) == ("french", "german")
    assert catalogue._bank.paths["french"] == folder.resolve() / "french"
    assert catalogue._bank.pinned == {"french"}


# ---------------------------------------------------------------------------------------------- a
# library


@pytest.fixture
def library(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    veneer.attach(model, veneer.LoraConfig(rank=1, targets="all")).save(tmp_path / "adapter")
    library = Library(tmp_path / "library")
    for name in ("one", "two"):
        library.add(tmp_path / "adapter", name)
    return library


def test_a_library(library):
    catalogue = opened(library.folder)
    assert catalogue.refresh() == ("one", "two")
    library.remove("two")
    library.add(library.get("one"), "three")
    assert catalogue.refresh(force=True) == ("one", "three")
    catalogue.load("uno", "one")
    assert catalogue.root("uno") == "one"
    catalogue.unload("three")
    assert opened(library.folder).refresh() == ("one", "uno")
    for where in ("none", "../library", "objects", "/etc"):
        with pytest.raises(LibraryError):
            catalogue.load("mine", where)
    assert library.list()[0].name == "one"


# ----------------------------------------------------------------------------------------------
# over HTTP


def test_routes_as_vllm_has_them(folder):
    adapter_at(folder / "bad", broken=True)
    with serving(folder) as it, it.http() as http:

        def post(verb, **body):
            answer = http.post(f"/v1/{verb}_lora_adapter", json=body)
            return answer.status_code, answer.text

        good = (200, "Success: LoRA adapter 'fr' added successfully.")
        assert post("load", lora_name="fr", lora_path="runs/7/adapter") == good
        assert post("load", lora_name="fr", lora_path="runs/7/adapter")[0] == 400
        assert post("load", lora_name="fr", lora_path="runs/7/adapter", load_inplace=True) == good
        assert it.client().completions.create(model="fr", prompt="a").model == "fr"
        entries = {entry["name"]: entry for entry in http.get("/v1/adapters").json()}
        assert entries["fr"] == {
            "name": "fr", "resident": True, "bytes": 100, "pinned": False, "users": 0, "rank": 4, "variant": "lora",
        }  # fmt: skip
        assert post("unload", lora_name="fr") == (
            200,
            "Success: LoRA adapter 'fr' removed successfully.",
        )
        assert post("unload", lora_name="fr")[0] == 404
        assert post("load", lora_name="new")[0] == 400
        assert post("load", lora_name="new", lora_path="none")[0] == 404
        assert post("load", lora_name="new", lora_path="../outside")[0] == 400
        assert post("load", lora_name="new", lora_path="bad")[0] == 400
        assert post("load")[0] == 400
        assert http.get("/v1/models/new").status_code == 404


def test_served_json_says_what_a_client_was_told(folder):
    with serving(folder) as it, it.http() as http:
        http.post(
            "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "french", "pin": True}
        )
        http.post("/v1/unload_lora_adapter", json={"lora_name": "german"})
    assert json.loads((folder / STATE_FILE).read_text()) == {
        "format": 1, "names": {"a": {"path": "french"}}, "pinned": ["a"], "hidden": ["german"],
    }  # fmt: skip


def test_files_that_are_written_anew_are_served_when_they_rest(folder, caplog):
    catalogue = opened(folder)
    catalogue.load("french", None)
    loads = catalogue._bank.loads
    file = folder / "french" / "adapter_model.safetensors"
    file.write_bytes(b"half")
    catalogue.refresh(force=True)
    file.write_bytes(b"all of it")
    catalogue.refresh(force=True)
    assert catalogue._bank.loads == loads  # it may be half written still
    catalogue.refresh(force=True)
    assert catalogue._bank.loads == loads + 1
    assert "french" in catalogue._bank.resident  # it was loaded before the old one went
    catalogue.refresh(force=True)
    assert catalogue._bank.loads == loads + 1


def test_what_is_not_in_memory_is_read_anew_when_it_is_asked_for(folder, monkeypatch):
    catalogue = opened(folder)
    monkeypatch.setattr(FakeBank, "remove", None)  # not even for a moment is there no such name
    (folder / "french" / "adapter_model.safetensors").write_bytes(b"other")
    for _ in range(2):
        catalogue.refresh(force=True)
    assert catalogue._bank.loads == 0
    assert "french" in catalogue._bank.paths


def test_a_change_that_cannot_be_loaded_leaves_the_old_one(folder, caplog):
    catalogue = opened(folder)
    catalogue.load("french", None)
    (folder / "french" / "adapter_config.json").write_text('{"broken": true}')
    for _ in range(4):
        assert "french" in catalogue.refresh(force=True)
    assert "french" in catalogue._bank.resident
    assert caplog.text.count("the new one cannot be loaded") == 1


def test_a_change_that_the_disk_kept_from_being_read_is_tried_again(folder, monkeypatch, caplog):
    catalogue = opened(folder)
    catalogue.load("french", None)
    loads, load = catalogue._bank.loads, FakeBank.add
    disk_errors = [OSError(errno.EMFILE, "Too many open files") for _ in range(2)]

    def add(bank, path, name, *, replace=False):
        if disk_errors:
            raise disk_errors.pop()
        return load(bank, path, name, replace=replace)

    monkeypatch.setattr(FakeBank, "add", add)
    (folder / "french" / "adapter_model.safetensors").write_bytes(b"other")
    for _ in range(4):  # seen, twice in vain, and loaded
        catalogue.refresh(force=True)
    assert catalogue._bank.loads == loads + 1
    assert caplog.text.count("the new one cannot be loaded") == 1


@pytest.mark.parametrize("pin", [(), ("french",)])
def test_a_change_without_room_for_both_takes_the_old_ones_place(folder, monkeypatch, pin):
    """And stays pinned, whether the API or the command line pinned it."""
    catalogue = Catalogue(folder, FakeBank(), BASE, pin)
    catalogue.load("french", None, pin=None if pin else True)
    catalogue.follow_pins()

    def full(bank, path, name, *, replace=False):
        raise BankFullError("Found: 2 bytes to load.")

    monkeypatch.setattr(FakeBank, "add", full)
    (folder / "french" / "adapter_model.safetensors").write_bytes(b"other")
    for _ in range(2):
        catalogue.refresh(force=True)
    assert "french" not in catalogue._bank.resident
    catalogue.follow_pins()
    assert catalogue._bank.pinned == {"french"}


def test_what_is_pinned_is_pinned_again_when_it_comes_back(folder):
    catalogue = Catalogue(folder, FakeBank(), BASE, ["french"])
    catalogue.follow_pins()
    (folder / "french").rename(folder / ".french")
    assert "french" not in catalogue.refresh(force=True)
    (folder / ".french").rename(folder / "french")
    catalogue.refresh(force=True)
    catalogue.follow_pins()
    assert catalogue._bank.pinned == {"french"}


def test_a_name_of_a_library_that_means_another_object_is_replaced(library, monkeypatch):
    catalogue = opened(library.folder)
    catalogue.load("one", None)
    monkeypatch.setattr(FakeBank, "remove", None)
    other = veneer.attach(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(rank=1, targets="all"))
    other.save(library.folder.parent / "other")
    library.add(library.folder.parent / "other", "one", overwrite=True)
    catalogue.refresh(force=True)
    assert catalogue._bank.paths["one"] == library.get("one")
    assert "one" in catalogue._bank.resident


def test_pins_of_another_server_are_followed(folder):
    one, other = opened(folder), opened(folder)
    one.load("french", None, pin=True)
    other.refresh(force=True)
    other.follow_pins()
    assert other._bank.pinned == {"french"}
    one.load("french", None, pin=False)
    other.refresh(force=True)
    other.follow_pins()
    assert other._bank.pinned == set()


def test_a_server_follows_its_folder_by_itself(folder):
    catalogue = opened(folder)
    catalogue.watch()
    adapter_at(folder / "new")
    until(lambda: catalogue.known("new"))
    catalogue.close()


def test_a_remote_place_is_changed_there(tmp_path):
    adapter_at(tmp_path / "made")
    catalogue = opened(f"file://{tmp_path}/nothing-yet")
    assert catalogue.refresh() == ()
    with pytest.raises(Refusal, match="veneer push") as caught:
        catalogue.load("french", "made")
    assert caught.value.code == "remote_adapters"
