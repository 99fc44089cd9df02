"""The pages are whole: what they link to, name and draw is there, what they import is public,
nothing of PEFT is missing. (``test_docs.py`` runs their snippets.)"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from scripts import errors_page, files_index

import veneer
from veneer.attach.source.from_peft import PEFT_METHODS
from veneer.errors import AdapterError
from veneer.formats import peft_fields

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "veneer"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
DECISIONS = sorted(
    {*(ROOT / "docs" / "decisions").glob("*.md")} - {ROOT / "docs/decisions/README.md"}
)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> str:
    """What a page shows as code: its blocks, and what stands between backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


# ---- links and names
# ---------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            there = page.parent / target if target else page
            if "://" not in target and (
                not there.exists() or (anchor and anchor not in anchors(there))
            ):
                wrong.append(f"{named(page)} links to {target}#{anchor}")
    assert not wrong


def test_references_are_defined():
    """``[text][name]`` has its ``[name]: address``."""
    wrong = []
    for page in PAGES:
        text = re.sub(
            r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE
        )
        defined = set(re.findall(r"^\[([^\]]+)\]: \S+$", text, re.MULTILINE))
        asked = set(re.findall(r"\]\[([^\]]+)\]", text)) | set(
            re.findall(r"\[(\^\w+)\](?!:)", text)
        )
        notes = set(re.findall(r"^\[(\^\w+)\]: ", text, re.MULTILINE))
        wrong += [f"{named(page)}: {name}" for name in sorted(asked - defined - notes)]
    assert not wrong


def test_no_page_holds_both_sides_of_a_merge():
    assert [
        named(page) for page in PAGES if re.search(r"^(<{7}|>{7}) ", page.read_text(), re.MULTILINE)
    ] == []


def test_files_that_are_named_exist():
    """By their path from the root of the repository or from ``src/veneer``."""
    folders = "|".join(path.name for path in SOURCE.iterdir() if path.is_dir())
    roots = "src/veneer|tests|docs|benchmarks|scripts|examples|demo"
    wrong = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # what it names was there then
            continue
        code = code_of(page)
        at_root = re.findall(rf"\b((?:{roots})/[\w/-]+\.(?:py|md|yaml))\b", code)
        inside = re.findall(rf"(?<![\w/])((?:{folders})/[\w/]+\.py)\b", code)
        missing = [path for path in at_root if not (ROOT / path).exists()]
        missing += [path for path in inside if not (SOURCE / path).exists()]
        wrong += [f"{named(page)} names {path}" for path in missing]
    assert not wrong


def test_tests_that_are_named_exist():
    """A page that names a test names its file too."""
    wrong = []
    for page in PAGES:
        code = code_of(page)
        files = [ROOT / path for path in re.findall(r"\btests/[\w/]+\.py\b", code)]
        tests = "\n".join(file.read_text() for file in files if file.exists())
        for name in re.findall(r"\btest_\w+", code):
            if f"def {name}(" not in tests and not any(file.stem == name for file in files):
                wrong.append(f"{named(page)} names {name}")
    assert not wrong


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        asked = set(re.findall(r"(?:^ *|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE))
        assert asked <= targets, f"{named(page)}: {asked - targets}"


def test_pages_use_the_words_of_the_field():
    """The glossary has the words that are ours; others that once were are gone."""
    words = (
        "artefacts?|hollow|skeleton|lineup|fitting|filing|trained numbers|deck|skinny|dot16|give_way|chooser|lowplan|"
        r"(?:adapted|adapter|evidence|headers|held|linears|methods|overlap|pace|proof|readers|reading|rows|shards)\.py"
    )
    private = rf"(?<![\w/])(?:{words})\b"
    wrong = [(named(page), *re.findall(private, page.read_text(), re.IGNORECASE)) for page in PAGES]
    assert not [found for found in wrong if len(found) > 1]


def test_the_package_names_no_address():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "urls" not in project
    assert not any("email" in author for author in project["authors"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == veneer.__version__
    assert (citation["license"], citation["authors"]) == (project["license"], project["authors"])
    assert {"cff-version", "message", "title"} <= citation.keys()


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    text = (ROOT / "examples" / "docker" / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert {"pyproject.toml", "src"} <= {*copied}
    assert all((ROOT / name).exists() for name in copied)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*extras.split(",")} <= project["optional-dependencies"].keys()
    assert (
        json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[0])[0] in project["scripts"]
    )


def test_the_package_says_that_it_is_typed():
    assert (SOURCE / "py.typed").exists()


def test_the_changelog_has_the_form_that_it_names():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    assert all(
        re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release) for release in releases[1:]
    )
    sections = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= sections


# ---- overview, decisions
# ---------------------------------------------------------------------------------


def test_the_overview_is_two_pages_and_a_table_of_files():
    text = (ROOT / "docs" / "overview.md").read_text()
    lines = text.split("## Files", 1)[0].splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 120 for line in lines)


def test_the_drawing_is_of_the_house():
    """Everything at the top of the package is drawn, and what is drawn is there."""
    overview = (ROOT / "docs" / "overview.md").read_text()
    drawing = overview.split("src/veneer/\n", 1)[1].split("```", 1)[0]
    top = set(re.findall(r"^  (\w+(?:\.py|/))", drawing, re.MULTILINE))
    there = {
        path.name + "/" * path.is_dir()
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or path.is_dir()
    }
    assert top == there - {"__init__.py", "__pycache__/"}
    folder = SOURCE
    for line in drawing.splitlines():
        if head := re.match(r"  (\w+)/", line):
            folder = SOURCE / head[1]
        elif inner := re.match(r"    (\w+)/ ", line):
            assert (folder / inner[1]).is_dir(), f"{folder.name}/{inner[1]} is drawn"


def test_every_file_has_its_line_in_the_overview():
    index = (ROOT / "docs" / "overview.md").read_text().split("## Files", 1)[1]
    assert files_index.files_index() in index
    for file in SOURCE.rglob("*.py"):
        assert file.name == "__init__.py" or f"| `{file.name}` | " in index


def test_the_glossary_is_short():
    overview = (ROOT / "docs" / "overview.md").read_text()
    glossary = overview.split("## Glossary", 1)[1].split("## Files", 1)[0]
    words = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)[1:]
    assert 10 < len(words) <= 25
    assert len(set(words)) == len(words)


