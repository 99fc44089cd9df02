"""The state of the service, on the disk: one SQLite file, and a folder for each run's numbers.

    FOLDER/index.sqlite         sessions, runs, requests with their answers, checkpoints, samplers
    FOLDER/runs/7/state/        a run as it was after one of its requests: adapter, optimiser
    FOLDER/runs/7/weights/…     checkpoints to train from;  sampler_weights/…, external_weights/…  adapters alone

A request is written before its promise is given. So whatever a client was promised is either in a
state, or among the requests after it, from which it is computed again.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from veneer.errors import ConfigError, DataError, listing
from veneer.fileio.private import private_file, private_folder

log = logging.getLogger("veneer.serve.training")

INDEX, FORMAT = "index.sqlite", 1
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
#: answers of a run that are kept after its state has passed them
KEPT = 256
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT, metadata TEXT, title TEXT, created REAL, seen REAL, finished TEXT);
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, session TEXT, owner TEXT, config TEXT, seed INTEGER,
    metadata TEXT, created REAL, used REAL, state INTEGER, unloaded INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS requests (
    run TEXT, seq INTEGER, kind TEXT, body BLOB, done INTEGER DEFAULT 0, binary INTEGER DEFAULT 0, answer BLOB,
    PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun (
    run TEXT, seq INTEGER, times INTEGER, PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failed_runs (run TEXT PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    run TEXT, kind TEXT, name TEXT, owner TEXT, created REAL, bytes INTEGER, metadata TEXT, expires REAL,
    public INTEGER DEFAULT 0, hidden INTEGER DEFAULT 0, config TEXT, request INTEGER, PRIMARY KEY (run, kind, name));
CREATE TABLE IF NOT EXISTS tokens (owner TEXT, day INTEGER, count INTEGER, PRIMARY KEY (owner, day)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samplers (
    id TEXT PRIMARY KEY, session TEXT, owner TEXT, path TEXT, clients INTEGER DEFAULT 0);
"""


class Place(NamedTuple):
    """A checkpoint, by the parts of its path tinker://RUN/KIND/NAME."""

    run: str
    kind: str
    name: str

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


def place_of(path: str) -> Place:
    """``DataError``: it is no such path."""
    steps = path.removeprefix("tinker://").split("/")
    if (
        not path.startswith("tinker://")
        or len(steps) != 3
        or steps[1] not in KINDS
        or not NAME.fullmatch(steps[2])
    ):
        raise DataError(
            f"the path {path[:200]!r}",
            "tinker://RUN/weights/NAME, or another kind",
            "check the path",
        )
    return Place(*steps)


