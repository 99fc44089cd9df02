"""A server that is killed again and again while clients train: each ends as if nothing had
happened."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from safetensors.torch import load_file
from tests.serve.training.conftest import Local
from tests.support.training_client import Client, Run, datum

from serve_cases import servers
from veneer.serve.training.run_trainer import OPTIMIZER_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS, CLIENTS = 20, 3
#: with this learning rate, a rounding error of 1e-7 changes no loss of 200 steps by more than 1e-6,
#: and a lost step changes one of the next five losses by 3e-4 (five times the rate: 4 % and 2 %)
RATE, TOLERANCE = 0.001, 3e-5


class Server:
    """A process of `veneer serve --train` at one port, killed and started by ``again``."""

    def __init__(self, base, folder, log):
        self.port, self.log = servers.port(), log
        self.command = [
            sys.executable,
            "-m",
            "veneer.cli",
            "serve",
            str(base),
            "--name",
            "tiny",
            "--train",
            str(folder),
            "--length",
            "200",
            "--port",
            str(self.port),
        ]
        self.url, self.process, self.steps = f"http://127.0.0.1:{self.port}", None, 0

    def start(self):
        with self.log.open("a") as stream:
            self.process = subprocess.Popen(self.command, stdout=stream, stderr=subprocess.STDOUT)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self):
        self.process.kill()
        self.process.wait()


def patiently(work):
    """What ``work`` gives once a server answers. What was promised is not asked for anew: a promise
    holds."""
    while True:
        try:
            return work()
        except httpx.TransportError:
            time.sleep(0.05)


def rows(seed):
    draw = random.Random(seed)
    return [datum([draw.randrange(3, 259) for _ in range(draw.randint(3, 12))]) for _ in range(2)]


def run_folder(runs, path):
    """Where a checkpoint lies."""
    (found,) = runs.glob(f"runs/*/weights/{path.rpartition('/')[2]}")
    return found


def test_no_promised_step_is_lost_in_twenty_kills(base, tmp_path):
    server, over = Server(base, tmp_path / "runs", tmp_path / "log"), threading.Event()
    server.start()

    runs = [Client(server.url).run(seed=number) for number in range(CLIENTS)]

    def drive(number):
        run, losses = runs[number], []
        client = run.client
        while not over.is_set():
            body = run.body(rows(100 * number + len(losses)), "cross_entropy")
            body.seq_id = run.number + 1
            passed = patiently(lambda: run.send(body.SerializeToString()))  # noqa: B023
            step = {
                "model_id": run.id,
                "seq_id": run.number + 2,
                "adam_params": {"learning_rate": RATE},
            }
            stepped = patiently(lambda: client.post("optim_step", **step))  # noqa: B023
            run.number += 2
            losses.append(patiently(lambda: run.wait_for_pass(passed)).loss)  # noqa: B023
            patiently(lambda: client.result(stepped))  # noqa: B023
        return run, losses

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            driven = [pool.submit(drive, number) for number in range(CLIENTS)]
            draw = random.Random(1)
            for _ in range(KILLS):
                time.sleep(draw.uniform(0.1, 1.5))
                server.kill()
                server.start()
            time.sleep(1)
            over.set()
            found = [one.result(timeout=120) for one in driven]
        for number, (run, losses) in enumerate(found):
            assert isinstance(run, Run)
            assert len(losses) > KILLS
            local = Local(seed=number)
            state = load_file(
                run_folder(tmp_path / "runs", run.save(f"last-{number}")) / OPTIMIZER_FILE
            )
            counts = {float(value) for name, value in state.items() if name.startswith("step:")}
            assert counts == {len(losses)}  # not one step too few, nor too many
            for step, loss in enumerate(losses):
                expected = local.pass_(rows(100 * number + step))
                assert loss == pytest.approx(expected, rel=TOLERANCE), step
                local.step(RATE)
    finally:
        over.set()
        server.kill()
