"""Each bad input gives one readable message on stderr and exit code 2, and never a traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.commands import refused
from tests.support.forked import LARGE, Program
from tests.support.tiny import sums, write_rows, write_tiny

from veneer.train import checkpoint

Case = Callable[..., Any]


# ----------------------------------------------------------------------------------------------
# data


BAD_DATA: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "empty": ("a.jsonl", "", ("is empty",)),
    "line 2 is not JSON": (
        "a.jsonl",
        '{"text": "a"}\nhello\n',
        (r"a\.jsonl, line 2 is not JSON", "hello"),
    ),
    "wrong columns": (
        "a.jsonl",
        '{"instruction": "a", "output": "b"}\n',
        ("'instruction', 'output'", "--prompt-column instruction"),
    ),
    "wrong type": ("a.jsonl", '{"text": 5}\n', ("line 1", "holds a number: 5")),
    "too long": (
        "a.jsonl",
        '{"text": "' + "x" * 400 + '"}\n',
        ("longer than the context of 256 tokens", "line 1, has 401", "--too-long truncate"),
    ),
    "not Parquet": ("a.parquet", "no", ("not a readable Parquet",)),
    "unknown ending": ("a.pdf", "no", ("Cannot tell the format", r"\.jsonl")),
}


@pytest.mark.parametrize(("name", "content", "parts"), BAD_DATA.values(), ids=BAD_DATA.keys())
@pytest.mark.parametrize("command", ["train", "eval"])
def test_bad_data(
    veneer: Case,
    base: Path,
    tmp_path: Path,
    command: str,
    name: str,
    content: str,
    parts: tuple[str, ...],
) -> None:
    file = tmp_path / name
    file.write_text(content)
    if command == "train":
        found = veneer("train", "--base", base, "--data", file, "--output", tmp_path / "out")
    else:
        found = veneer("eval", base, file)
    refused(found, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("too_long", ["error", "truncate"])
def test_a_length_beyond_the_context(
    veneer: Case, base: Path, data: Path, tmp_path: Path, too_long: str
) -> None:
    words = "max_length 257. Expected: at most 256, the context of"
    flags = ("--max-length", 257, "--too-long", too_long)
    refused(veneer("eval", base, data, *flags), words)
    refused(
        veneer("train", "--base", base, "--data", data, "--output", tmp_path / "o", *flags), words
    )


def test_missing_data(veneer: Case, base: Path, tmp_path: Path, data: Path) -> None:
    refused(
        veneer(
            "train",
            "--base",
            base,
            "--data",
            data.with_name("sum.jsonl"),
            "--output",
            tmp_path / "o",
        ),
        "does not exist",
        "sums.jsonl",
    )
    refused(
        veneer("train", "--base", base, "--data", "no/such-data", "--output", tmp_path / "o"),
        "No data at 'no/such-data'",
        "hub",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_data(veneer: Case, base: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", sums(3))
    file.chmod(0)
    refused(
        veneer("train", "--base", base, "--data", file, "--output", tmp_path / "o"),
        "Cannot read",
        "permission",
    )
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)


def test_unreadable_data_as_the_system_reports_it(
    veneer: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for root, whom no permission stops."""
    file, real = write_rows(tmp_path / "a.jsonl", sums(3)), Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    refused(
        veneer("train", "--base", base, "--data", file, "--output", tmp_path / "o"),
        "Cannot read",
        "Permission denied",
    )


# ----------------------------------------------------------------------------------------------
# configuration


BAD_YAML: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown field": (
        "learnin_rate: 1\n",
        ("unknown field 'learnin_rate'; did you mean 'learning_rate'",),
    ),
    "wrong type": ("rank: many\n", ("rank: found 'many'", "integer")),
    "out of range": ("dropout: 1.5\n", ("dropout: found 1.5", "less than 1")),
    "unknown choice": ("schedule: cosin\n", ("schedule: found 'cosin'", "'cosine'")),
    "not YAML": ("rank: 4\ntargets: [a\nbase: x\n", (r"c\.yaml, line 3, column 5 is not YAML",)),
    "a list": ("- rank\n", ("holds a list; expected `name: value`",)),
    "empty": ("", ("base is missing", "data is missing", "output is missing")),
    "contradiction": (
        "base: a\ndata: b\noutput: c\nearly_stopping: 2\n",
        ("early_stopping needs something to evaluate on",),
    ),
}


