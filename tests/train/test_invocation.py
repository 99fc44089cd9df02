"""Runs with `invocation`: the adapter of a run acts from that text on, in the run and in its
folder."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tests.support.tiny import tiny_model, write_rows, write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.errors import ConfigError
from veneer.train.config import make_config
from veneer.train.loss import causal_loss
from veneer.train.run import fit

TEXT = "<c>"


@pytest.fixture
def make(tmp_path):
    base = write_tiny(tmp_path / "base")

    def run(output="run", invocation=TEXT, **changes):
        rows = [
            {"prompt": f"{letter} {number} {TEXT}", "completion": f" {letter}{letter}"}
            for number in range(3)
            for letter in "abcdefgh"
        ]
        rows.append({"prompt": "base", "completion": " alone"})
        fields = {
            "base": str(base), "output": str(tmp_path / output), "invocation": invocation,
            "data": str(write_rows(tmp_path / "rows.jsonl", rows)), "rank": 2, "max_steps": 12,
            "batch_size": 4, "learning_rate": 5e-2, "precision": "fp32",
        }  # fmt: skip
        return make_config({**fields, **changes})

    return run


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}])
def test_the_adapter_of_a_run_acts_from_the_text_on(make, changes):
    config = make(**changes)
    result = fit(config, quiet=True)
    assert result.losses[-1] < result.losses[0]
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert saved["alora_invocation_tokens"] == tokens
    model = AutoModelForCausalLM.from_pretrained(config.base).eval()
    with torch.no_grad():
        ids = torch.tensor([tokenizer(f"a 1 {TEXT} aa").input_ids])
        base = model(ids).logits
        handle = veneer.load(model, result.adapter)
        logits = model(ids).logits
    assert handle.config.invocation_tokens == tuple(tokens)
    start = ids[0].tolist().index(tokens[0])
    assert torch.equal(logits[:, :start], base[:, :start])
    assert (logits[:, start:] - base[:, start:]).abs().amax(-1).gt(1e-4).all()


def test_gradients_are_the_same_with_and_without_checkpointing(make):
    losses = [
        fit(make(str(on), activation_checkpointing=on, max_steps=3), quiet=True).losses
        for on in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_preferences_are_learned_from_the_text_on(make, tmp_path):
    rows = [
        {"prompt": f"{letter} {TEXT}", "chosen": f" {letter}", "rejected": " z"}
        for letter in "abcdefgh"
    ]
    data = str(write_rows(tmp_path / "pairs.jsonl", rows))
    result = fit(make(task="dpo", data=data, max_steps=8), quiet=True)
    assert result.losses[-1] < result.losses[0]
    assert result.handle.config.invocation_tokens


def test_runs_that_share_a_batch_are_invoked_each_by_its_own_tokens():
    base = tiny_model(num_hidden_layers=1).double().train()
    configs = {
        name: veneer.LoraConfig(rank=2, targets=["*_proj"], invocation_tokens=tokens, dropout=drops)
        for name, tokens, drops in (("a", [7, 8], 0.0), ("b", [9], 0.3), ("plain", (), 0.0))
    }
    rows = torch.tensor([[20, 7, 8, 21, 9, 22, 23], [9, 20, 21, 22, 23, 7, 8]])
    batches = {name: {"input_ids": rows, "labels": rows} for name in configs}
    separate = {}
    for seed, (name, config) in enumerate(configs.items()):
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        separate[name] = veneer.attach(model, config)
        causal_loss(model, batches[name]).backward()
    runs = veneer.train_many(base, configs, seeds={name: n for n, name in enumerate(configs)})
    runs.backward(batches, causal_loss)
    for name, run in runs.items():
        gradients = [
            torch.cat([parameter.grad.flatten() for parameter in adapter.parameters()])
            for adapter in (run, separate[name])
        ]
        assert torch.allclose(*gradients, rtol=1e-10, atol=1e-10), name
        assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": True}, "rows of one sequence.*found packing"),
        ({"task": "classify"}, "of the tasks sft.*found task classify"),
        ({"adapter": "elsewhere"}, "invocation beside adapter, which has its own"),
    ],
)
def test_what_has_no_invocation_is_refused(make, changes, words):
    with pytest.raises(ConfigError, match=words):
        make(**changes)


def test_a_text_that_no_row_holds_is_refused(make):
    with pytest.raises(ConfigError, match=r"invocation '<d>', tokens \[.*\], in none of the rows"):
        fit(make(invocation="<d>"), quiet=True)
    with pytest.raises(ConfigError, match="bias='all' with invocation_tokens"):
        fit(make(bias="all"), quiet=True)


def test_an_adapter_that_is_trained_further_needs_rows_with_its_invocation(make, tmp_path):
    first = fit(make(), quiet=True)
    rows = write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": " b"}] * 4)
    config = make_config(
        {
            "base": make().base,
            "data": str(rows),
            "output": str(tmp_path / "more"),
            "adapter": str(first.adapter),
            "max_steps": 1,
        }
    )
    with pytest.raises(ConfigError, match=r"invocation of the adapter, tokens .* in none"):
        fit(config, quiet=True)
