"""The page at / in front of the real routes: what the page's own tests assume of them is so."""

from __future__ import annotations

import json

import pytest
from playwright import sync_api
from tests.support.api_server import FakeEngine, adapter_at, fake_service, listening
from tests.support.browser import answer, column, expect_states, load, send

from veneer.serve import page as files
from veneer.serve.access import Key, Keyring, hash_of

expect = sync_api.expect
KEYS = Keyring(
    (
        Key("operator", hash_of("all"), ("*",), admin=True),
        Key("alice", hash_of("one"), ("french",), base=False),
    )
)


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page; no script may fail on the way, and nothing may be asked that is not there."""
    opened, wrong = [], []

    def show(keys=None):
        adapter_at(tmp_path / "dir" / "runs" / "7")
        service = fake_service(tmp_path / "dir", "french", "german", keys=keys, pause=0.01)
        server = listening(service, 1.0, files.router)
        url, _ = server.__enter__()
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        opened.append((server, context))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda answer: answer.status == 404 and wrong.append(answer.url))
        page.goto(url)
        return page, service

    yield show
    for server, context in reversed(opened):
        context.close()
        server.__exit__(None, None, None)
    assert wrong == []


def test_answers_stream_side_by_side(show):
    page, service = show()
    expect(page.locator(".column")).to_have_count(3)
    expect(page.locator("#training")).to_be_hidden()  # it trains nothing
    send(page, "hello", tokens=5)
    expect_states(page, "done", "done", "done")
    for place in range(3):
        expect(answer(page, place)).to_contain_text("w0 w1 w2 w3 w4")
    assert isinstance(service.engine, FakeEngine)
    assert sorted(map(str, (dict(request.blend) for request in service.engine.seen))) == [
        "{'french': 1.0}", "{'german': 1.0}", "{}",
    ]  # fmt: skip
    column(page, 0).get_by_label("Model of this column").select_option("Blend of two")
    send(page, "hello", tokens=2)
    expect_states(page, "done", "done", "done")
    assert {"french", "german"} in [set(request.blend) for request in service.engine.seen]


def test_the_page_opens_as_the_record_of_the_adapter_says(show, tmp_path):
    folder = adapter_at(tmp_path / "dir" / "a-first")
    prompt = {"mode": "completion", "example": "3 + 5 ="}
    (folder / "veneer.json").write_text(json.dumps({"provenance": {"prompt": prompt}}))
    page, _ = show()
    expect(page.locator(".column")).to_have_count(3)
    expect(page.get_by_role("radio", name="Completion")).to_be_checked()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("3 + 5 =")


def test_a_full_queue_is_told(show):
    page, service = show()
    expect(page.locator(".column")).to_have_count(3)
    service.engine.full = True
    send(page)
    expect_states(page, "failed", "failed", "failed")
    expect(column(page, 0).get_by_role("alert")).to_contain_text("full queue")


def test_adapters_are_loaded_pinned_and_unloaded(show):
    page, service = show()
    page.get_by_text("Load an adapter").click()
    load(page, "../out", "mine")
    expect(page.locator("#load-error")).to_contain_text("relative to the adapter folder")
    load(page, "runs/7")
    expect(page.get_by_text("mine is loaded.")).to_be_visible()
    row = page.get_by_role("listitem").filter(has_text="mine")
    row.get_by_role("button", name="Pin mine").click()
    expect(row.get_by_role("button", name="Pin mine")).to_have_attribute("aria-pressed", "true")
    assert service.bank.pinned == {"mine"}
    row.get_by_role("button", name="Pin mine").click()
    expect(row.get_by_role("button", name="Pin mine")).to_have_attribute("aria-pressed", "false")
    row.get_by_role("button", name="Unload mine").click()
    expect(page.get_by_text("mine is unloaded.")).to_be_visible()
    assert "mine" not in service.bank.paths


def test_keys(show):
    page, service = show(KEYS)
    for key, said in (("wrong", "does not know this key"), ("one", None)):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        if said:
            expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text(said)
    expect(page.get_by_role("dialog")).to_be_hidden()  # it takes what is typed while it is open
    expect(page.locator(".column")).to_have_count(1)
    send(page, "hello", tokens=2)
    expect_states(page, "done")
    expect(page.get_by_text("Load an adapter")).to_be_hidden()
    assert [dict(request.blend) for request in service.engine.seen] == [{"french": 1.0}]
