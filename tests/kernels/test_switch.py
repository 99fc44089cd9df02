"""``VENEER_COMPILED`` turns each compiled loop off, and what torch then computes is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.support.compiled import needs_loop
from tests.support.forked import printed
from tests.support.toys import error
from torch import Tensor

from veneer.errors import ConfigError
from veneer.kernels import compiled, cost_model, fused, grouped, rounding
from veneer.kernels.compiled import saved_inputs, switch
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


def inference(tokens: int) -> list[Tensor]:
    """The output of one bfloat16 layer without a graph."""
    x, W = torch.randn(tokens, 48).bfloat16(), torch.randn(40, 48).bfloat16()
    return [fused.unrecorded(0.5, x, W, None, torch.randn(8, 48), torch.randn(40, 8))]


def merge() -> list[Tensor]:
    weight, low = (
        torch.randn(1, 64, 48).bfloat16(),
        LowRank(torch.randn(1, 4, 48), torch.randn(1, 64, 4), 0.1),
    )
    return [rounding.fold(weight, low, rounding="nearest").weight]


def experts() -> list[Tensor]:
    """The output and gradients of rows that meet three matrices of a stack."""
    x, W, A, B = (
        torch.randn(9, 48),
        torch.randn(4, 40, 48),
        torch.randn(4, 8, 48),
        torch.randn(4, 40, 8),
    )
    x, A, B = (one.requires_grad_() for one in (x, A, B))
    y = grouped.linear(x, W, A, B, 0.5, grouped.segments([2, 2, 8, 9], 9))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, A, B])]


#: what runs each loop, and by how much its result may differ from torch's
RUNS: dict[str, tuple[Callable[[], list[Tensor]], float]] = {
    "thin_matmul": (step, 1e-5),
    "single_adapter_bf16": (lambda: inference(3), 1e-2),
    "expert_rows": (experts, 1e-5),
    "round_nearest": (merge, 0.0),
}


@pytest.fixture
def loaded(monkeypatch):
    """The loops that were asked for, with no weight or input too small for one."""
    names, module = [], compiled._module
    monkeypatch.setattr(compiled, "_module", lambda name: (names.append(name), module(name))[1])
    monkeypatch.setattr(rounding, "WORTH", 0)
    monkeypatch.setattr(saved_inputs, "MANY", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return names


def run(work: Callable[[], list[Tensor]], monkeypatch, *names: str) -> list[Tensor]:
    monkeypatch.setattr(switch, "ON", frozenset(names))
    torch.manual_seed(0)
    return work()


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_loop(name)) for name in RUNS])
def test_a_loop_that_is_off_is_not_used_and_torch_computes_the_same(name, loaded, monkeypatch):
    work, within = RUNS[name]
    found = run(work, monkeypatch, name)
    assert set(loaded) == {name}
    loaded.clear()
    same = run(
        work, monkeypatch, *(other for other in switch.NAMES if other not in (name, "bf16_dot"))
    )
    assert name not in loaded
    plain = run(work, monkeypatch)
    assert all(error(one, other) <= within for one, other in zip(found, plain, strict=True))
    assert all(error(one, other) <= within for one, other in zip(same, plain, strict=True))


@needs_loop("bf16_dot")
def test_the_products_of_bfloat16_pairs_are_turned_off_by_themselves(loaded, monkeypatch):
    from veneer.kernels.compiled import bf16_dot

    monkeypatch.setattr(bf16_dot, "_supported", lambda: True)
    assert bf16_dot.able()
    monkeypatch.setattr(switch, "ON", frozenset({"single_adapter_bf16", "mixed_rows"}))
    assert not bf16_dot.able()
    x = torch.randn(TOKENS, 48).bfloat16()
    assert compiled.single_adapter_change(x, torch.randn(8, 48), torch.randn(40, 8), 1.0) is None, (
        "too many tokens"
    )
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        found = run(lambda: inference(TOKENS), patch, "single_adapter_bf16", "bf16_dot")
        plain = run(lambda: inference(TOKENS), patch)
    assert error(found[0], plain[0]) < 1e-2


@needs_loop("mixed_rows")
def test_rows_of_a_bank_are_mixed_by_the_loop_only_if_it_is_on(monkeypatch):
    weight = torch.randn(4, 4)
    assert compiled.mixed_rows_loop(weight, torch.float32) is not None
    monkeypatch.setattr(switch, "ON", switch.ON - {"mixed_rows"})
    assert compiled.mixed_rows_loop(weight, torch.float32) is None


def test_what_autograd_saved_is_left_alone_if_that_is_off(loaded, monkeypatch):
    def saved() -> bool:
        x = torch.randn(4, 6, requires_grad=True)
        product = F.silu(x * 2) * (x + 1)
        kept = saved_inputs.kept(product)
        node = product.grad_fn
        assert node is not None
        return kept.first is product and saved_inputs.Gate not in node.metadata

    monkeypatch.setattr(switch, "ON", frozenset({"saved_inputs"}))
    assert not saved()
    monkeypatch.setattr(switch, "ON", frozenset())
    assert saved()
    found, plain = run(step, monkeypatch, "saved_inputs"), run(step, monkeypatch)
    assert all(map(torch.equal, found, plain))


def test_the_cost_of_a_product_is_that_of_what_computes_it(loaded, monkeypatch):
    monkeypatch.setattr(switch, "ON", frozenset())
    assert not cost_model.looped(torch.float32, torch.device("cpu"))


def test_every_name_is_a_file_with_a_line_that_says_what_it_gains():
    for name in switch.NAMES:
        assert any(line.startswith(f"{name} ") for line in (compiled.__doc__ or "").splitlines()), (
            name
        )
        assert (Path(switch.__file__).parent / f"{name}.py").is_file()


def test_values_of_the_variable():
    assert switch.names("1") == switch.names("") == {*switch.NAMES}
    assert switch.names("0") == frozenset()
    assert switch.names("thin_matmul, bf16_dot") == {"thin_matmul", "bf16_dot"}
    with pytest.raises(ConfigError, match="unknown: thin"):
        switch.names("thin,bf16_dot")


CODE = """
import sys, torch
from veneer.kernels import compiled, fused, rounding
from veneer.lowrank import LowRank
torch.set_num_threads(1)
torch.manual_seed(0)
x, W = torch.randn(200, 256).requires_grad_(), torch.randn(16, 256)
A, B = torch.randn(4, 256, requires_grad=True), torch.randn(16, 4, requires_grad=True)
fused.linear(1.0, x, W, None, A, B).sum().backward()
fused.unrecorded(1.0, x.detach().bfloat16(), W.bfloat16(), None, A.detach(), B.detach())
rounding.WORTH = 0
rounding.fold(torch.randn(1, 30, 40).bfloat16(), LowRank(torch.randn(1, 2, 40), torch.randn(1, 30, 2), 0.1))
print("numba" in sys.modules, compiled.mixed_rows_loop(W, torch.float32) is not None, float(A.grad.sum()))
"""


@needs_loop("thin_matmul")
def test_a_process_with_all_of_it_off_never_loads_numba():
    def start(value: str) -> list[str]:
        return printed(CODE, **{switch.VARIABLE: value}).split()

    *on, with_loops = start("1")
    *off, without = start("0")
    assert (on, off) == (["True", "True"], ["False", "False"])
    assert float(with_loops) == pytest.approx(float(without), rel=1e-4)
    *one, _ = start("thin_matmul")
    assert one == ["True", "False"]
