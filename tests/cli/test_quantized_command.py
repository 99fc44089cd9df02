"""The commands that load a base load it in 4 or 8 bits, and on the devices that they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny import sums, write_rows, write_tiny

pytest.importorskip("bitsandbytes")
Case = Callable[..., Any]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("wide") / "wide", hidden_size=64, intermediate_size=128
    )


def test_train_evaluate_generate_and_merge(veneer: Case, wide: Path, tmp_path: Path) -> None:
    data, output = write_rows(tmp_path / "sums.jsonl", sums(24)), tmp_path / "run"
    words = "--optimizer", "adamw_8bit", "--attn", "eager", "--device", "cpu", "--max-steps", 12
    found = veneer("train", "--base", wide, "--data", data, "--output", output, "--quantize", "nf4",
                   "--learning-rate", 1e-2, *words)  # fmt: skip
    assert found.code == 0, found.err
    assert "linear layers in nf4" in found.err
    assert "one weight unpacked" in found.err
    assert f"generate {wide} --quantize nf4 --adapter" in found.err
    config = json.loads((output / "run.json").read_text())["config"]
    assert (config["optimiser"], config["attention"], config["quantize"]) == (
        "adamw_8bit",
        "eager",
        "nf4",
    )

    measured = {}
    for how in ("nf4", "int8", None):
        flags = [] if how is None else ["--quantize", how]
        found = veneer(
            "eval",
            wide,
            data,
            "--adapter",
            output / "adapter",
            "--json",
            "--device-map",
            "cpu",
            *flags,
        )
        assert found.code == 0, found.err
        measured[how] = json.loads(found.out)
        assert measured[how]["adapter"]["loss"] < measured[how]["base"]["loss"] - 0.1
    assert measured["nf4"]["base"]["loss"] != measured[None]["base"]["loss"]

    found = veneer("generate", wide, "--adapter", output / "adapter", "--quantize", "nf4", "--prompt", "1 + 1 =",
                   "--max-new-tokens", 2)  # fmt: skip
    assert found.code == 0, found.err
    assert "trained on it in nf4 (bitsandbytes)" in veneer("inspect", output / "adapter").out
    found = veneer("merge", wide, output / "adapter", tmp_path / "merged", "--verify")
    assert found.code == 0, found.err
    assert "was trained on its base in nf4" in found.out + found.err


@pytest.mark.parametrize("command", ["eval", "generate", "train"])
def test_a_device_and_a_map_are_one_too_many(
    veneer: Case, wide: Path, tmp_path: Path, command: str
) -> None:
    data = write_rows(tmp_path / "sums.jsonl", sums(4))
    words = {
        "eval": (wide, data),
        "generate": (wide, "--prompt", "x"),
        "train": ("--base", wide, "--data", data, "--output", tmp_path / "run"),
    }[command]
    found = veneer(command, *words, "--device", "cpu", "--device-map", "auto")
    assert found.code == 2
    assert "device_map" in found.err
    assert "one" in found.err


def test_serve_loads_a_base_in_4_bits(wide: Path) -> None:
    from veneer.serve.access import Keyring
    from veneer.serve.settings import Settings
    from veneer.serve.start import start

    service = start(
        Settings(str(wide), "it", rows=2, length=64, queue=4, precision="fp32", quantize="nf4"),
        Keyring(),
    )
    try:
        assert type(service.bank.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    finally:
        service.close()


def test_serve_with_vllm_refuses_what_it_cannot_pass_on(veneer: Case, wide: Path) -> None:
    found = veneer("serve", wide, "--engine", "vllm", "--quantize", "nf4")
    assert found.code == 2
    assert "--quantize with --engine vllm" in found.err
