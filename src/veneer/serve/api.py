"""The HTTP application: OpenAI's routes, vLLM's routes for adapters, and routes for operators.
Routes only; ``tokenize.py`` and ``score.py`` have further routes of vLLM.

GET  /health /ready /metrics
GET  /v1/models  /v1/models/{id}  /v1/adapters
POST /v1/completions  /v1/chat/completions  /v1/embeddings  /v1/responses
     /v1/messages  /v1/messages/count_tokens (Anthropic's)
POST /v1/load_lora_adapter  /v1/unload_lora_adapter
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from veneer.errors import VeneerError, sentence
from veneer.serve import docs_page, limits, prompts, refusal, score, tokenize
from veneer.serve.access import Key
from veneer.serve.answers import Form, failure
from veneer.serve.embed import as_base64
from veneer.serve.guard import Guard
from veneer.serve.messages.answer import MessagesView
from veneer.serve.messages.request import CountRequest, MessagesRequest
from veneer.serve.prompt_form import prompt_form
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy, RequestError
from veneer.serve.requests import Request as Job
from veneer.serve.responses.answer import ResponsesView
from veneer.serve.responses.request import ResponsesRequest
from veneer.serve.schemas import (
    Asked,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LoadRequest,
    UnloadRequest,
)
from veneer.serve.score import embedder_of, vectors_of
from veneer.serve.service import (
    Admin,
    Asker,
    Route,
    Service,
    Serving,
    in_text_thread,
    requested_adapters,
    unless_gone,
)
from veneer.serve.submission import EventStream, submit
from veneer.serve.tools.choose import CallReading, call_reading

Tokens = list[tuple[int, ...]]

#: what an operator and the page need, whoever computes the answers
operations = APIRouter(route_class=Route)
router = APIRouter(route_class=Route)
CORE = (operations, router, tokenize.router, score.router)


def create(service: Service, *routers: Any, core: Sequence[APIRouter] = CORE) -> FastAPI:
    """The application of a service; ``routers`` are added to its own, ``core``."""
    app = FastAPI(title="Veneer", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.service = service
    for core_router in core:
        app.include_router(core_router)
    for extension in service.extensions:
        routers = (*extension.routers, *routers)
    if service.docs:
        routers = (*routers, docs_page.router)
    for added_router in routers:
        app.include_router(added_router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(VeneerError, _veneer)
    app.add_middleware(Guard, service=service)
    return app


def _invalid(request: Request, error: Any) -> Response:
    """The answer to an invalid body: which field is wrong and why, without its content."""
    return refusal.of_body(error.errors(), error.body).response(request.url.path)


def _http(request: Request, error: Any) -> Response:
    message = error.detail
    if error.status_code != 400:
        problem = f"{request.method} {request.url.path[:200]}"
        message = sentence(problem, "a route of this server", "see /openapi.json")
    refused = Refusal(error.status_code, message, headers=error.headers)
    return refused.response(request.url.path)


def _veneer(request: Request, error: Any) -> Response:
    service: Service = request.app.state.service
    if (
        isinstance(error, Busy) and not service.ready
    ):  # it ended while a prompt was read, or its engine died
        error = service.unready()
    return refusal.of(error).response(request.url.path)


@operations.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@operations.get("/ready")
async def ready(service: Serving) -> Response:
    """Whether requests are taken, with the extensions that are there."""
    if not service.ready:
        raise service.unready()
    extensions = [extension.path_prefix for extension in service.extensions]
    return JSONResponse({"status": "ready", "extensions": extensions})


@operations.get("/metrics")
async def metrics(service: Serving, key: Admin, adapters: bool = True) -> Response:
    """Prometheus's metrics; ``adapters=0`` gives sums over the adapters."""
    service.metrics.ready.set(service.ready)
    page = await asyncio.to_thread(service.metrics.page, adapters=adapters)
    return PlainTextResponse(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _card(service: Service, name: str | None) -> dict[str, Any]:
    common = {"object": "model", "created": service.started, "owned_by": "veneer"}
    common |= {"max_model_len": service.length, "dtype": service.dtype}
    if name is None:
        return {"id": service.base, **common, "root": service.source, "parent": None}
    return {"id": name, **common, "root": service.catalogue.root(name), "parent": service.base}


@operations.get("/v1/models")
async def models(service: Serving, key: Asker) -> dict[str, Any]:
    """The base and the adapters that the key may use."""
    names = await asyncio.to_thread(service.catalogue.refresh)
    cards = [_card(service, None)] if key.base else []
    return {
        "object": "list",
        "data": cards + [_card(service, name) for name in names if key.sees(name)],
    }


@operations.get("/v1/models/{model:path}")
async def model(model: str, service: Serving, key: Asker) -> dict[str, Any]:
    """A model, with the form of prompt that it was trained on."""
    blend = await requested_adapters(service, key, model, None)
    name = next(iter(blend), None)
    folder = None if name is None else service.catalogue.folder_of(name)
    form = await asyncio.to_thread(prompt_form, folder, service.tokenizer)
    return {**_card(service, name), "prompt": form}


@operations.get("/v1/adapters")
async def adapters(service: Serving, key: Asker) -> list[dict[str, Any]]:
    """The adapters that the key may use: whether each is in memory, its bytes and its users."""
    await asyncio.to_thread(service.catalogue.refresh)
    fields = ("name", "resident", "bytes", "pinned", "users", "rank", "variant")
    status = await asyncio.to_thread(service.bank.status)
    is_served = service.catalogue.known  # the bank also holds adapters in training
    visible = sorted(
        (entry for entry in status if is_served(entry.name) and key.sees(entry.name)),
        key=lambda entry: entry.name,
    )
    return [{field: getattr(entry, field) for field in fields} for entry in visible]


@operations.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadRequest, service: Serving, key: Admin) -> Response:
    """Load an adapter, or another one under a name that is served."""
    load = partial(service.catalogue.load, inplace=body.load_inplace, pin=body.pin)
    await asyncio.get_running_loop().run_in_executor(
        service.admin, load, body.lora_name, body.lora_path
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@operations.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadRequest, service: Serving, key: Admin) -> Response:
    """Take an adapter off the server. Its files stay."""
    await asyncio.get_running_loop().run_in_executor(
        service.admin, service.catalogue.unload, body.lora_name
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, service: Serving, key: Asker
) -> Response:
    """Answers to a chat, as OpenAI's API has them."""
    return await _answer_chat(request, body)


