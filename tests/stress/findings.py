"""What a stress run observes of every answer, and the list of invariants that were broken.

- An error never names another client's session, run, checkpoint, key or file.
- No answer is a 5xx, but 503 (drains, or cannot write) and 507 (the disk is full).
- A request is answered within ``BOUND`` seconds during which a server was up.
- Every acknowledged step is in the run's state.
- Threads and memory of the server stay within bounds.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

#: seconds of a server that is up within which each request is answered
BOUND = 90.0
#: statuses of 500 and above that say something a client can act on
UNDERSTOOD = {503, 507}
_CLIENT = re.compile(r"client-\d\d\d")
_INTERNAL = re.compile(r"Traceback \(most recent call last\)|site-packages|\.py\", line \d+")


@dataclass
class Findings:
    """Shared by all threads of a stress run."""

    folder: str
    broken: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    owners: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, client: str, problem: str) -> None:
        with self.lock:
            second = time.monotonic() - self.started
            line = f"{second:6.1f} s  {client}: {problem}"
            self.broken.append(line)
            print("BROKEN", line, flush=True)

    def count(self, event: str) -> None:
        with self.lock:
            self.counts[event] += 1

    def register(self, name: str, client: str) -> None:
        """``name``, of a session or a run, is this client's: no other one may read it in an
        error."""
        with self.lock:
            self.owners[name] = client

    def check_text(self, client: str, text: str) -> None:
        """An answer or error that ``client`` was sent."""
        others = set(_CLIENT.findall(text)) - {client}
        with self.lock:
            others |= {
                owner for name, owner in self.owners.items() if owner != client and name in text
            }
        if others:
            self.add(client, f"was told of {sorted(others)}: {text[:400]}")
        if _INTERNAL.search(text) or self.folder in text:
            self.add(client, f"was told of the server's inside: {text[:400]}")

    def check_status(self, client: str, request: str, status: int, text: str) -> None:
        self.count(f"{request} {status}")
        if status >= 500 and status not in UNDERSTOOD:
            self.add(client, f"{request} was answered {status}: {text[:400]}")
        if status >= 400:
            self.check_text(client, text)
