"""Permissions of named keys. The server stores their hashes alone.

    [[keys]]                          a TOML file, one table a key
    name = "alice"
    sha256 = "2c26b4…"                of the key that the client sends
    adapters = ["french-*", "chat"]   patterns of names; none by default
    base = true                       the base without an adapter; true by default
    admin = false                     load and unload adapters, metrics; false by default
    train = false                     use the routes of a server that trains (this gives the base
                                      too, as which an untrained run answers); false by default
    runs = 10                         there: adapters in training, bytes of checkpoints, tokens a
                                      day
    bytes = 1000000000                (UTC) that are trained on or sampled; no limit by default
    tokens = 1000000

A key is 256 random bits, so its plain hash cannot be searched.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import ConfigError, raise_all, sentence

log = logging.getLogger("veneer.serve")

#: seconds between two checks of a key file
WATCH_SECONDS = 1.0
PREFIX = "vnr-"
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}")
QUOTAS = ("runs", "bytes", "tokens")
FIELDS = dict.fromkeys(("name", "sha256", "adapters", "base", "admin", "train", *QUOTAS)).keys()
#: most bytes of a key file, and most characters of a key in a request
MAX_FILE, MAX_KEY = 4 * 2**20, 512


@dataclass(frozen=True)
class Key:
    """A named API key and its permissions."""

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
        """The name that its requests are counted under; "" for all clients of a server without
        keys."""
        return self.name if self.sha256 else ""

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether it may use all of these adapters; without names, whether it may use the base."""
        names = tuple(names)
        return all(map(self.sees, names)) if names else self.base

    def sees(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


#: the key of every client of a server without keys
ANYONE = Key("anyone", "", ("*",), base=True, admin=True, train=True)


@dataclass(frozen=True)
class Keyring:
    """The keys of a server. Without keys, every client may do everything."""

    keys: tuple[Key, ...] | None = None

    @property
    def open(self) -> bool:
        return self.keys is None

    def find(self, authorization: str | None) -> Key | None:
        """The key in an Authorization header ("Bearer …"), or None for a missing or a wrong one."""
        if self.keys is None:
            return ANYONE
        scheme, _, sent = (authorization or "").partition(" ")
        sent = sent.strip()
        if scheme.lower() != "bearer" or not sent or len(sent) > MAX_KEY:
            return None
        digest = hash_of(sent)  # compared with every key, so that the time does not reveal a match
        matches = [key for key in self.keys if hmac.compare_digest(digest, key.sha256)]
        return matches[0] if matches else None


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | Path) -> Keyring:
    """The keys of a file. ``ConfigError`` lists every invalid entry. A file without keys refuses
    every client."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"more than {MAX_FILE:,} bytes")
        entries: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"a key file {path} that cannot be read ({error})"
        raise ConfigError(
            problem, "a list of keys in TOML", "see `veneer keygen --help`"
        ) from error
    tables = entries.get("keys") if entries.keys() <= {"keys"} else None
    if not isinstance(tables, list) or not tables:
        raise ConfigError(
            f"no list of [[keys]] alone in {path}", "at least one", "run `veneer keygen NAME`"
        )
    keys, problems = [], []
    for number, entry in enumerate(tables, 1):
        if reasons := [f"Key {number}: {reason}" for reason in _wrong(entry)]:
            problems += reasons
        else:
            keys.append(Key(**{**entry, "adapters": tuple(entry.get("adapters", ()))}))
    for field in ("name", "sha256"):
        twice = sorted(
            value
            for value, count in Counter(getattr(key, field) for key in keys).items()
            if count > 1
        )
        problems += [
            sentence(f"{field} {value!r} twice", "once", "take one of them out") for value in twice
        ]
    raise_all(ConfigError, f"The key file {path} was not taken", problems)
    return Keyring(tuple(keys))


class KeyHolder(Protocol):
    """An object with the keys of a server."""

    keys: Keyring


def reload_keys(holder: KeyHolder, path: Path) -> None:
    """Replace the keys by those of a file. An invalid file changes nothing and is logged."""
    try:
        holder.keys = read_keys(path)
    except ConfigError as error:
        log.error("The keys stay as they were. %s", error)
    else:
        log.info("%d keys were read from %s", len(holder.keys.keys or ()), path)


class FileWatch:
    """A thread that calls ``changed`` when a file is written, replaced or removed, and once when it
    starts, since loading the base may take a minute after the file was first read."""

    def __init__(self, path: Path, changed: Callable[[], None]) -> None:
        self._path, self._changed, self._stop = path, changed, threading.Event()
        threading.Thread(target=self._watch, name="veneer-keys", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        before = None
        while not self._stop.is_set():
            state = _file_state(self._path)
            if state != before:
                before = state
                self._changed()
            self._stop.wait(WATCH_SECONDS)


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """A value that changes when a file is written or replaced; None if it cannot be reached."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def follow_keys(holder: KeyHolder, path: Path) -> FileWatch:
    """Reload a server's keys whenever their file changes."""
    return FileWatch(path, partial(reload_keys, holder, path))


def _wrong(entry: Any) -> Iterable[str]:
    if not isinstance(entry, dict):
        yield sentence("no table", "a table [[keys]]", "see `veneer keygen --help`")
        return
    if unknown := sorted(entry.keys() - FIELDS):
        yield sentence(f"fields {unknown}", ", ".join(FIELDS), "check the spelling")
    if not isinstance(entry.get("name"), str) or not _NAME.fullmatch(entry["name"]):
        yield sentence(
            f"name {entry.get('name')!r}", "1 to 64 letters, digits and '._@-'", "name the key"
        )
    if not isinstance(entry.get("sha256"), str) or not _HASH.fullmatch(entry["sha256"]):
        yield sentence(
            "no sha256 of 64 small hexadecimal digits",
            "the hash of the key",
            "run `veneer keygen NAME`",
        )
    patterns = entry.get("adapters", [])
    sound = isinstance(patterns, list) and all(
        isinstance(pattern, str) and pattern.isprintable() and pattern for pattern in patterns
    )
    if not sound:
        yield sentence(
            f"adapters {patterns!r}",
            "a list of names or patterns",
            'write, for instance, ["french-*"]',
        )
    for field in QUOTAS:
        limit = entry.get(field, 0)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            yield sentence(
                f"{field} {limit!r}",
                "a number, 0 or more",
                "write one, or leave it out for no limit",
            )
    for field in ("base", "admin", "train"):
        if not isinstance(entry.get(field, False), bool):
            yield sentence(f"{field} {entry[field]!r}", "true or false", "write one of them")


def generate(
    name: str,
    *,
    adapters: Iterable[str] = (),
    base: bool = True,
    admin: bool = False,
    train: bool = False,
) -> tuple[str, str]:
    """A new key, and its entry for the file. ``ConfigError``: a name or a pattern that the file
    could not hold."""
    key = PREFIX + secrets.token_urlsafe(32)
    entry = {
        "name": name,
        "sha256": hash_of(key),
        "adapters": list(adapters),
        "base": base,
        "admin": admin,
    }
    entry |= {"train": True} if train else {}
    raise_all(ConfigError, "No key was made", list(_wrong(entry)))
    lines = [f"{field} = {json.dumps(value, ensure_ascii=False)}" for field, value in entry.items()]
    return key, "\n".join(["[[keys]]", *lines, ""])
