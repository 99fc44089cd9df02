"""``VENEER_COMPILED`` turns the compiled loop off, and what torch then computes is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.support.compiled import needs_loop
from tests.support.forked import printed
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels import fused, rounding, saved_inputs, switch
from veneer.lowrank import LowRank

TOKENS = 96


def step() -> list[Tensor]:
    """The output and gradients of one float32 layer that reads what a gated MLP's last layer
    reads."""
    x, W, A, B = (
        torch.randn(TOKENS, 48),
        torch.randn(40, 48),
        torch.randn(8, 48),
        torch.randn(40, 8),
    )
    x, A, B = (one.requires_grad_() for one in (x, A, B))
    y = fused.linear(0.5, F.silu(x * 2) * (x + 1), W, None, A, B)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, A, B])]


def merge() -> list[Tensor]:
    weight, low = (
        torch.randn(1, 64, 48).bfloat16(),
        LowRank(torch.randn(1, 4, 48), torch.randn(1, 64, 4), 0.1),
    )
    return [rounding.fold(weight, low, rounding="nearest").weight]


@pytest.fixture
def loaded(monkeypatch):
    """The names of modules with a loop that were used, with no weight or input too small."""
    names, choose = [], rounding.rounding_loop

    def record(*weights):
        module = choose(*weights)
        names.extend([] if module is None else [module.__name__.rpartition(".")[2]])
        return module

    monkeypatch.setattr(rounding, "rounding_loop", record)
    monkeypatch.setattr(rounding, "NUMBA_MIN_ELEMENTS", 0)
    monkeypatch.setattr(saved_inputs, "SMALL_INPUT_SIZE", 0)
    return names


def run(work: Callable[[], list[Tensor]], monkeypatch, *names: str) -> list[Tensor]:
    monkeypatch.setattr(switch, "ENABLED", frozenset(names))
    torch.manual_seed(0)
    return work()


@needs_loop("round_nearest")
def test_a_loop_that_is_off_is_not_used_and_torch_computes_the_same(loaded, monkeypatch):
    bits = run(merge, monkeypatch, "round_nearest")
    assert loaded == ["round_nearest"]
    loaded.clear()
    for names in (["saved_inputs"], []):
        assert all(map(torch.equal, bits, run(merge, monkeypatch, *names)))
        assert not loaded


def test_what_autograd_saved_is_left_alone_if_that_is_off(loaded, monkeypatch):
    def saved() -> bool:
        x = torch.randn(4, 6, requires_grad=True)
        product = F.silu(x * 2) * (x + 1)
        kept = saved_inputs.input_to_save(product)
        node = product.grad_fn
        assert node is not None
        return kept.first is product and saved_inputs.Gate not in node.metadata

    monkeypatch.setattr(switch, "ENABLED", frozenset({"saved_inputs"}))
    assert not saved()
    monkeypatch.setattr(switch, "ENABLED", frozenset())
    assert saved()
    found, plain = run(step, monkeypatch, "saved_inputs"), run(step, monkeypatch)
    assert all(map(torch.equal, found, plain))


def test_every_name_is_a_file_with_a_line_that_says_what_it_gains():
    for name in switch.NAMES:
        assert any(line.startswith(f"{name} ") for line in (switch.__doc__ or "").splitlines()), (
            name
        )
        assert (Path(switch.__file__).parent / f"{name}.py").is_file()


def test_values_of_the_variable():
    assert switch.enabled_names("1") == switch.enabled_names("") == {*switch.NAMES}
    assert switch.enabled_names("0") == frozenset()
    assert switch.enabled_names(", ".join(switch.NAMES)) == {*switch.NAMES}
    with pytest.raises(ConfigError, match="unknown: thin"):
        switch.enabled_names("thin,saved_inputs")
    with pytest.warns(DeprecationWarning, match="bf16_dot, thin_matmul"):
        assert switch.enabled_names("thin_matmul,bf16_dot,saved_inputs") == {"saved_inputs"}


CODE = """
import sys, torch
from veneer.kernels import fused, rounding
from veneer.lowrank import LowRank
torch.set_num_threads(1)
torch.manual_seed(0)
x, W = torch.randn(200, 256).requires_grad_(), torch.randn(16, 256)
A, B = torch.randn(4, 256, requires_grad=True), torch.randn(16, 4, requires_grad=True)
fused.linear(1.0, x, W, None, A, B).sum().backward()
print("numba" in sys.modules)
rounding.NUMBA_MIN_ELEMENTS = 0
rounding.fold(torch.randn(1, 30, 40).bfloat16(), LowRank(torch.randn(1, 2, 40), torch.randn(1, 30, 2), 0.1))
print("numba" in sys.modules)
"""


@needs_loop("round_nearest")
def test_numba_is_loaded_by_a_merge_alone_unless_that_is_off():
    for value, loaded in (("1", "True"), ("0", "False")):
        assert printed(CODE, **{switch.VARIABLE: value}).split() == ["False", loaded]
