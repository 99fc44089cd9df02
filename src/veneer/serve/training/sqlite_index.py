"""An SQLite file with one connection for all writes, and a new connection for each read."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from veneer.fileio.private import private_file


class Index:
    """An SQLite file that any thread may use. It is created if it does not exist. Each write is one
    transaction, which is on the disk when the call returns. Each read opens a new connection, so
    that reads need not wait for a write that is being flushed to the disk."""

    def __init__(self, file: Path) -> None:
        private_file(file)
        self.lock = threading.RLock()  # held by the thread that writes
        self._file = file
        self._is_closed = False
        self._writer = self._connect()

    def create_tables(self, sql_script: str) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = FULL")
        self._writer.executescript(sql_script)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        return connection

    def close(self) -> None:
        self._is_closed = True
        with self.lock:  # wait until the running write has ended
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A context whose statements are committed together at its end, or rolled back if it raises
        an error. Contexts of several threads run one after the other."""
        with self.lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite ends the transaction itself after some errors, such as a full disk
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def execute(self, sql: str, *parameters: Any) -> None:
        """Run one statement, with values for its placeholders, as a transaction of its own."""
        with self.transaction() as writer:
            writer.execute(sql, parameters)

    def rows(self, sql: str, *parameters: Any) -> list[sqlite3.Row]:
        if self._is_closed:
            raise sqlite3.ProgrammingError("Cannot read a closed index.")
        with closing(self._connect()) as reader:
            return reader.execute(sql, parameters).fetchall()

    def row(self, sql: str, *parameters: Any) -> sqlite3.Row | None:
        """The first row of the query's result, or None if there is none."""
        return next(iter(self.rows(sql, *parameters)), None)
