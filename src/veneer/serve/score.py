"""Scores of pairs of texts, and documents ranked by their scores for a query: vLLM's and Jina's
routes.

    POST /score  /v1/score                  text_1, text_2 → a score for each pair
    POST /rerank  /v1/rerank  /v2/rerank    query, documents → results, the best first

An encoder scores a pair by the cosine of its two vectors. A classifier of one label reads both
texts at once and scores by its logit, through a sigmoid unless its config names another
activation.
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
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from veneer.errors import AdapterError, SelectionError, sentence
from veneer.serve import limits, prompts
from veneer.serve.access import Key
from veneer.serve.answers import refusal_of_cause
from veneer.serve.body_rules import Name, Strict
from veneer.serve.embed import Embedder
from veneer.serve.refusal import Refusal, wrong
from veneer.serve.requests import cause_of
from veneer.serve.sampling_fields import Truncation
from veneer.serve.schemas import Blend
from veneer.serve.service import (
    Asker,
    Route,
    Service,
    Serving,
    in_text_thread,
    requested_adapters,
    unless_gone,
)

router = APIRouter(route_class=Route)

Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.INPUTS)]


class PairRequest(Strict):
    """The fields that both kinds of call have in common."""

    model: Name
    adapters: Blend | None = None
    truncate_prompt_tokens: Truncation | None = None
    use_activation: bool = True


#: vLLM's other names of the two sides of pairs
PAIR_NAMES = {
    "queries": "text_1",
    "data_1": "text_1",
    "documents": "text_2",
    "items": "text_2",
    "data_2": "text_2",
}


class ScoreRequest(PairRequest):
    """The two sides may have other names (``PAIR_NAMES``)."""

    text_1: str | Texts
    text_2: str | Texts

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        sent = [name for name in PAIR_NAMES if isinstance(data, dict) and name in data]
        for name in sent:
            side = PAIR_NAMES[name]
            if side in data or [PAIR_NAMES[alias] for alias in sent].count(side) > 1:
                raise wrong(f"{name} beside another name of it", "one", f"send {side}", name)
        return {PAIR_NAMES.get(name, name): data[name] for name in data} if sent else data

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        first, second = len(self.texts(self.text_1)), len(self.texts(self.text_2))
        if first not in (1, second):
            problem = f"{first} texts in text_1 and {second} in text_2"
            raise wrong(problem, "one, or as many", "send as many as in text_2", "text_1")
        return self

    @staticmethod
    def texts(sent: str | list[str]) -> list[str]:
        return [sent] if isinstance(sent, str) else sent

    def pairs(self) -> list[tuple[str, str]]:
        first, second = self.texts(self.text_1), self.texts(self.text_2)
        return list(zip(first * (len(second) // len(first)), second, strict=True))


class Document(Strict):
    text: str


class RerankRequest(PairRequest):
    """``top_n`` 0: all of them."""

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


@router.post("/score")
@router.post("/v1/score", include_in_schema=False)
async def score(body: ScoreRequest, request: Request, service: Serving, key: Asker) -> Response:
    """A score for each pair of texts; an encoder's or a classifier's."""
    scores, count = await _scores(request, service, key, body, body.pairs())
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    return JSONResponse(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model,
            "data": data,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


@router.post("/rerank")
@router.post("/v1/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(body: RerankRequest, request: Request, service: Serving, key: Asker) -> Response:
    """Documents in the order of their scores for a query."""
    texts = body.texts()
    pairs = [(body.query, text) for text in texts]
    scores, count = await _scores(request, service, key, body, pairs)
    order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or len(texts)]
    results = [
        {
            "index": i,
            **({"document": {"text": texts[i]}} if body.return_documents else {}),
            "relevance_score": scores[i],
        }
        for i in order
    ]
    return JSONResponse(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model,
            "usage": {"prompt_tokens": count, "total_tokens": count},
            "results": results,
        }
    )


async def _scores(
    request: Request,
    service: Service,
    key: Key,
    body: PairRequest,
    pairs: Sequence[tuple[str, str]],
) -> tuple[list[float], int]:
    """A score for each pair, and the number of tokens that were encoded."""
    blend = await requested_adapters(service, key, body.model, body.adapters)
    embedder = embedder_of(service)
    if embedder.labels:
        sequences: list[tuple[str, ...]] = list(pairs)
    else:  # a text of several pairs is encoded once
        sequences = [(text,) for text in dict.fromkeys(text for pair in pairs for text in pair)]
    ids, types = await _read(service, sequences, body.truncate_prompt_tokens)
    options = {"token_types": token_types, "with_head": True} if embedder.labels else {}
    vectors = await vectors_of(request, service, key, ids, blend, **options)
    count = sum(map(len, ids))
    if embedder.labels:
        logits = torch.stack(vectors)[:, 0]
        activated = body.use_activation and _has_sigmoid(embedder.model.config)
        return (logits.sigmoid() if activated else logits).tolist(), count
    by_text = {text: vector for (text,), vector in zip(sequences, vectors, strict=True)}
    first = torch.stack([by_text[text] for text, _ in pairs])
    second = torch.stack([by_text[text] for _, text in pairs])
    return cosine_similarity(first, second).tolist(), count


async def _read(
    service: Service, sequences: Sequence[tuple[str, ...]], truncate: int | None
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The tokens, and their types, of texts or pairs. ``Refusal``: one that does not fit."""
    most = service.length if truncate is None or truncate < 1 else min(truncate, service.length)
    ids: list[tuple[int, ...]] = []
    types: list[tuple[int, ...]] = []

    def read(group: Sequence[tuple[str, ...]]) -> None:
        for texts in group:
            for text in texts:
                prompts.check_fits(
                    service.tokenizer, text, prompts.max_prompt_tokens(service.length, truncate), "text_1"
                )
            options = {} if truncate is None else {"truncation": True, "max_length": most}
            encoded = service.tokenizer(*texts, return_token_type_ids=True, **options)
            ids.append(tuple(encoded["input_ids"]))
            types.append(tuple(encoded["token_type_ids"]))

    for group in prompts.group_texts(sequences, size_of=lambda texts: sum(map(len, texts))):
        size = sum(len(text) for texts in group for text in texts)
        await in_text_thread(service, size, lambda group=group: read(group))
    longest = max(map(len, ids))
    if longest > service.length:
        message = sentence(
            f"an input of {longest} tokens",
            f"at most {service.length}",
            "shorten it, or send truncate_prompt_tokens = -1",
        )
        raise Refusal(400, message, param="input", code="context_length_exceeded")
    if not min(map(len, ids)):
        raise Refusal(400, "a text without a token", "at least one", "send some text")
    return ids, types


