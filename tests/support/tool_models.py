"""Helpers for tests of tool calls: a chat template with tools, a model that ignores its prompt, and
an engine with scripted answers.

    TEMPLATE       ChatML, with tools and calls in the notation of Hermes
    write_unigram  writes a tiny Llama whose tokens have constant probabilities. Under a schema its
                   strings and lists end soon, so that a forced call is short and complete
    scripted       makes the engine of `api_server` answer with a given text
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.tiny import tiny_model, tiny_tokenizer

from veneer.serve.requests import Piece, Token

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    '{{ \'\n</tools> Call one as <tool_call>{"name": …, "arguments": …}</tool_call>\' }}'
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name }}'
    "{{ '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
}
TIME: dict[str, Any] = {"type": "object", "properties": {}}


def tool(name: str, parameters: Mapping[str, Any], description: str = "") -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER, "The weather."), tool("get_time", TIME)]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'
)


def write_unigram(folder: Path, length: int = 2048) -> Path:
    """Write a model folder: a tiny Llama whose logits are the same after every prompt and prefer
    quotes and closing brackets to letters, and a tokenizer whose template has tools. Returns the
    folder."""
    import torch

    model = tiny_model(tie_word_embeddings=False, max_position_embeddings=length)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:  # so that the layers add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for text, logit in {'"': 2.0, "}": 2.0, "]": 1.9, "5": 1.0, "a": 0.6, " ": -1.0}.items():
            model.lm_head.weight[tokenizer(text)["input_ids"][0], 0] = logit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scripted(
    engine: Any, script: Callable[[str], str], decode: Callable[..., str], size: int = 3
) -> Callable[..., None]:
    """A ``_write`` for a ``FakeEngine`` that answers a prompt with ``script(prompt)``, in tokens of
    ``size`` characters. A request with a schema gets the smallest value that fits the schema."""

    def write(ticket: Any, deliver: Any) -> None:
        request = ticket.request
        prompt, schema = decode(list(request.prompt)), request.sampling.schema
        if schema is None:
            text = script(prompt)
        else:
            if "<|im_start|>tool" in prompt and "items" in schema:  # the last tool's turn
                schema = {**schema, "items": {"anyOf": schema["items"]["anyOf"][-1:]}}
            text = json.dumps(smallest(schema, schema))
        finish, stop = "stop", None
        for word in request.sampling.stop:
            if word in text:
                text, stop = text[: text.index(word)], word
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        if len(pieces) > request.sampling.max_tokens:
            pieces, finish = pieces[: request.sampling.max_tokens], "length"
        for piece in pieces:
            deliver(Piece(piece, (Token(7, piece),)))
        with engine.lock:
            engine.running -= 1
        deliver(Piece("", (), finish, stop=stop))

    return write


def smallest(schema: Any, root: Mapping[str, Any]) -> Any:
    """The smallest value that fits a JSON schema with the keywords that clients send."""
    if not isinstance(schema, Mapping):
        return None
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return smallest(target, root)
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            return smallest(schema[keyword][0], root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    match kinds[0] if isinstance(kinds, list) else kinds:
        case "object":
            properties = schema.get("properties", {})
            required = schema.get("required", list(properties))
            return {name: smallest(properties[name], root) for name in required}
        case "array":
            return [smallest(schema.get("items"), root) for _ in range(schema.get("minItems", 0))]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return "Bern"


def weather_script(prompt: str) -> str:
    """The answer of a model that calls the weather tool, and then repeats the tool's result."""
    turns = prompt.split("<|im_start|>")
    results = [turn for turn in turns if turn.startswith("tool\n")]
    if results:
        return f"It is {results[-1].removeprefix('tool').strip().removesuffix('<|im_end|>')}."
    names = re.findall(r'"name": ?"(\w+)"', turns[1]) if "<tools>" in prompt else []
    if names:
        arguments = json.dumps({"city": "Bern", "days": 2} if "weather" in names[0] else {})
        call = f'{{"name": "{names[0]}", "arguments": {arguments}}}'
        return f"Let me see.\n<tool_call>\n{call}\n</tool_call>"
    return "Hello."
