"""Folders of PEFT with what its options allow and Veneer's own do not: each computes as PEFT computes it, or says why
not."""

from __future__ import annotations

import peft
import pytest
import torch
from tests.support.toys import error, flat
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, and that its adapters carry no fingerprint


class Narrow(nn.Module):
    """Layers with few outputs or few inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 6), nn.Conv1d(6, 3, 3, padding=1)
        self.gpt, self.wide = Conv1D(8, 3), nn.Linear(8, 5)

    def forward(self, ids):
        return self.wide(torch.tanh(self.gpt(self.conv(self.embed(ids).mT).mT.contiguous())))


IDS = torch.arange(14).view(2, 7) % 11


def narrow():
    torch.manual_seed(3)
    return Narrow().eval()


def by_peft(folder, model, size=0.3, **fields):
    """(PEFT's output for IDS, the folder): of an adapter of PEFT with noise in each of its numbers, as PEFT loads it."""
    torch.manual_seed(5)
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **fields})).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * size)
    theirs.save_pretrained(folder)
    model = theirs.unload()
    model.load_state_dict(bare)
    return peft.PeftModel.from_pretrained(model, folder).eval(), folder


def agrees(theirs, path, fresh, *args, atol=1e-5):
    """Assert that Veneer computes what PEFT does from PEFT's folder, merges it, and saves it for both."""
    model = fresh()
    base, expected = flat(model(*args)), flat(theirs(*args))
    assert error(expected, base) > 1e-3
    handle = veneer.load(model, path, trainable=True)
    assert error(flat(model(*args)), expected) < atol
    ours = handle.save(path.parent / "ours")
    again = fresh()
    veneer.load(again, ours)
    assert error(flat(again(*args)), expected) < atol
    assert error(flat(peft.PeftModel.from_pretrained(fresh(), ours).eval()(*args)), expected) < atol
    handle.merge()
    assert error(flat(model(*args)), expected) < atol
    handle.unmerge()
    return handle


TARGETS = ["embed", "conv", "gpt", "wide"]


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True, "target_modules": ["conv", "wide"]}])
def test_a_rank_that_no_weight_has_is_compacted_to_one_that_it_has(tmp_path, fields):
    fields = {"target_modules": TARGETS, **fields}
    theirs, path = by_peft(tmp_path / "theirs", narrow(), r=12, lora_alpha=5, **fields)
    handle = agrees(theirs, path, narrow, IDS)
    assert {at: change.rank for at, change in handle.changes.items()} == {
        f"{at}.weight": rank for at, rank in zip(TARGETS, [6, 3, 3, 5], strict=True) if at in fields["target_modules"]
    }


def test_a_compacted_change_that_is_zero_can_still_be_trained(tmp_path):
    """PEFT's start: B of zeros, which a factorisation may not make an A of zeros too."""
    peft.get_peft_model(narrow(), peft.LoraConfig(r=12, target_modules=["wide"])).save_pretrained(tmp_path)
    model = narrow()
    (change,) = veneer.load(model, tmp_path, trainable=True).changes.values()
    model(IDS).square().sum().backward()
    assert change.B.grad.norm() > 1e-3


@pytest.mark.parametrize("name", ["wide", "conv", "embed", "gpt"])
def test_dora_with_rslora_has_the_scale_of_one_and_the_gain_of_the_other(tmp_path, name):
    fields = {"target_modules": [name], "use_dora": True, "use_rslora": True}
    theirs, path = by_peft(tmp_path / "theirs", narrow(), **fields)
    handle = agrees(theirs, path, narrow, IDS)
    assert VARIANTS[handle.config.variant].peft == {"use_dora": True, "use_rslora": True}
