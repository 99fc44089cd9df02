"""Write the generated parts of the docs: docs/cli.md from the commands' --help, tables in README.md from recorded
results.

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

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("", "train", "eval", "generate", "merge", "inspect")


def help_of(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    arguments = [sys.executable, "-m", "veneer.cli", *command.split(), "--help"]
    text = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def cli_page() -> str:
    parts = ["# The command line", "", "Generated from `--help` by `make docs`.", ""]
    for command in COMMANDS:
        parts += [f"## `{f'veneer {command}'.strip()}`", "", "```text", help_of(command), "```", ""]
    return "\n".join(parts)


def bench_table() -> str:
    """The recorded benchmarks, as benchmarks/results/*.json hold them."""
    lines = ["| | floor | ratio (quartiles) |", "|---|---|---|"]
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(file.read_text())
        for name, row in result["rows"].items():
            if name != result["floor"]:
                spread = f"{row['low']:.2f}–{row['high']:.2f}"
                lines.append(f"| {result['name']}: {name} | {result['floor']} | {row['ratio']:.2f} ({spread}) |")
    return "\n".join(lines)


def demo_table() -> str:
    """The table that `make demo` recorded in demo/result.json."""
    result = json.loads((ROOT / "demo" / "result.json").read_text())
    lines = ["| model | phoneme error rate | words exact |", "|---|---|---|"]
    lines += [f"| {who} | {rate:.3f} | {exact:.1%} |" for who, rate, exact in result["scores"]]
    return "\n".join([*lines, "", result["summary"]])


def filled(text: str, name: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no <!-- {name} --> block")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> int:
    readme = ROOT / "README.md"
    text = filled(filled(readme.read_text(), "bench", bench_table()), "demo", demo_table())
    stale = []
    for path, content in ((ROOT / "docs" / "cli.md", cli_page()), (readme, text)):
        if not path.exists() or path.read_text() != content:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(content)
    if "--check" in sys.argv and stale:
        print(f"Found: {', '.join(stale)} out of date. Expected: what `make docs` writes. Do: run it and commit.")
        return 1
    print(f"docs: {'wrote ' + ', '.join(stale) if stale and '--check' not in sys.argv else 'fresh'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
