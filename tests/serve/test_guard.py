"""What clients may send, hold and wait for: bodies, heads, connections, slow readers, hosts; drain;
the log."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from tests.support.api_server import BASE, adapter_at, fake_service, listening, serving, until
from tests.support.forked import LARGE, Program

from veneer.errors import ConfigError
from veneer.serve import limits, page
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.guard import LOOPBACK
from veneer.serve.listen import bind, is_loopback
from veneer.serve.metrics import Metrics
from veneer.serve.training.registration import TrainingExtension
from veneer.store.catalogue import Location


@pytest.fixture
def it(tmp_path):
    with serving(tmp_path / "dir", "french") as served:
        yield served


BODY = {"model": BASE, "prompt": "a"}


def port(it):
    return int(it.url.rpartition(":")[2])


@contextmanager
def raw(it):
    """A bare connection."""
    with socket.create_connection(("127.0.0.1", port(it)), timeout=10) as connection:
        yield connection


def received(connection):
    """All that comes until the other end closes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


# ----------------------------------------------------------------------------------------------
# bodies


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(limits, "BODY", 1000)


def test_a_body_that_says_it_is_too_large(it, small):
    with it.http() as http:
        answer = http.post("/v1/completions", json={**BODY, "prompt": "x" * 1000})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_a_body_that_does_not_say(it, small):
    def chunks():
        for _ in range(20):
            yield b"x" * 100

    with it.http() as http:
        answer = http.post(
            "/v1/completions", content=chunks(), headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 413


@pytest.mark.parametrize("length", [b"99999999999999999999", b"2000"])
def test_a_length_alone_is_enough(it, small, length):
    with raw(it) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n\r\n"
        )
        assert b" 413 " in received(connection)


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1, 2"])
def test_a_length_that_is_none(it, length):
    with raw(it) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + length + b"\r\n\r\n"
        )
        assert b" 400 " in received(connection)


def test_a_body_that_does_not_come(it, monkeypatch):
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    with raw(it) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{"
        )
        assert b" 408 " in received(connection)
    assert it.engine.seen == []


# ----------------------------------------------------------------------------------------------
# connections


def test_a_head_that_does_not_come(it, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    with raw(it) as silent, raw(it) as dripping:
        end = time.monotonic() + 0.8
        with pytest.raises(OSError):  # noqa: PT011 - one of several, all of which say that it is closed
            while time.monotonic() < end + 2:
                dripping.sendall(b"G" if time.monotonic() < end else b"x")
                time.sleep(0.05)
        assert received(silent) == b""


def test_a_connection_that_is_kept_may_be_used_again(it, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    with it.http() as http:
        for _ in range(3):
            assert http.get("/health").status_code == 200
            time.sleep(0.3)  # idle is not half a request


def test_a_head_that_is_too_long(it):
    with raw(it) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n")
        assert received(connection)[:13] in (
            b"HTTP/1.1 431 ",
            b"HTTP/1.1 400 ",
        )  # as it comes, whole or in parts


def test_too_many_connections(it, monkeypatch):
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    with raw(it), raw(it), raw(it):
        until(lambda: len(it.server.server_state.connections) == 3)
        with raw(it) as fourth:
            assert received(fourth).startswith(b"HTTP/1.1 503 ")
    until(lambda: not it.server.server_state.connections)
    with it.http() as http:
        assert http.get("/health").status_code == 200


def test_a_reader_that_does_not_read_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.3)
    with serving(tmp_path / "dir", words=10**9) as it:
        it.service.length = 10**9
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port(it)))
            body = b'{"model": "tiny", "prompt": "a", "max_tokens": 999999999, "stream": true}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            until(lambda: it.engine.tickets and it.engine.tickets[0].cancelled.is_set(), 30)
        until(lambda: it.engine.running == 0 and not it.server.server_state.connections)


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\0" * 100, b"PRI * HTTP/2.0\r\n\r\n"]
)
def test_what_is_no_http(it, junk):
    with raw(it) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        received(connection)
    with it.http() as http:
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/health", "/nothing"])
@pytest.mark.parametrize(
    ("version", "framing"),
    [
        ("1.1", "Content-Length: {n}\r\nTransfer-Encoding: chunked"),
        ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: {n}"),
        ("1.1", "transfer-encoding: Chunked\r\ncontent-length: 0"),
        ("1.0", "Transfer-Encoding: chunked\r\nConnection: keep-alive"),
    ],
)
def test_a_body_of_two_lengths_is_400_and_ends_the_connection(it, version, framing, path):
    """A proxy that reads the one and a server that reads the other see different requests: here, a
    second one."""
    second = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{port(it)}\r\n\r\n"
    body = f"0\r\n\r\n{second}"
    head = f"POST {path} HTTP/{version}\r\nHost: localhost:{port(it)}\r\nContent-Type: application/json\r\n"
    with raw(it) as connection:
        connection.sendall((head + framing.format(n=len(body)) + "\r\n\r\n" + body).encode())
        answer = received(connection).decode()  # ends: the connection is closed
    assert answer.startswith("HTTP/1.1 400 ")
    assert answer.count("HTTP/1.1") == 1
    assert "connection: close" in answer.lower()
    assert "Transfer-Encoding" in answer.partition("\r\n\r\n")[2]


