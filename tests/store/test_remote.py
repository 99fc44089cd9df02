"""Pushing and pulling: what comes back is what went, a bad download leaves nothing, and each
trouble is one clear error. The hub is a small one on this machine (``hub.py``), the client is
huggingface_hub itself."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from tests.support import hub
from tests.support.forked import printed
from tests.support.hostile import remove_record
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.adapter_files.file_names import content_hash
from veneer.errors import AdapterError, OutputExistsError, RemoteError
from veneer.store.library import Library, resolve
from veneer.store.remote import pull, push

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """A plain adapter, another one, and one whose variant has a file of its own."""
    folder, made = tmp_path_factory.mktemp("adapters"), []
    for number, variant in enumerate(("lora", "lora", "loha")):
        handle = veneer.attach(
            nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(rank=1, variant=variant)
        )
        randomise(handle)
        made.append(handle.save(folder / f"a{number}"))
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "veneer" / "adapters"


@pytest.fixture
def store(request, tmp_path):
    """An empty place of a kind: (URL, function that reads or writes the bytes of a file below
    it)."""
    scheme, name = request.param, tmp_path.name
    place = f"file://{tmp_path}/store" if scheme == "file" else f"memory://{name}/store"
    yield place
    if scheme == "memory":
        system = fsspec.filesystem("memory")
        if system.exists(f"/{name}"):
            system.rm(f"/{name}", recursive=True)


stores = pytest.mark.parametrize("store", ["file", "memory"], indirect=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def kept(cache: Path) -> list[Path]:
    """Everything in the cache: whole adapters, and nothing else."""
    found = (
        [path for path in cache.rglob("*") if path.is_dir() and path.parent != cache]
        if cache.exists()
        else []
    )
    for path in found:
        veneer.adapter_files.read(path)
    return found


def write(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------
# fsspec


@stores
def test_what_comes_back_is_what_went(store, adapters, cache):
    for path in adapters:
        place = push(path, store)
        assert place == f"{store}@{content_hash(path)}"
        for asked in (place, store, f"{store}/"):
            found = pull(asked)
            assert contents(found) == contents(path)
            assert found.is_relative_to(cache)
    first = pull(f"{store}@{content_hash(adapters[0])}")
    assert contents(first) == contents(adapters[0]), "an older revision stays what it was"
    assert contents(pull(store, revision=content_hash(adapters[1]))) == contents(adapters[1])
    assert len(kept(cache)) == 3


def with_tokens(folder: Path) -> Path:
    """An adapter that trains tokens, with their tokenizer beside it and a file that is none of its
    own."""
    handle = veneer.attach(
        nn.Sequential(nn.Embedding(6, 4)),
        veneer.LoraConfig(targets=(), trainable_tokens={"0": [5]}),
    )
    path = handle.save(folder / "tokens")
    (path / "tokenizer.json").write_text("{}")
    (path / "optimizer.pt").write_text("none of its own")
    return path


@stores
def test_the_tokenizer_of_trained_tokens_goes_along(store, cache, tmp_path):
    path = with_tokens(tmp_path)
    wanted = {name: data for name, data in contents(path).items() if name != "optimizer.pt"}
    push(path, store)
    assert contents(pull(store)) == wanted
    push(path, str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == wanted
    (tmp_path / "secret").write_text("{}")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to(tmp_path / "secret")
    for place in (store, str(tmp_path / "leak")):
        with pytest.raises(AdapterError, match=r"a link to .* outside the folder"):
            push(path, place)


@stores
@pytest.mark.parametrize("file", ["tokenizer.json", "chat_template.jinja"])
def test_a_revision_names_the_tokenizer_too(store, cache, tmp_path, file):
    path = with_tokens(tmp_path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    place = push(path, store)
    write(f"{store}/{place.rpartition('@')[2]}/{file}", b'{"altered": 1}')
    with pytest.raises(AdapterError, match=r"other files at .* than were put there"):
        pull(place)
    again = push(path, store)
    assert again == place, "what was altered is put there once more"
    found = pull(place)
    (found / file).write_text("altered in the cache")
    assert (pull(place) / file).read_bytes() == (path / file).read_bytes()
    (path / file).write_text("another one")
    assert push(path, store) != place


@stores
def test_a_revision_of_an_earlier_format_is_still_read(store, cache, tmp_path):
    """It names the folder without its tokenizer."""
    path = with_tokens(tmp_path)
    place = push(path, store)
    tokenizer = path / "tokenizer.json"
    text, _ = tokenizer.read_text(), tokenizer.unlink()
    old = content_hash(path)  # without a tokenizer there is nothing that format 1 left out
    tokenizer.write_text(text)
    for name in (*contents(path),):
        if name != "optimizer.pt":
            write(f"{store}/{old}/{name}", (path / name).read_bytes())
    wanted = {name: data for name, data in contents(path).items() if name != "optimizer.pt"}
    assert contents(pull(f"{store}@{old}")) == wanted
    assert place != f"{store}@{old}"
    library = Library(tmp_path / "library")
    entry = library.add(path, "a")
    shutil.copytree(library.get("a"), library.folder / "objects" / old)
    index = library.folder / "index.json"
    index.write_text(index.read_text().replace(entry.object, old))
    assert library.rebuild().kept == ("a",)
    assert contents(library.pull("a")) == wanted


def test_a_second_entry_has_its_own_chat_template(tmp_path):
    path, library = with_tokens(tmp_path), Library(tmp_path / "library")
    for name in ("first", "second"):
        (path / "chat_template.jinja").write_text(name)
        library.add(path, name)
    assert [(library.get(name) / "chat_template.jinja").read_text() for name in ("first", "second")] == [
        "first", "second",
    ]  # fmt: skip
    assert library.entry("first").size == sum(
        len(data) for data in contents(library.get("first")).values()
    )


@stores
def test_pushing_twice_is_pushing_once(store, adapters, cache):
    assert push(adapters[0], store) == push(adapters[0], store)
    assert contents(pull(store)) == contents(adapters[0])


def test_pushing_again_is_seen_by_no_reader(tmp_path, adapters, cache, monkeypatch):
    """Whoever pulls while the same adapter is pushed once more gets all of it."""
    store = f"file://{tmp_path}/store"
    place, copy, pulled = push(adapters[0], store), shutil.copyfile, []

    def halfway(source, target, **options):
        if str(source).startswith(str(adapters[0])):
            Path(target).write_bytes(Path(source).read_bytes()[:10])
            monkeypatch.setattr(shutil, "copyfile", copy)
            pulled.append(contents(pull(place, cache=tmp_path / f"cache-{len(pulled)}")))
            monkeypatch.setattr(shutil, "copyfile", halfway)
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", halfway)
    assert push(adapters[0], store) == place
    assert pulled == [contents(adapters[0])] * len(contents(adapters[0]))


@stores
def test_what_was_altered_in_the_cache_is_fetched_again(store, adapters, cache, tmp_path):
    """An adapter of another library has no hashes of its own that would tell: the revision is
    one."""
    path = remove_record(shutil.copytree(adapters[0], tmp_path / "theirs"))
    found = pull(push(path, store))
    with (found / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    veneer.adapter_files.read(found)  # nothing in the folder tells
    assert contents(pull(store)) == contents(path)
    (found / "README.md").write_text("altered")
    assert contents(pull(f"{store}@{content_hash(path)}")) == contents(path)


@stores
def test_a_pinned_adapter_needs_no_network(store, adapters, cache, monkeypatch):
    place = push(adapters[0], store)
    pull(place)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert contents(pull(place)) == contents(adapters[0])
    with pytest.raises(RemoteError, match=r"no package fsspec.*pip install 'veneer\[remote\]'"):
        pull(store)


@stores
def test_a_folder_that_somebody_copied_there(store, adapters, cache):
    for name, data in contents(adapters[0]).items():
        write(f"{store}/{name}", data)
    write(f"{store}/evil.pkl", b"x")
    found = pull(store)
    assert contents(found) == contents(adapters[0]), "and nothing but an adapter's own files"
    assert pull(store) == found
    for name, data in contents(adapters[1]).items():
        write(f"{store}/{name}", data)
    assert contents(pull(store)) == contents(adapters[1]), "it is fetched anew each time"
    assert contents(found) == contents(adapters[0])
    with pytest.raises(RemoteError, match="nothing at"):
        pull(store, revision="0" * 64)


@stores
def test_a_bad_download_leaves_nothing(store, adapters, cache):
    key = content_hash(adapters[0])
    push(adapters[0], store)
    file = f"{store}/{key}/adapter_model.safetensors"
    for data in (b"", contents(adapters[0])["adapter_model.safetensors"][:-3]):
        write(file, data)
        for asked in (store, f"{store}@{key}"):
            with pytest.raises(AdapterError, match=key) as caught:
                pull(asked)
            assert "other files at" in str(caught.value)
            assert kept(cache) == []
    push(adapters[0], store)
    assert contents(pull(store)) == contents(adapters[0])


@stores
def test_a_folder_that_is_no_adapter(store, adapters, cache):
    write(f"{store}/readme.txt", b"x")
    with pytest.raises(
        AdapterError, match=rf"What {store} holds is no intact adapter.*no adapter_config.json"
    ) as caught:
        pull(store)
    assert "tmp in" not in str(caught.value)
    write(f"{store}/latest", b"../../etc")
    with pytest.raises(RemoteError, match=r"latest, which holds '../../etc'"):
        pull(store)
    assert kept(cache) == []


@stores
def test_nothing_there(store, cache):
    for asked in (store, f"{store}@{'0' * 64}"):
        with pytest.raises(RemoteError, match=f"nothing at {asked}"):
            pull(asked)
    assert kept(cache) == []


@stores
def test_a_push_that_dies_before_its_end_changes_nothing(store, adapters, cache, monkeypatch):
    """The pointer is the last thing that is written, whichever file the push dies at."""
    push(adapters[0], store)
    for files in range(5):
        system = fsspec.core.url_to_fs(store)[0]
        put, left = type(system).put_file, iter(range(files))

        def dying(self, *args, put=put, left=left, **options):
            if next(left, None) is None:
                raise ConnectionResetError("gone")
            return put(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(type(system), "put_file", dying)
            if files < len(contents(adapters[1])):
                with pytest.raises(RemoteError, match="gone"):
                    push(adapters[1], store)
                assert contents(pull(store)) == contents(adapters[0])
    push(adapters[1], store)
    assert contents(pull(store)) == contents(adapters[1])


@stores
def test_an_altered_copy_in_the_cache_is_fetched_again(store, adapters, cache):
    place = push(adapters[0], store)
    found = pull(place)
    (found / "adapter_model.safetensors").write_bytes(b"")
    assert contents(pull(place)) == contents(adapters[0])


def test_each_place_has_a_cache_of_its_own(adapters, cache, tmp_path):
    one, two = f"file://{tmp_path}/1/x", f"file://{tmp_path}/2/x"
    push(adapters[0], one)
    push(adapters[1], two)
    assert contents(pull(one)) == contents(adapters[0])
    assert contents(pull(two)) == contents(adapters[1])
    assert contents(pull(one, cache=tmp_path / "other")) == contents(adapters[0])
    assert kept(tmp_path / "other")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nosuch://x/y", "Protocol not known"),
        ("hf://name", "hf://owner/name"),
        ("hf://a/b/c", "hf://owner/name"),
        ("hf://../b", "hf://owner/name"),
    ],
)
def test_places_that_are_none(place, message, adapters, cache):
    for use in (lambda: pull(place), lambda: push(adapters[0], place)):
        with pytest.raises(RemoteError, match=message):
            use()


def test_a_scheme_whose_package_is_missing(adapters, cache, monkeypatch):
    def missing(protocol, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "filesystem", missing)
    with pytest.raises(RemoteError, match=r"no package for s3:// places.*Install s3fs"):
        pull("s3://bucket/x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError("Access Denied"), "no permission to write to memory://x .Access Denied"),
        (TimeoutError("timed out"), "memory://x cannot be used .TimeoutError: timed out"),
        (
            RuntimeError("Unable to locate credentials"),
            "RuntimeError: Unable to locate credentials.*credentials",
        ),
    ],
)
def test_troubles_of_a_store_are_one_error(adapters, monkeypatch, error, message):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "makedirs", fails)
    with pytest.raises(RemoteError, match=message) as caught:
        push(adapters[0], "memory://x")
    assert caught.value.__cause__ is error


def test_a_full_disk_is_not_called_a_trouble_of_the_network(adapters, cache, monkeypatch):
    push(adapters[0], "memory://full")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        pull("memory://full")
    assert not isinstance(caught.value, RemoteError)
    assert kept(cache) == []


@stores
def test_what_a_store_does_not_have_is_refused(store, adapters, cache):
    for options in ({"revision": "v1"}, {"message": "m"}, {"private": True}):
        with pytest.raises(RemoteError, match="they are the hub's"):
            push(adapters[0], store, **options)
    with pytest.raises(RemoteError, match="the revision 'v1'"):
        pull(store, revision="v1")
    with pytest.raises(RemoteError, match=r"revisions '0+' and '1+'"):
        pull(f"{store}@{'0' * 64}", revision="1" * 64)


def test_a_damaged_adapter_is_not_pushed(adapters, tmp_path):
    bad = shutil.copytree(adapters[0], tmp_path / "bad")
    (bad / "veneer.json").write_text("{}")
    for place in (f"file://{tmp_path}/store", str(tmp_path / "store"), "hf://a/b"):
        with pytest.raises(AdapterError):
            push(bad, place)
    assert not (tmp_path / "store").exists()


# ----------------------------------------------------------------------------------------------
# paths


def test_a_path_is_itself(adapters, tmp_path):
    assert pull(str(adapters[0])) == adapters[0]
    (tmp_path / "x").mkdir()
    for bad in (tmp_path / "x", tmp_path / "nothing"):
        with pytest.raises(AdapterError):
            pull(str(bad))
    with pytest.raises(RemoteError, match="a revision of the folder"):
        pull(str(adapters[0]), revision="main")


def test_pushing_to_a_path_copies(adapters, tmp_path):
    target = str(tmp_path / "new" / "copy")
    assert push(adapters[2], target) == target
    assert contents(Path(target)) == contents(adapters[2])
    with pytest.raises(OutputExistsError):
        push(adapters[0], target)
    assert contents(Path(target)) == contents(adapters[2])


def test_commands_take_places(adapters, cache):
    place = push(adapters[0], "memory://resolve")
    assert contents(resolve(place)) == contents(adapters[0])


# ---------------------------------------------------------------------------------------------- the
# hub


def go_to(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does, which the client reads when it is imported."""
    import huggingface_hub
    from huggingface_hub.hf_api import HfApi

    monkeypatch.setattr(huggingface_hub, "HfApi", partial(HfApi, endpoint=url))


