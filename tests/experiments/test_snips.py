"""The reader of SNIPS, spans and their F1."""

from __future__ import annotations

import json

import pytest
from experiments.snips import load_tagging, missing_data, read, span_f1, spans


def sentences(*rows):
    return {
        "intent": [
            {"data": [{"text": text, **({"entity": slot} if slot else {})} for text, slot in row]}
            for row in rows
        ]
    }


def test_a_sentence_of_training_is_no_test_sentence(tmp_path):
    old = [("book ", None), ("the café", "place")]
    new = [("go to ", None), ("new york", "city"), (" now", None)]
    (tmp_path / "train_Go_full.json").write_text(
        json.dumps(sentences(old), ensure_ascii=False), encoding="latin-1"
    )
    (tmp_path / "validate_Go.json").write_text(json.dumps(sentences(old, new)), encoding="utf-8")
    splits = read(tmp_path)
    assert splits["train"] == [
        {"words": ["book", "the", "café"], "labels": ["O", "B-place", "I-place"]}
    ]
    assert splits["test"] == [
        {"words": ["go", "to", "new", "york", "now"], "labels": ["O", "O", "B-city", "I-city", "O"]}
    ]


def test_without_the_files_it_says_how_to_name_them(monkeypatch, tmp_path):
    monkeypatch.delenv("VENEER_SNIPS", raising=False)
    assert "VENEER_SNIPS" in (missing_data() or "")
    monkeypatch.setenv("VENEER_SNIPS", str(tmp_path))
    assert missing_data() is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["B-a", "I-a", "O"], {(0, 2, "a")}),
        (["B-a", "B-a"], {(0, 1, "a"), (1, 2, "a")}),
        (["O", "I-a", "I-b"], {(1, 2, "a"), (2, 3, "b")}),
        (["O"], set()),
    ],
)
def test_spans(labels, expected):
    assert spans(labels) == expected


def test_f1_counts_spans():
    # one of two predicted spans is right; one of three true spans is predicted
    pairs = [(["B-a", "O", "B-b"], ["B-a", "B-b", "I-b"]), (["O"], ["B-a"])]
    assert span_f1(pairs) == pytest.approx(2 * 1 / (2 + 3))


def test_sentences_aside_do_not_train():
    task = load_tagging(True)
    splits = [{tuple(row.ids) for row in rows} for rows in (task.train, task.aside, task.test)]
    assert all(splits)
    assert len(task.train) + len(task.aside) + len(task.test) == 60