class Store:
    """The index. Any thread may call it; each call is one transaction, on the disk when it returns.
    Reads have connections of their own, so that none waits for a writer's disk. ``ConfigError``:
    another server has the folder, or it holds something else."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()
        private_folder(self.folder)
        self._file_lock = FileLock(self.folder / "server.lock")
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{folder}, which another server has", "a folder of its own", "stop that one"
            ) from error
        self._lock = threading.RLock()
        private_file(self.folder / INDEX)
        self._reserved: Counter[str] = Counter()  # tokens by owner
        self._readers: deque[sqlite3.Connection] = deque()  # that no thread uses now
        self._closed = False
        self._base = self._connect()
        try:
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(_TABLES)
            columns = [row["name"] for row in self._base.execute("PRAGMA table_info(checkpoints)")]
            if "request" not in columns:  # of an earlier release
                self._base.execute("ALTER TABLE checkpoints ADD COLUMN request INTEGER")
        except sqlite3.DatabaseError as error:
            self.close()
            found = f"{folder}, whose {INDEX} cannot be read ({error})"
            raise ConfigError(
                found, "what a server wrote", "restore it, or give another folder"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.folder / INDEX, check_same_thread=False, isolation_level=None
        )
        connection.row_factory = sqlite3.Row
        return connection

    def close(self) -> None:
        self._closed = True
        self._close_readers()
        with self._lock:  # what is written now is written whole
            self._base.close()
        self._file_lock.release()

    def _close_readers(self) -> None:
        with suppress(IndexError):  # another thread closes the rest
            while True:
                self._readers.pop().close()

    def of_base(self, name: str, mark: str) -> None:
        """``ConfigError``: the folder's runs were trained on another base, or written in another
        format."""
        versions = {"format": str(FORMAT), "veneer": version("veneer"), "torch": version("torch")}
        with self._writing() as base:
            facts = {row["name"]: row["value"] for row in base.execute("SELECT * FROM facts")}
            if facts and facts.get("format") != versions["format"]:
                by = f"veneer {facts.get('veneer', 'of an unknown version')}"
                problem = f"{self.folder}, of format {facts.get('format')!r}, as {by} writes it"
                raise ConfigError(
                    problem,
                    f"format {FORMAT}",
                    "serve it with that version, or give another folder",
                )
            if facts and facts.get("mark") != mark:
                problem = f"{self.folder}, whose runs are of {facts.get('base')}"
                raise ConfigError(
                    problem, f"runs of this base, {name}", "serve that base, or give another folder"
                )
            changed = [f"{key} {facts[key]} (now {versions[key]})" for key in versions
                       if facts.get(key, versions[key]) != versions[key]]  # fmt: skip
            if changed:
                log.warning(
                    "%s was written with %s: what its requests are computed to again may differ in roundings",
                    self.folder, listing(changed),
                )  # fmt: skip
            facts = {"base": name, "mark": mark, **versions}
            base.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        if self._closed:
            raise sqlite3.ProgrammingError("Cannot read a closed index.")
        try:
            reader = self._readers.pop()
        except IndexError:  # all of them are used by other threads
            reader = self._connect()
        try:
            return reader.execute(query, values).fetchall()
        finally:
            self._readers.append(reader)
            if self._closed:
                self._close_readers()

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:
        return next(iter(self._all(query, *values)), None)

    def _do(self, query: str, *values: Any) -> int:
        with self._writing() as base:
            return base.execute(query, values).rowcount

    # sessions

    def new_session(self, owner: str, metadata: Mapping[str, Any] | None, title: str | None) -> str:
        session, created = secrets.token_hex(16), time.time()
        self._do(
            "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, NULL)",
            session,
            owner,
            _text(metadata),
            title,
            created,
            created,
        )
        return session

    def session(self, id: str) -> sqlite3.Row | None:
        return self._one("SELECT * FROM sessions WHERE id = ?", id)

    def sessions(self, owner: str | None) -> list[sqlite3.Row]:
        return self._all(
            "SELECT * FROM sessions WHERE ?1 IS NULL OR owner = ?1 ORDER BY created DESC", owner
        )

    def seen(self, session: str, now: float) -> None:
        self._do("UPDATE sessions SET seen = ? WHERE id = ?", now, session)

    def finish(self, session: str, reason: str) -> None:
        """The first reason stays."""
        self._do(
            "UPDATE sessions SET finished = ? WHERE id = ? AND finished IS NULL", reason, session
        )

    # runs

    def new_run(
        self, id: str, session: str, owner: str, config: Mapping[str, Any], seed: int, metadata: Any
    ) -> sqlite3.Row:
        created = time.time()
        columns = "(id, session, owner, config, seed, metadata, created, used, state)"
        values = (id, session, owner, _text(config), seed, _text(metadata), created, created, -1)
        self._do(f"INSERT INTO runs {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", *values)
        row = self.run(id)
        assert row is not None
        return row

    def run(self, id: str) -> sqlite3.Row | None:
        return self._one("SELECT * FROM runs WHERE id = ?", id)

    def runs(self, owner: str | None, session: str | None = None) -> list[sqlite3.Row]:
        condition = "(?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR session = ?2)"
        return self._all(
            f"SELECT * FROM runs WHERE {condition} ORDER BY used DESC, number DESC", owner, session
        )

    def unload(self, id: str) -> None:
        self._do("UPDATE runs SET unloaded = 1 WHERE id = ?", id)

    def fail(self, run: str, reason: str) -> None:
        """Write down why a run takes nothing any more but a checkpoint to load."""
        self._do("INSERT OR REPLACE INTO failed_runs VALUES (?, ?)", run, reason)

    def failure_of(self, run: str) -> str | None:
        row = self._one("SELECT reason FROM failed_runs WHERE run = ?", run)
        return None if row is None else row["reason"]

    def recover(self, run: str) -> None:
        """A checkpoint was loaded into a run that had failed."""
        self._do("DELETE FROM failed_runs WHERE run = ?", run)

    def copied(self, id: str) -> bool:
        """Whether it never was a run: what a copied checkpoint is under."""
        row = self.run(id)
        return row is not None and bool(row["unloaded"]) and not self.next_seq(id)

    def configured(self, id: str, config: Mapping[str, Any]) -> None:
        self._do("UPDATE runs SET config = ? WHERE id = ?", _text(config), id)

    # requests

    def add_request(self, run: str, seq: int, kind: str, body: bytes) -> bool:
        """Whether it is new."""
        with self._writing() as base:
            columns = "(run, seq, kind, body) VALUES (?, ?, ?, ?)"
            added = base.execute(
                f"INSERT OR IGNORE INTO requests {columns}", (run, seq, kind, body)
            ).rowcount
            base.execute("UPDATE runs SET used = ? WHERE id = ?", (time.time(), run))
            return bool(added)

    def request(self, run: str, seq: int) -> sqlite3.Row | None:
        return self._one("SELECT * FROM requests WHERE run = ? AND seq = ?", run, seq)

    def answer(self, run: str, seq: int, done: int, binary: bool, answer: bytes) -> None:
        """``done``: 1 for what counts, 2 for what failed and changed nothing, 3 for what failed and
        would have changed the next step."""
        with self._writing() as base:
            values = "done = ?, binary = ?, answer = ?"
            base.execute(
                f"UPDATE requests SET {values} WHERE run = ? AND seq = ?",
                (done, int(binary), answer, run, seq),
            )
            base.execute("DELETE FROM begun WHERE run = ? AND seq = ?", (run, seq))

    def failures(self, run: str) -> dict[str, float]:
        """Gaps before a run's next step, as metrics: passes that failed, and numbers that did not
        come."""
        last = (
            "SELECT MAX(seq) FROM requests WHERE run = ?1 AND done = 1 AND kind IN ('step', 'load')"
        )
        rows = self._all(
            "SELECT kind = 'missing' AS missing, COUNT(*) AS count, MAX(seq) AS last FROM requests"
            f" WHERE run = ?1 AND done = 3 AND seq > COALESCE(({last}), -1) GROUP BY 1", run,
        )  # fmt: skip
        metrics: dict[str, float] = {}
        for row in rows:
            name = "missing_requests" if row["missing"] else "failed_passes"
            metrics[f"{name}:sum"] = row["count"]
            if row["missing"]:
                metrics[f"{name}:max"] = row["last"]
        return metrics

    def begin(self, run: str, seq: int) -> int:
        """Write down that a request is about to be done, alone; how often that was written until it
        had an answer."""
        query = "INSERT INTO begun VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET times = times + 1"
        with self._writing() as base:
            base.execute(query, (run, seq))
            row = base.execute("SELECT times FROM begun WHERE run = ? AND seq = ?", (run, seq))
            return row.fetchone()["times"]

    def spare(self, run: str, seq: int) -> None:
        """Take back that a request was begun: it was left, and the process lives."""
        self._do("UPDATE begun SET times = times - 1 WHERE run = ? AND seq = ?", run, seq)

    def requests_after(self, run: str, seq: int) -> list[sqlite3.Row]:
        return self._all("SELECT * FROM requests WHERE run = ? AND seq > ? ORDER BY seq", run, seq)

    def next_seq(self, run: str) -> int:
        """The first number of which nothing is done."""
        row = self._one("SELECT MAX(seq) AS last FROM requests WHERE run = ? AND done", run)
        state = self._one("SELECT state FROM runs WHERE id = ?", run)
        last = -1 if row is None or row["last"] is None else row["last"]
        return max(last, -1 if state is None else state["state"]) + 1

    def waiting_runs(self) -> list[str]:
        return [row["run"] for row in self._all("SELECT DISTINCT run FROM requests WHERE NOT done")]

    def stated(self, run: str, seq: int) -> None:
        """The run's state holds all requests up to this one: they need not be computed again."""
        with self._writing() as base:
            base.execute("UPDATE runs SET state = ? WHERE id = ?", (seq, run))
            base.execute("UPDATE requests SET body = NULL WHERE run = ? AND seq <= ?", (run, seq))
            base.execute("DELETE FROM requests WHERE run = ? AND seq <= ?", (run, seq - KEPT))

    # checkpoints

    def add_checkpoint(
        self, checkpoint: Place, owner: str, config: str, *, metadata: Any = None, seconds: float | None = None,
        hidden: bool = False, request: int | None = None,
    ) -> None:  # fmt: skip
        """``request``: the number of the one that saves it."""
        created = time.time()
        size = folder_bytes(self.files_of(checkpoint))
        expires = None if seconds is None else created + seconds
        columns = (
            "(run, kind, name, owner, created, bytes, metadata, expires, hidden, config, request)"
        )
        values = (
            *checkpoint,
            owner,
            created,
            size,
            _text(metadata),
            expires,
            int(hidden),
            config,
            request,
        )
        self._do(
            f"INSERT OR REPLACE INTO checkpoints {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *values,
        )

    def checkpoint(self, checkpoint: Place) -> sqlite3.Row | None:
        row = self._one(
            "SELECT * FROM checkpoints WHERE run = ? AND kind = ? AND name = ?", *checkpoint
        )
        return None if row is None or (row["expires"] or time.time() + 1) < time.time() else row

    def checkpoints(self, owner: str | None = None, run: str | None = None) -> list[sqlite3.Row]:
        condition = "(?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR run = ?2) AND NOT hidden"
        condition += " AND COALESCE(expires, ?3) >= ?3"
        query = f"SELECT * FROM checkpoints WHERE {condition} ORDER BY created DESC"
        return self._all(query, owner, run, time.time())

    def change_checkpoint(self, checkpoint: Place, **values: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._do(
            f"UPDATE checkpoints SET {names} WHERE run = ? AND kind = ? AND name = ?",
            *values.values(),
            *checkpoint,
        )

    def delete_checkpoint(self, checkpoint: Place) -> None:
        self._do("DELETE FROM checkpoints WHERE run = ? AND kind = ? AND name = ?", *checkpoint)
        shutil.rmtree(self.files_of(checkpoint), ignore_errors=True)

    def expired(self) -> list[Place]:
        rows = self._all("SELECT * FROM checkpoints WHERE expires < ?", time.time())
        return [Place(row["run"], row["kind"], row["name"]) for row in rows]

    def unnamed(self) -> list[sqlite3.Row]:
        """Weights of samplers without a name, the newest first."""
        return self._all("SELECT * FROM checkpoints WHERE hidden ORDER BY created DESC")

    def bytes_of(self, owner: str, but: Place | None = None) -> int:
        """Bytes of an owner's checkpoints, without those of one."""
        query = "SELECT SUM(bytes) AS size FROM checkpoints WHERE owner = ? AND (run, kind, name) IS NOT (?, ?, ?)"
        row = self._one(query, owner, *(but or ("", "", "")))
        return 0 if row is None else row["size"] or 0

    def folder_of(self, run: str) -> Path:
        row = self.run(run)
        assert row is not None
        return self.folder / "runs" / str(row["number"])

    def files_of(self, checkpoint: Place) -> Path:
        return self.folder_of(checkpoint.run) / checkpoint.kind / checkpoint.name

    def runs_of(self, owner: str | None) -> int:
        """The number of runs that take requests."""
        query = (
            "SELECT COUNT(*) AS count FROM runs WHERE (?1 IS NULL OR owner = ?1) AND NOT unloaded"
        )
        row = self._one(query, owner)
        return 0 if row is None else row["count"]

    def tokens_of(self, owner: str) -> int:
        """Tokens of today."""
        reserved = self._reserved[
            owner
        ]  # first: what is settled meanwhile counts twice rather than not at all
        row = self._one("SELECT count FROM tokens WHERE owner = ? AND day = ?", owner, _today())
        return reserved + (0 if row is None else row["count"])

    def reserve_tokens(self, owner: str, count: int) -> None:
        """Count tokens that samples may take until ``settle_tokens``, or the end of the process,
        which ends them."""
        with self._lock:
            self._reserved[owner] += count

    def settle_tokens(self, owner: str, reserved: int, used: int) -> None:
        """Count what was taken of the tokens that were reserved, and give the rest back."""
        with self._lock:
            self.count_tokens(owner, used)
            self._reserved[owner] -= reserved

    def count_tokens(self, owner: str, count: int) -> None:
        query = "INSERT INTO tokens VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count"
        self._do(query, owner, _today(), count)

    # samplers

    def add_sampler(self, id: str, session: str, owner: str, path: str | None) -> None:
        self._do(
            "INSERT OR REPLACE INTO samplers (id, session, owner, path) VALUES (?, ?, ?, ?)",
            id,
            session,
            owner,
            path,
        )

    def sampler(self, id: str) -> sqlite3.Row | None:
        return self._one("SELECT * FROM samplers WHERE id = ?", id)

    def samplers(self, session: str) -> list[sqlite3.Row]:
        return self._all("SELECT * FROM samplers WHERE session = ?", session)

    def join(self, sampler: str) -> int:
        """The number of a further client of a sampler."""
        with self._writing() as base:
            base.execute("UPDATE samplers SET clients = clients + 1 WHERE id = ?", (sampler,))
            return base.execute("SELECT clients FROM samplers WHERE id = ?", (sampler,)).fetchone()[
                "clients"
            ]


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _today() -> int:
    return int(time.time() // 86400)


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value)
