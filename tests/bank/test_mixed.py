"""Prompts of 16 bits in rows that use several adapters are one batched product a layer."""

from __future__ import annotations

import pytest
import torch
from tests.support.banks import Linears, alone, save_adapters
from tests.support.toys import error

import veneer
from veneer.kernels import batched

ROWS = ["a", None, {"a": 0.5, "b": 2.0}, "b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7])
def test_rows_of_16_bits_are_as_close_as_each_adapter_alone(dtype, tokens, tmp_path, monkeypatch):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    x = torch.randn(4, tokens, 12)
    exact = {name: alone(model, tmp_path, name, x) for name in ("a", "b", None)}
    model, calls, by_rows = model.to(dtype), [], batched.multiply_rows
    monkeypatch.setattr(batched, "multiply_rows", lambda *given: calls.append(1) or by_rows(*given))
    bank = veneer.Bank(model, verify_base=False)
    for name in ("a", "b"):
        bank.add(tmp_path / name)
    with torch.no_grad(), bank.rows(ROWS):
        y = model(x.to(dtype)).float()
    assert bool(calls) is (dtype is torch.bfloat16 and tokens == 7)
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for row, name in ((0, "a"), (1, None), (3, "b")):
        assert error(y[row], exact[name][row]) < bound
    with torch.no_grad(), bank.rows([ROWS[2]] * 4):  # neighbours that use the same are one product
        blend = model(x.to(dtype)).float()
    assert error(y[2], blend[2]) < bound
    bank.close()