def embedder_of(service: Service) -> Embedder:
    """The embedder of a service. ``Refusal``: the base is a causal language model."""
    if service.embedder is None:
        message = sentence(
            "a causal language model",
            "an encoder",
            "serve one, such as a sentence-transformers model",
        )
        raise Refusal(400, message, param="model", code="no_embeddings")
    return service.embedder


async def vectors_of(
    request: Request,
    service: Service,
    key: Key,
    tokens: Sequence[tuple[int, ...]],
    blend: dict[str, float],
    **options: Any,
) -> list[Tensor]:
    """The vectors of some texts, or what else ``Embedder.submit`` computes."""
    embedder = embedder_of(service)
    try:
        computation = embedder.submit(tokens, blend, service.timeout, key.owner, **options)
        return await unless_gone(request, asyncio.wrap_future(computation))
    except (AdapterError, SelectionError, Refusal) as error:  # as the engine has it
        if isinstance(error, Refusal) and error.code != "engine_error":
            raise
        raise refusal_of_cause(str(error), cause_of(error), key.admin) from error


def _has_sigmoid(config: Any) -> bool:
    """Whether a classifier's logit becomes a score by a sigmoid: unless sentence-transformers'
    fields of its config name no activation at all."""
    fields = getattr(config, "sentence_transformers", None) or {}
    name = fields.get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    return not str(name).endswith("Identity")