def decisions_of(page: Path) -> dict[str, list[str]]:
    """The decisions of a page: heading -> its lines, without blank ones."""
    sections = page.read_text().split("\n## ")[1:]
    lines = [[line for line in section.splitlines() if line] for section in sections]
    return {title: text for title, *text in lines}


def test_the_table_of_decisions_has_every_page():
    rows = (ROOT / "docs" / "decisions" / "README.md").read_text().splitlines()
    listed = {
        (match[1], match[2], int(match[3]))
        for row in rows
        if (match := re.fullmatch(r"\| \[(.+)\]\((.+)\) \| .+ \| (\d+) \|", row))
    }
    titles = {page: page.read_text().splitlines()[0].removeprefix("# ") for page in DECISIONS}
    assert listed == {(title, page.name, len(decisions_of(page))) for page, title in titles.items()}


def test_a_decision_says_why_what_was_rejected_and_how_to_check():
    for page in DECISIONS:
        assert all(len(line) <= 100 for line in page.read_text().splitlines()), page.name
        for title, lines in decisions_of(page).items():
            place = f"{page.name}: {title}"
            assert len(lines) <= 12, place
            labels = [line.split("**")[1] for line in lines if line.startswith("**")]
            assert labels == ["Rejected.", "Check."], place
            assert not lines[0].startswith("**"), place
            assert re.search(r"`(tests/|make |python )|`docs/", "\n".join(lines)), place


def test_no_text_refers_to_a_decision_by_number():
    folders = ("src", "tests", "scripts", "docs", "benchmarks", "experiments", "examples", "demo")
    files = [
        *ROOT.glob("*.md"),
        *(
            file
            for folder in folders
            for pattern in ("*.py", "*.md", "*.toml", "*.js", "*.cpp")
            for file in (ROOT / folder).rglob(pattern)
        ),
    ]
    numbered = re.compile(r"decisions? \[?[0-9]{3}\b|decisions/[0-9]{3}", re.IGNORECASE)
    assert [named(file) for file in files if numbered.search(file.read_text())] == []


# ---- troubleshooting
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", errors_page.error_classes(), ids=lambda error: error.__name__)
def test_an_error_class_has_causes_and_fixes(error):
    """In its docstring, and with them on the page."""
    summary, pairs = errors_page.read_docstring(error)
    assert summary.endswith(".")
    assert pairs, f"{error.__name__} has no '- Cause: …. Fix: ….' in its docstring"
    assert all(text.endswith(".") for pair in pairs for text in pair)
    assert inspect.getdoc(error).count("Cause: ") == len(pairs)


def test_troubleshooting_has_every_error_and_warning():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert f"<!-- errors -->\n{errors_page.errors_section()}\n<!-- /errors -->" in page
    source = "".join(file.read_text() for file in SOURCE.rglob("*.py"))
    warnings = set(re.findall(r"^class (\w+)\(UserWarning\):", source, re.MULTILINE))
    assert warnings
    assert warnings == set(
        re.findall(r"^\| `(\w+)` \|", page.split("## Warnings")[1], re.MULTILINE)
    )


# ---- what is public
# ----------------------------------------------------------------------------------------------