@pytest.mark.parametrize(
    "framing",
    ["Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5, 6", "Transfer-Encoding: gzip, chunked",
     "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Content-Length: +5", "Content-Length : 5",
     "Transfer-Encoding : chunked", "Content-Length: 5\r\n Transfer-Encoding: chunked"],
)  # fmt: skip
def test_lengths_that_readers_take_differently_are_refused(it, framing):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{port(it)}\r\nContent-Type: application/json\r\n"
    second = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{port(it)}\r\n\r\n"
    with raw(it) as connection:
        connection.sendall((head + framing + "\r\n\r\n0\r\n\r\n" + second).encode())
        answer = received(connection).decode()
    assert answer.startswith(("HTTP/1.1 400 ", "HTTP/1.1 501 "))
    assert answer.count("HTTP/1.1") == 1


def test_there_are_no_websockets(it):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    with it.http() as http:
        assert http.get("/v1/models", headers=upgrade).status_code in (200, 400, 403)


# ----------------------------------------------------------------------------------------------
# hosts and headers


def test_a_server_without_keys_answers_to_its_own_names(tmp_path):
    service = fake_service(tmp_path / "dir")
    service.hosts = LOOPBACK
    with listening(service) as (url, _), httpx.Client(base_url=url) as http:
        assert http.get("/v1/models").status_code == 200
        for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:8000", "[::1]"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in (
            "evil.example",
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "",
            "[::1",
            "localhost.evil",
        ):
            answer = http.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 403, host


def test_headers_that_every_answer_has(it):
    with it.http() as http:
        for path in ("/health", "/v1/models", "/v1/nothing"):
            answer = http.get(path, headers={"Origin": "http://evil.example"})
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in answer.headers
            assert "server" not in answer.headers
        assert http.get("/v1/models").headers["cache-control"] == "no-store"
        assert http.options("/v1/completions").status_code == 405


# ---------------------------------------------------------------------------------------------- the
# log


def test_the_log_holds_no_prompt_and_no_key(tmp_path, caplog):
    keys = Keyring((Key("alice", hash_of("vnr-secret"), ("*",)),))
    with caplog.at_level(logging.DEBUG), serving(tmp_path / "dir", keys=keys) as it:
        it.client("vnr-secret").completions.create(model=BASE, prompt="my private words")
        with pytest.raises(openai.BadRequestError):
            it.client("vnr-secret").completions.create(model=BASE, prompt="my private words", n=99)
        with pytest.raises(openai.AuthenticationError):
            it.client("vnr-wrong").models.list()
        with it.http("vnr-secret") as http:
            http.get("/v1/models?q=private", headers={"X": "private"})
            http.get("/v1/models/a%0Ab%1b[31m")
    theirs = ("httpx", "openai", "httpcore")  # what the client in this process writes
    own = "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(theirs)
    )
    assert "alice POST /v1/completions 200" in own
    assert "alice POST /v1/completions 400" in own
    assert "- GET /v1/models 401" in own
    for word in ("private", "vnr-", hash_of("vnr-secret")):
        assert word not in own
    assert "\x1b" not in own


# ----------------------------------------------------------------------------------------------
# metrics


