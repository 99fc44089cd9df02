"""Where a base goes that is loaded without a device."""

from __future__ import annotations

import pytest
import torch

from veneer.models.load import type_and_device


@pytest.mark.parametrize(
    ("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_a_gpu_is_taken_where_there_is_one(cuda, mps, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert type_and_device("fp32", None) == (torch.float32, device)
    assert type_and_device("fp32", "cpu") == (torch.float32, "cpu")
