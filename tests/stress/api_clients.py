"""Clients of OpenAI's API, each a thread: answers are compared with those of the adapter's known
versions."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Mapping

import httpx
from tests.stress.findings import BOUND, Findings
from tests.stress.server import StressServer

PROMPT, TOKENS = "12 + 30 =", 12


def request_body(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **fields}


class ApiClient(threading.Thread):
    """One client with a key.

    Args:
        answers: the greedy answers that each adapter may give; more than one where its folder is
            replaced meanwhile.
        fleeting: adapters that are deleted and come back: 404 is an answer of theirs.
    """

    def __init__(
        self, number: int, seed: int, key: str, server: StressServer, findings: Findings,
        answers: Mapping[str, set[str]], fleeting: set[str],
    ) -> None:  # fmt: skip
        super().__init__(name=f"client-{number:03d}", daemon=True)
        self.draw = random.Random(f"{seed}:api:{number}")
        self.key, self.server, self.findings = key, server, findings
        self.answers, self.fleeting = answers, fleeting
        self.over = threading.Event()
        self.http = self._connect()

    def _connect(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(
            base_url=f"{self.server.url}/v1", headers=headers, timeout=90, trust_env=False
        )

    def run(self) -> None:
        actions = {
            self.complete: 10, self.stream: 4, self.vanish_in_stream: 2, self.send_wrong: 2, self.send_slowly: 1,
            self.pause: 3,
        }  # fmt: skip
        try:
            while not self.over.is_set():
                self.draw.choices([*actions], [*actions.values()])[0]()
        except BaseException as error:
            self.findings.add(self.name, f"the client failed: {type(error).__name__}: {error}")
            raise

    def _post(self, body: dict[str, object]) -> httpx.Response | None:
        began = self.server.up_seconds()
        try:
            response = self.http.post("/completions", json=body)
        except httpx.TransportError as error:
            if self.server.up.is_set() and isinstance(error, httpx.TimeoutException):
                self.findings.add(self.name, f"no answer within 90 s: {body}")
            self.over.wait(0.2)
            return None
        waited = self.server.up_seconds() - began
        if waited > BOUND:
            self.findings.add(self.name, f"a completion took {waited:.0f} s")
        self.findings.check_status(
            self.name, "completions", response.status_code, response.text[:2000]
        )
        if response.status_code in (429, 503):
            self.over.wait(self.draw.uniform(0.2, 1))
        return response

    def _check_answer(self, adapter: str, text: str) -> None:
        if text not in self.answers[adapter]:
            self.findings.add(
                self.name, f"{adapter} answered {text!r}, expected one of {self.answers[adapter]}"
            )

    def _check_refusal(self, adapter: str, response: httpx.Response) -> None:
        if response.status_code == 404 and adapter not in self.fleeting:
            self.findings.add(self.name, f"{adapter}, which is always there: {response.text[:300]}")

    def complete(self) -> None:
        adapter = self.draw.choice([*self.answers])
        response = self._post(request_body(adapter))
        if response is None:
            return
        if response.status_code == 200:
            self._check_answer(adapter, response.json()["choices"][0]["text"])
        else:
            self._check_refusal(adapter, response)

    def stream(self) -> None:
        adapter, text, finished = self.draw.choice([*self.answers]), "", False
        try:
            with self.http.stream(
                "POST", "/completions", json=request_body(adapter, stream=True)
            ) as response:
                if response.status_code != 200:
                    response.read()
                    self.findings.check_status(
                        self.name, "stream", response.status_code, response.text[:2000]
                    )
                    return
                self.findings.count("stream 200")
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self.findings.check_text(self.name, line)
                            return
                        text += "".join(choice["text"] for choice in event["choices"])
                    finished |= line == "data: [DONE]"
        except httpx.TransportError:
            return
        if finished:
            self._check_answer(adapter, text)

    def vanish_in_stream(self) -> None:
        adapter = self.draw.choice([*self.answers])
        body = request_body(adapter, stream=True, max_tokens=100)
        try:
            with self.http.stream("POST", "/completions", json=body) as response:
                for _ in zip(range(2), response.iter_lines(), strict=False):
                    pass
        except httpx.TransportError:
            return
        finally:
            self.http.close()
            self.http = self._connect()

    def send_wrong(self) -> None:
        """A request that is refused; the words are the client's own affair."""
        wrong = self.draw.choice(
            (
                {"model": "no-such-adapter"}, {"max_tokens": 10**6}, {"temperature": -1}, {"unheard_of": True},
                {"prompt": "x" * 5000}, {"n": 1000},
            )
        )  # fmt: skip
        response = self._post({**request_body("tiny"), **wrong})
        if response is not None and response.status_code == 200:
            self.findings.add(self.name, f"a request with {wrong!s:.60} was computed")

    def send_slowly(self) -> None:
        """Announce a body, send a part of it byte by byte, vanish."""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
            "content-type: application/json\r\ncontent-length: 200000\r\n\r\n"
        )
        try:
            with socket.create_connection(
                ("127.0.0.1", self.server.port), timeout=10
            ) as connection:
                connection.sendall(head.encode() + b'{"model": "tiny", "prompt": "')
                for _ in range(self.draw.randint(1, 20)):
                    connection.sendall(b"x" * 100)
                    time.sleep(0.1)
        except OSError:
            return

    def pause(self) -> None:
        self.over.wait(self.draw.uniform(0, 2))
