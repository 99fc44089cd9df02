"""Before the replicas: where a request goes, and what becomes of it when its replica dies. Without
Ray, and without a model."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter

import httpx
import pytest
from tests.support.api_server import fake_service

from veneer.errors import ConfigError
from veneer.serve.access import Keyring
from veneer.serve.api import create
from veneer.serve.cluster import app, gateway, routing
from veneer.serve.cluster.gateway import Gateway, answer_messages, complete_answer
from veneer.serve.metrics import merge_pages
from veneer.serve.settings import settings_of

REPLICAS = ("one", "two", "three")
ADAPTERS = [f"adapter-{number}" for number in range(3000)]


class LostError(Exception):
    """A replica that died."""


@pytest.mark.parametrize("options", [{}, {"rows": 4}, {"queue": 9}])
def test_replicas_have_the_servers_own_limits_unless_some_are_given(options):
    pytest.importorskip("ray.serve")
    from veneer.serve.cluster import on_ray

    settings = settings_of("base", **options)
    application = on_ray.application(settings, None, None, "1-8", 30.0)
    (replica,) = application._bound_deployment.init_args[:1]
    deployment = replica._bound_deployment
    rows, queue = options.get("rows", 16), options.get("queue", 256)
    assert deployment._deployment_config.max_ongoing_requests == rows + queue


@pytest.mark.parametrize(
    ("name", "value"),
    [("grace", "30s"), ("grace", None), ("grace", -1), ("grace", float("nan")), ("rows", "16")],
)
def test_a_number_in_rays_config_file_that_is_none_is_named(name, value):
    pytest.importorskip("ray.serve")
    with pytest.raises(ConfigError, match=f"{name} {value!r}. Expected: a"):
        app({"base": "base", name: value})


def test_adapters_are_shared_out_and_stay_where_they_are():
    homes = {adapter: routing.preferred_replicas(adapter, REPLICAS)[0] for adapter in ADAPTERS}
    assert all(900 < count < 1100 for count in Counter(homes.values()).values())
    fewer = {adapter: routing.preferred_replicas(adapter, REPLICAS[:2])[0] for adapter in ADAPTERS}
    assert all(fewer[adapter] == home for adapter, home in homes.items() if home != "three")
    more = {
        adapter: routing.preferred_replicas(adapter, (*REPLICAS, "four"))[0] for adapter in ADAPTERS
    }
    assert all(more[adapter] in (home, "four") for adapter, home in homes.items())
    assert 650 < Counter(more.values())["four"] < 850


def test_a_replica_without_a_free_row_gives_way_to_the_next():
    first, second, third = routing.preferred_replicas("french", REPLICAS)
    assert routing.replica_groups("french", dict.fromkeys(REPLICAS, 0), 4)[:3] == [
        [first],
        [second],
        [third],
    ]
    assert routing.replica_groups("french", {first: 4, second: 3, third: 0}, 4)[:2] == [
        [second],
        [third],
    ]
    assert routing.replica_groups("french", dict.fromkeys(REPLICAS, 9), 4) == [
        [*REPLICAS]
    ]  # whoever has least
    assert routing.replica_groups("", dict.fromkeys(REPLICAS, 0), 4) == [
        [*REPLICAS]
    ]  # the base is in all of them


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({"model": "tiny"}, ""), ({"model": "french"}, "french"), ({"model": "tiny:french"}, "french"),
        ({"model": "tiny", "adapters": {"french": 0.3, "german": -0.7}}, "german"),
        ({"model": "tiny", "adapters": {"french": "x"}}, ""), ({"model": 3}, ""), ([], ""), ("{", ""), ({}, ""),
    ],
)  # fmt: skip
def test_the_adapter_of_a_request(body, adapter):
    sent = body if isinstance(body, str) else json.dumps(body)
    assert routing.adapter_of(sent.encode(), "tiny") == adapter


class Fleet:
    """A gateway before applications in this process. ``dying``: after how many messages of an
    answer the next attempts are lost."""

    def __init__(self, tmp_path, *, replicas=2, keys=None, hosts=None):
        self.services = [
            fake_service(tmp_path / f"{number}", "french", keys=keys, words=5, pause=0.005)
            for number in range(replicas)
        ]
        self.applications = [create(service) for service in self.services]
        self.dying, self.asked, self.left = [], [], []
        self.gateway = Gateway(
            "tiny", keys or Keyring(), hosts, self.ask, self.ask_all, (LostError,)
        )

    async def ask(self, adapter, request, body):
        self.asked.append(adapter)
        left = self.dying.pop(0) if self.dying else None
        try:
            async for message in answer_messages(
                self.applications[len(self.asked) % 2], request, body
            ):
                if left is not None and left == 0:
                    raise LostError
                left = left and left - 1
                yield message
        finally:
            self.left.append(adapter)

    async def ask_all(self, request, body):
        named = zip("ab", self.applications, strict=True)
        return [
            await complete_answer(name, application, request, body) for name, application in named
        ]

    async def send(self, method, path, **options):
        transport = httpx.ASGITransport(self.gateway.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    def request(self, method, path, **options):
        return asyncio.run(self.send(method, path, **options))


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    for service in made.services:
        service.close()


BODY = {"model": "french", "prompt": "abc", "max_tokens": 5}


def test_an_answer_comes_from_another_replica_when_one_dies(fleet):
    fleet.dying = [0, 1]  # before its head, and after it
    answer = fleet.request("POST", "/v1/completions", json=BODY)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert fleet.asked == ["french"] * 3 == fleet.left


def test_a_stream_begins_anew_only_before_its_first_event(fleet):
    fleet.dying = [1]
    answer = fleet.request("POST", "/v1/completions", json={**BODY, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert len(fleet.asked) == 2

    fleet.dying = [3]
    answer = fleet.request("POST", "/v1/completions", json={**BODY, "stream": True})
    assert len(fleet.asked) == 3
    *events, last = [
        json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line
    ]
    assert len(events) == 2
    assert all("choices" in event for event in events)
    assert last["error"]["code"] == "replica_lost"


def test_when_all_attempts_are_lost_the_client_may_try_again(fleet):
    fleet.dying = [0] * gateway.MAX_ATTEMPTS
    answer = fleet.request("POST", "/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
    assert answer.headers["retry-after"]


def test_what_a_replica_refuses_is_passed_on(fleet):
    answer = fleet.request("POST", "/v1/completions", json={**BODY, "model": "nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert fleet.request("POST", "/v1/completions", content=b"{").status_code == 400
    assert fleet.request("GET", "/v1/models").json()["data"][1]["id"] == "french"
    assert fleet.asked == ["nobody", "", routing.NO_MODEL_KEY]


def test_a_body_that_is_too_large_reaches_no_replica(fleet):
    assert fleet.request("POST", "/v1/completions", content=b"x" * (2**20 + 1)).status_code == 413
    assert fleet.asked == []


def test_keys_hold_before_a_replica_is_asked(tmp_path):
    fleet = Fleet(tmp_path, keys=Keyring(()), hosts=("localhost",))
    assert fleet.request("POST", "/v1/completions", json=BODY).status_code == 401
    assert fleet.request("GET", "/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert fleet.asked == []
    for service in fleet.services:
        service.close()


def test_a_client_that_goes_away_leaves_the_replica(fleet):
    async def leave():
        async def receive():
            return await asyncio.Future() if sent else sent.append(1) or first

        async def send(message):
            began.set()

        sent, began = [], asyncio.Event()
        first = {
            "type": "http.request",
            "body": json.dumps({**BODY, "stream": True, "max_tokens": 100}).encode(),
        }
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "root_path": "",
        }
        scope |= {
            "http_version": "1.1",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        task = asyncio.ensure_future(fleet.gateway.app(scope, receive, send))
        await began.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert fleet.left == ["french"]


def test_the_numbers_of_all_replicas_are_on_one_page(fleet):
    for _ in range(3):
        fleet.request("POST", "/v1/completions", json=BODY)
    page = fleet.request("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    counts = dict(
        re.findall(
            r'^veneer_http_responses_total{replica="(.)",status="200"} (\S+)$', page.text, re.M
        )
    )
    assert {name: float(count) for name, count in counts.items()} == {"a": 1.0, "b": 2.0}
    assert len(re.findall(r"^# TYPE veneer_http_responses_total counter$", page.text, re.M)) == 1


def test_a_replica_that_dies_while_the_numbers_are_read(fleet):
    async def lost(request, body):
        raise LostError

    fleet.gateway._ask_all_replicas = lost
    answer = fleet.request("GET", "/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")


@pytest.mark.parametrize("more", [True, False])
def test_a_replica_that_dies_after_the_last_byte_of_an_answer_broke_nothing(more):
    """What is sent after the end would break the connection, and with it the client's next
    request."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    body = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": more}
    sent = []

    async def attempt():
        yield start
        yield body
        raise LostError

    async def send(message):
        sent.append(message)

    asyncio.run(gateway.relay(attempt, send, (LostError,), "/v1/completions"))
    assert sent[:2] == [start, body]
    assert [b"replica_lost" in message["body"] for message in sent[2:]] == ([True] if more else [])


