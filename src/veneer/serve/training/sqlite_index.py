"""An SQLite file with one connection that writes and several that read."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.fileio.private import private_file


class Index:
    """Any thread may call it. Each write is one transaction, which is on the disk when the call
    returns. Reads use connections of their own, so that no read waits for the disk of a write."""

    def __init__(self, file: Path) -> None:
        private_file(file)
        self.lock = threading.RLock()  # held by the thread that writes
        self._file = file
        self._readers: deque[sqlite3.Connection] = deque()  # connections that no thread uses now
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
        self._close_readers()
        with self.lock:  # a running write ends first
            self._writer.close()

    def _close_readers(self) -> None:
        with suppress(IndexError):  # another thread closed the last one
            while True:
                self._readers.pop().close()

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
        try:
            reader = self._readers.pop()
        except IndexError:  # other threads use all of them
            reader = self._connect()
        try:
            return reader.execute(query, values).fetchall()
        finally:
            self._readers.append(reader)
            if self._closed:
                self._close_readers()

    def row(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row of the result, or None."""
        return next(iter(self.rows(query, *values)), None)
