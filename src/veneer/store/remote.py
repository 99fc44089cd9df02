"""Adapters at remote places: ``push`` a folder there, ``pull`` it into a cache.

    hf://owner/name[@revision]      a model repository of the Hugging Face hub, through
                                    huggingface_hub
    s3://… gs://… memory:// file:// a folder in any file system of fsspec
    anything without "://"          a local folder: pulling reads it, pushing copies to it

``push`` returns an address with a revision, which always means the same bytes. On the hub, the
revision is a commit. Elsewhere it is the hash of the files, which are written so that no reader
sees them change:

    <place>/<hash>/…     the files, first
    <place>/latest       the hash, last: one small object, which every store replaces atomically

A place with an adapter's files and no ``latest`` can be pulled too; it has no revisions. Pulled
files are verified in a temporary folder, which is then renamed. Only an adapter's own files are
fetched: no pickles, no code.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from veneer.adapter_files.file_names import (
    FILES,
    TOKENIZER,
    adapter_file_names,
    content_hash,
    copy_files,
    has_content,
    trains_tokens,
)
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError, RemoteError, VeneerError
from veneer.fileio.atomic import EVERYTHING, new_file, new_folder, write_whole
from veneer.models.gguf_conversion import cache_dir

__all__ = ["pull", "push"]

HUB = "hf://"
LATEST = "latest"
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: errors of this machine's disk, which the command line explains
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH = re.compile(r"[0-9a-f]{64}")


def is_remote(place: str) -> bool:
    """Whether a text is the address of a remote place, not a local path."""
    return "://" in place


def push(
    path: str | Path,
    place: str,
    *,
    revision: str | None = None,
    message: str | None = None,
    private: bool | None = None,
) -> str:
    """Verify an adapter folder, and copy it to a remote place.

    Args:
        place: see above. A missing repository of the hub is created.
        revision: the branch of the hub's repository, created if it is missing; None takes "main".
        message: of the hub's commit; None takes "Upload adapter".
        private: whether a new repository is private; None leaves that to the hub.

    Returns:
        the address with the new revision, for ``pull``; for a local path, the path.

    Raises:
        AdapterError: the folder is no intact adapter.
        RemoteError: no such place, no network, no permission, or options that the place does not
            support.
        OutputExistsError: the place is a local path that is not empty.
    """
    path, target = Path(path), parse_place(place, revision)
    read(path)
    if target.kind != "hub" and (target.revision or message is not None or private is not None):
        problem = f"a revision, a message or private for {target.address}"
        raise RemoteError(
            problem, "none: they are the hub's", "leave them out; a push returns its revision"
        )
    match target.kind:
        case "hub":
            return _push_hub(path, target, message or "Upload adapter", private)
        case "store":
            return _push_store(path, target)
        case _:
            with new_folder(target.address) as folder:
                copy_files(path, folder)
            return target.address


def pull(place: str, *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Fetch the adapter at a remote place into the cache and verify it. The folder must not be
    changed.

    Args:
        place: see above; a local path is verified and returned.
        revision: a branch, a tag or a commit of the hub's repository; elsewhere the part after the
            "@" in the address that ``push`` returned. It may be part of ``place`` too. None takes
            the newest. With a commit or a hash that was pulled before, no network is needed.
        cache: the folder of the cache; None takes ``veneer/adapters`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.

    Raises:
        AdapterError: the place holds no intact adapter. The cache is unchanged.
        RemoteError: no such place or revision, no network, no permission.
    """
    source = parse_place(place, revision)
    if source.kind == "path":
        if source.revision:
            raise RemoteError(f"a revision of the folder {place}", "none", "leave it out")
        return read(source.address).path
    # the folder's name in the cache: a readable part, and a hash
    slug = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(source.address).name)[:60].strip(".-")
        or "adapter"
    )
    named = f"{slug}-{hashlib.sha256(source.address.encode()).hexdigest()[:12]}"
    keep = (cache or cache_dir() / "adapters") / named
    return _pull_hub(source, keep) if source.kind == "hub" else _pull_store(source, keep)


@dataclass(frozen=True)
class Place:
    """A place: its kind ("hub", "store" or "path"), and its address without the revision."""

    kind: str
    address: str
    revision: str | None


def parse_place(place: str, revision: str | None) -> Place:
    """Split an address and its revision. Outside the hub, only a text like a hash counts as a
    revision, because "@" is common in URLs and paths."""
    kind, address, suffix = "path", place, ""
    if place.startswith(HUB):
        kind, (address, _, suffix) = "hub", place.partition("@")
        address = address.rstrip("/")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", address.removeprefix(HUB), re.ASCII):
            raise RemoteError(
                f"the place {place!r}", "hf://owner/name or hf://owner/name@revision", "write it so"
            )
    elif is_remote(place):
        if _HASH.fullmatch(place.rpartition("@")[2]):
            address, _, suffix = place.rpartition("@")
        kind, address = "store", address.rstrip("/")
    if suffix and revision and suffix != revision:
        raise RemoteError(
            f"revisions {suffix!r} and {revision!r} for {address}", "one", "leave one out"
        )
    return Place(kind, address, suffix or revision)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        problem = f"no package {name}, which remote places need"
        raise RemoteError(problem, "it installed", "pip install 'veneer[remote]'") from error


