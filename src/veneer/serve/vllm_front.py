"""A server that starts a vLLM process and forwards requests to it. vLLM computes the answers; this
server does everything else: API keys, verified adapters, blends, the fair queue and the log.

    ``Guard`` checks the request and its key ──▶ the body names a model, and perhaps a blend (a
          weighted sum of adapters)
          ──▶ the request waits in the queue (``Gate``) ──▶ ``VllmAdapters`` loads the blend
          ──▶ vLLM gets the body, with the name under which vLLM has loaded the blend
          ──▶ the client gets vLLM's answer, with the model name that the client sent

All fields of bodies, answers and errors are vLLM's, except ``model`` and ``adapters`` (the blend).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import TypeAdapter, ValidationError

from veneer.fileio.untrusted import parse
from veneer.models.load import load_tokenizer, pick_dtype, stored_dtype
from veneer.models.locate import folder_of
from veneer.models.remote_code import with_trust_of_config
from veneer.models.sampling_defaults import SamplingDefaults
from veneer.serve import api, vllm
from veneer.serve.access import Keyring
from veneer.serve.catalogue import Catalogue, check_pinned_names, served_folders
from veneer.serve.metrics import Metrics
from veneer.serve.refusal import RETRY_AFTER, Refusal, body_refusal, timeout_refusal
from veneer.serve.request_log import CURRENT_RECORD, ID_HEADER
from veneer.serve.scheduler import counted_as, key_of
from veneer.serve.schemas import Blend
from veneer.serve.service import (
    AdminKey,
    ApiKey,
    CurrentService,
    Route,
    Service,
    await_or_undo,
    beside_loop,
    requested_adapters,
    unless_disconnected,
)
from veneer.serve.settings import QUEUE, Settings, must_have_keys_for_any_origin
from veneer.serve.tools.choose import check_parser, detect_parser
from veneer.serve.tracing import open_tracer
from veneer.serve.vllm_adapters import Lease, VllmAdapters
from veneer.serve.vllm_process import Ticket, VllmProcess

log = logging.getLogger("veneer.serve")

#: the most requests that are sent to vLLM at one time if ``--rows`` is not set: vLLM's own default
DEFAULT_ROWS = 256
#: the routes that are forwarded to vLLM. Except for those in ``MODEL_OPTIONAL``, their bodies must
#: have the field ``model``.
FORWARDED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
)
#: the forwarded routes whose bodies may lack the field ``model``
MODEL_OPTIONAL = ("/tokenize", "/detokenize")
#: fields that make vLLM store data of a request or use stored data. They are refused, because a
#: client could reach the data of another API key with them.
STORAGE_FIELDS = ("previous_response_id", "conversation", "background")

router = APIRouter(route_class=Route)
_BLEND = TypeAdapter[dict[str, float]](Blend)


def create(service: Service, *routers: Any) -> FastAPI:
    """The FastAPI application of a service that ``start`` returned. ``routers``: further routers to
    include."""
    return api.create(service, *routers, core=(router, api.operations))


@router.get("/metrics")
async def metrics(service: CurrentService, key: AdminKey, adapters: bool = True) -> Response:
    """Metrics of this server and its vLLM for Prometheus. With ``adapters=0``, only those of this
    server, as sums over all adapters."""
    service.metrics.ready.set(service.ready)
    metrics_text = await asyncio.to_thread(service.metrics.page, adapters=adapters)
    if adapters and service.ready:
        metrics_text += await asyncio.to_thread(service.engine.read, "/metrics")
    return PlainTextResponse(metrics_text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def forward(request: Request, service: CurrentService, key: ApiKey) -> Response:
    """Forward a request to vLLM. The body has vLLM's fields, and may have ``adapters``, a blend."""
    path = request.url.path
    # Without this check, a web page of another origin could send a body as plain text, because
    # browsers do not ask the server for its permission (CORS preflight) before they send this type.
    if "json" not in request.headers.get("content-type", ""):
        raise Refusal(400, "no JSON object", "one, with Content-Type: application/json", "send it")
    read_body = partial(_read_body, path=path, has_keys=bool(key.owner))
    body = await beside_loop(service, await request.body(), read_body)
    model, blend = body.get("model"), body.pop("adapters", None)
    if model is None:  # /tokenize and the like: all adapters have the base's tokenizer
        model, blend = service.base, {}
    else:
        blend = await requested_adapters(service, key, model, blend)
    if not service.ready:
        raise service.unready_refusal()
    if path not in MODEL_OPTIONAL and key.owner and not body.get("cache_salt"):
        # a salt for each API key: vLLM shares cached prefixes only among requests with the same
        # salt, so a client cannot find out from the time of an answer whether a client with another
        # key sent the same prompt
        secret_and_owner = f"{service.engine.salt_secret}\0{key.owner}"
        body["cache_salt"] = hashlib.sha256(secret_and_owner.encode()).hexdigest()
    priority = body.get("priority")
    ticket = Ticket(
        key.owner, counted_as(blend), key_of(blend), priority if isinstance(priority, int) else 0
    )
    return await unless_disconnected(
        request, Call(service, blend, path, model, body, ticket).answer()
    )


