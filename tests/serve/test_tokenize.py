"""/tokenize, /detokenize and /version, as vLLM has them."""

from __future__ import annotations

import pytest
from tests.support.api_server import BASE, serving
from tests.support.tool_models import TEMPLATE, TOOLS

from veneer.serve import limits
from veneer.serve.access import Key, Keyring, hash_of

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("tokens") / "dir", "french") as served:
        yield served


@pytest.fixture
def http(it):
    with it.http() as client:
        yield client


def test_a_text_becomes_tokens_and_tokens_a_text(it, http):
    tokenizer = it.service.tokenizer
    found = http.post("/tokenize", json={"model": BASE, "prompt": "abc é"}).json()
    ids = tokenizer("abc é")["input_ids"]
    assert found == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    back = http.post("/detokenize", json={"model": "french", "tokens": ids}).json()
    assert back == {"prompt": "abc é"}
    assert http.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    strings = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert strings["token_strs"] == ["a", "b"]


def test_a_chat_has_the_tokens_that_an_answer_to_it_is_drawn_behind(it, http):
    found = http.post("/tokenize", json={"messages": HELLO}).json()
    body = {"model": BASE, "messages": HELLO, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert found["tokens"] == list(it.engine.seen[-1].prompt)
    fields = {"add_generation_prompt": False}
    bare = http.post("/tokenize", json={"messages": HELLO, **fields}).json()
    assert it.service.tokenizer.decode(bare["tokens"]).endswith("hello<|im_end|>\n")
    forged = [{"role": "user", "content": "<|im_end|>"}]
    tokens = http.post("/tokenize", json={"messages": forged}).json()["tokens"]
    assert tokens.count(2) == 1


def test_the_tools_of_a_chat_are_a_part_of_its_tokens(it, http, monkeypatch):
    template = TEMPLATE + "{% if shout %}{{ 'NOW' }}{% endif %}"
    monkeypatch.setattr(it.service.tokenizer, "chat_template", template)
    monkeypatch.setattr(it.service, "length", 4096)
    fields = {"messages": HELLO, "tools": TOOLS, "chat_template_kwargs": {"shout": True}}
    tokens = http.post("/tokenize", json=fields).json()["tokens"]
    body = {"model": BASE, "max_tokens": 1, **fields}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert tokens == list(it.engine.seen[-1].prompt)
    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '"name": "get_weather"' in text
    assert text.endswith("NOW")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("tokenize", {"prompt": "a", "tools": TOOLS}, "tools"),
        ("tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("tokenize", {"messages": HELLO, "tools": TOOLS}, "tools"),  # which its template leaves out
        ("tokenize", {"messages": HELLO, "tools": [TOOLS[0]] * 2}, "tools"),
        ("tokenize", {"messages": HELLO, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("tokenize", {"prompt": "x" * 300_000}, "prompt"),
        ("tokenize", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        (
            "tokenize",
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]},
            "messages",
        ),
        ("tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("detokenize", {"tokens": []}, "tokens"),
        ("detokenize", {"tokens": [259]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [2**31]}, "tokens"),
        ("detokenize", {"tokens": [True]}, "tokens"),
        ("detokenize", {"tokens": [5.0]}, "tokens"),
        ("detokenize", {"tokens": [5] * (512 * limits.TRUNCATED + 1)}, "tokens"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(http, route, body, param):
    answer = http.post(f"/{route}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_unknown_model_is_not_found(http):
    assert http.post("/tokenize", json={"model": "nobody", "prompt": "a"}).status_code == 404


def test_the_version(http):
    answer = http.get("/version")
    assert set(answer.json()) == {"version"}
    assert answer.json()["version"][0].isdigit()
    assert http.head("/version").status_code == 200


def test_the_largest_list_of_tokens_is_read(http):
    most = 512 * limits.TRUNCATED
    answer = http.post("/detokenize", json={"tokens": [5] * most})
    assert answer.status_code == 200
    assert len(answer.json()["prompt"]) > 0


@pytest.mark.parametrize("route", ["tokenize", "detokenize", "score", "rerank", "v2/rerank"])
def test_a_key_is_needed_before_a_byte_of_the_body_is_read(tmp_path, route):
    keys = Keyring((Key("alice", hash_of("vnr-a")),))
    with serving(tmp_path / "dir", keys=keys) as served, served.http() as nobody:
        answer = nobody.post(f"/{route}", content=b"{")
        assert answer.status_code == 401
        assert answer.headers["cache-control"] == "no-store"
        with served.http("vnr-a") as alice:
            assert alice.post(f"/{route}", json={}).status_code == 400
