"""A module of 16-bit weights whose own forward runs in float32 on a view: it writes and returns
what its base does."""

from __future__ import annotations

import copy
import pickle

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


def adapted(module):
    randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all")))
    return module


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_what_forward_writes_to_buffers_in_16_bits_stays(mode):
    module = adapted(Counts().bfloat16())
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


class Router(nn.Module):
    """Returns logits in the dtype of x and scores in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        logits = F.linear(x, self.weight)
        scores = logits.float().softmax(-1)
        return logits, scores, scores.argmax(-1)


class Recorded(Router):
    """Keeps a record of its calls, and drops scores."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.shapes = 0, []

    def forward(self, x):
        self.calls += 1
        self.shapes.append(x.shape)
        logits, scores, index = super().forward(x)
        return logits, F.dropout(scores, 0.5, self.training), index


def dtypes(outputs):
    return [output.dtype for output in outputs]


def test_a_router_returns_what_its_base_does_in_16_bits():
    """Products of these whole numbers are exact in both dtypes."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    router = modeling.MixtralTopKRouter(config).bfloat16()
    router.weight.data.copy_(torch.randint(-3, 4, (4, 8)))
    x = torch.randint(-3, 4, (2, 5, 8)).bfloat16()
    base = router(x)
    assert dtypes(base) == [torch.bfloat16, torch.float32, torch.int64]
    handle = veneer.attach(router, veneer.LoraConfig(rank=2, targets="all"))
    found = router(x)
    assert dtypes(found) == dtypes(base)
    assert all(map(torch.equal, found, base))
    randomise(handle)
    found = router(x)
    assert dtypes(found) == dtypes(base)
    assert error(found[1], base[1]) > 1e-3
    with torch.autocast("cpu", torch.float16):
        with veneer.use(router, None):
            base = router(x)
        assert dtypes(router(x)) == dtypes(base)


def test_finding_the_dtypes_of_the_base_leaves_no_trace():
    router, x = adapted(Recorded().bfloat16()), torch.randn(3, 8).bfloat16()
    state = torch.get_rng_state()
    first = router(x)
    assert (router.calls, len(router.shapes)) == (1, 1)
    torch.set_rng_state(state)
    assert all(map(torch.equal, router(x), first))
    copied, known = copy.deepcopy(router), router.veneer.base_dtypes
    assert len(known) == 1
    assert known == copied.veneer.base_dtypes == pickle.loads(pickle.dumps(known))
    torch.set_rng_state(state)
    assert all(map(torch.equal, copied(x), first))


def test_a_compiled_router_returns_the_dtypes_of_its_base():
    router, x = adapted(Router().bfloat16()), torch.randn(3, 8).bfloat16()
    torch._dynamo.reset()
    found = torch.compile(router, backend="eager", fullgraph=True)(x)
    expected = router(x)
    assert dtypes(found) == dtypes(expected) == [torch.bfloat16, torch.float32, torch.int64]
    assert all(error(*pair) < 1e-2 for pair in zip(found[:2], expected[:2], strict=True))


def test_arguments_that_the_base_refuses_run_as_before():
    router, x = adapted(Router().bfloat16()), torch.randn(3, 8)
    assert dtypes(router(x)) == [torch.float32, torch.float32, torch.int64]
    with veneer.use(router, None), pytest.raises(RuntimeError, match="dtype"):
        router(x)
