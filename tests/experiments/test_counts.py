"""The numbers that LoRA trains of published configurations, in closed form and as recorded."""

from __future__ import annotations

import json

import pytest
import torch
from experiments.counts import PRINTED, attach_adapters, is_printed, make_model
from experiments.study import RESULTS

#: 2 · layers · width · rank for each of q, v (k, o); SmolLM2's k and v are a third as high
EXACT = {
    "roberta-base": {"q, v, r = 8": 294_912},
    "roberta-large": {"q, v, r = 8": 786_432},
    "deberta-v2-xxlarge": {"q, v, r = 8": 2_359_296, "q, v, r = 16": 4_718_592},
    "gpt2-medium": {"q, v, r = 4": 393_216, "all": 354_823_168},
    "gpt2-large": {"q, v, r = 4": 737_280, "all": 774_030_080},
    "gpt3-175b": {
        "q, v, r = 1": 4_718_592,
        "q, v, r = 4": 18_874_368,
        "q, v, r = 8": 37_748_736,
        "q, v, r = 64": 301_989_888,
        "all": 174_604_259_328,
    },
    "smollm2-135m": {
        "q, v, r = 8": 460_800,
        "q, k, v, o, r = 8": 921_600,
        "all linear, r = 8": 2_442_240,
        "all": 134_515_008,
    },
}


def test_recorded_counts_are_exact():
    runs = json.loads((RESULTS / "counts.json").read_text())["runs"]
    recorded = {run["model"]: run["numbers"] for run in runs}
    assert recorded.keys() == EXACT.keys()
    for model, numbers in EXACT.items():
        assert {label: recorded[model][label] for label in numbers} == numbers, model
    for model, printed in PRINTED.items():
        assert printed.keys() <= recorded[model].keys()


@pytest.mark.parametrize(
    ("model", "weights", "rank"), [("roberta-base", "q, v", 8), ("smollm2-135m", "all linear", 8)]
)
def test_a_configuration_takes_no_memory_and_trains_the_number(model, weights, rank):
    handles = attach_adapters(make_model(model), weights, rank)
    count = sum(handle.summary().trainable for handle in handles)
    assert count == EXACT[model][f"{weights}, r = {rank}"]
    assert all(
        parameter.device == torch.device("meta")
        for handle in handles
        for parameter in handle.parameters()
    )


def test_a_printed_number_may_be_rounded_or_cut():
    assert is_printed(18_874_368, "18.8")
    assert is_printed(18_874_368, "18.9")
    assert not is_printed(393_216, "0.35")
    assert is_printed(174_604_259_328, "174,604.2")
    assert not is_printed(2_359_296, "4.7")
