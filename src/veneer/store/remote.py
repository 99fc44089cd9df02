"""Adapters at remote places: ``push`` copies a folder to a place, ``pull`` fetches it into a cache.

A place is written as an address:

    hf://owner/name[@revision]      a model repository of the Hugging Face hub, through
                                    huggingface_hub
    s3://… gs://… memory:// file:// a folder in any file system of fsspec
    anything without "://"          a local folder: pulling reads it, pushing copies to it

``push`` returns an address with a revision, which always stands for the same bytes. On the hub, the
revision is a commit. Elsewhere it is the hash of the adapter's files, which are written so that no
reader sees a mixture of two pushes:

    <place>/<hash>/…     the files, written first
    <place>/latest       the hash, written last: a small object that stores replace atomically

A place that holds an adapter's files directly, without ``latest``, can be pulled too. It has no
revisions. Pulled files are verified in a temporary folder, which is then moved into the cache. Only
the files of an adapter are fetched, which are neither pickles nor code.
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
    TOKENIZER_FILES,
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

#: the beginning of an address on the Hugging Face hub
HUB = "hf://"
#: the file of a place that holds the hash of the newest push
LATEST = "latest"
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: error numbers of a full disk on this machine. These errors are not turned into a ``RemoteError``,
#: because the command line explains them.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH = re.compile(r"[0-9a-f]{64}")


def is_remote(address: str) -> bool:
    """Whether ``address`` names a remote place, rather than a local folder."""
    return "://" in address


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
        place: an address as in the module's description. If it names a repository of the hub that
            does not exist, the repository is created.
        revision: the branch of the hub's repository, created if it is missing; None takes "main".
        message: the message of the hub's commit; None takes "Upload adapter".
        private: whether a new repository is private; None leaves the choice to the hub.

    Returns:
        the address with the new revision, for ``pull``; for a local path, the path.

    Raises:
        AdapterError: the folder is no intact adapter.
        RemoteError: no such place, no network, no permission, or options that the place does not
            support.
        OutputExistsError: the place is a local path that is not empty.
    """
    path, target = Path(path), parse_address(place, revision)
    read(path)
    if target.kind != "hub" and (target.revision or message is not None or private is not None):
        raise RemoteError(
            f"a revision, a message or private for {target.url}",
            "none: they are the hub's",
            "leave them out; a push returns its revision",
        )
    match target.kind:
        case "hub":
            return _push_hub(path, target, message or "Upload adapter", private)
        case "store":
            return _push_store(path, target)
        case _:
            with new_folder(target.url) as folder:
                copy_files(path, folder)
            return target.url