def test_metrics(it):
    client = it.client()
    for model in (BASE, "french", "french"):
        client.completions.create(model=model, prompt="abc")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="a")
    it.service.metrics.event("load", "french", 0.5)
    it.service.metrics.event("evict", "french", 0.0)
    it.service.metrics.event("fail", "french", 0.0)
    it.service.metrics.looked_up({}, 30, 16)
    it.service.metrics.preempted({})
    with it.http() as http:
        page = http.get("/metrics").text
    for line in (
        'veneer_requests_total{adapter="french",outcome="stop"} 2.0',
        'veneer_requests_total{adapter="base",outcome="stop"} 1.0',
        'veneer_prompt_tokens_total{adapter="french"} 6.0',
        'veneer_generated_tokens_total{adapter="french"} 16.0',
        'veneer_request_queue_time_seconds_bucket{le="0.3"} 3.0',
        'veneer_time_to_first_token_seconds_bucket{le="0.01"} 0.0',
        'veneer_time_to_first_token_seconds_bucket{le="0.02"} 3.0',
        'veneer_inter_token_latency_seconds_bucket{le="0.025"} 0.0',
        'veneer_inter_token_latency_seconds_bucket{le="0.05"} 21.0',  # of 24 tokens
        'veneer_e2e_request_latency_seconds_bucket{le="0.3"} 3.0',
        'veneer_adapter_loads_total{adapter="french"} 1.0',
        'veneer_adapter_evictions_total{adapter="french"} 1.0',
        'veneer_adapter_load_failures_total{adapter="french"} 1.0',
        "veneer_running 0.0",
        "veneer_waiting 0.0",
        "veneer_registered_adapters 1.0",
        "veneer_resident_bytes 0.0",
        "veneer_prefix_cache_queries_total 30.0",
        "veneer_prefix_cache_hits_total 16.0",
        "veneer_num_preemptions_total 1.0",
        "veneer_kv_cache_bytes 0.0",
        "veneer_kv_cache_usage_perc 0.0",
        "veneer_ready 1.0",
        'veneer_http_responses_total{status="404"} 1.0',
    ):
        assert line in page.splitlines(), line
    assert "nobody" not in page


def test_metrics_grow_little_with_adapters_and_not_at_all_without_their_names(it):
    metrics, sizes = it.service.metrics, {}
    for count in (10, 300):
        for number in range(count):
            name = f"customer-{number:04}"
            it.service.catalogue._adapters.accept(name, Location(Path()))
            for outcome in ("stop", "length"):
                metrics.started({name: 1.0}, 0.1)
                metrics.first_token({name: 1.0}, 0.1)
                metrics.tokens({name: 1.0}, 5, 7)
                metrics.finished({name: 1.0}, outcome, 0.2)
            metrics.event("load", name, 0.1)
        with it.http() as http:
            sizes[count] = [
                len(http.get(f"/metrics{query}").content) for query in ("", "?adapters=0")
            ]
            summed = http.get("/metrics?adapters=0").text
    assert sizes[300][0] < 100_000
    assert sizes[300][1] < sizes[10][1] + 200
    assert sizes[300][1] < 12_000
    assert "customer" not in summed
    assert "_created" not in summed
    for line in (
        "veneer_generated_tokens_total 4340.0", 'veneer_requests_total{outcome="stop"} 310.0',
        'veneer_request_queue_time_seconds_bucket{le="0.3"} 620.0', "veneer_request_queue_time_seconds_count 620.0",
        "veneer_ready 1.0",
    ):  # fmt: skip
        assert line in summed.splitlines(), line


def use(metrics, name, times=1):
    for _ in range(times):
        metrics.tokens({name: 1.0}, 5, 7)
        metrics.finished({name: 1.0}, "stop", 0.2)


def samples(page):
    """The samples of a page, by name and labels."""
    lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
    return {sample: float(value) for sample, _, value in (line.rpartition(" ") for line in lines)}


def test_few_adapters_have_series_of_their_own_and_the_others_are_one():
    metrics = Metrics(max_labelled=3)
    for name in "abcde":
        use(metrics, name)
    counts = {
        label: count
        for label, count in samples(metrics.page()).items()
        if label.startswith("veneer_generated_tokens_total")
    }
    assert counts == {
        **{f'veneer_generated_tokens_total{{adapter="{name}"}}': 7.0 for name in "abc"},
        'veneer_generated_tokens_total{adapter="other"}': 14.0,
    }


