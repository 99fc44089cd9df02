"""How an adapter is prompted: from its record, whatever that holds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tests.support.api_server import adapter_at, serving

from veneer.serve.prompt_form import MAX_CHARS, prompt_form
from veneer.train.run_record import prompt_record

CHATS, TEXTS = SimpleNamespace(chat_template="{{ messages }}"), SimpleNamespace(chat_template=None)


def folder_with(tmp_path, record):
    folder = adapter_at(tmp_path / "adapter")
    (folder / "veneer.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder


def test_a_record_says_it():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "again"},
    ]
    assert prompt_record(chat, with_texts=False) == {"mode": "chat"}
    assert prompt_record(chat, with_texts=True) == {
        "mode": "chat",
        "system": "Be brief.",
        "example": "Hello",
    }
    assert prompt_record("3 + 5 =", with_texts=True) == {"mode": "completion", "example": "3 + 5 ="}
    assert prompt_record(None, with_texts=True) == {"mode": "completion"}
    calls = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]
    assert prompt_record(calls, with_texts=True) == {"mode": "chat", "example": "a"}


@pytest.mark.parametrize("base", [CHATS, TEXTS])
def test_the_page_hears_it(tmp_path, base):
    record = prompt_record([{"role": "user", "content": "Hello"}], with_texts=True)
    folder = folder_with(tmp_path, {"provenance": {"prompt": record}})
    assert prompt_form(folder, base) == {"mode": "chat", "system": None, "example": "Hello"}


@pytest.mark.parametrize(
    "record",
    [
        {}, {"provenance": None}, {"provenance": {}}, {"provenance": {"prompt": []}}, "{", "[]",
        {"provenance": {"prompt": {"mode": "shell", "system": 7, "example": "x" * (MAX_CHARS + 1)}}},
    ],
)  # fmt: skip
def test_a_record_that_says_nothing_of_use_leaves_it_to_the_base(tmp_path, record):
    folder = folder_with(tmp_path, record)
    for base, mode in ((CHATS, "chat"), (TEXTS, "completion")):
        expected = {"mode": mode, "system": None, "example": None}
        assert prompt_form(folder, base) == prompt_form(None, base) == expected


def test_a_model_says_how_it_is_prompted_to_the_keys_that_may_use_it(tmp_path):
    with serving(tmp_path / "dir", "french") as it, it.http() as http:
        record = {"mode": "completion", "example": "Bonjour"}
        (it.folder / "french" / "veneer.json").write_text(
            json.dumps({"provenance": {"prompt": record}})
        )
        assert http.get("/v1/models/french").json()["prompt"] == {**record, "system": None}
        assert http.get(f"/v1/models/{it.service.base}").json()["prompt"]["mode"] == "chat"
        assert http.get("/v1/models/german").status_code == 404
        assert all("prompt" not in card for card in http.get("/v1/models").json()["data"])
