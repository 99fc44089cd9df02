"""The stress program sees what it is there to see; run whole it is `python -m tests.stress` (slow
here, and short)."""

from __future__ import annotations

import pytest
from tests.stress.__main__ import run
from tests.stress.findings import Findings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Found: the run of client-002 in the way.", "was told of ['client-002']"),
        ("Found: session-9:train:0. Expected: another.", "was told of ['client-002']"),
        ("Found: /data/stress/runs/3/state.", "inside"),
        ('Traceback (most recent call last): File "a.py", line 3', "inside"),
        ("Found: client-001's own run. Expected: one that goes on.", None),
    ],
)
def test_a_text_that_tells_of_others_is_a_finding(text, problem):
    findings = Findings("/data/stress")
    findings.register("session-9", "client-002")
    findings.check_text("client-001", text)
    assert [problem in line for line in findings.broken] == ([] if problem is None else [True])


@pytest.mark.parametrize(("status", "count"), [(200, 0), (404, 0), (500, 1), (502, 1), (503, 0)])
def test_a_status_that_helps_nobody_is_a_finding(status, count):
    findings = Findings("/data/stress")
    findings.check_status("client-001", "completions", status, "words")
    assert len(findings.broken) == count


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_half_a_minute_breaks_nothing(tmp_path):
    findings = run(seed=3, minutes=0.5, clients=6, kills=1, folder=tmp_path)
    assert findings.broken == []
    assert findings.counts["runs whose steps were counted"] > 0
