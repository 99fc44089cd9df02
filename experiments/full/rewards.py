"""The reward of `rank-for-rl.yaml`."""

from __future__ import annotations

import re
from typing import Any


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the last number of a completion is the number behind GSM8K's ####."""
    texts = [
        written if isinstance(written, str) else written[-1]["content"] for written in completions
    ]
    return [float(_last(text) == _last(right)) for text, right in zip(texts, answer, strict=True)]


def _last(text: str) -> str | None:
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return numbers[-1].replace(",", "").rstrip(".") if numbers else None
