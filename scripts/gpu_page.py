"""Make docs/gpu-measured.md from the records of `make gpu` in benchmarks/results/gpu-*.json.
Without a record, the page says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

if __package__:
    from scripts import bench_page
else:  # docs.py runs as a program, with this folder on the path
    import bench_page

LEAD = """# Measured on GPUs

Written by `make docs` from `benchmarks/results/gpu-*.json`, which `make gpu` writes on a machine
with a GPU, in at most 10 minutes. What a GPU is asked for, counted without one: [gpu.md](gpu.md).
"""
EMPTY = """
**Not measured yet.** No run on a GPU has been recorded, so nothing is claimed here: not that
anything is fast, and not that a kernel of a real GPU gives the numbers that the emulated device
gives.
"""


def page() -> str:
    files = sorted(bench_page.RESULTS.glob("gpu-*.json"))
    results = [json.loads(file.read_text()) for file in files]
    results = [
        result for result in results if result.get("device") == "cuda" and not result.get("quick")
    ]
    if not results:
        return LEAD + EMPTY
    note = (
        "\nMedians of interleaved rounds, with quartiles; ratios are to the frozen base's step"
        " (forward, and the gradient carried back to the embedded input) in the same round, the"
        " smaller the better. Memory is what a step holds at its peak beyond what was there before"
        " it.\n"
    )
    return (
        LEAD
        + note
        + "".join("\n" + "\n".join(_result_section(result)).rstrip() + "\n" for result in results)
    )


def _result_section(result: Mapping[str, Any]) -> list[str]:
    """The section of the page for one GPU."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"## {result['gpu']}",
        "",
        (
            f"{result['gpus']} × {result['memory'] / 2**30:.0f} GiB, capability"
            f" {result['capability']}, CUDA {result['cuda']}; {result['machine']}; {versions}."
        ),
        "",
        *_checks(result["checks"]),
    ]
    for case in result["steps"]:
        setting = case["setting"]
        title = f"A training step of {setting['model']}, {setting['storage']}"
        lines += [
            f"{title}, {setting['rows']} × {setting['length']} tokens, {case['runs']} rounds.",
            "",
            *_rows(case),
        ]
    for case in result["decode"]:
        setting = case["setting"]
        text = (
            f"{setting['rows']} prompts of {setting['prompt']} tokens and {setting['tokens']}"
            " tokens to each"
        )
        lines += [
            f"{text}, {setting['model']}, {setting['adapters']} adapters, {case['runs']} rounds.",
            "",
            *_rows(case),
        ]
    if result["skipped"]:
        lines += [
            "Not measured:",
            "",
            *(f"- {row['part']}: {_cell(row['why'])}" for row in result["skipped"]),
            "",
        ]
    return lines


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with the number of checks that are right, and a table of the others."""
    right_count = sum(row["found"] == "right" for row in checks)
    lines = [f"{right_count} of {len(checks)} checks against float64 are right.", ""]
    failures = [row for row in checks if row["found"] != "right"]
    if failures:
        rows = [[row["check"], row["found"], _cell(row["text"])] for row in failures]
        lines += bench_page.table(["check", "", ""], rows)
    return lines


def _rows(case: Mapping[str, Any]) -> list[str]:
    """The table of one case."""
    rows = []
    for name, row in case["rows"].items():
        if "why" in row:
            rows.append([name, "–", _cell(row["why"]), "–", "–"])
            continue
        milliseconds = [1000 * row[key] for key in ("seconds", "seconds_low", "seconds_high")]
        peak = "–" if row["peak"] is None else f"{row['peak'] / 2**20:,.0f} MiB"
        rows.append([
            name, bench_page.ratio(row) if "ratio" in row else "–",
            "{:,.1f} ({:,.1f}–{:,.1f})".format(*milliseconds), f"{row['tokens']:,.0f}", peak,
        ])  # fmt: skip
    return bench_page.table(["", f"ratio to {case['floor']}", "ms", "tokens/s", "peak"], rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
