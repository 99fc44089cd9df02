"""The state that all HTTP routes share (``Service``), the class of the routes (``Route``), and the
parameters that FastAPI passes to the functions of routes: the service and the request's API key."""

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
    """A base model with its adapters, and everything that is needed to serve them to clients."""

    base: str  # the model name of the base in the API
    source: str  # the base as the operator named it: a folder, file, package or hub id
    tokenizer: Any
    bank: Any  # loads the adapters and holds them: a ``Bank``, or ``VllmAdapters``
    catalogue: Catalogue  # the names of adapters that clients may use
    keys: Keyring  # the API keys
    metrics: Metrics
    length: int  # context length: the most tokens of a prompt and its answer together
    vocabulary: int  # the number of token ids of the base
    # computes the answers: an ``Engine``, or a ``VllmProcess``; None if there is an embedder
    engine: Any = None
    embedder: Embedder | None = None  # computes embeddings; None for a causal model
    extensions: list[Extension] = field(default_factory=list)
    # the base's values for sampling fields that a request leaves out
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    tool_call_parser: str | None = None  # name of a parser; None: chosen by the chat template
    timeout: float = 600.0  # seconds that an answer may take
    # torch's name for the dtype of the base's weights; "auto" if vLLM chooses it
    dtype: str = "float32"
    hosts: tuple[str, ...] | None = None  # host names accepted in the Host header; None: all
    cors: tuple[str, ...] = ()  # origins whose web pages may send requests (CORS)
    docs: bool = False  # whether /docs is served
    tracer: Tracer | None = None  # sends an OpenTelemetry span for each request
    key_watch: KeyWatch | None = None  # reads the file of API keys again when it changes
    draining: bool = False  # whether the server is shutting down, so that it takes no new requests
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
        """Whether the service takes requests: it is not draining, and its engine and all of its
        extensions run."""
        engine_ready = self.engine is None or self.engine.ready
        extensions_ready = all(extension.ready for extension in self.extensions)
        return not self.draining and engine_ready and extensions_ready

    def extension_of(self, model: str) -> Extension | None:
        """The extension whose ``model_prefix`` the name ``model`` begins with, or None."""
        matching_extensions = (
            extension for extension in self.extensions if model.startswith(extension.model_prefix)
        )
        return next(matching_extensions, None)

    def unready_refusal(self) -> Refusal:
        """The refusal for a request that arrives while the service is not ``ready``."""
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
        """Refuse new requests from now on, and wait up to ``seconds`` until the running ones have
        ended."""
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
        # wait for a running load of an adapter, so that the change is recorded in served.json
        self.admin_executor.shutdown(cancel_futures=True)
        if self.tracer is not None:
            self.tracer.close()


async def beside_loop(service: Service, body: bytes, read_body: Callable[[bytes], T]) -> T:
    """The result of ``read_body(body)``. For a large body, it runs in a thread, because it may
    take seconds and would block the event loop meanwhile."""
    if len(body) <= limits.PARSED_INLINE:
        return read_body(body)
    return await asyncio.get_running_loop().run_in_executor(service.body_executor, read_body, body)


def _parse_json(body: bytes) -> Any:
    try:
        return parse(body)
    except ValueError as error:
        # an HTTPException, because FastAPI replaces any other error while it reads the body by a
        # response of its own
        raise HTTPException(
            400, sentence(f"no JSON ({error})", "a JSON object", "check the body")
        ) from error


class _StrictRequest(Request):
    """A request whose JSON body is parsed strictly (``untrusted.parse``). It is refused if it has,
    for example, duplicate keys, NaN, half of a surrogate pair, or too many levels."""

    _validated_body: Any = None

    async def json(self) -> Any:
        return (
            _parse_json(await self.body()) if self._validated_body is None else self._validated_body
        )

    async def parse_large_body(self, model: Any) -> None:
        """If the body is large, and JSON by its Content-Type, parse it and validate it in a thread,
        so that the event loop is not blocked. ``json`` then returns an instance of the pydantic
        class ``model``, which FastAPI accepts without validating it again. Any other body is left
        to ``json``.

        Raises:
            HTTPException: the body is no JSON.
            RequestValidationError: it does not fit ``model``.
        """
        body = await self.body()
        if len(body) > limits.PARSED_INLINE and "json" in self.headers.get("content-type", ""):
            self._validated_body = await beside_loop(
                self.app.state.service, body, partial(_parse_model, model)
            )


def _parse_model(model: Any, body: bytes) -> Any:
    value = _parse_json(body)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False), body=value) from error


