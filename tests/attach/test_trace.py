"""torch.jit.trace of an adapted layer, wherever it traces the base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.layers import LAYERS

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"
)


def traced(module, args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, args)


def first(y):
    while isinstance(y, tuple):
        y = y[0]
    return y


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS.names())
def test_every_kind_of_layer_traces_where_its_base_does(kind, variant):
    if kind == "conv1d_transformers":
        pytest.importorskip("transformers.pytorch_utils")
    tried = 0
    for module, x in LAYERS[kind].examples():
        args = x if isinstance(x, tuple) else (x,)
        module.eval().requires_grad_(False)
        try:
            traced(copy.deepcopy(module), args)
        except (
            RuntimeError
        ) as error:  # what the base gives or takes is nothing that a trace can hold
            if "cannot be traced. Only Tensors" not in str(error):
                raise
            continue
        handle = veneer.attach(module, veneer.LoraConfig(rank=1, targets="all", variant=variant))
        randomise(handle)
        expected = first(module(*args))
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                assert torch.allclose(
                    first(traced(module, args)(*args)), expected, atol=1e-4, rtol=1e-4
                )
        tried += 1
    assert tried


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_layer_runs_on_other_inputs(shape, training):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).train(training)
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2)))
    run, x = traced(model, torch.randn(shape)), torch.randn(shape)
    assert torch.allclose(run(x), model(x), atol=1e-5, rtol=1e-5)
