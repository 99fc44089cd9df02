"""A large body is parsed and checked by a thread, and costs no more than its first errors."""

from __future__ import annotations

import threading

import pytest
from pydantic import ValidationError
from tests.support.api_server import BASE, serving

from veneer.serve import limits, service
from veneer.serve.training import bodies

MANY = 60_000
UNKNOWN = {f"unknown{number}": number for number in range(MANY)}


@pytest.fixture
def threads(monkeypatch):
    """The names of the threads that parse."""
    names: list[str] = []
    parse = service.parse
    monkeypatch.setattr(
        service, "parse", lambda raw: names.append(threading.current_thread().name) or parse(raw)
    )
    return names


@pytest.mark.parametrize(
    ("route", "fields", "status"),
    [
        ("completions", {"prompt": "a", "user": "x" * 100_000}, 200),
        ("completions", {"prompt": "a", **UNKNOWN}, 400),
        ("completions", {"prompt": [5] * 50_000}, 400),
        ("chat/completions", {"messages": [{"role": "assistant"}] * 1000}, 400),
        ("load_lora_adapter", UNKNOWN, 400),
    ],
)
def test_the_event_loop_parses_no_large_body(tmp_path, threads, monkeypatch, route, fields, status):
    """300,000 unknown fields kept /health waiting for 3.3 s."""
    monkeypatch.setattr(limits, "BODY", 2**22)
    with serving(tmp_path / "dir") as it, it.http() as http:
        answer = http.post(f"/v1/{route}", json={"model": BASE, **fields})
        assert answer.status_code == status, answer.text[:500]
        assert status == 200 or answer.json()["error"]["param"]
        assert all(name.startswith("veneer-bodies") for name in threads)
        assert threads
        assert http.post("/v1/completions", json={"model": BASE, "prompt": "a"}).status_code == 200
        broken = http.post(
            "/v1/completions", content=b"[" * 50_000, headers={"Content-Type": "application/json"}
        )
        assert (broken.status_code, "nested deeper" in broken.text) == (400, True)


CLASSES = sorted(
    (
        value
        for value in vars(bodies).values()
        if isinstance(value, type) and issubclass(value, bodies.Body)
    ),
    key=lambda value: value.__name__,
)


@pytest.mark.parametrize("body", CLASSES)
def test_a_body_for_training_that_is_full_of_errors_costs_its_first_ones(body):
    wrong = [UNKNOWN, *({name: [{}] * MANY} for name in body.model_fields)]
    entries = dict.fromkeys(map(str, range(MANY)), ())
    wrong += [{name: entries} for name in body.model_fields]
    for fields in wrong:
        with pytest.raises(ValidationError) as caught:
            body.model_validate({"extra": 1, **fields})
        assert caught.value.error_count() <= 30, fields.keys()
