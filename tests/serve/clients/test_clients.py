"""Clients of other people, unmodified, against a server whose model calls tools. Each runs in an
environment of its own: a folder of $CLIENTS that has its name. `make test-clients CLIENTS=FOLDER`
makes them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.support.api_server import serving
from tests.support.tool_models import TEMPLATE, scripted, weather_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
ENVIRONMENTS = Path(os.environ.get("CLIENTS", "/nonexistent"))
CALLED = {"city": "Bern", "days": 2}  # the scripted model's own choice
FORCED = {"city": "Bern", "days": 1}  # the smallest value of the schema
TOLD = "It is sunny in Bern for 2 days."


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("clients") / "dir") as served:
        served.service.tokenizer.chat_template = TEMPLATE
        served.service.length = 8192
        decode = served.service.tokenizer.decode
        served.engine._write = scripted(served.engine, weather_script, decode)
        yield served.url


def run(name: str, url: str, folder: Path) -> dict:
    """The last line that a client's script prints."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"$CLIENTS has no environment {name} (make test-clients)")
    environment = {
        **os.environ, "PYTHONPATH": "", "HOME": str(folder), "LLM_USER_PATH": str(folder / "llm"),
        "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "ANTHROPIC_API_KEY": "none",
    }  # fmt: skip
    done = subprocess.run(
        [str(python), str(HERE / f"{name.replace('-', '_')}_client.py"), url], cwd=folder,
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_openai(url, tmp_path):
    assert run("openai", url, tmp_path) == {
        "call": ["get_weather", CALLED], "told": "It is sunny.", "streamed": ["tool_calls", "Bern"],
        "kinds": ["tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"],
        "required": FORCED, "named": FORCED, "parsed": FORCED,
        "response call": ["get_weather", CALLED], "response": "It is sunny.",
        "response parsed": FORCED,
        "response stream": ["response.created", "response.completed", "get_weather"],
    }  # fmt: skip


def test_litellm(url, tmp_path):
    assert run("litellm", url, tmp_path) == {
        "call": ["get_weather", CALLED], "told": "It is sunny.", "streamed": ["tool_calls", CALLED],
        "required": FORCED, "parsed": FORCED,
    }  # fmt: skip


def test_langchain(url, tmp_path):
    each = {
        "call": ["get_weather", CALLED], "told": TOLD, "streamed": CALLED, "any": FORCED,
        "structured": FORCED,
    }  # fmt: skip
    assert run("langchain", url, tmp_path) == {
        "chat": each, "responses": each, "json_schema": FORCED, "function_calling": FORCED,
    }  # fmt: skip


def test_instructor(url, tmp_path):
    assert run("instructor", url, tmp_path) == {"created": FORCED, "partial": FORCED}


def test_pydantic_ai(url, tmp_path):
    each = {"told": TOLD, "streamed": TOLD, "output": FORCED, "native": FORCED, "both": FORCED}
    assert run("pydantic-ai", url, tmp_path) == {"chat": each, "responses": each}


def test_llm(url, tmp_path):
    assert run("llm", url, tmp_path) == {
        "told": f"Let me see. {TOLD}", "plain": "Hello.", "schema": FORCED, "whole": FORCED,
    }  # fmt: skip


def test_anthropic(url, tmp_path):
    read = run("anthropic", url, tmp_path)
    kinds = read.pop("kinds")
    assert {"message_start", "content_block_start", "content_block_delta", "message_stop"} <= {
        *kinds
    }
    assert read == {
        "call": ["tool_use", "get_weather", CALLED], "told": "It is sunny.",
        "streamed": ["tool_use", CALLED, True], "any": FORCED, "tool": FORCED, "counted": True,
        "refused": "not_found_error",
    }  # fmt: skip
