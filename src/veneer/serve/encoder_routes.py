"""Routes for encoders and classifiers. They embed texts (OpenAI's route), score pairs of texts, and
rank documents by their scores for a query (vLLM's and Jina's routes).

    POST /v1/embeddings                     input → a vector for each text
    POST /score  /v1/score                  text_1, text_2 → a score for each pair
    POST /rerank  /v1/rerank  /v2/rerank    query, documents → results, the best first

If the base is an encoder, the score of a pair is the cosine of the two vectors. If the base is a
classifier with one label, it reads both texts together, and the score is the sigmoid of its logit.
The score is the logit itself if the config names the identity as activation, or if the request has
``use_activation: false``.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Self

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from veneer.errors import AdapterError, SelectionError
from veneer.serve import limits, prompts
from veneer.serve.access import Key
from veneer.serve.answers import refusal_of_cause
from veneer.serve.body_rules import Strict
from veneer.serve.embed import Embedder, as_base64
from veneer.serve.refusal import Refusal, value_error
from veneer.serve.requests import error_kind_of
from veneer.serve.sampling_fields import Truncation
from veneer.serve.schemas import EmbeddingRequest, ModelRequest, as_list
from veneer.serve.service import (
    ApiKey,
    CurrentService,
    Route,
    Service,
    in_text_thread,
    read_texts,
    requested_adapters,
    unless_disconnected,
)

router = APIRouter(route_class=Route)

Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)]


class PairRequest(ModelRequest):
    """The fields that score and rerank requests share."""

    truncate_prompt_tokens: Truncation | None = None
    use_activation: bool = True


#: other names that vLLM accepts for ``text_1`` and ``text_2``, the first and the second texts of
#: pairs
PAIR_NAMES = {
    "queries": "text_1",
    "data_1": "text_1",
    "documents": "text_2",
    "items": "text_2",
    "data_2": "text_2",
}


class ScoreRequest(PairRequest):
    """Pairs of texts to score. ``text_1`` has one text for all texts of ``text_2``, or one for each
    of them. Both fields may have other names (``PAIR_NAMES``)."""

    text_1: Annotated[str | Texts, AfterValidator(as_list)]
    text_2: Annotated[str | Texts, AfterValidator(as_list)]

    @model_validator(mode="before")
    @classmethod
    def _rename_fields(cls, data: Any) -> Any:
        sent_aliases = [name for name in PAIR_NAMES if isinstance(data, dict) and name in data]
        for name in sent_aliases:
            field = PAIR_NAMES[name]
            if field in data or [PAIR_NAMES[alias] for alias in sent_aliases].count(field) > 1:
                raise value_error(f"{name} beside another name of it", "one", f"send {field}", name)
        return {PAIR_NAMES.get(name, name): data[name] for name in data} if sent_aliases else data

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        first_count, second_count = len(self.text_1), len(self.text_2)
        if first_count not in (1, second_count):
            raise value_error(
                f"{first_count} texts in text_1 and {second_count} in text_2",
                "one, or as many",
                "send as many as in text_2",
                "text_1",
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        first_texts = self.text_1 * (len(self.text_2) // len(self.text_1))
        return list(zip(first_texts, self.text_2, strict=True))


class Document(Strict):
    text: str


class RerankRequest(PairRequest):
    """A query and the documents to rank. ``top_n``: the number of documents to return; 0: all."""

    query: str
    documents: Annotated[
        list[str | Document], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)
    ]
    top_n: Annotated[int, Field(ge=0, lt=2**31)] = 0
    return_documents: bool = True

    def texts(self) -> list[str]:
        return [
            document if isinstance(document, str) else document.text for document in self.documents
        ]


@router.post("/v1/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Embed texts, if the base is an encoder."""
    blend = await requested_adapters(service, key, body.model, body.adapters)
    embedder = _embedder_of(service)
    if body.dimensions not in (None, embedder.width):
        raise Refusal(
            400,
            f"dimensions {body.dimensions}",
            f"{embedder.width}, the model's own",
            "leave it out",
            param="dimensions",
        )
    token_ids = await read_texts(service, body.input, "input", service.length)
    _check_lengths(token_ids, service.length, "shorten it")
    vectors = await _vectors_of(request, service, key, token_ids, blend)
    encode = as_base64 if body.encoding_format == "base64" else lambda vector: vector.tolist()
    data = [
        {"object": "embedding", "index": i, "embedding": encode(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, token_ids)))
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


