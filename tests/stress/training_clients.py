"""Clients of the training service, each a thread whose actions are drawn from (seed, number).

A client keeps count of the optimiser steps that it was told of. Steps whose answer it never asked
for (it vanished) may be in the run or not.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from tests.stress.findings import BOUND, Findings
from tests.stress.server import StressServer
from tests.support.training_client import Run, datum

#: an optimiser step that is legal and ends in numbers that no file format for adapters takes
DIVERGING = {"learning_rate": 10.0, "beta2": 0.0, "eps": 1e-20}
TINY_RATE = {"learning_rate": 0.002}
#: bodies that the service refuses before they reach a run's line
REFUSED_STEPS = (
    {"learning_rate": 1e400}, {"learning_rate": -1.0}, {"learning_rate": 0.01, "grad_clip_norm": 1e400},
    {"learning_rate": 0.01, "unheard_of": 1},
)  # fmt: skip


def encode_pass(run_id: str, seq: int, rows: list[dict[str, Any]]) -> bytes:
    message = Run(None, run_id).body(rows, "cross_entropy")
    message.seq_id = seq
    return message.SerializeToString()


@dataclass
class RunState:
    """A run as its client knows it. ``steps``: acknowledged; ``open_steps``: sent, answer not
    known."""

    id: str
    seq: int = 0
    steps: int = 0
    open_steps: int = 0
    failed: str = ""

    def next(self) -> int:
        self.seq += 1
        return self.seq


class TrainingClient(threading.Thread):
    """One client with a key, a session and up to a few runs."""

    def __init__(
        self, number: int, seed: int, key: str, server: StressServer, findings: Findings
    ) -> None:
        super().__init__(name=f"client-{number:03d}", daemon=True)
        self.draw = random.Random(f"{seed}:train:{number}")
        self.key, self.server, self.findings = key, server, findings
        self.over = threading.Event()
        self.run_state: RunState | None = None
        self.finished_runs: list[RunState] = []
        self.session, self.model_number, self.checkpoints = "", 0, []
        self.sample_numbers = itertools.count(1)
        self.log: list[str] = []
        self.diverges = number % 10 == 3
        self.http = self._connect()

    def _connect(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"{self.server.url}/api/v1",
            headers={"x-api-key": f"tml-{self.key}"},
            timeout=60,
            trust_env=False,
        )

    # ------------------------------------------------------------------------------------- requests

    def request(
        self, route: str, body: Any = None, *, method: str = "POST", content: bytes | None = None
    ) -> Any:
        """The response, once a server gives one: what is sent twice has the same number, so it
        counts once."""
        began = self.server.up_seconds()
        while True:
            try:
                if content is not None:
                    headers = {"content-type": "application/x-protobuf"}
                    response = self.http.post(f"/{route}", content=content, headers=headers)
                else:
                    response = self.http.request(method, f"/{route}", json=body)
                self.findings.check_status(
                    self.name, route.split("/")[0], response.status_code, response.text[:2000]
                )
                if response.status_code not in (503, 507):
                    return response
            except httpx.TransportError:
                pass
            self._check_wait(began, route)
            time.sleep(0.2)

    def _check_wait(self, began: float, route: str) -> None:
        waited = self.server.up_seconds() - began
        if waited > BOUND and not self.server.stalled.is_set():
            self.findings.add(self.name, f"{route} was not answered in {waited:.0f} s")
            raise TimeoutError(route)

    def result(self, response: httpx.Response) -> Any:
        """What a promise comes to: JSON with perhaps "error", or the bytes of a message."""
        if response.status_code != 200:
            return {"error": response.text, "category": "refused"}
        promise, began = response.json()["request_id"], self.server.up_seconds()
        while True:
            answer = self.request("retrieve_future", {"request_id": promise})
            if answer.status_code == 408:
                self._check_wait(began, "retrieve_future")
                continue
            if answer.status_code != 200:
                return {"error": answer.text, "category": "refused"}
            if answer.headers["content-type"] == "application/x-protobuf":
                return answer.content
            content = answer.json()
            if "error" in content:
                self.findings.check_text(self.name, content["error"])
                self.findings.count(f"error: {content['category']}")
            return content

    # ------------------------------------------------------------------------------------- life

    def run(self) -> None:
        try:
            while not self.over.is_set():
                if not self.session:
                    self._begin_session()
                if self.run_state is None:
                    self._begin_run()
                    continue
                action = self._choose()
                self.log.append(action.__name__)
                action()
        except TimeoutError:
            pass
        except BaseException as error:
            self.findings.add(self.name, f"the client failed: {type(error).__name__}: {error}")
            raise

    def _choose(self) -> Callable[[], None]:
        actions: dict[Callable[[], None], float] = {
            self.train: 10, self.pipeline: 3, self.save: 2, self.sample: 2, self.fail_pass: 1, self.send_refused: 1,
            self.vanish_in_pass: 1, self.vanish_slowly: 0.5, self.delete: 1, self.load: 0.7, self.end_run: 0.3,
            self.look: 1, self.pause: 1,
        }  # fmt: skip
        if self.diverges:
            actions[self.diverge] = 1.5
        return self.draw.choices([*actions], [*actions.values()])[0]

    def _begin_session(self) -> None:
        body = {"tags": [], "sdk_version": "0.38.0", "display_name": f"{self.name}-session"}
        response = self.request("create_session", body)
        if response.status_code == 200:
            self.session = response.json()["session_id"]
            self.findings.register(self.session, self.name)

    def _begin_run(self) -> None:
        body = {
            "session_id": self.session, "model_seq_id": self.model_number, "base_model": "tiny",
            "lora_config": {"rank": self.draw.choice((1, 2, 4, 8)), "seed": self.model_number},
            "user_metadata": {"name": f"{self.name}-run"},
        }  # fmt: skip
        answer = self.result(self.request("create_model", body))
        self.model_number += 1
        if "error" not in answer:
            self.run_state = RunState(answer["model_id"])
        else:
            self.findings.count("run not begun")

    def _give_up_run(self, reason: str) -> None:
        assert self.run_state is not None
        self.run_state.failed = reason
        self.finished_runs.append(self.run_state)
        self.run_state = None

    # ------------------------------------------------------------------------------------- actions

    def rows(self) -> list[dict[str, Any]]:
        return [
            datum([self.draw.randrange(3, 259) for _ in range(self.draw.randint(3, 20))])
            for _ in range(self.draw.randint(1, 4))
        ]

    def send_pass(self, rows: list[dict[str, Any]]) -> httpx.Response:
        state = self.run_state
        return self.request("forward_backward", content=encode_pass(state.id, state.next(), rows))

    def send_step(self, adam: dict[str, float]) -> httpx.Response:
        state = self.run_state
        state.open_steps += 1
        return self.request(
            "optim_step", {"model_id": state.id, "seq_id": state.next(), "adam_params": adam}
        )

    def end_step(self, response: httpx.Response) -> None:
        state, answer = self.run_state, self.result(response)
        state.open_steps -= 1
        if isinstance(answer, dict) and "error" in answer:
            if self.diverges:
                self._give_up_run(answer["error"])
            elif answer.get("category") == "server":
                self.findings.count("server error of a step")
            return
        state.steps += 1

    def train(self) -> None:
        passed = self.send_pass(self.rows())
        stepped = self.send_step(TINY_RATE)
        self.result(passed)
        self.end_step(stepped)

    def pipeline(self) -> None:
        """Passes and steps sent without waiting for any of them."""
        sent = [
            (self.send_pass(self.rows()), self.send_step(TINY_RATE))
            for _ in range(self.draw.randint(2, 5))
        ]
        for passed, stepped in sent:
            self.result(passed)
            if self.run_state is None:
                return
            self.end_step(stepped)

    def diverge(self) -> None:
        for _ in range(2):
            self.result(self.send_pass(self.rows()))
            self.end_step(self.send_step(DIVERGING))
            if self.run_state is None:
                return

    def fail_pass(self) -> None:
        """A pass that is wrong: its own client is told, and nothing else happens."""
        wrong = self.draw.choice(
            (
                [datum([3, 4, 5], weights=[float("nan")] * 2)],
                [datum([3, 4, 5], weights=[3e38] * 2)],
                [datum([3, 9999, 5])],
                [datum([3] * 250)],
                [],
            )
        )
        answer = self.result(self.send_pass(wrong))
        if not (isinstance(answer, dict) and "error" in answer):
            self.findings.count("a wrong pass was computed")

    def send_refused(self) -> None:
        """A step that is refused; the next request of the run must still be answered."""
        state, adam = self.run_state, self.draw.choice(REFUSED_STEPS)
        text = json.dumps({"model_id": state.id, "seq_id": state.next(), "adam_params": adam})
        began = self.server.up_seconds()
        while True:
            try:
                response = self.http.post(
                    "/optim_step", content=text, headers={"content-type": "application/json"}
                )
                if response.status_code not in (503, 507):
                    break
            except httpx.TransportError:
                pass
            self._check_wait(began, "optim_step")
            time.sleep(0.2)
        self.findings.check_status(
            self.name, "refused step", response.status_code, response.text[:2000]
        )
        if response.status_code == 200:
            answer = self.result(response)
            if not (isinstance(answer, dict) and "error" in answer):
                self.findings.add(self.name, f"a step with {adam} was taken")
        self.train()

    def vanish_in_pass(self) -> None:
        """Leave with requests under way, and come back as another connection."""
        self.send_pass(self.rows())
        self.send_step(TINY_RATE)
        self.http.close()
        self.http = self._connect()

    def vanish_slowly(self) -> None:
        """Send half of a body slowly, then close: its number is never sent, so it is sent whole
        afterwards."""
        body = encode_pass(self.run_state.id, self.run_state.seq + 1, self.rows())
        head = (
            f"POST /api/v1/forward_backward HTTP/1.1\r\nHost: 127.0.0.1\r\nx-api-key: tml-{self.key}\r\n"
            f"content-type: application/x-protobuf\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        try:
            with socket.create_connection(
                ("127.0.0.1", self.server.port), timeout=10
            ) as connection:
                connection.sendall(head.encode())
                for start in range(0, len(body) // 2, 40):
                    connection.sendall(body[start : start + 40])
                    time.sleep(0.1)
        except OSError:
            return

    def save(self) -> None:
        state, name = self.run_state, f"{self.name}-{self.draw.randrange(3)}"
        body = {"model_id": state.id, "path": name, "overwrite": True}
        if self.draw.random() < 0.5:
            body["ttl_seconds"] = 60
        route = self.draw.choice(("save_weights", "save_weights", "save_weights_for_sampler"))
        if route == "save_weights_for_sampler":
            body.pop("overwrite")
            body["path"] = f"{name}-{self.draw.randrange(10**6)}"
        answer = self.result(self.request(route, {**body, "seq_id": state.next()}))
        if "path" in answer:
            self.checkpoints.append(answer["path"])

    def sample(self) -> None:
        body: dict[str, Any] = {
            "num_samples": self.draw.randint(1, 3), "prompt": {"chunks": [{"tokens": [5, 6, 7]}]},
            "sampling_params": {"max_tokens": self.draw.randint(1, 12), "temperature": 1.0},
        }  # fmt: skip
        kind = self.draw.random()
        if kind < 0.5 and self.checkpoints:
            body["model_path"] = self.draw.choice(self.checkpoints)
        else:
            body["base_model"] = "tiny"
        if self.draw.random() < 0.3:
            body["prompt_logprobs"] = True
        response = self.request("asample", body)
        if (
            response.status_code != 200 or self.draw.random() < 0.2
        ):  # now and then nobody comes for the answer
            return
        self.result(response)

    def delete(self) -> None:
        if self.checkpoints:
            run, kind, name = (
                self.draw.choice(self.checkpoints).removeprefix("tinker://").split("/")
            )
            self.request(f"training_runs/{run}/checkpoints/{kind}/{name}", method="DELETE")

    def load(self) -> None:
        paths = [path for path in self.checkpoints if "/weights/" in path]
        if paths and not self.run_state.open_steps:
            state = self.run_state
            body = {
                "model_id": state.id,
                "seq_id": state.next(),
                "path": self.draw.choice(paths),
                "optimizer": False,
            }
            answer = self.result(self.request("load_weights", body))
            if (
                "error" not in answer
            ):  # the step count begins anew: not a run whose count is checked
                self._give_up_run("loaded other weights")

    def end_run(self) -> None:
        state = self.run_state
        self.result(self.request("unload_model", {"model_id": state.id}))
        self._give_up_run("unloaded")

    def look(self) -> None:
        self.request(self.draw.choice(("training_runs", "checkpoints", "live")), method="GET")

    def pause(self) -> None:
        self.over.wait(self.draw.uniform(0, 3))

    # ------------------------------------------------------------------------------------- the end

    def count_steps(self, read_steps: Callable[[str], int]) -> None:
        """Save the run that goes on, and compare its count of steps with the acknowledged ones.

        Args:
            read_steps: from the path of a checkpoint to the optimiser's count in its files.
        """
        state = self.run_state
        if state is None or state.failed or self.diverges:
            return
        body = {
            "model_id": state.id,
            "seq_id": state.next(),
            "path": f"{self.name}-last-{state.seq}",
        }
        answer = self.result(self.request("save_weights", body))
        if "path" not in answer:
            self.findings.add(self.name, f"its run could not be saved at the end: {answer}")
            return
        steps = read_steps(answer["path"])
        if not state.steps <= steps <= state.steps + state.open_steps:
            low, high = state.steps, state.steps + state.open_steps
            self.findings.add(
                self.name, f"{state.id} has {steps} steps, acknowledged were {low} (at most {high})"
            )
        self.findings.count("runs whose steps were counted")
