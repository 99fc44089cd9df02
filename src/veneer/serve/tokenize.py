"""vLLM's routes for the base's tokenizer, and the version of the server.

POST /tokenize     a text, or a chat in the base's template → its tokens
POST /detokenize   tokens → their text
GET  /version
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import Field, model_validator

from veneer.serve import limits, prompts
from veneer.serve.access import Key
from veneer.serve.body_rules import Name, Strict
from veneer.serve.chat_messages import Message, ToolList, check_history, check_tools
from veneer.serve.refusal import Refusal, wrong
from veneer.serve.sampling_fields import TemplateFields
from veneer.serve.schemas import Tokens
from veneer.serve.service import (
    Asker,
    Route,
    Service,
    Serving,
    in_text_thread,
    requested_adapters,
)

router = APIRouter(route_class=Route)

#: fields that have a meaning beside messages alone
OF_CHATS = {"tools", "continue_final_message", "chat_template_kwargs"}


class TokenizeRequest(Strict, TemplateFields):
    """A ``prompt``, to which special tokens are added unless it says otherwise, or ``messages``, of
    which the template adds them, with the ``tools`` that it shows."""

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
    def _check_forms(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            sent = "both prompt and messages" if self.messages else "neither prompt nor messages"
            raise wrong(sent, "one of them", "send one", "prompt")
        if self.messages is None:
            for name in self.model_fields_set & OF_CHATS:
                if getattr(self, name):
                    raise wrong(f"{name} beside prompt", "messages", "leave it out", name)
        check_history(self.messages or (), "messages")
        check_tools(self.tools, None, False, "messages")
        return self


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: Tokens


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: Serving, key: Asker) -> dict[str, Any]:
    """The tokens of a text, or of a chat in the base's template."""
    await _check_model(service, key, body.model)
    tokenizer, length = service.tokenizer, prompts.max_prompt_tokens(service.length, -1)
    tools = [tool.template_dict() for tool in body.tools]

    def read() -> tuple[list[int], list[str] | None]:
        if body.messages is None:
            text = body.prompt or ""
            prompts.check_fits(tokenizer, text, length, "prompt")
            added = body.add_special_tokens is not False
            ids = list(tokenizer(text, add_special_tokens=added)["input_ids"])
        else:
            added = bool(body.add_special_tokens)
            arguments = body.template_arguments()
            ids = list(
                prompts.chat_tokens(
                    tokenizer, body.messages, length, tools, arguments, add_special_tokens=added
                )
            )
        return ids, tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None

    size = len(body.prompt or "") + prompts.chat_size(body.messages or (), tools)
    ids, texts = await in_text_thread(service, size, read)
    return {
        "count": len(ids),
        "max_model_len": service.length,
        "tokens": ids,
        "token_strs": texts,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: Serving, key: Asker) -> dict[str, str]:
    """The text of some tokens."""
    await _check_model(service, key, body.model)
    most = prompts.max_prompt_tokens(service.length, -1)
    if len(body.tokens) > most:
        problem, expected = f"{len(body.tokens):,} tokens", f"at most {most:,}"
        raise Refusal(400, problem, expected, "send fewer at once", param="tokens")
    if max(body.tokens) >= service.vocabulary:
        problem, expected = f"token {max(body.tokens)}", f"tokens below {service.vocabulary}"
        raise Refusal(400, problem, expected, "check the tokenizer", param="tokens")
    size = len(body.tokens)
    text = await in_text_thread(service, size, lambda: service.tokenizer.decode(body.tokens))
    return {"prompt": text}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": _version()}


@cache
def _version() -> str:
    return metadata.version("veneer")


async def _check_model(service: Service, key: Key, model: str | None) -> None:
    """``Refusal``: a model that the key may not use. All of them have the base's tokenizer."""
    if model is not None:
        await requested_adapters(service, key, model, None)
