"""The page at /, in a real browser against a server that answers slowly, badly or with HTML."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from playwright import sync_api
from tests.support.browser import QUIET, answer, column, expect, expect_states, load, send
from tests.support.fake_server import BYTES, HTML, Fake, serve_fake

from veneer.serve import page as files

expect.set_options(timeout=20_000)
QUIET += ["--disable-component-update", "--disable-sync"]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
NASTY = '<img src=x onerror="window.pwned=1">'

Open = Callable[..., "sync_api.Page"]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page looks at the server more often than each two seconds, for which the test would
    wait."""
    script = files.FILE_CONTENTS["page.js"]
    assert script.count(b"const EVERY = 2000;") == 1
    monkeypatch.setitem(
        files.FILE_CONTENTS, "page.js", script.replace(b"EVERY = 2000", b"EVERY = 300")
    )


@pytest.fixture
def show(browser: sync_api.Browser) -> Iterator[Open]:
    """Opens the page of a fake server. At the end: no script failed, no policy was broken, no other
    host was asked."""
    wrong, stack = [], ExitStack()

    def note(message: sync_api.ConsoleMessage) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def show(fake: Fake, **options: object) -> sync_api.Page:
        address = stack.enter_context(serve_fake(fake))
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        stack.callback(context.close)  # before the server stops: it waits for streams
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(address) or wrong.append(request.url)
        )
        page.goto(address)
        return page

    with stack:
        yield show
    assert wrong == []


def fake(*names: str, **knobs: object) -> Fake:
    made = Fake(**knobs)  # type: ignore[arg-type]
    for name in names:
        made.add(name)
    return made


# Asking


def test_two_adapters_and_the_base_answer_side_by_side(show: Open):
    server = fake("french", "german", held=True)
    page = show(server)
    expect(page.locator(".column")).to_have_count(3)
    send(page, tokens=30)
    for place in range(3):  # none waits for another to end
        expect(answer(page, place)).to_contain_text("three")
    expect_states(page, "streaming", "streaming", "streaming")
    expect(page.locator("#send")).to_have_attribute("aria-disabled", "true")
    server.held = False
    expect_states(page, "done", "done", "done")
    assert answer(page, 0).text_content() == "one two three " * 10
    expect(answer(page, 1)).to_contain_text("french:one french:two")
    for place in range(3):
        assert float(column(page, place).locator(".speed").inner_text()) > 1
        assert re.fullmatch(r"\d+ ms", column(page, place).locator(".first").inner_text())
        expect(column(page, place).locator(".tokens")).to_have_text("30")
        expect(column(page, place).locator(".ending")).to_have_text("Ended at max tokens")
    expect(page.get_by_role("log")).to_contain_text("french: Ended at max tokens. french:one")


def test_what_is_sent_before_the_models_are_known_goes_out_when_they_are(show: Open):
    page = show(fake("french"))
    held: list[sync_api.Route] = []
    page.route("**/v1/models", lambda route: held.append(route))  # noqa: PLW0108 (playwright looks at the handler)
    page.reload()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    send(page)
    expect(page.locator(".column")).to_have_count(0)
    page.wait_for_timeout(50)
    assert held
    page.unroute("**/v1/models")  # which lets go of what it held
    expect_states(page, "done", "done")


def test_what_is_asked_is_what_was_set(show: Open):
    server = fake("french")
    page = show(server)
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("radio", name="Completion").check()
    send(page, "Once upon a time", tokens=5)
    expect_states(page, "done", "done")
    expect(column(page, 1).locator(".answer")).to_contain_text("Once upon a timefrench:Once")
    asked = {body["model"]: body for body in server.asked}
    assert asked.keys() == {"tiny-base", "french"}
    expected = {
        "prompt": "Once upon a time",
        "temperature": 0.25,
        "max_tokens": 5,
        "seed": 7,
        "stream": True,
    }
    assert asked["french"] == {
        **expected,
        "model": "french",
        "stream_options": {"include_usage": True},
    }
    server.asked.clear()
    page.get_by_role("radio", name="Chat").check()
    page.get_by_label("Seed").fill("")
    send(page, "hello")
    expect_states(page, "done", "done")
    assert server.asked[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert "seed" not in server.asked[0]


def test_a_system_prompt_and_stop_strings_are_sent(show: Open):
    server = fake("french")
    page = show(server)
    expect(page.locator(".column")).to_have_count(2)
    expect(page.get_by_label("System prompt")).to_be_hidden()
    page.get_by_role("button", name="Add a system prompt").click()
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.type("Be brief.")
    page.get_by_label("Stop at").fill("User:\n\\n\\n\n\\\\n")
    send(page)
    expect_states(page, "done", "done")
    sent = server.asked[0]
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two three"},
    ]
    assert sent["stop"] == ["User:", "\n\n", "\\n"]
    server.asked.clear()
    page.get_by_role("radio", name="Completion").check()
    expect(page.get_by_label("System prompt")).to_be_hidden()  # a text has none
    page.get_by_label("Stop at").fill("")
    send(page)
    expect_states(page, "done", "done")
    assert not server.asked[0].keys() & {"messages", "stop"}