def test_an_adapter_that_is_asked_for_more_takes_a_place_and_no_sum_goes_down():
    metrics, sums = Metrics(max_labelled=2), []
    use(metrics, "seldom", 2)
    use(metrics, "often", 9)
    for _ in range(5):
        use(metrics, "new")
        sums.append(samples(metrics.page(adapters=False))["veneer_generated_tokens_total"])
    page = samples(metrics.page())
    assert sums == [7.0 * (11 + number) for number in range(1, 6)]
    assert 'veneer_generated_tokens_total{adapter="seldom"}' not in page
    assert page['veneer_generated_tokens_total{adapter="often"}'] == 63.0
    # from when it had twice the requests of the one whose place it took
    new, others = (
        page[f'veneer_requests_total{{adapter="{name}",outcome="stop"}}']
        for name in ("new", "other")
    )
    assert (new, others) == (2.0, 3.0)


def test_memory_is_shown_by_adapter_and_what_has_no_place_together():
    metrics = Metrics(max_labelled=2)
    entries = [
        SimpleNamespace(name=name, resident=name != "cold", bytes=size)
        for name, size in (("a", 10), ("cold", 0), ("b", 20), ("c", 30), ("d", 40))
    ]
    engine = SimpleNamespace(running=0, waiting=0)
    metrics.watch(engine, SimpleNamespace(status=lambda: entries))
    page = samples(metrics.page())
    sizes = {name: page.get(f'veneer_adapter_resident_bytes{{adapter="{name}"}}') for name in (
        "a", "b", "c", "other", "cold")}  # fmt: skip
    assert sizes == {"a": 10, "b": 20, "c": None, "other": 70, "cold": None}
    assert page["veneer_resident_bytes"] == 100
    assert samples(metrics.page(adapters=False))["veneer_adapter_resident_bytes"] == 100


def test_adapters_are_listed_by_name(tmp_path):
    with serving(tmp_path / "dir", "b", "a") as served, served.http() as http:
        for name in ("d", "c"):
            adapter_at(served.folder / name)
            assert http.post("/v1/load_lora_adapter", json={"lora_name": name}).status_code == 200
        names = [entry["name"] for entry in http.get("/v1/adapters").json()]
        assert names == ["a", "b", "c", "d"]
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == [BASE, *names]


def test_an_adapter_that_goes_takes_its_series_with_it(it):
    it.client().completions.create(model="french", prompt="abc")
    with it.http() as http:
        assert 'adapter="french"' in http.get("/metrics").text
        http.post("/v1/unload_lora_adapter", json={"lora_name": "french"})
        assert 'adapter="french"' not in http.get("/metrics").text
    it.service.metrics.finished({"french": 1.0}, "stop", 0.1)  # of an answer that was still running
    assert 'adapter="unloaded"' in it.service.metrics.page().decode()


def test_labels_of_blends_and_of_names_like_ours(it):
    metrics = it.service.metrics
    assert metrics.label({}) == "base"
    assert metrics.label({"a": 1, "b": 1}) == "blend"
    it.service.catalogue._adapters.accept("blend", Location(Path()))
    assert metrics.label({"blend": 1}) == "adapter:blend"
    it.service.catalogue._adapters.accept("other", Location(Path()))
    assert metrics.label({"other": 1}) == "adapter:other"


# ----------------------------------------------------------------------------------------------
# addresses


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host, answer):
    assert is_loopback(host) is answer


def test_a_port_that_is_taken():
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="free address"):
        bind("192.0.2.1", 0)


# ----------------------------------------------------------------------------------------------
# drain


@contextmanager
def process(folder, pause, grace):
    """A server in a process of its own: (the process, its address). SIGHUP is not ignored, as it
    would be where ``nohup`` runs the tests."""
    code = f"import signal, sys; sys.argv[1:] = {[str(folder), str(pause), str(grace)]}\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    code += "from tests.support import api_server; api_server.main()"
    child = Program(code, *LARGE, folder=Path(__file__).parents[2])
    try:
        child.until(lambda: re.search(r"^http://.*\n", child.said, re.MULTILINE) or not child.alive)
        (address,) = re.findall(r"^http://.*$", child.said, re.MULTILINE)
        yield child, address
    finally:
        child.kill()
        child.wait()