class Route(APIRoute):
    """A route that refuses ambiguous JSON (``_StrictRequest``), parses large bodies in a thread,
    and answers HEAD requests as GET requests."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        # in the OpenAPI description, the summary is the first sentence of the function's docstring,
        # in place of the function's name
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
        """Call ``handle(request)``. A subclass can override this to turn the errors of ``handle``
        into responses of another format."""
        return await handle(request)

    # By RFC 9110, section 9.1, a server must answer HEAD where it answers GET; uvicorn omits the
    # body. HEAD is matched here and not listed in `methods`, because OpenAPI would then show a
    # second operation with the same id.

    def matches(self, scope: Any) -> Any:
        return super().matches({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "HEAD" and "GET" in (self.methods or ()):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)


# The following FastAPI dependencies are async although they await nothing, because FastAPI would
# run other functions in a thread, which costs time.


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


#: parameter types with which a route's function gets the service, the request's API key (refused
#: without one: 401), and the request's API key if it is an admin key (otherwise refused: 403)
CurrentService = Annotated[Service, Depends(_service)]
ApiKey = Annotated[Key, Depends(_key)]
AdminKey = Annotated[Key, Depends(_admin)]


async def requested_adapters(
    service: Service, key: Key, model: str, blend: dict[str, float] | None
) -> dict[str, float]:
    """The adapters that a request names, as {name: weight}; {} for the base.

    Args:
        model: the model name in the request: the base's, an adapter's, or "base:adapter".
        blend: the field ``adapters`` of the request; None if it has none.

    Raises:
        Refusal: a name does not exist or the key may not use it (404, with the same message in
            both cases), or the request has ``blend`` and ``model`` is not the base (400).
    """
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
    # a blend whose weights are all zero is computed by the base alone, so the key must be allowed
    # to use the base
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
    """The adapters that a request names, as {name: weight}; {} for the base. ``adapters``: the
    field of this name in the request, or None. If it is None and ``model`` begins with the prefix
    of an extension, the extension decides which adapters ``model`` stands for. ``Refusal``: those
    of ``requested_adapters`` or of the extension."""
    extension = service.extension_of(model) if adapters is None else None
    if extension is not None:
        return await extension.resolve_model(key, model)
    return await requested_adapters(service, key, model, adapters)


async def check_model(
    service: Service, key: Key, model: str, adapters: dict[str, float] | None = None
) -> None:
    """Check the adapters that a request names, without loading them. The arguments are those of
    ``resolve_blend``. ``Refusal``: they do not exist, or the key may not use them."""
    extension = service.extension_of(model) if adapters is None else None
    if extension is not None:
        extension.check_model(key, model)
    else:
        await requested_adapters(service, key, model, adapters)


def in_text_thread(service: Service, char_count: int, work: Callable[[], T]) -> asyncio.Future[T]:
    """Run ``work``, which uses the tokenizer, in the one thread for such work, and return a future
    of its result. A tokenizer of transformers has state, so two threads must not use it at once.

    Args:
        char_count: about how many characters ``work`` reads. Large texts take a second each. So
            that a short text does not wait for many of them, the sum of the characters that wait
            is limited.

    Raises:
        Busy: with ``char_count``, too many characters would wait. If none wait, any number may.
    """
    if service.waiting_chars and service.waiting_chars + char_count > limits.WAITING_CHARS:
        raise Busy(
            sentence(
                f"{service.waiting_chars:,} characters that wait to be read",
                f"at most {limits.WAITING_CHARS:,}",
                "send it again later",
            ),
            2.0,
        )

    def release(_: Any) -> None:
        service.waiting_chars -= char_count

    service.waiting_chars += char_count
    # run in a copy of the context, so that ``work`` sees the context variables of the request, such
    # as ``request_log.CURRENT_RECORD``
    run_in_context = copy_context().run
    work_future = asyncio.get_running_loop().run_in_executor(
        service.text_executor, run_in_context, work
    )
    work_future.add_done_callback(release)
    return work_future


async def read_texts(
    service: Service,
    texts: Sequence[Any],
    param: str,
    max_prompt_tokens: int,
    add_special_tokens: bool = True,
) -> list[tuple[int, ...]]:
    """The token ids of each of ``texts``. An element may also be a list of token ids, which is only
    checked. The texts are tokenised in small groups, so that other requests can use the tokenizer
    between two groups.

    Args:
        param: the name of the texts' field in the request body, for errors.
        max_prompt_tokens: a text that is far longer is refused (``prompts.check_fits``).
        add_special_tokens: whether the tokenizer puts special tokens around each text.

    Raises:
        Refusal, Busy: those of ``prompts.prompt_tokens`` and ``in_text_thread``.
    """
    token_lists: list[tuple[int, ...]] = []

    def tokenize_text(text: Any) -> tuple[int, ...]:
        return prompts.prompt_tokens(
            service.tokenizer,
            text,
            service.vocabulary,
            max_prompt_tokens,
            param,
            add_special_tokens=add_special_tokens,
        )

    for text_group in prompts.group_texts(texts):
        token_lists += await in_text_thread(
            service,
            sum(map(len, text_group)),
            lambda texts=text_group: list(map(tokenize_text, texts)),
        )
    return token_lists


async def await_or_undo(work_future: asyncio.Future[T], undo: Callable[[T], object]) -> T:
    """Await ``work_future``, whose work cannot be cancelled. If the awaiting task is cancelled, the
    work goes on, and when it has ended without an error, ``undo`` is called with its result, for
    example to release it."""
    try:
        return await asyncio.shield(work_future)
    except asyncio.CancelledError:
        work_future.add_done_callback(
            lambda ended_future: ended_future.exception() or undo(ended_future.result())
        )
        raise


async def unless_disconnected(request: Request, work: Any) -> Any:
    """Await ``work`` (an awaitable) and return its result. If the client of ``request`` disconnects
    first, ``work`` is cancelled. ``Refusal``: the client disconnected."""

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