@router.post("/v1/responses")
async def responses(
    body: ResponsesRequest, request: Request, service: Serving, key: Asker
) -> Response:
    """An answer in the form of OpenAI's Responses API."""
    names = {"messages": "input", "response_format": "text"}
    return await _answer_chat(
        request, body.chat(), lambda form: ResponsesView(form, body), names=names
    )


@router.post("/v1/messages")
async def messages(
    body: MessagesRequest, request: Request, service: Serving, key: Asker
) -> Response:
    """An answer in the form of Anthropic's Messages API."""
    return await _answer_chat(
        request, body.chat(), lambda form: MessagesView(form, body), prefix="toolu"
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, service: Serving, key: Asker) -> dict[str, int]:
    """The number of tokens of a prompt, in the form of Anthropic's API."""
    await requested_adapters(service, key, body.model, body.adapters)
    prompt, _ = await _read_chat(service, body.chat())
    return {"input_tokens": len(prompt)}


async def _answer_chat(
    request: Request, body: ChatRequest, view: Callable[[Form], Any] = lambda form: form,
    prefix: str = "call", names: Mapping[str, str] | None = None,
) -> Response:  # fmt: skip
    """The answers to a chat; ``view`` converts OpenAI's form to another API's. The ids of tool
    calls begin with ``prefix``. ``names``: the client's field names, by those of a chat request."""
    service: Service = request.app.state.service
    key: Key = request.state.key
    if body.forced_tool is not None or body.strict_tools:  # whose schemas are in the answer's
        names = {**(names or {}), "response_format": "tools"}
    try:
        blend = await _may_generate(service, key, body)
        prompt, reading = await _read_chat(service, body, prefix)
        token_limit = body.token_limit()
        prompt = prompts.cut(prompt, body.truncate_prompt_tokens, token_limit, service.length)
        most = prompts.room([prompt], token_limit, service.length, short=False)
        heads = [body.messages[-1].text] * body.n if body.echo else []
        form = Form(body, [prompt], heads, key.admin, reading)
        return await _answer(request, body, blend, [prompt], most, form, view(form))
    except Refusal as refused:
        refused.param = (names or {}).get(refused.param or "", refused.param)
        raise
    except RequestError as error:  # a schema that cannot be followed
        if body.forced_tool is None and not body.strict_tools:
            raise
        raise Refusal(400, str(error), param="tools") from error


