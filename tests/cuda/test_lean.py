"""Rows of several adapters by ``veneer.use``: as few launches as a bank's, and the numbers of each
adapter alone."""

from __future__ import annotations

import pytest
import torch
from tests.support.emulated_device import G0, count, waits_of
from tests.support.tiny import tiny_model
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.errors import VeneerError
from veneer.kernels import batched

HALF = torch.bfloat16
NAMES = [None if row % 8 == 7 else str(row % 8) for row in range(16)]
IDS = torch.randint(3, 250, (16, 12), generator=torch.Generator().manual_seed(5))


def with_adapters(dtype=HALF, ranks=(4,), alphas=(8,), **config):
    model = tiny_model().to(dtype).to(G0)
    for number in range(7):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        settings = veneer.LoraConfig(rank=rank, alpha=alpha, **config)
        randomise(veneer.attach(model, settings, str(number)))
    return model


@pytest.mark.parametrize(("ranks", "alphas"), [((4,), (8,)), ((4, 2, 5), (8, 4))], ids=str)
@pytest.mark.parametrize("tokens", [12, 1])
def test_rows_take_less_than_twice_the_launches(tokens, ranks, alphas):
    model, ids = with_adapters(ranks=ranks, alphas=alphas), IDS[:, :tokens].to(G0)

    def run(names):
        with veneer.use(model, names), torch.no_grad(), count() as seen:
            model(input_ids=ids, use_cache=False)
        return seen

    run(NAMES)
    base, mixed, other = run(None), run(NAMES), run(NAMES[::-1])
    assert len(mixed.launches) <= 2 * len(base.launches)
    assert len(other.launches) <= 2 * len(base.launches)
    assert len(mixed.waits) == len(base.waits)


def answers(model, ids, weights, at_once):
    """(logits, gradients as one vector) of the rows together or of each adapter's rows by
    themselves."""
    logits = torch.zeros(weights.shape, device=ids.device, dtype=model.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    runs = (
        [(NAMES, list(range(16)))]
        if at_once
        else [(n, [i for i in range(16) if NAMES[i] == n]) for n in {*NAMES}]
    )
    total = torch.zeros((), device=ids.device)
    for names, rows in runs:
        with veneer.use(model, names):
            y = model(input_ids=ids[rows], use_cache=False).logits
        logits[rows] = y.detach()
        total = total + (y * weights[rows].to(y)).float().sum()
    found = torch.autograd.grad(total, parameters)
    return logits.double().cpu(), torch.cat([one.double().flatten() for one in found]).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("ranks", "alphas"), [((4,), (8,)), ((4,), (8, 3)), ((4, 2, 5), (8,))], ids=str
)
def test_rows_are_as_exact_as_each_adapter_alone(monkeypatch, dtype, ranks, alphas):
    model, ids, calls = with_adapters(dtype, ranks, alphas), IDS.to(G0), []
    weights = torch.randn(16, 12, 259, generator=torch.Generator().manual_seed(1)).to(G0)
    alone = answers(model, ids, weights, False)
    linear = batched.linear
    monkeypatch.setattr(batched, "linear", lambda *given: calls.append(0) or linear(*given))
    mixed = answers(model, ids, weights, True)
    assert len(calls) == 14
    with torch.no_grad(), veneer.use(model, NAMES):
        unrecorded = model(input_ids=ids, use_cache=False).logits.double().cpu()
    exact = answers(model.cpu().double(), IDS, weights.cpu(), False)
    for found, known, right in zip(
        (*mixed, unrecorded), (*alone, alone[0]), (*exact, exact[0]), strict=True
    ):
        assert error(found, right) < 1.5 * error(known, right) + 1e-6
    assert error(alone[0], exact[0]) < (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_float64_is_exact_to_second_derivatives(bias):
    module = nn.Sequential(nn.Linear(6, 5, bias=bias)).double().to(G0)
    for name in "ab":
        randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all"), name))
    x = torch.randn(4, 3, 6, dtype=torch.float64, device=G0, requires_grad=True)
    with veneer.use(module, ["a", None, "b", "a"]):
        assert torch.autograd.gradcheck(module, (x,))
        assert torch.autograd.gradgradcheck(module, (x,))
        mixed = module(x)
    with veneer.use(module, "b"):
        assert error(mixed[2].cpu(), module(x)[2].cpu()) < 1e-12


def test_dropout_is_left_to_each_adapter(monkeypatch):
    monkeypatch.setattr(batched, "linear", None)
    model = with_adapters(dropout=0.5).train()
    with veneer.use(model, NAMES):
        model(input_ids=IDS.to(G0), use_cache=False).logits.sum().backward()


def test_rows_in_training_do_not_wait():
    model, ids = with_adapters(), IDS.to(G0)

    def run(names=tuple(NAMES)):
        with veneer.use(model, None if names is None else list(names)):
            y = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        if y.requires_grad:
            y.backward()

    assert waits_of(run, lambda: run(None)).total() == 0


def test_a_gradient_of_a_gradient_under_autocast_says_what_to_do():
    module = nn.Sequential(nn.Linear(6, 5)).to(G0)
    randomise(veneer.attach(module, veneer.LoraConfig(rank=2, targets="all")))
    x = torch.randn(3, 6, device=G0, requires_grad=True)
    with torch.autocast("cuda", dtype=HALF):
        y = module(x * 1)
    with pytest.raises(VeneerError, match=r"second.*autocast.*outside"):
        torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    second = []
    for cast in (True, False):  # the ways out
        with torch.autocast("cuda", dtype=HALF, enabled=cast):
            y = module(x.to(HALF) if cast else x)
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert error(second[0].cpu(), second[1].cpu()) < 3e-2
