"""Named API keys and their permissions. The server stores only the hash of a key.

    [[keys]]                          a TOML file with one table per key
    name = "alice"
    sha256 = "2c26b4…"                hash of the key that the client sends
    adapters = ["french-*", "chat"]   shell patterns of the adapter names that the key
                                      may use; none by default
    base = true                       may use the base model without an adapter; true by
                                      default
    admin = false                     may load and unload adapters, read metrics; false by default
    train = false                     may use the training routes; false by default. They also give
                                      answers of the base, even with base = false: a client can
                                      sample from a run that has not trained yet
    runs = 10                         most adapters in training at one time
    bytes = 1000000000                most bytes of all checkpoints of the key
    tokens = 1000000                  most tokens of training and sampling a day (UTC). By default,
                                      runs, bytes and tokens have no limit

A key has 256 random bits, so hashing guesses cannot find it, and the hash needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import ConfigError, raise_all, sentence

log = logging.getLogger("veneer.serve")

#: seconds between two checks whether the key file has changed
WATCH_SECONDS = 1.0
KEY_PREFIX = "vnr-"
_HASH_PATTERN = re.compile(r"[0-9a-f]{64}")
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")
QUOTAS = ("runs", "bytes", "tokens")
KEY_FIELDS = dict.fromkeys(("name", "sha256", "adapters", "base", "admin", "train", *QUOTAS)).keys()
#: largest size of a key file in bytes, and of a key in a request in characters
MAX_FILE_BYTES, MAX_KEY_CHARS = 4 * 2**20, 512


@dataclass(frozen=True)
class Key:
    """A named API key and its permissions: an entry of the key file (see the docstring of this
    module). A quota (``runs``, ``bytes``, ``tokens``) of None sets no limit."""

    name: str
    sha256: str
    adapters: tuple[str, ...] = ()
    base: bool = True
    admin: bool = False
    runs: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    train: bool = False

    @property
    def owner(self) -> str:
        """The name under which limits and fair scheduling count the requests of this key: the
        key's name, or "" for ``ANYONE``, the key of every client of a server without keys."""
        return self.name if self.sha256 else ""

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether the key may use all adapters in ``names``. Empty ``names`` stand for the base
        model alone."""
        names = tuple(names)
        return all(map(self.sees, names)) if names else self.base

    def sees(self, name: str) -> bool:
        """Whether a pattern of the key matches the adapter ``name``, so that the key may list and
        use the adapter."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


#: the key that every client of a server without keys has
ANYONE = Key("anyone", "", ("*",), base=True, admin=True, train=True)


