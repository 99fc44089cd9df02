"""Send an OpenTelemetry span for each request to the collector at the address ``--otlp-endpoint``.

    RequestRecord ──▶ span "chat french", with the gen_ai attributes ──▶ OTLP over HTTP

A span is made from the log record of a request (``RequestRecord``) after the request has ended. The
record has no prompt and no answer, so the span has none either, and the request does not wait for
it. If the client sends a ``traceparent`` header, the span is a child of the client's span. The
OpenTelemetry library is an optional dependency (``veneer[tracing]``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from veneer.errors import ConfigError
from veneer.serve.request_log import RequestRecord

#: the URL path to which spans are sent if the address ``--otlp-endpoint`` has no path
DEFAULT_PATH = "/v1/traces"
#: the value of ``gen_ai.operation.name`` in OpenTelemetry's semantic conventions, by the route's
#: path after /v1/
OPERATIONS = {
    "chat/completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
#: the most seconds for which the server, when it ends, waits until the last spans are sent
FLUSH_SECONDS = 0.5


class Tracer:
    """Sends a span for each request record.

    Args:
        base: the base's model name for clients.
        exporter: a span exporter of OpenTelemetry's SDK, which sends spans to the collector.
        processor_class: the class of OpenTelemetry's SDK that passes spans to the exporter; None:
            ``BatchSpanProcessor``, which does it in batches in a thread.
    """

    def __init__(self, base: str, exporter: Any, processor_class: Any = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._base = base
        resource = Resource.create({"service.name": "veneer"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor((processor_class or BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("veneer.serve")
        self._propagator = TraceContextTextMapPropagator()

    def send(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Send the span of a request that has ended. ``headers``: the request's headers, by names
        in lower case."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent_context = self._propagator.extract({"traceparent": headers.get("traceparent", "")})
        attributes = self._attributes(record)
        operation = attributes.get("gen_ai.operation.name")
        name = f"{operation} {record.adapter}" if operation else f"{record.method} {record.path}"
        span = self._tracer.start_span(
            name,
            context=parent_context,
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=record.started_ns,
        )
        if record.status >= 500 or "error" in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=record.started_ns + int(record.total_seconds * 1e9))

    def _attributes(self, record: RequestRecord) -> dict[str, Any]:
        attributes = {
            "http.request.method": record.method,
            "url.path": record.path,
            "http.response.status_code": record.status or None,
            "veneer.request_id": record.request_id,
            "enduser.id": record.key,
        }
        if record.blend is not None:
            sampling = record.sampling
            attributes |= {
                "gen_ai.operation.name": OPERATIONS.get(record.path.removeprefix("/v1/"), "chat"),
                "gen_ai.provider.name": "veneer",
                "gen_ai.request.model": record.adapter if record.blend else self._base,
                "gen_ai.response.model": self._base,
                "gen_ai.response.finish_reasons": record.finish_reasons or None,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                "gen_ai.usage.output_tokens": record.generated_tokens,
                "gen_ai.response.time_to_first_chunk": record.first_token_seconds,
                "veneer.queue_seconds": record.queue_seconds,
            }
            if sampling is not None:
                attributes |= {
                    "gen_ai.request.max_tokens": sampling.max_tokens,
                    "gen_ai.request.temperature": sampling.temperature,
                    "gen_ai.request.top_p": sampling.top_p,
                    "gen_ai.request.top_k": sampling.top_k or None,
                }
        return {name: value for name, value in attributes.items() if value is not None}

    def close(self) -> None:
        """Send the remaining spans, but wait at most ``FLUSH_SECONDS``, since the collector may not
        answer. Spans that have not been sent when the process ends are lost."""
        shutdown_thread = threading.Thread(
            target=self._provider.shutdown, name="veneer-traces", daemon=True
        )
        shutdown_thread.start()
        shutdown_thread.join(FLUSH_SECONDS)


def open_tracer(endpoint: str | None, base: str) -> Tracer | None:
    """A tracer that sends spans to the collector at the URL ``endpoint``; None without an endpoint.
    ``base``: the base's model name for clients. ``ConfigError``: the endpoint is no HTTP address,
    or OpenTelemetry's library is not installed."""
    if endpoint is None:
        return None
    parsed_endpoint = urlsplit(endpoint)
    if parsed_endpoint.scheme not in ("http", "https") or not parsed_endpoint.netloc:
        raise ConfigError(
            f"--otlp-endpoint {endpoint!r}",
            "the address of an OTLP collector over HTTP",
            "write, for instance, http://localhost:4318",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--otlp-endpoint (or OTEL_EXPORTER_OTLP_ENDPOINT) without {error.name}",
            "OpenTelemetry's SDK and its exporter",
            "pip install 'veneer[tracing]', or leave the endpoint out",
        ) from error
    url = endpoint if parsed_endpoint.path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH
    return Tracer(base, trace_exporter.OTLPSpanExporter(endpoint=url))
