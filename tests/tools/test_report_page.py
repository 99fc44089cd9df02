"""The page of a report in Chromium: on a phone and a desk, light and dark, alone."""

from __future__ import annotations

import pytest
import torch
from tests.support import browser as chromium
from tests.support.models import TinyLM
from tests.support.toys import randomise

import veneer
from veneer.tools.report import examine
from veneer.tools.report.report_page import page

browser = chromium.browser  # a fixture

LOSSES = {
    "data": {"source": "held_out.jsonl", "tokens": 1234},
    "general": {"source": "text.txt", "tokens": 56789},
    "note": None,
    "rows": [
        {"what": "base", "at": None, "removed": None, "data": 2.5, "general": 3.125},
        {"what": "adapter", "at": None, "removed": None, "data": 0.5, "general": 4.0},
        {"what": "rank", "at": 2, "removed": 0.25, "data": 0.75, "general": None},
        {"what": "repaired", "at": 0.5, "removed": 0.125, "data": 0.5625, "general": 3.5},
        {"what": "weaker", "at": 0.875, "removed": 0.125, "data": 0.625, "general": 3.875},
    ],
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("look"), TinyLM(blocks=12)
    for name in "ab":
        handle = veneer.attach(
            model, veneer.LoraConfig(rank=4, train_also=["norm"], exclude=["norm"])
        )
        randomise(handle)
        handle.save(folder / f"<i>{name}&")
        handle.detach()
    report = examine(
        folder / "<i>a&",
        base=model,
        base_name="tiny",
        other=folder / "<i>b&",
        count=4,
        threshold=0.9,
    )
    assert sum(layer.intruders[0] for layer in report.layers) > 0
    (folder / "look.html").write_text(
        page({**report.to_dict(), "losses": LOSSES}), encoding="utf-8"
    )
    return folder / "look.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_stands_alone(browser, file, width, scheme):
    shown, wrong = chromium.alone(browser, file, width, scheme)
    assert shown.locator("h1").text_content() == "A look inside <i>a&"
    assert shown.locator("h2").all_text_contents() == [
        "How much of its rank is in use", "Where the change went", "Beside <i>b&", "Forgetting",
    ]  # fmt: skip
    assert shown.locator("script, link, img, i").count() == 0
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.locator("svg polyline").count() > 5
    for chart in shown.locator("svg").all():  # letters are drawn for a width of 400
        assert chart.bounding_box()["width"] > 300
    # nothing but the table of all weights is to be scrolled
    assert shown.locator("section > .scroll").evaluate_all("all => all.map(e => e.scrollWidth <= e.clientWidth)") == [
        True, True,
    ]  # fmt: skip
    paper = {"light": "rgb(246, 245, 242)", "dark": "rgb(22, 21, 19)"}
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == paper[scheme]
    cells = shown.locator("td").all_text_contents()
    assert {"3.1250", "intruders × 0.5", "ΔW × 0.875, evenly", "0.7500", "12.5%"} <= set(cells)
    details = shown.locator("details table")
    assert not details.is_visible()
    shown.locator("summary").click()
    assert details.is_visible()
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown.context.close()
    assert wrong == []