@pytest.fixture
def server(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    with hub.serving() as running:
        go_to(running.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield running


PLACE = "hf://owner/adapter"


def test_the_hub_gives_back_what_it_got(server, adapters, cache):
    place = push(adapters[0], PLACE)
    repo = server.repos["owner/adapter"]
    assert place == f"{PLACE}@{repo.branches['main']}"
    assert len(repo.commits) == 2, "one commit, and the first one of the repository"
    assert repo.messages == ["Upload adapter"]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes", *contents(adapters[0])}
    for asked in (place, PLACE, f"{PLACE}@main"):
        found = pull(asked)
        assert contents(found) == contents(adapters[0])
        assert found.is_relative_to(cache)
    assert len(kept(cache)) == 1
    assert "README.md" in contents(found)


def test_the_hub_gives_back_the_tokenizer_of_trained_tokens(server, cache, tmp_path):
    path = with_tokens(tmp_path)
    push(path, PLACE)
    assert contents(pull(PLACE)).keys() == contents(path).keys() - {"optimizer.pt"}


def test_pushing_to_the_hub_twice_is_pushing_once(server, adapters):
    assert push(adapters[0], PLACE) == push(adapters[0], PLACE)
    assert len(server.repos["owner/adapter"].commits) == 2


def test_a_commit_that_is_in_the_cache_needs_no_network(server, adapters, cache, monkeypatch):
    place = push(adapters[0], PLACE)
    pull(place)
    server.requests.clear()
    pull(place)
    assert server.requests == []
    go_to("http://127.0.0.1:9", monkeypatch)
    assert contents(pull(place)) == contents(adapters[0])
    with pytest.raises(RemoteError, match="the hub cannot be reached for hf://owner/adapter"):
        pull(PLACE)
    with pytest.raises(RemoteError, match="the hub cannot be reached"):
        pull(PLACE, revision="1" * 40)
    with pytest.raises(RemoteError, match="the hub cannot be reached"):
        push(adapters[0], PLACE)
    assert len(kept(cache)) == 1


def test_revisions_and_branches(server, adapters, cache):
    old = push(adapters[0], PLACE)
    push(adapters[1], PLACE, revision="next/try", message="Another")
    assert server.repos["owner/adapter"].messages[-1] == "Another"
    assert contents(pull(PLACE)) == contents(adapters[0])
    assert contents(pull(f"{PLACE}@next/try")) == contents(adapters[1])
    new = push(adapters[1], PLACE)
    assert contents(pull(PLACE)) == contents(adapters[1])
    assert contents(pull(old)) == contents(adapters[0])
    assert contents(pull(PLACE, revision=new.partition("@")[2])) == contents(adapters[1])
    with pytest.raises(RemoteError, match="no revision 'nope' of hf://owner/adapter"):
        pull(PLACE, revision="nope")


def test_a_push_removes_what_the_last_adapter_had_more(server, adapters, cache):
    push(adapters[2], PLACE)
    repo = server.repos["owner/adapter"]
    repo.commits[repo.branches["main"]]["notes.md"] = b"mine"
    assert "veneer.safetensors" in contents(pull(PLACE))
    push(adapters[0], PLACE)
    assert contents(pull(PLACE)) == contents(adapters[0])
    assert repo.commits[repo.branches["main"]]["notes.md"] == b"mine"


def test_pickles_are_not_fetched(server, adapters, cache):
    push(adapters[0], PLACE)
    repo = server.repos["owner/adapter"]
    repo.commits[repo.branches["main"]]["adapter_model.bin"] = b"pickle"
    repo.commits[repo.branches["main"]]["sub/veneer.json"] = b"pickle"
    server.requests.clear()
    assert contents(pull(PLACE)) == contents(adapters[0])
    assert not [line for line in server.requests if ".bin" in line or "sub/" in line]


def test_a_bad_download_from_the_hub_leaves_nothing(server, adapters, cache):
    push(adapters[0], PLACE)
    repo = server.repos["owner/adapter"]
    files = repo.commits[repo.branches["main"]]
    whole = files["adapter_model.safetensors"]
    files["adapter_model.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(
        AdapterError, match=r"What hf://owner/adapter@[0-9a-f]{40} holds is no intact adapter"
    ):
        pull(PLACE)
    assert kept(cache) == []
    files["adapter_model.safetensors"] = whole
    pull(PLACE)


def test_a_repository_that_holds_no_adapter(server, cache):
    server.repos["owner/adapter"] = hub.Repo()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        pull(PLACE)
    assert kept(cache) == []


def test_a_commit_cannot_lead_out_of_the_cache(server, adapters, cache):
    push(adapters[0], PLACE)
    repo = server.repos["owner/adapter"]
    repo.commits["../../../x"] = repo.commits[repo.branches["main"]]
    repo.branches["main"] = "../../../x"
    with pytest.raises(RemoteError, match=r"the commit '../../../x'"):
        pull(PLACE)
    assert kept(cache) == []


def test_no_such_repository(server, adapters, cache):
    with pytest.raises(
        RemoteError, match="no repository hf://owner/adapter, or one that you may not see"
    ):
        pull(PLACE)


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ({"/commit/": 403}, "no permission to write to hf://owner/adapter"),
        ({"/create": 403, "/api/models": 403}, "no permission to write to"),
        ({"/commit/": 500}, "the hub refused to write to"),
        ({"/validate-yaml": 400}, "Invalid metadata"),
    ],
)
def test_a_push_that_the_hub_refuses(server, adapters, cache, refuse, message):
    server.refuse.update(refuse)
    with pytest.raises(RemoteError, match=message):
        push(adapters[0], PLACE)
    server.refuse.clear()
    for repo in server.repos.values():
        assert list(repo.commits) == ["0" * 40]


