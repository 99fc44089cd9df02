"""The table of the files of ``src/veneer`` in docs/overview.md, from the modules' docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "veneer"

#: the most characters of a summary that has several sentences
SUMMARY_LENGTH = 230


def summary_of(file: Path) -> str:
    """The first sentences of a module's docstring, from its first paragraph: at least one sentence,
    and further ones up to ``SUMMARY_LENGTH`` characters."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    first, *further = re.split(r"(?<=\.) (?=[A-Z`\"(])", paragraph)
    summary = first
    for sentence in further:
        if len(summary) + len(sentence) >= SUMMARY_LENGTH:
            break
        summary += f" {sentence}"
    return summary.replace("``", "`").replace("|", r"\|").removesuffix(":").removesuffix(".")


def is_listed(file: Path) -> bool:
    """Whether a file has a row: all but an ``__init__.py`` without functions of its own."""
    if file.name != "__init__.py":
        return True
    functions = (
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    )
    return not {*functions} <= {"__getattr__", "__dir__"}


def folders() -> list[Path]:
    """The folders with Python files, in the order of the drawing in docs/overview.md."""
    overview = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8")
    drawing = overview.split("src/veneer/\n", 1)[1].split("```", 1)[0]
    drawn = re.findall(r"^  (\w+)/", drawing, re.MULTILINE)
    below = {
        name: sorted({path.parent for path in (SOURCE / name).rglob("*.py")}) for name in drawn
    }
    return [SOURCE, *(folder for name in drawn for folder in below[name])]


def files_index() -> str:
    """A table for each folder: its files, and what each is for."""
    lines: list[str] = []
    for folder in folders():
        files = [file for file in sorted(folder.glob("*.py")) if is_listed(file)]
        if not files:
            continue
        path = folder.relative_to(SOURCE.parent).as_posix()
        package = folder / "__init__.py"
        purpose = [] if is_listed(package) else [f"{summary_of(package)}.", ""]
        lines += [f"### `{path}/`", "", *purpose, "| file | |", "|---|---|"]
        lines += [f"| `{file.name}` | {summary_of(file)} |" for file in files]
        lines.append("")
    return "\n".join(lines).rstrip()
