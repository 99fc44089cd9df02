"""Build the site of docs/ with Zensical into build/site: `make site`.

Zensical reads a single folder, and pages link to files outside docs/ (README.md, examples/). So the
pages are first collected in build/pages, with the same relative paths as in the repository: a link
works there, on GitHub and on the site. Some files are generated there and never committed: the API
pages from the docstrings of the modules in docs/public-api.md, a notebook of each tutorial, and
llms.txt for language models. The navigation is scripts/site.toml.

    python scripts/build_site.py [FOLDER]        FOLDER/site, build/site by default; any warning is
                                                 an error
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "scripts" / "site.toml"
PACKAGE = ROOT / "src"
#: pages outside docs/
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "RELEASING.md")


def collect(pages: Path) -> None:
    """Copy every page and the files that pages link to into ``pages``, and generate the others."""
    for name in ("docs", "examples", "experiments/full", "experiments/shapes"):
        shutil.copytree(ROOT / name, pages / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT_PAGES:
        shutil.copy(ROOT / name, pages / name)
    shutil.copy(ROOT / "scripts" / "site.css", pages / "site.css")
    (pages / "docs" / "api").mkdir()
    for name, text in api_pages().items():
        (pages / "docs" / "api" / f"{name}.md").write_text(text)
    for page in pages.rglob("*.md"):
        page.write_text(join_ranges(page.read_text()))
    for page in sorted((pages / "docs" / "tutorials").glob("*.md")):
        page.with_suffix(".ipynb").write_text(
            json.dumps(notebook(page.read_text()), indent=1, ensure_ascii=False)
        )
        with page.open("a") as file:
            file.write(f"\n[This page as a notebook]({page.stem}.ipynb)\n")
    (pages / "llms.txt").write_text(llms(pages))


def join_ranges(text: str) -> str:
    """A page in whose tables no line breaks at the dash of a range (1.06–1.15): the dash gets a
    word joiner on both sides."""
    return re.sub(
        r"^\|.*",
        lambda row: re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", row[0]),
        text,
        flags=re.MULTILINE,
    )


# ---- the API
# ------------------------------------------------------------------------------------------------


def api_pages() -> dict[str, str]:
    """A page for each row of the table in docs/public-api.md, by the name of its first module.
    mkdocstrings reads the public names of a module from its ``__all__``."""
    table = (ROOT / "docs" / "public-api.md").read_text().split("## How long", 1)[0]
    rows = [
        line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `veneer")
    ]
    pages = {}
    for modules, purpose in rows:
        names = re.findall(r"`(veneer[\w.]*)`", modules)
        title = purpose[0].upper() + purpose[1:]
        blocks = (
            [f"# {title}", f"In {modules}."] if len(names) > 1 else [f"# {modules}", f"{title}."]
        )
        for name in names:
            blocks += [f"## `{name}`"] * (len(names) > 1) + [f"::: {name}"]
            blocks += [
                f"::: {identifier}\n    options:\n      show_root_heading: true"
                for identifier in hidden(name)
            ]
        pages[names[0]] = "\n\n".join(blocks) + "\n"
    return pages


def hidden(module: str) -> Iterator[str]:
    """The full names of the public names of a package that are also names of its modules, such as
    `veneer.attach`, a function and a folder. In the source, such a name means the module."""
    folder = PACKAGE / module.replace(".", "/")
    if not folder.is_dir():
        return
    for node in ast.walk(ast.parse((folder / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module != module:
            for alias in node.names:
                if (folder / alias.name).is_dir() or (folder / f"{alias.name}.py").exists():
                    yield f"{node.module}.{alias.name}"


# ---- notebooks
# ------------------------------------------------------------------------------------------------


def notebook(page: str) -> dict[str, Any]:
    """A page as a notebook (nbformat 4.5). Python blocks become code cells, shell blocks become
    code cells that run the shell."""
    cells = []
    for kind, text in pieces(page):
        cell: dict[str, Any] = {"cell_type": "markdown", "id": f"cell-{len(cells)}", "metadata": {}}
        if kind in ("python", "bash"):
            text = text if kind == "python" else f"%%bash\n{text}"
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append({**cell, "source": text.strip("\n").splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def pieces(page: str) -> Iterator[tuple[str, str]]:
    """("markdown", prose) and ("python" or "bash", code) of a page, in order. Other code blocks are
    part of the prose."""
    end = 0
    for block in re.finditer(r"^```(python|bash)\n(.*?)^```\n", page, re.DOTALL | re.MULTILINE):
        if prose := page[end : block.start()].strip():
            yield "markdown", prose
        yield block[1], block[2]
        end = block.end()
    if prose := page[end:].strip():
        yield "markdown", prose


# ---- for models
# ------------------------------------------------------------------------------------------------


def navigation(entries: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(title, path of the page) of each entry of the navigation, in order."""
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, str):
            yield title, target
        else:
            yield from navigation(target)


def llms(pages: Path) -> str:
    """The text of llms.txt (llmstxt.org): links to the pages, with their first words."""
    config = tomllib.loads(CONFIG.read_text())["project"]
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    lines += ["Start with [the guide for coding agents](docs/agents.md).", ""]
    for section in config["nav"]:
        ((head, entries),) = section.items()
        lines += [f"## {head}", ""]
        lines += [
            f"- [{title}]({page}): {first_words(pages / page)}"
            for title, page in navigation(entries)
        ]
        lines.append("")
    return "\n".join(lines)


def first_words(page: Path) -> str:
    """The first sentence of a page's first paragraph, without links."""
    paragraphs = (
        block for block in page.read_text().split("\n\n") if re.match(r"[A-Za-z*`_\[]", block)
    )
    paragraph = next(paragraphs, None)
    if paragraph is None:
        raise SystemExit(
            f"Found: {page.name} without a paragraph. Expected: one that says what it is. Do:"
            " write it."
        )
    text = " ".join(paragraph.split())
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.split(r"[.:](?:\s|$)", text)[0] + "."


def build(folder: Path) -> int:
    """Build FOLDER/site. Returns 0, or 1 if there was any warning."""
    shutil.rmtree(folder / "pages", ignore_errors=True)
    shutil.rmtree(folder / "site", ignore_errors=True)
    collect(folder / "pages")
    shutil.copy(CONFIG, folder / "zensical.toml")
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--strict",
        "--clean",
        "-f",
        str(folder / "zensical.toml"),
    ]
    search_path = [
        str(PACKAGE),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]  # where mkdocstrings reads the docstrings
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(process.stdout, process.stderr, sep="", end="")
    if (
        process.returncode or process.stderr.strip() != "No issues found"
    ):  # --strict ignores warnings about docstrings
        return 1
    for page in sorted((folder / "pages").rglob("*.md")):  # llms.txt links to these
        shutil.copy(page, folder / "site" / page.relative_to(folder / "pages"))
    return 0


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build")))
