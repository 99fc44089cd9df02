"""The loop over rows with different adapters equals float64 sums, row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.banks import Linears, alone, save_adapters
from tests.support.compiled import needs_loop
from tests.support.forked import printed
from tests.support.toys import error

import veneer
from veneer.kernels import batched, switch

pytestmark = needs_loop("mixed_rows")

#: adapters of a row: (index, weight); none for the base alone
BLENDS = st.lists(st.tuples(st.integers(0, 2), st.floats(-2, 2, width=32)), max_size=3)


def join(ranks, width, dtype, seed):
    """Factors of adapters of these ranks, joined and padded, and the bounds of each."""
    from veneer.kernels.mixed_rows import RANKS_TOGETHER

    generator, blocks, bounds = torch.Generator().manual_seed(seed), [], []
    for rank in ranks:
        first = sum(map(len, blocks))
        blocks.append(torch.zeros(rank + -rank % RANKS_TOGETHER, width))
        blocks[-1][:rank] = torch.randn(rank, width, generator=generator)
        bounds.append((first, first + len(blocks[-1])))
    return torch.cat(blocks).to(dtype), bounds


@settings(deadline=None)  # each dtype is compiled once, in a second
@given(
    rows=st.lists(BLENDS, min_size=1, max_size=5),
    ranks=st.lists(st.integers(0, 17), min_size=3, max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    tokens=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from([torch.bfloat16, torch.float32])] * 2),
)
def test_equal_to_float64(rows, ranks, width, out, tokens, dtypes):
    from veneer.kernels import mixed_rows

    (A, bounds), (B, _) = join(ranks, width, dtypes[1], 1), join(ranks, out, dtypes[1], 2)
    x = torch.randn(len(rows) * tokens, width, generator=torch.Generator().manual_seed(3))
    x = x.to(dtypes[0])
    pairs = mixed_rows.make_pairs(rows, bounds, tokens)
    arrays = (mixed_rows.to_array(A), mixed_rows.to_array(B))
    delta = mixed_rows.multiply_pairs(x, *arrays, pairs)
    assert delta.dtype is x.dtype
    exact = torch.zeros(len(x), out, dtype=torch.float64)
    size = torch.zeros_like(exact)
    for index in range(len(x)):
        for adapter, weight in rows[index // tokens]:
            first, after = bounds[adapter]
            down, up = A[first:after].double(), B[first:after].double()
            exact[index] += weight * (x[index].double() @ down.mT) @ up
            size[index] += abs(weight) * (x[index].double().abs() @ down.mT.abs()) @ up.abs()
    bound = 1e-5 * size + (exact.abs() * 2**-8 if dtypes[0] is torch.bfloat16 else 0) + 1e-30
    assert ((delta.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_alone(bad):
    from veneer.kernels import mixed_rows

    (A, bounds), (B, _) = join([8, 8], 32, torch.bfloat16, 1), join([8, 8], 32, torch.bfloat16, 2)
    A[:8] = bad
    pairs = mixed_rows.make_pairs([[(0, 1.0)], [(1, 1.0)], []], bounds, 1)
    x = torch.randn(3, 32).bfloat16()
    delta = mixed_rows.multiply_pairs(x, mixed_rows.to_array(A), mixed_rows.to_array(B), pairs)
    assert not delta[0].isfinite().any()
    assert delta[1].isfinite().all()
    assert delta[2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_bank_uses_it_unless_it_is_off(tokens, dtype, tmp_path, monkeypatch):
    from veneer.kernels import mixed_rows

    model = save_adapters(Linears(), tmp_path, "a", "b")
    x = torch.randn(4, tokens, 12).to(dtype)
    model.to(dtype)
    alone_by_name = {name: alone(model, tmp_path, name, x) for name in ("a", "b", None)}
    calls, multiply_pairs = [], mixed_rows.multiply_pairs
    monkeypatch.setattr(
        mixed_rows, "multiply_pairs", lambda *given: calls.append(1) or multiply_pairs(*given)
    )
    monkeypatch.setattr(batched, "LOOP_MIN_WEIGHT", 0)
    for names in ({"mixed_rows"}, set()):
        monkeypatch.setattr(switch, "ENABLED", frozenset(names))
        bank = veneer.Bank(model, verify_base=False)
        for name in ("a", "b"):
            bank.add(tmp_path / name)
        calls.clear()
        with torch.no_grad(), bank.rows(["a", None, {"a": 0.5, "b": 2.0}, "b"]):
            y = model(x)
        assert bool(calls) is bool(names)
        for row, name in ((0, "a"), (1, None), (3, "b")):
            bound = 2e-2 if dtype is torch.bfloat16 else 1e-5
            assert error(y[row].float(), alone_by_name[name][row].float()) < bound
        bank.close()


def test_more_work_than_one_thread_should_do_is_left_to_torch(tmp_path, monkeypatch):
    from veneer.kernels import mixed_rows

    model = save_adapters(Linears(), tmp_path, "a").bfloat16()
    monkeypatch.setattr(batched, "LOOP_MIN_WEIGHT", 0)
    monkeypatch.setattr(batched, "LOOP_MAX_WORK", 0)
    monkeypatch.setattr(mixed_rows, "multiply_pairs", None)  # calling it would fail
    bank = veneer.Bank(model, verify_base=False)
    bank.add(tmp_path / "a")
    x = torch.randn(2, 12).bfloat16()
    with torch.no_grad(), bank.rows(["a", None]):
        assert model(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_server_compiles_it_before_the_first_request(dtype):
    code = """
import sys, torch
from veneer.kernels import batched
batched.compile_row_loop(torch.zeros(512, 512, dtype=torch.{dtype}))
loop = sys.modules.get("veneer.kernels.mixed_rows")
print(loop and len(loop._multiply.signatures))
"""
    signatures = printed(code.format(dtype=str(dtype).removeprefix("torch.")))
    assert signatures.strip() == ("None" if dtype is torch.float64 else "1")