def test_the_page_opens_as_the_first_adapter_was_trained(show: Open):
    trained = {"mode": "completion", "example": "3 + 5 ="}
    page = show(fake("sums", "other", prompts={"sums": trained, "other": {"mode": "chat"}}))
    expect(page.get_by_role("radio", name="Completion")).to_be_checked()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("3 + 5 =")
    expect(page.get_by_role("button", name="Add a system prompt")).to_be_hidden()

    trained = {"mode": "chat", "system": "You are a pirate.", "example": "Hello"}
    server = fake("pirate", prompts={"pirate": trained})
    page = show(server)
    expect(page.get_by_label("System prompt")).to_have_value("You are a pirate.")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Hello")
    page.get_by_role("button", name="Send").click()
    expect_states(page, "done", "done")
    assert [message["role"] for message in server.asked[0]["messages"]] == ["system", "user"]


def test_what_somebody_chose_or_typed_stays(show: Open):
    trained = {"mode": "completion", "example": "3 + 5 ="}
    page = show(fake("sums", prompts={"sums": trained}))
    held: list[sync_api.Route] = []
    page.route("**/v1/models/sums", lambda route: held.append(route))  # noqa: PLW0108 (playwright looks at the handler)
    page.reload()
    expect(page.locator(".column")).to_have_count(2)
    page.get_by_role("radio", name="Completion").check()
    page.get_by_role("radio", name="Chat").check()
    page.get_by_label("Prompt", exact=True).fill("mine")
    assert held
    with page.expect_response("**/v1/models/sums"):
        page.unroute("**/v1/models/sums")  # which lets go of what it held
    expect(page.locator("#adapters .adapter")).to_have_count(1)  # asked for after it
    expect(page.get_by_role("radio", name="Chat")).to_be_checked()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("mine")


def test_a_link_reproduces_a_comparison_and_asks_nothing(show: Open):
    server = fake("french", "german", "__proto__")
    page = show(server)
    expect(page.locator(".column")).to_have_count(3)
    column(page, 0).get_by_label("Model of this column").select_option("Blend of two")
    column(page, 0).get_by_label("First adapter").select_option("german")
    column(page, 0).get_by_label("Second adapter").select_option("__proto__")
    column(page, 0).get_by_label("Weight of german").fill("0.25")
    column(page, 2).get_by_role("button", name="Remove").click()
    page.get_by_role("button", name="Add a system prompt").click()
    page.get_by_label("System prompt").fill("Be brief. & #")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop at").fill("\\n")
    send(page, "Grüße & more #1\nsecond line", tokens=5)
    expect_states(page, "done", "done")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#link-words")).to_contain_text("no key")
    link, first = page.url, list(server.asked)
    assert "#mode=chat&" in link
    server.asked.clear()
    page = page.context.new_page()  # as somebody else opens it
    page.goto(link)
    expect(page.locator(".column")).to_have_count(2)
    expect(page.get_by_role("article", name="0.25 german + 0.5 __proto__")).to_be_visible()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief. & #")
    assert server.asked == []
    page.get_by_role("button", name="Send").click()
    expect_states(page, "done", "done")
    by_model = lambda bodies: sorted(bodies, key=str)  # noqa: E731
    assert by_model(server.asked) == by_model(first)

    page.evaluate("location.hash = '#mode=completion&model=gone&model=french&temperature=0'")
    expect(page.get_by_role("radio", name="Completion")).to_be_checked()
    expect(column(page, 0).locator(".model option:checked")).to_have_text(
        "gone (not on the server)"
    )
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("")
    expect(page.get_by_label("Temperature")).to_have_value("0")
    page.evaluate("location.hash = '#prompt'")  # where the link that skips leads
    expect(column(page, 1).locator(".model option:checked")).to_have_text("french")


