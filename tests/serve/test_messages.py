"""/v1/messages and its count of tokens, in Anthropic's form."""

from __future__ import annotations

import json

import pytest
from tests.support.api_server import BASE, serving
from tests.support.tool_models import TEMPLATE, TIME, WEATHER, scripted, weather_script

from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.requests import Piece, Token

TOOLS = [
    {"name": "get_weather", "description": "The weather.", "input_schema": WEATHER},
    {"name": "get_time", "input_schema": TIME},
]
ASKED = [{"role": "user", "content": "the weather?"}]


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("messages") / "dir", "french") as served:
        served.service.tokenizer.chat_template = TEMPLATE
        served.service.length = 4096
        decode = served.service.tokenizer.decode
        served.engine._write = scripted(served.engine, weather_script, decode)
        yield served


def post(it, path="/v1/messages", **fields):
    body = {"model": BASE, "messages": ASKED, "max_tokens": 400, **fields}
    with it.http() as http:
        return http.post(
            path, json={name: value for name, value in body.items() if value is not None}
        )


def stream(it, **fields):
    """The events of a stream, by their names."""
    with it.http() as http:
        body = {"model": BASE, "messages": ASKED, "max_tokens": 400, "stream": True, **fields}
        text = http.post("/v1/messages", json=body).text
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def prompt_of(it) -> str:
    return it.service.tokenizer.decode(it.engine.seen[-1].prompt)


def test_a_text(it):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    answer = post(
        it, model="french", system=system, temperature=0.5, top_k=3, metadata={"user_id": "a"}
    )
    message = answer.json()
    assert answer.status_code == 200, answer.text
    assert message["content"] == [{"type": "text", "text": "Hello."}]
    assert (message["role"], message["type"], message["model"]) == (
        "assistant",
        "message",
        "french",
    )
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    request = it.engine.seen[-1]
    assert message["usage"] == {
        "input_tokens": len(request.prompt), "output_tokens": 2,
        "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
    }  # fmt: skip
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 3)
    assert request.sampling.max_tokens == 400
    assert prompt_of(it).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe"
    )


def test_a_call_and_its_result(it):
    message = post(it, tools=TOOLS).json()
    text, call = message["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (call["type"], call["name"], call["input"]) == (
        "tool_use",
        "get_weather",
        {"city": "Bern", "days": 2},
    )
    assert call["id"].startswith("toolu_")
    assert message["stop_reason"] == "tool_use"
    assert '"description": "The weather."' in prompt_of(it)
    result = {
        "type": "tool_result",
        "tool_use_id": call["id"],
        "content": [{"type": "text", "text": "sunny"}],
    }
    more = [{"type": "text", "text": "Thanks."}]
    turns = [
        *ASKED,
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result, *more]},
    ]
    answer = post(it, tools=TOOLS, messages=turns).json()
    assert answer["content"] == [{"type": "text", "text": "It is sunny."}]
    assert "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>user\nThanks.<|im_end|>" in prompt_of(it)


