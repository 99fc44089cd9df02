"""Send a span of OpenTelemetry for each request to the collector that ``--otlp-endpoint`` names.

    RequestRecord ──▶ span "chat french", with the gen_ai attributes ──▶ OTLP over HTTP

A span is made from the record of a request that has ended. So it holds no prompt and no answer, and
does not slow the request down. A ``traceparent`` header makes it a child of the client's span. The
OpenTelemetry library is optional (``veneer[tracing]``).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from veneer.errors import ConfigError
from veneer.serve.request_log import RequestRecord

#: the path to which spans are sent if the endpoint has no path
DEFAULT_PATH = "/v1/traces"
#: the name of an operation in OpenTelemetry's gen_ai conventions, by its path below /v1/
OPERATIONS = {
    "chat/completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
#: seconds that the server waits, when it ends, for spans to be sent
FLUSH_SECONDS = 0.5


class Tracer:
    """Sends a span for each request record. ``base``: the base's model name. ``exporter``: an
    exporter of OpenTelemetry's SDK. ``processor``: makes the exporter's span processor, by default
    one that sends spans in batches."""

    def __init__(self, base: str, exporter: Any, processor: Any = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._base = base
        resource = Resource.create({"service.name": "veneer"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor((processor or BatchSpanProcessor)(exporter))
        self._tracer = self._provider.get_tracer("veneer.serve")
        self._propagator = TraceContextTextMapPropagator()

    def send(self, record: RequestRecord, headers: Mapping[str, str]) -> None:
        """Make and send the span of a request that has ended. ``headers``: of the request."""
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
        """Send the remaining spans. If the collector does not answer, this gives up after
        ``FLUSH_SECONDS``."""
        shutdown_thread = threading.Thread(
            target=self._provider.shutdown, name="veneer-traces", daemon=True
        )
        shutdown_thread.start()
        shutdown_thread.join(FLUSH_SECONDS)


def open_tracer(endpoint: str | None, base: str) -> Tracer | None:
    """A tracer that sends to the collector at ``endpoint``; None without an endpoint.
    ``ConfigError``: the endpoint is no address, or the library is missing."""
    if endpoint is None:
        return None
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
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
    url = endpoint if address.path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH
    return Tracer(base, trace_exporter.OTLPSpanExporter(endpoint=url))
