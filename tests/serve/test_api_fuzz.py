"""Whatever is sent, no answer is a 500, and the server goes on."""

from __future__ import annotations

import json
from contextlib import suppress

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from tests.support.api_server import BASE, serving
from tests.support.tool_models import TEMPLATE

FEW = {"max_examples": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}

CHAT = {
    "model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 1, "stop": ["w1"], "seed": 1,
    "temperature": 0.5, "top_p": 0.5, "stream": False, "stream_options": {"include_usage": True}, "logprobs": True,
    "top_logprobs": 2, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "adapters": {"french": 0.5},
}  # fmt: skip
TEXT = {
    "model": "french",
    "prompt": ["a", "b"],
    "max_tokens": 2,
    "echo": True,
    "logprobs": 1,
    "n": 1,
    "stream": True,
}
FIELDS = {
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_p": 0.1, "logit_bias": {"5": 1},
    "min_tokens": 1, "stop_token_ids": [5], "bad_words": ["a"], "allowed_token_ids": [5], "prompt_logprobs": 1,
    "truncate_prompt_tokens": 9, "return_token_ids": True, "request_id": "a", "priority": 1, "echo": False,
    "structured_outputs": {"regex": "a"}, "guided_choice": ["a"], "skip_special_tokens": True,
}  # fmt: skip
TEMPLATE_FIELDS = {
    "chat_template_kwargs": {"a": False},
    "add_generation_prompt": True,
    "continue_final_message": False,
}
TOOL = {
    "type": "function", "function": {"name": "f", "description": "a", "parameters": {"type": "object"}, "strict": True},
}  # fmt: skip
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOLS = {
    "model": BASE, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "stream": True,
    "messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "b"},
    ],
}  # fmt: skip
RESPONSES = {
    "model": BASE, "instructions": "a", "max_output_tokens": 3, "stream": True, "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": {"type": "function", "name": "f"},
    "store": False, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "b"},
    ],
}  # fmt: skip
MESSAGES = {
    "model": BASE, "max_tokens": 3, "system": "a", "stop_sequences": ["w1"], "stream": True, "top_k": 2,
    "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"}, "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}]},
    ],
}  # fmt: skip
VECTORS = {"model": BASE, "input": "a", "encoding_format": "base64", "dimensions": 3}
LOAD = {"lora_name": "new", "lora_path": "french", "load_inplace": True, "pin": True}
BODIES = {
    "/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/embeddings": VECTORS, "/v1/load_lora_adapter": LOAD,
    "/v1/unload_lora_adapter": {"lora_name": "new"}, "/tokenize": {"prompt": "a", "add_special_tokens": True},
    "/detokenize": {"model": BASE, "tokens": [5, 6]}, "/score": {"model": BASE, "text_1": "a", "text_2": ["b", "c"]},
    "/rerank": {"model": BASE, "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    "/v1/responses": RESPONSES, "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": {name: MESSAGES[name] for name in ("model", "messages", "tools")},
}  # fmt: skip
#: a body with all of the fields is none that is right, but each of them is looked at
MORE = {
    "/v1/chat/completions": {**CHAT, **FIELDS, **TEMPLATE_FIELDS},
    "/v1/completions": {**TEXT, **FIELDS},
}
#: routes, and bodies of each that are right but for what the tests change
PAIRS = [*BODIES.items(), ("/v1/chat/completions", TOOLS)]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
)


@st.composite
def mutated(draw, value):
    """A body that is right but for some places."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        changed = {**value, key: draw(mutated(value[key]))}
        if draw(st.integers(0, 5)) == 0:
            del changed[key]
        return changed
    if isinstance(value, list) and value and draw(st.booleans()):
        return [draw(mutated(value[0])), *value[1:], *draw(st.lists(anything, max_size=2))]
    return draw(anything)


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("fuzz") / "dir", "french", words=3) as served:
        served.service.length = 512
        served.service.tokenizer.chat_template = TEMPLATE
        yield served


@pytest.fixture(scope="module")
def http(it):
    with it.http() as client:
        yield client


def survives(answer):
    assert answer.status_code < 500, answer.text
    if (
        answer.status_code >= 400
        and answer.content
        and "json" in answer.headers.get("content-type", "")
    ):
        assert answer.json()["error"]["message"]


@st.composite
def with_some_fields(draw, route):
    """A right body with some of the other fields, of which one is mutated."""
    body = MORE[route]
    names = draw(st.lists(st.sampled_from(sorted(body)), min_size=1, max_size=4, unique=True))
    base = {name: BODIES[route][name] for name in ("model", "messages", "prompt") if name in body}
    changed = draw(st.sampled_from(names))
    return {**base, **{name: body[name] for name in names}, changed: draw(mutated(body[changed]))}


cases = st.sampled_from(PAIRS).flatmap(
    lambda pair: st.tuples(
        st.just(pair[0]),
        mutated(pair[1]) | with_some_fields(pair[0]) if pair[0] in MORE else mutated(pair[1]),
    )
)


def bodies(http, examples):
    @settings(**{**FEW, "max_examples": examples})
    @given(cases)
    def run(case):
        route, body = case
        content = json.dumps(body).encode(errors="surrogatepass")
        survives(http.post(route, content=content, headers={"Content-Type": "application/json"}))

    run()
    assert http.get("/health").status_code == 200


def test_bodies(http):
    bodies(http, 100)


@pytest.mark.slow
def test_many_bodies(http):
    bodies(http, 5000)


def test_bytes(http):
    @settings(**FEW)
    @given(
        st.sampled_from(sorted(BODIES)),
        st.binary(max_size=60) | st.text(max_size=60).map(str.encode),
    )
    def run(route, content):
        survives(http.post(route, content=content, headers={"Content-Type": "application/json"}))

    run()


def test_paths_and_headers(http):
    words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)

    @settings(**FEW)
    @given(
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]), words, words, words
    )
    def run(method, path, query, value):
        headers = {"Authorization": value, "Content-Type": value, "Accept": value, "Expect": value}
        try:
            url = httpx.URL(str(http.base_url), raw_path=f"/v1/models/{path}?{query}".encode())
        except httpx.InvalidURL:
            reject()
        survives(http.request(method, url, headers=headers))

    run()


# ----------------------------------------------------------------------------------------------
# described requests


def described(it, examples):
    """Requests that schemathesis makes of what the server says of itself: right ones and wrong
    ones."""
    description = schemathesis.openapi.from_dict(httpx.get(f"{it.url}/openapi.json").json())
    operations = [found.ok() for found in description.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        *BODIES,
        "/v1/models",
        "/v1/adapters",
        "/metrics",
    }
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(**{**FEW, "max_examples": examples})
            @given(operation.as_strategy(generation_mode=mode))
            def run(case):
                answer = case.call(base_url=it.url)
                assert answer.status_code < 500, answer.content

            with suppress(Unsatisfiable):  # an operation without parameters has no wrong request
                run()


def test_described_requests(it):
    described(it, 8)


@pytest.mark.slow
def test_many_described_requests(it):
    described(it, 300)
