"""The reports in docs/upstream: each snippet runs alone and still prints the wrong number.

Where a library was mended, its report fails here. Then delete the file and record the table again
(``python -m benchmarks.torture --record``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from scripts import torture_page

FILES = sorted(torture_page.UPSTREAM.glob("*.md"))
DISTRIBUTIONS = {"PEFT": "peft", "LyCORIS": "lycoris-lora", "loralib": "loralib"}


def read_block(page: Path, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return block


def parse_lines(output: str) -> dict[str, str]:
    """What a snippet prints behind "got:" and "right:"."""
    return dict(re.findall(r"^(got|right): (.*)$", output, re.MULTILINE))


def is_close(first: str, second: str) -> bool:
    """Equal, or numbers that differ by a twentieth at most."""
    try:
        return float(first) == pytest.approx(float(second), rel=0.05, abs=0.02)
    except ValueError:
        return first == second


@pytest.mark.slow
@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_the_snippet_prints_the_wrong_number(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", read_block(page, "python")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    printed, expected = parse_lines(done.stdout), parse_lines(read_block(page, "text"))
    assert not is_close(printed["got"], printed["right"]), f"mended? Delete {page.name}"
    assert is_close(printed["got"], expected["got"])
    assert is_close(printed["right"], expected["right"])


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.stem)
def test_a_report_is_ready_to_be_sent(page):
    text = page.read_text()
    expected = parse_lines(read_block(page, "text"))
    assert not is_close(expected["got"], expected["right"])
    assert "veneer" not in read_block(page, "python").lower()
    for heading in ("Expected", "Actual", "Cause", "Suggested fix"):
        assert f"**{heading}.** " in text
    (library, number) = re.search(r"^(\w+) ([\d.]+), torch", text, re.MULTILINE).groups()
    assert version(DISTRIBUTIONS[library]) == number, "run the snippet with this version"


def test_every_fault_has_a_report_or_a_reason():
    """Also: no report is of a case that a library gets right by now."""
    record = json.loads(torture_page.RECORD.read_text())
    faults = {
        (library, name)
        for name, case in record["cases"].items()
        for library, result in case["results"].items()
        if result["outcome"] in torture_page.FAULTS
    }
    reports, reasons = {*torture_page.upstream_reports()}, {*torture_page.NOT_REPORTED}
    assert not reports & reasons
    assert reports | reasons == faults