LINKS = """async ([path, fragments]) => {
    const { read, write } = await import(path);
    return fragments.map((fragment) => {
        const linked = read(fragment);
        return linked && [linked, read(write(linked))];
    });
}"""


def test_fragments_that_are_no_link(show: Open):
    page = show(fake())
    fragments = [
        "", "#", "#prompt", "#mode=other", "#model=a", "#mode=chat&x=1&model=&model=a",
        '#mode=completion&blend=[["a",1],["b",-0.5]]&blend=[["a",1]]&blend=7&blend={&blend=[["a","1"],["b",2]]',
    ]  # fmt: skip
    linked = page.evaluate(LINKS, [f"/web/{files.DIGEST}/link.js", fragments])
    assert linked[:5] == [None] * 5
    assert linked[5] == [{"settings": {"mode": "chat"}, "columns": ["a"]}] * 2
    blend = {"settings": {"mode": "completion"}, "columns": [[["a", 1], ["b", -0.5]]]}
    assert linked[6] == [blend] * 2


def test_a_field_that_is_wrong_stops_the_sending(show: Open):
    server = fake("french")
    page = show(server)
    expect(page.locator(".column")).to_have_count(2)
    send(page, tokens=0)
    assert page.evaluate("document.activeElement.id") == "max-tokens"
    send(page, prompt="")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert server.asked == []


def test_a_column_may_be_a_blend(show: Open):
    server = fake("french", "__proto__")
    page = show(server)
    column(page, 0).get_by_label("Model of this column").select_option("Blend of two")
    column(page, 0).get_by_label("Weight of french").fill("0.7")
    column(page, 0).get_by_label("Weight of __proto__").fill("0.3")
    send(page)
    expect_states(page, "done", "done", "done")
    blend = next(body for body in server.asked if "adapters" in body)
    assert blend["model"] == "tiny-base"
    assert blend["adapters"] == {"french": 0.7, "__proto__": 0.3}
    expect(page.get_by_role("article", name="0.7 french + 0.3 __proto__")).to_be_visible()
    column(page, 0).get_by_label("Second adapter").select_option("french")
    send(page)
    expect_states(page, "failed", "done", "done")
    expect(column(page, 0).get_by_role("alert")).to_contain_text("two different adapters")


def test_columns_come_and_go(show: Open):
    page = show(fake("a", "b", "c", "d"))
    expect(page.locator(".column")).to_have_count(3)
    page.get_by_role("button", name="Add column").click()
    assert page.evaluate("document.activeElement.value") == ":c"  # the first that no column shows
    expect(page.get_by_text("4 columns at most")).to_be_visible()
    page.get_by_role("button", name="Compare d").click()
    expect(page.locator(".column")).to_have_count(4)
    expect(page.get_by_role("article", name="d")).to_be_visible()
    for name in ("d", "b", "a"):
        page.get_by_role("button", name=f"Remove the column of {name}").click()
    expect(page.locator(".column")).to_have_count(1)
    expect(column(page, 0).locator(".remove")).to_be_hidden()


def test_stop_stops_here_and_there(show: Open):
    server = fake("french", pace=0.05)
    page = show(server)
    send(page, tokens=100_000)
    for place in range(2):  # a stream that has not begun is not left
        expect(answer(page, place)).to_contain_text("two")
    page.get_by_role("button", name="Stop").click()
    expect_states(page, "stopped", "stopped")
    expect(column(page, 1).locator(".ending")).to_have_text("Stopped by you")
    expect(page.locator("#send")).to_be_focused()  # not lost with the button that went grey
    for _ in range(100):
        if server.running == 0:
            break
        page.wait_for_timeout(50)
    assert (server.running, server.vanished) == (0, 2)
    send(page, "four five", tokens=2)
    expect_states(page, "done", "done")
    expect(answer(page, 1)).to_have_text("french:four french:five ")