def stream(url, into):
    """Read a stream of 20 words in a thread."""

    def read():
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                for chunk in client.completions.create(
                    model=BASE, prompt="a", max_tokens=20, stream=True
                ):
                    into.append(chunk.choices[0].text)
            into.append("end")
        except (openai.APIError, httpx.HTTPError) as error:
            into.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: into, 20)
    return thread


def test_the_page_still_loads_while_the_server_drains(tmp_path):
    service = fake_service(tmp_path / "dir")
    with listening(service, 5.0, page.router) as (url, _), httpx.Client(base_url=url) as http:
        service.draining = True
        assert http.get("/").status_code == 200
        assert http.get(f"/web/{page.DIGEST}/page.js").status_code == 200
        assert http.get("/web/%2e%2e/v1/models").status_code == 404
        assert http.get("/v1/models").status_code == 503


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_large_texts_that_wait_for_the_tokenizer_are_bounded(it, route):
    """Forty texts of 1 MB kept a short one waiting for as many seconds; what is too much gets 429
    at once."""
    text, begun, go = "a" * 900_000, threading.Event(), threading.Event()
    it.service.text_executor.submit(lambda: (begun.set(), go.wait(20)))
    assert begun.wait(10)
    said = (
        {"messages": [{"role": "user", "content": text}]} if "chat" in route else {"prompt": text}
    )
    body, url = {"model": BASE, **said}, f"{it.url}/v1/{route}"
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(8)]
        refused = [answer.result() for answer in islice(as_completed(waiting, 20), 4)]
        assert {answer.status_code for answer in refused} == {429}
        assert all(answer.headers["retry-after"] for answer in refused)
        go.set()
        found = sorted(answer.result().status_code for answer in waiting)
    assert found == [400] * 4 + [429] * 4
    assert it.client().completions.create(model=BASE, prompt="a").choices
    assert it.service.waiting_chars == 0


def test_a_request_that_meets_the_end_of_the_engine_gets_503(tmp_path):
    """It passed the guard before the drain began, or the engine has died: 429 would have it come
    again for ever."""
    with serving(tmp_path / "dir") as it, it.http() as http:
        it.engine.refuses, it.engine.ready = True, False
        dead = http.post("/v1/completions", json=BODY)
        assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_stopped")
        submit = it.engine.submit

        def late(request, deliver):
            it.service.draining = True
            return submit(request, deliver)

        it.engine.submit = late
        answer = http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"]


