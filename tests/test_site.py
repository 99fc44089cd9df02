"""The site of docs/: every page is in its navigation, it builds without a warning, and its links
lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from scripts import build_site
from tests.support import extras
from tests.support.browser import browser  # noqa: F401 (a fixture)
from tests.test_pages import public_modules, public_names

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    build_site.collect(folder)
    return folder


def test_every_page_is_in_the_navigation_once(pages: Path) -> None:
    """But for the decisions and the reports to other libraries, which pages of them link to."""
    nav = tomllib.loads(build_site.CONFIG.read_text())["project"]["nav"]
    listed = [page for _, page in build_site.navigation(nav)]
    there = {str(page.relative_to(pages)) for page in pages.rglob("*.md")}
    linked = {
        page
        for page in there
        if page.startswith(("docs/decisions/", "docs/upstream/")) and not page.endswith("README.md")
    }
    assert sorted(listed) == sorted(there - linked), (
        "Do: put the page into the navigation of scripts/site.toml."
    )


def test_llms_txt_names_every_page_of_the_navigation(pages: Path) -> None:
    text = (pages / "llms.txt").read_text()
    assert text.startswith("# Veneer\n\n> LoRA for PyTorch")
    assert (
        "- [Serve](docs/serving.md): Serve one base in memory with as many adapters as the disk holds.\n"
        in text
    )
    assert "](docs/api/veneer.md): " in text


def test_the_api_is_that_of_public_modules(pages: Path) -> None:
    shown = "".join(page.read_text() for page in (pages / "docs" / "api").iterdir())
    assert "::: veneer\n" in shown
    assert "::: veneer.variants.lora\n" in shown


def test_a_notebook_is_its_page() -> None:
    page = "# Title\n\n```yaml\na: 1\n```\n\n```python\nx = 1\n\ny = x\n```\nThen:\n\n```bash\nveneer list\n```\n"
    made = build_site.notebook(page)
    kinds = [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]]
    assert kinds == [
        ("markdown", "# Title\n\n```yaml\na: 1\n```"),
        ("code", "x = 1\n\ny = x"),
        ("markdown", "Then:"),
        ("code", "%%bash\nveneer list"),
    ]
    assert len({cell["id"] for cell in made["cells"]}) == 4


def test_a_range_in_a_table_is_not_broken_at_its_dash() -> None:
    page = "1.06–1.15 in prose\n\n| a | 1.13 (1.06–1.15) | fp32 – bf16 |\n"
    joined = "1.06–1.15 in prose\n\n| a | 1.13 (1.06\u2060–\u20601.15) | fp32 – bf16 |\n"
    assert build_site.join_ranges(page) == joined


def test_each_tutorial_has_its_notebook(pages: Path) -> None:
    tutorials = sorted((pages / "docs" / "tutorials").glob("*.md"))
    assert len(tutorials) >= 7
    for page in tutorials:
        made = json.loads(page.with_suffix(".ipynb").read_text())
        assert made["nbformat"] == 4
        assert any(cell["cell_type"] == "code" for cell in made["cells"]), page.name


class Addresses(HTMLParser):
    """The ids of a page, and what it links to and loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids.add(named.get("id") or named.get("name"))
        self.links += [named[key] for key in ("href", "src") if named.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, str(ROOT / "scripts" / "build_site.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.mark.slow
@extras.needs("zensical", "mkdocstrings")
def test_the_site_builds_and_its_links_lead_somewhere(site: Path) -> None:
    """Within the site; nothing is loaded from elsewhere."""
    found = {page: Addresses(page) for page in site.rglob("*.html") if page.name != "404.html"}
    wrong = []
    for page, addresses in found.items():
        for link in addresses.links:
            path, _, anchor = link.partition("#")
            if "://" in path or path.startswith("mailto:"):
                continue
            there = (page.parent / unquote(path)).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            known = found[there].ids if there in found else set()
            if not there.exists() or (anchor and unquote(anchor) not in known | {"__top"}):
                wrong.append(f"{page.relative_to(site)}: {link}")
    assert not wrong
    assert len(found) > 75
    assert (site / "llms.txt").exists()
    assert (site / "docs" / "serving.md").exists()


@pytest.mark.slow
@extras.needs("zensical", "mkdocstrings")
def test_every_public_class_and_function_is_shown(site: Path) -> None:
    """By its public name, or by the one where it is defined."""
    shown = set().union(
        *(Addresses(page).ids for page in (site / "docs" / "api").rglob("index.html"))
    )
    missing = []
    for module in sorted(public_modules()):
        for name in public_names(module):
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) or inspect.isfunction(value):
                defined = f"{value.__module__}.{value.__qualname__}"
                missing += [f"{module}.{name}"] * (not {f"{module}.{name}", defined} & shown)
    assert not missing


#: what a page shows wrongly: how far it is wider than the window, and names in cells of tables that
#: break over two lines
MEASURE = """() => [
    document.documentElement.scrollWidth - document.documentElement.clientWidth,
    [...document.querySelectorAll("td code")]
        .filter(code => code.getClientRects().length > 1).map(code => code.textContent),
]"""


@pytest.mark.slow
@extras.needs("zensical", "mkdocstrings")
def test_no_page_is_wider_than_a_phone(site: Path, browser: Any) -> None:  # noqa: F811
    """And wide tables scroll, rather than break the names of options."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    page = context.new_page()
    wrong = []
    for file in sorted(site.rglob("index.html")):
        page.goto(file.as_uri(), wait_until="load")
        overflow, broken = page.evaluate(MEASURE)
        if overflow > 0 or broken:
            wrong.append(f"{file.relative_to(site)}: {overflow} px too wide; {broken}")
    context.close()
    assert not wrong


@pytest.mark.slow
@extras.needs("zensical", "mkdocstrings")
def test_the_first_page_opens_with_install_picture_and_number(site: Path, browser: Any) -> None:  # noqa: F811
    """All within the window of a laptop."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    page.goto((site / "index.html").as_uri(), wait_until="load")
    for selector in ("article pre:has-text('pip install')", "article img", "article strong"):
        box = page.locator(selector).first.bounding_box()
        assert box is not None, selector
        assert box["y"] + box["height"] <= 800, selector
    context.close()


@pytest.mark.slow
@extras.needs("zensical", "mkdocstrings")
def test_the_examples_of_the_api_are_code(site: Path) -> None:
    """Not quotations of quotations, which `>>>` is in Markdown."""
    pages = [*(site / "docs" / "api").rglob("index.html")]
    assert not [page for page in pages if "<blockquote" in page.read_text()]


@extras.needs("zensical", "mkdocstrings")
def test_a_warning_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A link to a page that is not there, on a site of two pages."""

    def two(pages: Path) -> None:
        (pages / "docs").mkdir(parents=True)
        (pages / "README.md").write_text("# Two\n\n[one](docs/one.md) and [none](docs/none.md)\n")
        (pages / "docs" / "one.md").write_text("# One\n")

    config = tmp_path / "site.toml"
    config.write_text('[project]\nsite_name = "Two"\ndocs_dir = "pages"\nsite_dir = "site"\n')
    monkeypatch.setattr(build_site, "CONFIG", config)
    monkeypatch.setattr(build_site, "collect", two)
    assert build_site.build(tmp_path / "build") == 1
    assert "page does not exist" in capfd.readouterr().out