@pytest.mark.parametrize(("content", "parts"), BAD_YAML.values(), ids=BAD_YAML.keys())
def test_bad_configuration(
    veneer: Case, tmp_path: Path, content: str, parts: tuple[str, ...]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    refused(veneer("train", file), *parts)


def test_all_problems_of_a_configuration_are_in_one_message(veneer: Case, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rnk: 1\ndropout: 2\n")
    refused(veneer("train", file), "'rnk'; did you mean 'rank'", "dropout", "base is missing")


def test_missing_configuration_and_unknown_flags(veneer: Case, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    refused(veneer("train", tmp_path / "rnu.yaml"), "does not exist", "run.yaml")
    refused(veneer("train", "--rnak", 3), "No such option: --rnak", "--rank")
    refused(veneer("trian"), "No such command 'trian'", "'train'")
    refused(veneer("train", "--rank", "x"), "Invalid value for '--rank'")


def test_targets_that_match_nothing_name_those_that_exist(
    veneer: Case, base: Path, data: Path, tmp_path: Path
) -> None:
    found = veneer(
        "train",
        "--base",
        base,
        "--data",
        data,
        "--output",
        tmp_path / "o",
        "--targets",
        "query_proj",
    )
    refused(found, "query_proj", "q_proj")
    assert not (tmp_path / "o").exists()
    found = veneer(
        "train", "--base", base, "--data", data, "--output", tmp_path / "p", "--rank", 64
    )
    refused(found, "64", "32|16")


def test_an_unknown_variant_names_those_that_exist(
    veneer: Case, base: Path, data: Path, tmp_path: Path
) -> None:
    found = veneer(
        "train", "--base", base, "--data", data, "--output", tmp_path / "o", "--variant", "lorra"
    )
    refused(found, "lorra", "lora")


def test_names_that_transformers_does_not_know(
    veneer: Case, base: Path, data: Path, tmp_path: Path
) -> None:
    rest = ("--base", base, "--data", data, "--output", tmp_path / "o")
    refused(
        veneer("train", *rest, "--optimiser", "adamw_torhc"), "adamw_torhc", "nearest: 'adamw_torch"
    )
    refused(veneer("train", *rest, "--trackers", "tensorbord"), "tensorbord", "'tensorboard'")
    assert not (tmp_path / "o").exists()


def test_a_loss_that_is_not_a_number(veneer: Case, base: Path, data: Path, tmp_path: Path) -> None:
    rest = ("--base", base, "--data", data, "--output", tmp_path / "o", "--max-grad-norm", 0)
    refused(
        veneer("train", *rest, "--learning-rate", 1e30, "--warmup", 0, "--epochs", 9),
        "is (nan|inf)",
        "learning rate",
    )


def test_brackets_in_a_path_are_not_markup(veneer: Case, tmp_path: Path) -> None:
    refused(veneer("train", tmp_path / "[red]x[/].yaml"), r"\[red\]x\[/\]\.yaml does not exist")


# ---------------------------------------------------------------------------------------------- the
# base


def test_bad_bases(veneer: Case, base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    rest = ("--data", data, "--output", tmp_path / "o")
    refused(veneer("train", "--base", tmp_path / "none", *rest), "no base model at", "config.json")
    refused(veneer("train", "--base", "no-such/model", *rest), "no-such/model", "hub")
    refused(
        veneer("train", "--base", "package:no_such_package", *rest),
        "no Python package 'no_such_package'",
    )
    refused(veneer("train", "--base", data, *rest), "is a file ending in '.jsonl'")
    refused(
        veneer("train", "--base", data.parent, *rest), "is not a model folder; it holds sums.jsonl"
    )
    refused(
        veneer("train", "--base", adapter, *rest),
        "is an adapter, not a base model",
        "veneer inspect",
    )
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF no")
    refused(veneer("train", "--base", fake, *rest), "cannot be read as GGUF")
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:1000])
    refused(veneer("generate", broken, "-p", "x"), "cannot be loaded", "complete")
    (broken / "model.safetensors").unlink()
    refused(veneer("generate", broken, "-p", "x"), "cannot be loaded", "model.safetensors")
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    refused(veneer("train", "--base", broken, *rest), "no usable tokenizer")


# ---------------------------------------------------------------------------------------------- the
# adapter


def test_an_adapter_of_another_base(
    veneer: Case, data: Path, adapter: Path, tmp_path: Path
) -> None:
    other = write_tiny(tmp_path / "other", seed=1)
    refused(veneer("merge", other, adapter, tmp_path / "m"), "another base", "q_proj|layers")
    refused(veneer("generate", other, "--adapter", adapter, "-p", "x"), "another base")
    refused(veneer("eval", other, data, "--adapter", adapter), "another base")
    assert not (tmp_path / "m").exists()
    wider = write_tiny(tmp_path / "wider", hidden_size=48, num_attention_heads=4)
    refused(veneer("merge", wider, adapter, tmp_path / "m"), "does not fit|shape")


def damage(folder: Path, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "one byte":
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "config":
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 64'))
    elif how == "missing":
        file.unlink()
    elif how == "not JSON":
        (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize("how", ["truncated", "one byte", "config", "missing", "not JSON"])
def test_a_damaged_adapter(
    veneer: Case, base: Path, adapter: Path, tmp_path: Path, how: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    damage(copy, how)
    for found in (
        veneer("inspect", copy),
        veneer("merge", base, copy, tmp_path / "m"),
        veneer("generate", base, "--adapter", copy, "-p", "x"),
    ):
        refused(found, "copy")
    assert not (tmp_path / "m").exists()


def test_not_an_adapter(veneer: Case, base: Path, tmp_path: Path) -> None:
    refused(veneer("inspect", tmp_path / "none"), "none")
    refused(veneer("inspect", base), "adapter_config.json")


# ---------------------------------------------------------------------------------------------- the
# output


def test_an_existing_output(
    veneer: Case, base: Path, data: Path, adapter: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    train = ("train", "--base", base, "--data", data, "--output")
    refused(veneer("merge", base, adapter, full), "exists")
    refused(veneer(*train, full), "not empty and holds no Veneer run")
    refused(veneer(*train, full, "--overwrite"), "not empty and holds no Veneer run")
    refused(veneer(*train, full / "thesis.txt"), "is a file")
    refused(veneer(*train, adapter.parent), "finished run", "--overwrite")
    assert (full / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_no_disk_space_while_training_keeps_the_last_checkpoint(
    veneer: Case, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    real, calls = torch.save, []

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(file)
        if len(calls) > 4:  # 3 files a checkpoint: in the middle of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(content, file, *args, **kwargs)

    train = (
        "train",
        "--base",
        base,
        "--data",
        data,
        "--output",
        tmp_path / "o",
        "--save-every",
        2,
        "--rank",
        2,
        "--batch-size",
        4,
    )
    monkeypatch.setattr(torch, "save", full)
    refused(veneer(*train), "no space left", "checkpoint-2", "start the same command again")
    newest = checkpoint.newest(tmp_path / "o")
    assert newest is not None
    assert newest[1] == 2
    assert not list((tmp_path / "o").glob(".*"))
    monkeypatch.setattr(torch, "save", real)
    assert veneer(*train).code == 0


LIMITED = """
import resource, signal, sys
from veneer.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(run({arguments}))
"""


@pytest.mark.parametrize("command", ["train", "merge"])
def test_a_write_that_the_system_refuses(
    base: Path, data: Path, adapter: Path, tmp_path: Path, command: str
) -> None:
    """A real one: no file may grow beyond a few kilobytes, so the weights cannot be written."""
    target = tmp_path / "o"
    arguments = (
        ["merge", base, adapter, target]
        if command == "merge"
        else ["train", "--base", base, "--data", data, "--output", target]
    )
    code = LIMITED.format(limit=20_000, arguments=[*map(str, arguments)])
    found = Program(code, *LARGE)
    assert found.wait() == 2, found.said
    assert "Traceback" not in found.said
    assert re.search(r"Error: Found: .*\bDo: ", re.sub(r"\s+", " ", found.said))
    assert not (target.exists() and command == "merge")
    assert checkpoint.newest(target) is None
    assert not list(tmp_path.glob(".*"))


def test_bad_prompts(
    veneer: Case, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    refused(veneer("generate", base), "no prompt")
    refused(veneer("generate", base, "-p", ""), "empty prompt")
    refused(veneer("generate", base, "-p", "x" * 200), "at most 256 together")
    refused(veneer("generate", base, "-p", "x", "--both"), "--both without --adapter")


def test_debug_shows_the_traceback(
    veneer: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.errors import ConfigError

    monkeypatch.setenv("VENEER_DEBUG", "1")
    with pytest.raises(ConfigError):
        veneer("train", tmp_path / "none.yaml")


# ----------------------------------------------------------------------------------------------
# compose and diff


def test_bad_compositions(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    refused(veneer("compose", out, f"{adapter}=x"), "'x' in .*a number after '='")
    refused(veneer("compose", out, f"{adapter}=nan"), "a number after '='")
    refused(veneer("compose", out, tmp_path / "none=1"), "no folder .*none")
    refused(veneer("compose", out, adapter, "--layer", "q_proj"), "PATTERN=FACTOR")
    refused(veneer("compose", out, adapter, "--layer", "q_prj=2"), "nearest: 'q_proj'")
    refused(veneer("compose", out, adapter, "--method", "ties"), r"density=None.*density=0\.2")
    refused(veneer("compose", out, adapter, "--method", "mean"), "mean")
    refused(
        veneer("compose", out, adapter, "--rank", 2, "--energy", 0.5), "both a rank and an energy"
    )
    refused(veneer("compose", out), "ADAPTER")
    refused(veneer("compose", adapter, adapter), "exists")
    refused(veneer("diff", adapter, base), "adapter_config.json")
    assert not out.exists()
