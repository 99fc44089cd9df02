"""Folders of PEFT whose config was narrowed by hand: tensors that the config leaves out are none of
the adapter, as in PEFT, to every reader, and each of them says so."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import tensors, tiny
from tests.support.toys import error, flat

import veneer
from veneer.adapter_files import read
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError
from veneer.formats.peft_targets import TensorsLeftOut
from veneer.serve.vllm import reasons_against
from veneer.tools.compare import compare
from veneer.tools.convert import convert
from veneer.tools.merge_checkpoint import merge_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's own, and that its adapters carry no fingerprint

IDS = torch.arange(12).view(2, 6)
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2}
# : (the config that trained, the fields that were changed by hand, the modules that stay, by parts
# of their paths)
NARROWED = {
    "target_modules": (peft.LoraConfig(**LORA), {"target_modules": ["q_proj"]}, "q_proj"),
    "an expression": (peft.LoraConfig(**LORA), {"target_modules": r".*\.0\..*\.v_proj"}, "0.self_attn.v_proj"),
    "exclude_modules": (peft.LoraConfig(**LORA), {"exclude_modules": ["q_proj"]}, "v_proj"),
    "exclude_modules of all-linear": (
        peft.LoraConfig(**LORA),
        {"target_modules": "all-linear", "exclude_modules": r".*\.(k|o|gate|up|down|v)_proj"},
        "q_proj",
    ),
    "layers_to_transform": (peft.LoraConfig(**LORA), {"layers_to_transform": [1]}, "layers.1."),
    "LOHA": (peft.LoHaConfig(**LORA), {"target_modules": ["v_proj"]}, "v_proj"),
    "ADALORA": (
        peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=2, total_step=10),
        {"layers_to_transform": 0},
        "layers.0.",
    ),
    "VERA": (peft.VeraConfig(**LORA), {"target_modules": ["q_proj"]}, "q_proj"),
    "LN_TUNING": (
        peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        {"target_modules": ["input_layernorm"]},
        "input_layernorm",
    ),
}  # fmt: skip


def narrowed(folder, case="target_modules"):
    """(a folder of PEFT whose config was narrowed, the base's folder, a fresh base, the modules
    that stay)."""
    config, fields, kept = NARROWED[case]
    torch.manual_seed(0)
    model, base = tiny(folder / "base", torch.float32)
    theirs = peft.get_peft_model(model, copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder / "adapter", base, lambda: fresh(base), kept


def fresh(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def by_hand(folder, path, kept):
    """The same folder without the tensors of other modules: what the narrowed config means."""
    folder.mkdir()
    held = {
        key: value
        for key, value in load_file(path / "adapter_model.safetensors").items()
        if kept in key
    }
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    return folder


@pytest.mark.parametrize("case", NARROWED)
def test_a_narrowed_folder_loads_as_peft_computes_it(tmp_path, case):
    path, _, base, kept = narrowed(tmp_path, case)
    expected = flat(peft.PeftModel.from_pretrained(base(), path).eval()(IDS))
    model = base()
    plain = flat(model(IDS))
    with pytest.warns(
        TensorsLeftOut, match=r"tensors of \d+ modules that adapter_config\.json leaves out"
    ):
        handle = veneer.load(model, path)
    changed = {*handle.changes, *handle.layers}
    assert changed
    assert all(kept in f"{at}." for at in changed)
    assert error(flat(model(IDS)), expected) < 1e-5
    assert error(expected, plain) > 1e-4


def bank(path, base, folder, model):
    holder = model()
    adapters = veneer.Bank(holder, 2**24)
    adapters.add(path, "a")
    with adapters.rows(["a", "a"]):
        found = flat(holder(IDS))
    adapters.close()
    return found


def merged(path, base, folder, model):
    merge_checkpoint(base, [path], folder / "merged", model=model())
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors(folder / "merged").items())])


def composed(path, base, folder, model):
    veneer.compose([path], folder / "composed", weights=[1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", TensorsLeftOut)
        return changes_of(folder / "composed")


def converted(path, base, folder, model):
    convert(path, folder / "converted.safetensors", to="kohya", part="unet")
    return torch.cat(
        [
            tensor.flatten()
            for _, tensor in sorted(load_file(folder / "converted.safetensors").items())
        ]
    )


def changes_of(path):
    return torch.cat(
        [low.delta(torch.float64).flatten() for _, low in sorted(read(path).products.items())]
    )


READERS = {
    "bank": bank,
    "merge": merged,
    "compose": composed,
    "convert": converted,
    "read": lambda p, *_: changes_of(p),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_leaves_the_same_tensors_out(tmp_path, reader):
    path, base, model, kept = narrowed(tmp_path)
    (tmp_path / "narrow").mkdir()
    with pytest.warns(TensorsLeftOut):
        found = READERS[reader](path, base, tmp_path, model)
    plain = by_hand(tmp_path / "plain", path, kept)
    expected = READERS[reader](plain, base, tmp_path / "narrow", model)
    assert found.shape == expected.shape
    assert error(found, expected) < 1e-6


def test_a_comparison_is_of_what_the_config_means(tmp_path):
    path, _, _, kept = narrowed(tmp_path)
    with pytest.warns(TensorsLeftOut):
        assert compare(path, by_hand(tmp_path / "plain", path, kept)).identical


def test_verify_names_what_is_left_out_and_what_stays(tmp_path):
    path, base, _, _ = narrowed(tmp_path)
    report = verify(path, base=base)
    assert [f.message for f in report.findings if f.level == "error"] == []
    (text,) = [f.message for f in report.findings if "leaves out" in f.message]
    assert "v_proj" in text
    assert "q_proj" not in text
    assert any(
        f.level == "ok" and "2 changes" in f.message for f in report.findings if f.check == "layers"
    )


@pytest.mark.parametrize(
    ("case", "fields", "words"),
    [
        (
            "target_modules",
            {"target_modules": ["gate_proj"]},
            "no tensor of .* for what adapter_config.json means",
        ),
        (
            "VERA",
            {"target_modules": ["gate_proj"]},
            "no tensor of .* for what adapter_config.json means",
        ),
        (
            "LOHA",
            {"modules_to_save": ["v_proj"]},
            "low-rank changes of .*v_proj, which modules_to_save",
        ),
    ],
    ids=str,
)
def test_a_config_without_tensors_is_refused(tmp_path, case, fields, words):
    path, base, model, _ = narrowed(tmp_path, case)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    for reader in (lambda: veneer.load(model(), path), lambda: read(path)):
        with pytest.raises(AdapterError, match=f"{words}.*Do: "):
            reader()
    assert any(finding.level == "error" for finding in verify(path, base=base).findings)


def test_a_field_that_the_config_of_a_tuner_lacks_narrows_nothing(tmp_path):
    path, _, base, _ = narrowed(tmp_path, "VERA")
    file = path / "adapter_config.json"
    fields = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    expected, model = flat(peft.PeftModel.from_pretrained(base(), path).eval()(IDS)), base()
    veneer.load(model, path)
    assert error(flat(model(IDS)), expected) < 1e-5


class Mixes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.q, self.v, self.mixer = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), Mixer()

    def forward(self, x):
        return self.mixer(self.v(self.q(x)))


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return x @ self.mix


def test_a_config_that_names_a_parameter_of_any_module_is_narrowed_too(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], target_parameters=["mix"])
    theirs = peft.get_peft_model(Mixes(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q"]}))
    x, model = torch.randn(3, 8), Mixes()
    expected = flat(peft.PeftModel.from_pretrained(Mixes(), tmp_path).eval()(x))
    with pytest.warns(TensorsLeftOut, match=r"tensors of 1 modules .*\(v\)"):
        handle = veneer.load(model, tmp_path)
    assert {*handle.changes} == {"q.weight", "mixer.mix"}
    assert error(flat(model(x)), expected) < 1e-5


def test_vllm_which_applies_every_tensor_is_told(tmp_path):
    path, *_ = narrowed(tmp_path)
    (reason,) = [reason for reason in reasons_against(path) if "leaves out" in reason]
    assert "v_proj" in reason
