"""Products of a few tokens in float32, weight first, against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.kernels import fused, switch, weight_first


@pytest.fixture(autouse=True, scope="module")
def on_amd():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_first, "is_amd", lambda: True)
        yield


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, weight_first.MAX_TOKENS),
    in_=st.integers(1, 40),
    out=st.integers(1, 40),
    has_bias=st.booleans(),
)
def test_values_are_those_of_float64(tokens, in_, out, has_bias):
    x, weight, change = torch.randn(tokens, in_), torch.randn(out, in_), torch.randn(tokens, out)
    bias = torch.randn(out) if has_bias else None
    with weight_first.use():
        assert weight_first.suits(x, weight)
        total = fused.add_product(change.clone(), x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    bound = 2e-6 * (1 + F.linear(x.double().abs(), weight.double().abs()) + change.abs())
    y = weight_first.linear(x, weight, bias)
    assert y.is_contiguous()
    assert bool(((y - exact).abs() <= bound + 1e-6).all())
    assert total.is_contiguous()
    assert bool(((total - exact - change).abs() <= bound + 1e-6).all())


@pytest.mark.parametrize(
    ("shape", "dtype", "names", "expected"),
    [
        ((2, 8), torch.float32, switch.NAMES, True),
        ((64, 8), torch.float32, switch.NAMES, True),
        ((1, 8), torch.float32, switch.NAMES, False),
        ((65, 8), torch.float32, switch.NAMES, False),
        ((2, 8), torch.bfloat16, switch.NAMES, False),
        ((2, 8), torch.float64, switch.NAMES, False),
        ((2, 8), torch.float32, (), False),
    ],
)
def test_it_is_used_for_a_few_tokens_in_float32_where_asked_for(
    monkeypatch, shape, dtype, names, expected
):
    monkeypatch.setattr(switch, "ENABLED", frozenset(names))
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert not weight_first.STATE.is_used
    with weight_first.use():
        assert weight_first.STATE.is_used
        assert weight_first.suits(x, weight) is expected
        assert not weight_first.suits(x, torch.randn(8, 4, dtype=dtype).mT)
    assert not weight_first.STATE.is_used
