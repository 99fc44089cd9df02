"""A module of 16-bit weights whose own forward runs in float32 on a view: what it writes and what it
returns are those of the base."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.support.toys import error, randomise
from torch import nn

import veneer


class Counts(nn.Linear):
    """Counts its calls, and keeps its last output and a mean of all."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias) + self.offset
        with torch.no_grad():
            self.calls = self.calls + 1
            self.ema.mul_(0.5).add_(y.mean(0))
            self.last = y[-1]
        return y


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_what_forward_writes_to_buffers_in_16_bits_stays(mode):
    module = Counts().bfloat16()
    randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all")))
    ema, offset, x = module.ema, module.offset.clone(), torch.randn(3, 4).bfloat16()
    version = module.offset._version
    with mode():
        module(x)
        y = module(x)
        assert module.calls == 2
        assert module.ema is ema
        assert error(ema, 1.5 * y.double().mean(0)) < 1e-2
        assert torch.equal(module.last, y[-1])
        assert torch.equal(module.offset, offset)
    assert module.offset._version == version or mode is torch.inference_mode