@pytest.mark.parametrize("part", ["/revision/", "/tree/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "message"), [(403, "no permission to read"), (404, "hf://owner/adapter")]
)
def test_a_pull_that_the_hub_refuses(server, adapters, cache, part, status, message):
    place = push(adapters[0], PLACE, revision="main")
    server.refuse[part] = status
    with pytest.raises(RemoteError, match=message):
        pull(place if part != "/revision/" else f"{PLACE}@main")
    assert kept(cache) == []


def test_private_is_what_it_says(server, adapters):
    push(adapters[0], PLACE, private=True)
    assert server.repos["owner/adapter"].private
    push(adapters[0], PLACE, private=True)
    push(adapters[0], "hf://owner/open", private=False)
    assert not server.repos["owner/open"].private
    commits = len(server.repos["owner/open"].commits)
    with pytest.raises(RemoteError, match="hf://owner/open, which exists and is public"):
        push(adapters[1], "hf://owner/open", private=True)
    assert len(server.repos["owner/open"].commits) == commits, (
        "nothing went to where all can see it"
    )


def test_offline_mode_is_told(adapters, cache, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match="HF_HUB_OFFLINE"):
        pull(PLACE)


def test_without_the_package_the_error_says_what_to_install(adapters, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (lambda: pull(PLACE), lambda: push(adapters[0], PLACE)):
        with pytest.raises(RemoteError, match=r"pip install 'veneer\[remote\]'"):
            use()


def test_neither_library_is_loaded_without_need():
    code = (
        "import sys, veneer, veneer.store.library, veneer.store.remote, veneer.adapter_files.model_card\n"
        "print([name for name in ('huggingface_hub', 'fsspec', 'yaml') if name in sys.modules])"
    )
    assert printed(code) == "[]\n"


# ----------------------------------------------------------------------------------------------
# veneer.load


def loaded(path, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    handle = veneer.load(model, path, verify_base=False, **options)
    return {name: parameter.detach() for name, parameter in handle.named_parameters()}


@pytest.mark.filterwarnings("ignore::veneer.UnverifiedAdapter")
def test_load_takes_a_remote_place_or_a_hub_id(server, adapters, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = push(adapters[0], PLACE), push(adapters[1], PLACE)
    tensors = [loaded(path) for path in adapters[:2]]
    commit = first.partition("@")[2]
    for path, options, expected in (
        (PLACE, {}, 1),
        (second, {}, 1),
        ("owner/adapter", {}, 1),
        ("owner/adapter", {"revision": commit}, 0),
        ("owner/adapter", {"name": "style", "revision": "main"}, 1),
        (PLACE, {"revision": commit, "cache_dir": tmp_path / "elsewhere"}, 0),
    ):
        result = loaded(path, **options)
        assert result.keys() == tensors[expected].keys()
        assert all(torch.equal(result[key], tensors[expected][key]) for key in result)
    assert kept(cache)
    assert kept(tmp_path / "elsewhere")
    shutil.copytree(adapters[0], tmp_path / "owner" / "adapter")
    asked = len(server.requests)
    assert torch.equal(*(next(iter(t.values())) for t in (loaded("owner/adapter"), tensors[0])))
    assert len(server.requests) == asked, "a local folder of that name goes first"


def test_load_fetches_no_pickle(server, cache):
    server.repos["owner/adapter"] = hub.Repo(
        commits={"1" * 40: {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04."}},
        branches={"main": "1" * 40},
    )
    with pytest.raises(AdapterError, match="no adapter_model"):
        loaded("owner/adapter")
    assert not any("adapter_model.bin" in request for request in server.requests)


def test_load_names_both_readings_of_a_path_that_is_neither(server, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AdapterError, match=r"no folder runs/a, and no adapter hf://runs/a \(no rep"
    ):
        loaded("runs/a")
    with pytest.raises(RemoteError, match="no repository hf://owner/nothing"):
        loaded("hf://owner/nothing")
    with pytest.raises(RemoteError, match="a revision or a cache_dir for the path"):
        loaded(tmp_path, revision="main")
