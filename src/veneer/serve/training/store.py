"""The training service's data on the disk: an SQLite index, and a folder for each run's weights.

    FOLDER/index.sqlite         sessions, runs, requests, answers, checkpoints, sampling sessions
    FOLDER/runs/7/state-12/     saved state of run 7 after request 12: adapter, optimizer, curve
    FOLDER/runs/7/weights/…     checkpoints of run 7 with the optimizer's state
    FOLDER/runs/7/*_weights/…   checkpoints without it: sampler_weights, external_weights

A run is one LoRA adapter that a client trains. A request is written before it is acknowledged.
Each acknowledged request is therefore either part of the saved state of its run, or among the
requests after that state, which are computed again after a restart.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from veneer.errors import ConfigError, DataError, listing
from veneer.fileio.private import private_folder
from veneer.serve.training.sqlite_index import Index

log = logging.getLogger("veneer.serve.training")

INDEX, FORMAT = "index.sqlite", 1  # name of the index file; version of the folder's format
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: kind in a checkpoint's path -> `checkpoint_type` in the API's answers
CHECKPOINT_KINDS = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
#: values of the column `done` of an answered request (0: no answer yet): success; a failure that
#: changed nothing; a failure of a request whose gradients the run's next optimizer step lacks
SUCCEEDED, FAILED, FAILED_STEP_INPUT = 1, 2, 3
#: how many answers a saved state keeps for clients: as many as requests may wait for a run
MAX_OLD_ANSWERS = 1024
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT, metadata TEXT, title TEXT, created REAL, seen REAL,
    finished TEXT);
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, session TEXT, owner TEXT, config TEXT,
    seed INTEGER, metadata TEXT, created REAL, used REAL, state INTEGER,
    unloaded INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS requests (
    run TEXT, seq INTEGER, kind TEXT, body BLOB, done INTEGER DEFAULT 0, binary INTEGER DEFAULT 0,
    answer BLOB, PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun (
    run TEXT, seq INTEGER, times INTEGER, PRIMARY KEY (run, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failed_runs (run TEXT PRIMARY KEY, reason TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    run TEXT, kind TEXT, name TEXT, owner TEXT, created REAL, bytes INTEGER, metadata TEXT,
    expires REAL, public INTEGER DEFAULT 0, hidden INTEGER DEFAULT 0, config TEXT, request INTEGER,
    PRIMARY KEY (run, kind, name));
CREATE TABLE IF NOT EXISTS tokens (
    owner TEXT, day INTEGER, count INTEGER, PRIMARY KEY (owner, day)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS samplers (
    id TEXT PRIMARY KEY, session TEXT, owner TEXT, path TEXT, clients INTEGER DEFAULT 0);
"""


class Checkpoint(NamedTuple):
    """A checkpoint's path tinker://RUN/KIND/NAME, where KIND is one of ``CHECKPOINT_KINDS``."""

    run: str
    kind: str
    name: str

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


def parse_checkpoint_path(path: str) -> Checkpoint:
    """Parse tinker://RUN/KIND/NAME. ``DataError``: the path has another form."""
    path_parts = path.removeprefix("tinker://").split("/")
    if (
        not path.startswith("tinker://")
        or len(path_parts) != 3
        or path_parts[1] not in CHECKPOINT_KINDS
        or not CHECKPOINT_NAME.fullmatch(path_parts[2])
    ):
        raise DataError(
            f"the path {path[:200]!r}",
            "tinker://RUN/weights/NAME, or another kind",
            "check the path",
        )
    return Checkpoint(*path_parts)


