"""The proof of a base: what it covers on real architectures, what it lets pass, what it costs the second time."""

from __future__ import annotations

import copy
import json
import re
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from real_models import REAL, RealModel
from veneer import hashing, proof
from veneer.errors import BaseMismatchError
from veneer.targets import Names

every_model = pytest.mark.parametrize("entry", REAL.values(), ids=REAL)


# ---------------------------------------------------------------------------------------------- what is covered


class Reads(TorchDispatchMode):
    """The memory that the operations of a block read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.numel():
                self.seen.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def used(model: nn.Module, example: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The parameters and lasting buffers that a forward reads, and that are no copies of the adapter's."""
    with Reads() as reads, torch.no_grad():
        model.eval()(**example)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if ".veneer." not in f".{name}." and tensor.untyped_storage().data_ptr() in reads.seen
    }


def change(tensor: torch.Tensor) -> None:
    """Another number in one place, as far off as a bfloat16 can tell."""
    with torch.no_grad():
        flat = tensor.detach().view(-1)
        at = len(flat) // 2
        flat[at] = ~flat[at] if tensor.dtype == torch.bool else flat[at] + 1


def test_there_are_twenty_architectures():
    assert len(REAL) >= 20


@every_model
def test_any_tensor_that_forward_uses_is_refused_once_it_was_changed(entry: RealModel, tmp_path):
    model, example, _ = entry.build()
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, targets="all-linear"))
    path, tensors = handle.save(tmp_path / "adapter"), used(model, example)
    handle.detach()
    veneer.load(model, path).detach()
    plain = used(model, example)
    assert len(tensors) >= 0.9 * len(plain) > 0, "an adapted model reads what the base reads, but for its own copies"
    passed = []
    for name, tensor in plain.items():
        if name not in tensors:  # running statistics, of which the adapter brings its own
            assert "running" in name, name
            continue
        before = tensor.detach().clone()
        change(tensor)
        try:
            with pytest.raises(BaseMismatchError, match=re.escape(name)):
                veneer.load(model, path)
        except pytest.fail.Exception:
            passed.append(name)
            veneer.detach(model)
        with torch.no_grad():
            tensor.copy_(before)
    assert not passed
    veneer.load(model, path)
