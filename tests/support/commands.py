"""Check that a command refuses its command line."""

from __future__ import annotations

import re
from typing import Any


def refused(result: Any, *parts: str) -> str:
    """Assert that a command ended with exit code 2 and a single error message that matches all
    `parts` (regular expressions), without a traceback. Returns its stderr with single spaces."""
    text = re.sub(r"\s+", " ", result.err)
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert len(re.findall("Error: |─ Error ─", text)) == 1, result.err
    for pattern in parts:
        assert re.search(pattern, text), f"{pattern!r} is not in: {text}"
    return text
