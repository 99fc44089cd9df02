"""The reader of SNIPS, spans and their F1; and by which rows a rate is chosen."""

from __future__ import annotations

import json

import pytest
from experiments.methods import ALL, FULL, _equal, judged
from experiments.snips import lacking, read, span_f1, spans
from experiments.turned import tuned


def sentences(*rows):
    return {
        "intent": [
            {"data": [{"text": text, **({"entity": slot} if slot else {})} for text, slot in row]}
            for row in rows
        ]
    }


def test_a_sentence_that_training_has_seen_does_not_judge(tmp_path):
    old = [("book ", None), ("the café", "place")]
    new = [("go to ", None), ("new york", "city"), (" now", None)]
    (tmp_path / "train_Go_full.json").write_text(
        json.dumps(sentences(old), ensure_ascii=False), encoding="latin-1"
    )
    (tmp_path / "validate_Go.json").write_text(json.dumps(sentences(old, new)), encoding="utf-8")
    found = read(tmp_path)
    assert found["train"] == [
        {"words": ["book", "the", "café"], "labels": ["O", "B-place", "I-place"]}
    ]
    assert found["test"] == [
        {"words": ["go", "to", "new", "york", "now"], "labels": ["O", "O", "B-city", "I-city", "O"]}
    ]


def test_without_the_files_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("VENEER_SNIPS", raising=False)
    assert "VENEER_SNIPS" in (lacking() or "")
    monkeypatch.setenv("VENEER_SNIPS", str(tmp_path))
    assert lacking() is None


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["B-a", "I-a", "O"], {(0, 2, "a")}),
        (["B-a", "B-a"], {(0, 1, "a"), (1, 2, "a")}),
        (["O", "I-a", "I-b"], {(1, 2, "a"), (2, 3, "b")}),
        (["O"], set()),
    ],
)
def test_spans(labels, found):
    assert spans(labels) == found


def test_f1_counts_whole_spans():
    # one of two found is right; one of three true is found
    assert span_f1(
        [(["B-a", "O", "B-b"], ["B-a", "B-b", "I-b"]), (["O"], ["B-a"])]
    ) == pytest.approx(2 * 1 / (2 + 3))


def test_a_rate_is_chosen_by_the_rows_aside():
    runs = [
        {"method": "head only", "judged": "test", "seed": seed, "rate": rate, "aside": aside, "steps": steps}
        for seed, rate, aside, steps in (
            (0, 0.1, 0.5, 300), (0, 0.2, 0.7, 300), (1, 0.2, 0.1, 300), (0, 0.1, 0.9, 600), (0, 0.2, 0.8, 600),
        )
    ]  # fmt: skip
    assert [(run["seed"], run["rate"]) for run in judged(runs)["head only"]] == [(0, 0.2), (1, 0.2)]
    assert [run["aside"] for run in judged(runs, 600)["head only"]] == [0.9]
    apart = [{**runs[0], "head": 0.3, "aside": 0.95}]
    assert judged(runs + apart) == judged(runs)
    assert judged(runs + apart, apart=True) == {"head only": apart}
    found = [
        {"rate": rate, "aside_loss": loss}
        for rate, loss in ((1, 2.0), (1, 2.2), (2, 1.0), (2, 3.0), (4, 9.0))
    ]
    assert {run["rate"] for run in tuned(found)} == {2}


@pytest.mark.parametrize(("full", "held"), [(0.889, True), (0.911, False)])
def test_equal_is_told_by_the_mean_and_the_spread_of_the_distance(full, held):
    own = {
        ALL: [{"seed": seed, "f1": f1} for seed, f1 in enumerate((0.86, 0.90, 0.88, 0.90, 0.86))],
        FULL: [{"seed": seed, "f1": full} for seed in range(5)],
    }
    claim = _equal("as good", own)
    assert claim.held is held
    assert f"{full - 0.88:.4f} ± 0.0200 apart" in claim.found
    assert _equal("as good", {**own, FULL: own[FULL][:4]}).held is None  # not all seeds yet