for _path in FORWARDED_PATHS:
    router.add_api_route(_path, forward, methods=["POST"], name=_path.strip("/").replace("/", "_"))


def _read_body(content: bytes, path: str, has_keys: bool) -> dict[str, Any]:
    """Parse the body of a request for the route ``path``, check its model and blend, and keep vLLM
    from storing it (``store``) and, on a server with keys, from caching its pictures by the
    client's ids. ``Refusal``: it is no JSON object, its model or blend is invalid, or it has one of
    ``STORAGE_FIELDS``."""
    try:
        body: Any = parse(content)
    except ValueError as error:
        raise Refusal(400, f"no JSON ({error})", "a JSON object", "check the body") from error
    if not isinstance(body, dict):
        raise Refusal(400, "no JSON object", "one, with Content-Type: application/json", "send it")
    model = body.get("model")
    may_lack_model = model is None and path in MODEL_OPTIONAL
    if not may_lack_model and not (isinstance(model, str) and 0 < len(model) <= 256):
        raise Refusal(400, "no model", "its name, a text", "send it", param="model")
    for name in STORAGE_FIELDS:
        if body.get(name):
            problem = f"{name}, and a server that keeps nothing of a request"
            raise Refusal(400, problem, "the whole conversation", "leave it out", param=name)
    if path == "/v1/responses":
        body["store"] = False
    if has_keys:
        _remove_media_ids(body)
    if body.get("adapters") is not None:
        try:
            body["adapters"] = _BLEND.validate_python(body["adapters"], strict=True)
        except ValidationError as error:
            errors = [{**detail, "loc": ("adapters", *detail["loc"])} for detail in error.errors()]
            raise body_refusal(errors, body) from error
    return body


