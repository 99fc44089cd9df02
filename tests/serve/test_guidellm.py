"""guidellm's benchmark against the server: it counts each token that it asks for, as an event of its
own. `GUIDELLM=/path/to/python pytest tests/serve/test_guidellm.py`, a Python that has guidellm.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from tests.support.api_server import listening
from tests.support.service import make_adapter, open_service
from tests.support.tiny import write_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("GUIDELLM"), reason="GUIDELLM names no Python that has guidellm"
    ),
]

REQUESTS, TOKENS = 6, 12


@pytest.mark.parametrize(
    ("route", "framing"), [("/v1/chat/completions", 18), ("/v1/completions", 0)]
)
def test_guidellm_counts_every_token(tmp_path, route, framing):
    base = write_tiny(tmp_path / "base")
    make_adapter(tmp_path / "adapters" / "own", 3, rank=3, targets="all-linear")
    report = tmp_path / "report.json"
    with listening(open_service(base, tmp_path / "adapters")) as (url, _):
        command = [
            *(os.environ["GUIDELLM"], "-m", "guidellm", "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={url},model=own,request_format={route}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=hf_auto,model={base}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=20,output_tokens={TOKENS}"),
            *("--output", f"kind=json,path={report}"),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"]["successful"] == REQUESTS
    assert metrics["request_totals"]["errored"] == 0
    prompts = metrics["prompt_token_count"]["successful"]
    assert prompts["min"] >= 20 + framing  # those of the template too, if it is a chat
    assert framing or prompts["max"] < 30
    counts = metrics["output_token_count"]["successful"]
    assert (counts["min"], counts["max"]) == (TOKENS, TOKENS)
    assert metrics["request_streaming_iterations_count"]["successful"]["min"] >= TOKENS
