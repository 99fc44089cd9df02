"""The server of a stress run: a process that is killed and started again, on a file system that can
be filled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from tests.stress.findings import Findings

from serve_cases import servers

# : bounds of the server's process: threads, and growth of its memory after the first quarter of a
# life
MOST_THREADS, MOST_GROWTH = 250, 0.25
SETTLED = 20.0
GROWTH_ALLOWANCE = 150 * 2**20


class StressServer:
    """`veneer serve --train` at one port.

    Args:
        options: beside the base, its name and the port.
        folder: where its log lies.
    """

    def __init__(self, base: Path, options: list[str], folder: Path, findings: Findings) -> None:
        self.port, self.log, self.findings = servers.port(), folder / "server.log", findings
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "veneer.cli", "serve", str(base), "--name", "tiny", "--port",
            str(self.port), *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.lives = 0
        self.up = threading.Event()
        self._down_seconds, self._down_since = 0.0, time.monotonic()
        self.stalled = threading.Event()  # set while the disk is full: nobody's wait counts

    # ------------------------------------------------------------------------------------- life

    def start(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("a") as stream:
            stream.write(f"--- life {self.lives}\n")
            stream.flush()
            self.process = subprocess.Popen(
                self.command, stdout=stream, stderr=subprocess.STDOUT, env=environment
            )
        self.lives += 1
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            raise RuntimeError(
                f"the server was not ready within 180 s:\n{self.log.read_text()[-4000:]}"
            )
        self._down_seconds += time.monotonic() - self._down_since
        self.up.set()
        threading.Thread(target=self._watch, args=(self.process,), daemon=True).start()

    def kill(self) -> None:
        assert self.process is not None
        self._down_since = time.monotonic()
        self.up.clear()
        self.process.kill()
        self.process.wait()

    def terminate(self, seconds: float = 60.0) -> int:
        """SIGTERM; the exit status. Past ``seconds`` it is a finding, and it is killed."""
        assert self.process is not None
        self._down_since = time.monotonic()
        self.up.clear()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.findings.add("server", f"SIGTERM was not over after {seconds} s")
            self.process.kill()
            return self.process.wait()

    def up_seconds(self) -> float:
        """Seconds, on a clock that stands still while no server answers."""
        return time.monotonic() - self._down_seconds

    # ------------------------------------------------------------------------------------- memory

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Threads and resident memory of one life, each second."""
        began, memory, most_threads = time.monotonic(), [], 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            if "VmRSS" in facts:
                memory.append((time.monotonic() - began, int(facts["VmRSS"].split()[0]) * 1024))
                most_threads = max(most_threads, int(facts["Threads"]))
            time.sleep(1)
        if most_threads > MOST_THREADS:
            self.findings.add("server", f"{most_threads} threads in one life")
        settled = [size for second, size in memory if second > SETTLED]
        if len(settled) > 40:
            early = sorted(settled[: len(settled) // 4])[-1]
            late = sorted(settled[-len(settled) // 4 :])[len(settled) // 8]
            print(f"life of {len(memory)} s: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB late, "
                  f"{most_threads} threads", flush=True)  # fmt: skip
            if late > early * (1 + MOST_GROWTH) + GROWTH_ALLOWANCE:
                self.findings.add(
                    "server",
                    f"memory grew from {early / 2**20:.0f} to {late / 2**20:.0f} MiB in a life",
                )


class SmallDisk:
    """A file system in memory of ``size`` bytes, which ``fill`` fills. Mounting needs root."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.mounted = folder, False
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    def fill(self) -> None:
        """Leave no byte. ``release`` gives them back."""
        with (self.folder / "ballast").open("wb", buffering=0) as stream:
            block = bytes(2**20)
            while block:
                try:
                    stream.write(block)
                except OSError:
                    block = block[: len(block) // 2]

    def release(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