def keep_folder(
    target: Path, place: str, fetch: Callable[[Path], None], key: str | None = None
) -> Path:
    """Return the folder ``target`` of the cache if it is intact. Otherwise let ``fetch`` fill a new
    folder, verify it, and move it there. ``key``: the required ``content_hash``."""
    if _intact(target, key):
        return target
    with new_folder(target, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
        fetch(folder)
        if key is not None and not has_content(folder, key):
            raise AdapterError(
                f"other files at {place} than were put there",
                "those of that hash",
                "put them there again",
            )
        try:
            read(folder)
        except AdapterError as error:
            text = str(error).replace(str(folder), place)
            raise AdapterError(f"What {place} holds is no intact adapter. {text}") from error
    return target


def _intact(folder: Path, key: str | None = None) -> bool:
    """Whether a folder holds an intact adapter, with this content hash if ``key`` is given. (Many
    adapters have no recorded hashes by which a damaged file could be detected.)"""
    with suppress(AdapterError):
        if folder.is_dir():
            read(folder)
            return key is None or has_content(folder, key)
    return False


def _api() -> Any:
    return _package("huggingface_hub").HfApi(library_name="veneer")


def _push_hub(path: Path, target: Place, message: str, private: bool | None) -> str:
    """Push as one commit, so that no reader sees files of two adapters: ``upload_folder`` may make
    several commits."""
    hub, api, repo = _package("huggingface_hub"), _api(), target.address.removeprefix(HUB)
    with _hub_errors(target, "write to"):
        api.create_repo(repo, private=private, exist_ok=True)
        if (
            private is not None and bool(api.model_info(repo).private) != private
        ):  # the hub ignores ``private`` for an existing repository
            problem = f"{target.address}, which exists and is {'public' if private else 'private'}"
            raise RemoteError(
                problem, "the other", "change it in its settings on the hub, or choose another name"
            )
        if target.revision and not target.revision.startswith("refs/"):
            api.create_branch(repo, branch=target.revision, exist_ok=True)
        remote_files = set(api.list_repo_files(repo, revision=target.revision))
        local_files, ours = (
            adapter_file_names(path),
            (*FILES, *(TOKENIZER if trains_tokens(path) else ())),
        )
        stale = [
            name for name in ours if name in remote_files and name not in local_files
        ]  # files of another variant, for example
        operations = [hub.CommitOperationAdd(name, str(path / name)) for name in local_files]
        operations += [hub.CommitOperationDelete(name) for name in stale]
        done = api.create_commit(repo, operations, commit_message=message, revision=target.revision)
    return f"{target.address}@{done.oid}"


def _pull_hub(source: Place, keep: Path) -> Path:
    repo, revision = source.address.removeprefix(HUB), source.revision or ""
    if _COMMIT.fullmatch(revision) and _intact(keep / revision):
        return keep / revision  # needs no network
    with _hub_errors(source, "read"):
        commit = str(_api().model_info(repo, revision=source.revision).sha)
    if not _COMMIT.fullmatch(commit):  # the commit becomes part of a path
        raise RemoteError(
            f"the commit {commit!r} of {source.address}",
            "40 hexadecimal digits",
            "check HF_ENDPOINT",
        )

    def fetch(folder: Path) -> None:
        with _hub_errors(source, "read"):
            _api().snapshot_download(
                repo, revision=commit, local_dir=folder, allow_patterns=list(FILES)
            )
            if trains_tokens(folder):
                _api().snapshot_download(
                    repo, revision=commit, local_dir=folder, allow_patterns=list(TOKENIZER)
                )
        shutil.rmtree(
            folder / ".cache", ignore_errors=True
        )  # hide the hub client's notes about the download

    return keep_folder(keep / commit, f"{source.address}@{commit}", fetch)


@contextmanager
def _hub_errors(place: Place, action: str) -> Iterator[None]:
    """Turn errors of the hub's client into one clear error."""
    errors: Any = _package("huggingface_hub.errors")
    address = place.address
    try:
        yield
    except VeneerError:
        raise
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HTTPError,
        OSError,
        ValueError,
    ) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        answers = (getattr(cause, "response", None) for cause in (error, error.__cause__))
        status = next((answer.status_code for answer in answers if answer is not None), None)
        login = "log in with `hf auth login`"
        if isinstance(error, errors.GatedRepoError):
            words = (
                f"{address} is gated",
                f"leave to {action} it",
                f"accept its terms on its page, and {login}",
            )
        elif isinstance(error, errors.RevisionNotFoundError):
            words = (
                f"no revision {place.revision!r} of {address}",
                "a branch, a tag or a commit",
                "check the spelling",
            )
        elif isinstance(error, errors.RepositoryNotFoundError):
            do = f"check the spelling; for a private one {login}"
            words = f"no repository {address}, or one that you may not see", f"one to {action}", do
        elif status in (401, 403):
            words = f"no permission to {action} {address}", "it", f"{login} as somebody who may"
        elif status is None and not isinstance(error, ValueError):
            do = (
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a commit that was pulled"
                " before needs none"
            )
            words = (
                f"the hub cannot be reached for {address} ({_summarise(error)})",
                "a network",
                do,
            )
        else:
            do = "see what it says, or try again later"
            words = f"the hub refused to {action} {address} ({_summarise(error)})", "an answer", do
        raise RemoteError(*words) from error


