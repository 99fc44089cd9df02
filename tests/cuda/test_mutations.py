"""What the checks of ``make gpu`` and the limits are worth: each of these changes is put into the
code by hand, and found. A wait, a launch, a tensor on another device, a dense copy, a wrong number;
float64 where there is none."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.cuda import gpu_checks, limits
from tests.cuda.gpu_compare import IDS, Wrong, llama, logits
from tests.cuda.test_gpu import MODELS, OFFLOADED, WAITS
from tests.support.broken import (
    first_row_decides,
    first_row_decides_for_a_bank,
    unmerge_loses_a_bit,
)
from tests.support.emulated_device import G0, G1, without_float64
from tests.support.toys import example

from gpu_place import Place
from veneer.attach.layer.change import Change
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.kernels import device, dropout
from veneer.kernels import grouped as grouped_
from veneer.layers import LAYERS
from veneer.lowrank import LowRank

pytestmark = pytest.mark.filterwarnings("ignore")
PLACE = Place(G0, quick=True)


def _factors(patch, turned):
    """Every change, with its A as ``turned(A)``: what is resolved, and what linear layers and
    stacks take as it is."""
    original, linears, stacks = Change.resolve, device.linears, LayerAdapter.stacks

    def resolve(self, weight, dtype=None):
        low, gain = original(self, weight, dtype)
        return LowRank(turned(low.A), low.B, low.scale), gain

    def turned_linears(scales, x, weights, biases, A, *rest):
        return linears(scales, x, weights, biases, [turned(one) for one in A], *rest)

    def turned_stacks(self, module):
        found = stacks(self, module) or {}
        return {
            name: (weight, LowRank(turned(low.A), low.B, low.scale))
            for name, (weight, low) in found.items()
        }

    patch.setattr(Change, "resolve", resolve)
    patch.setattr(device, "linears", turned_linears)
    patch.setattr(LayerAdapter, "stacks", turned_stacks)


def _there(A):
    """Changes are resolved for the definition on the processor too, which stays as it is."""
    return A.is_cuda


def waits_once(patch):
    _factors(patch, lambda A: A if not _there(A) or A.detach().sum().item() < 1e30 else None)


def launches_once_more(patch):
    _factors(patch, lambda A: A * 1.0 if _there(A) else A)


def is_on_another_device(patch):
    _factors(patch, lambda A: A.to(G1) if _there(A) else A)


def is_off(patch):
    _factors(patch, lambda A: A * 1.01 if _there(A) else A)


def has_another_gradient(patch):
    _factors(patch, lambda A: A + 0.1 * (A - A.detach()) if _there(A) else A)


def costs_of(kind, variant="lora"):
    """What a cell costs, beside its limits."""
    costs: limits.Costs = {}
    gpu_checks.cell(PLACE, *example(kind), variant, limits.watching(costs))
    return limits.exceeded(f"{kind}[0]-{variant}", costs, limits.read()), costs


def other_kernels():
    """Norms have a change that is trained in full, and no A."""
    return [kind for kind in LAYERS.names() if kind != "norm"]


@pytest.mark.parametrize("kind", other_kernels())
def test_of_each_kind_a_wait_and_a_launch_are_seen(kind, monkeypatch):
    assert costs_of(kind)[0] == []
    with monkeypatch.context() as patch:
        waits_once(patch)
        problems, costs = costs_of(kind)
        assert costs["forward"].waits > 0
        assert any("forward" in one for one in problems)
    with monkeypatch.context() as patch:
        launches_once_more(patch)
        assert any("forward" in one for one in costs_of(kind)[0])


@pytest.mark.parametrize("kind", other_kernels())
def test_of_each_kind_another_device_and_a_wrong_number_are_seen(kind, monkeypatch):
    with monkeypatch.context() as patch:
        is_on_another_device(patch)
        with pytest.raises(RuntimeError, match="two devices"):
            costs_of(kind)
    for mutation in (is_off, has_another_gradient):
        with monkeypatch.context() as patch:
            mutation(patch)
            with pytest.raises(Wrong):
                costs_of(kind)


def test_a_dense_copy_is_seen(monkeypatch):
    original = device.linears

    def linears(scales, x, weights, *rest):
        copies = [torch.empty(16, *weight.shape, device=G0) for weight in weights]
        return original(scales, x, weights, *rest) if copies else ()

    monkeypatch.setattr(device, "linears", linears)
    assert any("forward" in one for one in costs_of("linear")[0])


#: in which a change is the same on both sides, or none is computed
ELSEWHERE = {OFFLOADED, "float64 on the device itself, and a gradient of a gradient"}


#: dear, and no different of what it finds: quick runs have the check itself
COMPILED = "torch.compile and torch.export"


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name == COMPILED else []) for name in MODELS if name not in ELSEWHERE
])  # fmt: skip
def test_a_check_of_models_finds_a_wrong_number(name, monkeypatch):
    """By the part that it is about, where that is not what every change goes through."""
    BREAKS.get(name, is_off)(monkeypatch)
    row = gpu_checks.run(PLACE, name)
    assert row["found"] == "wrong", row


def another_mask_in_backward(patch):
    original = dropout.keep_mask
    patch.setattr(
        device,
        "keep_mask",
        lambda shape, p, seed, place: original(shape, p, torch.randint(99, ()).item(), place),
    )


def experts_are_off(patch):
    """In the products of rows in the order of their experts, and in those of single experts."""
    is_off(patch)
    original = grouped_.linear_on_device
    patch.setattr(grouped_, "linear_on_device", lambda *given: original(*given) * 1.01)


BREAKS = {
    "dropout: backward drops what forward dropped, about as often as it should": another_mask_in_backward,
    "experts: eager, batched and grouped products, five architectures": experts_are_off,
    "blends and rows of a bank, behind a prompt too": first_row_decides_for_a_bank,
    WAITS: waits_once,
}


def test_the_first_rows_adapter_for_all_is_seen(monkeypatch):
    with monkeypatch.context() as patch:
        first_row_decides_for_a_bank(patch)
        with pytest.raises(Wrong, match="bank, row"):
            gpu_checks.rows(PLACE, "linear")
    with monkeypatch.context() as patch:
        first_row_decides(patch)
        with pytest.raises(Wrong, match="rows, row"):
            gpu_checks.rows(PLACE, "linear")


def test_float64_where_there_is_none_is_seen(monkeypatch):
    with without_float64(), warnings.catch_warnings():
        model, _ = llama(PLACE)
        logits(model, IDS.to(G0))
        _factors(monkeypatch, lambda A: A.double().to(A.dtype) if _there(A) else A)
        with pytest.raises(TypeError, match="float64"):
            logits(model, IDS.to(G0))


def test_an_unmerge_that_loses_a_bit_is_seen(monkeypatch):
    unmerge_loses_a_bit(monkeypatch)
    with pytest.raises(Wrong, match="unmerged"):
        costs_of("linear")
