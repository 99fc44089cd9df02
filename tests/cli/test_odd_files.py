"""Files that a reader gives up at, or takes for ever over: each is one clear error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.support.commands import refused
from tests.support.tiny import sums, write_rows, write_tiny

from veneer.errors import ConfigError, VeneerError
from veneer.formats import gguf_claims
from veneer.models import load_base
from veneer.train import data

Case = Callable[..., Any]
DEEP, DIGITS = "[" * 100_000, "1" * 5_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("targets: " + DEEP, "nested too deep"),
        ("rank: " + DIGITS, "cannot be read"),
        ("seed: 2024-13-45", "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep", "plan"])
def test_a_configuration(
    veneer: Case, tmp_path: Path, command: str, content: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    refused(veneer(command, tmp_path / "run.yaml"), words, "run.yaml")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ' + DEEP, "line 2.*nested too deep"),
        ("a.jsonl", '{"text": ' + DIGITS + "}", "line 1.*number that cannot be read"),
        ("a.json", DEEP, "nested too deep"),
        ("a.json", f"[{DIGITS}]", "number that cannot be read"),
        ("a.jsonl", '{"text": ' + "[" * 600 + "]" * 600 + "}", "line 1"),
        ("a.csv", "text,text\na,b\n", "the column 'text' 2 times"),
        ("a.tsv", "text\ttext\na\tb\n", "the column 'text' 2 times"),
        ("a.jsonl", json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]}]}),
         "a tool call that is not one"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"}], "tools": DEEP}), "tools that are none"),
    ],
)  # fmt: skip
def test_data(
    veneer: Case, base: Path, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    refused(
        veneer("train", "--base", base, "--data", tmp_path / name, "--output", tmp_path / "run"),
        words,
    )


def test_a_table_of_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(VeneerError, match=r"'text'|not a readable"):
        data.read(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", [DEEP, '{"a": ' + DIGITS + "}"])
def test_the_config_of_a_base(veneer: Case, tmp_path: Path, content: str) -> None:
    base = write_tiny(tmp_path / "base")
    rows = write_rows(tmp_path / "a.jsonl", sums(4))
    (base / "config.json").write_text(content)
    for line in (
        ("plan", "--base", base),
        ("plan", "--base", base / "config.json"),
        ("generate", base, "--prompt", "a"),
        ("train", "--base", base, "--data", rows, "--output", tmp_path / "run"),
    ):
        refused(veneer(*line), str(base))


def test_a_base_of_pickles_alone(
    veneer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    refused(
        veneer("generate", base, "--prompt", "a"), "pytorch_model.bin alone: pickles", "safetensors"
    )


def test_a_large_array_in_a_gguf_file_is_not_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("gguf")
    monkeypatch.setattr(library, "GGUFReader", lambda *_: pytest.fail("it was read"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count = 2 * 2**20
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    with pytest.raises(ConfigError, match=r"base\.gguf.*2,097,152 values"):
        load_base(file)
    small = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 200_000) + bytes(200_000)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + small)
    with pytest.raises(VeneerError, match="200,000 values"):
        gguf_claims.check(file)  # more than an adapter has
    gguf_claims.check(file, gguf_claims.MAX_MODEL_COUNT)
