"""A client of the training service that sends the requests of the `tinker` SDK without the SDK."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from veneer.serve.training.wire import MESSAGES


class Failed(Exception):  # noqa: N818
    """The error of a promise, with its message and its category ("user" or "server")."""

    def __init__(self, message: str, category: str) -> None:
        super().__init__(message)
        self.category = category


class Client:
    """A client of a server, with its own session."""

    def __init__(self, url: str, key: str = "tml-any") -> None:
        self.http = httpx.Client(
            base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=60, trust_env=False
        )
        self.session = self.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]

    def __del__(self) -> None:
        self.http.close()

    def send(self, route: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/{route}", json=body)

    def post(self, route: str, **body: Any) -> Any:
        response = self.send(route, **body)
        assert response.is_success, f"{response.status_code}: {response.text}"
        return response.json() if response.content else None

    def get(self, route: str) -> Any:
        response = self.http.get(f"/{route}")
        assert response.is_success, f"{response.status_code}: {response.text}"
        return response.json()

    def result(self, promise: dict[str, Any], kind: str | None = None) -> Any:
        """Wait for a promise. Returns its JSON, or a protobuf message of type ``kind``."""
        while (
            response := self.http.post(
                "/retrieve_future", json={"request_id": promise["request_id"]}
            )
        ).status_code == 408:
            pass
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        if response.headers["content-type"] == "application/x-protobuf":
            assert kind is not None, "an answer in protobuf"
            return MESSAGES[kind].FromString(response.content)
        content = response.json()
        if "error" in content:
            raise Failed(content["error"], content["category"])
        return content

    def run(self, number: int = 0, rank: int = 4, seed: int = 1, **lora: Any) -> Run:
        config = {"rank": rank, "seed": seed, **lora}
        promise = self.post(
            "create_model",
            session_id=self.session,
            model_seq_id=number,
            base_model="tiny",
            lora_config=config,
        )
        return Run(self, self.result(promise)["model_id"])

    def sample(
        self,
        session: str | None,
        prompt: Sequence[int],
        count: int = 1,
        number: int = 0,
        **fields: Any,
    ) -> Any:
        params = {"max_tokens": 6, "temperature": 0.0, **fields.pop("params", {})}
        endpoint = (
            {"base_model": "tiny"}
            if session is None
            else {"sampling_session_id": session, "seq_id": number}
        )
        promise = self.post(
            "asample",
            **endpoint,
            num_samples=count,
            prompt={"chunks": [{"tokens": [*prompt]}]},
            sampling_params=params,
            **fields,
        )
        message = self.result(promise, "SampleResponse")
        sequences = [
            SimpleNamespace(
                tokens=np.frombuffer(datum.tokens, "<i4").tolist(),
                logprobs=np.frombuffer(datum.logprobs, "<f4"),
                stop=("stop", "length")[datum.stop_reason], top=datum.topk_sampled_logprobs,
            )
            for datum in message.sequences
        ]  # fmt: skip
        return SimpleNamespace(
            sequences=sequences,
            message=message,
            prompt=np.frombuffer(message.prompt_logprobs, "<f4"),
        )


class Run:
    """A training run of a client. Its requests are numbered in order."""

    def __init__(self, client: Client, id: str, number: int = 0) -> None:
        self.client, self.id, self.number = client, id, number

    def next(self) -> int:
        self.number += 1
        return self.number

    def body(
        self, data: Sequence[dict[str, Any]], loss: str, backward: bool = True, **settings: float
    ) -> Any:
        message = MESSAGES["ForwardBackwardRequest"](
            model_id=self.id, loss_fn=loss, forward_only=not backward
        )
        for name, value in settings.items():
            message.loss_fn_config_v2.add(key=name).value.number = value
        for row in data:
            datum = message.data.add()
            datum.model_input.add().encoded_text.tokens = np.asarray(row["tokens"], "<i4").tobytes()
            for name, values in row.items():
                if name != "tokens":
                    array = np.asarray(values, "<i8" if name == "target_tokens" else "<f4")
                    tensor = datum.loss_fn_inputs.add(key=name).value
                    tensor.dense, tensor.dtype = (
                        array.tobytes(),
                        2 if name == "target_tokens" else 1,
                    )
                    tensor.shape.extend(array.shape)
        return message

    def ask_pass(
        self, data: Sequence[dict[str, Any]], loss: str = "cross_entropy", **options: Any
    ) -> dict[str, Any]:
        message = self.body(data, loss, **options)
        message.seq_id = self.next()
        return self.send(message.SerializeToString())

    def send(self, body: bytes) -> dict[str, Any]:
        headers = {"content-type": "application/x-protobuf"}
        response = self.client.http.post("/forward_backward", content=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    def wait_for_pass(self, promise: dict[str, Any]) -> Any:
        """Wait for a pass. Returns its loss, and the log-probabilities of each row."""
        message = self.client.result(promise, "ForwardBackwardOutput")
        logprobs = []
        for record in message.loss_fn_outputs:
            (field,) = [datum.value for datum in record.fields if datum.key == "logprobs"]
            offsets, values = (
                np.frombuffer(field.offsets, "<i8") // 4,
                np.frombuffer(field.data, "<f4"),
            )
            for first, after in itertools.pairwise(offsets):
                logprobs.append(values[first:after].reshape(-1, *field.trailing_shape))
        return SimpleNamespace(
            loss={datum.key: datum.value for datum in message.metrics}["loss:sum"],
            logprobs=logprobs,
        )

    def pass_(
        self, data: Sequence[dict[str, Any]], loss: str = "cross_entropy", **options: Any
    ) -> Any:
        return self.wait_for_pass(self.ask_pass(data, loss, **options))

    def ask(self, route: str, **fields: Any) -> dict[str, Any]:
        return self.client.post(route, model_id=self.id, seq_id=self.next(), **fields)

    def ask_step(self, rate: float = 0.01, **adam: float) -> dict[str, Any]:
        return self.ask("optim_step", adam_params={"learning_rate": rate, **adam})

    def step(self, rate: float = 0.01, **adam: float) -> Any:
        return self.client.result(self.ask_step(rate, **adam))

    def save(self, name: str, **fields: Any) -> str:
        return self.client.result(self.ask("save_weights", path=name, **fields))["path"]

    def sampler(self, number: int = 0, **fields: Any) -> str:
        answer = self.ask("save_weights_for_sampler", sampling_session_seq_id=number, **fields)
        return self.client.result(answer)["sampling_session_id"]


def datum(tokens: Sequence[int], **inputs: Any) -> dict[str, Any]:
    """A training row of these tokens: the target of each token is the next token."""
    return {"tokens": [*tokens[:-1]], "target_tokens": [*tokens[1:]], **inputs}
