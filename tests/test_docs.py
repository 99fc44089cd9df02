"""The docs are true: their Python blocks run, their commands parse (and run, in the slow suite).
What pages link to, name and draw is looked up in ``test_pages.py``."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from demo import pronounce
from tests.support import extras
from tests.support.forked import LARGE, Program
from tests.support.tiny import sums, write_rows
from tests.test_tutorials import PAGES as TUTORIALS
from typer.testing import CliRunner

import veneer
from veneer.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent
FIRST_RUN = ROOT / "docs" / "training.md"
#: that page first: commands of later pages go on from what its commands wrote. The README's snippets
#: run in test_readme.py.
PAGES = [
    FIRST_RUN,
    ROOT / "CONTRIBUTING.md",
    # `test_upstream.py` runs the reports to other libraries
    *sorted(
        {*(ROOT / "docs").rglob("*.md")}
        - {FIRST_RUN, *TUTORIALS.values(), *(ROOT / "docs" / "upstream").iterdir()}
    ),
]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        texts = re.findall(
            rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        )
        found += [
            (f"{page.relative_to(ROOT)}:{number}", text) for number, text in enumerate(texts, 1)
        ]
    return found


# : libraries that take seconds to import, and those of which the import itself warns of torch's own
# changes
DEAR = {
    "bitsandbytes",
    "diffusers",
    "onnxruntime",
    "sentence_transformers",
    "timm",
    "torch_geometric",
    "torchao",
}
WARNING = {"bitsandbytes", "diffusers", "sentence_transformers", "torch_geometric", "torchao"}


def imported(code: str) -> set[str]:
    """The libraries that a block imports."""
    found = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [
        [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for node in found
    ]
    return {name.partition(".")[0] for listed in names for name in listed}


def python_blocks():
    for where, code in blocks("python"):
        libraries = imported(code)
        marks = [
            extras.needs(*sorted(libraries & extras.EXTRAS)),
            *[pytest.mark.slow] * bool(libraries & DEAR),
        ]
        yield pytest.param(where, code, id=where, marks=marks)


@pytest.mark.parametrize(("where", "code"), list(python_blocks()))
def test_python_blocks_run_as_shown(where, code, tmp_path):
    """Without a warning, but for those of large imports and of torch's own export to ONNX."""
    libraries = imported(code)
    before, strict = sorted(libraries & WARNING), "onnxruntime" not in libraries
    block = Program(code, *LARGE, *before, folder=tmp_path, strict=strict)
    assert block.wait() == 0, f"{where}\n{block.said}"


COMMANDS = [
    line for _, text in blocks("bash") for line in text.splitlines() if line.startswith("veneer ")
]


def test_the_first_run_has_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {
        "train",
        "inspect",
        "generate",
        "eval",
        "merge",
    }


@functools.cache
def help_of(command: str) -> str:
    found = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert found.exit_code == 0, found.output
    return found.output


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_docs_parse(line):
    """Each command and each of its flags exists."""
    _, command, *arguments = shlex.split(line, comments=True)
    said = help_of(command)
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{flag}\b", said), f"{flag} is no flag of veneer {command}"


@pytest.mark.slow
def test_commands_of_the_docs_run_one_after_the_other(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    train, held = pronounce.words()
    for name, rows in (("train", train[:600]), ("watched", held[:20]), ("held-out", held[20:40])):
        pronounce.write_rows(tmp_path / ".demo" / f"{name}.jsonl", rows)
    for line in COMMANDS:
        arguments = shlex.split(line, comments=True)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "veneer.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or done.stderr.strip()


@pytest.mark.parametrize(
    ("where", "text"), blocks("yaml"), ids=[where for where, _ in blocks("yaml")]
)
def test_yaml_blocks_are_files_of_examples(where, text):
    """Which test_examples.py runs. The first line names the file."""
    name = re.match(r"# (examples/\w+\.yaml)\n", text)
    assert name, f"{where} does not begin with the name of its file"
    assert text == (ROOT / name[1]).read_text(), where


def test_every_example_is_shown_or_linked():
    page = (ROOT / "docs" / "training.md").read_text()
    for file in (ROOT / "examples").glob("*.yaml"):
        assert (
            f"```yaml\n# examples/{file.name}\n" in page or f"(../examples/{file.name})" in page
        ), file.name


def test_the_public_api_is_enough_for_the_flat_example():
    code = (ROOT / "examples" / "train_flat.py").read_text()
    assert len(code.splitlines()) < 200
    used = set(re.findall(r"veneer\.(\w+)", code)) - {"models", "train"}
    assert used <= set(veneer.__all__)


def test_the_flat_example_trains_saves_and_merges(base, tmp_path):
    rows = write_rows(tmp_path / "sums.jsonl", sums(24))
    example = str(ROOT / "examples" / "train_flat.py")
    command = [
        example,
        str(base),
        str(rows),
        str(tmp_path / "adapter"),
        "--steps",
        "20",
        "--rank",
        "4",
    ]
    code = (
        f"import runpy, sys; sys.argv = {command}; runpy.run_path({example!r}, run_name='__main__')"
    )
    done = Program(code, *LARGE)
    assert done.wait() == 0, done.said
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.said)]
    assert losses[-1] < losses[0]
    assert "of the change kept after rounding" in done.said
    assert veneer.adapter_files.read(tmp_path / "adapter").metadata["provenance"]["steps"] == 20