def public_modules() -> set[str]:
    table = (ROOT / "docs" / "public-api.md").read_text().split("## How long", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| `veneer")]
    return {name for row in rows for name in re.findall(r"`(veneer[\w.]*)`", row.split("|")[1])}


def public_names(module: str) -> set[str]:
    return set(importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", sorted(public_modules()))
def test_a_public_module_says_what_is_public(module):
    value = importlib.import_module(module)
    assert value.__doc__
    for name in value.__all__:
        assert hasattr(value, name), f"{module}.__all__ names {name}"


def test_what_the_docs_import_is_public():
    """In README, docs and examples: from a module that public-api.md lists, and in its
    ``__all__``."""
    modules, wrong = public_modules(), []
    measured = ROOT / "docs" / "benchmarks.md"  # says what was measured, also of the inside
    for page in [*PAGES, *(ROOT / "examples").glob("*.py")]:
        if page == measured:
            continue
        code = page.read_text() if page.suffix == ".py" else code_of(page)
        code = code.replace(
            "-m veneer.cli", ""
        )  # the command line as a module, which torchrun asks for
        asked = [
            (module, name.split(" as ")[0].strip())
            for module, names in re.findall(
                r"^from (veneer[\w.]*) import ([^#\n]+)", code, re.MULTILINE
            )
            for name in names.split(",")
        ]
        for chain in re.findall(r"(?<![\w./])veneer((?:\.\w+)+)", code):
            parts = chain.strip(".").split(".")
            if parts[0] not in ("json", "safetensors"):  # names of files
                depth = max(
                    n for n in range(len(parts) + 1) if ".".join(["veneer", *parts[:n]]) in modules
                )
                asked += (
                    [(".".join(["veneer", *parts[:depth]]), parts[depth])]
                    if depth < len(parts)
                    else []
                )
        for module, name in asked:
            if module not in modules or (
                name not in public_names(module) and f"{module}.{name}" not in modules
            ):
                wrong.append(f"{named(page)}: {module}.{name}")
    assert not wrong


# ---- From PEFT
# ---------------------------------------------------------------------------------------------------

FROM_PEFT = (ROOT / "docs" / "from-peft.md").read_text()


def rows_of(section: str) -> dict[str, list[str]]:
    """The table of a section, by its first column."""
    text = FROM_PEFT.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    table = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in table}


def test_every_field_of_pefts_config_has_its_row():
    peft = pytest.importorskip("peft")
    rows = {
        re.match(r"`(\w+)`", cell)[1]: cells
        for cell, cells in rows_of("The fields of `LoraConfig`").items()
    }
    assert rows.keys() == {field.name for field in fields(peft.LoraConfig)}
    ours = {field.name for field in fields(veneer.LoraConfig)}
    told = set(re.findall(r"`(\w+)`", " ".join(cells[0].split(":")[0] for cells in rows.values())))
    assert told >= {
        "rank",
        "alpha",
        "dropout",
        "targets",
        "exclude",
        "layers",
        "ranks",
        "alphas",
        "train_also",
        "bias",
    }
    assert ours - told <= {"slices", "variant", "dtype"}


def test_what_loading_refuses_of_a_config_is_what_the_page_says():
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]}
    for cell, (_, loaded) in rows_of("The fields of `LoraConfig`").items():
        name = re.match(r"`(\w+)`", cell)[1]
        refused = False
        try:
            peft_fields.check_config({**config, name: {"a": 1}})
        except AdapterError as error:
            refused = f"{name}={{'a': 1}}" in str(
                error
            ) and "a field that Veneer can honour" in str(error)
        assert refused == (loaded == "refused"), name


def test_every_helper_of_peft_has_its_row():
    peft = pytest.importorskip("peft")
    from peft import helpers, optimizers

    methods = {*dir(peft.PeftModel), *dir(peft.LoraModel)} - {*dir(torch.nn.Module)}
    functions = {name for name in peft.__all__ if inspect.isfunction(getattr(peft, name))}
    functions |= {
        name
        for name, value in {**vars(helpers), **vars(optimizers)}.items()
        if inspect.isfunction(value) and value.__module__.startswith(("peft.helpers", "peft.optim"))
    }
    listed = set(
        re.findall(r"\w+", " ".join([*rows_of("Helpers"), *rows_of("Methods of the model")]))
    )
    names = {name for name in functions | methods if not name.startswith("_")}
    assert names <= listed, names - listed


def test_the_methods_that_are_answered_are_listed():
    peft = pytest.importorskip("peft")
    answered = PEFT_METHODS.keys() & {*dir(peft.PeftModel), *dir(peft.LoraModel)}
    text = FROM_PEFT.split("raise a `MethodError`", 1)[1].split("`save_pretrained`", 1)[0]
    assert set(re.findall(r"`(\w+)`", text)) == answered


def test_every_tuner_of_peft_is_named():
    peft = pytest.importorskip("peft")
    section = FROM_PEFT.split("## Other tuners\n", 1)[1].split("\n## ", 1)[0]
    # two of them stand in the table of fields alone
    types = {*re.findall(r"`(\w+)`", section), "LORA", "TRAINABLE_TOKENS"}
    assert {kind.value for kind in peft.PeftType} <= types


def test_the_page_on_the_config_has_every_field():
    page = (ROOT / "docs" / "config.md").read_text().split("## Patterns")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == {
        field.name for field in fields(veneer.LoraConfig)
    }
