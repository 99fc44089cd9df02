"""One catalogue over folders, libraries and remote places: what it finds, and which changes it
reports."""

from __future__ import annotations

import os
import shutil

import pytest
from tests.support.api_server import adapter_at
from torch import nn

import veneer
from veneer.errors import ConfigError, LibraryError
from veneer.store.catalogue import (
    Catalogue,
    FolderSource,
    LibrarySource,
    Location,
    RemoteSource,
    name_adapters,
    open_source,
)
from veneer.store.library import Library
from veneer.store.remote import push


@pytest.fixture
def adapter(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    veneer.attach(model, veneer.LoraConfig(rank=1, targets="all")).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_an_address_is_a_folder_a_library_or_a_remote_place(tmp_path, adapter, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    adapter_at(tmp_path / "folder" / "french")
    Library(tmp_path / "library").add(adapter, "french")
    push(adapter, f"file://{tmp_path}/remote/french")
    addresses = {
        FolderSource: tmp_path / "folder",
        LibrarySource: tmp_path / "library",
        RemoteSource: f"file://{tmp_path}/remote/",
    }
    for kind, address in addresses.items():
        source = open_source(address)
        assert type(source) is kind
        assert [*source.list()] == ["french"]
        assert source.resolve("french") == source.list()["french"]
        assert (source.resolve("french").path / "adapter_config.json").is_file()
        with pytest.raises(veneer.VeneerError):
            source.resolve("german")
    with pytest.raises(ConfigError, match="no adapter folder"):
        open_source(tmp_path / "none")


def test_a_pulled_copy_has_the_version_that_was_asked_for(tmp_path, adapter):
    library = Library(tmp_path / "library")
    entry = library.add(adapter, "french")
    source = LibrarySource(library)
    assert source.pull("french", entry.object, cache=tmp_path / "cache").name == entry.object
    with pytest.raises(LibraryError, match="which is now"):
        source.pull("french", "0" * 64, cache=tmp_path / "cache")


def test_changes_are_reported_until_they_are_taken_over(tmp_path):
    source = FolderSource(tmp_path)
    catalogue = Catalogue(source.list)
    for name in ("french", "german"):
        adapter_at(tmp_path / name)
    assert catalogue.refresh() == catalogue.refresh()
    added = catalogue.refresh().added
    assert [*added] == ["french", "german"]
    for name, location in added.items():
        catalogue.accept(name, location)
    assert catalogue.names == ("french", "german")
    shutil.rmtree(tmp_path / "german")
    assert catalogue.refresh().removed == ["german"]
    catalogue.remove("german")
    assert catalogue.refresh().removed == []
    assert "german" not in catalogue
    assert catalogue.resolve("german") is None


@pytest.mark.parametrize("file_name", ["adapter_model.safetensors", "veneer.safetensors"])
def test_files_that_are_written_in_place_count_when_they_rest(tmp_path, file_name):
    catalogue = Catalogue(FolderSource(tmp_path).list)
    tensors = adapter_at(tmp_path / "french") / file_name
    tensors.touch()
    catalogue.accept("french", catalogue.refresh().added["french"])
    os.utime(tensors, (1, 1))
    assert not catalogue.refresh().changed
    changed = catalogue.refresh().changed["french"]
    catalogue.reject("french", changed)  # it could not be loaded, and is not tried again
    assert not catalogue.refresh().changed
    os.utime(tensors, (2, 2))
    assert not catalogue.refresh().changed
    assert catalogue.refresh().changed["french"] != changed


def test_another_folder_of_a_name_counts_at_once(tmp_path):
    listing = {"french": Location(tmp_path / "1")}
    catalogue = Catalogue(lambda: listing)
    catalogue.accept("french", listing["french"])
    listing["french"] = Location(tmp_path / "2")
    assert catalogue.refresh().changed == listing


def test_adapters_are_named_after_their_path():
    named = name_adapters(["runs/french/adapter", "german=runs/german/adapter", "library:dutch"])
    assert named == {
        "adapter": "runs/french/adapter",
        "german": "runs/german/adapter",
        "dutch": "library:dutch",
    }
    with pytest.raises(ConfigError, match="two adapters called 'adapter'"):
        name_adapters(["a/adapter", "b/adapter"])
