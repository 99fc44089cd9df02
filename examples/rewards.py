"""What `examples/grpo.yaml` judges answers by."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any


def close(completions: list[str], phonemes: list[str], **_: Any) -> list[float]:
    """How much of an answer is the dictionary's, 0 to 1: phonemes in their order, over all of
    both."""
    return [
        SequenceMatcher(None, answer.split(), right.split()).ratio()
        for answer, right in zip(completions, phonemes, strict=True)
    ]
