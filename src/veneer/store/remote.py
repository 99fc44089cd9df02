"""Adapters at remote places: ``push`` copies a folder to a place, ``pull`` fetches it into a cache.

A place is written as an address:

    hf://owner/name[@revision]      a model repository of the Hugging Face hub, through
                                    huggingface_hub
    s3://… gs://… memory:// file:// a folder in any file system of fsspec
    anything without "://"          a local folder: ``pull`` verifies it, ``push`` copies to it

``push`` returns an address with a revision, which always stands for the same bytes. On the hub, the
revision is a commit. In a file system of fsspec, it is the hash of the adapter's files. The files
are written so that no reader sees a mixture of two pushes:

    <place>/<hash>/…     the files, written first
    <place>/latest       the hash, written last, as a small file that is replaced atomically

A place that holds an adapter's files directly, without ``latest``, can be pulled too; it has no
revisions. Pulled files are verified in a temporary folder, which is then moved into the cache. Only
files with the names of an adapter's files are fetched, which are neither pickles nor code.
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
HUB_SCHEME = "hf://"
#: the name of the file at a place that contains the hash of the newest push
LATEST_FILE = "latest"
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: error numbers of a full disk, or an exceeded quota, on this machine. Such an error is not turned
#: into a ``RemoteError``, because the command line has its own explanation for it.
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HASH = re.compile(r"[0-9a-f]{64}")


def is_remote(address: str) -> bool:
    """Whether ``address`` is a URL, that is, the address of a remote place and not a path."""
    return "://" in address


def push(
    path: str | Path,
    place: str,
    *,
    revision: str | None = None,
    message: str | None = None,
    private: bool | None = None,
) -> str:
    """Verify the adapter folder ``path``, and copy it to a remote place.

    Args:
        place: an address such as hf://owner/name, s3://bucket/french or a local path. A repository
            of the hub that does not exist is created.
        revision: the branch of the hub's repository, created if it is missing; None takes "main".
        message: the message of the hub's commit; None takes "Upload adapter".
        private: whether a new repository of the hub is private; None leaves the choice to the hub.

    Returns:
        the address with the new revision, for ``pull``; for a local path, the path.

    Raises:
        AdapterError: the folder is no intact adapter.
        RemoteError: the place cannot be reached or written to, or does not have an option.
        OutputExistsError: the place is a local path that is not empty.
    """
    path, address = Path(path), parse_address(place, revision)
    read(path)
    if address.kind != "hub" and (address.revision or message is not None or private is not None):
        raise RemoteError(
            f"a revision, a message or private for {address.url}",
            "none: they are the hub's",
            "leave them out; a push returns its revision",
        )
    match address.kind:
        case "hub":
            return _push_hub(path, address, message or "Upload adapter", private)
        case "store":
            return _push_store(path, address)
        case _:
            with new_folder(address.url) as folder:
                copy_files(path, folder)
            return address.url


def pull(place: str, *, revision: str | None = None, cache: Path | None = None) -> Path:
    """Fetch the adapter at a remote place into the cache, verify it, and return its folder. Do not
    change this folder: later calls return it again.

    Args:
        place: an address as for ``push``. A local folder is verified and returned.
        revision: on the hub, a branch, a tag or a commit; elsewhere the hash behind the "@" in the
            address that ``push`` returned. ``place`` may contain it instead. None takes the newest.
            A commit or hash that was pulled before is taken from the cache without a network.
        cache: the folder of the cache; None takes ``veneer/adapters`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.

    Raises:
        AdapterError: the place holds no intact adapter. The cache is unchanged.
        RemoteError: no such place or revision, no network, or no permission.
    """
    address = parse_address(place, revision)
    if address.kind == "path":
        if address.revision:
            raise RemoteError(f"a revision of the folder {place}", "none", "leave it out")
        return read(address.url).path
    # the folder's name in the cache: the last part of the address, and a hash to make it unique
    slug = (
        re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(address.url).name)[:60].strip(".-")
        or "adapter"
    )
    folder_name = f"{slug}-{hashlib.sha256(address.url.encode()).hexdigest()[:12]}"
    cache_folder = (cache or cache_dir() / "adapters") / folder_name
    return (
        _pull_hub(address, cache_folder)
        if address.kind == "hub"
        else _pull_store(address, cache_folder)
    )


@dataclass(frozen=True)
class RemoteAddress:
    """The address of a place, split into its parts.

    Fields:
        kind: "hub", "store" (a file system of fsspec) or "path" (a local folder).
        url: the address without the revision.
        revision: the revision that the address or the caller named; None if neither did.
    """

    kind: str
    url: str
    revision: str | None


def parse_address(address: str, revision: str | None) -> RemoteAddress:
    """Split an address from its revision, the part behind an "@". Except on the hub, this part must
    look like a hash, because "@" is common in URLs and paths. ``revision``: the caller's, if it is
    not in the address. Raises ``RemoteError`` if an address on the hub is invalid, or the two
    differ."""
    kind, url, revision_suffix = "path", address, ""
    if address.startswith(HUB_SCHEME):
        kind, (url, _, revision_suffix) = "hub", address.partition("@")
        url = url.rstrip("/")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", url.removeprefix(HUB_SCHEME), re.ASCII):
            raise RemoteError(
                f"the place {address!r}",
                "hf://owner/name or hf://owner/name@revision",
                "write it so",
            )
    elif is_remote(address):
        if _HASH.fullmatch(address.rpartition("@")[2]):
            url, _, revision_suffix = address.rpartition("@")
        kind, url = "store", url.rstrip("/")
    if revision_suffix and revision and revision_suffix != revision:
        raise RemoteError(
            f"revisions {revision_suffix!r} and {revision!r} for {url}", "one", "leave one out"
        )
    return RemoteAddress(kind, url, revision_suffix or revision)


def _import_package(name: str) -> Any:
    """Import an optional package; ``RemoteError`` tells how to install a missing one."""
    try:
        return import_module(name)
    except ImportError as error:
        raise RemoteError(
            f"no package {name}, which remote places need",
            "it installed",
            "pip install 'veneer[remote]'",
        ) from error


def ensure_cached(
    cached_folder: Path, address: str, fetch: Callable[[Path], None], files_hash: str | None = None
) -> Path:
    """Return ``cached_folder`` if it holds an intact adapter. Otherwise let ``fetch`` write the
    adapter's files into a temporary folder, verify them, and move that folder to ``cached_folder``.

    Args:
        address: the address of the adapter, for errors.
        files_hash: the ``content_hash`` that the files must have; None accepts any.

    Raises:
        AdapterError: the fetched files are no intact adapter or have another hash.
    """
    if _is_intact(cached_folder, files_hash):
        return cached_folder
    with new_folder(cached_folder, overwrite=True, replaces=[*FILES, EVERYTHING]) as folder:
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
            problem = str(error).replace(str(folder), address)
            raise AdapterError(f"What {address} holds is no intact adapter. {problem}") from error
    return cached_folder


def _is_intact(folder: Path, files_hash: str | None = None) -> bool:
    """Whether a folder holds a valid adapter whose files have the content hash ``files_hash``
    (None: any). ``read`` alone misses damaged files of adapters that record no hashes."""
    with suppress(AdapterError):
        if folder.is_dir():
            read(folder)
            return files_hash is None or has_content(folder, files_hash)
    return False


def _hub_api() -> Any:
    return _import_package("huggingface_hub").HfApi(library_name="veneer")


def _push_hub(path: Path, address: RemoteAddress, message: str, private: bool | None) -> str:
    """Push as one commit, so that no reader sees a mixture of two adapters. (The hub client's
    ``upload_folder`` could make several commits.) Return the address with the commit."""
    hub = _import_package("huggingface_hub")
    hub_api = _hub_api()
    repository = address.url.removeprefix(HUB_SCHEME)
    with _hub_errors(address, "write to"):
        hub_api.create_repo(repository, private=private, exist_ok=True)
        # ``create_repo`` ignores ``private`` if the repository exists, so compare it here
        if private is not None and bool(hub_api.model_info(repository).private) != private:
            raise RemoteError(
                f"{address.url}, which exists and is {'public' if private else 'private'}",
                "the other",
                "change it in its settings on the hub, or choose another name",
            )
        if address.revision and not address.revision.startswith("refs/"):
            hub_api.create_branch(repository, branch=address.revision, exist_ok=True)
        remote_files = set(hub_api.list_repo_files(repository, revision=address.revision))
        local_files = adapter_file_names(path)
        possible_names = (*FILES, *(TOKENIZER_FILES if trains_tokens(path) else ()))
        # files of the adapter that the repository held before, which the new adapter lacks
        stale_files = [
            name for name in possible_names if name in remote_files and name not in local_files
        ]
        operations = [hub.CommitOperationAdd(name, str(path / name)) for name in local_files]
        operations += [hub.CommitOperationDelete(name) for name in stale_files]
        commit = hub_api.create_commit(
            repository, operations, commit_message=message, revision=address.revision
        )
    return f"{address.url}@{commit.oid}"


def _pull_hub(address: RemoteAddress, cache_folder: Path) -> Path:
    """Fetch a commit of a repository, unless the cache has it. ``cache_folder``: the folder of the
    repository in the cache, with a subfolder for each commit."""
    repository, revision = address.url.removeprefix(HUB_SCHEME), address.revision or ""
    if _COMMIT.fullmatch(revision) and _is_intact(cache_folder / revision):
        return cache_folder / revision  # a commit never changes, so ask no server
    with _hub_errors(address, "read"):
        commit = str(_hub_api().model_info(repository, revision=address.revision).sha)
    if not _COMMIT.fullmatch(commit):  # the commit becomes part of a path, so it must not be "../…"
        raise RemoteError(
            f"the commit {commit!r} of {address.url}", "40 hexadecimal digits", "check HF_ENDPOINT"
        )

    def fetch(folder: Path) -> None:
        with _hub_errors(address, "read"):
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
        # the hub's client records the download in files that are not part of the adapter
        shutil.rmtree(folder / ".cache", ignore_errors=True)

    return ensure_cached(cache_folder / commit, f"{address.url}@{commit}", fetch)


@contextmanager
def _hub_errors(address: RemoteAddress, action: str) -> Iterator[None]:
    """Turn an error of the hub's client within the block into a ``RemoteError``. ``action``: what
    the block does with the repository, such as "read", for the message."""
    hub_errors: Any = _import_package("huggingface_hub.errors")
    url = address.url
    try:
        yield
    # the base classes of all errors of the hub's client
    except (hub_errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, VeneerError) or (
            isinstance(error, OSError) and error.errno in _DISK_ERRNOS
        ):
            raise
        http_responses = (getattr(cause, "response", None) for cause in (error, error.__cause__))
        status = next(
            (response.status_code for response in http_responses if response is not None), None
        )
        login_advice, summary = "log in with `hf auth login`", _summarise(error)
        # (whether the case applies, parts of the error's message); the first that applies counts
        cases = (
            (
                isinstance(error, hub_errors.GatedRepoError),
                f"{url} is gated",
                f"leave to {action} it",
                f"accept its terms on its page, and {login_advice}",
            ),
            (
                isinstance(error, hub_errors.RevisionNotFoundError),
                f"no revision {address.revision!r} of {url}",
                "a branch, a tag or a commit",
                "check the spelling",
            ),
            (
                isinstance(error, hub_errors.RepositoryNotFoundError),
                f"no repository {url}, or one that you may not see",
                f"one to {action}",
                f"check the spelling; for a private one {login_advice}",
            ),
            (
                status in (401, 403),
                f"no permission to {action} {url}",
                "it",
                f"{login_advice} as somebody who may",
            ),
            (
                status is None and not isinstance(error, ValueError),
                f"the hub cannot be reached for {url} ({summary})",
                "a network",
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a commit that was pulled"
                " before needs none",
            ),
            (
                True,
                f"the hub refused to {action} {url} ({summary})",
                "an answer",
                "see what it says, or try again later",
            ),
        )
        error_texts = next(error_texts for applies, *error_texts in cases if applies)
        raise RemoteError(*error_texts) from error


def file_system(address: RemoteAddress) -> tuple[Any, str]:
    """The fsspec file system of a place, and the path of the place in it. Raises ``RemoteError`` if
    the scheme is unknown or its package is not installed."""
    fsspec = _import_package("fsspec")
    scheme = address.url.partition("://")[0]
    try:
        filesystem, root_path = fsspec.core.url_to_fs(address.url)
    except ImportError as error:
        raise RemoteError(
            f"no package for {scheme}:// places",
            "one that fsspec uses",
            f"install it ({_summarise(error)})",
        ) from error
    except ValueError as error:
        raise RemoteError(
            f"the place {address.url!r} ({error})",
            "hf://, file://, s3:// or another scheme of fsspec",
            "check it",
        ) from error
    filesystem.invalidate_cache()  # fsspec caches listings, but other clients write there too
    return filesystem, root_path.rstrip("/")


def _push_store(path: Path, address: RemoteAddress) -> str:
    """Push to a file system of fsspec; return the address with the hash of the files."""
    files_hash = content_hash(path)
    with store_errors(address, "write to"):
        filesystem, root = file_system(address)
        filesystem.makedirs(f"{root}/{files_hash}", exist_ok=True)
        # on an object store, writing a file is atomic; on a local disk it is not
        is_local_disk = getattr(filesystem, "local_file", False)
        for name in adapter_file_names(path):
            if is_local_disk:  # replace the file atomically, because another process may read it
                with new_file(Path(root) / files_hash / name, overwrite=True) as file:
                    filesystem.put_file(str(path / name), str(file))
            else:
                filesystem.put_file(str(path / name), f"{root}/{files_hash}/{name}")
        if is_local_disk:
            write_whole(Path(root) / LATEST_FILE, files_hash)
        else:
            filesystem.pipe_file(f"{root}/{LATEST_FILE}", files_hash.encode())
    return f"{address.url}@{files_hash}"


def _pull_store(address: RemoteAddress, cache_folder: Path) -> Path:
    """Fetch an adapter from a file system of fsspec, unless the cache has it. ``cache_folder``: the
    folder of the place in the cache, with a subfolder for each hash."""
    files_hash = address.revision
    if files_hash is not None and not _HASH.fullmatch(files_hash):
        raise RemoteError(
            f"the revision {files_hash!r} of {address.url}",
            "what `push` returned after the '@'",
            "give that, or leave it out for the newest",
        )
    if files_hash is not None and _is_intact(cache_folder / files_hash, files_hash):
        return cache_folder / files_hash  # files with this hash never change, so ask no server
    with store_errors(address, "read"):
        filesystem, root = file_system(address)
        if files_hash is None and filesystem.exists(f"{root}/{LATEST_FILE}"):
            files_hash = (
                filesystem.cat_file(f"{root}/{LATEST_FILE}").decode("ascii", "replace").strip()
            )
            if not _HASH.fullmatch(files_hash):
                raise RemoteError(
                    f"{address.url}/{LATEST_FILE}, which holds {files_hash[:80]!r}",
                    "the hash of an adapter",
                    "push one, or name a revision",
                )
    remote_folder = root if files_hash is None else f"{root}/{files_hash}"

    def fetch(folder: Path) -> None:
        with store_errors(address, "read"):
            remote_names = {
                PurePosixPath(file).name for file in filesystem.ls(remote_folder, detail=False)
            }
            for names in (FILES, TOKENIZER_FILES):
                for name in names if names is FILES or trains_tokens(folder) else ():
                    if name in remote_names:
                        filesystem.get_file(f"{remote_folder}/{name}", str(folder / name))

    if files_hash is not None:
        return ensure_cached(
            cache_folder / files_hash, f"{address.url}@{files_hash}", fetch, files_hash
        )
    # a place without revisions may have changed, so fetch it again; the cache is by content hash
    with TemporaryDirectory() as temporary_folder:
        fetched_folder = Path(temporary_folder)
        fetch(fetched_folder)
        files_hash = content_hash(fetched_folder)
        return ensure_cached(
            cache_folder / files_hash,
            address.url,
            lambda folder: copy_files(fetched_folder, folder),
            files_hash,
        )


@contextmanager
def store_errors(address: RemoteAddress, action: str) -> Iterator[None]:
    """Turn any error within the block into a ``RemoteError``, because each file system of fsspec
    has its own error classes. ``action``: what the block does with the place, such as "read", for
    the message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, VeneerError) or (
            isinstance(error, OSError) and error.errno in _DISK_ERRNOS
        ):
            raise
        url, summary = address.url, _summarise(error)
        revision = f"@{address.revision}" if address.revision else ""
        if isinstance(error, FileNotFoundError):
            raise RemoteError(
                f"nothing at {url}{revision}", "an adapter that was pushed there", "check the place"
            ) from error
        if isinstance(error, PermissionError):
            raise RemoteError(
                f"no permission to {action} {url} ({summary})", "it", "check the credentials"
            ) from error
        raise RemoteError(
            f"{url} cannot be used ({type(error).__name__}: {summary})",
            f"a place to {action}",
            "check the network, the place and the credentials",
        ) from error


def _summarise(error: BaseException) -> str:
    """The message of an error in one line of at most 300 characters; its class name if it has
    none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
