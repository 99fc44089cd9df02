"""A server as a process of its own: started, waited for, measured, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Server:
    """A running server at `url`; what it prints goes to `log`."""

    process: subprocess.Popen
    url: str
    log: Path


def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    command: Sequence[str],
    log: Path,
    *,
    threads: int,
    ready: str = "/ready",
    seconds: float = 300,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run `command --port PORT` in a process group of its own until the block ends.

    Args:
        threads: that OpenMP may use.
        ready: path that answers 200 when the model is loaded.
        seconds: for which it may take to get there.
        env: settings of its environment, beside those of this process.

    Raises:
        RuntimeError: it ended, or was not ready in time; shows what it printed.
    """
    number = port()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--port", str(number)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                **(env or {}),
            },
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{number}", log)
    try:
        wait(server, ready, seconds)
        yield server
    finally:
        stop(process)


def start_together(
    stack: contextlib.ExitStack, contexts: Sequence[contextlib.AbstractContextManager[Server]]
) -> list[Server]:
    """Start several servers at the same time. ``stack`` stops each, also if another one failed."""
    with ThreadPoolExecutor(len(contexts)) as pool:
        starts = [pool.submit(context.__enter__) for context in contexts]
    for context, start in zip(contexts, starts, strict=True):
        if start.exception() is None:
            stack.push(context.__exit__)
    return [start.result() for start in starts]


def wait(server: Server, ready: str = "/ready", seconds: float = 300) -> None:
    """Until it answers 200 at this path. ``RuntimeError``: it ended, or did not in time; shows what
    it printed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.process.poll() is not None:
            raise RuntimeError(
                f"{server.process.args} ended with {server.process.returncode}:\n{tail(server.log)}"
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(server.url + ready, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{server.process.args} was not ready in time:\n{tail(server.log)}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def stop(process: subprocess.Popen, seconds: float = 30) -> None:
    """Ask it to end, and end it with all that it started if it does not."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tree(server: Server) -> list[int]:
    """The process and all below it."""
    import psutil

    root = psutil.Process(server.process.pid)
    return [root.pid, *(child.pid for child in root.children(recursive=True))]


def memory(servers: Sequence[Server]) -> int:
    """Bytes that the servers hold now: pages that processes share are counted once (Pss)."""
    return (
        sum(
            _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
            for server in servers
            for pid in tree(server)
        )
        * 1024
    )


def cpu_seconds(servers: Sequence[Server]) -> float:
    """CPU time of the servers' processes since their start, user and system."""
    import psutil

    times = [psutil.Process(pid).cpu_times() for server in servers for pid in tree(server)]
    return sum(spent.user + spent.system for spent in times)


def _kib(file: Path, name: str) -> int:
    return next(
        int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name)
    )
