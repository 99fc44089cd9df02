"""Run the stress program: `python -m tests.stress --minutes 10 --seed 0`. Status 1: an invariant
was broken."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from tests.stress.api_clients import ApiClient, request_body
from tests.stress.findings import Findings
from tests.stress.server import SmallDisk, StressServer
from tests.stress.training_clients import TrainingClient
from tests.support.tiny import tiny_model, write_tiny

import veneer
from veneer.serve.access import hash_of
from veneer.serve.training.run_trainer import OPTIMIZER_FILE

DISK = 400 * 2**20
STABLE, REPLACED, FLEETING = 8, 3, 2


def write_keys(path: Path, count: int) -> list[str]:
    """A key for each client; all may train and use every adapter."""
    keys = [f"stress-key-{number:03d}" for number in range(count)]
    path.write_text(
        "\n".join(
            f'[[keys]]\nname = "client-{number:03d}"\nsha256 = "{hash_of(key)}"\nadapters = ["*"]\ntrain = true\n'
            for number, key in enumerate(keys)
        )
    )
    return keys


class Adapters:
    """Adapter folders of the server: some stay, some are replaced by another version, some are
    deleted meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.versions = {f"replaced-{i}": (100 + i, 200 + i) for i in range(REPLACED)}
        self.fleeting = {f"fleeting-{i}": 300 + i for i in range(FLEETING)}
        for i in range(STABLE):
            write_adapter(folder / f"stable-{i}", i, rank=1 + i % 4)
        for name, seeds in self.versions.items():
            write_adapter(folder / name, seeds[0], rank=4)
        for name, seed in self.fleeting.items():
            write_adapter(folder / name, seed, rank=2)

    def names(self) -> list[str]:
        return [f"stable-{i}" for i in range(STABLE)] + [*self.versions] + [*self.fleeting]

    def replace(self, name: str, version: int) -> None:
        """Publish another version under the same name, as a trainer on another machine would:
        write, then rename."""
        write_adapter(self.folder / name, self.versions[name][version], rank=4)

    def delete(self, name: str) -> None:
        aside = self.folder.parent / f"deleted-{name}-{time.monotonic_ns()}"
        (self.folder / name).rename(aside)

    def restore(self, name: str) -> None:
        made = write_adapter(
            self.folder.parent / f"new-{name}-{time.monotonic_ns()}", self.fleeting[name], rank=2
        )
        made.rename(self.folder / name)


