"""The resolver that vLLM asks: which folder it hands over, and what it does not. vLLM itself runs
in test_vllm_server.py; here two modules stand in for the three names that we use of it."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sys
import tomllib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tests.support.checkpoints import trained
from tests.support.forked import printed
from tests.support.hostile import remove_record
from tests.support.tiny import tiny_model, write_tiny

import veneer
from veneer.adapter_files.file_names import content_hash
from veneer.errors import AdapterError, BaseMismatchError, LibraryError, RemoteError
from veneer.models.base_weights import BaseWeight
from veneer.serve.vllm_plugin import register
from veneer.serve.vllm_resolver import Adapters
from veneer.store.library import Library
from veneer.store.remote import push


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    torch.manual_seed(0)
    for name, config in {"first": {}, "second": {"rank": 3}, "dora": {"variant": "dora"}}.items():
        made[name] = trained(tiny_model(), folder / name, **{"targets": ["q_proj"], **config})
    made["stranger"] = trained(tiny_model(7), folder / "stranger", targets=["q_proj"])
    made["foreign"] = remove_record(Path(shutil.copytree(made["second"], folder / "foreign")))
    return made


@pytest.fixture
def library(tmp_path, made) -> Library:
    library = Library(tmp_path / "library")
    for name, path in made.items():
        library.add(path, name)
    return library


@pytest.fixture
def adapters(library, tmp_path) -> Adapters:
    return Adapters(str(library.folder), cache=tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def alter(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")


def test_a_library_is_handed_over_by_hash(adapters, library, made, base, tmp_path):
    first, second = adapters.find(base, "first"), adapters.find(base, "second")
    for found, name in ((first, "first"), (second, "second")):
        assert contents(found.path) == contents(made[name])
        assert found.path.name == content_hash(made[name])
        assert found.path.is_relative_to(tmp_path / "cache")
        assert adapters.find(base, name) == found
        assert adapters.find(base, f"{name}@{found.path.name}") == found
    assert first.lora_id != second.lora_id
    assert 0 < first.lora_id < 2**63 > second.lora_id > 0

    library.add(made["second"], "first", overwrite=True)
    assert adapters.find(base, "first") == second, "another adapter, another path"
    with pytest.raises(
        LibraryError, match=rf"which is now {second.path.name}.*Expected: {first.path.name}"
    ):
        adapters.find(base, f"first@{first.path.name}")
    shutil.rmtree(library.folder)
    assert contents(first.path) == contents(made["first"]), "vLLM may read it again at any time"


def test_what_is_no_name_of_ours_is_left_to_others(adapters, base):
    for name in (
        "",
        "owner/name",
        "../first",
        "first@",
        "first@main",
        "first@../x",
        "@" + "0" * 64,
        "a" * 200,
    ):
        assert adapters.find(base, name) is None
    with pytest.raises(LibraryError, match=r"no adapter 'frist'.*nearest: 'first'"):
        adapters.find(base, "frist")


@pytest.mark.parametrize("name", ["first", "foreign"])
def test_what_was_altered_is_not_handed_over(adapters, library, base, name, tmp_path):
    """Also where the adapter has no hashes of its own."""
    alter(library.get(name))
    with pytest.raises(AdapterError, match="other files at"):
        adapters.find(base, name)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_what_was_altered_in_the_cache_is_copied_again(adapters, made, base):
    found = adapters.find(base, "foreign")
    alter(found.path)
    assert adapters.find(base, "foreign") == found
    assert contents(found.path) == contents(made["foreign"])


def test_a_remote_place(made, base, tmp_path):
    store = f"file://{tmp_path}/store"
    adapters = Adapters(f"{store}/", cache=tmp_path / "cache")
    versions = [
        push(made[name], f"{store}/french").rpartition("@")[2] for name in ("first", "second")
    ]
    found = adapters.find(base, "french")
    assert contents(found.path) == contents(made["second"])
    old = adapters.find(base, f"french@{versions[0]}")
    assert contents(old.path) == contents(made["first"])
    assert old.lora_id != found.lora_id
    alter(tmp_path / "store" / "french" / versions[1])
    assert adapters.find(base, "french") == found, "it is in the cache, where nobody altered it"
    shutil.rmtree(found.path)
    with pytest.raises(AdapterError, match="other files at"):
        adapters.find(base, "french")
    with pytest.raises(RemoteError, match="nothing at"):
        adapters.find(base, "german")


def test_what_vllm_cannot_serve_is_told(adapters, base):
    with pytest.raises(
        AdapterError, match=r"vLLM cannot load it. Found: it is a DoRA. .*veneer merge"
    ):
        adapters.find(base, "dora")


def test_the_base_is_that_of_the_record(adapters, library, base, tmp_path, caplog, monkeypatch):
    reads, fingerprint = [], BaseWeight.fingerprint
    monkeypatch.setattr(
        BaseWeight,
        "fingerprint",
        lambda self, kind: reads.append(id(self)) or fingerprint(self, kind),
    )
    caplog.set_level(logging.INFO, "vllm.veneer")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: adapters.find(base, "first"), range(4)))) == 1
    assert len(set(reads)) == len(reads) > 4, "each weight is read once"
    adapters.find(base, "second")
    adapters.find(base, "foreign")
    assert len(set(reads)) == len(reads)
    assert re.search(r"\b(\d+) of \1 tensors proven", caplog.text)
    assert "unknown, as another library wrote the adapter" in caplog.text

    with pytest.raises(
        BaseMismatchError,
        match=rf"made for another base.*other numbers in .* in {re.escape(base)}.*VENEER_VERIFY_BASE=0",
    ):
        adapters.find(base, "stranger")
    trusting = Adapters(str(library.folder), verify_base=False, cache=tmp_path / "cache")
    assert trusting.find(base, "stranger").path.is_dir()


def test_a_base_without_the_layers_of_the_adapter(library, tmp_path):
    shallow = write_tiny(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(
        BaseMismatchError,
        match=r"none of 1 of .* tensors \(model.layers.1.self_attn.q_proj.weight\)",
    ):
        Adapters(str(library.folder), cache=tmp_path / "cache").find(str(shallow), "first")


def test_a_base_that_is_not_here_goes_by_its_name(adapters, caplog):
    caplog.set_level(logging.INFO, "vllm.veneer")
    assert adapters.find("nobody/such-a-base", "first").path.is_dir()
    assert "cannot be compared" in caplog.text
    assert "by its name alone (the adapter's is " in caplog.text


def test_a_hub_id_whose_files_are_in_the_hubs_cache(adapters, base, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vllm.veneer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    there, commit = tmp_path / "hub" / "models--owner--base", "0" * 40
    shutil.copytree(base, there / "snapshots" / commit)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(commit)
    adapters.find("owner/base", "first")
    assert "tensors proven" in caplog.text
    with pytest.raises(BaseMismatchError, match="made for another base"):
        adapters.find("owner/base", "stranger")


# ---------------------------------------------------------------------------------------------- the
# plug-in


class Request(SimpleNamespace):
    """LoRARequest."""


@pytest.fixture
def vllm(monkeypatch) -> dict[str, SimpleNamespace]:
    """Stand-ins for what we use of vLLM; what is registered."""

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name, lora_name): ...

    registered = {}
    registry = SimpleNamespace(register_resolver=registered.__setitem__)
    for name, values in {
        "vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }.items():  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def test_nothing_is_registered_without_a_place(vllm, monkeypatch):
    monkeypatch.delenv("VENEER_LIBRARY", raising=False)
    register()
    assert vllm == {}


def test_a_request_or_none(vllm, library, base, made, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VENEER_LIBRARY", str(library.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    register()
    (resolver,) = vllm.values()

    def asked(name: str) -> Request | None:
        return asyncio.run(resolver.resolve_lora(base_model_name=base, lora_name=name))

    path = tmp_path / "home" / "veneer" / "adapters" / "library" / content_hash(made["first"])
    number = 1 + int(path.name[:15], 16)
    assert asked("first") == Request(lora_name="first", lora_int_id=number, lora_path=str(path))
    assert asked("owner/name") is None
    assert caplog.text == ""
    assert asked("stranger") is None
    assert (
        "The adapter 'stranger' is not served. The adapter was made for another base."
        in caplog.text
    )
    monkeypatch.setenv("VENEER_VERIFY_BASE", "0")
    register()
    (resolver,) = vllm.values()
    assert asked("stranger") is not None


def test_the_entry_point_names_it_and_loads_little():
    """vLLM loads plug-ins in each of its processes, of which one at most ever asks."""
    project = tomllib.loads((Path(veneer.__file__).parents[2] / "pyproject.toml").read_text())[
        "project"
    ]
    module, name = project["entry-points"]["vllm.general_plugins"]["veneer"].split(":")
    assert getattr(import_module(module), name) is register
    code = f"import sys, veneer\nbefore = {{*sys.modules}}\nimport {module}\nprint(sorted({{*sys.modules}} - before))"
    loaded = printed(code)
    assert "'veneer.serve.vllm_plugin'" in loaded
    assert {
        name
        for name in ("store", "adapter_files", "models", "attach.")
        if f"veneer.{name}" in loaded
    } == set()
