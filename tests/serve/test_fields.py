"""The table of fields in docs/serving.md: it is that of the code, and each of its cells is what the
server does with a body that has this field."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import fields_page
from tests.support.api_server import BASE, serving

from veneer.serve.body_rules import NEUTRAL

HELLO = [{"role": "user", "content": "hello"}]
#: bodies that are right but for what a test adds
BODIES = {
    "/v1/chat/completions": {"model": BASE, "messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"model": BASE, "prompt": "abc", "max_tokens": 2},
    "/v1/responses": {"model": BASE, "input": "abc", "max_output_tokens": 2},
    "/v1/messages": {"model": BASE, "messages": HELLO, "max_tokens": 2},
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [5]},
    "/score": {"model": BASE, "text_1": "a", "text_2": "b"},
    "/rerank": {"model": BASE, "query": "a", "documents": ["b"]},
}


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("fields") / "dir", "french") as served:
        yield served


@pytest.fixture
def http(it):
    with it.http() as client:
        yield client


def test_the_page_on_serving_has_each_field_beside_vllms():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert f"<!-- fields -->\n{fields_page.table()}\n<!-- /fields -->" in page
    assert f"vLLM {fields_page.version()}" in page
    assert fields_page.BODIES.keys() == BODIES.keys() == fields_page.vllm_fields().keys()


def is_refused_by_name(answer, name):
    error = answer.json().get("error") or {}
    return answer.status_code == 400 and f"the field '{name}', which is not" in error["message"]


@pytest.mark.parametrize("route", BODIES)
def test_a_field_is_treated_as_the_page_says(http, route):
    for (name, place), status in fields_page.cells().items():
        if place != route:
            continue
        strange = http.post(route, json={**BODIES[route], name: [{"strange": 1}]})
        plain = status.strip("*")
        if plain == fields_page.NO_EFFECT:
            assert not is_refused_by_name(strange, name), name
            continue
        assert strange.status_code == 400, name
        if plain == fields_page.REFUSED:
            assert name in strange.json()["error"]["message"]
        else:
            assert is_refused_by_name(strange, name) == (plain != fields_page.SUPPORTED), name
        if plain.startswith("`"):
            for value in NEUTRAL[name]:
                answer = http.post(route, json={**BODIES[route], name: value})
                assert not is_refused_by_name(answer, name), name
                assert answer.status_code == 200 or "an encoder" in answer.text, name