def write_adapter(folder: Path, seed: int, **config: Any) -> Path:
    """An adapter whose parameters are the same for each seed, and large enough for answers to
    differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        handle = veneer.attach(tiny_model(), veneer.LoraConfig(**config))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    handle.save(folder, overwrite=True)
    return folder


def ask(server: StressServer, key: str, model: str) -> str:
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(
        f"{server.url}/v1/completions",
        json=request_body(model),
        headers=headers,
        timeout=60,
        trust_env=False,
    )
    if response.status_code != 200:
        raise RuntimeError(f"{model}: {response.status_code} {response.text}")
    return response.json()["choices"][0]["text"]


def known_answers(server: StressServer, key: str, adapters: Adapters) -> dict[str, set[str]]:
    answers = {name: {ask(server, key, name)} for name in adapters.names()}
    for version in (1, 0):
        for name in adapters.versions:
            adapters.replace(name, version)
        for name in adapters.versions:
            deadline = time.monotonic() + 30
            while version and len(answers[name]) < 2 and time.monotonic() < deadline:
                answers[name].add(ask(server, key, name))
    return answers


def disturb(
    seed: int,
    seconds: float,
    server: StressServer,
    adapters: Adapters,
    disk: SmallDisk,
    kills: int,
    findings: Findings,
) -> None:
    """Kill the server, fill its disk and replace adapters until ``seconds`` have passed, at times
    from the seed."""
    draw = random.Random(f"{seed}:disturb")
    began = time.monotonic()
    kill_at = sorted(draw.uniform(0.1, 0.95) * seconds for _ in range(kills))
    fill_at = sorted(draw.uniform(0.1, 0.9) * seconds for _ in range(2)) if disk.mounted else []
    print(
        f"kills at {[round(at) for at in kill_at]} s, a full disk at {[round(at) for at in fill_at]} s",
        flush=True,
    )
    absent: list[str] = []
    while (now := time.monotonic() - began) < seconds:
        if kill_at and now > kill_at[0]:
            kill_at.pop(0)
            server.kill()
            findings.count("kill")
            server.start()
        elif fill_at and now > fill_at[0]:
            fill_at.pop(0)
            server.stalled.set()
            disk.fill()
            findings.count("full disk")
            time.sleep(draw.uniform(2, 8))
            disk.release()
            time.sleep(5)
            server.stalled.clear()
        elif absent and draw.random() < 0.4:
            adapters.restore(absent.pop())
        elif draw.random() < 0.3:
            absent.append(name := draw.choice([*adapters.fleeting.keys() - absent] or [""]))
            if name:
                adapters.delete(name)
            else:
                absent.pop()
        else:
            name = draw.choice([*adapters.versions])
            adapters.replace(name, draw.randrange(2))
        time.sleep(draw.uniform(0.5, 2.5))


def run(seed: int, minutes: float, clients: int, kills: int, folder: Path) -> Findings:
    """The whole program; ``folder``: an empty one."""
    base = write_tiny(folder / "base")
    adapters = Adapters(folder / "adapters")
    keys = write_keys(folder / "keys.toml", 2 * clients + 1)
    disk = SmallDisk(folder / "disk", DISK)
    findings = Findings(str(folder))
    options = [
        "--train", str(disk.folder / "runs"), "--adapters", str(adapters.folder), "--keys", str(folder / "keys.toml"),
        "--runs", "4", "--memory", "400KiB", "--length", "200", "--rows", "8",
    ]  # fmt: skip
    server = StressServer(base, options, folder, findings)
    try:
        server.start()
        answers = known_answers(server, keys[-1], adapters)
        shared = (server, findings)
        threads: list[TrainingClient | ApiClient] = [
            TrainingClient(number, seed, keys[number], *shared) for number in range(clients)
        ]
        threads += [
            ApiClient(number, seed, keys[number], *shared, answers, {*adapters.fleeting})
            for number in range(clients, 2 * clients)
        ]
        for thread in threads:
            thread.start()
        disturb(seed, 60 * minutes, server, adapters, disk, kills, findings)
        for thread in threads:
            thread.over.set()
        for thread in threads:
            thread.join(180)
            if thread.is_alive():
                findings.add(thread.name, "its last request had no answer within 180 s")
        _finish(server, threads, disk.folder / "runs", findings)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()
        disk.close()
    log = server.log.read_text()
    if "Traceback" in log:
        findings.add("server", f"{log.count('Traceback')} tracebacks in its log, the first: "
                     f"{log[log.index('Traceback') - 600 : log.index('Traceback') + 3000]}")  # fmt: skip
    return findings


def _finish(
    server: StressServer, threads: list[TrainingClient | ApiClient], runs: Path, findings: Findings
) -> None:
    """Count the steps of each run, stop the server as an operator does, and start it once more."""

    def read_steps(path: str) -> int:
        _, kind, name = path.removeprefix("tinker://").split("/")
        (state,) = runs.glob(f"runs/*/{kind}/{name}/{OPTIMIZER_FILE}")
        counts = {int(value) for key, value in load_file(state).items() if key.startswith("step:")}
        return max(counts, default=0)

    trainers = [
        thread for thread in threads if isinstance(thread, TrainingClient) and not thread.is_alive()
    ]
    for trainer in trainers:
        try:
            trainer.count_steps(read_steps)
        except TimeoutError:
            continue
    status = server.terminate()
    if status != 0:
        findings.add("server", f"SIGTERM ended with {status}")
    server.start()
    status = server.terminate()
    if status != 0:
        findings.add("server", f"SIGTERM after the last start ended with {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=50, help="of each kind")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the server's log and files here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        findings = run(
            arguments.seed, arguments.minutes, arguments.clients, arguments.kills, folder
        )
    print(
        f"seed {arguments.seed}, {arguments.minutes} minutes, {arguments.clients} clients of each kind"
    )
    print(json.dumps(dict(sorted(findings.counts.items())), indent=2))
    print(f"{len(findings.broken)} broken invariants")
    for line in findings.broken[:50]:
        print(line)
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("client-")]
    print(f"client threads left: {len(alive)}")
    return 1 if findings.broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
