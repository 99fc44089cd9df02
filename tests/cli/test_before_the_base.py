"""What can be known without the base is judged before a GGUF file is converted, and before a weight
is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.commands import refused
from tests.support.tiny import sums, write_rows

Case = Callable[..., Any]
RUN = "train --base {base} --output {folder}/run"
GRPO = f"{RUN} --task grpo --data {{folder}}/prompts.jsonl"
#: a command line, and what of it is wrong
WRONG = {
    "data": (f"{RUN} --data {{folder}}/missing.jsonl", "missing.jsonl does not exist"),
    "data of another kind": (f"{RUN} --data {{folder}}/rows.docx", "rows.docx"),
    "eval data": (f"{RUN} --data {{data}} --eval-data {{folder}}/missing.jsonl", "missing.jsonl does not exist"),
    "columns": (f"{RUN} --data {{folder}}/questions.jsonl", "the columns 'question'"),
    "columns of dpo": (f"{RUN} --task dpo --data {{data}}", "no column 'chosen'"),
    "images": (f"{RUN} --task classify --data {{folder}}/missing.jsonl", "missing.jsonl does not exist"),
    "adapter to train": (f"{RUN} --data {{data}} --adapter {{folder}}/missing", "missing"),
    "output": ("train --base {base} --output {data} --data {data}", "is a file"),
    "reward": (f"{GRPO} --reward {{folder}}/missing.py:f", "missing.py:f"),
    "reward's name": (f"{GRPO} --reward {{folder}}/judge.py:g", "no function 'g'"),
    "dry run": (f"{RUN} --data {{folder}}/missing.jsonl --dry-run", "missing.jsonl does not exist"),
    "find rate": (f"{RUN} --data {{folder}}/missing.jsonl --find-rate", "missing.jsonl does not exist"),
    "sweep": ("sweep {folder}/sweep.yaml", "missing.jsonl does not exist"),
    "advise": ("advise {folder}/missing.jsonl {base}", "missing.jsonl does not exist"),
    "eval": ("eval {base} {folder}/missing.jsonl", "missing.jsonl does not exist"),
    "eval of a task": ("eval {base} {folder}/missing.jsonl --task dpo", "missing.jsonl does not exist"),
    "eval's adapter": ("eval {base} {data} --adapter {folder}/missing", "missing"),
    "generate": ("generate {base} --prompt a --adapter {folder}/missing", "missing"),
    "chat": ("chat {base} --adapter {folder}/missing", "missing"),
    "merge": ("merge {base} {folder}/missing {folder}/merged", "missing"),
    "merge's output": ("merge {base} {adapter} {folder}", "exists"),
    "convert": ("convert {folder}/missing {folder}/converted --to dense --base {base}", "missing"),
    "convert's output": ("convert {adapter} {folder} --to peft --base {base}", "exists"),
    "compose": ("compose {folder}/sum {folder}/missing --base {base}", "missing"),
    "compose's output": ("compose {folder} {adapter} --base {base}", "exists"),
    "extract": ("extract {base} {folder}/missing {folder}/extracted --rank 1", "missing"),
    "extract's output": ("extract {base} {base} {folder} --rank 1", "exists"),
    "report": ("inspect {adapter} --report {folder}/r.html --base {base} --data {folder}/missing.jsonl",
               "missing.jsonl does not exist"),
    "make demo": (f"{RUN} --data .demo/train.jsonl", "make demo"),
    "verify": ("verify {folder}/missing {base}", "missing"),
    "serve": ("serve {base} --port 0 --adapters {folder}/missing", "missing"),
    "serve's pin": ("serve {base} --port 0 --adapters {folder}/adapters --pin missing", "missing"),
    "serve's keys": ("serve {base} --port 0 --keys {folder}/missing.toml", "missing.toml"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_it_is_told_before_the_base_is_touched(
    veneer: Case, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF")
    converted: list[Path] = []

    def convert(file: Path) -> Path:
        converted.append(file)
        raise RuntimeError("the base was converted")

    monkeypatch.setattr("veneer.models.locate.convert_gguf", convert)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "rows.docx").write_text("")
    (tmp_path / "judge.py").write_text("def f(**columns): return [0.0]")
    data = write_rows(tmp_path / "rows.jsonl", sums(4))
    write_rows(tmp_path / "questions.jsonl", [{"question": "a", "answer": "b"}])
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    (tmp_path / "sweep.yaml").write_text(
        f"base: {base}\ndata: {tmp_path}/missing.jsonl\noutput: {tmp_path}/sweep\neval_fraction: 0.2\n"
        "sweep: {axes: {rank: [1, 2]}}\n"
    )
    command, words = WRONG[name]
    paths = {"base": base, "adapter": adapter, "data": data, "folder": tmp_path}
    found = veneer(*command.format(**paths).split())
    assert converted == []
    if name == "verify":  # whose report is no error
        assert found.code == 2
        assert "Traceback" not in found.err
    else:
        refused(found, words)
