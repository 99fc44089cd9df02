"""`veneer convert` writes what it says, tells what is left out, and refuses with one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.commands import refused

import veneer as library
from veneer.adapter_files.folder import read
from veneer.tools.convert import FORMATS, detect

Case = Callable[..., Any]


def test_to_peft_and_back(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    found = veneer("convert", adapter, tmp_path / "plain", "--to", "peft")
    assert found.code == 0, found.err
    for part in (
        "veneer to peft",
        "14 layers, rank 4",
        "left out: the record",
        f"written to {tmp_path / 'plain'}",
    ):
        assert part in found.out
    back = veneer(
        "convert", tmp_path / "plain", tmp_path / "ours", "--to", "veneer", "--base", base
    )
    assert back.code == 0, back.err
    one, other = read(adapter), read(tmp_path / "ours")
    assert one.metadata["base"]["weights"] == other.metadata["base"]["weights"]
    first, second = (
        load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "ours")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_json(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    facts = json.loads(
        veneer("convert", adapter, tmp_path / "a", "--to", "gguf", "--base", base, "--json").out
    )
    assert facts["from"] == "veneer"
    assert facts["to"] == "gguf"
    assert set(facts["ranks"].values()) == {4}
    assert detect(tmp_path / "a") == "gguf"


def test_dense_and_a_rank(veneer: Case, base: Path, adapter: Path, tmp_path: Path) -> None:
    assert veneer("convert", adapter, tmp_path / "d", "--to", "dense", "--dtype", "bf16").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "d").values()} == {torch.bfloat16}
    again = veneer(
        "convert", tmp_path / "d", tmp_path / "p", "--to", "peft", "--base", base, "--rank", 2
    )
    assert "rank 2" in again.out
    assert "relative error" in again.out


def test_what_cannot_be_is_one_message(
    veneer: Case, adapter: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(veneer("convert", adapter, out, "--to", "gguf"), "no base", "give the base")
    refused(veneer("convert", adapter, out, "--to", "kohya"), "give part")
    refused(veneer("convert", adapter, out, "--to", "onnx"), "format 'onnx'", "one of veneer, peft")
    refused(veneer("convert", tmp_path / "nothing", out, "--to", "peft"), "nothing at")
    refused(
        veneer("convert", adapter, out, "--to", "gguf", "--base", tmp_path / "no"),
        "no base model at",
    )
    out.mkdir()
    (out / "mine").write_text("mine")
    refused(veneer("convert", adapter, out, "--to", "peft"), "which exists")
    assert (out / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.bin", "folder"])
def test_pickles_are_refused(name: str, veneer: Case, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "model.bin", tmp_path / "folder" / "adapter_model.bin"):
        torch.save({"a": torch.ones(1)}, path)
    refused(veneer("convert", tmp_path / name, tmp_path / "out", "--to", "peft"), "a pickle")


def test_the_help_names_every_format(veneer: Case) -> None:
    text = veneer("convert", "--help").out
    for format_ in FORMATS:
        assert format_.name in text


def test_what_a_common_reader_drops_is_a_warning(veneer: Case, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    handle = library.attach(model, library.LoraConfig(rank=1, targets="all", variant="dora"))
    torch.nn.init.ones_(handle.changes["0.weight"].B)
    path = handle.save(tmp_path / "dora")
    found = veneer("convert", path, tmp_path / "a.safetensors", "--to", "kohya", "--part", "unet")
    assert found.code == 0
    assert found.err.startswith("Warning. Found: a kohya file of which diffusers")
    assert "magnitudes of DoRA" in found.err
    found = veneer(
        "convert", path, tmp_path / "b.safetensors", "--to", "kohya", "--part", "unet", "--json"
    )
    assert "magnitudes of DoRA" in json.loads(found.out)["warnings"][0]
    found = veneer(
        "convert", path, tmp_path / "c.safetensors", "--to", "diffusers", "--part", "unet", "--json"
    )
    assert (json.loads(found.out)["warnings"], found.err) == ([], "")