def test_sigterm_lets_streams_finish(tmp_path):
    with process(tmp_path / "dir", 0.05, 20) as (child, url):
        words = []
        thread = stream(url, words)
        assert httpx.get(f"{url}/ready").status_code == 200
        child.kill(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        thread.join(20)
        assert words[-1] == "end"
        assert "".join(words[:-1]).split() == [f"w{number}" for number in range(20)]
        assert child.wait(20) == 0


def test_a_hangup_drains_where_there_are_no_keys_to_read(tmp_path):
    """It ended the process in the middle of an answer. A terminal that closes may send it twice."""
    with process(tmp_path / "dir", 0.05, 20) as (child, url):
        words = []
        thread = stream(url, words)
        child.kill(signal.SIGHUP)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        child.kill(signal.SIGHUP)
        thread.join(20)
        assert words[-1] == "end"
        assert child.wait(20) == 0


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/french", "/v1/adapters"]
)
def test_head_is_get_without_a_body(it, path):
    with it.http() as http:
        head, get = http.head(path), http.get(path)
        assert (head.status_code, get.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        assert http.head("/v1/completions").status_code == 405


def test_sigterm_does_not_wait_beyond_its_grace(tmp_path):
    with process(tmp_path / "dir", 0.5, 0.3) as (child, url):
        words = []
        thread = stream(url, words)
        start = time.monotonic()
        child.kill(signal.SIGTERM)
        assert child.wait(15) == 0
        assert time.monotonic() - start < 10
        thread.join(20)
        assert words[-1] != "end"


def test_a_second_signal_ends_it_at_once(tmp_path):
    with process(tmp_path / "dir", 0.5, 60) as (child, url):
        thread = stream(url, [])
        child.kill(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        start = time.monotonic()
        child.kill(signal.SIGTERM)
        assert child.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 5
        thread.join(20)


def test_a_killed_server_knows_its_adapters_after_a_restart(tmp_path):
    folder = tmp_path / "dir"
    with process(folder, 0, 1) as (child, url):
        answer = httpx.post(
            f"{url}/v1/load_lora_adapter", json={"lora_name": "fr", "lora_path": "french"}
        )
        assert answer.status_code == 200
        child.kill()
    assert fake_service(folder).catalogue.refresh() == ("fr", "french")


def test_an_answer_does_not_wait_for_the_client_to_confirm_its_head():
    """Nagle's algorithm, on which a second write waits for the client's delayed confirmation of the
    first: 40 ms."""

    async def accepted() -> int:
        options: list[int] = []

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            options.append(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        listening = bind("127.0.0.1", 0)
        async with await asyncio.start_server(met, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            await reader.read()
            writer.close()
        return options[0]

    assert asyncio.run(accepted())


# ----------------------------------------------------------------------------------------------
# bodies of all together


KEYS = Keyring((Key("a", hash_of("ka")), Key("b", hash_of("kb"))))


@contextmanager
def unfinished(it, path, size, key=None):
    """A request of which so many bytes of the body have arrived, and no more come."""
    with raw(it) as connection:
        auth = f"Authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{auth}Content-Length: {size + 1}\r\n\r\n"
        )
        connection.sendall(head.encode() + b"x" * size)
        yield connection


def bytes_held(it):
    app = it.server.config.loaded_app
    while app is not None and not hasattr(app, "body_bytes"):
        app = (
            app.app if hasattr(app, "app") else app.middleware_stack
        )  # None before the first request
    return 0 if app is None else app.body_bytes.total()


@pytest.mark.parametrize("path", ["/api/v1/healthz", "/api/v1/files/a/b", "/nothing", "/health"])
def test_a_body_without_a_key_is_small(tmp_path, small, path):
    with serving(tmp_path / "dir", keys=KEYS) as it, it.http() as http:
        assert http.post(path, content=b"x" * 1001).status_code == 413
        assert http.post(path, content=b"x" * 1000).status_code in (404, 405)


def test_all_bodies_together_are_bounded_and_one_key_leaves_room_for_others(tmp_path, monkeypatch):
    """120 of 16 MiB, unfinished, to a path that needs no key took 2 GiB."""
    monkeypatch.setattr(limits, "BODIES", 8000)
    with serving(tmp_path / "dir", "french", keys=KEYS) as it:
        with unfinished(it, "/nothing", 3000), unfinished(it, "/v1/completions", 2000, "ka"):
            until(lambda: bytes_held(it) == 5000)
            body = {**BODY, "padding": "x" * 1000}
            with it.http() as nobody, it.http("ka") as same, it.http("kb") as other:
                refused = [
                    nobody.post("/nothing", json=body),
                    same.post("/v1/completions", json=body),
                ]
                assert [(one.status_code, one.json()["error"]["code"]) for one in refused] == [
                    (429, "too_many_bodies")
                ] * 2
                assert all(one.headers["retry-after"] == "1" for one in refused)
                assert other.post("/v1/completions", json=BODY).status_code == 200
        until(lambda: bytes_held(it) == 0)
        with it.http("ka") as http:
            assert (
                http.post("/v1/completions", json={**BODY, "user": "x" * 3000}).status_code == 200
            )
        until(lambda: bytes_held(it) == 0)


def test_the_log_names_no_token_of_a_download(it, caplog, monkeypatch):
    extension = TrainingExtension(SimpleNamespace(worker=SimpleNamespace(ready=True)))  # pyright: ignore
    monkeypatch.setattr(it.service, "extensions", [extension])
    caplog.set_level(logging.INFO, "veneer.serve.access")
    with it.http() as http:
        http.get("/api/v1/files/secret-token/adapter_model.safetensors")
        http.get("/api/v1/files/secret-token")
    assert "secret-token" not in caplog.text
    assert "/api/v1/files/…/adapter_model.safetensors" in caplog.text.replace("\\u2026", "…")