# What goes wrong


def test_an_adapter_that_fails_in_the_middle_leaves_the_others_alone(show: Open):
    page = show(fake("broken", "french"))
    send(page, tokens=40)
    expect_states(page, "done", "failed", "done")
    expect(column(page, 1).get_by_role("alert")).to_have_text(
        "The adapter gave numbers that are not finite."
    )
    expect(answer(page, 1)).to_have_text(
        "broken:one broken:two broken:three "
    )  # what came is not taken away
    expect(column(page, 2).locator(".tokens")).to_have_text("40")


def test_a_connection_that_closes_early_is_no_finished_answer(show: Open):
    page = show(fake("cut", "french"))
    send(page, tokens=40)
    expect_states(page, "done", "failed", "done")
    expect(column(page, 1).get_by_role("alert")).to_contain_text(
        "closed before the answer was finished"
    )


def test_a_full_server_says_when_to_try_again(show: Open):
    server = fake("french", refuse={"french": (429, "The queue is full.")})
    page = show(server)
    send(page)
    expect_states(page, "done", "failed")
    expect(column(page, 1).get_by_role("alert")).to_have_text(
        "The queue is full. Try again in 3 s."
    )
    server.refuse.clear()
    server.asked.clear()
    column(page, 1).get_by_role("button", name="Try again").click()
    expect_states(page, "done", "done")
    assert [body["model"] for body in server.asked] == ["french"]
    expect(column(page, 1).get_by_role("alert")).to_be_hidden()


def test_characters_and_lines_that_chunks_split(show: Open):
    page = show(fake("bytes"))
    send(page)
    expect_states(page, "done", "done")
    assert answer(page, 1).text_content() == BYTES


# Every way to cut a stream in two, and byte by byte; yields the ways that gave other events than
# the whole does
CUTS = """async ([path, text]) => {
    const { events } = await import(path);
    const bytes = new TextEncoder().encode(text);
    const read = async (chunks) => {
        const body = new ReadableStream({ start(to) { chunks.forEach((one) => to.enqueue(one)); to.close(); } });
        const found = [];
        for await (const data of events(body)) found.push(data);
        return found;
    };
    const ways = [[bytes], [...bytes].map((byte) => Uint8Array.of(byte))];
    for (let cut = 1; cut < bytes.length; cut++) ways.push([bytes.slice(0, cut), bytes.slice(cut)]);
    return Promise.all(ways.map(read));
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_a_stream_cut_anywhere(show: Open, end: str):
    page = show(fake())
    lines = [
        "\ufeffdata: naïve 🙂",
        "",
        ": a comment",
        "id: 7",
        "data:two",
        "data:  lines",
        "",
        "",
        "data: [DONE]",
        "",
        "data: cut",
    ]
    path = f"/web/{files.DIGEST}/sse.js"
    found = page.evaluate(CUTS, [path, end.join(lines)])
    assert len(found) > 70
    assert all(way == ["naïve 🙂", "two\n lines", "[DONE]"] for way in found)


def test_numbers_are_read_whatever_labels_say(show: Open):
    page = show(fake())
    text = """# HELP a {b="c"} 7
