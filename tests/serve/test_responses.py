"""/v1/responses, as the `openai` client sends and reads it."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel
from tests.support.api_server import BASE, serving
from tests.support.tiny import CHATML
from tests.support.tool_models import TEMPLATE, TIME, WEATHER, scripted, weather_script


def flat(name, parameters, **fields):
    return {"type": "function", "name": name, "parameters": parameters, **fields}


TOOLS = [flat("get_weather", WEATHER, description="The weather."), flat("get_time", TIME)]


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("responses") / "dir", "french") as served:
        served.service.tokenizer.chat_template = TEMPLATE
        served.service.length = 4096
        decode = served.service.tokenizer.decode
        served.engine._write = scripted(served.engine, weather_script, decode)
        yield served


@pytest.fixture
def client(it):
    return it.client()


def prompt_of(it) -> str:
    return it.service.tokenizer.decode(it.engine.seen[-1].prompt)


def test_a_text(it, client):
    answer = client.responses.create(
        model="french", input="hi", instructions="Be brief.", temperature=0.5, top_p=0.9,
        max_output_tokens=50, store=False,
    )  # fmt: skip
    assert answer.output_text == "Hello."
    assert (answer.status, answer.model, answer.object) == ("completed", "french", "response")
    assert (answer.to_dict()["store"], answer.instructions) == (False, "Be brief.")
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    request = it.engine.seen[-1]
    assert request.blend == {"french": 1}
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (50, 0.5, 0.9)
    assert prompt_of(it).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<"
    )
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(request.prompt), 2)
    assert usage.total_tokens == usage.input_tokens + 2
    assert (
        usage.input_tokens_details.cached_tokens
        == usage.output_tokens_details.reasoning_tokens
        == 0
    )


def test_a_result_has_the_name_of_its_tool(it, client, monkeypatch):
    named = TEMPLATE.replace("message.content", "(message.name or '') + message.content")
    monkeypatch.setattr(it.service.tokenizer, "chat_template", named)
    arguments = json.dumps({"city": "Bern", "days": 2})
    conversation = [
        {"role": "user", "content": "the weather?"},
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "get_weather",
            "arguments": arguments,
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    client.responses.create(model=BASE, input=conversation, tools=TOOLS)
    assert "tool\nget_weathersunny" in prompt_of(it)


def test_a_call_and_its_result(it, client):
    conversation = [{"role": "user", "content": "the weather?"}]
    answer = client.responses.create(model=BASE, input=conversation, tools=TOOLS)
    message, call = answer.output
    assert message.content[0].text == "Let me see."
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == {"city": "Bern", "days": 2}
    conversation += [entry.model_dump() for entry in answer.output]
    result = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "ny"}]
    conversation += [{"type": "function_call_output", "call_id": call.call_id, "output": result}]
    answer = client.responses.create(model=BASE, input=conversation, tools=TOOLS)
    assert answer.output_text == "It is sunny."
    prompt = prompt_of(it)
    assert prompt.count("<|im_start|>assistant") == 2  # the text and its call are one turn
    assert 'Let me see.\n<tool_call>\n{"name": "get_weather"' in prompt


def test_calls_without_a_text_are_one_turn(it, client):
    calls = [
        {"type": "function_call", "call_id": f"call_{n}", "name": "get_time", "arguments": "{}"}
        for n in range(2)
    ]
    results = [
        {"type": "function_call_output", "call_id": f"call_{n}", "output": "noon"} for n in range(2)
    ]
    client.responses.create(
        model=BASE, input=[{"role": "user", "content": "when?"}, *calls, *results], tools=TOOLS
    )
    turns = prompt_of(it).split("<|im_start|>")[2:]
    assert [turn.split("\n")[0] for turn in turns] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert turns[1].count("<tool_call>") == 2


EVENTS = ["response.created", "response.in_progress"]
MESSAGE = [
    "response.output_item.added", "response.content_part.added", "response.output_text.delta",
    "response.output_text.done", "response.content_part.done", "response.output_item.done",
]  # fmt: skip
CALL = [
    "response.output_item.added", "response.function_call_arguments.delta",
    "response.function_call_arguments.done", "response.output_item.done",
]  # fmt: skip


def kinds(events):
    """The types of events; those that follow one another are one."""
    types = [event.type for event in events]
    return [kind for n, kind in enumerate(types) if n == 0 or types[n - 1] != kind]


def test_a_stream_has_openais_events_in_order(client):
    events = list(client.responses.create(model=BASE, input="hi", tools=TOOLS, stream=True))
    assert kinds(events) == [*EVENTS, *MESSAGE, *CALL, "response.completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert last.status == "completed"
    assert last.output_text == "Let me see."
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.id}
    deltas = [event.delta for event in events if event.type == CALL[1]]
    assert len(deltas) > 5
    assert "".join(deltas) == last.output[1].arguments
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == [0, 1]
    assert [event.item.id for event in done] == [entry.id for entry in last.output]


def test_the_clients_own_reader_of_streams_takes_them(client):
    class Weather(BaseModel):
        city: str
        days: int

    with client.responses.stream(model=BASE, input="hi", tools=TOOLS) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output[1].name == "get_weather"
    with client.responses.stream(model=BASE, input="hi", text_format=Weather) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == Weather(city="Bern", days=1)


def test_an_answer_that_is_cut_off_is_incomplete(client):
    answer = client.responses.create(model=BASE, input="hi", max_output_tokens=1)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    events = list(client.responses.create(model=BASE, input="hi", max_output_tokens=1, stream=True))
    assert events[-1].type == "response.incomplete"


def test_an_answer_without_a_letter_is_a_message(it, client, monkeypatch):
    decode = it.service.tokenizer.decode
    monkeypatch.setattr(it.engine, "_write", scripted(it.engine, lambda prompt: "", decode))
    answer = client.responses.create(model=BASE, input="hi")
    assert (answer.output_text, len(answer.output)) == ("", 1)
    events = list(client.responses.create(model=BASE, input="hi", stream=True))
    assert kinds(events) == [*EVENTS, *MESSAGE[:2], *MESSAGE[3:], "response.completed"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_forced_calls(it, client, choice):
    answer = client.responses.create(model=BASE, input="hi", tools=TOOLS, tool_choice=choice)
    (call,) = answer.output
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Bern", "days": 1})
    assert it.engine.seen[-1].sampling.schema["type"] == (
        "array" if choice == "required" else "object"
    )


def test_a_format(it, client):
    class Weather(BaseModel):
        city: str

    answer = client.responses.parse(model=BASE, input="hi", text_format=Weather)
    assert answer.output_parsed == Weather(city="Bern")
    client.responses.create(model=BASE, input="hi", text={"format": {"type": "json_object"}})
    assert it.engine.seen[-1].sampling.schema == {"type": "object"}


def test_a_failure_in_mid_stream_is_an_event(it, client, monkeypatch):
    from veneer.serve.requests import Piece, Token

    def write(ticket, deliver):
        deliver(Piece("a", (Token(7, "a"),)))
        deliver(Piece("", (), "error", "Found: a fault.", None))
        it.engine.running -= 1

    monkeypatch.setattr(it.engine, "_write", write)
    events = list(client.responses.create(model=BASE, input="hi", stream=True))
    assert events[-1].type == "response.failed"
    assert "a fault" in events[-1].response.error.message
    with pytest.raises(openai.InternalServerError, match="a fault"):
        client.responses.create(model=BASE, input="hi")


def test_fields_that_ask_for_nothing_pass(client):
    client.responses.create(
        model=BASE, input="hi", metadata={"a": "b"}, user="me", background=False, include=[],
        truncation="disabled", parallel_tool_calls=True, service_tier="auto", top_logprobs=0,
        text={"format": {"type": "text"}, "verbosity": "medium"}, prompt_cache_key="k",
        extra_body={"previous_response_id": None, "conversation": None, "reasoning": {}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "the whole conversation in input"),
        ({"conversation": "conv_1"}, "conversation", "keeps no conversation"),
        ({"store": True}, "store", "keeps no response"),
        ({"background": True}, "background", "not supported"),
        ({"nonsense": 1}, "nonsense", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not supported"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "reasoning", "id": "a"}]}, "input", "an item of another type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "'input_text'"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input", "for the call 'a'"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "no tool of the request"),
        ({"tools": TOOLS, "text": {"format": {"type": "json_object"}}}, "text", "beside tools"),
        ({"input": "x" * 5000}, "input", "tokens"),
        ({"max_output_tokens": 5000}, "input", "tokens together"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"a": "b" * 70_000}}}}, "text", "schema"),
        ({"model": "nobody"}, "model", "does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(it, fields, param, said):
    with it.http() as http:
        answer = http.post("/v1/responses", json={"model": BASE, "input": "hi", **fields})
    error = answer.json()["error"]
    assert answer.status_code == (404 if "model" in fields else 400), answer.text
    assert error["param"] == param
    assert said in error["message"]


def test_a_template_that_leaves_tools_out_is_refused(it, client, monkeypatch):
    monkeypatch.setattr(it.service.tokenizer, "chat_template", CHATML)
    with pytest.raises(openai.BadRequestError, match="chat template does not show"):
        client.responses.create(model=BASE, input="hi", tools=TOOLS)
