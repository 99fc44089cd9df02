"""The HTTP API as the `openai` client speaks it, on a real port; what the engine behind it says is
given."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
from pydantic import ValidationError
from tests.support.api_server import BASE, adapter_at, serving, until

from veneer.kernels.draws import sample_seed
from veneer.serve.schemas import CompletionRequest


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("adapters") / "dir", "french", "german") as served:
        yield served


@pytest.fixture
def client(it):
    return it.client()


HELLO = [{"role": "user", "content": "hello"}]
TEXT = "w0 w1 w2 w3 w4 w5 w6 w7 "


# ----------------------------------------------------------------------------------------------
# models


def test_models(client):
    cards = {card.id: card for card in client.models.list()}
    assert cards.keys() == {BASE, "french", "german"}
    assert cards["french"].parent == BASE
    assert cards[BASE].parent is None
    assert client.models.retrieve("french").root == "french"
    assert client.models.retrieve(f"{BASE}:french").id == "french"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("italian")


@pytest.mark.parametrize(
    ("model", "blend"), [(BASE, {}), ("french", {"french": 1}), (f"{BASE}:german", {"german": 1})]
)
def test_a_model_is_the_base_or_an_adapter(it, client, model, blend):
    answer = client.chat.completions.create(model=model, messages=HELLO)
    assert answer.model == model
    assert it.engine.seen[-1].blend == blend


def test_a_blend_is_a_field_of_its_own(it, client):
    weights = {"french": 0.7, "german": 0.3}
    client.completions.create(model=BASE, prompt="a", extra_body={"adapters": weights})
    assert it.engine.seen[-1].blend == weights
    with pytest.raises(openai.BadRequestError, match="model 'tiny'"):
        client.completions.create(model="french", prompt="a", extra_body={"adapters": weights})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(
            model=BASE, prompt="a", extra_body={"adapters": {"french": 1, "italian": 1}}
        )


def test_an_adapter_that_appears_in_the_folder_is_found(it, client):
    adapter_at(it.folder / "late")
    it.service.catalogue._listed_at = -1e9  # as if a second had passed
    assert client.completions.create(model="late", prompt="a").model == "late"
    assert "late" in [card.id for card in client.models.list()]


# ----------------------------------------------------------------------------------------------
# chat


def test_chat(it, client):
    answer = client.chat.completions.create(model="french", messages=HELLO)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        TEXT,
        "assistant",
        "stop",
    )
    assert choice.logprobs is None
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    request = it.engine.seen[-1]
    assert it.service.tokenizer.decode(request.prompt) == prompt
    assert request.sampling.max_tokens == 512 - len(request.prompt)
    assert answer.usage.prompt_tokens == len(request.prompt)
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 8 + len(request.prompt)


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model="french", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_text_of_a_model_ends_an_event(it, monkeypatch):
    """Read with httpx, whose lines end at each of these."""
    said = "a\u2028data: [DONE]\u2029b\x85c\r\nd\x1ce\n\ndata: f"
    tokens = it.engine._write

    def write(ticket, deliver):
        tokens(ticket, lambda piece: deliver(replace(piece, text=said if piece.text else "")))

    monkeypatch.setattr(it.engine, "_write", write)
    body = {"model": BASE, "prompt": "a", "max_tokens": 2, "stream": True}
    with it.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == said * 2


def test_chat_stream_of_several_answers(client):
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(
        model=BASE, messages=HELLO, n=3, seed=10, stream=True, max_tokens=2
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    firsts = [sample_seed(10, index) for index in range(3)]
    assert texts == {index: f"w{first} w{first + 1} " for index, first in enumerate(firsts)}


def test_what_is_asked_reaches_the_engine(it, client):
    client.chat.completions.create(
        model=BASE, messages=HELLO, max_completion_tokens=5, temperature=0.3, top_p=0.9, seed=4, stop=["w7", "x"],
        logprobs=True, top_logprobs=2, n=2, extra_body={"top_k": 9, "ignore_eos": True},
    )  # fmt: skip
    sampling = it.engine.seen[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
        5,
        0.3,
        0.9,
        9,
    )
    assert (sampling.stop, sampling.logprobs, sampling.ignore_eos) == (("w7", "x"), 2, True)
    assert [request.sampling.seed for request in it.engine.seen[-2:]] == [
        sample_seed(4, 0),
        sample_seed(4, 1),
    ]


def test_stop(client):
    answer = client.chat.completions.create(model=BASE, messages=HELLO, stop="w3")
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        "w0 w1 w2 ",
        "stop",
    )


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=2
    )
    (shown,) = answer.choices[0].logprobs.content
    assert (shown.token, shown.logprob, shown.bytes) == ("w0 ", -0.5, list(b"w0 "))
    assert [(top.token, top.logprob) for top in shown.top_logprobs] == [("x0", -1.0), ("x1", -2.0)]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            SCHEMA,
        ),
    ],
)
def test_response_format(it, client, form, schema):
    client.chat.completions.create(model=BASE, messages=HELLO, response_format=form)
    assert it.engine.seen[-1].sampling.schema == schema


def test_messages_of_every_form(it, client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        client.chat.completions.create(model=BASE, messages=HELLO).choices[0].message.model_dump(),
        {"role": "user", "content": "c"},
    ]
    client.chat.completions.create(model=BASE, messages=messages)
    text = it.service.tokenizer.decode(it.engine.seen[-1].prompt)
    assert "system\nbe brief<" in text
    assert "user\nab<" in text
    assert f"assistant\n{TEXT}<" in text


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, "/v1/completions"), ("{{ raise_exception('only one') }}", "only one")],
)
def test_a_template_that_is_not_there_or_refuses(it, client, monkeypatch, template, said):
    monkeypatch.setattr(it.service.tokenizer, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(model=BASE, messages=HELLO)
    assert caught.value.param == "messages"


# ----------------------------------------------------------------------------------------------
# completions


def test_probabilities_are_written_out_beside_the_loop(client, monkeypatch):
    """The largest answer has 640,000 of them: seconds in which nobody else's stream would go on."""
    from veneer.serve import answers

    loops, made = [], answers._choice
    monkeypatch.setattr(
        answers, "_choice", lambda *args: loops.append(asyncio._get_running_loop()) or made(*args)
    )
    client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, n=2)
    assert loops == [None, None]


