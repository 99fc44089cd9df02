"""Adapters made of several: equal to float64 arithmetic on the dense changes, for every layer, variant and rank."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import veneer
from models import IDS, Shared, Stack, TinyLM
from toys import error, example, flat, randomise
from veneer.artefact import read
from veneer.compose import METHODS, compose
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.layers import LAYERS
from veneer.lowrank import LowRank

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
#: relative, in the Frobenius norm: what storing the factors in float32 leaves
BOUND = 3e-6


def trained(model, path, size=0.3, **config):
    """A saved adapter with changes that are not zero."""
    handle = veneer.attach(model, veneer.LoraConfig(**{"rank": 2, "targets": "all", **config}))
    randomise(handle, size)
    handle.save(path)
    handle.detach()
    return path


def merged(model, path):
    """The weights of ``model`` with an adapter folded in, in float64."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if getattr(module, "max_norm", None) is not None:
            module.max_norm = None  # forward scales rows after the change; a sum is one of changes
    veneer.load(twin, path)
    veneer.merge(twin)
    veneer.detach(twin, keep_merged=True)
    return twin.state_dict()


def check(model, out, parts, weights, within=BOUND):
    """Assert that the composed adapter gives W + Σ w (W_i − W), where merging each of ``parts`` gives W_i."""
    base = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    each, found, changed = [merged(model, part) for part in parts], merged(model, out), False
    for name, value in base.items():
        expected = sum(weight * (one[name] - value) for weight, one in zip(weights, each, strict=True))
        changed |= bool(expected.any())
        assert error(found[name] - value, expected) < within or not (expected.any() or (found[name] - value).any()), (
            name
        )
    assert changed


@pytest.mark.parametrize("variants", [("lora", "rslora"), ("dora", "lora"), ("dora", "dora")], ids="+".join)
@pytest.mark.parametrize(("kind", "number"), EXAMPLES)
def test_a_sum_on_every_layer(kind, number, variants, tmp_path):
    module, args = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    parts = [trained(model, tmp_path / f"{n}", 0.1, variant=variant, rank=1) for n, variant in enumerate(variants)]
    compose(parts, tmp_path / "out", weights=[0.7, -0.4], base=model)
    check(model, tmp_path / "out", parts, [0.7, -0.4], 1e-5)
    veneer.load(model, tmp_path / "out")
    assert flat(module(*args)).isfinite().all()
