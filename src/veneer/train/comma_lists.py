"""Split comma-separated texts, the form in which a flag or a YAML file may give a list."""

from __future__ import annotations


def split_commas(text: str) -> list[str]:
    """Split a comma-separated text. Drop empty entries, and white space around entries. A text that
    begins with ``re:`` is one regular expression, which may contain commas."""
    if text.startswith("re:"):
        return [text]
    return [entry.strip() for entry in text.split(",") if entry.strip()]