class Store:
    """The index (an SQLite file) and the folders of the runs. Any thread may call the methods. Each
    write is on the disk when the call returns. ``owner`` is the name of an API key. A missing
    row is None. ``ConfigError``: another server uses the folder, or its index is damaged."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().resolve()
        private_folder(self.folder)
        self._file_lock = FileLock(self.folder / "server.lock")
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{folder}, which another server uses",
                "a folder for this server alone",
                "stop the other server, or give another folder",
            ) from error
        self._reserved_tokens: Counter[str] = Counter()  # by API key: for running calls
        self._index = Index(self.folder / INDEX)
        try:
            self._index.create_tables(_TABLES)
            columns = [row["name"] for row in self._index.rows("PRAGMA table_info(checkpoints)")]
            if "request" not in columns:  # an earlier release wrote the index
                self._index.execute("ALTER TABLE checkpoints ADD COLUMN request INTEGER")
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigError(
                f"{folder}, whose {INDEX} cannot be read ({error})",
                "an index of a training service",
                "restore it, or give another folder",
            ) from error

    def close(self) -> None:
        self._index.close()
        self._file_lock.release()

    def require_base(self, base_name: str, fingerprint: str) -> None:
        """In a new folder, record the base model; else check that it is the recorded one.
        ``fingerprint``: a hash of one of its weights. ``ConfigError``: the folder's runs were
        trained on another base model, or the folder was written in another format."""
        versions = {"format": str(FORMAT), "veneer": version("veneer"), "torch": version("torch")}
        with self._index.transaction() as writer:
            facts = {row["name"]: row["value"] for row in writer.execute("SELECT * FROM facts")}
            if facts and facts.get("format") != versions["format"]:
                raise ConfigError(
                    f"{self.folder}, of format {facts.get('format')!r}, as veneer"
                    f" {facts.get('veneer', 'of an unknown version')} writes it",
                    f"format {FORMAT}",
                    "serve it with that version, or give another folder",
                )
            if facts and facts.get("mark") != fingerprint:
                raise ConfigError(
                    f"{self.folder}, whose runs are of {facts.get('base')}",
                    f"runs of this base, {base_name}",
                    "serve that base, or give another folder",
                )
            changed_versions = [
                f"{key} {facts[key]} (now {versions[key]})"
                for key in versions
                if facts.get(key, versions[key]) != versions[key]
            ]
            if changed_versions:
                log.warning(
                    "%s was written with %s: results of requests that are computed again may differ"
                    " by rounding",
                    self.folder,
                    listing(changed_versions),
                )
            facts = {"base": base_name, "mark": fingerprint, **versions}
            writer.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    def new_session(self, owner: str, metadata: Mapping[str, Any] | None, title: str | None) -> str:
        session_id = secrets.token_hex(16)
        self._index.execute(
            "INSERT INTO sessions VALUES (?1, ?2, ?3, ?4, ?5, ?5, NULL)",
            session_id,
            owner,
            _to_json(metadata),
            title,
            time.time(),
        )
        return session_id

    def session(self, session_id: str) -> sqlite3.Row | None:
        return self._index.row("SELECT * FROM sessions WHERE id = ?", session_id)

    def sessions(self, owner: str | None) -> list[sqlite3.Row]:
        return self._index.rows(
            "SELECT * FROM sessions WHERE ?1 IS NULL OR owner = ?1 ORDER BY created DESC", owner
        )

    def finish_session(self, session_id: str, reason: str) -> None:
        """Mark a session as finished. If it has finished already, the first reason is kept."""
        self._index.execute(
            "UPDATE sessions SET finished = ? WHERE id = ? AND finished IS NULL", reason, session_id
        )

    def new_run(
        self, id: str, session: str, owner: str, config: Mapping[str, Any], seed: int, metadata: Any
    ) -> None:
        self._index.execute(
            "INSERT INTO runs (id, session, owner, config, seed, metadata, created, used, state)"
            " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7, -1)",
            id,
            session,
            owner,
            _to_json(config),
            seed,
            _to_json(metadata),
            time.time(),
        )

    def run(self, run_id: str) -> sqlite3.Row | None:
        return self._index.row("SELECT * FROM runs WHERE id = ?", run_id)

    def existing_run(self, run_id: str) -> sqlite3.Row:
        """The row of a run whose id is known to be valid, because runs are never deleted."""
        run_row = self.run(run_id)
        assert run_row is not None
        return run_row

    def runs(self, owner: str | None, session: str | None = None) -> list[sqlite3.Row]:
        condition = "(?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR session = ?2)"
        return self._index.rows(
            f"SELECT * FROM runs WHERE {condition} ORDER BY used DESC, number DESC", owner, session
        )

    def mark_unloaded(self, run_id: str) -> None:
        """Record that a run takes no more requests and is not counted in its key's quota."""
        self._index.execute("UPDATE runs SET unloaded = 1 WHERE id = ?", run_id)

    def record_failure(self, run_id: str, reason: str) -> None:
        """Record why a run failed. The run then accepts nothing but a checkpoint to load."""
        self._index.execute("INSERT OR REPLACE INTO failed_runs VALUES (?, ?)", run_id, reason)

    def failure_of(self, run_id: str) -> str | None:
        row = self._index.row("SELECT reason FROM failed_runs WHERE run = ?", run_id)
        return None if row is None else row["reason"]

    def clear_failure(self, run_id: str) -> None:
        """Delete the recorded failure of a run, after a checkpoint was loaded into the run."""
        self._index.execute("DELETE FROM failed_runs WHERE run = ?", run_id)

    def is_copy(self, run_id: str) -> bool:
        """Whether a run only holds copied checkpoints: it takes no requests and has had none."""
        run_row = self.run(run_id)
        return run_row is not None and bool(run_row["unloaded"]) and not self.next_seq(run_id)

    def set_config(self, run_id: str, config: Mapping[str, Any]) -> None:
        self._index.execute("UPDATE runs SET config = ? WHERE id = ?", _to_json(config), run_id)

    def add_request(self, run_id: str, seq: int, kind: str, body: bytes) -> bool:
        """Add a request, unless the run has one with this number; return whether it was added."""
        with self._index.transaction() as writer:
            inserted_count = writer.execute(
                "INSERT OR IGNORE INTO requests (run, seq, kind, body) VALUES (?, ?, ?, ?)",
                (run_id, seq, kind, body),
            ).rowcount
            writer.execute("UPDATE runs SET used = ? WHERE id = ?", (time.time(), run_id))
            return bool(inserted_count)

    def request(self, run_id: str, seq: int) -> sqlite3.Row | None:
        return self._index.row("SELECT * FROM requests WHERE run = ? AND seq = ?", run_id, seq)

    def store_answer(self, run_id: str, seq: int, status: int, binary: bool, answer: bytes) -> None:
        """Store the answer to a request. ``status``: ``SUCCEEDED``, ``FAILED`` or
        ``FAILED_STEP_INPUT``; ``binary``: the answer is protobuf, not JSON."""
        with self._index.transaction() as writer:
            writer.execute(
                "UPDATE requests SET done = ?, binary = ?, answer = ? WHERE run = ? AND seq = ?",
                (status, int(binary), answer, run_id, seq),
            )
            writer.execute("DELETE FROM begun WHERE run = ? AND seq = ?", (run_id, seq))

    def failure_metrics(self, run_id: str) -> dict[str, float]:
        """The metrics of a run's next optimizer step that say which gradients it lacks: how many
        passes with a backward failed since the last step, and how many requests never arrived."""
        last_step_query = (
            "SELECT MAX(seq) FROM requests WHERE run = ?1 AND done = 1 AND kind IN ('step', 'load')"
        )
        rows = self._index.rows(
            "SELECT kind = 'missing' AS missing, COUNT(*) AS count, MAX(seq) AS last FROM requests"
            f" WHERE run = ?1 AND done = 3 AND seq > COALESCE(({last_step_query}), -1) GROUP BY 1",
            run_id,
        )
        metrics: dict[str, float] = {}
        for row in rows:
            metric_name = "missing_requests" if row["missing"] else "failed_passes"
            metrics[f"{metric_name}:sum"] = row["count"]
            if row["missing"]:
                metrics[f"{metric_name}:max"] = row["last"]
        return metrics

    def count_attempt(self, run_id: str, seq: int) -> int:
        """Count one more attempt to compute a request without an answer; return the number of
        attempts, which shows how often the process has died during the request."""
        with self._index.transaction() as writer:
            return writer.execute(
                "INSERT INTO begun VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET times = times + 1"
                " RETURNING times",
                (run_id, seq),
            ).fetchone()["times"]

    def uncount_attempt(self, run_id: str, seq: int) -> None:
        """Count one attempt less, because it ended without an answer but killed no process."""
        self._index.execute(
            "UPDATE begun SET times = times - 1 WHERE run = ? AND seq = ?", run_id, seq
        )

    def requests_after(self, run_id: str, seq: int) -> list[sqlite3.Row]:
        return self._index.rows(
            "SELECT * FROM requests WHERE run = ? AND seq > ? ORDER BY seq", run_id, seq
        )

    def next_seq(self, run_id: str) -> int:
        """The number of the first request that a run has not answered: 0 for a new run."""
        row = self._index.row(
            "SELECT MAX(seq) AS last FROM requests WHERE run = ? AND done", run_id
        )
        state_row = self._index.row("SELECT state FROM runs WHERE id = ?", run_id)
        last_answered = -1 if row is None or row["last"] is None else row["last"]
        return max(last_answered, -1 if state_row is None else state_row["state"]) + 1

    def waiting_runs(self) -> list[str]:
        return [
            row["run"]
            for row in self._index.rows("SELECT DISTINCT run FROM requests WHERE NOT done")
        ]

    def set_state(self, run_id: str, seq: int) -> None:
        """Record that a run's saved state includes all requests up to ``seq``. Their bodies are
        deleted, and all but the last ``MAX_OLD_ANSWERS`` answers; none is computed again."""
        with self._index.transaction() as writer:
            writer.execute("UPDATE runs SET state = ? WHERE id = ?", (seq, run_id))
            writer.execute(
                "UPDATE requests SET body = NULL WHERE run = ? AND seq <= ?", (run_id, seq)
            )
            last_deleted = seq - MAX_OLD_ANSWERS
            writer.execute(
                "DELETE FROM requests WHERE run = ? AND seq <= ?", (run_id, last_deleted)
            )

    def add_checkpoint(
        self,
        checkpoint: Checkpoint,
        owner: str,
        config: str,
        *,
        metadata: Any = None,
        lifetime_seconds: float | None = None,
        hidden: bool = False,
        request: int | None = None,
    ) -> None:
        """Record a checkpoint whose files exist. ``config``: of its adapter, as JSON; ``hidden``:
        lists of checkpoints leave it out; ``request``: the number of the request that saved it."""
        created = time.time()
        size_bytes = folder_bytes(self.files_of(checkpoint))
        expires = None if lifetime_seconds is None else created + lifetime_seconds
        self._index.execute(
            "INSERT OR REPLACE INTO checkpoints"
            " (run, kind, name, owner, created, bytes, metadata, expires, hidden, config, request)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *checkpoint,
            owner,
            created,
            size_bytes,
            _to_json(metadata),
            expires,
            int(hidden),
            config,
            request,
        )

    def checkpoint(self, checkpoint: Checkpoint) -> sqlite3.Row | None:
        row = self._index.row(
            "SELECT * FROM checkpoints WHERE run = ? AND kind = ? AND name = ?", *checkpoint
        )
        return None if row is None or (row["expires"] or time.time() + 1) < time.time() else row

    def checkpoints(self, owner: str | None = None, run_id: str | None = None) -> list[sqlite3.Row]:
        query = (
            "SELECT * FROM checkpoints WHERE (?1 IS NULL OR owner = ?1)"
            " AND (?2 IS NULL OR run = ?2) AND NOT hidden AND COALESCE(expires, ?3) >= ?3"
            " ORDER BY created DESC"
        )
        return self._index.rows(query, owner, run_id, time.time())

    def change_checkpoint(self, checkpoint: Checkpoint, **columns: Any) -> None:
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self._index.execute(
            f"UPDATE checkpoints SET {assignments} WHERE run = ? AND kind = ? AND name = ?",
            *columns.values(),
            *checkpoint,
        )

    def delete_checkpoint(self, checkpoint: Checkpoint) -> None:
        query = "DELETE FROM checkpoints WHERE run = ? AND kind = ? AND name = ?"
        self._index.execute(query, *checkpoint)
        shutil.rmtree(self.files_of(checkpoint), ignore_errors=True)

    def expired_checkpoints(self) -> list[Checkpoint]:
        rows = self._index.rows("SELECT * FROM checkpoints WHERE expires < ?", time.time())
        return [Checkpoint(row["run"], row["kind"], row["name"]) for row in rows]

    def hidden_checkpoints(self) -> list[sqlite3.Row]:
        """The rows of the checkpoints without a name, saved only to sample from; newest first."""
        return self._index.rows("SELECT * FROM checkpoints WHERE hidden ORDER BY created DESC")

    def checkpoint_bytes(self, owner: str, excluded: Checkpoint | None = None) -> int:
        """The bytes of all checkpoints of a key, without those of the checkpoint ``excluded``."""
        query = (
            "SELECT SUM(bytes) AS size FROM checkpoints"
            " WHERE owner = ? AND (run, kind, name) IS NOT (?, ?, ?)"
        )
        row = self._index.row(query, owner, *(excluded or ("", "", "")))
        return 0 if row is None else row["size"] or 0

    def folder_of(self, run_id: str) -> Path:
        return self.folder / "runs" / str(self.existing_run(run_id)["number"])

    def files_of(self, checkpoint: Checkpoint) -> Path:
        return self.folder_of(checkpoint.run) / checkpoint.kind / checkpoint.name

    def count_runs(self, owner: str | None) -> int:
        """The number of runs that take requests, of one key, or of all keys if it is None."""
        query = (
            "SELECT COUNT(*) AS count FROM runs WHERE (?1 IS NULL OR owner = ?1) AND NOT unloaded"
        )
        row = self._index.row(query, owner)
        return 0 if row is None else row["count"]

    def tokens_today(self, owner: str) -> int:
        """The number of tokens that a key has used today (UTC), including reserved tokens."""
        # Read the reservations before the table: if a reservation is settled in between, its tokens
        # are counted twice here, which is safe, while the other order would not count them.
        reserved_tokens = self._reserved_tokens[owner]
        row = self._index.row(
            "SELECT count FROM tokens WHERE owner = ? AND day = ?", owner, _today()
        )
        return reserved_tokens + (0 if row is None else row["count"])

    def reserve_tokens(self, owner: str, token_count: int) -> None:
        """Reserve tokens of a key's quota, the most that a call for samples can use, in memory,
        until ``settle_tokens`` replaces the reservation or the process ends."""
        with self._index.lock:
            self._reserved_tokens[owner] += token_count

    def settle_tokens(self, owner: str, reserved_tokens: int, used_tokens: int) -> None:
        """End a reservation, and count the ``used_tokens``, which a disk error keeps reserved."""
        with self._index.lock:
            self._reserved_tokens[owner] -= reserved_tokens - used_tokens
            self.count_tokens(owner, used_tokens)
            self._reserved_tokens[owner] -= used_tokens

    def count_tokens(self, owner: str, token_count: int) -> None:
        query = (
            "INSERT INTO tokens VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET count = count + excluded.count"
        )
        self._index.execute(query, owner, _today(), token_count)

    def add_sampler(self, sampler_id: str, session_id: str, owner: str, path: str | None) -> None:
        """Add a sampling session that samples from the checkpoint ``path``, or from the base model
        (None). If the session exists, only its ``path`` changes."""
        query = (
            "INSERT INTO samplers (id, session, owner, path) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET path = excluded.path"
        )
        self._index.execute(query, sampler_id, session_id, owner, path)

    def sampler(self, sampler_id: str) -> sqlite3.Row | None:
        return self._index.row("SELECT * FROM samplers WHERE id = ?", sampler_id)

    def samplers(self, session_id: str) -> list[sqlite3.Row]:
        return self._index.rows("SELECT * FROM samplers WHERE session = ?", session_id)

    def add_sampler_client(self, sampler_id: str) -> int:
        """Count one more client of a sampling session; return the number of clients so far."""
        with self._index.transaction() as writer:
            return writer.execute(
                "UPDATE samplers SET clients = clients + 1 WHERE id = ? RETURNING clients",
                (sampler_id,),
            ).fetchone()["clients"]


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _today() -> int:
    """The number of days since 1970 (UTC)."""
    return int(time.time() // 86400)


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)
