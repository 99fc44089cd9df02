"""The step engine: failures stay with their adapter, and a failed pass leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer.engine import PassRequest, StepEngine, isolate_failures
from veneer.engine.gradients import clip_gradients
from veneer.engine.optimizer_state import load_optimizer_tensors, optimizer_tensors


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        raise MemoryError("too much")


def fail_in_backward(output, target):
    return FailingBackward.apply(F.mse_loss(output, target))


def fail_in_loss(output, target):
    raise ZeroDivisionError("no loss")


def create_engine():
    """Two adapters with dropout, on a base with dropout of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 4)).double()
    engine = StepEngine(model)
    for seed, name in enumerate("ab"):
        stream = engine.new_stream(seed)
        with stream:
            config = veneer.LoraConfig(rank=2, targets="all", dropout=0.3)
            handle = veneer.attach(model, config, name)
        engine.add(name, handle.parameters(), stream)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter += 0.1  # B is zero at the start
    return engine


def create_requests(engine, **losses):
    requests = {}
    for seed, name in enumerate("ab"):
        numbers = torch.Generator().manual_seed(seed)
        inputs, target = (
            torch.randn(3, width, generator=numbers, dtype=torch.float64) for width in (6, 4)
        )
        batch = engine.read_batch(name, (inputs, target))
        requests[name] = PassRequest(batch, losses.get(name, F.mse_loss))
    return requests


def gradients_of(engine, name):
    return [parameter.grad.clone() for parameter in engine.adapters[name].parameters]


def assert_equal(tensors, expected):
    assert all(torch.equal(left, right) for left, right in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("fail", [fail_in_loss, fail_in_backward])
def test_a_pass_that_raises_leaves_gradients_and_random_numbers_as_they_were(fail):
    engine, fresh = create_engine(), create_engine()
    for each in (engine, fresh):
        each.backward(create_requests(each))
    before = {name: gradients_of(engine, name) for name in "ab"}
    with pytest.raises((ZeroDivisionError, MemoryError)):
        engine.backward(create_requests(engine, b=fail))
    for name in "ab":
        assert_equal(gradients_of(engine, name), before[name])
    for each in (engine, fresh):
        each.backward(create_requests(each))
    for name in "ab":
        assert_equal(gradients_of(engine, name), gradients_of(fresh, name))


def test_a_failed_backward_is_the_failure_of_one_adapter_and_the_other_computes_as_alone():
    engine, alone = create_engine(), create_engine()
    result = isolate_failures(engine.backward, create_requests(engine, b=fail_in_backward))
    expected = alone.backward({"a": create_requests(alone)["a"]})
    assert list(result.values) == ["a"]
    assert list(result.failures) == ["b"]
    assert isinstance(result.failures["b"], MemoryError)
    assert torch.equal(result.values["a"], expected.values["a"])
    assert_equal(gradients_of(engine, "a"), gradients_of(alone, "a"))
    assert_equal(engine.adapters["a"].stream.states, alone.adapters["a"].stream.states)
    assert not engine.adapters["b"].has_gradients
    untouched = create_engine().adapters["b"]
    assert_equal(engine.adapters["b"].stream.states, untouched.stream.states)


def test_a_loss_that_raises_is_left_out_of_the_pass_if_told_to_keep_going():
    engine = create_engine()
    result = engine.backward(create_requests(engine, b=fail_in_loss), keep_going=True)
    assert (list(result.values), list(result.failures)) == (["a"], ["b"])
    assert result.failures["b"].__notes__ == ["in the loss of adapter 'b'"]
    assert engine.adapters["a"].has_gradients
    assert not engine.adapters["b"].has_gradients


def test_a_forward_has_outputs_or_losses_and_no_gradients():
    engine = create_engine()
    engine.model.eval()
    requests = create_requests(engine)
    losses = engine.forward(requests).values
    outputs = engine.forward({n: r._replace(loss=None) for n, r in requests.items()}).values
    for name, request in requests.items():
        assert not outputs[name].requires_grad
        assert torch.equal(losses[name], F.mse_loss(outputs[name], request.batch.target))
        assert not engine.adapters[name].has_gradients


def test_a_forward_of_one_adapter_draws_as_one_of_several_from_its_stream_alone():
    joined, alone = create_engine(), create_engine()
    expected = joined.forward(create_requests(joined)).values["a"]
    state = torch.get_rng_state()
    value = alone.forward({"a": create_requests(alone)["a"]}).values["a"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 50.0])
def test_clipping_has_the_bits_of_torch(dtype, max_norm):
    torch.manual_seed(0)
    gradients = [torch.randn(7, 5, dtype=dtype), torch.randn(3, dtype=dtype)]
    ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    norm = clip_gradients(ours, max_norm)
    assert norm == float(torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    assert_equal([p.grad for p in ours], [p.grad for p in theirs])
    assert clip_gradients(ours, 0.0, in_float64=True) == pytest.approx(
        min(norm, max_norm), rel=0.01
    )


def test_the_state_of_an_optimizer_finds_its_parameters_by_name():
    first = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(first)
    for parameter in first:
        parameter.grad = torch.full_like(parameter, float(len(parameter)))
    optimizer.step()
    tensors = optimizer_tensors(optimizer, ["two", "three"])
    assert {"exp_avg:two", "exp_avg_sq:three", "step:two"} <= tensors.keys()
    turned = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    loaded = torch.optim.AdamW(turned)
    load_optimizer_tensors(loaded, ["three", "two"], tensors)
    for old, new in zip(first, reversed(turned), strict=True):
        for key, value in optimizer.state[old].items():
            assert torch.equal(loaded.state[new][key], value)


def test_own_is_a_deprecated_name_of_the_states_of_a_stream():
    runs = veneer.train_many(nn.Linear(4, 3), {"a": veneer.LoraConfig(rank=2, targets="all")})
    stream = runs.stream("a")
    with pytest.warns(DeprecationWarning, match="states") as caught:
        old = stream.own
    assert caught[0].filename == __file__
    assert old is stream.states
    with stream:
        first = torch.rand(3)
    with pytest.warns(DeprecationWarning, match="states"):
        stream.own = old
    with stream:
        assert torch.equal(torch.rand(3), first)
