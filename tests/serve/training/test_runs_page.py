"""The page's runs in a real browser, in front of a server that trains the tiny base."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from playwright import sync_api
from tests.serve.test_page import CONTRAST, NASTY, PHONE, SMALL
from tests.serve.training.test_service import TEXT, texts
from tests.support.api_server import listening
from tests.support.browser import answer, column, expect_states
from tests.support.service import open_service
from tests.support.training_client import Client, Run, datum

from veneer.serve import page as files
from veneer.serve.access import Key, Keyring, hash_of
from veneer.serve.training.curve import Batch
from veneer.serve.training.training_service import training_of

expect = sync_api.expect
expect.set_options(timeout=4_000)
CONFIG = {"rank": 2, "targets": ["attention"]}


@pytest.fixture(scope="module")
def it(base, tmp_path_factory):
    """A server with four runs, of three steps each."""
    script = files.FILE_CONTENTS["page.js"]
    assert script.count(b"EVERY = 2000") == 1
    files.FILE_CONTENTS["page.js"] = script.replace(b"EVERY = 2000", b"EVERY = 200")
    service = open_service(base, None, train=str(tmp_path_factory.mktemp("runs")))
    with listening(service, 1.0, files.router) as (url, _):
        client = Client(url)
        runs = [
            named(client, number, name)
            for number, name in enumerate(["alpha", "beta", "gamma", None])
        ]
        for step in range(3):
            for run in runs:
                run.pass_(texts(step))
                run.step(0.3)
        yield SimpleNamespace(
            url=url, service=service, training=training_of(service), client=client, runs=runs
        )
    files.FILE_CONTENTS["page.js"] = script


def named(client, number, name):
    promised = client.post(
        "create_model", session_id=client.session, model_seq_id=number, base_model="tiny",
        lora_config={"rank": 2 + number, "seed": number}, user_metadata=name and {"name": name, "lr": 0.3},
    )  # fmt: skip
    return Run(client, client.result(promised)["model_id"])


@pytest.fixture
def show(browser):
    """Opens a page. At the end: no script failed, no policy was broken, no other host was asked."""
    wrong, stack = [], ExitStack()

    def note(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def show(url, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        stack.callback(context.close)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))
        page.goto(url)
        return page

    with stack:
        yield show
    assert wrong == []


def row(page, name):
    return page.locator(".run").filter(has=page.get_by_text(name, exact=True))


def line(points):
    """The path of a curve of so many points."""
    return re.compile(rf"^M[\d.]+ [\d.]+(L[\d.]+ [\d.]+){{{points - 1}}}$")


def ask(page, prompt="abc"):
    page.get_by_role("radio", name="Completion").check()
    page.get_by_label("Max tokens").fill("6")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Send").click()


def test_runs_are_seen_as_they_train(show, it):
    page = show(it.url)
    names = ["alpha", "beta", "gamma", f"{it.client.session[:8]} · 3"]
    expect(page.locator(".run > .name")).to_have_text(names)
    alpha, run = row(page, "alpha"), it.runs[0]
    said = alpha.locator("> .facts")
    expect(said).to_have_text(re.compile(r"^rank 2 · \d+ tokens · .* · lr 0.3$"))
    expect(alpha.locator(".steps")).to_have_text("3")
    expect(alpha.locator(".line")).to_have_attribute("d", line(3))
    for step in range(3, 6):
        loss = run.pass_(texts(step)).loss / sum(len(one["target_tokens"]) for one in texts(step))
        run.step(0.3)
    expect(alpha.locator(".steps")).to_have_text("6")
    expect(alpha.locator(".line")).to_have_attribute("d", line(6))
    assert float(alpha.locator(".loss").inner_text()) == pytest.approx(loss, rel=1e-3)
    assert float(alpha.locator(".speed").inner_text()) > 0
    words = re.compile(r"^Loss of alpha over 6 steps: from [\d.]+ to [\d.]+, lowest [\d.]+$")
    expect(alpha.get_by_role("img", name=words)).to_be_visible()
    expect(page.locator("#runs-batch")).to_have_text("In the batch now: alpha, alone.")
    expect(said).to_contain_text("in the batch")
    shared = [it.runs[0].id, it.runs[3].id]
    it.training.worker.batch = Batch((*shared, "of another"), time.monotonic())
    expect(page.locator("#runs-batch")).to_have_text(
        f"Sharing the batch now: alpha, {names[3]} and 1 run of other keys."
    )
    it.training.worker.batch = Batch(tuple(shared), time.monotonic() - 300)
    expect(page.locator("#runs-batch")).to_contain_text(
        "Nothing is trained now. The last batch, 5 min ago, was of alpha"
    )
    it.training.worker.submit(
        lambda: it.training.worker.memory.evict(it.training.worker.active_runs[run.id])
    ).result()
    expect(said).to_contain_text("on disk")
    expect(page.locator("#notice")).to_be_hidden()


def test_the_base_a_run_and_a_checkpoint_answer_side_by_side(show, it):
    page, run = show(it.url), it.runs[1]
    expect(page.locator(".column")).to_have_count(3)  # the base, and the first runs
    expect(column(page, 1).locator(".model option:checked")).to_have_text("alpha, now")
    beta = row(page, "beta")
    expect(beta.locator(".checkpoints")).to_be_hidden()
    path = run.save("early")
    beta.get_by_text("1 checkpoint", exact=True).click()
    expect(beta.locator(".checkpoint .facts")).to_have_text(
        re.compile(r"^training state · [\d.]+ KiB · .*20\d\d")
    )
    expect(beta.locator(".checkpoint .path")).to_have_text(path)
    for _ in range(3):
        run.pass_([datum(TEXT)])
        run.step(0.5)
    column(page, 1).get_by_label("Model of this column").select_option("beta, now")
    column(page, 2).get_by_role("button", name="Remove the column").click()
    page.get_by_role("button", name="Compare early of beta").click()
    expect(column(page, 2).locator(".model option:checked")).to_have_text("beta, early")
    ask(page)
    expect_states(page, "done", "done", "done")
    said = [answer(page, place).text_content() for place in range(3)]
    assert len(set(said)) == 3
    expect(page.get_by_role("log")).to_contain_text("beta, early: Ended at max tokens")
    run.pass_([datum(TEXT[::-1])])
    run.step(0.5)
    ask(page)  # the run has gone on; base and checkpoint are what they were
    expect_states(page, "done", "done", "done")
    assert [said[place] == answer(page, place).text_content() for place in range(3)] == [
        True,
        False,
        True,
    ]
    it.client.http.delete(f"/training_runs/{run.id}/checkpoints/weights/early")
    expect(beta.locator(".checkpoints")).to_be_hidden()
    expect(column(page, 2).locator(".model option:checked")).to_have_text(
        "beta, early (not on the server)"
    )
    ask(page)
    expect_states(page, "done", "done", "failed")
    expect(column(page, 2).get_by_role("alert")).to_contain_text("the checkpoint")


def test_many_runs_and_names_of_strangers(show, it):
    store = it.training.store
    session = store.new_session("", None, NASTY)
    for number in range(12):
        metadata = {"name": NASTY, NASTY: NASTY} if number < 2 else None
        store.new_run(f"{session}:train:{number}", session, "", CONFIG, 0, metadata)
    page = show(it.url)
    expect(page.locator(".run")).to_have_count(8)
    expect(page.locator("#runs-count")).to_have_text("8 of 16")
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".run")).to_have_count(16)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    rows = page.locator(".run > .name")
    for number in range(2):  # each has a name of its own
        expect(rows.nth(number)).to_have_text(f"{NASTY} ({session[:8]} · {number})")
    expect(rows.nth(2)).to_have_text(f"{NASTY} · 2")
    expect(page.locator(".run > .facts").nth(0)).to_contain_text(f"{NASTY} {NASTY}")
    expect(page.locator(".run > .facts").nth(2)).to_have_text(
        "rank 2 · attention alone · 0 tokens · on disk"
    )
    assert page.evaluate("window.pwned") is None
    assert page.locator("body img, body script, body b").count() == 0
    store._index.execute("DELETE FROM runs WHERE session = ?", session)
    expect(page.locator(".run")).to_have_count(4)


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_on_small_and_wide_screens_in_light_and_dark(show, it, width, scheme):
    phone = width < 1000
    options = {**(PHONE if phone else {}), "viewport": {"width": width, "height": 844}}
    page = show(it.url, color_scheme=scheme, reduced_motion="reduce", **options)
    it.runs[2].result = it.runs[2].save(
        "a-name-of-a-checkpoint-without-a-space" * 3, overwrite=True
    )
    gamma = row(page, "gamma")
    gamma.locator("summary").click()
    expect(gamma.locator(".checkpoint .path")).to_be_visible()
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate("document.getAnimations().length") == 0
    assert page.evaluate(CONTRAST) == []
    assert not phone or page.evaluate(SMALL) == []
    boxes = [
        each.bounding_box()
        for each in (gamma, gamma.locator(".curve"), gamma.locator(".checkpoint .path"))
    ]
    for box in boxes:  # nothing sticks out of its run
        assert box["x"] >= boxes[0]["x"]
        assert box["x"] + box["width"] <= boxes[0]["x"] + boxes[0]["width"]


def test_by_keyboard_alone(show, it):
    it.runs[2].save("kept", overwrite=True)
    page = show(it.url)
    expect(row(page, "gamma").locator("summary")).to_be_visible()
    focused, seen = "document.activeElement", []
    for _ in range(30):
        page.keyboard.press("Tab")
        word = page.evaluate(f"{focused}.ariaLabel || {focused}.id || {focused}.textContent.trim()")
        seen.append(word)
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") != "none", word
        if "checkpoint" in word and word != "Skip to the prompt":
            page.keyboard.press("Enter")  # which opens it
        if word == "Compare kept of gamma":
            page.keyboard.press("Enter")
            break
    assert "Compare alpha as it is now" in seen
    expect(column(page, 3).locator(".model option:checked")).to_have_text("gamma, kept")
    expect(column(page, 3).locator(".model")).to_be_focused()


def test_each_key_sees_its_own(show, base, tmp_path):
    keys = (
        Key("a", hash_of("vnr-a"), base=False, train=True),
        Key("b", hash_of("vnr-b"), train=True),
        Key("c", hash_of("vnr-c"), base=False, train=True),
    )
    service = open_service(base, None, train=str(tmp_path), keys=Keyring(keys))
    with listening(service, 1.0, files.router) as (url, _):
        runs = {key: named(Client(url, f"tml-vnr-{key}"), 0, f"of-{key}") for key in "ab"}
        for run in runs.values():
            run.pass_(texts(1))
        page = show(url)
        for key in "abc":
            if key != "a":
                page.get_by_role("button", name="Key", exact=True).click()
            page.get_by_label("API key").fill(f"vnr-{key}")
            page.get_by_role("button", name="Use this key").click()
            if key == "c":  # which may use nothing, and trains nothing yet
                expect(page.locator(".run")).to_have_count(0)
                expect(page.get_by_text(f'tinker.ServiceClient(base_url="{url}")')).to_be_visible()
                break
            expect(page.locator(".run > .name")).to_have_text([f"of-{key}"])
        training_of(service).worker.batch = Batch(
            tuple(run.id for run in runs.values()), time.monotonic()
        )
        page.reload()
        assert "of-" not in page.locator("body").inner_text()
        page.context.close()


SHARING = """async (path) => {
    const { sharing, number, path: drawn, ago } = await import(path);
    const run = (name) => ({ id: name, name });
    const now = (names, others) => ({ runs: names.map(run), others, seconds_ago: 0.1 });
    return [
        sharing(null), sharing(now(["a"], 0), ({ name }) => name), sharing(now([], 1), ({ name }) => name),
        sharing(now(["a", "b"], 2), ({ name }) => name),
        [5, 0, -12345.6, 0.00001, 1.23456].map(number), [0, 59, 61, 7300, 180000].map(ago),
        drawn([[7, 1.5]]), drawn([[1, 2], [3, 2]]), drawn([[1, 4], [2, 2], [5, 3]]),
    ];
}"""


def test_words_and_curves(show, it):
    page = show(it.url)
    found = page.evaluate(SHARING, f"/web/{files.DIGEST}/runs.js")
    assert found[:4] == [
        "Nothing was trained since the server started.",
        "In the batch now: a, alone.",
        "In the batch now: 1 run of other keys, alone.",
        "Sharing the batch now: a, b and 2 runs of other keys.",
    ]
    assert found[4] == ["5.000", "0.000", "-1.23e+4", "1.00e-5", "1.235"]
    assert found[5] == ["1 s", "59 s", "1 min", "2 h", "2 days"]
    assert [one["line"] for one in found[6:]] == [
        "M200.0 24.0h0", "M0.0 24.0L200.0 24.0", "M0.0 3.0L50.0 45.0L200.0 24.0",
    ]  # fmt: skip
