"""Request bodies for the server's API: valid ones for each route, and hostile ones made from these.

``hostile_request(seed, number)`` always returns the same request, so that a request that breaks
something can be sent again by itself.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BASE = "tiny"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "a",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        "strict": True,
    },
}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT = {
    "model": BASE,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 3,
    "n": 1,
    "stop": ["w1"],
    "seed": 1,
    "temperature": 0.5,
    "top_p": 0.5,
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "adapters": {"french": 0.5},
}
TEXT = {
    "model": "french",
    "prompt": ["a", "b"],
    "max_tokens": 2,
    "echo": True,
    "logprobs": 1,
    "n": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
}
TOOLS = {
    "model": BASE,
    "tools": [TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "stream": True,
    "max_tokens": 4,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "b"},
    ],
}
RESPONSES = {
    "model": BASE,
    "instructions": "a",
    "max_output_tokens": 3,
    "stream": True,
    "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", "name": "f", "parameters": {}}],
    "tool_choice": "auto",
    "store": False,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "b"},
    ],
}
MESSAGES = {
    "model": BASE,
    "max_tokens": 3,
    "system": "a",
    "stop_sequences": ["w1"],
    "stream": True,
    "top_k": 2,
    "tools": [{"name": "f", "input_schema": {}, "strict": True}],
    "tool_choice": {"type": "auto"},
    "messages": [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}]},
    ],
}
#: further fields that a completion may have
SAMPLING = {
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "logit_bias": {"5": 1},
    "min_tokens": 1,
    "stop_token_ids": [5],
    "bad_words": ["a"],
    "allowed_token_ids": [5, 6],
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 9,
    "return_token_ids": True,
    "request_id": "a",
    "priority": 1,
    "ignore_eos": True,
    "top_k": 3,
    "cache_salt": "a",
    "guided_choice": ["a", "b"],
    "return_tokens_as_token_ids": True,
    "add_special_tokens": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
STRUCTURED_OUTPUTS = [
    {"regex": "(a|b)*c"},
    {"regex": "(x+x+)+y"},
    {"choice": ["a", "bc"]},
    {"grammar": 'root ::= "a" root | "b"'},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"json_object": True},
    {
        "json": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}},
        }
    },
    {"json": {"enum": list(range(200))}},
    {"regex": "a{1,5000}"},
    {"grammar": "start: start start | "},
    {"json": {"type": "string", "pattern": "^(a+)+$", "maxLength": 3}},
]
ROUTES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [CHAT, TOOLS, {**TOOLS, "tool_choice": "required"}],
    "/v1/completions": [
        TEXT,
        {"model": BASE, "prompt": [5, 6], "max_tokens": 0, "prompt_logprobs": 0},
    ],
    "/v1/responses": [RESPONSES],
    "/v1/messages": [MESSAGES],
    "/v1/messages/count_tokens": [
        {name: MESSAGES[name] for name in ("model", "messages", "tools")}
    ],
    "/tokenize": [
        {"prompt": "a", "add_special_tokens": True, "return_token_strs": True},
        {"messages": TOOLS["messages"], "tools": [TOOL], "chat_template_kwargs": {"a": False}},
    ],
    "/detokenize": [{"model": BASE, "tokens": [5, 6]}],
    "/v1/embeddings": [{"model": BASE, "input": "a", "encoding_format": "base64"}],
    "/score": [{"model": BASE, "text_1": "a", "text_2": ["b", "c"], "truncate_prompt_tokens": 4}],
    "/rerank": [{"model": BASE, "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}],
    "/v1/load_lora_adapter": [{"lora_name": "new", "lora_path": "french", "load_inplace": True}],
    "/v1/unload_lora_adapter": [{"lora_name": "new"}],
}
COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
#: routes of encoders
ENCODED = ("/v1/embeddings", "/score", "/rerank")

#: values that replace other values
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**70),
    0.5,
    -0.0,
    1e308,
    "",
    "a",
    "x" * 3000,
    "\x00",
    "\ud800",
    "<|im_end|>",
    "\u202e𝕊",
    "{{ 7 * 7 }}",
    "../../etc",
    [],
    {},
    [[]],
    [None],
    ["a"] * 300,
    list(range(400)),
    {"": {}},
    {"a": {"a": {"a": {"a": []}}}},
    {"type": "object"},
    {"$ref": "#"},
    {str(i): i for i in range(200)},
]
NAMES = ["", "a", "model", "__class__", "stream", "user", "n", "tools", "\ud83d", "x" * 300]
#: bytes that are no valid bodies
RAW = [
    b"",
    b"{",
    b"null",
    b"[1]",
    b'"a"',
    b"\xff\xfe",
    b"{}" * 50,
    b'{"model": NaN}',
    b'{"model": "a", "model": "b"}',
    b"[" * 3000,
    b'{"a":' * 500,
    b"\x1f\x8b\x08\x00",
    b'{"model": "\\ud800"}',
    b"1e999",
    b'{"n": 1e400}',
]


@dataclass(frozen=True)
class HostileRequest:
    """A request to send. ``leaves``: whether the client disconnects after the first bytes of a
    stream."""

    route: str
    content: bytes
    content_type: str = "application/json"
    leaves: bool = False


def hostile_request(seed: int, number: int, routes: Any = tuple(ROUTES)) -> HostileRequest:
    """The request with this number for a seed, to one of ``routes``."""
    draw = random.Random(f"{seed}:{number}")
    route = draw.choice(list(routes))
    if draw.random() < 0.06:
        return HostileRequest(route, draw.choice(RAW))
    body = copy.deepcopy(draw.choice(ROUTES[route]))
    if route in COMPLETIONS:
        for name in draw.sample(sorted(SAMPLING), draw.choice((0, 0, 1, 2, 4))):
            body[name] = copy.deepcopy(SAMPLING[name])
        if draw.random() < 0.2:
            body.pop("response_format", None)
            body["structured_outputs"] = copy.deepcopy(draw.choice(STRUCTURED_OUTPUTS))
        if draw.random() < 0.5:
            body.pop(draw.choice(sorted(body)))
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        mutate(draw, body)
    content = json.dumps(body).encode()
    if draw.random() < 0.08:
        content = damage(draw, content)
    content_type = (
        "application/json" if draw.random() < 0.97 else draw.choice(("text/plain", "", "a/b"))
    )
    return HostileRequest(route, content, content_type, leaves=draw.random() < 0.05)


def entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key or index) in a body, at any depth."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in list(keys):
        yield value, key
        yield from entries(value[key])


def mutate(draw: random.Random, body: dict[str, Any]) -> None:
    """Change, add or remove a random entry of a body."""
    container, key = draw.choice([*entries(body), (body, "model")])
    match draw.randrange(8):
        case 0:
            if isinstance(container, dict):
                container.pop(key, None)
        case 1:
            if isinstance(container, dict):
                container[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        case 2:
            source, source_key = draw.choice([*entries(body), (body, "model")])
            value = source.get(source_key) if isinstance(source, dict) else source[source_key]
            container[key] = copy.deepcopy(value)
        case 3:
            if isinstance(container, list):
                container.extend(copy.deepcopy(container[:1]) * draw.choice((1, 20, 200)))
        case _:
            container[key] = copy.deepcopy(draw.choice(VALUES))


def damage(draw: random.Random, content: bytes) -> bytes:
    """The bytes of a body, truncated or with some bytes replaced."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    return bytes(damaged)
