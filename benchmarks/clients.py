"""Clients that train at once on one server of `veneer serve --train`, against the same clients one after another: wall
time until all have made their steps, in interleaved rounds. SmolLM2-135M's shape; runs of rank 8, each step a pass over
one row of T tokens and an optimiser step, over HTTP as the `tinker` SDK sends them, from a process of its own.

    one after another       client after client, the others silent (the floor)
    at once                 a thread each

CPU is the server's own time on processors, to which others on the machine add less. `alike` is the largest relative
difference between a run's losses in the one and in the other, over all its steps.

    python benchmarks/clients.py                         4 clients, 16 and 64 tokens a step, float32 and bfloat16
    python benchmarks/clients.py --tiny --runs 1         a toy: does it run

Predicted, from benchmarks/many.py's 0.45 for 8 × 16 and 0.6 to 0.7 for 8 × 64, and optimiser steps, JSON and the disk
shared by nothing but the waiting for them: 16 tokens 0.55 in both dtypes; 64 tokens 0.75 in float32, 0.65 in bfloat16.
Wanted
at small batches: 0.6. What came out: 0.54 and 0.46 at 16 tokens, 0.72 and 0.65 at 64.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import numpy as np

from candidates import options
from report import measure, show, spread, write
from serve_cases import place, servers
from veneer.serve.training.wire import MESSAGES

RANK, CLIENTS, STEPS, RATE = 8, 4, 4, 1e-3


class Run:
    """A run of a client of its own. Its losses, step by step."""

    def __init__(self, url: str, seed: int, tokens: int, vocabulary: int) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": "tml-any"}, timeout=120)
        self.draw, self.tokens, self.vocabulary = random.Random(seed), tokens, vocabulary
        self.seq, self.losses = 0, list[float]()
        session = self.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        config = {"rank": RANK, "seed": seed}
        made = self.post(
            "create_model", session_id=session, model_seq_id=0, base_model="base", lora_config=config
        )  # fmt: skip
        self.id = made["model_id"]
        self.result(made)

    def post(self, route: str, **body: Any) -> Any:
        response = self.http.post(f"/{route}", json=body)
        response.raise_for_status()
        return response.json()

    def result(self, promised: dict[str, Any]) -> httpx.Response:
        while (
            found := self.http.post("/retrieve_future", json={"request_id": promised["request_id"]})
        ).status_code == 408:
            pass
        found.raise_for_status()
        if b'"error"' in found.content[:9]:
            raise RuntimeError(found.text)
        return found

    def step(self) -> None:
        """A pass and a step, sent together; then their answers."""
        ids = np.asarray([self.draw.randrange(4, self.vocabulary) for _ in range(self.tokens + 1)])
        message = MESSAGES["ForwardBackwardRequest"](model_id=self.id, loss_fn="cross_entropy", seq_id=self.seq + 1)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = ids[:-1].astype("<i4").tobytes()
        targets = datum.loss_fn_inputs.add(key="target_tokens").value
        targets.dense, targets.dtype = ids[1:].astype("<i8").tobytes(), 2
        targets.shape.append(self.tokens)
        passed = self.http.post(
            "/forward_backward", content=message.SerializeToString(),
            headers={"content-type": "application/x-protobuf"},
        )  # fmt: skip
        passed.raise_for_status()
        self.seq += 2
        stepped = self.post("optim_step", model_id=self.id, seq_id=self.seq, adam_params={"learning_rate": RATE})
        answer = MESSAGES["ForwardBackwardOutput"].FromString(self.result(passed.json()).content)
        self.losses.append(answer.metrics[0].value)
        self.result(stepped)

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()


def cpu(server: servers.Server) -> float:
    """Seconds of its process and all that it waited for."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def timed(server: servers.Server, runs: Sequence[Run], threads: int, spent: list[float]) -> float:
    start, before = time.perf_counter(), cpu(server)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(Run.steps, runs))
    spent.append(cpu(server) - before)
    return time.perf_counter() - start


def case(server: servers.Server, dtype: str, tokens: int, runs: int, vocabulary: int) -> dict[str, Any]:
    each = {
        name: [Run(server.url, seed, tokens, vocabulary) for seed in range(CLIENTS)] for name in ("alone", "beside")
    }
    spent: dict[str, list[float]] = {name: [] for name in each}
    calls = {
        "one after another": lambda: timed(server, each["alone"], 1, spent["alone"]),
        "at once": lambda: timed(server, each["beside"], CLIENTS, spent["beside"]),
    }
    setting = {"dtype": dtype, "clients": CLIENTS, "tokens": tokens}
    found = measure(calls, floor="one after another", runs=runs, **setting)
    ratios = [two / one for one, two in zip(spent["alone"][1:], spent["beside"][1:], strict=True)]  # the first warms
    found["rows"]["at once, the server's CPU"] = {**spread(ratios), "seconds": statistics.median(spent["beside"][1:])}
    pairs = zip(each["alone"], each["beside"], strict=True)
    differ = [np.abs(np.divide(two.losses, one.losses) - 1).max() for one, two in pairs]
    found["rows"]["at once"]["alike"] = float(f"{max(differ):.1e}")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, layers=30, runs=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64])
    chosen = parser.parse_args(arguments)
    cases = []
    for dtype in chosen.dtype:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            place.make(folder, dtype, 0, tiny=chosen.tiny, merged=False)
            command = [
                sys.executable, "-m", "veneer.cli", "serve", str(folder / "base"), "--name", "base",
                "--train", str(folder / "runs"), "--length", "512",
            ]  # fmt: skip
            with servers.serve(command, folder / "log", threads=1) as server:
                for tokens in chosen.tokens:
                    cases.append(case(server, dtype, tokens, chosen.runs, 96 if chosen.tiny else 49152))
                    show("clients", cases[-1])
                    print(f"  losses within {cases[-1]['rows']['at once']['alike']:.1e} of each other", flush=True)
    usual = len(chosen.dtype) == 2 and chosen.tokens == [16, 64] and not chosen.tiny
    if chosen.out is None and not usual:
        return {"name": "clients", "cases": cases}
    return write("clients", {"cases": cases}, chosen.out)


if __name__ == "__main__":
    main()
