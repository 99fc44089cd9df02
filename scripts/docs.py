"""Write the generated parts of the docs.

docs/cli.md                     from the commands' --help
docs/config.md                  the table of variants, from their registry
docs/serving.md                 the table of fields, from the server's request bodies
docs/troubleshooting.md         the errors, from their docstrings
docs/overview.md                the table of files, from their docstrings
docs/plan.md                    from the planner
examples/grafana.json           from the table of its panels
docs/benchmarks.md, docs/torture.md, docs/gpu-measured.md, and blocks of README.md,
docs/start.md, docs/from-peft.md, docs/trainers.md      from recorded results
docs/paper/                     from the results in experiments/

python scripts/docs.py            write
python scripts/docs.py --check    fail if anything committed is stale
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # experiments/

import torch
from experiments.page import pages as paper_pages

import bench_page
import errors_page
import fields_page
import files_index
import gpu_page
import grafana_board
import plan_page
import readme_picture
import torture_page
import trainers
from veneer.cli.command_table import COMMANDS as COMMAND_LINES
from veneer.variants import VARIANTS, InitContext

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("", *COMMAND_LINES)


def help_of(command: str) -> str:
    """The text of a command's --help."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    arguments = [sys.executable, "-m", "veneer.cli", *command.split(), "--help"]
    text = subprocess.run(
        arguments, capture_output=True, text=True, check=True, env=environment
    ).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def cli_page() -> str:
    lines = ["# The command line", "", "Generated from `--help` by `make docs`.", ""]
    for command in COMMANDS:
        lines += [f"## `{f'veneer {command}'.strip()}`", "", "```text", help_of(command), "```", ""]
    return "\n".join(lines)


def demo_table() -> str:
    """The table that `make demo` recorded in demo/result.json."""
    result = json.loads((ROOT / "demo" / "result.json").read_text())
    lines = ["| model | phoneme error rate | words exact |", "|---|---|---|"]
    lines += [f"| {model} | {rate:.3f} | {exact:.1%} |" for model, rate, exact in result["scores"]]
    return "\n".join([*lines, "", result["summary"]])


def variants_table() -> str:
    """A table of the registered variants, with measured counts of parameters and scales."""
    scales = {1.0: "alpha", 0.25: "alpha / r", 0.5: "alpha / √r"}
    calibration = {"inputs": "batches", "gradient": "batches, loss", "original": "the original"}
    lines = [
        (
            "| variant | scale | default alpha | trained, 512 × 512 at rank 8 | start | looks at |"
            " source |"
        ),
        "|---" * 7 + "|",
    ]
    weight, second_weight, inputs = (
        torch.randn(1, 512, 512),
        torch.randn(1, 512, 512),
        torch.eye(512, dtype=torch.float64),
    )
    init_context = InitContext(
        *(1, 512, 512, 8, 512),
        base=lambda: weight, inputs=lambda: inputs[None], gradient=second_weight.double,
        original=lambda: weight + second_weight,
    )  # fmt: skip
    for variant in VARIANTS:
        trained_count = sum(
            value.numel()
            for name, value in variant.init(init_context).items()
            if name not in variant.frozen
        )
        cells = [
            f"`{variant.name}`", scales[variant.scale(1, 4)], f"{variant.default_alpha:g}",
            f"{trained_count:,}", "the base" if variant.exact_start else "near the original",
            *map(calibration.get, variant.needs or [""]), variant.paper,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cell or '' for cell in cells)} |")
    return "\n".join(lines)


def fill_block(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` in the block between the comments with this name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no <!-- {name} --> block in the page")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def pages_with_blocks() -> dict[str, str]:
    """The contents of pages that are written by hand except for blocks between comments, by path;
    the blocks are filled."""
    blocks = {
        "README.md": {"picture": readme_picture.caption(), "bench": bench_page.readme()},
        "docs/start.md": {"demo": demo_table()},
        "docs/from-peft.md": {"torture": torture_page.counts()},
        "docs/config.md": {"variants": variants_table()},
        "docs/serving.md": {"fields": fields_page.table()},
        "docs/trainers.md": {"trainers": trainers.table()},
        "docs/troubleshooting.md": {"errors": errors_page.errors_section()},
        "docs/overview.md": {"files": files_index.files_index()},
    }
    filled_pages = {}
    for path, contents in blocks.items():
        text = (ROOT / path).read_text()
        for name, content in contents.items():
            text = fill_block(text, name, content)
        filled_pages[path] = text
    return filled_pages


def main() -> int:
    stale = []
    pages = {
        "benchmarks.md": bench_page.page(),
        "torture.md": torture_page.page(),
        "gpu-measured.md": gpu_page.page(),
        "plan.md": plan_page.page(),
        "cli.md": cli_page(),
        "first-run.svg": readme_picture.picture(),
        **bench_page.plots(),
        **paper_pages(),
    }
    generated = {f"docs/{name}": content for name, content in pages.items()}
    generated["examples/grafana.json"] = grafana_board.board()
    for name, content in (generated | pages_with_blocks()).items():
        path = ROOT / name
        if not path.exists() or path.read_text() != content:
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(content)
    if "--check" in sys.argv and stale:
        print(
            f"Found: {', '.join(stale)} out of date. Expected: what `make docs` writes. Do: run it"
            " and commit."
        )
        return 1
    print(
        f"docs: {'wrote ' + ', '.join(stale) if stale and '--check' not in sys.argv else 'fresh'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
