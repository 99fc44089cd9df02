"""Code beside a base or an adapter: it never runs, whatever stdin answers, unless a base is trusted
by name."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.commands import refused
from tests.support.remote_code import name_own_code
from tests.support.tiny import tiny_tokenizer, write_rows, write_tiny

import veneer as package
from veneer import LoraConfig, attach, models
from veneer.adapter_files.verify import verify
from veneer.errors import ConfigError, VeneerError
from veneer.models.load import meta_base
from veneer.models.meta import countable_model
from veneer.serve.access import Keyring
from veneer.serve.settings import Settings
from veneer.serve.start import start

Case = Callable[..., Any]
BOTH = ("config.json", "tokenizer_config.json")
FOLDERS = {
    "config": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "both": BOTH,
    "processors": (*BOTH, "preprocessor_config.json", "processor_config.json"),
}
RUN = "train --base {base} --output {folder}/run --max-steps 1 --data "
COMMANDS = {
    "train": RUN + "{data}",
    "train fsdp": RUN + "{data} --parallel fsdp",
    "dry run": RUN + "{data} --dry-run",
    "find rate": RUN + "{data} --find-rate",
    "classify": RUN + "{folder}/label.jsonl --task classify",
    "images": RUN + "{folder}/image.jsonl --task classify",
    "seq2seq": RUN + "{data} --task seq2seq",
    "embed": RUN + "{folder}/anchor.jsonl --task embed",
    "sweep": "sweep {folder}/sweep.yaml",
    "advise": "advise {data} {base}",
    "plan": "plan --base {base}",
    "eval": "eval {base} {data} --exact 1 --max-new-tokens 1",
    "generate": "generate {base} --prompt a --max-new-tokens 1",
    "chat": "chat {base} --max-new-tokens 1",
    "merge": "merge {base} {adapter} {folder}/merged",
    "convert": "convert {adapter} {folder}/converted --to dense --base {base}",
    "extract": "extract {base} {base} {folder}/extracted --rank 1",
    "report": "inspect {adapter} --report {folder}/report.html --base {base} --data {data}",
    "verify": "verify {adapter} {base}",
}
ROWS = [
    {"text": "a", "label": 0}, {"image": [[[0.0] * 3] * 4] * 4, "label": 1}, {"anchor": "a", "positive": "b"},
]  # fmt: skip
SWEEP = """
base: {base}
data: {data}
output: {folder}/sweep
max_steps: 2
eval_fraction: 0.2
sweep: {{axes: {{rank: [1, 2]}}}}
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that the code writes; whoever asks whether it may is answered with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 500))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return tmp_path / "it-ran"


@pytest.fixture(params=FOLDERS)
def own_code(request: pytest.FixtureRequest, tmp_path: Path, mark: Path) -> Path:
    """A base beside which lies code."""
    return name_own_code(write_tiny(tmp_path / "base"), mark, FOLDERS[request.param])


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_what_lies_beside_a_base(
    veneer: Case, own_code: Path, mark: Path, data: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    paths = {"base": own_code, "adapter": adapter, "data": data, "folder": tmp_path}
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(**paths))
    for row in ROWS:
        write_rows(tmp_path / f"{next(iter(row)).replace('text', 'label')}.jsonl", [row] * 4)
    found = veneer(*COMMANDS[name].format(**paths).split())
    assert not mark.exists(), found
    assert "Traceback" not in found.err