def _remove_media_ids(value: Any) -> None:
    """Remove the field ``uuid`` of the pictures, sounds and videos in a body, in place. vLLM caches
    them by it for all API keys, so a client could get those of another one."""
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            _remove_media_ids(child)
    content = value.get("content") if isinstance(value, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            part.pop("uuid", None)


class ForwardedStream(StreamingResponse):
    """A response that streams vLLM's events. When it ends, also because the client disconnected, it
    ends ``call`` and closes vLLM's response, even if ``events`` was never started."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        response: httpx.Response,
        call: Call,
        media_type: str,
    ) -> None:
        super().__init__(events, response.status_code, media_type=media_type)
        self._response, self._call = response, call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end("cancelled")
            await self._response.aclose()


@dataclass
class Call:
    """One request to vLLM, from its wait in the queue to its end.

    Fields:
        blend: the weights by adapter name; empty for the base.
        model: the model name that the client sent.
        body: the request body for vLLM; its ``model`` is replaced when it is sent.
        ticket: represents the request in the queue (``Gate``).
        arrived_at: when the request arrived, by ``time.monotonic``.
        lease: keeps the blend loaded in vLLM until it is released.
        has_ended: whether ``end`` was called.
    """

    service: Service
    blend: dict[str, float]
    path: str
    model: str
    body: dict[str, Any]
    ticket: Ticket
    arrived_at: float = field(default_factory=time.monotonic)
    lease: Lease = field(default_factory=lambda: Lease(None))
    prompt_tokens: int = 0
    generated_tokens: int = 0
    has_ended: bool = False

    async def answer(self) -> Response:
        """Wait until the request may be sent to vLLM, load its blend, and return vLLM's answer.

        Raises:
            Busy: the queue has no place for the request.
            Refusal: the time limit is exceeded (504), or vLLM has ended (503).
            VeneerError: the blend cannot be loaded (``VllmAdapters.acquire``).
        """
        engine, service_metrics = self.service.engine, self.service.metrics
        record = CURRENT_RECORD.get()
        if record is not None:
            record.ask(self.blend, 0)
        deadline = asyncio.get_running_loop().time() + self.service.timeout
        try:
            async with asyncio.timeout_at(deadline):
                await engine.gate.enter(self.ticket)
        except TimeoutError as error:
            service_metrics.finished(self.blend, "timeout", time.monotonic() - self.arrived_at)
            raise timeout_refusal() from error
        wait_seconds = time.monotonic() - self.arrived_at
        service_metrics.started(self.blend, wait_seconds)
        if record is not None:
            record.queue_seconds = wait_seconds
        try:
            async with asyncio.timeout_at(deadline):
                self.lease = self.service.bank.find(self.blend) or await self._load_blend()
                return await self._relay(await self._send(), deadline)
        except (TimeoutError, httpx.TimeoutException) as error:
            self.end("timeout")
            raise timeout_refusal() from error
        except (httpx.TransportError, ConnectionError) as error:
            self.end("error")
            raise engine_lost_refusal() from error
        except asyncio.CancelledError:
            self.end("cancelled")
            raise
        except BaseException:
            self.end("error")
            raise

    async def _load_blend(self) -> Lease:
        load_future = asyncio.ensure_future(
            asyncio.to_thread(self.service.bank.acquire, self.blend)
        )
        return await await_or_undo(load_future, Lease.release)

    async def _send(self) -> httpx.Response:
        record = CURRENT_RECORD.get()
        headers = {"content-type": "application/json"}
        if record is not None:
            headers[ID_HEADER] = record.request_id
        body = {**self.body, "model": self.lease.name or self.service.base}
        content = json.dumps(body).encode()
        return await self.service.engine.send("POST", self.path, content, headers)

    async def _relay(self, response: httpx.Response, deadline: float) -> Response:
        """Turn vLLM's ``response`` into the response for the client, in which vLLM's model name is
        replaced by the one that the client sent. A stream ends at the latest at ``deadline``, in
        seconds of the event loop's clock."""
        media_type = response.headers.get("content-type", "application/json")
        if media_type.startswith("text/event-stream"):
            events = self._forward_events(response, deadline)
            return ForwardedStream(events, response, self, media_type)
        try:
            content = self._rename_model(await response.aread())
        finally:
            await response.aclose()
        self._count_usage(content if media_type.startswith("application/json") else b"")
        self.end("stop" if response.status_code < 400 else "error")
        return Response(content, response.status_code, media_type=media_type)

    async def _forward_events(
        self, response: httpx.Response, deadline: float
    ) -> AsyncIterator[bytes]:
        """Yield the lines of vLLM's events, and if vLLM fails or ``deadline`` passes, an event with
        the error. Lines are divided at line feeds only, because vLLM's JSON may contain other line
        separators, such as U+2028, within a text."""
        outcome, refusal, partial_line, event_count = "cancelled", None, b"", 0
        chunks = response.aiter_bytes()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
                *lines, partial_line = (partial_line + (chunk or b"")).split(b"\n")
                if chunk is None and partial_line:
                    lines, partial_line = [*lines, partial_line], b""
                for line in lines:
                    self._count_event(line)
                    event_count += line.startswith(b"data: ")
                    yield self._rename_model(line + b"\n")
                if chunk is None:
                    break
            outcome = "stop"
        except (TimeoutError, httpx.TimeoutException):
            outcome, refusal = "timeout", timeout_refusal()
        except httpx.TransportError:
            outcome, refusal = "error", engine_lost_refusal()
        finally:
            self.end(outcome)
        if refusal is not None:
            yield refusal.error_event(self.path, event_count)

    def _rename_model(self, content: bytes) -> bytes:
        """Replace the name under which vLLM has loaded the blend by the model name that the client
        sent."""
        if self.lease.name is None:
            return content
        return content.replace(self.lease.name.encode(), json.dumps(self.model)[1:-1].encode())

    def _count_usage(self, content: bytes) -> None:
        """Read the numbers of tokens from the field ``usage`` of a complete answer. If ``content``
        is no JSON object, do nothing."""
        try:
            usage = json.loads(content).get("usage") or {}
        except (ValueError, AttributeError):
            return
        self.prompt_tokens = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.generated_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0

    def _count_event(self, line: bytes) -> None:
        """Count one generated token if a line of the stream is an event with data, because vLLM
        sends about one event for each token. Also record when the first one arrived."""
        if not line.startswith(b"data: {"):
            return
        record = CURRENT_RECORD.get()
        if not self.generated_tokens:
            seconds = time.monotonic() - self.arrived_at
            self.service.metrics.first_token(self.blend, seconds)
            if record is not None:
                record.first_token_seconds = seconds
        self.generated_tokens += 1

    def end(self, outcome: str) -> None:
        """Release the call's lease, let the next request of the queue go to vLLM, and record the
        call in metrics and the log, with ``outcome`` as the reason of its end. A second call of
        this method does nothing."""
        if self.has_ended:
            return
        self.has_ended = True
        service_metrics, record = self.service.metrics, CURRENT_RECORD.get()
        self.lease.release()
        self.service.engine.gate.leave(self.ticket, self.generated_tokens or 1)
        service_metrics.tokens(self.blend, self.prompt_tokens, self.generated_tokens)
        service_metrics.finished(self.blend, outcome, time.monotonic() - self.arrived_at)
        if record is not None:
            record.prompt_tokens = self.prompt_tokens
            record.generated_tokens = self.generated_tokens
            record.end(outcome)


def engine_lost_refusal() -> Refusal:
    return Refusal(
        503,
        "a vLLM that ended in the middle of it",
        "one that runs",
        "send it again",
        code="engine_stopped",
        headers={RETRY_AFTER: "5"},
    )


@with_trust_of_config
def start(
    settings: Settings, keys: Keyring, on_exit: Callable[[int], None] = lambda status: None
) -> Service:
    """Start vLLM, wait until it has loaded the base, and create the service that forwards requests
    to it. ``Service.close`` stops vLLM.

    Args:
        on_exit: called with vLLM's exit status, in a thread, if vLLM ends without ``close``.

    Raises:
        ConfigError: the settings contradict each other, there is no adapter with a name in
            ``settings.pin``, or vLLM is not installed or does not start.
        AdapterError: vLLM cannot load some of the adapters.
    """
    must_have_keys_for_any_origin(settings, keys.is_open)
    check_parser(settings.tool_call_parser)
    program = vllm.program()
    adapter_folders = {} if settings.adapters is None else served_folders(settings.adapters)
    check_pinned_names(settings.pin, adapter_folders)
    rank = vllm.largest_rank(adapter_folders)
    base = str(folder_of(settings.base))
    tokenizer = load_tokenizer(base)
    tracer = open_tracer(settings.otlp_endpoint, settings.name)
    temp_dir = tempfile.TemporaryDirectory(prefix="veneer-vllm-")
    socket_path = Path(temp_dir.name) / "socket"
    command_line = _command_line(settings, base, socket_path, rank, tokenizer)
    engine = VllmProcess(
        [program, *command_line[1:]],
        socket_path,
        settings.rows or DEFAULT_ROWS,
        settings.queue or QUEUE,
        settings.timeout,
        on_exit,
        temp_dir,
    )
    try:
        engine.start()
        verify_base = os.environ.get("VENEER_VERIFY_BASE", "1") != "0"
        bank = VllmAdapters(
            engine.post, base, Path(temp_dir.name), rank, settings.memory, verify_base=verify_base
        )
        catalogue = Catalogue(settings.adapters, bank, settings.name, settings.pin)
        metrics = Metrics(catalogue.known)
        bank.on_event = metrics.event
        for adapter in dict.fromkeys(settings.pin):
            bank.pin(adapter)
        catalogue.follow_pins()
        metrics.watch(engine, bank)
        model_card = engine.model_card()
    except BaseException:
        engine.close()
        raise
    catalogue.watch()
    return Service(
        base=settings.name,
        source=settings.base,
        tokenizer=tokenizer,
        bank=bank,
        catalogue=catalogue,
        keys=keys,
        metrics=metrics,
        length=model_card["max_model_len"],
        vocabulary=len(tokenizer),
        engine=engine,
        sampling=SamplingDefaults(),
        timeout=settings.timeout,
        dtype=_dtype(settings, base) or "auto",
        cors=settings.cors,
        tracer=tracer,
    )


def _command_line(
    settings: Settings, base: str, socket_path: Path, rank: int, tokenizer: Any
) -> list[str]:
    return vllm.command(
        base,
        socket_path,
        rank,
        name=settings.name,
        length=settings.length,
        rows=settings.rows,
        dtype=_dtype(settings, base),
        tool_call_parser=settings.tool_call_parser or detect_parser(tokenizer.chat_template),
        extra_options=["--trust-remote-code"] if settings.trust_remote_code else [],
    )


def _dtype(settings: Settings, base: str) -> str | None:
    """The value of vLLM's ``--dtype``; None: leave it out. With the precision "stored", it is the
    dtype of the base's files, because vLLM's default would convert a base in float32 to
    bfloat16."""
    precision = settings.precision
    if precision == "auto":
        return None
    dtype = stored_dtype(base) if precision == "stored" else pick_dtype(precision)
    return None if dtype is None else str(dtype).removeprefix("torch.")
