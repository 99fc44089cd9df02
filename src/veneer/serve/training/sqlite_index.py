"""An SQLite file with one connection that writes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from veneer.fileio.private import private_file


class Index:
    """Any thread may call it. Each write is one transaction, which is on the disk when the call
    returns. A read opens a connection of its own, so that it does not wait for the disk of a
    write."""

    def __init__(self, file: Path) -> None:
        private_file(file)
        self.lock = threading.RLock()  # held by the thread that writes
        self._file = file
        self._closed = False
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
        self._closed = True
        with self.lock:  # a running write ends first
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self.lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def execute(self, query: str, *values: Any) -> int:
        """Run a statement as a transaction; return the number of rows that it changed."""
        with self.transaction() as writer:
            return writer.execute(query, values).rowcount

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        if self._closed:
            raise sqlite3.ProgrammingError("Cannot read a closed index.")
        with closing(self._connect()) as reader:
            return reader.execute(query, values).fetchall()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row of the result, or None."""
        return next(iter(self.rows(query, *values)), None)
