"""An SQLite file with one connection for all writes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from veneer.fileio.private import private_file


class Index:
    """An SQLite file that any thread may use. Each write is one transaction, which is on the disk
    when the call returns. Each read opens a new connection, so that reads need not wait for a write
    that is being flushed to the disk."""

    def __init__(self, file: Path) -> None:
        private_file(file)
        self.lock = threading.RLock()  # held by the thread that writes
        self._file = file
        self._is_closed = False
        self._writer = self._connect()

    def create_tables(self, script: str) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute("PRAGMA synchronous = FULL")
        self._writer.executescript(script)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        return connection

    def close(self) -> None:
        self._is_closed = True
        with self.lock:  # a running write ends first
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # a full disk may have ended it
                    self._writer.execute("ROLLBACK")
                raise

    def execute(self, statement: str, *parameters: Any) -> None:
        """Run a statement as a transaction."""
        with self.transaction() as writer:
            writer.execute(statement, parameters)

    def rows(self, query: str, *parameters: Any) -> list[sqlite3.Row]:
        if self._is_closed:
            raise sqlite3.ProgrammingError("Cannot read a closed index.")
        with closing(self._connect()) as reader:
            return reader.execute(query, parameters).fetchall()

    def row(self, query: str, *parameters: Any) -> sqlite3.Row | None:
        """The first row of the result, or None."""
        return next(iter(self.rows(query, *parameters)), None)