CALLS: dict[str, Callable[[Path], Any]] = {
    **{
        auto: lambda base, auto=auto: models.load_head(base, auto)
        for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    },
    "load_base": models.load_base,
    "spread": lambda base: models.load_base(base, spread=lambda model: None),
    "quantize": lambda base: models.load_base(base, quantize="nf4"),
    "load_tokenizer": models.load_tokenizer,
    "load_encoder": models.load_encoder,
    "is_causal": models.is_causal,
    "context_length": models.context_length,
    "stored_dtype": models.stored_dtype,
    "meta_base": meta_base,
    "meta_model": models.meta_model,
    "countable_model": countable_model,
    "serve": lambda base: start(Settings(str(base), "base"), Keyring()).close(),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_loads_a_base_runs_what_lies_beside_it(
    own_code: Path, mark: Path, name: str
) -> None:
    with contextlib.suppress(VeneerError):
        CALLS[name](own_code)
    assert not mark.exists()


@pytest.fixture
def with_tokens(tmp_path: Path, mark: Path) -> tuple[Path, Path]:
    """(a plain base, an adapter that trains a token, whose tokenizer names code beside it)."""
    base, folder = write_tiny(tmp_path / "plain", tie_word_embeddings=False), tmp_path / "adapter"
    model, tokenizer = models.load_base(base, precision="fp32").model, tiny_tokenizer()
    handle = attach(
        model, LoraConfig(rank=2, targets=["q_proj"], trainable_tokens={"embed_tokens": [5]})
    )
    handle.save(folder)
    tokenizer.save_pretrained(folder)
    name_own_code(folder, mark, ("tokenizer_config.json",))
    return base, folder


BESIDE_AN_ADAPTER = {
    "generate": "generate {base} --adapter {adapter} --prompt a --max-new-tokens 1",
    "trusted base": "generate {base} --adapter {adapter} --prompt a --max-new-tokens 1 --trust-remote-code",
    "chat": "chat {base} --adapter {adapter} --adapter {other}",
    "eval": "eval {base} {data} --adapter {adapter}",
    "train": "train --base {base} --data {data} --adapter {adapter} --output {folder}/run --max-steps 1",
    "merge": "merge {base} {adapter} {folder}/merged",
    "convert": "convert {adapter} {folder}/converted --to peft --base {base}",
    "report": "inspect {adapter} --report {folder}/report.html --base {base} --data {data}",
    "compose": "compose {folder}/sum {adapter} {other} --base {base}",
    "verify": "verify {adapter} {base}",
    "inspect": "inspect {adapter}",
}


@pytest.mark.parametrize("name", BESIDE_AN_ADAPTER)
def test_no_command_runs_what_lies_beside_an_adapter(
    veneer: Case, with_tokens: tuple[Path, Path], mark: Path, data: Path, tmp_path: Path, name: str
) -> None:
    base, adapter = with_tokens
    other = shutil.copytree(adapter, tmp_path / "other")
    paths = {"base": base, "adapter": adapter, "other": other, "data": data, "folder": tmp_path}
    found = veneer(*BESIDE_AN_ADAPTER[name].format(**paths).split())
    assert not mark.exists(), found
    assert "Traceback" not in found.err


def test_a_trusted_base_runs_its_own_code_and_another_does_not(
    veneer: Case, mark: Path, tmp_path: Path
) -> None:
    base = name_own_code(write_tiny(tmp_path / "base"), mark, BOTH)
    options = ("--prompt", "a", "--max-new-tokens", 1)
    text = refused(
        veneer("generate", base, *options), "running code beside it", "--trust-remote-code"
    )
    assert str(base) in text
    shutil.rmtree(base / "custom_generate")  # whose `generate` writes nothing
    found = veneer("generate", base, *options, "--trust-remote-code")
    assert found.code == 0, found.err
    assert mark.exists()
    with (
        models.trust_remote_code(tmp_path / "another"),
        pytest.raises(ConfigError, match="running code beside it"),
    ):
        models.load_tokenizer(base)


def test_a_run_trusts_its_base_by_its_configuration(
    veneer: Case, data: Path, mark: Path, tmp_path: Path
) -> None:
    base = name_own_code(write_tiny(tmp_path / "base"), mark, BOTH)
    run = ("train", "--base", base, "--data", data, "--output", tmp_path / "run", "--max-steps", 1)
    refused(veneer(*run), "running code beside it")
    assert not (tmp_path / "run").exists()
    found = veneer(*run, "--trust-remote-code")
    assert found.code == 0, found.err
    assert mark.exists()


def test_verify_names_the_code_of_a_tokenizer(with_tokens: tuple[Path, Path]) -> None:
    _, adapter = with_tokens
    report = verify(adapter)
    said = [
        finding.message for finding in report.warnings if "tokenizer_config.json" in finding.message
    ]
    assert len(said) == 1
    assert "own_code.OwnTokenizer" in said[0]
    assert any("own_code.py is a program" in finding.message for finding in report.warnings)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_in_a_config_is_not_fetched(
    veneer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    base = write_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, field: "strangers/kernel"}))
    asked = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.is_kernels_available", lambda *_: True
    )
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: asked.append(a)
    )
    options = ("generate", base, "--prompt", "a", "--max-new-tokens", 1)
    refused(veneer(*options), "strangers/kernel", "--attention sdpa")
    assert veneer(*options, "--attention", "sdpa").code == 0
    for load in (meta_base, models.meta_model, countable_model):
        assert isinstance(load(base), torch.nn.Module)
    models.load_base(base, spread=lambda model: None, attention="sdpa")
    assert asked == []


def test_every_call_that_could_run_code_says_whether_it_may() -> None:
    """Of transformers: ``from_pretrained`` and ``from_config``, which ask the terminal where
    nothing is said."""
    silent = []
    for file in sorted(Path(package.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "from_pretrained",
                "from_config",
            ):
                given = {
                    ast.unparse(word.value).partition("(")[0]
                    for word in node.keywords
                    if word.arg is None
                }
                if not given & {"code_arguments", "code_options", "code", "options"}:
                    silent.append(f"{file.name}:{node.lineno}")
    assert silent == []
