"""Spans of OpenTelemetry: what they say of a request, and what they never say."""

from __future__ import annotations

import sys

import pytest
from tests.support.api_server import BASE, serving, until

from veneer.errors import ConfigError
from veneer.serve.tracing import Tracer, open_tracer

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def it(tmp_path):
    with serving(tmp_path / "dir", "french") as served:
        served.spans = InMemorySpanExporter()
        served.service.tracer = Tracer(BASE, served.spans, SimpleSpanProcessor)
        yield served


def spans_of(it, count):
    until(lambda: len(it.spans.get_finished_spans()) == count)
    return it.spans.get_finished_spans()


def test_a_request_is_a_span_with_the_gen_ai_attributes(it):
    body = {"model": "french", "messages": [{"role": "user", "content": "my private words"}]}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "client-7"}
    with it.http() as http:
        answer = http.post(
            "/v1/chat/completions",
            json={**body, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stream": True},
            headers=headers,
        )
    assert answer.status_code == 200
    (span,) = spans_of(it, 1)
    assert (span.name, span.kind) == ("chat french", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    attributes = dict(span.attributes)
    assert attributes.pop("gen_ai.usage.input_tokens") == len(it.engine.seen[0].prompt)
    assert 0 <= attributes.pop("gen_ai.response.time_to_first_chunk") < 10
    assert attributes.pop("veneer.queue_seconds") == pytest.approx(0.01)
    assert attributes == {
        "http.request.method": "POST", "url.path": "/v1/chat/completions", "http.response.status_code": 200,
        "veneer.request_id": "client-7", "enduser.id": "anyone", "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "veneer", "gen_ai.request.model": "french", "gen_ai.response.model": BASE,
        "gen_ai.response.finish_reasons": ("length",), "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 5, "gen_ai.request.max_tokens": 5, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
    }  # fmt: skip
    assert 0 < span.end_time - span.start_time < 10e9
    assert "private" not in span.to_json()
    assert "w0" not in span.to_json()


def test_other_requests_are_spans_by_their_route(it):
    it.engine.fails = "Found: a fault."
    with it.http() as http:
        http.get("/health")  # asked every few seconds: none
        http.get("/v1/models?q=private")
        http.post("/v1/completions", json={"model": BASE, "prompt": "a"})
    models, failed = spans_of(it, 2)
    assert models.name == "GET /v1/models"
    assert models.parent is None
    assert models.status.status_code is StatusCode.UNSET
    assert not any(name.startswith("gen_ai") for name in models.attributes)
    assert "private" not in models.to_json()
    assert (failed.name, failed.status.status_code) == ("text_completion base", StatusCode.ERROR)
    assert failed.attributes["gen_ai.request.model"] == BASE


def test_a_collector_that_does_not_answer_holds_up_nobody(monkeypatch):
    closed = []
    tracer = Tracer(BASE, InMemorySpanExporter(), SimpleSpanProcessor)
    monkeypatch.setattr("veneer.serve.tracing.FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(tracer._provider, "shutdown", lambda: closed.append(_wait_for_ever()))
    tracer.close()
    assert closed == []


def _wait_for_ever():
    import threading

    return threading.Event().wait(5)


def test_without_an_endpoint_there_are_no_traces():
    assert open_tracer(None, BASE) is None


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", ""])
def test_what_is_no_address_of_a_collector(endpoint):
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        open_tracer(endpoint, BASE)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp", None)
    with pytest.raises(ConfigError, match=r"pip install 'veneer\[tracing\]'"):
        open_tracer("http://localhost:4318", BASE)


@pytest.mark.slow
def test_spans_reach_a_collector_over_http():
    """With the exporter, which is an extra of its own: a server of one request stands for the
    collector."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from veneer.serve.request_log import RequestRecord

    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracer = open_tracer(f"http://127.0.0.1:{collector.server_port}", BASE)
        assert tracer is not None
        tracer.send(RequestRecord("client-7", "GET", "/v1/models", status=200), {})
        tracer.close()
        collector.shutdown()
    ((path, kind, body),) = received
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert b"client-7" in body