a{x="}",y="\\"} 9 \\\\"} 1
a 2.5e1 1700000000
b{x="NaN"} NaN
c +Inf
d{x="{"} 4
"""
    code = "async ([path, text]) => Object.fromEntries((await import(path)).parse(text))"
    assert page.evaluate(code, [f"/web/{files.DIGEST}/metrics.js", text]) == {"a": 26, "d": 4}


@pytest.mark.usefixtures("often")
def test_a_server_that_drains_or_dies(show: Open, browser: sync_api.Browser):
    server = fake("french")
    page = show(server)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()
    server.ready = False
    expect(page.get_by_text("Takes no requests now")).to_be_visible()
    page.context.set_offline(True)
    expect(page.get_by_text("Not reachable")).to_be_visible()
    send(page)
    expect_states(page, "failed", "failed")
    expect(column(page, 0).get_by_role("alert")).to_contain_text("cannot be reached")
    server.ready = True
    page.context.set_offline(False)
    expect(page.get_by_text("Ready", exact=True)).to_be_visible()


@pytest.mark.parametrize("where", ["name", "answer", "error", "path"])
def test_nothing_that_is_said_becomes_html(show: Open, where: str):
    server = fake("html" if where == "answer" else NASTY if where == "name" else "french")
    if where == "error":
        server.refuse["french"] = (400, HTML)
    page = show(server)
    send(page)
    expect_states(page, "done", "failed" if where == "error" else "done")
    if where == "answer":
        assert answer(page, 1).text_content() == HTML
    if where == "error":
        expect(column(page, 1).get_by_role("alert")).to_have_text(HTML)
    if where == "name":
        expect(page.locator(".adapter .name")).to_have_text(NASTY)
        page.get_by_role("button", name="Unload").click()
        expect(page.get_by_text(f"{NASTY} is unloaded")).to_be_visible()
    if where == "path":
        page.get_by_text("Load an adapter").click()
        page.get_by_label("Name").fill("other")
        page.get_by_label("Folder").fill(f"missing{NASTY}")
        page.get_by_role("button", name="Load", exact=True).click()
        expect(page.locator("#load-error")).to_contain_text(NASTY)
    assert page.evaluate("window.pwned") is None
    assert page.locator("body img, body script, body b").count() == 0


# The shelf and the numbers


def test_load_pin_and_unload(show: Open):
    server = fake("french")
    page = show(server)
    page.get_by_text("Load an adapter").click()
    load(page, "missing/german", "german")
    expect(page.locator("#load-error")).to_have_text("There is no adapter at 'missing/german'.")
    page.get_by_label("Pin it").check()
    load(page, "team/german")
    expect(page.get_by_text("german is loaded.")).to_be_visible()
    assert server.asked[-1] == {"lora_name": "german", "lora_path": "team/german", "pin": True}
    expect(page.locator("#load-error")).to_be_hidden()
    expect(column(page, 0).get_by_label("Model of this column")).to_contain_text("german")

    row = page.get_by_role("listitem").filter(has_text="german")
    expect(row.get_by_text("rank 8 · lora · 5.0 MiB · in memory · pinned")).to_be_visible()
    row.get_by_role("button", name="Pin german").click()
    expect(page.get_by_text("german may leave the memory")).to_be_visible()
    assert server.asked[-1] == {"lora_name": "german", "pin": False}  # and is not loaded anew
    expect(row.get_by_role("button", name="Pin german")).to_have_attribute("aria-pressed", "false")

    column(page, 1).get_by_label("Model of this column").select_option("german")
    row.get_by_role("button", name="Unload german").click()
    expect(page.get_by_text("german is unloaded.")).to_be_visible()
    expect(page.locator(".adapter")).to_have_count(1)
    assert list(server.adapters) == ["french"]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Unload french"
    expect(column(page, 1).locator(".model option:checked")).to_have_text(
        "german (not on the server)"
    )


@pytest.mark.usefixtures("often")
def test_the_numbers_of_the_server(show: Open):
    server = fake("french", held=True)
    page = show(server)
    expect(page.locator("#running")).to_have_text("0")
    send(page)
    expect(page.locator("#running")).to_have_text("2")
    expect(page.locator("#waiting")).to_have_text("2")
    expect(page.locator("#memory")).to_have_text("4.0 MiB")
    expect(
        page.get_by_role("img", name=re.compile(r"^Tokens per second: .* now, at most [1-9]"))
    ).to_be_visible()
    expect(page.locator("#rate")).to_have_text("0.0")
    server.held = False
    expect_states(page, "done", "done")
    assert page.locator("#spark .line").get_attribute("d").startswith("M")


@pytest.mark.usefixtures("often")
def test_an_adapter_that_appears_is_offered_and_the_focus_stays(show: Open):
    server = fake("french")
    page = show(server)
    page.get_by_role("button", name="Pin french").focus()
    server.add("german", resident=False)
    expect(page.get_by_role("button", name="Compare german")).to_be_visible()
    expect(column(page, 0).get_by_label("Model of this column")).to_contain_text("german")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Pin french"


def test_a_thousand_adapters(show: Open):
    page = show(fake(*[f"adapter-{i}" for i in range(1000)]))
    expect(page.get_by_text("50 of 1000")).to_be_visible()
    expect(page.locator(".adapter")).to_have_count(50)
    page.get_by_label("Filter").fill("Adapter-99")
    expect(page.locator(".adapter")).to_have_count(11)
    page.get_by_role("button", name="Compare adapter-997").click()
    expect(page.get_by_role("article", name="adapter-997")).to_be_visible()


# Keys


def test_a_server_with_keys_is_asked_for_one(show: Open):
    page = show(fake("french", key="sk-right"))
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_have_text("This server asks for a key")
    dialog.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enter a key").click()
    for wrong, said in (("sk-wrong", "does not know this key"), ("sk ключ", "no spaces, accents")):
        dialog.get_by_label("API key").fill(wrong)
        dialog.get_by_label("API key").press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text(said)
    dialog.get_by_label("API key").fill("sk-right")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#notice")).to_be_hidden()
    send(page)
    expect_states(page, "done", "done")
    assert page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]") == [
        {"veneer-key": "sk-right"}, {}, "",
    ]  # fmt: skip
    page.reload()
    expect(page.locator(".column")).to_have_count(2)
    page.get_by_role("button", name="Key", exact=True).click()
    dialog.get_by_role("button", name="Forget it").click()
    expect(dialog.get_by_role("heading")).to_have_text("This server asks for a key")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_that_may_not_manage(show: Open):
    server = fake("french", "german", key="k", admin=False)
    page = show(server)
    page.get_by_label("API key").fill("k")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_text("Only an admin's key reads the server's numbers.")).to_be_visible()
    expect(page.get_by_role("button", name="Compare french")).to_be_visible()
    for hidden in ("Pin french", "Unload french"):
        expect(page.get_by_role("button", name=hidden)).to_be_hidden()
    expect(page.get_by_text("Load an adapter")).to_be_hidden()
    expect(page.locator(".column")).to_have_count(
        2
    )  # the two adapters: this key may not ask the base
    expect(page.locator(".model").first).not_to_contain_text("base")
    column(page, 0).get_by_label("Model of this column").select_option("Blend of two")
    send(page)
    expect_states(page, "done", "done")
    assert {body["model"] for body in server.asked} == {"tiny-base", "german"}


def test_a_key_that_is_withdrawn(show: Open):
    server = fake("french", key="k")
    page = show(server)
    page.get_by_label("API key").fill("k")
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator(".column")).to_have_count(2)
    server.key = "another"
    expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text(
        "The server does not know this key."
    )


# Keyboard, phone, eyes


def test_by_keyboard_alone(show: Open):
    server = fake("french", "german", pace=0.05)
    page = show(server)
    expect(page.locator(".column")).to_have_count(3)
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.type("one two")
    assert page.evaluate(f"{focused}.value") == "one two"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.locator("input[value=completion]").is_checked()
    seen = []
    for _ in range(40):  # every stop shows where it is
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused} === document.body"):
            break
        seen.append(
            page.evaluate(f"{focused}.ariaLabel || {focused}.id || {focused}.textContent.trim()")
        )
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") != "none", seen[-1]
        assert page.evaluate(f"{focused}.getBoundingClientRect().width") > 0
    for stop in (
        "temperature",
        "send",
        "add-column",
        "Model of this column",
        "Answer of german",
        "Unload german",
    ):
        assert stop in seen
    page.get_by_label("Model of this column").first.focus()
    page.keyboard.press("ArrowDown")
    expect(column(page, 0).locator(".model option:checked")).to_have_text("french")
    page.keyboard.press("Control+Enter")
    expect(answer(page, 0)).to_contain_text("french:two")
    page.keyboard.press("Escape")
    expect_states(page, "stopped", "stopped", "stopped")


SMALL = """[...document.querySelectorAll("button, input:not([type=checkbox]), select, textarea, summary")]
    .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 44)
    .map((one) => one.outerHTML)"""


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(show: Open, width: int):
    long = "a-name-without-any-space-" * 4
    server = fake(long, "broken", held=True)
    page = show(server, **{**PHONE, "viewport": {"width": width, "height": 844}})
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    expect(page.locator(".column")).to_have_count(3)
    assert page.evaluate(fits)
    column(page, 0).get_by_label("Model of this column").select_option("Blend of two")
    page.get_by_label("Max tokens").fill("60")
    page.get_by_label("Prompt", exact=True).fill("long" * 200)
    page.get_by_role("button", name="Send").tap()
    expect(answer(page, 1)).to_contain_text("longlong")
    expect(page.locator(".answers").get_by_role("button", name="Stop")).to_be_in_viewport()
    assert page.evaluate(fits)
    server.held = False
    expect_states(page, "done", "done", "failed")
    page.get_by_text("Load an adapter").tap()
    page.get_by_role("button", name="Add a system prompt").tap()
    assert page.evaluate(fits)
    assert page.evaluate(SMALL) == []
    column(page, 2).scroll_into_view_if_needed()
    expect(column(page, 2)).to_be_in_viewport(ratio=0.4)
    assert page.evaluate("scrollX") == 0


def test_two_answers_stand_under_one_another_on_a_phone(show: Open):
    page = show(fake("french", pace=0.001), **PHONE)
    expect(page.locator(".column")).to_have_count(2)
    send(page, "some words that fill a line of a phone", tokens=120)
    expect_states(page, "done", "done")
    for place in range(2):  # both are there to be read, without a swipe
        expect(column(page, place).locator(".answer")).to_be_in_viewport(ratio=1)
    # of one moment, as the page may still scroll to the answers
    first, second = page.locator(".column").evaluate_all(
        "columns => columns.map((column) => column.getBoundingClientRect().toJSON())"
    )
    assert first["x"] == second["x"]
    assert second["y"] >= first["y"] + first["height"]


CONTRAST = """() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const found = channels(getComputedStyle(one).backgroundColor);
            if (found.length === 3 || found[3] > 0) return found;
        }
    };
    const faint = [];
    for (const one of document.querySelectorAll("body *")) {
        const says = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!says || !one.checkVisibility() || one.closest(":disabled, [aria-disabled=true], .unseen")) continue;
        const [a, b] = [light(channels(getComputedStyle(one).color)), light(ground(one))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) faint.push(`${one.className || one.id || one.tagName} ${ratio.toFixed(2)}`);
    }
    return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_readable_and_nothing_moves_unasked(show: Open, scheme: str):
    server = fake("broken", "french", held=True)
    page = show(server, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_text("Load an adapter").click()
    send(page, tokens=30)
    expect_states(page, "streaming", "failed", "streaming")
    assert page.evaluate("document.getAnimations().length") == 0
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 19)"
    assert dark == (scheme == "dark")
    server.held = False
    expect_states(page, "done", "failed", "done")
    assert page.evaluate(CONTRAST) == []


