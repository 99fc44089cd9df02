"""Routes of vLLM's API: to use the base's tokenizer, and to ask for the version of the server.

POST /tokenize     a text, or a chat in the base's chat template → its token ids
POST /detokenize   token ids → their text
GET  /version
"""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from veneer.serve import limits, prompts
from veneer.serve.access import Key
from veneer.serve.body_rules import Name, Strict
from veneer.serve.chat_messages import Message, ToolList, check_history, check_tools
from veneer.serve.refusal import Refusal, value_error
from veneer.serve.sampling_fields import TemplateFields
from veneer.serve.schemas import Tokens
from veneer.serve.service import (
    ApiKey,
    CurrentService,
    Route,
    Service,
    check_model,
    in_text_thread,
)

router = APIRouter(route_class=Route)

#: fields of ``TokenizeRequest`` that are only allowed together with ``messages``
CHAT_FIELDS = {"tools", "continue_final_message", "chat_template_kwargs"}


class TokenizeRequest(Strict, TemplateFields):
    """The body of a request to /tokenize: either a ``prompt``, or ``messages`` with perhaps the
    ``tools`` that the chat template shows. ``add_special_tokens``: whether the tokenizer adds its
    special tokens; None means yes for a prompt and no for messages, since the chat template adds
    them there."""

    model: Name | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=limits.MESSAGES)]
        | None
    ) = None
    tools: ToolList = []
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise value_error(
                "both prompt and messages" if self.messages else "neither prompt nor messages",
                "one of them",
                "send one",
                "prompt",
            )
        if self.messages is None:
            for name in self.model_fields_set & CHAT_FIELDS:
                if getattr(self, name):
                    raise value_error(f"{name} beside prompt", "messages", "leave it out", name)
        check_history(self.messages or (), "messages")
        check_tools(self.tools, None, False, "messages")
        return self


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: Tokens


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: CurrentService, key: ApiKey) -> dict[str, Any]:
    """Tokenise a text, or a chat in the base's chat template."""
    await _check_model(service, key, body.model)
    tokenizer, max_tokens = service.tokenizer, prompts.max_prompt_tokens(service.length, -1)
    tools = [tool.template_dict() for tool in body.tools]

    def tokenize_body() -> tuple[list[int], list[str] | None]:
        if body.messages is None:
            text = body.prompt or ""
            prompts.check_fits(tokenizer, text, max_tokens, "prompt")
            adds_special_tokens = body.add_special_tokens is not False
            ids = list(tokenizer(text, add_special_tokens=adds_special_tokens)["input_ids"])
        else:
            ids = list(
                prompts.chat_tokens(
                    tokenizer,
                    body.messages,
                    max_tokens,
                    tools,
                    body.template_arguments(),
                    add_special_tokens=bool(body.add_special_tokens),
                )
            )
        return ids, tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None

    char_count = len(body.prompt or "") + prompts.chat_size(body.messages or (), tools)
    ids, token_texts = await in_text_thread(service, char_count, tokenize_body)
    return {
        "count": len(ids),
        "max_model_len": service.length,
        "tokens": ids,
        "token_strs": token_texts,
    }


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, service: CurrentService, key: ApiKey
) -> dict[str, str]:
    """Decode token ids to their text."""
    await _check_model(service, key, body.model)
    max_tokens = prompts.max_prompt_tokens(service.length, -1)
    if len(body.tokens) > max_tokens:
        raise Refusal(
            400,
            f"{len(body.tokens):,} tokens",
            f"at most {max_tokens:,}",
            "send fewer at once",
            param="tokens",
        )
    tokenizer = service.tokenizer
    # this does not tokenise, but checks that the base has these token ids
    ids = prompts.prompt_tokens(tokenizer, body.tokens, service.vocabulary, max_tokens, "tokens")
    return {"prompt": await in_text_thread(service, len(ids), lambda: tokenizer.decode(ids))}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": metadata.version("veneer")}


async def _check_model(service: Service, key: Key, model: str | None) -> None:
    """Check the model that a request names, if any. ``Refusal``: it does not exist, or the key may
    not use it. Otherwise the model does not matter, since all adapters have the base's
    tokenizer."""
    if model is not None:
        await check_model(service, key, model)
