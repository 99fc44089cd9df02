"""Tensors of one tuner of PEFT under the config of another: no reader takes them for a change, and
each names them."""

from __future__ import annotations

import copy
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import tiny

import veneer
from veneer.adapter_files import read
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError
from veneer.tools.compare import compare
from veneer.tools.convert import convert
from veneer.tools.merge_checkpoint import merge_checkpoint
from veneer.tools.report import examine

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

NAMED = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "LORA": peft.LoraConfig(**NAMED, r=2),
    "ADALORA": peft.AdaLoraConfig(**NAMED, init_r=2, total_step=10),
    "LOHA": peft.LoHaConfig(**NAMED, r=2),
    "LOKR": peft.LoKrConfig(**NAMED, r=2),
    "VERA": peft.VeraConfig(**NAMED, r=2),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(
        token_indices=[1, 2], target_modules=["embed_tokens"]
    ),
}
MIXED = [(config, tensors) for config in CONFIGS for tensors in CONFIGS if config != tensors]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each tuner, and that of their base."""
    folder = tmp_path_factory.mktemp("tuners")
    for type_, config in CONFIGS.items():
        model, _ = tiny(folder / "base", torch.float32)
        theirs = peft.get_peft_model(model, copy.deepcopy(config))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad and "ranknum" not in name:
                    parameter.add_(0.1)
        theirs.save_pretrained(folder / type_)
    return folder


def mixed(folders, path, config, tensors):
    shutil.copytree(folders / tensors, path)
    shutil.copy(folders / config / "adapter_config.json", path)
    return path


def model_of(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.mark.parametrize(("config", "tensors"), MIXED)
def test_tensors_of_another_tuner_are_named(folders, tmp_path, config, tensors):
    path = mixed(folders, tmp_path / "adapter", config, tensors)
    with pytest.raises(
        AdapterError, match=r"Found: .*(tensor|of another tuner).*Expected: .*Do: "
    ) as refusal:
        read(path)
    model = model_of(folders / "base")
    with pytest.raises(AdapterError, match=r"Found: .*Do: ") as same:
        veneer.load(model, path)
    assert str(same.value) == str(refusal.value)
    assert not any(hasattr(module, "veneer") for module in model.modules())
    assert any(finding.level == "error" for finding in verify(path).findings)


def bank(path, folders, out):
    holder = model_of(folders / "base")
    adapters = veneer.Bank(holder)
    try:
        adapters.add(path, "a")
        with adapters.rows(["a"]):
            holder(torch.arange(5)[None])
    finally:
        adapters.close()


READERS = {
    "read": lambda path, folders, out: read(path),
    "load": lambda path, folders, out: veneer.load(model_of(folders / "base"), path),
    "bank": bank,
    "compose": lambda path, folders, out: veneer.compose(
        [path, folders / "LORA"], out, weights=[0.5, 0.5]
    ),
    "compare": lambda path, folders, out: compare(folders / "LORA", path),
    "merge": lambda path, folders, out: merge_checkpoint(folders / "base", [path], out),
    "convert": lambda path, folders, out: convert(
        path, out / "adapter.safetensors", to="kohya", part="unet"
    ),
    "report": lambda path, folders, out: examine(path),
}


def third_axis(tensor):
    return tensor[None].clone()


#: what was done to a folder of LOKR
DAMAGED = {
    "LoRA's tensors": lambda folders, path: mixed(folders, path, "LOKR", "LORA"),
    "w1 of three axes": lambda folders, path: reshaped(folders, path, "lokr_w1"),
    "w2_a of three axes": lambda folders, path: reshaped(folders, path, "lokr_w2_a"),
}


def reshaped(folders, path, suffix):
    shutil.copytree(folders / "LOKR", path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any(key.endswith(suffix) for key in tensors)
    save_file(
        {key: third_axis(t) if key.endswith(suffix) else t for key, t in tensors.items()}, file
    )
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGED)
def test_every_reader_gives_the_same_error(folders, tmp_path, damage, reader):
    path = DAMAGED[damage](folders, tmp_path / "adapter")
    with pytest.raises(AdapterError) as expected:
        read(path)
    with pytest.raises(AdapterError) as refusal:
        READERS[reader](path, folders, tmp_path / "out")
    assert str(refusal.value) == str(expected.value)
    assert not (tmp_path / "out").exists()


#: of each tuner, the suffixes of its tensors
SUFFIXES = {
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
}


@pytest.mark.parametrize("axes", ["one more", "one less"])
@pytest.mark.parametrize(
    ("type_", "suffix"), [(t, suffix) for t, own in SUFFIXES.items() for suffix in own]
)
def test_a_tensor_of_other_axes_is_refused(folders, tmp_path, type_, suffix, axes):
    path = tmp_path / "adapter"
    shutil.copytree(folders / type_, path)
    file = path / "adapter_model.safetensors"
    change = third_axis if axes == "one more" else lambda tensor: tensor.select(0, 0).clone()
    tensors = load_file(file)
    ends = [key for key in tensors if key.endswith(f".{suffix}")]
    assert ends
    save_file({**tensors, ends[0]: change(tensors[ends[0]])}, file)
    base = model_of(folders / "base")
    with pytest.raises(AdapterError, match=rf"{suffix} \(.*Expected: .*Do: "):
        veneer.load(base, path)