@dataclass(frozen=True)
class Keyring:
    """The keys of a server. If ``keys`` is None, every client may do everything."""

    keys: tuple[Key, ...] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server has no keys, so that anyone may use it."""
        return self.keys is None

    def find(self, authorization: str | None) -> Key | None:
        """The entry of the key that the value of an Authorization header contains ("Bearer …").
        None if there is no such header or the key is unknown; always ``ANYONE`` on a server
        without keys."""
        if self.keys is None:
            return ANYONE
        scheme, _, sent_key = (authorization or "").partition(" ")
        sent_key = sent_key.strip()
        if scheme.lower() != "bearer" or not sent_key or len(sent_key) > MAX_KEY_CHARS:
            return None
        digest = hash_of(sent_key)
        # compare with all keys, so that the time it takes does not reveal whether one matches
        matches = [key for key in self.keys if hmac.compare_digest(digest, key.sha256)]
        return matches[0] if matches else None


def hash_of(key: str) -> str:
    """The SHA-256 hash of a key, as 64 hexadecimal digits, which the key file has in place of
    the key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | Path) -> Keyring:
    """Read the keys of a key file. ``ConfigError``: the file cannot be read, has no keys or has
    something besides keys, or has invalid entries, all of which the message lists."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes")
        document: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"a key file {path} that cannot be read ({error})",
            "a list of keys in TOML",
            "see `veneer keygen --help`",
        ) from error
    tables = document.get("keys") if document.keys() <= {"keys"} else None
    if not isinstance(tables, list) or not tables:
        raise ConfigError(
            f"no list of [[keys]] alone in {path}", "at least one", "run `veneer keygen NAME`"
        )
    keys, problems = [], []
    for table_number, entry in enumerate(tables, 1):
        if reasons := [f"Key {table_number}: {reason}" for reason in _entry_problems(entry)]:
            problems += reasons
        else:
            keys.append(Key(**{**entry, "adapters": tuple(entry.get("adapters", ()))}))
    for field in ("name", "sha256"):
        duplicates = sorted(
            value
            for value, count in Counter(getattr(key, field) for key in keys).items()
            if count > 1
        )
        problems += [
            sentence(f"{field} {value!r} twice", "once", "take one of them out")
            for value in duplicates
        ]
    raise_all(ConfigError, f"The key file {path} was not taken", problems)
    return Keyring(tuple(keys))


class KeyHolder(Protocol):
    """An object whose ``keys`` the server checks requests against."""

    keys: Keyring


class KeyWatch:
    """A thread that reloads the keys of ``holder`` when their file is written or replaced. It also
    reloads them once when it starts, because the file may have changed while the base was loaded.
    If the file is invalid or was removed, the keys stay and an error is logged."""

    def __init__(self, holder: KeyHolder, path: Path) -> None:
        self._holder, self._path, self._stop_event = holder, path, threading.Event()
        threading.Thread(target=self._watch, name="veneer-keys", daemon=True).start()

    def close(self) -> None:
        self._stop_event.set()

    def reload(self) -> None:
        """Replace the keys by those in the file. An invalid file changes nothing and is logged."""
        try:
            self._holder.keys = read_keys(self._path)
        except ConfigError as error:
            log.error("The keys stay as they were. %s", error)
        else:
            log.info("%d keys were read from %s", len(self._holder.keys.keys or ()), self._path)

    def _watch(self) -> None:
        previous_signature = None
        while not self._stop_event.is_set():
            file_signature = _file_signature(self._path)
            if file_signature != previous_signature:
                previous_signature = file_signature
                self.reload()
            self._stop_event.wait(WATCH_SECONDS)


def _file_signature(path: Path) -> tuple[int, int, int] | None:
    """(inode, modification time, size) of a file, which change when the file is written or
    replaced; None if ``stat`` fails."""
    try:
        file_stat = path.stat()
    except OSError:
        return None
    return file_stat.st_ino, file_stat.st_mtime_ns, file_stat.st_size


def _entry_problems(entry: Any) -> list[str]:
    """The error texts for the invalid fields of ``entry``, a [[keys]] table; empty if all fields
    are valid."""
    if not isinstance(entry, dict):
        return [sentence("no table", "a table [[keys]]", "see `veneer keygen --help`")]
    unknown_fields = sorted(entry.keys() - KEY_FIELDS)
    name, sha256, patterns = entry.get("name"), entry.get("sha256"), entry.get("adapters", [])
    are_valid_patterns = isinstance(patterns, list) and all(
        isinstance(pattern, str) and pattern.isprintable() and pattern for pattern in patterns
    )
    quotas = {field: entry.get(field, 0) for field in QUOTAS}
    flags = {field: entry.get(field, False) for field in ("base", "admin", "train")}
    # (whether a field is valid, and the error texts if it is not: found, expected, what to do)
    checks = [
        (
            not unknown_fields,
            f"fields {unknown_fields}",
            ", ".join(KEY_FIELDS),
            "check the spelling",
        ),
        (
            isinstance(name, str) and _NAME_PATTERN.fullmatch(name),
            f"name {name!r}",
            "1 to 64 letters, digits and '._@-'",
            "name the key",
        ),
        (
            isinstance(sha256, str) and _HASH_PATTERN.fullmatch(sha256),
            "no sha256 of 64 small hexadecimal digits",
            "the hash of the key",
            "run `veneer keygen NAME`",
        ),
        (
            are_valid_patterns,
            f"adapters {patterns!r}",
            "a list of names or patterns",
            'write, for instance, ["french-*"]',
        ),
        *(
            (
                isinstance(quota, int) and not isinstance(quota, bool) and quota >= 0,
                f"{field} {quota!r}",
                "a number, 0 or more",
                "write one, or leave it out for no limit",
            )
            for field, quota in quotas.items()
        ),
        *(
            (isinstance(flag, bool), f"{field} {flag!r}", "true or false", "write one of them")
            for field, flag in flags.items()
        ),
    ]
    return [sentence(*error_texts) for is_valid, *error_texts in checks if not is_valid]


def generate(
    name: str,
    *,
    adapters: Iterable[str] = (),
    base: bool = True,
    admin: bool = False,
    train: bool = False,
) -> tuple[str, str]:
    """Generate a key. Returns the key, and its [[keys]] entry for the key file as TOML.
    The arguments are fields of the entry (see ``Key``). ``ConfigError``: the name or an adapter
    pattern is invalid."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    entry = {
        "name": name,
        "sha256": hash_of(key),
        "adapters": list(adapters),
        "base": base,
        "admin": admin,
        **({"train": True} if train else {}),
    }
    raise_all(ConfigError, "No key was made", _entry_problems(entry))
    lines = [f"{field} = {json.dumps(value, ensure_ascii=False)}" for field, value in entry.items()]
    return key, "\n".join(["[[keys]]", *lines, ""])
