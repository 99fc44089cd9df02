"""The commands on folders of PEFT's other tuners: the hardest of them, VeRA, whose files do not
tell their shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.commands import refused


@pytest.fixture(scope="module")
def vera(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote, and the weight of one layer that PEFT merged."""
    import warnings

    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(
            plain, peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"])
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vera_lambda" in name:
                    parameter += torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(1)
                    )
        path = tmp_path_factory.mktemp("vera") / "adapter"
        model.save_pretrained(path)
        merged = model.merge_and_unload()
    return path, merged.get_parameter("model.layers.1.mlp.down_proj.weight").detach()


@pytest.mark.filterwarnings("ignore::veneer.adapter_files.UnverifiedAdapter")
def test_the_commands_take_a_folder_of_vera(veneer, base, vera, tmp_path):
    path, expected = vera
    run = veneer("inspect", path, "--json")
    assert run.code == 0, run.err
    said = json.loads(run.out)
    assert said["config"]["variant"] == "vera"
    assert said["targets"] == {"down_proj": 2, "q_proj": 2}
    assert veneer("inspect", path).code == 0
    assert veneer("verify", path).code == 0
    run = veneer("verify", path, base)
    assert run.code == 0, run.out + run.err
    assert "by name and shape alone" in run.out
    run = veneer("merge", base, path, tmp_path / "merged")
    assert run.code == 0, run.err
    merged = load_file(tmp_path / "merged" / "model.safetensors")[
        "model.layers.1.mlp.down_proj.weight"
    ]
    torch.testing.assert_close(merged.float(), expected.float(), atol=1e-6, rtol=1e-5)
    run = veneer("convert", path, tmp_path / "plain", "--to", "peft")
    assert run.code == 2
    assert "how many inputs each layer has" in run.err
    run = veneer("convert", path, tmp_path / "plain", "--to", "peft", "--base", base)
    assert run.code == 0, run.err
    generate = ("generate", base, "--prompt", "1+1=", "--max-new-tokens", 4, "--adapter")
    first = veneer(*generate, path)
    assert first.code == 0, first.err
    assert veneer(*generate, tmp_path / "plain").out == first.out


@pytest.mark.filterwarnings("ignore")
def test_the_commands_take_a_folder_that_only_its_base_converts(veneer, base, tmp_path):
    """PiSSA without conversion: PEFT takes its start off the base's weights. A merge, which has no
    model with weights, says what to do instead."""
    import peft
    import transformers

    import veneer as library

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(fresh(), config).save_pretrained(tmp_path / "pissa")
    generate = ("generate", base, "--prompt", "1+1=", "--max-new-tokens", 4, "--adapter")
    run = veneer(*generate, tmp_path / "pissa")
    assert run.code == 0, run.err
    run = veneer("merge", base, tmp_path / "pissa", tmp_path / "merged")
    refused(run, "init_lora_weights='pissa'", r"veneer\.load")
    library.load(fresh(), tmp_path / "pissa").save(tmp_path / "saved")
    run = veneer("merge", base, tmp_path / "saved", tmp_path / "merged")
    assert run.code == 0, run.err