def test_the_table_of_a_prompt_is_written_out_beside_the_loop(client, monkeypatch):
    from veneer.serve import answers

    events, made = [], answers._event

    def event(writer, index, content, *args, **fields):
        events.append((content["text"], asyncio._get_running_loop() is None))
        return made(writer, index, content, *args, **fields)

    monkeypatch.setattr(answers, "_event", event)
    options = {"max_tokens": 1, "echo": True, "logprobs": 1, "stream": True}
    list(client.completions.create(model=BASE, prompt="abc", **options))
    assert events[:2] == [("abc", True), ("w0 ", False)]


def test_completion(it, client):
    answer = client.completions.create(model="german", prompt="abc")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert len(it.engine.seen[-1].prompt) == 3
    assert it.engine.seen[-1].sampling.max_tokens == 16
    assert answer.usage.prompt_tokens == 3


def test_completions_of_lists(it, client):
    answer = client.completions.create(
        model=BASE, prompt=["a", "bc"], n=2, seed=0, max_tokens=1, echo=True
    )
    seeds = [sample_seed(0, index) for index in range(4)]  # of one call, no two answers share draws
    assert [choice.text for choice in answer.choices] == [
        f"{text}w{seed} " for text, seed in zip(("a", "a", "bc", "bc"), seeds, strict=True)
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 3
    tokens = it.service.tokenizer("hi")["input_ids"]
    client.completions.create(model=BASE, prompt=tokens)
    assert list(it.engine.seen[-1].prompt) == tokens
    answer = client.completions.create(model=BASE, prompt=[tokens, tokens], echo=True, max_tokens=1)
    assert [choice.text for choice in answer.choices] == ["hiw0 "] * 2


def test_completion_stream(client):
    chunks = list(
        client.completions.create(model=BASE, prompt="a", stream=True, max_tokens=2, echo=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "aw0 w1 "
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client, stream):
    answer = client.completions.create(
        model=BASE, prompt="a", max_tokens=2, logprobs=1, stream=stream
    )
    shown = (
        [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    )
    assert [token for part in shown for token in part.tokens] == ["w0 ", "w1 "]
    assert [offset for part in shown for offset in part.text_offset] == [0, 3]
    assert shown[0].top_logprobs[0] == {"x0": -1.0, "w0 ": -0.5}
    assert shown[0].token_logprobs[0] == -0.5


# ----------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("audio", {"voice": "alloy", "format": "wav"}),
        ("functions", [{"name": "f"}]), ("use_beam_search", True), ("length_penalty", 0.5), ("early_stopping", True),
        ("modalities", ["text", "audio"]), ("reasoning_effort", "low"), ("prediction", {"type": "content"}),
        ("web_search_options", {}), ("tool_choice", "required"), ("nonsense", 1), ("service_tier", "flex"),
        ("skip_special_tokens", False), ("include_stop_str_in_output", True), ("chat_template", "{{ messages }}"),
        ("documents", [{"text": "a"}]), ("logits_processors", ["a"]), ("vllm_xargs", {"a": 1}),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        client.chat.completions.create(model=BASE, messages=HELLO, extra_body={field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("best_of", 3), ("suffix", "end")],
)
def test_completions_refuse_too(client, field, value):
    with pytest.raises(openai.BadRequestError, match=field):
        client.completions.create(model=BASE, prompt="a", extra_body={field: value})


def test_harmless_and_neutral_fields_pass(client):
    client.chat.completions.create(
        model=BASE, messages=HELLO, user="me", metadata={"a": "b"}, store=False, frequency_penalty=0, logit_bias={},
        extra_body={"tools": None, "tool_choice": "none", "modalities": ["text"], "service_tier": "auto"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "tool", "content": "x"}]}, {"n": 0}, {"n": 17},
        {"max_tokens": 0}, {"max_tokens": 600}, {"temperature": 3}, {"temperature": "1"}, {"top_p": -1},
        {"stop": ["x"] * 17}, {"stop": "y" * 300}, {"stop": ""}, {"top_logprobs": 21}, {"seed": 2**63},
        {"adapters": {}}, {"adapters": {"french": 1e9}}, {"stream": "yes"}, {"model": ""}, {"model": None},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x" * 600}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 70_000}}}},
    ],
)  # fmt: skip
def test_bad_values_are_refused(it, fields):
    with it.http() as http:
        answer = http.post(
            "/v1/chat/completions", json={"model": BASE, "messages": HELLO, **fields}
        )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert next(iter(fields)) in error["message"] or error["param"] or error["code"]
    assert "Expected" in error["message"]


