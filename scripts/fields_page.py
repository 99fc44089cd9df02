"""Make the table of docs/serving.md that says what this server does with each field of vLLM's
request bodies. vLLM's fields are in `vllm_fields.json`, which `vllm_fields.py` reads from an
installed vLLM. This server's fields come from the bodies of its routes;
tests/serve/test_fields.py sends each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from veneer.serve.body_rules import HARMLESS, NEUTRAL
from veneer.serve.encoder_routes import PAIR_NAMES, RerankRequest, ScoreRequest
from veneer.serve.messages.request import MessagesRequest
from veneer.serve.responses.request import ResponsesRequest
from veneer.serve.sampling_fields import GUIDED
from veneer.serve.schemas import ChatRequest, CompletionRequest
from veneer.serve.tokenize import DetokenizeRequest, TokenizeRequest

RECORD = Path(__file__).with_name("vllm_fields.json")
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/score": ScoreRequest,
    "/rerank": RerankRequest,
}
#: older names of fields that a body accepts too
OLDER_NAMES: Mapping[str, frozenset[str]] = {
    "/v1/chat/completions": frozenset(GUIDED),
    "/v1/completions": frozenset(GUIDED),
    "/score": frozenset(PAIR_NAMES),
}
#: fields that only older versions of vLLM have
REMOVED_FIELDS = [*GUIDED, "guided_decoding_backend", "guided_whitespace_pattern", "best_of"]
SUPPORTED, NO_EFFECT, REFUSED = "yes", "no effect", "refused"


def status_of(name: str, route: str) -> str:
    """How a route treats a field, as the text of a cell."""
    if name in BODIES[route].model_fields or name in OLDER_NAMES.get(route, ()):
        return SUPPORTED
    if name in NEUTRAL:
        return " or ".join(f"`{json.dumps(value)}`" for value in NEUTRAL[name])
    return NO_EFFECT if name in HARMLESS else REFUSED


def vllm_fields() -> dict[str, list[str]]:
    """The fields that vLLM has or had, by route."""
    fields: dict[str, list[str]] = json.loads(RECORD.read_text())["fields"]
    completions = ("/v1/chat/completions", "/v1/completions")
    return fields | {route: [*fields[route], *REMOVED_FIELDS] for route in completions}


def cells() -> dict[tuple[str, str], str]:
    """How each route treats a field, by (field, route). Fields that only this server has are in
    italics."""
    by_route = vllm_fields()
    statuses = {
        (name, route): status_of(name, route) for route, names in by_route.items() for name in names
    }
    own_fields = {
        (field.alias or name, route): f"*{SUPPORTED}*"
        for route, body in BODIES.items()
        for name, field in body.model_fields.items()
        if (field.alias or name) not in by_route[route]
    }
    return statuses | own_fields


def table() -> str:
    statuses = cells()
    headings = [f"`{route.rpartition('/v1')[2]}`" for route in BODIES]
    lines = [f"| field | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for name in sorted({name for name, _ in statuses}):
        row = [statuses.get((name, route), "–") for route in BODIES]
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return "\n".join(lines)


def version() -> str:
    """The version of vLLM whose fields are recorded."""
    return json.loads(RECORD.read_text())["version"]
