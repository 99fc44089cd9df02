"""Command lines that are refused."""

from __future__ import annotations

import re
from typing import Any


def refused(found: Any, *parts: str) -> str:
    """Exit code 2, one message that says what to do and holds all `parts` (regular expressions), no
    traceback."""
    text = re.sub(r"\s+", " ", found.err)
    assert found.code == 2, found
    assert "Traceback" not in found.err
    assert len(re.findall("Error: |─ Error ─", text)) == 1, found.err
    for part in parts:
        assert re.search(part, text), f"{part!r} is not in: {text}"
    return text