# Files


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_files_are_served_with_their_headers():
    with serve_fake(Fake()) as address:
        status, headers, html = fetch(f"{address}/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert headers["cache-control"] == "no-cache"
        assert fetch(f"{address}/", **{"If-None-Match": headers["etag"]})[::2] == (304, b"")
        assert fetch(f"{address}/", **{"If-None-Match": '"other"'})[0] == 200
        links = re.findall(r'(?:src|href)="(web/[^"]+)"', html.decode())
        assert len(links) == 3
        for link in [*links, f"web/{files.DIGEST}/column.js"]:
            status, headers, content = fetch(f"{address}/{link}")
            assert status == 200
            assert content == (files.WEB_FOLDER / link.split("/")[-1]).read_bytes()
            assert "immutable" in headers["cache-control"]
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in headers["content-security-policy"]
        for wrong in (
            "web/0/page.js",
            f"web/{files.DIGEST}/index.html",
            f"web/{files.DIGEST}/..%2fpage.py",
        ):
            assert fetch(f"{address}/{wrong}")[0] == 404


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere():
    for name, content in {**files.FILE_CONTENTS, "index.html": files.PAGE_TEMPLATE}.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|url\(", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text
        ), name
    html = files.PAGE_TEMPLATE.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)


def test_a_change_of_any_file_changes_the_address():
    one = {"a.js": b"1", "b.js": b"2"}
    others = [
        {**one, "b.js": b"3"},
        {"a.js": b"1"},
        {"a.js": b"12", "b.js": b""},
        {"a.js": b"1", "c.js": b"2"},
    ]
    assert len({files.digest(each) for each in [one, *others]}) == 5
