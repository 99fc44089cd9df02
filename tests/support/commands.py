"""Command lines that are refused."""

from __future__ import annotations

import re
from typing import Any


def refused(result: Any, *parts: str) -> str:
    """Exit code 2, one message that says what to do and holds all `parts` (regular expressions), no
    traceback."""
    text = re.sub(r"\s+", " ", result.err)
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert len(re.findall("Error: |─ Error ─", text)) == 1, result.err
    for word in parts:
        assert re.search(word, text), f"{word!r} is not in: {text}"
    return text