async def _read_chat(
    service: Service, body: ChatRequest, prefix: str = "call"
) -> tuple[tuple[int, ...], CallReading | None]:
    """The tokens of a chat, and how tool calls are parsed from its answers, if tools may be
    called."""
    callable_tools = body.callable_tools()
    tools = [tool.plain() for tool in callable_tools]
    readable = prompts.readable(service.length, body.truncate_prompt_tokens)

    def read() -> tuple[tuple[int, ...], CallReading | None]:
        prompt = prompts.chat(
            service.tokenizer,
            body.messages,
            readable,
            tools,
            body.template_arguments(),
            add_special_tokens=body.add_special_tokens,
        )
        if not tools:
            return prompt, None
        schemas = {tool.function.name: tool.function.parameters or {} for tool in callable_tools}
        prompts.check_schema({name: schemas[name] for name in body.strict_tools})
        reading = call_reading(
            schemas,
            body.forced_tool,
            service.tokenizer,
            service.tool_call_parser,
            prefix,
            body.strict_tools,
        )
        return prompt, reading

    return await in_text_thread(service, prompts.chat_size(body.messages, tools), read)


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, service: Serving, key: Asker
) -> Response:
    """Texts that go on from prompts, as OpenAI's API has them."""
    blend = await _may_generate(service, key, body)
    sent, truncate, length = body.prompt, body.truncate_prompt_tokens, service.length
    if len(sent) * body.n > limits.ANSWERS:
        problem = f"{len(sent)} prompts with n = {body.n}"
        raise Refusal(
            400, problem, f"at most {limits.ANSWERS} answers", "send several requests", param="n"
        )
    read_tokens = await read_texts(
        service, sent, "prompt", prompts.readable(length, truncate), body.add_special_tokens
    )
    tokens = [prompts.cut(prompt, truncate, body.max_tokens, length) for prompt in read_tokens]
    most = prompts.room(tokens, body.max_tokens, length, short=True)

    def echo_texts() -> list[str]:
        """The texts of the prompts; of a truncated prompt, the rest."""
        return [
            text
            if isinstance(text, str) and len(prompt) == len(uncut)
            else service.tokenizer.decode(prompt)
            for text, uncut, prompt in zip(sent, read_tokens, tokens, strict=True)
        ]

    texts = await in_text_thread(service, sum(map(len, tokens)), echo_texts) if body.echo else []
    form = Form(body, tokens, [text for text in texts for _ in range(body.n)], key.admin)
    return await _answer(request, body, blend, tokens, most, form, form)


async def read_texts(
    service: Service,
    sent: Sequence[Any],
    param: str,
    length: int,
    add_special_tokens: bool = True,
) -> Tokens:
    """The tokens of texts, each at most ``length``. Between two groups of texts, other requests get
    their turn at the tokenizer."""
    tokens: Tokens = []

    def read(text: Any) -> tuple[int, ...]:
        return prompts.plain(
            service.tokenizer,
            text,
            service.vocabulary,
            length,
            param,
            add_special_tokens=add_special_tokens,
        )

    for group in prompts.groups(sent):
        tokens += await in_text_thread(
            service, sum(map(len, group)), lambda texts=group: list(map(read, texts))
        )
    return tokens


