"""Make docs/torture.md, and the table of counts in docs/from-peft.md, from
benchmarks/results/torture.json and docs/upstream/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "torture.json"
UPSTREAM = ROOT / "docs" / "upstream"
OUTCOMES = ("right", "wrong without a word", "crashes", "refuses with words", "does not check")
FAULTS = ("wrong without a word", "crashes")
OWN = "Veneer"
PURPOSE = (
    "The cases were chosen because some library fails in them: the counts say how libraries fail, "
    "and not how often users meet it. Veneer's tests run every case, so that its column is no news."
)
RULES = """
- **right**: the number that is right, or an error for input that is bad.
- **wrong without a word**: another number, with no error and no warning of the library's.
- **crashes**: an error that no `raise` with a message made: of shapes, of a missing attribute, a
  bare assertion.
- **refuses with words**: an error that says what is not supported, or a warning of it; also a
  function that a library does not have ("not offered"), by the same rule for every library.
- **does not check**: bad input or a damaged file is taken as it is. A library may well leave that
  to its user.
""".strip()
#: wrong results that were not reported upstream, with the reason
NOT_REPORTED = {
    ("PEFT", "merge_100_times"): "rounding; its documentation promises no exact unmerging",
    ("loralib", "merge_100_times"): "rounding; its documentation promises no exact unmerging",
    ("loralib", "attention_all_linear"): "layers are replaced by hand, this one by the case",
    ("loralib", "tied_embeddings"): "layers are replaced by hand, these two by the case",
    ("LyCORIS", "load_no_alpha"): "a damaged file; an error, though not one with words",
}


def escape_cell(text: str) -> str:
    return re.sub(r"([\\|*_<>`\[\]])", r"\\\1", text)


def upstream_reports() -> dict[tuple[str, str], tuple[str, str]]:
    """The (file, title) of each report in docs/upstream/, by (library, case)."""
    reports = {}
    for file in sorted(UPSTREAM.glob("*.md")):
        title, _, body = file.read_text().partition("\n")
        paragraph = body.strip().partition("\n\n")[0]
        for case in re.findall(r"`(\w+)`", paragraph):
            reports[paragraph.split()[0], case] = (file.name, title.removeprefix("# "))
    return reports


def counts() -> str:
    record = json.loads(RECORD.read_text())
    lines = [f"| library | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for library, version in record["versions"].items():
        outcomes = [case["results"][library]["outcome"] for case in record["cases"].values()]
        numbers = [str(outcomes.count(outcome)) for outcome in OUTCOMES]
        lines.append(f"| {library} {version} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def page() -> str:
    record = json.loads(RECORD.read_text())
    reports = upstream_reports()
    lead = (
        "Written by `make docs` from what `python -m benchmarks.torture --record` recorded:"
        f" {len(record['cases'])} cases, each library at its defaults and as its documentation"
        f" says; torch {record['torch']}, {record['machine']}. {PURPOSE}"
    )
    lines = ["# What LoRA libraries get wrong", "", lead, "", counts(), "", RULES, ""]
    for library, version in record["versions"].items():
        if library != OWN:
            lines += list_faults(record, reports, library, version)
    lines += ["## Every case", ""]
    for name, case in record["cases"].items():
        lines += describe_case(record, name, case)
    return "\n".join(lines).rstrip() + "\n"


def list_faults(
    record: dict[str, Any], reports: dict[Any, Any], library: str, version: str
) -> list[str]:
    """A section with a table of the cases that a library gets wrong, and their reports."""
    lines = [f"## {library} {version}: wrong, or a crash", ""]
    lines += ["| case | got | right | report |", "|---|---|---|---|"]
    for name, case in record["cases"].items():
        result = case["results"][library]
        if result["outcome"] not in FAULTS:
            continue
        if (library, name) in reports:
            file, title = reports[library, name]
            report = f"[{escape_cell(title)}](upstream/{file})"
        else:
            report = NOT_REPORTED[library, name]
        cells = [escape_cell(result[key]) for key in ("got", "right")]
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(cells)} | {report} |")
    return [*lines, ""]


def describe_case(record: dict[str, Any], name: str, case: dict[str, Any]) -> list[str]:
    lines = [f"### {name}", "", f"{escape_cell(case['about'])}.", "", "```bash"]
    lines += [f"python -m benchmarks.torture {name}    # one: --library peft", "```", ""]
    lines += ["| library | outcome | | got | right |", "|---|---|---|---|---|"]
    for library, version in record["versions"].items():
        result = case["results"][library]
        cells = [result["outcome"], *(escape_cell(result[key]) for key in ("text", "got", "right"))]
        lines.append(f"| {library} {version} | {' | '.join(cells)} |")
    return [*lines, ""]