@pytest.mark.parametrize(
    ("path", "name", "fields"),
    [
        ("/v1/completions", "", {"error": {"type": "server_error", "param": None, "code": "replica_lost"}}),
        ("/v1/messages", "event: error\n", {"type": "error", "error": {"type": "overloaded_error"}}),
        ("/v1/responses", "event: error\n",
         {"type": "error", "code": "server_error", "param": None, "sequence_number": 2}),
    ],
)  # fmt: skip
def test_a_stream_that_breaks_off_ends_in_an_event_of_its_own_api(path, name, fields):
    sent = []

    async def attempt():
        yield {"type": "http.response.start", "status": 200, "headers": []}
        for _ in range(2):
            body = b'event: x\ndata: {"type":"x"}\n\n'
            yield {"type": "http.response.body", "body": body, "more_body": True}
        raise LostError

    async def send(message):
        sent.append(message)

    asyncio.run(gateway.relay(attempt, send, (LostError,), path))
    found_name, _, data = sent[-1]["body"].decode().rpartition("data: ")
    event = json.loads(data)
    assert "a replica that was lost" in event.get("error", event).pop("message")
    assert (found_name, event) == (name, fields)


def test_pages_that_differ_are_merged():
    pages = {
        "a": b'# HELP x_total X.\n# TYPE x_total counter\nx_total{adapter="f\\"r"} 2.0\n',
        "b": b"",
    }
    assert (
        merge_pages(pages).decode()
        == '# HELP x_total X.\n# TYPE x_total counter\nx_total{adapter="f\\"r",replica="a"} 2.0\n'
    )
