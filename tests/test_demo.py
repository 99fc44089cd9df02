"""The demo's own parts: the words, the measure and the page."""

from __future__ import annotations

import pytest
from demo import pronounce, report
from demo.pronounce import Word, edits


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
        ("flaw", "lawn", 2),
    ],
)
def test_edits(one, other, distance):
    assert edits(one, other) == edits(other, one) == distance


def test_score_counts_phonemes_and_whole_words():
    words = [Word("cat", ("K", "AE", "T")), Word("a", ("AH",))]
    perfect = pronounce.score([" K AE T", "AH\nand more"], words)
    assert (perfect.error_rate, perfect.exact) == (0.0, 1.0)
    half = pronounce.score(["K AE", "AH"], words)
    assert (half.error_rate, half.exact) == (0.25, 0.5)
    assert pronounce.score(["no idea at all what", ""], words).error_rate > 1


def test_words_are_split_once_and_for_all():
    train, held = pronounce.words()
    assert (len(train), len(held)) == (20_000, 1_000)
    assert not {word.spelling for word in train} & {word.spelling for word in held}
    assert all(4 <= len(word.spelling) <= 9 and word.spelling.isalpha() for word in held)
    assert pronounce.words()[1] == held
    word = Word("cat", ("K", "AE", "T"))
    assert (word.prompt, word.completion) == (" c a t =", " K AE T")
    assert pronounce.few_shot(word, [Word("a", ("AH",))]).endswith(" a = AH\n c a t =")


def test_the_page_holds_everything_and_needs_no_network(tmp_path):
    page = report.write(
        tmp_path / "report.html",
        title="A title",
        lead="A lead",
        cards=[("0.17", "phoneme error rate")],
        results=[("base", 0.9, 0.0), ("adapter", 0.17, 0.4)],
        losses=[3.0, 2.0, 1.0],
        held_out=[(2, 1.5)],
        samples=[("<cat>", "K", "K AE T", "K AE T")],
        norms={"model.layers.0.mlp.up_proj": 0.5, "model.layers.1.mlp.up_proj": 1.5},
        footer="The end",
    ).read_text()
    for text in (
        "A title",
        "A lead",
        "0.170",
        "40.0%",
        "&lt;cat&gt;",
        "up_<wbr>proj",
        "held-out words",
        "The end",
    ):
        assert text in page
    assert "viewport" in page
    assert "<script" not in page
    assert "src=" not in page
    assert "<cat>" not in page