def pull(place: str, *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Fetch the adapter at a remote place into the cache, verify it, and return its folder. Do not
    change this folder: later calls return it again.

    Args:
        place: an address as in the module's description. A local folder is verified and returned.
        revision: on the hub, a branch, a tag or a commit; elsewhere the part behind the "@" in the
            address that ``push`` returned. The address ``place`` may contain the revision instead.
            None takes the newest revision. A commit or hash that was pulled before needs no
            network.
        cache: the folder of the cache; None takes ``veneer/adapters`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.

    Raises:
        AdapterError: the place holds no intact adapter. The cache is unchanged.
        RemoteError: no such place or revision, no network, no permission.
    """
    source = parse_address(place, revision)
    if source.kind == "path":
        if source.revision:
            raise RemoteError(f"a revision of the folder {place}", "none", "leave it out")
        return read(source.url).path
    # the folder's name in the cache: the last part of the address, and a hash of the address
    slug = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(source.url).name)[:60].strip(".-")
        or "adapter"
    )
    folder_name = f"{slug}-{hashlib.sha256(source.url.encode()).hexdigest()[:12]}"
    cache_folder = (cache or cache_dir() / "adapters") / folder_name
    return (
        _pull_hub(source, cache_folder)
        if source.kind == "hub"
        else _pull_store(source, cache_folder)
    )


@dataclass(frozen=True)
class RemoteAddress:
    """A parsed address of a place.

    Fields:
        kind: "hub", "store" (a file system of fsspec) or "path" (a local folder).
        url: the address without the revision.
    """

    kind: str
    url: str
    revision: str | None


def parse_address(text: str, revision: str | None) -> RemoteAddress:
    """Split an address from its revision. Outside of the hub, the part behind an "@" is a revision
    only if it looks like a hash, because "@" is common in URLs and paths."""
    kind, address, suffix = "path", text, ""
    if text.startswith(HUB):
        kind, (address, _, suffix) = "hub", text.partition("@")
        address = address.rstrip("/")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", address.removeprefix(HUB), re.ASCII):
            raise RemoteError(
                f"the place {text!r}", "hf://owner/name or hf://owner/name@revision", "write it so"
            )
    elif is_remote(text):
        if _HASH.fullmatch(text.rpartition("@")[2]):
            address, _, suffix = text.rpartition("@")
        kind, address = "store", address.rstrip("/")
    if suffix and revision and suffix != revision:
        raise RemoteError(
            f"revisions {suffix!r} and {revision!r} for {address}", "one", "leave one out"
        )
    return RemoteAddress(kind, address, suffix or revision)


def _import_package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RemoteError(
            f"no package {name}, which remote places need",
            "it installed",
            "pip install 'veneer[remote]'",
        ) from error


def ensure_cached(
    target: Path, address: str, fetch: Callable[[Path], None], files_hash: str | None = None
) -> Path:
    """Return the folder ``target`` of the cache if it holds an intact adapter. Otherwise let
    ``fetch`` fill a new folder, verify its files, and move it to ``target``.

    Args:
        address: the address of the adapter, for errors.
        files_hash: the ``content_hash`` that the files must have; None accepts any.
    """
    if _is_intact(target, files_hash):
        return target
    with new_folder(target, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
        fetch(folder)
        if files_hash is not None and not has_content(folder, files_hash):
            raise AdapterError(
                f"other files at {address} than were put there",
                "those of that hash",
                "put them there again",
            )
        try:
            read(folder)
        except AdapterError as error:
            text = str(error).replace(str(folder), address)
            raise AdapterError(f"What {address} holds is no intact adapter. {text}") from error
    return target


def _is_intact(folder: Path, files_hash: str | None = None) -> bool:
    """Whether a folder holds a valid adapter, and its files have the content hash ``files_hash`` if
    one is given. (Many adapters record no hashes of their files, so that ``read`` alone cannot
    detect every damaged file.)"""
    with suppress(AdapterError):
        if folder.is_dir():
            read(folder)
            return files_hash is None or has_content(folder, files_hash)
    return False


def _hub_api() -> Any:
    return _import_package("huggingface_hub").HfApi(library_name="veneer")


def _push_hub(path: Path, target: RemoteAddress, message: str, private: bool | None) -> str:
    """Push as one commit, so that no reader sees a mixture of two adapters. (The hub client's
    ``upload_folder`` could make several commits.)"""
    hub = _import_package("huggingface_hub")
    api = _hub_api()
    repository = target.url.removeprefix(HUB)
    with _hub_errors(target, "write to"):
        api.create_repo(repository, private=private, exist_ok=True)
        # the hub ignores ``private`` for an existing repository
        if private is not None and bool(api.model_info(repository).private) != private:
            raise RemoteError(
                f"{target.url}, which exists and is {'public' if private else 'private'}",
                "the other",
                "change it in its settings on the hub, or choose another name",
            )
        if target.revision and not target.revision.startswith("refs/"):
            api.create_branch(repository, branch=target.revision, exist_ok=True)
        remote_files = set(api.list_repo_files(repository, revision=target.revision))
        local_files = adapter_file_names(path)
        possible_names = (*FILES, *(TOKENIZER_FILES if trains_tokens(path) else ()))
        # files of the previous adapter that the new one lacks
        stale = [
            name for name in possible_names if name in remote_files and name not in local_files
        ]
        operations = [hub.CommitOperationAdd(name, str(path / name)) for name in local_files]
        operations += [hub.CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repository, operations, commit_message=message, revision=target.revision
        )
    return f"{target.url}@{commit.oid}"


def _pull_hub(source: RemoteAddress, cache_folder: Path) -> Path:
    repository, revision = source.url.removeprefix(HUB), source.revision or ""
    if _COMMIT.fullmatch(revision) and _is_intact(cache_folder / revision):
        return cache_folder / revision  # needs no network
    with _hub_errors(source, "read"):
        commit = str(_hub_api().model_info(repository, revision=source.revision).sha)
    if not _COMMIT.fullmatch(commit):  # the commit becomes part of a path
        raise RemoteError(
            f"the commit {commit!r} of {source.url}",
            "40 hexadecimal digits",
            "check HF_ENDPOINT",
        )

    def fetch(folder: Path) -> None:
        with _hub_errors(source, "read"):
            _hub_api().snapshot_download(
                repository, revision=commit, local_dir=folder, allow_patterns=list(FILES)
            )
            if trains_tokens(folder):
                _hub_api().snapshot_download(
                    repository,
                    revision=commit,
                    local_dir=folder,
                    allow_patterns=list(TOKENIZER_FILES),
                )
        # remove the files in which the hub's client records the download
        shutil.rmtree(folder / ".cache", ignore_errors=True)

    return ensure_cached(cache_folder / commit, f"{source.url}@{commit}", fetch)


@contextmanager
def _hub_errors(remote: RemoteAddress, action: str) -> Iterator[None]:
    """Turn an error of the hub's client into a ``RemoteError``. ``action``: what was tried, such as
    "read", for the message."""
    errors: Any = _import_package("huggingface_hub.errors")
    address = remote.url
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:  # base classes of the client's errors
        if isinstance(error, VeneerError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        responses = (getattr(cause, "response", None) for cause in (error, error.__cause__))
        status = next(
            (response.status_code for response in responses if response is not None), None
        )
        login, message = "log in with `hf auth login`", _summarise(error)
        # the texts of the first case that applies
        cases = (
            (
                isinstance(error, errors.GatedRepoError),
                f"{address} is gated",
                f"leave to {action} it",
                f"accept its terms on its page, and {login}",
            ),
            (
                isinstance(error, errors.RevisionNotFoundError),
                f"no revision {remote.revision!r} of {address}",
                "a branch, a tag or a commit",
                "check the spelling",
            ),
            (
                isinstance(error, errors.RepositoryNotFoundError),
                f"no repository {address}, or one that you may not see",
                f"one to {action}",
                f"check the spelling; for a private one {login}",
            ),
            (
                status in (401, 403),
                f"no permission to {action} {address}",
                "it",
                f"{login} as somebody who may",
            ),
            (
                status is None and not isinstance(error, ValueError),
                f"the hub cannot be reached for {address} ({message})",
                "a network",
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a commit that was pulled"
                " before needs none",
            ),
            (
                True,
                f"the hub refused to {action} {address} ({message})",
                "an answer",
                "see what it says, or try again later",
            ),
        )
        texts = next(texts for applies, *texts in cases if applies)
        raise RemoteError(*texts) from error


def file_system(remote: RemoteAddress) -> tuple[Any, str]:
    """(the fsspec file system of a place, the path of the place in it)."""
    fsspec = _import_package("fsspec")
    scheme = remote.url.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(remote.url)
    except ImportError as error:
        raise RemoteError(
            f"no package for {scheme}:// places",
            "one that fsspec uses",
            f"install it ({_summarise(error)})",
        ) from error
    except ValueError as error:
        raise RemoteError(
            f"the place {remote.url!r} ({error})",
            "hf://, file://, s3:// or another scheme of fsspec",
            "check it",
        ) from error
    system.invalidate_cache()  # other clients write there too
    return system, root.rstrip("/")


def _push_store(path: Path, target: RemoteAddress) -> str:
    files_hash = content_hash(path)
    with store_errors(target, "write to"):
        system, root = file_system(target)
        system.makedirs(f"{root}/{files_hash}", exist_ok=True)
        # writing a file to a local disk is not atomic, as it is on an object store
        is_local_disk = getattr(system, "local_file", False)
        for name in adapter_file_names(path):
            if is_local_disk:  # a reader may be reading files of an earlier push
                with new_file(Path(root) / files_hash / name, overwrite=True) as file:
                    system.put_file(str(path / name), str(file))
            else:
                system.put_file(str(path / name), f"{root}/{files_hash}/{name}")
        if is_local_disk:
            write_whole(Path(root) / LATEST, files_hash)
        else:
            system.pipe_file(f"{root}/{LATEST}", files_hash.encode())
    return f"{target.url}@{files_hash}"


def _pull_store(source: RemoteAddress, cache_folder: Path) -> Path:
    files_hash = source.revision
    if files_hash is not None and not _HASH.fullmatch(files_hash):
        raise RemoteError(
            f"the revision {files_hash!r} of {source.url}",
            "what `push` returned after the '@'",
            "give that, or leave it out for the newest",
        )
    if files_hash is not None and _is_intact(cache_folder / files_hash, files_hash):
        return cache_folder / files_hash  # needs no network
    with store_errors(source, "read"):
        system, root = file_system(source)
        if files_hash is None and system.exists(f"{root}/{LATEST}"):
            files_hash = system.cat_file(f"{root}/{LATEST}").decode("ascii", "replace").strip()
            if not _HASH.fullmatch(files_hash):
                raise RemoteError(
                    f"{source.url}/{LATEST}, which holds {files_hash[:80]!r}",
                    "the hash of an adapter",
                    "push one, or name a revision",
                )
    remote_folder = root if files_hash is None else f"{root}/{files_hash}"

    def fetch(folder: Path) -> None:
        with store_errors(source, "read"):
            remote_names = {
                PurePosixPath(file).name for file in system.ls(remote_folder, detail=False)
            }
            for names in (FILES, TOKENIZER_FILES):
                for name in names if names is FILES or trains_tokens(folder) else ():
                    if name in remote_names:
                        system.get_file(f"{remote_folder}/{name}", str(folder / name))

    if files_hash is not None:
        return ensure_cached(
            cache_folder / files_hash, f"{source.url}@{files_hash}", fetch, files_hash
        )
    # a place without revisions is fetched in each call, and cached under its content hash
    with TemporaryDirectory() as temporary_folder:
        fetched = Path(temporary_folder)
        fetch(fetched)
        files_hash = content_hash(fetched)
        return ensure_cached(
            cache_folder / files_hash,
            source.url,
            lambda folder: copy_files(fetched, folder),
            files_hash,
        )


@contextmanager
def store_errors(remote: RemoteAddress, action: str) -> Iterator[None]:
    """Turn any error of a file system into a ``RemoteError``, because each file system of fsspec
    has its own error classes. ``action``: what was tried, such as "read", for the message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, VeneerError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise
        address, message = remote.url, _summarise(error)
        revision = f"@{remote.revision}" if remote.revision else ""
        if isinstance(error, FileNotFoundError):
            raise RemoteError(
                f"nothing at {address}{revision}",
                "an adapter that was pushed there",
                "check the place",
            ) from error
        if isinstance(error, PermissionError):
            raise RemoteError(
                f"no permission to {action} {address} ({message})", "it", "check the credentials"
            ) from error
        raise RemoteError(
            f"{address} cannot be used ({type(error).__name__}: {message})",
            f"a place to {action}",
            "check the network, the place and the credentials",
        ) from error


def _summarise(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
