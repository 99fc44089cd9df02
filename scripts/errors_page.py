"""Make the sections of docs/troubleshooting.md on errors, from the docstrings of veneer/errors.py.

The first paragraph of a docstring says what the error means. Each entry of the list after it has
the form "- Cause: …. Fix: …."
"""

from __future__ import annotations

import inspect
import re
import textwrap

from veneer import errors


def error_classes() -> list[type[errors.VeneerError]]:
    """All error classes except the root, in the order of the source."""
    root = errors.VeneerError
    classes = [member for member in vars(errors).values() if inspect.isclass(member)]
    return [cls for cls in classes if issubclass(cls, root) and cls is not root]


def read_docstring(error: type[Exception]) -> tuple[str, list[tuple[str, str]]]:
    """Return the meaning of an error, and its (cause, fix) pairs."""
    paragraphs = inspect.cleandoc(error.__doc__ or "").split("\n\n")
    summary, text = (" ".join(paragraph.split()) for paragraph in [*paragraphs, ""][:2])
    return summary, re.findall(r"- Cause: (.+?) Fix: (.+?)(?= - Cause: |$)", text)


def errors_section() -> str:
    """A section for each error class: its meaning, its built-in base class, a table of causes."""
    lines = []
    for error in error_classes():
        summary, pairs = read_docstring(error)
        builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
        meaning = f"{summary} It is a built-in `{builtin.__name__}` too."
        lines += [f"### `{error.__name__}`", "", *textwrap.wrap(meaning, 100)]
        lines += ["", "| cause | fix |", "|---|---|"]
        lines += [f"| {sentence_of(cause)} | {sentence_of(fix)} |" for cause, fix in pairs]
        lines.append("")
    return "\n".join(lines)


def sentence_of(text: str) -> str:
    """``text`` with a capital first letter, for a cell of the table."""
    return text[0].upper() + text[1:]
