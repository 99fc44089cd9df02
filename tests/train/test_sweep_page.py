"""The report of a sweep: it has the numbers of `sweep.json`, and stands alone in Chromium."""

from __future__ import annotations

import copy
import re

import pytest
from tests.support import browser as chromium

from veneer.train.sweep.sweep_page import page
from veneer.train.sweep.sweep_record import ENDED, FAILED, FINISHED, Candidate, State

browser = chromium.browser  # a fixture


def facts() -> dict:
    candidates = []
    for number in range(12):
        changes = {"rank": 2 << number % 3, "targets": ["<b>q_proj", "v_proj"], "seed": number // 6}
        one = Candidate(
            f"c{number:02}",
            0,
            changes,
            ENDED if number % 2 else FINISHED,
            parameters=1000 * (number + 1),
        )
        one.losses = [3 / (step + 1) + number for step in range(3 if number % 2 else 9)]
        one.evaluations = [(3, {"loss": 2.5 + number})]
        one.evaluations += [] if number % 2 else [(9, {"loss": 1.25 + number / 10})]
        candidates.append(one)
    candidates.append(Candidate("c12", 0, {"rank": 9}, FAILED, note="the loss is nan at step <2>"))
    config = {"base": "tiny", "data": "rows.jsonl", "output": "out/again", "rank": 2}
    return {
        "base": "<i>tiny", "data": "rows.jsonl", "task": "sft", "item": "token", "output": "out", "steps": 9,
        "sweep": {"axes": {"rank": [2, 4, 8], "targets": [], "seed": [0, 1]}, "judged_by": "held_out"},
        "sampler": "grid", "rungs": [3],
        "edges": [{"axis": "rank", "value": 2, "side": "lowest", "tried": [2, 8]}],
        "alone": {"steps": 9, "largest": 2e-6, "step": 7, "last": 1e-6},
        "folder": "out/best", "command": ["veneer", "train", "out/best/train.yaml"], "config": config,
        **State(0, 9, 61.0, 122.0, "c00", candidates).facts(),
    }  # fmt: skip


def test_its_numbers_are_those_of_the_facts() -> None:
    found = facts()
    text = page(found)
    for one in found["candidates"]:
        assert one["name"] in text
        assert one["loss"] is None or f"{one['loss']:.4f}" in text
    for one in found["spread"]:
        assert f"{one['mean']:.4f}" in text
        assert f"{one['deviation']:.4f}" in text
    assert len(found["spread"]) == 3
    assert "6</b><span>ran to the end, 6 ended, 1 failed" in text
    assert "2 min 2 s</b><span>of CPU time, in 1 min 1 s" in text
    assert "veneer train out/best/train.yaml" in text
    assert "rank 2 lies at the lowest end of what was tried (2 to 8)" in text
    assert (
        "for 9 steps, its losses differ from those of the sweep by at most 2.0e-06 (step 7)" in text
    )
    assert "the loss is nan at step &lt;2&gt;" in text
    assert "<i>" not in text
    assert "<b>q_proj" not in text


def test_equal_losses_and_one_candidate_can_be_drawn() -> None:
    found = copy.deepcopy(facts())
    found["candidates"], found["spread"] = found["candidates"][:1], []
    found["candidates"][0]["measured"] = [(9, 1.25)]
    text = page(found)
    assert "Spread over seeds" not in text
    assert "nan" not in text
    assert re.findall(r'text-anchor="end">([^<]*)<', text)[-5:] == [
        "1.19",
        "1.22",
        "1.25",
        "1.28",
        "1.31",
    ]


def test_what_was_judged_in_training_is_no_curve_of_the_rows_held_out() -> None:
    found = facts()
    for one in found["candidates"]:
        one["evaluations"] = one["evaluations"][-1:] if one["status"] == FINISHED else []
        one["judged"] = [(3, 2.5)] * bool(one["measured"])
    assert page(found).count("loss on the rows held out</text>") == 0
    assert page(found).count("loss in training</text>") == 1
    assert page(facts()).count("loss on the rows held out</text>") == 1


def test_large_numbers_are_written_out() -> None:
    found = facts()
    for one in found["candidates"]:
        one["parameters"] *= 1000
    text = page(found)
    assert ">1,000</text>" in text
    assert "e+" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "`" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_stands_alone(browser, tmp_path, width: int, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(facts()), encoding="utf-8")
    shown, wrong = chromium.alone(browser, file, width, scheme)
    assert shown.locator("h1").text_content() == "Sweep of 13 candidates"
    assert shown.locator("h2").all_text_contents() == [
        "The winner: rank 2, targets <b>q_proj+v_proj, seed 0", "Curves", "Quality against trainable parameters",
        "Spread over seeds", "All candidates",
    ]  # fmt: skip
    assert shown.locator("script, link, img, i").count() == 0
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.locator("svg polyline").count() == 2 * 12
    assert shown.locator("svg polyline.axis").count() == 2 * 4
    assert shown.locator("svg circle").count() == 12
    for chart in shown.locator("svg").all():
        assert chart.bounding_box()["width"] > 290
    shown.context.close()
    assert wrong == []
