"""Bytes on a device, beside those of the model."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tests.support.banks import save_adapters
from tests.support.emulated_device import G0, bytes_more
from tests.support.tiny import tiny_model
from tests.support.toys import randomise
from torch import nn

import veneer

SIDE = 256
BYTES = SIDE * SIDE * 2


@pytest.fixture
def deep():
    """Layers of one size in 16 bits, and the handle of their adapter."""
    model = (
        nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(12)])
        .to(torch.bfloat16)
        .to(G0)
    )
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets="all"))
    randomise(handle, 0.001)
    return model, handle


def test_a_check_takes_a_few_layers(deep):
    model, handle = deep
    x = torch.randn(2, SIDE, device=G0, dtype=torch.bfloat16)
    randomise(handle, 0.3)
    with bytes_more() as more:
        veneer.check(model, x)
    adapter = sum(p.nbytes for p in handle.parameters())
    assert more.peak - 4 * adapter < 6 * BYTES


@pytest.mark.parametrize("rounding", ["nearest", "faithful"])
def test_a_merge_takes_a_few_layers(deep, rounding):
    _, handle = deep
    with bytes_more() as more:
        handle.merge(rounding=rounding, keep=False)
    assert more.peak < 4 * BYTES
    assert more.kept == 0


def test_layers_keep_their_input_once_for_backward():
    model = tiny_model().to(torch.bfloat16).to(G0)
    veneer.attach(model, veneer.LoraConfig(rank=4, targets="attention"))
    attention = model.model.layers[0].self_attn
    x = torch.randn(4, 64, 32, device=G0, dtype=torch.bfloat16).requires_grad_() * 1
    with bytes_more() as more:
        outputs = [attention._modules[name](x) for name in ("q_proj", "k_proj", "v_proj")]
    assert more.kept <= sum(y.nbytes for y in outputs) + x.nbytes


def test_dropout_keeps_no_mask():
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False)).to(torch.bfloat16).to(G0)
    veneer.attach(model, veneer.LoraConfig(rank=4, targets="all", dropout=0.1))
    x = torch.randn(64, SIDE, device=G0, dtype=torch.bfloat16).requires_grad_() * 1
    with bytes_more() as more:
        y = model(x)
    assert more.kept <= y.nbytes + x.nbytes + 8 * 1024  # what was not dropped, and factors


def test_a_bank_holds_an_adapter_once(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    names = "0123"
    save_adapters(model, tmp_path, *names, config=veneer.LoraConfig(rank=3))
    bank, ids = veneer.Bank(model.to(G0)), torch.randint(3, 250, (4, 9)).to(G0)
    with bytes_more() as more:
        for name in names:
            bank.add(tmp_path / name, name)
    in_memory = more.kept
    with bytes_more() as more, torch.no_grad():
        for tokens in (9, 1):
            with bank.rows([*"012", None]):
                model(input_ids=ids[:, :tokens], use_cache=False)
    assert more.kept < 0.3 * in_memory
    bank.close()


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_dora_on_4_bits_takes_no_more_than_lora():
    import bitsandbytes as bnb

    peaks, keeps = {}, {}
    for variant in ("lora", "dora"):
        layers = []
        for _ in range(4):
            layer = bnb.nn.Linear4bit(
                SIDE, SIDE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                torch.randn(SIDE, SIDE), requires_grad=False, quant_type="nf4"
            )
            layers.append(layer)
        with bytes_more() as more:
            model = nn.Sequential(*layers).to(G0)
            handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets="all", variant=variant))
            randomise(handle, 0.1)
            x = torch.randn(4, SIDE, device=G0, dtype=torch.bfloat16, requires_grad=True)
            with bytes_more() as ahead:
                y = model(x * 1)
            y.sum().backward()
        peaks[variant], keeps[variant] = more.peak, ahead.kept
    assert keeps["dora"] < SIDE * SIDE  # no dense weight, of which there are four
    assert peaks["dora"] < 1.1 * peaks["lora"]
