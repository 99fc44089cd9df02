"""The HTTP application: OpenAI's and Anthropic's routes, vLLM's routes for adapters, and routes for
operators. ``encoder_routes.py`` and ``tokenize.py`` hold further routes.

GET  /health /ready /metrics
GET  /v1/models  /v1/models/{id}  /v1/adapters
POST /v1/completions  /v1/chat/completions  /v1/responses
     /v1/messages  /v1/messages/count_tokens (Anthropic's)
POST /v1/load_lora_adapter  /v1/unload_lora_adapter
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from veneer.errors import VeneerError, sentence
from veneer.serve import docs_page, encoder_routes, limits, prompts, refusal, tokenize
from veneer.serve.access import Key
from veneer.serve.answers import AnswerWriter, failure
from veneer.serve.guard import Guard
from veneer.serve.messages.answer import MessagesView
from veneer.serve.messages.request import CountRequest, MessagesRequest
from veneer.serve.prompt_form import prompt_form
from veneer.serve.refusal import Refusal
from veneer.serve.requests import Busy, RequestError
from veneer.serve.requests import Request as EngineRequest
from veneer.serve.responses.answer import ResponsesView
from veneer.serve.responses.request import ResponsesRequest
from veneer.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    LoadRequest,
    UnloadRequest,
)
from veneer.serve.service import (
    AdminKey,
    ApiKey,
    CurrentService,
    Route,
    Service,
    check_model,
    in_text_thread,
    read_texts,
    requested_adapters,
    resolve_blend,
    unless_disconnected,
)
from veneer.serve.submission import EventStream, submit
from veneer.serve.tools.choose import CallReading, call_reading

TokenizedPrompts = list[tuple[int, ...]]

#: routes for operators and the web page. A server in front of vLLM (``vllm_front.py``) has them too
operations = APIRouter(route_class=Route)
#: routes that Veneer's own engine answers
router = APIRouter(route_class=Route)
CORE_ROUTERS = (operations, router, tokenize.router, encoder_routes.router)


def create(service: Service, *routers: Any, core: Sequence[APIRouter] = CORE_ROUTERS) -> FastAPI:
    """The FastAPI application of a service. Its routes are those of ``core`` (the server's own
    routers), of ``routers``, and of the service's extensions."""
    app = FastAPI(title="Veneer", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.service = service
    extension_routers = [
        extension_router
        for extension in service.extensions
        for extension_router in extension.routers
    ]
    docs_routers = [docs_page.router] if service.docs else []
    for included_router in (*core, *extension_routers, *routers, *docs_routers):
        app.include_router(included_router)
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(VeneerError, _answer_veneer_error)
    app.add_middleware(Guard, service=service)
    return app


def _answer_invalid_body(request: Request, error: Any) -> Response:
    """Answer an invalid body with the name of the invalid field and the reason."""
    return refusal.body_refusal(error.errors(), error.body).response(request.url.path)


def _answer_http_error(request: Request, error: Any) -> Response:
    message = error.detail
    if error.status_code != 400:
        problem = f"{request.method} {request.url.path[:200]}"
        message = sentence(problem, "a route of this server", "see /openapi.json")
    refused = Refusal(error.status_code, message, headers=error.headers)
    return refused.response(request.url.path)


def _answer_veneer_error(request: Request, error: Any) -> Response:
    service: Service = request.app.state.service
    # the engine may have stopped while the prompt was read: then answer as ``/ready`` does
    if isinstance(error, Busy) and not service.ready:
        error = service.unready_refusal()
    return refusal.error_refusal(error).response(request.url.path)


@operations.get("/health")
async def health() -> dict[str, str]:
    """Answer as long as the process lives."""
    return {"status": "ok"}


@operations.get("/ready")
async def ready(service: CurrentService) -> Response:
    """Answer with the path prefixes of the extensions, or with 503 if requests are not taken."""
    if not service.ready:
        raise service.unready_refusal()
    extensions = [extension.path_prefix for extension in service.extensions]
    return JSONResponse({"status": "ready", "extensions": extensions})


@operations.get("/metrics")
async def metrics(service: CurrentService, key: AdminKey, adapters: bool = True) -> Response:
    """Metrics for Prometheus; ``adapters=0`` gives sums over all adapters."""
    service.metrics.ready.set(service.ready)
    metrics_page = await asyncio.to_thread(service.metrics.page, adapters=adapters)
    return PlainTextResponse(metrics_page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _model_card(service: Service, name: str | None) -> dict[str, Any]:
    """The model object of OpenAI's API for an adapter, or for the base if ``name`` is None."""
    shared_fields = {
        "object": "model",
        "created": service.started,
        "owned_by": "veneer",
        "max_model_len": service.length,
        "dtype": service.dtype,
    }
    if name is None:
        return {"id": service.base, **shared_fields, "root": service.source, "parent": None}
    root = service.catalogue.root(name)
    return {"id": name, **shared_fields, "root": root, "parent": service.base}


@operations.get("/v1/models")
async def models(service: CurrentService, key: ApiKey) -> dict[str, Any]:
    """The base and the adapters that the key may use."""
    names = await asyncio.to_thread(service.catalogue.refresh)
    cards = [_model_card(service, None)] if key.base else []
    return {
        "object": "list",
        "data": cards + [_model_card(service, name) for name in names if key.sees(name)],
    }


@operations.get("/v1/models/{model:path}")
async def model(model: str, service: CurrentService, key: ApiKey) -> dict[str, Any]:
    """A model, with the format in which clients should write prompts for it."""
    blend = await requested_adapters(service, key, model, None)
    name = next(iter(blend), None)
    folder = None if name is None else service.catalogue.folder_of(name)
    prompt_format = await asyncio.to_thread(prompt_form, folder, service.tokenizer)
    return {**_model_card(service, name), "prompt": prompt_format}


@operations.get("/v1/adapters")
async def adapters(service: CurrentService, key: ApiKey) -> list[dict[str, Any]]:
    """The adapters that the key may use. Each entry says whether the adapter is in memory, its
    size in bytes and the number of requests that use it."""
    await asyncio.to_thread(service.catalogue.refresh)
    field_names = ("name", "resident", "bytes", "pinned", "users", "rank", "variant")
    status = await asyncio.to_thread(service.bank.status)
    is_served = service.catalogue.known  # the bank also holds adapters in training: leave these out
    visible_entries = sorted(
        (entry for entry in status if is_served(entry.name) and key.sees(entry.name)),
        key=lambda entry: entry.name,
    )
    return [
        {field_name: getattr(entry, field_name) for field_name in field_names}
        for entry in visible_entries
    ]


@operations.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadRequest, service: CurrentService, key: AdminKey) -> Response:
    """Load an adapter under a new name, or replace the adapter of a served name."""
    load = partial(service.catalogue.load, inplace=body.load_inplace, pin=body.pin)
    await asyncio.get_running_loop().run_in_executor(
        service.admin_executor, load, body.lora_name, body.lora_path
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@operations.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(
    body: UnloadRequest, service: CurrentService, key: AdminKey
) -> Response:
    """Stop serving an adapter. Its files stay."""
    await asyncio.get_running_loop().run_in_executor(
        service.admin_executor, service.catalogue.unload, body.lora_name
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Answer a chat, as OpenAI's Chat Completions API does."""
    return await _answer_chat(request, body)


@router.post("/v1/responses")
async def responses(
    body: ResponsesRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Answer a chat, as OpenAI's Responses API does."""
    return await _answer_chat(
        request,
        body.chat(),
        lambda writer: ResponsesView(writer, body),
        client_names={"messages": "input", "response_format": "text"},
    )


@router.post("/v1/messages")
async def messages(
    body: MessagesRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Answer a chat, as Anthropic's Messages API does."""
    return await _answer_chat(
        request, body.chat(), lambda writer: MessagesView(writer, body), call_prefix="toolu"
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, service: CurrentService, key: ApiKey) -> dict[str, int]:
    """The number of tokens of a prompt, as Anthropic's API counts them."""
    await check_model(service, key, body.model, body.adapters)
    prompt, _ = await _read_chat(service, body.chat())
    return {"input_tokens": len(prompt)}


async def _answer_chat(
    request: Request,
    body: ChatRequest,
    make_view: Callable[[AnswerWriter], Any] = lambda writer: writer,
    call_prefix: str = "call",
    client_names: Mapping[str, str] | None = None,
) -> Response:
    """Answer a chat.

    Args:
        make_view: makes from the writer an object that writes the answers in the format of the
            client's API; the writer itself writes the format of Chat Completions.
        call_prefix: the ids of tool calls begin with it.
        client_names: for an error about a field of ``body``, the field's name in the client's API.
    """
    service: Service = request.app.state.service
    key: Key = request.state.key
    if body.forced_tool is not None or body.strict_tools:
        # the tools then give the JSON schema of the answer, so an error about it is one of
        # ``tools``
        client_names = {**(client_names or {}), "response_format": "tools"}
    try:
        blend = await _authorized_blend(service, key, body)
        prompt, call_parsing = await _read_chat(service, body, call_prefix)
        token_limit = body.token_limit()
        prompt = prompts.truncate_prompt(
            prompt, body.truncate_prompt_tokens, token_limit, service.length
        )
        max_tokens = prompts.answer_token_limit([prompt], token_limit, service.length, is_chat=True)
        echoed_texts = [body.messages[-1].text] * body.n if body.echo else []
        writer = AnswerWriter(body, [prompt], echoed_texts, key.admin, call_parsing)
        return await _generate_response(
            request, body, blend, [prompt], max_tokens, writer, make_view(writer)
        )
    except Refusal as refused:
        refused.param = (client_names or {}).get(refused.param or "", refused.param)
        raise
    except RequestError as error:  # the JSON schema of the answer cannot be compiled
        if body.forced_tool is None and not body.strict_tools:
            raise
        raise Refusal(400, str(error), param="tools") from error


async def _read_chat(
    service: Service, body: ChatRequest, call_prefix: str = "call"
) -> tuple[tuple[int, ...], CallReading | None]:
    """Tokenise a chat. Returns its tokens, and how tool calls are parsed from its answers: None if
    no tool may be called."""
    callable_tools = body.callable_tools()
    tools = [tool.template_dict() for tool in callable_tools]
    max_prompt_tokens = prompts.max_prompt_tokens(service.length, body.truncate_prompt_tokens)

    def tokenize_chat() -> tuple[tuple[int, ...], CallReading | None]:
        prompt = prompts.chat_tokens(
            service.tokenizer,
            body.messages,
            max_prompt_tokens,
            tools,
            body.template_arguments(),
            add_special_tokens=body.add_special_tokens,
        )
        if not tools:
            return prompt, None
        schemas = {tool.function.name: tool.function.parameters or {} for tool in callable_tools}
        prompts.check_schema({name: schemas[name] for name in body.strict_tools}, "tools")
        call_parsing = call_reading(
            schemas,
            body.forced_tool,
            service.tokenizer,
            service.tool_call_parser,
            call_prefix,
            body.strict_tools,
        )
        return prompt, call_parsing

    return await in_text_thread(service, prompts.chat_size(body.messages, tools), tokenize_chat)


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Continue prompts, as OpenAI's Completions API does."""
    blend = await _authorized_blend(service, key, body)
    prompt_inputs, truncated_length, context_length = (
        body.prompt,
        body.truncate_prompt_tokens,
        service.length,
    )
    if len(prompt_inputs) * body.n > limits.ANSWERS:
        raise Refusal(
            400,
            f"{len(prompt_inputs)} prompts with n = {body.n}",
            f"at most {limits.ANSWERS} answers",
            "send several requests",
            param="n",
        )
    uncut_prompts = await read_texts(
        service,
        prompt_inputs,
        "prompt",
        prompts.max_prompt_tokens(context_length, truncated_length),
        body.add_special_tokens,
    )
    cut_prompts = [
        prompts.truncate_prompt(prompt, truncated_length, body.max_tokens, context_length)
        for prompt in uncut_prompts
    ]
    max_tokens = prompts.answer_token_limit(
        cut_prompts, body.max_tokens, context_length, is_chat=False
    )

    def echo_texts() -> list[str]:
        """The text of each prompt, without what was truncated. A prompt that the client sent as
        tokens is decoded."""
        return [
            text
            if isinstance(text, str) and len(prompt) == len(uncut_prompt)
            else service.tokenizer.decode(prompt)
            for text, uncut_prompt, prompt in zip(
                prompt_inputs, uncut_prompts, cut_prompts, strict=True
            )
        ]

    echoed_texts: list[str] = []
    if body.echo:
        echoed_texts = await in_text_thread(service, sum(map(len, cut_prompts)), echo_texts)
    repeated_texts = [text for text in echoed_texts for _ in range(body.n)]
    writer = AnswerWriter(body, cut_prompts, repeated_texts, key.admin)
    return await _generate_response(request, body, blend, cut_prompts, max_tokens, writer, writer)


async def _authorized_blend(
    service: Service, key: Key, body: GenerationRequest
) -> dict[str, float]:
    """The adapters that a generation request names, with their weights. ``Refusal``: the key may
    not use them, the base is no causal language model, or the requested grammar is too large."""
    blend = await resolve_blend(service, key, body.model, body.adapters)
    if service.engine is None:
        raise Refusal(
            400,
            "an encoder",
            "a causal language model",
            "use /v1/embeddings, or serve another base",
            param="model",
            code="not_generative",
        )
    prompts.check_grammar(body.schema_of_answer(), body.grammar_of_answer(), body.schema_param())
    return blend


async def _generate_response(
    request: Request,
    body: GenerationRequest,
    blend: dict[str, float],
    tokenized_prompts: TokenizedPrompts,
    max_tokens: int,
    writer: AnswerWriter,
    view: Any,
) -> Response:
    """Submit ``body.n`` engine requests for each of the ``tokenized_prompts``, and answer with
    their results in the format of ``view``. ``blend``: adapter weights by name. ``max_tokens``: the
    most tokens of each answer."""
    service: Service = request.app.state.service
    key: Key = request.state.key
    _check_prompt_logprobs(body, tokenized_prompts)
    _check_min_tokens(body, max_tokens)
    bad_word_tokens: list[tuple[int, ...]] = []
    if body.bad_words:
        char_count = sum(map(len, body.bad_words))
        tokenize_words = partial(prompts.word_tokens, service.tokenizer, body.bad_words)
        bad_word_tokens = await in_text_thread(service, char_count, tokenize_words)
    engine_requests = [
        EngineRequest(
            prompt,
            blend,
            replace(
                body.sampling(max_tokens, answer_index, service.sampling, bad_word_tokens),
                **writer.sampling,
            ),
            service.timeout,
            f"{writer.id}-{answer_index}",
            key.owner,
            body.cache_salt,
            body.priority,
        )
        for answer_index, prompt in enumerate(
            prompt for prompt in tokenized_prompts for _ in range(body.n)
        )
    ]
    answers = await submit(service, key, engine_requests)
    if not body.stream:
        try:
            content = await unless_disconnected(request, view.complete(answers))
        finally:
            answers.cancel()  # even if ``complete`` never started, since the client was gone
        return (
            await asyncio.to_thread(JSONResponse, content)
            if writer.is_large
            else JSONResponse(content)
        )
    pieces = answers.pieces()
    try:
        # an answer that fails at once gets an HTTP error status, so wait for the first piece
        first_piece = await unless_disconnected(request, anext(pieces))
        if refused := failure(first_piece[1], writer):
            raise refused
    except BaseException:
        answers.cancel()
        raise
    return EventStream(answers, view.events(first_piece, pieces))


def _check_min_tokens(body: GenerationRequest, max_tokens: int) -> None:
    """Refuse a ``min_tokens`` above ``max_tokens``, the most tokens of an answer."""
    if body.min_tokens > max_tokens:
        raise Refusal(
            400,
            f"min_tokens {body.min_tokens}",
            f"at most {max_tokens}, which there may be",
            "ask for fewer",
            param="min_tokens",
        )


def _check_prompt_logprobs(body: GenerationRequest, tokenized_prompts: TokenizedPrompts) -> None:
    """Refuse a request for more log-probabilities of prompt tokens than one response may have."""
    alternative_count = body.prompt_alternative_count()
    if alternative_count is None:
        return
    logprob_count = (1 + alternative_count) * body.n * sum(map(len, tokenized_prompts))
    if logprob_count > limits.PROMPT_LOGPROBS:
        raise Refusal(
            400,
            f"{logprob_count:,} log-probabilities of prompts",
            f"at most {limits.PROMPT_LOGPROBS:,}",
            "send fewer prompts at once",
            param="echo" if body.prompt_logprobs is None else "prompt_logprobs",
        )
