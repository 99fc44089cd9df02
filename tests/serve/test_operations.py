"""What an operator needs: the log, ids of requests, other origins, a page of the API, keys that are
followed, and an end without delay."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from html import escape

import httpx
import openai
import pytest
from tests.serve.test_guard import process, stream
from tests.support.api_server import BASE, fake_service, listening, serving, until

from veneer.errors import ConfigError
from veneer.serve import docs_page, limits, page
from veneer.serve.access import Key, Keyring, KeyWatch, generate, hash_of
from veneer.serve.api import create
from veneer.serve.request_log import JsonFormatter, RequestRecord, TextFormatter, request_id_of
from veneer.serve.schemas import ChatRequest
from veneer.serve.settings import must_have_keys_for_any_origin, settings_of

BODY = {"model": "french", "prompt": "my private words", "max_tokens": 5}
KEYS = Keyring((Key("alice", hash_of("vnr-secret"), ("*",)),))


@pytest.fixture
def it(tmp_path):
    with serving(tmp_path / "dir", "french", "german", keys=KEYS) as served:
        yield served


@pytest.fixture
def records(caplog):
    """The records of the requests that have ended, in order."""
    caplog.set_level(logging.INFO, "veneer.serve.access")

    def read():
        return [record for record in caplog.records if record.name == "veneer.serve.access"]

    return read


# ----------------------------------------------------------------------------------------------
# the log


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_has_one_line_with_what_it_cost(it, records, streamed):
    with it.http("vnr-secret") as http:
        answer = http.post(
            "/v1/completions",
            json={**BODY, "n": 2, "stream": streamed},
            headers={"X-Request-Id": "client-7"},
        )
    assert answer.status_code == 200
    until(records)
    (record,) = records()
    fields = record.request
    times = {name: fields.pop(name) for name in ("queue_ms", "first_token_ms", "total_ms")}
    assert fields == {
        "request_id": "client-7", "key": "alice", "method": "POST", "endpoint": "/v1/completions", "status": 200,
        "adapter": "french", "finish_reason": "length", "prompt_tokens": len(BODY["prompt"]), "cached_tokens": 0,
        "generated_tokens": 10,
    }  # fmt: skip
    assert times["queue_ms"] == 10.0  # as the engine says
    assert 0 <= times["first_token_ms"] <= times["total_ms"]
    line = record.getMessage()
    assert line.startswith("alice POST /v1/completions 200 0.")
    for word in ("id=client-7", "adapter=french", "finish=length", "generated=10", "queue=10ms"):
        assert word in line.split()


def test_a_request_that_is_refused_has_a_line_too(it, records):
    with it.http() as http:
        http.get("/v1/models?q=private")
    with it.http("vnr-secret") as http:
        http.post("/v1/completions", json={**BODY, "model": "nobody"})
        it.engine.full = True
        http.post("/v1/completions", json=BODY)
    until(lambda: len(records()) == 3)
    lines = [
        (fields["key"], fields["status"], fields["adapter"], fields["finish_reason"])
        for fields in (record.request for record in records())
    ]
    assert lines == [
        (None, 401, None, None),
        ("alice", 404, None, None),
        ("alice", 429, "french", None),
    ]


def test_a_blend_and_the_base_have_names(it, records):
    weights = {"french": 0.7, "german": 0.3}
    with it.http("vnr-secret") as http:
        http.post("/v1/completions", json={**BODY, "model": BASE, "adapters": weights})
        http.post("/v1/completions", json={**BODY, "model": BASE})
    until(lambda: len(records()) == 2)
    adapters = [record.request["adapter"] for record in records()]
    assert adapters == ["french*0.7+german*0.3", "base"]


def test_a_client_that_goes_away_is_told_in_the_log(it, records):
    it.engine.pause, it.engine.words = 0.02, 1000
    body = {**BODY, "max_tokens": 400, "stream": True}
    with it.http("vnr-secret") as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_bytes())
    until(records)
    fields = records()[0].request
    assert (fields["status"], fields["finish_reason"]) == (200, "cancelled")
    assert 0 < fields["generated_tokens"] < 400


def test_no_line_holds_a_prompt_an_answer_or_a_key(it, caplog):
    caplog.set_level(logging.DEBUG, "veneer")
    with it.http("vnr-secret") as http:
        http.post("/v1/completions", json=BODY)
        http.post(
            "/v1/chat/completions",
            json={"model": BASE, "messages": [{"role": "user", "content": BODY["prompt"]}]},
        )
    until(lambda: caplog.text.count("POST") == 2)
    ours = [record for record in caplog.records if record.name.startswith("veneer")]
    for formatter in (TextFormatter(), JsonFormatter()):
        lines = "\n".join(map(formatter.format, ours))
        for word in ("private", "w0", "vnr-secret", hash_of("vnr-secret")):
            assert word not in lines


def log_record(message, **fields):
    record = logging.LogRecord("veneer.serve", logging.WARNING, "", 0, message, (), None)
    record.created = 1_772_366_400.1234
    vars(record).update(fields)
    return record


def test_text_has_the_time_and_no_escape_sequence():
    said = TextFormatter().format(log_record("an adapter \x1b[31m"))
    assert said == "2026-03-01T12:00:00.123Z WARNING an adapter \\x1b[31m"


def test_json_is_one_object_a_line():
    failure = log_record("lines\nof \u2028 text")
    try:
        raise ValueError("why")
    except ValueError as error:
        failure.exc_info = (ValueError, error, error.__traceback__)
    line = JsonFormatter().format(failure)
    assert line.isascii()
    assert "\n" not in line
    entry = json.loads(line)
    assert entry.pop("exception").endswith("ValueError: why")
    assert entry == {
        "time": "2026-03-01T12:00:00.123Z", "level": "warning", "logger": "veneer.serve",
        "message": "lines\nof \u2028 text",
    }  # fmt: skip
    fields = RequestRecord("id", "GET", "/health").fields()
    asked = json.loads(JsonFormatter().format(log_record("as text", request=fields)))
    assert asked.items() >= fields.items()
    assert "message" not in asked


# ----------------------------------------------------------------------------------------------
# ids of requests


def test_every_answer_has_the_id_of_its_request(it):
    with it.http("vnr-secret") as http:
        for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/nothing", 404)):
            answer = http.get(path, headers={"X-Request-Id": "client-7"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "client-7")
        fresh = [http.get("/health").headers["x-request-id"] for _ in range(2)]
        assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in fresh)
        assert fresh[0] != fresh[1]
        refused = http.post("/v1/completions", json={**BODY, "n": 99})
        assert refused.status_code == 400
        assert re.fullmatch(r"[0-9a-f]{32}", refused.headers["x-request-id"])
    with it.http("wrong") as http:
        assert http.get("/v1/models").headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as caught:
        it.client("vnr-secret").completions.create(model="nobody", prompt="a")
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


@pytest.mark.parametrize(
    "sent", [[""], ["x" * 129], ["a b"], ["a\x1b"], ["ü"], ["a\n"], ["a", "b"], []]
)
def test_an_id_that_cannot_be_one_is_replaced(sent):
    assert re.fullmatch(r"[0-9a-f]{32}", request_id_of(sent))
    assert request_id_of(["x" * 128]) == "x" * 128


def test_a_bug_is_an_answer_with_an_id_and_a_line(it, records, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a secret of the server")

    monkeypatch.setattr(it.service.catalogue, "refresh", fail)
    with it.http("vnr-secret") as http:
        answer = http.get("/v1/models", headers={"X-Request-Id": "client-7"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "bug")
    assert answer.headers["x-request-id"] == "client-7"
    assert "secret" not in answer.text
    until(records)
    assert records()[0].request["status"] == 500


# ----------------------------------------------------------------------------------------------
# other origins

APP = "https://app.example.com"


def preflight(http, origin=APP, headers="authorization, content-type, x-stainless-os"):
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": headers} if headers else {}
    return http.options("/v1/chat/completions", headers=asked)


def cors_headers(answer):
    return {name: value for name, value in answer.headers.items() if "access-control" in name}


def test_no_origin_is_allowed_unless_it_is_named(it):
    with it.http("vnr-secret") as http:
        assert preflight(http).status_code == 401 or preflight(http).status_code == 405
        answer = http.get("/v1/models", headers={"Origin": APP})
        assert cors_headers(answer) == {}
        assert "vary" not in answer.headers


def test_a_page_of_an_origin_that_is_named_may_ask(it):
    it.service.cors = (APP,)
    with it.http() as http:  # a browser's question has no key
        asked = preflight(http)
        assert asked.status_code == 204
        assert asked.content == b""
        assert asked.headers["access-control-allow-origin"] == APP
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in asked.headers
        assert asked.headers["vary"] == "Origin"
        refused = preflight(http, "https://evil.example")
        assert refused.status_code == 403
        assert "--cors" in refused.json()["error"]["message"]
        assert cors_headers(refused) == {}
        assert preflight(http, headers="a b").headers["access-control-allow-headers"] == (
            "authorization, content-type"
        )
        assert http.get("/v1/models", headers={"Origin": APP}).status_code == 401
    with it.http("vnr-secret") as http:
        for path in ("/v1/models", "/v1/nothing"):  # the page reads errors too
            answer = http.get(path, headers={"Origin": APP})
            assert answer.headers["access-control-allow-origin"] == APP
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = http.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert cors_headers(other) == {}
        assert other.headers["vary"] == "Origin"


def test_any_origin_never_comes_with_credentials(it):
    it.service.cors = ("*",)
    with it.http("vnr-secret") as http:
        for answer in (preflight(http), http.get("/v1/models", headers={"Origin": APP})):
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in answer.headers


def test_a_preflight_cannot_hide_a_second_request(it):
    it.service.cors = (APP,)
    with it.http() as http:
        headers = {"Origin": APP, "Access-Control-Request-Method": "POST"}
        both = {**headers, "Content-Length": "5", "Transfer-Encoding": "chunked"}
        assert http.options("/v1/models", headers=both).status_code == 400


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "app.example.com",
        f"{APP}/",
        f"{APP}/path",
        "HTTPS://APP.example.com",
        "",
        "https://",
    ],
)
def test_what_is_no_origin(origin):
    with pytest.raises(ConfigError, match="--cors"):
        settings_of("base", cors=[origin])


def test_origins():
    named = ["http://localhost:3000", "http://[::1]:8080", "chrome-extension://abcdef", APP, APP]
    assert settings_of("base", cors=named).cors == tuple(named[:4])
    assert settings_of("base", cors=APP).cors == (APP,)
    everybody = settings_of("base", cors="*")
    must_have_keys_for_any_origin(everybody, needs_no_keys=False)
    with pytest.raises(ConfigError, match="without keys"):
        must_have_keys_for_any_origin(everybody, needs_no_keys=True)


# ----------------------------------------------------------------------------------------------
# the API in words


def test_a_page_of_the_api_by_option(tmp_path):
    service = fake_service(tmp_path / "dir", "french")
    with listening(service, 1.0, page.router) as (url, _):
        assert httpx.get(f"{url}/docs").status_code == 404
    service = fake_service(tmp_path / "other", "french", keys=KEYS)
    service.docs = True
    with listening(service, 1.0, page.router) as (url, _):
        answer = httpx.get(f"{url}/docs")
        described = httpx.get(f"{url}/openapi.json").json()
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        text = answer.text
        (style,) = re.findall(r'<link rel="stylesheet" href="([^"]+)"', text)
        assert httpx.get(f"{url}/{style}").status_code == 200
    for path, methods in described["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in text
    for field in ("max_completion_tokens", "stream_options", "lora_path"):
        assert f"<code>{field}</code>" in text
    assert not re.search(r"<script|https?://", text)
    for anchor in re.findall(r'href="#(\w+)"', text):
        assert f'id="{anchor}"' in text


#: routes that take a POST or PUT and read no body
WITHOUT_BODY = {
    "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/publish", "/api/v1/telemetry",
    "/api/v1/create_custom_loss", "/api/v1/auth/token", "/api/v1/sessions/{session}/project",
}  # fmt: skip


def test_every_route_has_a_summary_and_the_schema_of_its_body(tmp_path):
    pytest.importorskip("google.protobuf")
    from veneer.serve.training import live, rest, routes

    service = fake_service(tmp_path / "dir", "french")
    routers = (routes.router, routes.numbered_router, rest.router, live.router)
    described = create(service, page.router, *routers).openapi()
    text = docs_page.render(described)
    operations = {
        (method, path): operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert len(operations) > 50
    for (method, path), operation in operations.items():
        words = operation["summary"]
        assert words.count(" ") or words in ("A run", "A sampler", "Draw samples"), (path, words)
        assert operation["description"].replace("\n", " ").startswith(words)
        assert escape(words) in text
        if method in ("post", "put") and path not in WITHOUT_BODY:
            (media,) = operation["requestBody"]["content"].values()
            name = media["schema"].get("$ref", "").rpartition("/")[2]
            assert name or media["schema"]["format"] == "binary", path
            if name:
                assert described["components"]["schemas"][name]["properties"]
                assert f'<p>Body: <a href="#{name}">{name}</a></p>' in text
    body = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert {*body} == {*ChatRequest.model_fields}
    assert body["n"]["maximum"] == limits.CHOICES


# ----------------------------------------------------------------------------------------------
# keys that are followed


def keys_file(path, *names):
    keys = dict(generate(name) for name in names)
    path.write_text("\n".join(keys.values()))
    return list(keys)


class Holder:
    keys = Keyring(())


def test_a_server_has_the_keys_of_its_file_as_they_are(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("veneer.serve.access.WATCH_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "veneer.serve")
    holder, path = Holder(), tmp_path / "keys.toml"
    (first,) = keys_file(path, "first")
    watch = KeyWatch(holder, path)
    try:
        until(lambda: holder.keys.find(f"Bearer {first}"))
        path.write_text("no keys at all")
        until(lambda: "stay as they were" in caplog.text)
        assert holder.keys.find(f"Bearer {first}")
        new = tmp_path / "new.toml"
        (second,) = keys_file(new, "second")
        new.replace(path)  # as editors write
        until(lambda: holder.keys.find(f"Bearer {second}"))
        assert holder.keys.find(f"Bearer {first}") is None
        count = len(caplog.records)
        path.unlink()
        until(lambda: len(caplog.records) > count)
        assert "cannot be read" in caplog.records[-1].getMessage()
        assert holder.keys.find(f"Bearer {second}")
    finally:
        watch.close()


# ----------------------------------------------------------------------------------------------
# the end


def test_the_server_ends_within_a_second_of_its_last_answer(tmp_path):
    """An idle connection, or one on which nothing was asked, holds up nobody."""
    with (
        process(tmp_path / "dir", 0.05, 30) as (child, url),
        httpx.Client(base_url=url) as idle,
    ):
        assert idle.get("/health").status_code == 200
        words = []
        thread = stream(url, words)
        child.kill(signal.SIGTERM)
        thread.join(20)
        ended = time.monotonic()
        assert words[-1] == "end"
        assert child.wait(10) == 0
        assert time.monotonic() - ended < 1