async def _may_generate(service: Service, key: Key, body: Asked) -> dict[str, float]:
    extension = service.extension_of(body.model) if body.adapters is None else None
    if extension is not None:
        blend = await extension.resolve_model(key, body.model)
    else:
        blend = await requested_adapters(service, key, body.model, body.adapters)
    if service.engine is None:
        message = sentence(
            "an encoder", "a causal language model", "use /v1/embeddings, or serve another base"
        )
        raise Refusal(400, message, param="model", code="not_generative")
    prompts.check_grammar(body.schema_of_answer(), body.grammar_of_answer())
    return blend


async def _answer(
    request: Request,
    body: Asked,
    blend: dict[str, float],
    tokens: Tokens,
    most: int,
    form: Form,
    view: Any,
) -> Response:
    """``body.n`` answers to each prompt, of at most ``most`` tokens each, in the form of
    ``view``."""
    service: Service = request.app.state.service
    key: Key = request.state.key
    _check_prompt_logprobs(body, tokens)
    if body.min_tokens > most:
        problem, expected = f"min_tokens {body.min_tokens}", f"at most {most}, which there may be"
        raise Refusal(400, problem, expected, "ask for fewer", param="min_tokens")
    bad_words: list[tuple[int, ...]] = []
    if body.bad_words:
        size = sum(map(len, body.bad_words))
        work = partial(prompts.word_tokens, service.tokenizer, body.bad_words)
        bad_words = await in_text_thread(service, size, work)
    jobs = [
        Job(
            prompt,
            blend,
            replace(body.sampling(most, number, service.sampling, bad_words), **form.sampling),
            service.timeout,
            f"{form.id}-{number}",
            key.owner,
            body.cache_salt,
            body.priority,
        )
        for number, prompt in enumerate(prompt for prompt in tokens for _ in range(body.n))
    ]
    answers = await submit(service, key, jobs)
    if not body.stream:
        try:
            content = await unless_gone(request, view.complete(answers))
        finally:
            answers.cancel()  # even if it never began
        return (
            await asyncio.to_thread(JSONResponse, content) if form.large else JSONResponse(content)
        )
    with ExitStack() as otherwise:
        otherwise.callback(answers.cancel)
        pieces = answers.pieces()
        first = await unless_gone(
            request, anext(pieces)
        )  # an answer that fails before it starts has an HTTP status
        if refused := failure(first[1], form.candid):
            raise refused
        otherwise.pop_all()
    return EventStream(answers, view.events(first, pieces))


def _check_prompt_logprobs(body: Asked, tokens: Tokens) -> None:
    """Refuse a call that requests more log-probabilities of prompts than an answer may have."""
    alternatives = body.prompt_alternatives()
    if alternatives is None:
        return
    count = (1 + alternatives) * body.n * sum(map(len, tokens))
    if count > limits.PROMPT_LOGPROBS:
        problem = f"{count:,} log-probabilities of prompts"
        expected = f"at most {limits.PROMPT_LOGPROBS:,}"
        param = "echo" if body.prompt_logprobs is None else "prompt_logprobs"
        raise Refusal(400, problem, expected, "send fewer prompts at once", param=param)


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: Serving, key: Asker
) -> Response:
    """Vectors of texts; an encoder's."""
    blend = await requested_adapters(service, key, body.model, body.adapters)
    embedder = embedder_of(service)
    if body.dimensions not in (None, embedder.width):
        message = sentence(
            f"dimensions {body.dimensions}", f"{embedder.width}, the model's own", "leave it out"
        )
        raise Refusal(400, message, param="dimensions")
    tokens = await read_texts(service, body.input, "input", service.length)
    longest = max(map(len, tokens))
    if longest > service.length:
        message = sentence(
            f"an input of {longest} tokens", f"at most {service.length}", "shorten it"
        )
        raise Refusal(400, message, param="input", code="context_length_exceeded")
    vectors = await vectors_of(request, service, key, tokens, blend)
    form = as_base64 if body.encoding_format == "base64" else lambda vector: vector.tolist()
    data = [
        {"object": "embedding", "index": i, "embedding": form(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, tokens)))
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})