def file_system(place: Place) -> tuple[Any, str]:
    """The fsspec file system of a place, and the path there."""
    fsspec = _package("fsspec")
    scheme = place.address.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(place.address)
    except ImportError as error:
        do = f"install it ({_summarise(error)})"
        raise RemoteError(
            f"no package for {scheme}:// places", "one that fsspec uses", do
        ) from error
    except ValueError as error:
        expected = "hf://, file://, s3:// or another scheme of fsspec"
        raise RemoteError(f"the place {place.address!r} ({error})", expected, "check it") from error
    system.invalidate_cache()  # other clients write there too
    return system, root.rstrip("/")


def _push_store(path: Path, target: Place) -> str:
    key = content_hash(path)
    with store_errors(target, "write to"):
        system, root = file_system(target)
        system.makedirs(f"{root}/{key}", exist_ok=True)
        # on a store where writing a file is not atomic
        steps = getattr(system, "local_file", False)
        for name in adapter_file_names(path):
            if steps:  # a reader may be reading files of an earlier push
                with new_file(Path(root) / key / name, overwrite=True) as file:
                    system.put_file(str(path / name), str(file))
            else:
                system.put_file(str(path / name), f"{root}/{key}/{name}")
        if steps:
            write_whole(Path(root) / LATEST, key)
        else:
            system.pipe_file(f"{root}/{LATEST}", key.encode())
    return f"{target.address}@{key}"


def _pull_store(source: Place, keep: Path) -> Path:
    key = source.revision
    if key is not None and not _HASH.fullmatch(key):
        problem, do = (
            f"the revision {key!r} of {source.address}",
            "give that, or leave it out for the newest",
        )
        raise RemoteError(problem, "what `push` returned after the '@'", do)
    if key is not None and _intact(keep / key, key):
        return keep / key  # needs no network
    with store_errors(source, "read"):
        system, root = file_system(source)
        if key is None and system.exists(f"{root}/{LATEST}"):
            key = system.cat_file(f"{root}/{LATEST}").decode("ascii", "replace").strip()
            if not _HASH.fullmatch(key):
                problem = f"{source.address}/{LATEST}, which holds {key[:80]!r}"
                raise RemoteError(problem, "the hash of an adapter", "push one, or name a revision")
    remote_folder = root if key is None else f"{root}/{key}"

    def fetch(folder: Path) -> None:
        with store_errors(source, "read"):
            remote_names = {
                PurePosixPath(file).name for file in system.ls(remote_folder, detail=False)
            }
            for names in (FILES, TOKENIZER):
                for name in names if names is FILES or trains_tokens(folder) else ():
                    if name in remote_names:
                        system.get_file(f"{remote_folder}/{name}", str(folder / name))

    if key is not None:
        return keep_folder(keep / key, f"{source.address}@{key}", fetch, key)
    with (
        TemporaryDirectory() as name
    ):  # a place without revisions is fetched each time, and cached under its content hash
        fetched = Path(name)
        fetch(fetched)
        key = content_hash(fetched)
        return keep_folder(
            keep / key, source.address, lambda folder: copy_files(fetched, folder), key
        )


@contextmanager
def store_errors(place: Place, action: str) -> Iterator[None]:
    """Turn errors of a file system into one clear error. They may have any class of its client
    library."""
    try:
        yield
    except Exception as error:
        if isinstance(error, VeneerError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        address, message = place.address, _summarise(error)
        if isinstance(error, FileNotFoundError):
            suffix = f"@{place.revision}" if place.revision else ""
            words = (
                f"nothing at {address}{suffix}",
                "an adapter that was pushed there",
                "check the place",
            )
        elif isinstance(error, PermissionError):
            words = (
                f"no permission to {action} {address} ({message})",
                "it",
                "check the credentials",
            )
        else:
            do = "check the network, the place and the credentials"
            words = (
                f"{address} cannot be used ({type(error).__name__}: {message})",
                f"a place to {action}",
                do,
            )
        raise RemoteError(*words) from error


def _summarise(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
