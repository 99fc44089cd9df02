"""The state that all routes share (``Service``), and the dependencies of routes: the request's key
and the adapters that it names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from veneer.errors import sentence
from veneer.fileio.untrusted import parse
from veneer.models.sampling_defaults import SamplingDefaults
from veneer.serve import limits, refusal
from veneer.serve.access import FileWatch, Key, Keyring
from veneer.serve.catalogue import Catalogue
from veneer.serve.embed import Embedder
from veneer.serve.extension import Extension
from veneer.serve.guard import no_key
from veneer.serve.metrics import Metrics
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy
from veneer.serve.tracing import Tracer

T = TypeVar("T")


@dataclass
class Service:
    """A base, its adapters and the engine that serves them."""

    base: str  # its model name in the API
    source: str  # folder, file, package or hub id
    tokenizer: Any
    bank: Any
    catalogue: Catalogue
    keys: Keyring
    metrics: Metrics
    length: int  # most tokens of a prompt and its answer together
    vocabulary: int  # number of tokens of the base
    engine: Any = None  # answers completions; None for an encoder
    embedder: Embedder | None = None  # answers embeddings; None for a causal model
    extensions: list[Extension] = field(default_factory=list)
    sampling: SamplingDefaults = field(
        default_factory=SamplingDefaults
    )  # for fields that a request leaves out
    tool_call_parser: str | None = None  # name; None: detected from the chat template
    timeout: float = 600.0  # seconds that an answer may take
    dtype: str = "float32"  # of the base's weights, as torch names it
    hosts: tuple[str, ...] | None = None  # accepted values of the Host header; None: all
    cors: tuple[str, ...] = ()  # origins of web pages that may send requests
    docs: bool = False  # whether /docs is served
    tracer: Tracer | None = None
    key_watch: FileWatch | None = None
    draining: bool = False
    reading: int = 0  # characters waiting for the tokenizer; written by the event loop only
    started: int = field(default_factory=lambda: int(time.time()))
    texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "veneer-text"))
    bodies: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "veneer-bodies")
    )
    admin: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.admin = ThreadPoolExecutor(1, "veneer-admin", initializer=self.bank.throttle_loads)

    @property
    def ready(self) -> bool:
        engine_ready = self.engine is None or self.engine.ready
        extensions_ready = all(extension.ready for extension in self.extensions)
        return not self.draining and engine_ready and extensions_ready

    def extension_of(self, model: str) -> Extension | None:
        """The extension that resolves a model name, if one does."""
        matches = (e for e in self.extensions if model.startswith(e.model_prefix))
        return next(matches, None)

    def unready(self) -> Refusal:
        if self.draining:
            return refusal.draining()
        message = sentence(
            "an engine that does not run", "one that does", "look at the log, start it again"
        )
        return Refusal(503, message, code="engine_stopped")

    def drain(self, seconds: float) -> None:
        """Refuse new requests and wait up to ``seconds`` for the running ones."""
        self.draining = True
        for extension in self.extensions:
            extension.drain()
        for worker in filter(None, (self.engine, self.embedder)):
            worker.drain(seconds)

    def close(self) -> None:
        if self.key_watch is not None:
            self.key_watch.close()
        self.catalogue.close()
        for extension in self.extensions:
            extension.close()
        for worker in filter(None, (self.engine, self.embedder)):
            worker.close()
        self.texts.shutdown(wait=False, cancel_futures=True)
        self.bodies.shutdown(wait=False, cancel_futures=True)
        self.admin.shutdown(
            cancel_futures=True
        )  # an adapter that is being loaded may still be recorded
        if self.tracer is not None:
            self.tracer.close()


async def beside_loop(service: Service, body: bytes, read: Callable[[bytes], T]) -> T:
    """The result of ``read(body)``. A large body is read in a thread, since that may take
    seconds."""
    if len(body) <= limits.PARSED_INLINE:
        return read(body)
    return await asyncio.get_running_loop().run_in_executor(service.bodies, read, body)


def _read_json(body: bytes) -> Any:
    try:
        return parse(body)
    except ValueError as error:
        # the one kind of exception that FastAPI lets through here
        raise HTTPException(
            400, sentence(f"no JSON ({error})", "a JSON object", "check the body")
        ) from error


class _Strict(Request):
    """A request whose JSON is read strictly: no key twice, no NaN, no half of a surrogate pair,
    bounded depth."""

    _content: Any = None

    async def json(self) -> Any:
        return _read_json(await self.body()) if self._content is None else self._content

    async def read_large(self, model: Any) -> None:
        """Have a large body read by a thread, and made a ``model`` of, which FastAPI then takes as
        it is."""
        body = await self.body()
        if len(body) > limits.PARSED_INLINE and "json" in self.headers.get("content-type", ""):
            self._content = await beside_loop(
                self.app.state.service, body, partial(_read_model, model)
            )


def _read_model(model: Any, body: bytes) -> Any:
    value = _read_json(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False), body=value) from error


def _reading_large(
    handle: Callable[[Any], Coroutine[Any, Any, Response]], model: Any
) -> Callable[[Any], Coroutine[Any, Any, Response]]:
    async def read_and_handle(request: Any) -> Response:
        await request.read_large(model)
        return await handle(request)

    return read_and_handle


class Route(APIRoute):
    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        # the first sentence of the function's docstring, in place of its name
        sentences = " ".join(self.description.split()).split(". ")
        self.summary = self.summary or sentences[0].removesuffix(".") or None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            handle = _reading_large(handle, model)

        async def strict(request: Request) -> Response:
            return await self.respond(handle, _Strict(request.scope, request.receive))

        return strict

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        """The answer of this route, where ``handle`` gives it or raises."""
        return await handle(request)

    # RFC 9110, 9.1: a server answers HEAD wherever it answers GET; uvicorn leaves the body out. In
    # `methods` it would be a second operation of the same id for OpenAPI.

    def matches(self, scope: Any) -> Any:
        return super().matches({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "HEAD" and "GET" in (self.methods or ()):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)


# Async, because FastAPI runs every other dependency in a thread, a hop for each request.


async def _service(request: Request) -> Service:
    return request.app.state.service


async def _key(request: Request) -> Key:
    key = getattr(request.state, "key", None)
    if key is None:
        raise no_key(request.headers)
    return key


async def _admin(key: Annotated[Key, Depends(_key)]) -> Key:
    if not key.admin:
        message = sentence(
            f"key {key.name!r}, which is no admin key", "one with admin = true", "use another"
        )
        raise Refusal(403, message, code="admin_only")
    return key


Serving = Annotated[Service, Depends(_service)]
Asker = Annotated[Key, Depends(_key)]
Admin = Annotated[Key, Depends(_admin)]


async def requested_adapters(
    service: Service, key: Key, model: str, blend: dict[str, float] | None
) -> dict[str, float]:
    """The adapters that a call means: {name: weight}, {} for the base. ``Refusal``: 404 for a name
    that is absent and for one that the key may not use, in the same words."""
    if blend is None:
        blend = {} if model == service.base else {model.removeprefix(f"{service.base}:"): 1.0}
    elif model != service.base:
        problem = f"adapters beside the model {model[:120]!r}"
        message = sentence(
            problem, f"model {service.base!r}", "name the base, and each adapter in adapters"
        )
        raise Refusal(400, message, param="adapters")
    if not key.may_use(blend) or not (
        any(blend.values()) or key.base
    ):  # weights of zero are the base alone
        raise refusal.no_such_model(next(iter(blend)) if len(blend) == 1 else model)
    if not all(map(service.catalogue.known, blend)):
        await asyncio.to_thread(service.catalogue.refresh)
        for name in blend:
            if not service.catalogue.known(name):
                raise refusal.no_such_model(name)
    return blend


def in_text_thread(service: Service, size: int, work: Callable[[], T]) -> asyncio.Future[T]:
    """Tokenizers of transformers keep state between calls, so one thread runs them all. Its queue
    is bounded by the size of the texts, in characters: a large text takes a second, and a short one
    behind forty of them would seem to hang. ``Busy``: too much waits already."""
    if service.reading and service.reading + size > limits.READING:
        problem = f"{service.reading:,} characters that wait to be read"
        raise Busy(sentence(problem, f"at most {limits.READING:,}", "send it again later"), 2.0)

    def read(_: Any) -> None:
        service.reading -= size

    service.reading += size
    run = copy_context().run  # the work belongs to this request (``request_log.CURRENT``)
    reading = asyncio.get_running_loop().run_in_executor(service.texts, run, work)
    reading.add_done_callback(read)
    return reading


async def await_or_undo(work: asyncio.Future[T], undo: Callable[[T], object]) -> T:
    """The result of ``work``, which goes on if the caller is cancelled; its result is undone
    then."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: done.exception() or undo(done.result()))
        raise


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of ``work``. ``Refusal``: the client went away first, and the work is
    cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "a client that went away", "one that waits", "send it again")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
