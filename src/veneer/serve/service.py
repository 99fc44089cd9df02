"""The state that all routes share (``Service``), and the parameters that FastAPI passes to routes:
the service and the request's key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
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
from veneer.serve import limits, prompts, refusal
from veneer.serve.access import Key, Keyring, KeyWatch
from veneer.serve.catalogue import Catalogue
from veneer.serve.embed import Embedder
from veneer.serve.extension import Extension
from veneer.serve.guard import missing_key_refusal
from veneer.serve.metrics import Metrics
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy
from veneer.serve.tracing import Tracer

T = TypeVar("T")


@dataclass
class Service:
    """A base with its adapters, and what serves them to clients."""

    base: str  # the model name of the base in the API
    source: str  # where the base is: a folder, file, package or hub id
    tokenizer: Any
    bank: Any
    catalogue: Catalogue
    keys: Keyring
    metrics: Metrics
    length: int  # context length: the most tokens of a prompt and its answer together
    vocabulary: int  # number of token ids of the base
    engine: Any = None  # answers completions; None for an encoder
    embedder: Embedder | None = None  # answers embeddings; None for a causal model
    extensions: list[Extension] = field(default_factory=list)
    # values of sampling fields that a request leaves out
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    tool_call_parser: str | None = None  # name of a parser; None: detect it from the template
    timeout: float = 600.0  # seconds that an answer may take
    dtype: str = "float32"  # of the base's weights, by torch's name
    hosts: tuple[str, ...] | None = None  # host names accepted in the Host header; None: all
    cors: tuple[str, ...] = ()  # origins of web pages that may send requests
    docs: bool = False  # whether /docs is served
    tracer: Tracer | None = None
    key_watch: KeyWatch | None = None
    draining: bool = False
    waiting_chars: int = 0  # characters that wait for the tokenizer; only the event loop changes it
    started: int = field(default_factory=lambda: int(time.time()))  # in seconds since 1970
    text_executor: ThreadPoolExecutor = field(  # runs the tokenizer
        default_factory=lambda: ThreadPoolExecutor(1, "veneer-text")
    )
    body_executor: ThreadPoolExecutor = field(  # parses large bodies
        default_factory=lambda: ThreadPoolExecutor(1, "veneer-bodies")
    )
    admin_executor: ThreadPoolExecutor = field(init=False)  # loads and unloads adapters

    def __post_init__(self) -> None:
        throttle = self.bank.throttle_loads
        self.admin_executor = ThreadPoolExecutor(1, "veneer-admin", initializer=throttle)

    @property
    def ready(self) -> bool:
        """Whether the service takes requests."""
        engine_ready = self.engine is None or self.engine.ready
        extensions_ready = all(extension.ready for extension in self.extensions)
        return not self.draining and engine_ready and extensions_ready

    def extension_of(self, model: str) -> Extension | None:
        """The extension that resolves a model name; None if the name belongs to no extension."""
        matches = (
            extension for extension in self.extensions if model.startswith(extension.model_prefix)
        )
        return next(matches, None)

    def unready_refusal(self) -> Refusal:
        """The refusal of a request while the service is not ready."""
        if self.draining:
            return refusal.draining_refusal()
        return Refusal(
            503,
            "an engine that does not run",
            "one that does",
            "look at the log, start it again",
            code="engine_stopped",
        )

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
        self.text_executor.shutdown(wait=False, cancel_futures=True)
        self.body_executor.shutdown(wait=False, cancel_futures=True)
        # wait for a load that runs, since it may still be recorded
        self.admin_executor.shutdown(cancel_futures=True)
        if self.tracer is not None:
            self.tracer.close()


async def beside_loop(service: Service, body: bytes, read: Callable[[bytes], T]) -> T:
    """The result of ``read(body)``. For a large body, ``read`` runs in a thread, since it may take
    seconds and would block the event loop."""
    if len(body) <= limits.PARSED_INLINE:
        return read(body)
    return await asyncio.get_running_loop().run_in_executor(service.body_executor, read, body)


def _parse_json(body: bytes) -> Any:
    try:
        return parse(body)
    except ValueError as error:
        # FastAPI would turn any other exception into its own answer
        raise HTTPException(
            400, sentence(f"no JSON ({error})", "a JSON object", "check the body")
        ) from error


class _StrictRequest(Request):
    """A request whose JSON is parsed strictly: no duplicate keys, no NaN, no half of a surrogate
    pair, and a bounded depth."""

    _content: Any = None

    async def json(self) -> Any:
        return _parse_json(await self.body()) if self._content is None else self._content

    async def parse_large_body(self, model: Any) -> None:
        """Parse and validate a large body in a thread. ``json`` then returns the instance of
        ``model``, which FastAPI does not validate again."""
        body = await self.body()
        if len(body) > limits.PARSED_INLINE and "json" in self.headers.get("content-type", ""):
            self._content = await beside_loop(
                self.app.state.service, body, partial(_parse_model, model)
            )


def _parse_model(model: Any, body: bytes) -> Any:
    value = _parse_json(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False), body=value) from error


class Route(APIRoute):
    """A route that parses bodies strictly, large ones in a thread, and answers HEAD like GET."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        # OpenAPI shows the first sentence of the function's docstring, not the function's name
        sentences = " ".join(self.description.split()).split(". ")
        self.summary = self.summary or sentences[0].removesuffix(".") or None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = None if self.body_field is None else self.body_field.field_info.annotation
        has_schema = isinstance(model, type) and issubclass(model, BaseModel)

        async def parse_and_handle(request: Any) -> Response:
            if has_schema:
                await request.parse_large_body(model)
            return await handle(request)

        async def handle_strictly(request: Request) -> Response:
            request = _StrictRequest(request.scope, request.receive)
            return await self.respond(parse_and_handle, request)

        return handle_strictly

    async def respond(
        self, handle: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response:
        """Call ``handle``. A subclass can override this to answer its errors in another way."""
        return await handle(request)

    # RFC 9110, 9.1: a server answers HEAD where it answers GET; uvicorn omits the body. HEAD is not
    # in `methods`, since OpenAPI would then list a second operation with the same id.

    def matches(self, scope: Any) -> Any:
        return super().matches({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "HEAD" and "GET" in (self.methods or ()):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)


# These dependencies are async: FastAPI would run others in a thread, which costs time.


async def _service(request: Request) -> Service:
    return request.app.state.service


async def _key(request: Request) -> Key:
    key = getattr(request.state, "key", None)
    if key is None:
        raise missing_key_refusal(request.headers)
    return key


async def _admin(key: Annotated[Key, Depends(_key)]) -> Key:
    if not key.admin:
        raise Refusal(
            403,
            f"key {key.name!r}, which is no admin key",
            "one with admin = true",
            "use another",
            code="admin_only",
        )
    return key


#: types of routes' parameters: the service, the request's key, and a key that must be an admin's
CurrentService = Annotated[Service, Depends(_service)]
ApiKey = Annotated[Key, Depends(_key)]
AdminKey = Annotated[Key, Depends(_admin)]


async def requested_adapters(
    service: Service, key: Key, model: str, blend: dict[str, float] | None
) -> dict[str, float]:
    """The adapters that a request names: {name: weight}, and {} for the base. ``Refusal``: a name
    does not exist or the key may not use it (404, with the same message in both cases), or
    ``blend`` is given and ``model`` is not the base (400)."""
    if blend is None:
        blend = {} if model == service.base else {model.removeprefix(f"{service.base}:"): 1.0}
    elif model != service.base:
        raise Refusal(
            400,
            f"adapters beside the model {model[:120]!r}",
            f"model {service.base!r}",
            "name the base, and each adapter in adapters",
            param="adapters",
        )
    # a blend whose weights are all zero is the base
    if not key.may_use(blend) or not (any(blend.values()) or key.base):
        raise refusal.no_such_model(next(iter(blend)) if len(blend) == 1 else model)
    if not all(map(service.catalogue.known, blend)):
        await asyncio.to_thread(service.catalogue.refresh)
        for name in blend:
            if not service.catalogue.known(name):
                raise refusal.no_such_model(name)
    return blend


async def resolve_blend(
    service: Service, key: Key, model: str, adapters: dict[str, float] | None
) -> dict[str, float]:
    """The weights of the adapters that a request names, by name. If ``model`` is a name of an
    extension, the extension says which adapters it stands for. ``Refusal``: there are no such
    adapters, or the key may not use them."""
    extension = service.extension_of(model) if adapters is None else None
    if extension is not None:
        return await extension.resolve_model(key, model)
    return await requested_adapters(service, key, model, adapters)


async def check_model(
    service: Service, key: Key, model: str, adapters: dict[str, float] | None = None
) -> None:
    """Check that the adapters that a request names exist and that the key may use them, without
    loading them. ``Refusal``: otherwise."""
    extension = service.extension_of(model) if adapters is None else None
    if extension is not None:
        extension.check_model(key, model)
    else:
        await requested_adapters(service, key, model, adapters)


def in_text_thread(service: Service, size: int, work: Callable[[], T]) -> asyncio.Future[T]:
    """Run ``work``, which uses the tokenizer, in the one thread for such work: a tokenizer of
    transformers has state, so two threads must not use it at once. ``size``: the characters of its
    texts. A large text takes a second, so the characters that wait are bounded: a short text must
    not wait behind forty large ones. ``Busy``: too many characters wait already."""
    if service.waiting_chars and service.waiting_chars + size > limits.WAITING_CHARS:
        raise Busy(
            sentence(
                f"{service.waiting_chars:,} characters that wait to be read",
                f"at most {limits.WAITING_CHARS:,}",
                "send it again later",
            ),
            2.0,
        )

    def release(_: Any) -> None:
        service.waiting_chars -= size

    service.waiting_chars += size
    # ``work`` sees the request's context variables (``request_log.CURRENT_RECORD``)
    run = copy_context().run
    running = asyncio.get_running_loop().run_in_executor(service.text_executor, run, work)
    running.add_done_callback(release)
    return running


async def read_texts(
    service: Service,
    texts: Sequence[Any],
    param: str,
    max_prompt_tokens: int,
    add_special_tokens: bool = True,
) -> list[tuple[int, ...]]:
    """Tokenise texts of at most ``max_prompt_tokens`` tokens each; lists of token ids are only
    checked. The tokenizer takes a group of texts at a time, so that other requests are not held up.
    ``param``: the body's field that has the texts, for errors."""
    tokens: list[tuple[int, ...]] = []

    def tokenize_text(text: Any) -> tuple[int, ...]:
        return prompts.prompt_tokens(
            service.tokenizer,
            text,
            service.vocabulary,
            max_prompt_tokens,
            param,
            add_special_tokens=add_special_tokens,
        )

    for group in prompts.group_texts(texts):
        tokens += await in_text_thread(
            service, sum(map(len, group)), lambda texts=group: list(map(tokenize_text, texts))
        )
    return tokens


async def await_or_undo(work: asyncio.Future[T], undo: Callable[[T], object]) -> T:
    """Await ``work``. If the caller is cancelled, ``work`` goes on, and ``undo`` is called with its
    result when it has ended."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: done.exception() or undo(done.result()))
        raise


async def unless_disconnected(request: Request, work: Any) -> Any:
    """Await ``work``. ``Refusal``: the client disconnected first, and ``work`` was cancelled."""

    async def wait_for_disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work_task = asyncio.ensure_future(work)
    disconnect_task = asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((work_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            raise Refusal(499, "a client that went away", "one that waits", "send it again")
        return work_task.result()
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)
