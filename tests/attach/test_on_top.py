"""A new adapter is trained on top of old ones that are frozen: ``with veneer.use(model, {"old":
1.0, "new": 1.0})``."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.models import IDS, ConvNet, TinyLM
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, error, randomise
from torch import nn
from torch.func import functional_call

import veneer
from veneer import context
from veneer.errors import CheckError, SelectionError
from veneer.kernels import fused

BOTH = {"old": 1.0, "new": 1.0}


def on_top(model, old, new, size=0.3):
    """``model`` with a frozen "old" and a "new" that trains."""
    handle = veneer.attach(model, old, "old")
    randomise(handle, size)
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    randomise(veneer.attach(model, new, "new"), size)
    return model


def reference(model, x, probe):
    """(output, the gradients of "new") of a plain copy whose weights are W + Σ (W'ᵢ − W), each made
    by autograd."""
    parameters, sums = {}, {}
    plain = copy.deepcopy(model)
    veneer.detach(plain)
    for name in BOTH:
        handle = veneer.Handle(model, name)
        for path, change in handle.changes.items():
            weight = dict(plain.named_parameters())[path]
            low, gain = change.resolve(weight)
            delta = change.layer.fold(low.delta(), weight.shape)
            whole = weight + delta
            if gain is not None:
                whole = whole * change.layer.spread(gain, change.dims, weight.shape)
            sums[path] = sums.get(path, weight) + (whole - weight)
        parameters[name] = handle.parameters()
        for path, part in handle.layers.items():
            for own, value in part.full.named_parameters():
                where = f"{path}.{own}"
                weight = dict(plain.named_parameters())[where]
                sums[where] = sums.get(where, weight) + (value - weight)
    y = functional_call(plain, sums, (x,))
    return y, torch.autograd.grad((y * probe).sum(), parameters["new"])


LORA = veneer.LoraConfig(rank=2, targets="all", alpha=3)
CONFIGS = {
    "lora": (veneer.LoraConfig(rank=2, targets="all"), LORA),
    "dora below": (veneer.LoraConfig(rank=2, targets="all", variant="dora"), LORA),
    "dora": (
        veneer.LoraConfig(rank=2, targets="all"),
        veneer.LoraConfig(rank=3, targets="all", variant="toy_scaled"),
    ),
    "in full below": (veneer.LoraConfig(rank=2, targets=["0"], train_also=["2"]), LORA),
    "in full": (
        veneer.LoraConfig(rank=2, targets="all"),
        veneer.LoraConfig(rank=2, targets=["2"], bias="all"),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_gradients_of_the_new_one_are_those_of_the_definition_in_float64(case, kind):
    torch.manual_seed(0)
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)), torch.randn(5, 12)
    else:
        model, x = (
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2)),
            torch.randn(2, 4, 9, 9),
        )
    on_top(model.double(), *CONFIGS[case])
    with torch.no_grad(), veneer.use(model, BOTH):
        probe = torch.randn_like(model(x.double()))
    expected, gradients = reference(model, x.double(), probe)
    with veneer.use(model, BOTH):
        y = model(x.double())
        (y * probe).sum().backward()
    assert error(y, expected) < 1e-12
    for ours, theirs in zip(veneer.Handle(model, "new").parameters(), gradients, strict=True):
        assert error(ours.grad, theirs) < 1e-12
    assert all(p.grad is None for p in veneer.Handle(model, "old").parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_call_without_a_selection_stays_an_error():
    model = on_top(TinyLM(), LORA, LORA)
    with pytest.raises(SelectionError, match="2 adapters"):
        model(IDS)


def test_no_weight_is_formed_where_a_layer_is_linear_in_it(monkeypatch):
    """It was, for every layer of a step, and kept for backward."""
    from veneer.attach.layer.change import Change

    def formed(*_, **__):
        raise AssertionError("W + ΔW was formed")

    monkeypatch.setattr(Change, "changed_weight", formed)
    monkeypatch.setattr(fused, "_form_weight", formed)
    for model, x, config in (
        (TinyLM(), IDS, veneer.LoraConfig(rank=2, targets=["q_proj", "v_proj", "embed_tokens"])),
        (nn.Sequential(nn.Conv1d(3, 8, 3)), torch.randn(2, 3, 9), LORA),
        (
            nn.Sequential(nn.Linear(64, 64)),
            torch.randn(2, 64),
            veneer.LoraConfig(rank=2, targets="all", variant="dora"),
        ),
    ):
        on_top(model, config, config)
        with veneer.use(model, BOTH):
            model(x).square().sum().backward()
        assert all(p.grad is not None for p in veneer.Handle(model, "new").parameters())


def test_no_weight_is_formed_where_the_caller_asks_for_factors(monkeypatch):
    def formed(*_, **__):
        raise AssertionError("W + ΔW was formed")

    model = on_top(nn.Sequential(nn.Linear(8, 8, bias=False)), LORA, LORA)
    x = torch.randn(4096, 8)
    with veneer.use(model, BOTH):
        expected = model(x)
        monkeypatch.setattr(fused, "_form_weight", formed)
        with pytest.raises(AssertionError, match="was formed"):
            model(x)
        with context.override(path="factored"):
            assert error(model(x), expected) < 1e-5


def test_dropout_draws_for_each_adapter():
    model, x = nn.Sequential(nn.Linear(32, 16, bias=False)).double(), torch.ones(4000, 32).double()
    on_top(model, LORA, veneer.LoraConfig(rank=3, targets="all", dropout=0.5))
    with torch.no_grad():
        model.eval()
        with veneer.use(model, BOTH):
            exact = model(x[:1])
        with veneer.use(model, "old"):
            old = model(x[:1])
        model.train()
        with veneer.use(model, BOTH):
            y = model(x)
    assert error(y.mean(0, keepdim=True), exact) < 0.05
    rows = (y - old) @ torch.linalg.pinv(
        veneer.Handle(model, "new").changes["0.weight"].adapter_parameters["B"][0]
    ).mT
    assert len(rows.round(decimals=6).unique(dim=0)) > 3000


@pytest.mark.parametrize("choice", [BOTH, {"old": 0.3, "new": -1.5}])
def test_check_proves_every_adapter_of_a_blend(choice):
    for model, x in ((TinyLM(), IDS), (TinyLM(tied=True).double(), IDS), (tiny_model(), IDS)):
        config = veneer.LoraConfig(rank=2, targets="all")
        adapt(model, "old", config=config)
        veneer.attach(model, config, "new")
        flags = [p.requires_grad for p in model.parameters()]
        report = veneer.check(model, x, choice)
        both = [veneer.check(model, x, name) for name in choice]
        assert report.weights == tuple(path for own in both for path in own.weights)
        assert report.compared == sum(own.compared for own in both)
        assert "old + " in str(report)
        assert flags == [p.requires_grad for p in model.parameters()]


def test_check_of_a_blend_names_what_is_not_seen():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model, x = Past(), torch.randn(2, 4)
    adapt(model, "old", config=veneer.LoraConfig(rank=2, targets=["used"]))
    adapt(model, "new", config=veneer.LoraConfig(rank=2, targets=["used", "unused"]))
    with pytest.raises(CheckError, match=r"1.0 old \+ 1.0 new.*'unused.weight'"):
        veneer.check(model, x, BOTH)
    with pytest.raises(CheckError, match="no adapter has a weight"):
        veneer.check(model, x, {"old": 0.0})
    with pytest.raises(SelectionError, match="no adapter named 'other'"):
        veneer.check(model, x, {"other": 1.0})
    assert veneer.check(model, x, {"old": 1.0}).compared == 1


def test_check_of_a_blend_of_running_statistics():
    model = adapt(ConvNet().double().eval(), "old", "new")
    assert veneer.check(model, torch.randn(4, 3, 9, 9).double(), BOTH).compared


def test_training_on_top_lowers_the_loss_and_leaves_the_old_one():
    torch.manual_seed(0)
    model = on_top(TinyLM(), LORA, LORA, size=0.02)
    old = [p.detach().clone() for p in veneer.Handle(model, "old").parameters()]
    optimizer = torch.optim.AdamW(veneer.Handle(model, "new").parameters(), lr=1e-2)
    losses = []
    with veneer.use(model, BOTH):
        for _ in range(15):
            loss = nn.functional.cross_entropy(model(IDS).flatten(0, -2), IDS.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(torch.equal, old, veneer.Handle(model, "old").parameters()))
