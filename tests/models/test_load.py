"""Where a base goes that is loaded without a device, and in which dtype."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer.errors import ConfigError
from veneer.models.load import dtype_and_device, pick_dtype
from veneer.train.config import make_config


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_is_taken_where_there_is_one(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert dtype_and_device("fp32", None) == (torch.float32, device)
    assert dtype_and_device("fp32", "cpu") == (torch.float32, "cpu")


@pytest.mark.parametrize("precision", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_precision_has_one_meaning_in_each_spelling(precision):
    assert pick_dtype(precision) is torch.bfloat16
    settings = {"base": "b", "data": "d.jsonl", "output": "o", "precision": precision}
    assert make_config({**settings, "adapter_dtype": precision}).adapter_dtype == "bf16"
    bank = veneer.Bank(torch.nn.Sequential(torch.nn.Linear(4, 4)), dtype=precision)
    assert bank.dtype is torch.bfloat16
    bank.close()


def test_an_unknown_precision_names_the_nearest():
    with pytest.raises(ConfigError, match=r"precision='bf61' \(nearest: 'bf16'"):
        pick_dtype("bf61")  # pyright: ignore[reportArgumentType]