@router.post("/score")
@router.post("/v1/score", include_in_schema=False)
async def score(
    body: ScoreRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Score pairs of texts, with an encoder or a classifier."""
    scores, token_count = await _score_pairs(request, service, key, body, body.pairs())
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    return JSONResponse(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": {"prompt_tokens": token_count, "total_tokens": token_count},
        }
    )


@router.post("/rerank")
@router.post("/v1/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(
    body: RerankRequest, request: Request, service: CurrentService, key: ApiKey
) -> Response:
    """Rank documents by their scores for a query."""
    texts = body.texts()
    pairs = [(body.query, text) for text in texts]
    scores, token_count = await _score_pairs(request, service, key, body, pairs)
    ranked_indices = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or len(texts)]
    results = [
        {
            "index": i,
            **({"document": {"text": texts[i]}} if body.return_documents else {}),
            "relevance_score": scores[i],
        }
        for i in ranked_indices
    ]
    return JSONResponse(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model,
            "usage": {"prompt_tokens": token_count, "total_tokens": token_count},
            "results": results,
        }
    )


async def _score_pairs(
    request: Request,
    service: Service,
    key: Key,
    body: PairRequest,
    pairs: Sequence[tuple[str, str]],
) -> tuple[list[float], int]:
    """The score of each pair, and the number of tokens that were encoded."""
    blend = await requested_adapters(service, key, body.model, body.adapters)
    embedder = _embedder_of(service)
    if embedder.label_count:
        sequences: list[tuple[str, ...]] = list(pairs)
    else:  # encode each text only once, even if several pairs have it
        sequences = [(text,) for text in dict.fromkeys(text for pair in pairs for text in pair)]
    token_ids, token_types = await _tokenize(service, sequences, body.truncate_prompt_tokens)
    options = {"token_types": token_types, "with_head": True} if embedder.label_count else {}
    vectors = await _vectors_of(request, service, key, token_ids, blend, **options)
    token_count = sum(map(len, token_ids))
    if embedder.label_count:
        logits = torch.stack(vectors)[:, 0]
        applies_sigmoid = body.use_activation and _has_sigmoid(embedder.model.config)
        return (logits.sigmoid() if applies_sigmoid else logits).tolist(), token_count
    vectors_by_text = {text: vector for (text,), vector in zip(sequences, vectors, strict=True)}
    first_vectors = torch.stack([vectors_by_text[text] for text, _ in pairs])
    second_vectors = torch.stack([vectors_by_text[text] for _, text in pairs])
    return cosine_similarity(first_vectors, second_vectors).tolist(), token_count


async def _tokenize(
    service: Service, sequences: Sequence[tuple[str, ...]], truncated_length: int | None
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The token ids and token types of texts, or of pairs of texts. ``truncated_length``: the most
    tokens to keep of each, -1 for the context length; None: do not truncate. ``Refusal``: an input
    has no tokens or, truncated or not, is too long, or ``truncated_length`` leaves no token of it.
    """
    max_input_tokens = prompts.max_prompt_tokens(service.length, truncated_length)
    options = _truncation_options(service, truncated_length, is_pair=len(sequences[0]) == 2)
    token_ids: list[tuple[int, ...]] = []
    token_types: list[tuple[int, ...]] = []

    def tokenize_group(group: Sequence[tuple[str, ...]]) -> None:
        for texts in group:
            for text in texts:
                prompts.check_fits(service.tokenizer, text, max_input_tokens, "text_1")
            encoded = service.tokenizer(*texts, return_token_type_ids=True, **options)
            token_ids.append(tuple(encoded["input_ids"]))
            token_types.append(tuple(encoded["token_type_ids"]))

    for group in prompts.group_texts(sequences, size_of=lambda texts: sum(map(len, texts))):
        char_count = sum(len(text) for texts in group for text in texts)
        await in_text_thread(service, char_count, lambda group=group: tokenize_group(group))
    _check_lengths(token_ids, service.length, "shorten it, or send truncate_prompt_tokens = -1")
    if not min(map(len, token_ids)):
        raise Refusal(400, "a text without a token", "at least one", "send some text")
    return token_ids, token_types


def _truncation_options(
    service: Service, truncated_length: int | None, *, is_pair: bool
) -> dict[str, Any]:
    """The arguments with which the tokenizer truncates a text, or a pair of texts if ``is_pair``.
    ``truncated_length``: as in ``_tokenize``. ``Refusal``: it is at most the number of special
    tokens, so that no token of the text would be left."""
    if truncated_length is None:
        return {}
    if truncated_length < 1:
        return {"truncation": True, "max_length": service.length}
    special_count = service.tokenizer.num_special_tokens_to_add(pair=is_pair)
    if truncated_length <= special_count:
        raise Refusal(
            400,
            f"truncate_prompt_tokens {truncated_length}, with {special_count} special tokens",
            f"-1, or at least {special_count + 1}",
            "ask for more tokens",
            param="truncate_prompt_tokens",
        )
    return {"truncation": True, "max_length": min(truncated_length, service.length)}


def _check_lengths(token_ids: Sequence[Sequence[int]], max_tokens: int, advice: str) -> None:
    """``Refusal``: an input has more than ``max_tokens`` tokens. ``advice``: what the message tells
    the client to do."""
    longest_length = max(map(len, token_ids))
    if longest_length > max_tokens:
        raise Refusal(
            400,
            f"an input of {longest_length} tokens",
            f"at most {max_tokens}",
            advice,
            param="input",
            code="context_length_exceeded",
        )


def _embedder_of(service: Service) -> Embedder:
    """The embedder of a service. ``Refusal``: the base is a causal language model."""
    if service.embedder is None:
        raise Refusal(
            400,
            "a causal language model",
            "an encoder",
            "serve one, such as a sentence-transformers model",
            param="model",
            code="no_embeddings",
        )
    return service.embedder


async def _vectors_of(
    request: Request,
    service: Service,
    key: Key,
    token_ids: Sequence[tuple[int, ...]],
    blend: dict[str, float],
    **options: Any,
) -> list[Tensor]:
    """The result of ``Embedder.submit`` for texts (``token_ids``): the vector of each text, or its
    logits, on the CPU. ``options``: further arguments of ``submit``. ``Refusal``: the computation
    failed, or the client disconnected."""
    embedder = _embedder_of(service)
    try:
        result_future = embedder.submit(token_ids, blend, service.timeout, key.owner, **options)
        return await unless_disconnected(request, asyncio.wrap_future(result_future))
    except (AdapterError, SelectionError, Refusal) as error:
        # answer with the status that the same failure has in the engine
        if isinstance(error, Refusal) and error.code != "engine_error":
            raise
        raise refusal_of_cause(str(error), error_kind_of(error), key.admin) from error


def _has_sigmoid(config: Any) -> bool:
    """Whether a classifier's score is the sigmoid of its logit. It is, unless a field that
    sentence-transformers writes to the config names the identity as activation."""
    library_fields = getattr(config, "sentence_transformers", None) or {}
    activation_name = library_fields.get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    return not str(activation_name).endswith("Identity")