def test_a_result_has_the_name_of_its_tool(it, monkeypatch):
    call = post(it, tools=TOOLS).json()["content"][1]
    named = TEMPLATE.replace("message.content", "(message.name or '') + message.content")
    monkeypatch.setattr(it.service.tokenizer, "chat_template", named)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    turns = [
        *ASKED,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    assert post(it, tools=TOOLS, messages=turns).status_code == 200
    assert "tool\nget_weathersunny" in prompt_of(it)


def test_a_call_without_an_object_of_arguments_is_text_and_no_use_of_a_tool(it, monkeypatch):
    text = '<tool_call>\n{"name": "get_weather", "arguments": "hello"}\n</tool_call>'
    script = scripted(it.engine, lambda prompt: text, it.service.tokenizer.decode)
    monkeypatch.setattr(it.engine, "_write", script)
    message = post(it, tools=TOOLS).json()
    assert {block["type"] for block in message["content"]} == {"text"}
    assert message["stop_reason"] == "end_turn"


def test_a_stream_has_anthropics_events_in_order(it):
    events = stream(it, tools=TOOLS)
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == len(it.engine.seen[-1].prompt)
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 10
    blocks = [event for event in events if event["type"].startswith("content_block")]
    starts = [event for event in blocks if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1]
    assert starts[0]["content_block"] == {"type": "text", "text": ""}
    assert starts[1]["content_block"] == {
        **starts[1]["content_block"],
        "name": "get_weather",
        "input": {},
    }
    deltas = [event["delta"] for event in blocks if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "Let me see."
    arguments = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert len(arguments) > 5
    assert json.loads("".join(arguments)) == {"city": "Bern", "days": 2}
    kinds = [(event["type"].removeprefix("content_block_"), event["index"]) for event in blocks]
    assert (
        kinds.index(("stop", 0))
        < kinds.index(("start", 1))
        < kinds.index(("stop", 1))
        == len(kinds) - 1
    )


@pytest.mark.parametrize(
    ("choice", "schema"),
    [
        ({"type": "any"}, "array"),
        ({"type": "tool", "name": "get_weather"}, "object"),
        ({"type": "none"}, None),
    ],
)
def test_choices(it, choice, schema):
    message = post(it, tools=TOOLS, tool_choice=choice).json()
    sent = it.engine.seen[-1].sampling.schema
    assert (sent and sent["type"]) == schema
    calls = [block["input"] for block in message["content"] if block["type"] == "tool_use"]
    assert calls == ([{"city": "Bern", "days": 1}] if schema else [])
    post(it, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert it.engine.seen[-1].sampling.schema["maxItems"] == 1


def test_ends(it):
    message = post(it, stop_sequences=["x", "lo"]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "lo")
    assert message["content"] == [{"type": "text", "text": "Hel"}]
    assert stream(it, stop_sequences=["lo"])[-2]["delta"]["stop_sequence"] == "lo"
    assert post(it, max_tokens=1).json()["stop_reason"] == "max_tokens"


def test_a_call_that_is_cut_off_stays_text(it):
    message = post(it, tools=TOOLS, max_tokens=24).json()
    assert message["stop_reason"] == "max_tokens"
    assert [block["type"] for block in message["content"]] == ["text", "text"]
    assert message["content"][1]["text"].startswith("get_weather {")


def test_the_count_of_tokens(it):
    fields = {"tools": TOOLS, "system": "Be brief."}
    counted = post(it, "/v1/messages/count_tokens", max_tokens=None, **fields)
    assert counted.json() == {"input_tokens": post(it, **fields).json()["usage"]["input_tokens"]}
    with_a_budget = post(it, "/v1/messages/count_tokens")
    assert with_a_budget.status_code == 400


def test_a_failure_in_mid_stream_is_an_event(it, monkeypatch):
    def write(ticket, deliver):
        deliver(Piece("a", (Token(7, "a"),)))
        deliver(Piece("", (), "error", "Found: a fault.", None))
        it.engine.running -= 1

    monkeypatch.setattr(it.engine, "_write", write)
    last = stream(it)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "a fault" in last["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "no field 'max_tokens'"), ({"nonsense": 1}, "'nonsense'"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a block of another type"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "It"}]}, "a last message of the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
         "a block of tool_use in a message of user"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]},
         "for the call 'a'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "'custom'"),
        ({"tool_choice": {"type": "any"}}, "without tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "'thinking'"),
        ({"max_tokens": 5000}, "tokens together"), ({"temperature": 3}, "temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(it, fields, said):
    answer = post(it, **fields)
    error = answer.json()
    assert answer.status_code == 400
    assert error.keys() == {"type", "error"}
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert said in error["error"]["message"]


def test_fields_that_ask_for_nothing_pass(it):
    fields = {"thinking": {"type": "disabled"}, "service_tier": "standard_only", "mcp_servers": []}
    assert post(it, **fields).status_code == 200


def test_keys_and_statuses(tmp_path):
    keys = Keyring((Key("alice", hash_of("secret"), ("french",), base=False),))
    body = {"model": "french", "messages": ASKED, "max_tokens": 9}
    with serving(tmp_path / "dir", "french", "german", keys=keys) as it:
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            sent = body if path == "/v1/messages" else {**body, "max_tokens": None}
            with it.http() as http:
                refused = http.post(path, json=sent)
                assert (refused.status_code, refused.json()["error"]["type"]) == (
                    401,
                    "authentication_error",
                )
                headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
                assert http.post(path, json=sent, headers=headers).status_code == 200
                for model in (BASE, "german", "nobody"):
                    absent = http.post(path, json={**sent, "model": model}, headers=headers)
                    assert (absent.status_code, absent.json()["error"]["type"]) == (
                        404,
                        "not_found_error",
                    )
        it.engine.full = True
        with it.http() as http:
            busy = http.post("/v1/messages", json=body, headers=headers)
        assert (busy.status_code, busy.json()["error"]["type"]) == (429, "rate_limit_error")
        assert busy.headers["retry-after"]