FORMS = "Expected: a text, a list of 1 to 64 texts, a list of token ids, or a list of 1 to 64 such lists."
PICTURE = [{"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": []}, f"Found: a list of 0 items in prompt. {FORMS}"),
        ({"prompt": ["a", 5]}, f"Found: a list of numbers and texts in prompt. {FORMS}"),
        ({"prompt": [[5], "a"]}, f"Found: a list of lists and texts in prompt. {FORMS}"),
        ({"prompt": [True]}, f"Found: a list of something else in prompt. {FORMS}"),
        ({"prompt": 7}, f"Found: the number 7 in prompt. {FORMS}"),
        ({"prompt": {"a": 1}}, f"Found: an object in prompt. {FORMS}"),
        ({"prompt": ["a"] * 65}, "Found: 65 texts in prompt. Expected: at most 64. Do: send several requests."),
        ({"prompt": [[5]] * 65}, "Found: 65 lists of tokens in prompt. Expected: at most 64."),
        ({"prompt": [[5], []]}, "Found: a list of 0 items in prompt.1. Expected: at least 1 item."),
        ({"prompt": [[5], ["x"]]}, "Found: a text of 1 character in prompt.1.0. Expected: a valid integer."),
        ({"prompt": [-5]}, "Found: the number -5 in prompt.0. Expected: greater than or equal to 0."),
        ({"input": ["a"] * 257}, "Found: 257 texts in input. Expected: at most 256. Do: send several requests."),
        ({"input": [[5]] * 257}, "Found: 257 lists of tokens in input. Expected: at most 256."),
        ({"input": []}, "Found: a list of 0 items in input. Expected: a text, a list of 1 to 256 texts,"),
        ({"input": [1, "a"]}, "Found: a list of numbers and texts in input."),
        ({"stop": ["x"] * 17}, "Found: 17 items in stop. Expected: a text, or a list of at most 16 texts."),
        ({"stop": [5]}, "Found: a list of 1 item in stop. Expected: a text, or a list of at most 16 texts."),
        ({"stop": "y" * 300}, "Found: a text of 300 characters in stop. Expected: at most 256 characters."),
        ({"stop": ["y", ""]}, "Found: a text of 0 characters in stop.1. Expected: at least 1 character."),
        ({"n": 17}, "Found: the number 17 in n. Expected: less than or equal to 16."),
        ({"temperature": "1"}, "Found: a text of 1 character in temperature. Expected: a valid number."),
        ({"adapters": dict.fromkeys("abcdefghi", 1.0)}, "Found: 9 adapters in a blend. Expected: at most 8."),
        ({"adapters": {"a": "x"}}, "Found: a text of 1 character in adapters.a. Expected: a valid number."),
        ({"messages": []}, "Found: a list of 0 items in messages. Expected: at least 1 item."),
        ({"messages": [{"role": "user"}]}, "Found: no field 'messages.0.content'."),
        ({"messages": [{"role": "data", "content": "a"}]}, "messages.0.role. Expected: 'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "messages.0.content.0.type. Expected: 'text'."),
        ({"messages": [{"role": "user", "content": []}]}, "in messages.0.content. Expected: at least 1 item."),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "Found: no field 'response_format.json_schema.schema'."),
        ({"response_format": {"type": "xml"}}, "in response_format. Expected: "),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 70_000}}}},
         "Found: a schema of 70,"),
        ({"structured_outputs": {"json": {"a": "b" * 70_000}}}, "Found: a schema of 70,"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body_is_said_of_what_was_sent(it, fields, said):
    """pydantic's first words were "Input should be a valid string" for most of these."""
    route = (
        "chat/completions"
        if "messages" in fields
        else "embeddings"
        if "input" in fields
        else "completions"
    )
    rest = (
        {} if route == "embeddings" else {"messages": HELLO} if "chat" in route else {"prompt": "a"}
    )
    with it.http() as http:
        answer = http.post(f"/v1/{route}", json={"model": BASE, **rest, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert said in error["message"]
    assert error["param"] == next(iter(fields))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "tiny", "model": "french"}', b'{"seed": NaN}', b"\xff\xfe", b"[" * 5000,
     b'{"model": "\\ud800"}', b'{"seed": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "open", "list", "null", "twice", "nan", "bytes", "deep", "surrogate", "digits"],
)  # fmt: skip
@pytest.mark.parametrize(
    "route", ["chat/completions", "completions", "embeddings", "load_lora_adapter"]
)
def test_bodies_that_are_no_json(it, route, body):
    with it.http() as http:
        answer = http.post(
            f"/v1/{route}", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


MANY = 200_000


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": [{}] * MANY}, {"prompt": [""] * MANY}, {"prompt": [[]] * MANY}, {"prompt": [[{}] * MANY]},
        {"stop": [{}] * MANY}, {"adapters": dict.fromkeys(map(str, range(60_000)), "")},
        dict.fromkeys(map(str, range(60_000)), 1), {"response_format": {"type": "x" * 900_000}},
    ],
    ids=["objects", "texts", "lists", "inner", "stops", "blend", "fields", "tag"],
)  # fmt: skip
def test_a_body_full_of_errors_costs_no_more_than_its_first_one(field):
    """An error object for each of them took seconds, in the loop that serves everybody."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": BASE, "prompt": "a", **field})
    assert caught.value.error_count() <= 12


def test_the_answer_to_a_wrong_body_is_short(it):
    body = {"model": BASE, "prompt": "a", "response_format": {"type": "x" * 900_000}}
    with it.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert len(answer.content) < 1000


def test_a_body_of_another_type_is_refused(it):
    body = json.dumps({"model": BASE, "prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        with it.http() as http:
            answer = http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"stream_options": {}, "stream": False}, "stream_options"),
        ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)
def test_a_field_that_means_nothing_without_another_is_refused(it, route, fields, param):
    """As OpenAI refuses it; it was taken and ignored."""
    with it.http() as http:
        body = (
            {"model": BASE, "messages": HELLO}
            if "chat" in route
            else {"model": BASE, "prompt": "a"}
        )
        answer = http.post(f"/v1/{route}", json={**body, **fields})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert param in answer.json()["error"]["message"]
        nothing = (
            {"top_logprobs": 0, "max_tokens": 3, "max_completion_tokens": 3}
            if "chat" in route
            else {}
        )
        assert (
            http.post(f"/v1/{route}", json={**body, **nothing, "stream_options": None}).status_code
            == 200
        )


def test_tokens_and_prompts_that_cannot_be(it, client):
    for prompt in ([259], [2**31], [-1], "", "x" * 512, ["ok", "x" * 512], [[1], []]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=BASE, prompt=prompt, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="answers"):
        client.completions.create(model=BASE, prompt=["a"] * 64, n=2)
    with pytest.raises(openai.BadRequestError, match="encoder"):
        client.embeddings.create(model=BASE, input="a")


def test_unknown_routes_and_methods(it):
    with it.http() as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/completions", 405),
            ("GET", "/docs", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]


# ----------------------------------------------------------------------------------------------
# failures of the engine


@pytest.fixture
def engine(it):
    yield it.engine
    it.engine.full, it.engine.fails, it.engine.late, it.engine.pause = False, "", False, 0.0


def test_a_full_queue_is_429_and_says_when(it, client, engine):
    engine.full = True
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=BASE, messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "3"
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=BASE, messages=HELLO, stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(client, engine, stream):
    engine.fails = "Found: a fault."
    with pytest.raises(openai.InternalServerError, match="a fault"):
        client.chat.completions.create(model=BASE, messages=HELLO, stream=stream)
    engine.fails, engine.late = "", True
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=HELLO, stream=stream)
    assert caught.value.status_code == 504
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_engine_that_fails_in_mid_stream(client, engine):
    engine.pause = 0.02
    stream = client.chat.completions.create(model=BASE, messages=HELLO, stream=True)
    next(stream)
    engine.fails = "Found: a fault."
    with pytest.raises(openai.APIError, match="a fault"):
        list(stream)


def test_one_of_several_answers_that_is_refused_cancels_the_others(it, client, engine):
    submit, calls = engine.submit, []

    def second_is_busy(request, deliver):
        calls.append(request)
        engine.full = len(calls) > 1
        return submit(request, deliver)

    engine.submit, engine.pause = second_is_busy, 5.0
    try:
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model=BASE, messages=HELLO, n=3)
    finally:
        del engine.submit
    assert len(calls) == 2
    assert engine.tickets[-1].cancelled.is_set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_a_client_that_goes_away_cancels_its_answer(it, engine, stream, after):
    """Before the first word, or (in a stream) after it."""
    engine.pause = 5.0 if not after else 0.05
    it.engine.words = 10_000
    count, body = len(engine.tickets), {"model": BASE, "messages": HELLO, "stream": stream}
    try:
        with httpx.Client(base_url=it.url, timeout=httpx.Timeout(0.5)) as http:
            if after and stream:
                with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    next(answer.iter_bytes())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/chat/completions", json=body)
        until(lambda: len(engine.tickets) == count + 1 and engine.tickets[-1].cancelled.is_set())
        until(lambda: engine.running == 0)
    finally:
        it.engine.words = 8


def test_an_engine_that_does_not_run_is_not_ready(it, engine):
    with it.http() as http:
        assert http.get("/ready").status_code == 200
        engine.ready = False
        try:
            answer = http.get("/ready")
            assert (answer.status_code, http.get("/health").status_code) == (503, 200)
            assert "engine" in answer.json()["error"]["message"]
        finally:
            engine.ready = True


def test_no_thread_stays(it, client, engine):
    before = threading.active_count()
    for _ in range(20):
        client.chat.completions.create(model=BASE, messages=HELLO)
    until(lambda: threading.active_count() <= before + 1)


# ---------------------------------------------------------------------------------------------- the
# tokenizer's thread


@pytest.fixture
def read(it, monkeypatch):
    """The sizes of the texts that the tokenizer is given, in order."""
    sizes, call = [], type(it.service.tokenizer).__call__

    def counted(self, text, *args, **options):
        sizes.append(len(text))
        return call(self, text, *args, **options)

    monkeypatch.setattr(type(it.service.tokenizer), "__call__", counted)
    return sizes


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_text_that_cannot_fit_is_refused_by_its_beginning(it, read, route):
    """A whole one of 1 MB took the tokenizer a second or two, for which everybody waited."""
    text = "a" * 900_000
    said = (
        {"messages": [{"role": "user", "content": text}]} if "chat" in route else {"prompt": text}
    )
    with it.http() as http:
        answer = http.post(f"/v1/{route}", json={"model": BASE, **said})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "Found: a text of 900," in error["message"]
    assert "at most 512 tokens" in error["message"]
    assert max(read) <= 16 * 2**10


def test_others_have_the_tokenizer_between_the_prompts_of_one_call(it, client, read):
    with ThreadPoolExecutor(2) as pool:
        begun, go = threading.Event(), threading.Event()
        it.service.text_executor.submit(lambda: (begun.set(), go.wait(20)))
        assert begun.wait(10)
        many = pool.submit(
            client.completions.create, model=BASE, prompt=["b" * 400] * 64, max_tokens=1
        )
        until(lambda: it.service.waiting_chars)
        waited = it.service.waiting_chars
        short = pool.submit(client.completions.create, model=BASE, prompt="short", max_tokens=1)
        until(lambda: it.service.waiting_chars > waited)
        go.set()
        assert len(many.result(20).choices) == 64
        assert short.result(20).choices
    assert len(read) == 65
    assert read.index(5) <= 41  # behind one group of the others', not behind all of them
