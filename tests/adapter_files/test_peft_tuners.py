"""Folders of PEFT's other tuners: what PEFT computes with them is what Veneer does, merged and trained on too."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.support.toys import error
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.errors import AdapterError
from veneer.formats.peft_tuners import TUNERS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Net(nn.Module):
    """Linear layers of several shapes, a transposed one, convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(6, 14, 3, padding=1)
        self.c2 = nn.Conv2d(2, 14, (3, 5), stride=2, dilation=2, padding=4)
        self.q = nn.Linear(14, 12)
        self.gpt = Conv1D(10, 12)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):  # [N, 6, L]
        x = F.relu(self.c1(x)).mT
        x = self.q(x) + self.c2(x.mT.unflatten(1, (2, 7))).mean((1, 2, 3))[:, None, None]
        return self.head(self.norm(F.relu(self.gpt(x))))


X = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=3, total_step=10, target_modules=["q", "gpt", "c2"]),
    "adalora without alpha": lambda: peft.AdaLoraConfig(init_r=3, lora_alpha=0, total_step=10, target_modules=["q"]),
    "adalora, more than the weight has": lambda: peft.AdaLoraConfig(init_r=12, total_step=10, target_modules=["q", "head"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["q", "head"]),
    "loha, flat kernels": lambda: peft.LoHaConfig(r=3, alpha=4, target_modules=["c1", "c2", "q"], rank_dropout=0.5),
    "loha, tucker": lambda: peft.LoHaConfig(r=2, target_modules=["c1", "c2"], use_effective_conv2d=True),
    "loha, more than the weight has": lambda: peft.LoHaConfig(r=16, target_modules=["q", "head"], modules_to_save=["norm"]),
    "loha, patterns": lambda: peft.LoHaConfig(r=2, target_modules=["q", "head"], rank_pattern={"head": 3}, alpha_pattern={"^q": 5}),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["q", "head"]),
    "lokr, whole": lambda: peft.LoKrConfig(r=8, target_modules=["q", "head", "c1", "c2"]),
    "lokr, both": lambda: peft.LoKrConfig(r=1, target_modules=["q", "head"], decompose_both=True, decompose_factor=4),
    "lokr, flat kernels": lambda: peft.LoKrConfig(r=1, target_modules=["c1", "c2", "q"], rank_dropout_scale=True),
    "lokr, tucker": lambda: peft.LoKrConfig(r=2, target_modules=["c1", "c2"], use_effective_conv2d=True),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["q", "gpt"]),
    "vera, drawn": lambda: peft.VeraConfig(r=5, target_modules=["q", "gpt", "head"], save_projection=False, bias="vera_only"),
    "vera, more than the weight has": lambda: peft.VeraConfig(r=20, target_modules=["q", "head"], modules_to_save=["norm"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}
#: parts of the names of what trains
TRAINED = ("lora_", "hada_", "lokr_", "vera_lambda", "ln_tuning", "modules_to_save")
every = pytest.mark.parametrize("case", CONFIGS)


def net(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().eval().to(dtype)


def theirs(config, path, dtype=torch.float32):
    """A model of PEFT's with noise in all that trains, and its folder."""
    model = peft.get_peft_model(net(dtype), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in TRAINED) and "ranknum" not in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") and parameter.requires_grad:
                parameter += 0.1
    model.save_pretrained(path)
    return model


@every
def test_a_folder_computes_what_peft_computes(tmp_path, case):
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()(X)
    assert error(again, expected) < 1e-6
    model = net()
    handle = veneer.load(model, tmp_path / "adapter")
    assert error(model(X), expected) < 1e-5
    assert error(net()(X), expected) > 1e-3
    handle.merge()
    assert error(model(X), expected) < 1e-5


@every
def test_it_trains_on_and_is_saved_whole(tmp_path, case):
    """What is trained on is the variant (LoHa's four factors, VeRA's two vectors, …) on PEFT's own start."""
    expected = theirs(CONFIGS[case](), tmp_path / "adapter")(X)
    model = net()
    handle = veneer.load(model, tmp_path / "adapter", trainable=True)
    assert handle.config.variant == case.split(",")[0].split()[0].replace("ln_tuning", "lora")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
    before = F.mse_loss(model(X), torch.zeros(()).expand(2, 9, 3))
    before.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    optimizer.step()
    after = model(X)
    assert F.mse_loss(after, torch.zeros(()).expand(2, 9, 3)) < before
    ours = handle.save(tmp_path / "ours")
    again = net()
    veneer.load(again, ours)
    assert error(again(X), after) < 1e-6
    assert error(after, expected) > 1e-5
    if "c2" not in handle.layers:  # with a dilation, which PEFT's plain LoRA leaves out
        assert error(peft.PeftModel.from_pretrained(net(), ours).eval()(X), after) < 1e-5
