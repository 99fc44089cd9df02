"""`veneer serve --config`: its options from a file, of which a flag wins; what it refuses by name."""

from __future__ import annotations

import pytest
from tests.support.commands import refused

from veneer.cli import serve


@pytest.fixture
def started(monkeypatch):
    """What the command would serve, instead of serving it: its settings, where it listens, and the
    rest."""
    calls = []
    monkeypatch.setattr(serve, "_serve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    return calls


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "serve.yaml").write_text(text)
        return tmp_path / "serve.yaml"

    return write


FILE = """
base: owner/base
adapters: adapters
host: 127.0.0.2
port: 8001
memory: 2GiB
pin: [french, german]
rows: 4
timeout: 90
grace: 2.5
dtype: bf16
allow_open: true
log_format: json
cors: [https://app.example.com, "http://localhost:3000"]
docs: true
otlp-endpoint: http://localhost:4318
name:
"""


def test_a_file_says_what_flags_say(veneer, started, written):
    run = veneer("serve", "--config", written(FILE))
    assert run.code == 0, run.err
    settings, listener, *_ = started.pop()
    flags = (
        "--adapters adapters --host 127.0.0.2 --port 8001 --memory 2GiB --pin french --pin german --rows 4 --timeout 90"
        " --grace 2.5 --dtype bf16 --allow-open --log-format json --cors https://app.example.com"
        " --cors http://localhost:3000 --docs --otlp-endpoint http://localhost:4318"
    )
    assert veneer("serve", "owner/base", *flags.split()).code == 0
    assert started.pop()[:2] == (settings, listener)
    assert (settings.base, settings.name, settings.memory) == (
        "owner/base",
        "owner/base",
        2 * 2**30,
    )
    assert settings.cors == ("https://app.example.com", "http://localhost:3000")
    assert (listener.port, listener.grace, listener.log_format) == (8001, 2.5, "json")


def test_a_flag_wins_over_the_file_wherever_it_stands(veneer, started, written):
    path = written(FILE)
    for flags in (["--rows", 9, "--pin", "mine"], ["--pin=mine", "--rows=9"]):
        assert veneer("serve", *flags, "other", "--config", path).code == 0
        assert veneer("serve", "--config", path, "other", *flags).code == 0
    for settings, *_ in started:
        assert (settings.base, settings.rows, settings.pin) == ("other", 9, ("mine",))
        assert settings.timeout == 90
    assert len(started) == 4


def test_one_value_of_a_list_needs_no_list(veneer, started, written):
    assert veneer("serve", "--config", written("base: b\npin: french\ncors: '*'\n")).code == 0
    ((settings, *_),) = started
    assert (settings.pin, settings.cors) == (("french",), ("*",))


def test_the_environment_names_a_collector(veneer, started, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert veneer("serve", "base").code == 0
    assert veneer("serve", "base", "--otlp-endpoint", "http://other:4318").code == 0
    assert [settings.otlp_endpoint for settings, *_ in started] == [
        "http://collector:4318",
        "http://other:4318",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: b\nrwos: 4\n", ["'rwos'", "nearest: 'rows'"]),
        ("base: b\nallow-opn: true\n", ["'allow-opn'", "nearest: 'allow_open'"]),
        ("base: b\nconfig: other.yaml\n", ["the option 'config'"]),
        ("base: b\ndtype: bf16\nprecision: fp32\n", ["another spelling of it"]),
        ("base: b\nrows: [1, 2]\n", ["a list for 'rows'"]),
        ("base: b\nmemory: {a: 1}\nnothing: 1\n", ["a table for 'memory'", "'nothing'"]),
        ("base: b\nrows: many\n", ["--rows"]),
        ("base: b\nrows: 0\n", ["--rows"]),
        ("base: b\nlog_format: xml\n", ["--log-format", "json"]),
        ("base: b\ncors: app.example.com\n", ["--cors 'app.example.com'"]),
        ("rows: 4\n", ["Missing argument 'base'"]),
        ("base: [", ["not YAML"]),
        ("- base", ["expected `name: value` lines"]),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(veneer, started, written, text, words):
    run = veneer("serve", "--config", written(text))
    assert run.code == 2, run
    said = " ".join(run.err.replace("│", " ").split())
    for word in words:
        assert word in said
    assert started == []


def test_no_file_and_two_files(veneer, started, tmp_path, written):
    refused(veneer("serve", "--config", tmp_path / "none.yaml"), "does not exist")
    path = written("base: b")
    refused(veneer("serve", "--config", path, "--config", path), "--config twice")
    assert started == []


def test_what_vllm_has_no_place_for(veneer):
    for flags in (["--docs"], ["--gap", "1s"], ["--device", "cpu"], ["--train", "runs"]):
        refused(veneer("serve", "base", "--engine", "vllm", *flags), f"{flags[0]} with --engine")
