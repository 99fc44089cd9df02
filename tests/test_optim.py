"""LoRA+, LoRA-FA and Riemannian gradients choose what learns and how fast; RankBudget keeps what
matters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veneer.errors import ConfigError
from veneer.optim import RankBudget, freeze_a, lora_plus, precondition, regulariser
from veneer.variants import VARIANTS, InitContext

OWN = [variant for variant in VARIANTS if not variant.name.startswith("toy")]


class Numbers(nn.Module):
    """What holds a variant's numbers in an adapted layer: parameters, and buffers for those that
    are frozen."""

    def __init__(self, name: str, out=6, in_=8, rank=3, groups=1, kind="linear") -> None:
        super().__init__()
        self.variant, self.layer = VARIANTS[name], SimpleNamespace(name=kind)
        self.W = (torch.randn(groups, out, in_),)  # in a tuple: no number of the adapter
        x, G = torch.randn(groups, 20, in_).double(), torch.randn(groups, out, in_).double()
        base = lambda: self.W[0]  # noqa: E731
        start = InitContext(
            groups, out, in_, rank, in_, base, lambda: x.mT @ x, lambda: G, lambda: self.W[0] + 0.1
        )
        for key, value in self.variant.init(start).items():
            if key in self.variant.frozen:
                self.register_buffer(key, value)
            else:
                self.register_parameter(key, nn.Parameter(value))

    def forward(self, x):
        low, gain = self.variant.resolve(
            {**self._parameters, **self._buffers}, 1.0, lambda: self.W[0]
        )
        y = F.linear(x, self.W[0][0]) + F.linear(F.linear(x, low.A[0]), low.B[0] * low.scale)
        return y if gain is None else y * gain


def handle_of(**changes: Numbers) -> SimpleNamespace:
    """As a ``Handle``: the changes by path, and their parameters by path and name."""

    def named_parameters():
        for path, change in changes.items():
            for name, parameter in change.named_parameters():
                yield f"{path}.{name}", parameter

    return SimpleNamespace(changes=changes, named_parameters=named_parameters)


def rates(groups) -> dict[int, float]:
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


# LoRA+


@pytest.mark.parametrize("variant", OWN, ids=lambda variant: variant.name)
def test_lora_plus_lets_all_but_a_learn_faster(variant):
    numbers = Numbers(variant.name)
    groups = lora_plus(numbers.named_parameters(), lr=1e-3, ratio=8, weight_decay=0.1)
    rate = rates(groups)
    for name, parameter in numbers.named_parameters():
        assert rate[id(parameter)] == (1e-3 if name in ("A", "A1", "A2") else 8e-3)
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert sum(len(group["params"]) for group in groups) == len(list(numbers.parameters()))
    torch.optim.AdamW(groups)


def test_lora_plus_trains_embeddings_apart_when_a_handle_tells():
    handle = handle_of(words=Numbers("lora", kind="embedding"), fc=Numbers("lora"))
    rate = rates(lora_plus(handle, lr=1e-3, embedding_lr=1e-5))
    words, fc = handle.changes["words"], handle.changes["fc"]
    assert rate[id(words.A)] == rate[id(words.B)] == 1e-5
    assert (rate[id(fc.A)], rate[id(fc.B)]) == (1e-3, 16e-3)
    rate = rates(lora_plus(handle.named_parameters(), lr=1e-3))
    assert rate[id(words.B)] == 16e-3


def test_lora_plus_leaves_out_what_is_not_trained_and_says_what_is_wrong():
    numbers = Numbers("lora")
    numbers.A.requires_grad_(False)
    assert list(rates(lora_plus(numbers, lr=1e-3))) == [id(numbers.B)]
    numbers.B.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"(?s)lr=0.*no trained parameter"):
        lora_plus(numbers, lr=0)


# LoRA-FA


def saved_shapes(layer, x) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        layer(x).sum()
    return shapes


def test_freeze_a_needs_no_inputs_for_backward_and_leaves_the_gradient_of_b():
    layer, x = Numbers("lora", out=6, in_=8, rank=2), torch.randn(50, 8)
    layer(x).square().sum().backward()
    expected = layer.B.grad.clone()
    assert (50, 8) in saved_shapes(layer, x)
    layer.zero_grad()
    assert freeze_a(layer) == [layer.B]
    assert (50, 8) not in saved_shapes(layer, x)
    layer(x).square().sum().backward()
    assert torch.equal(layer.B.grad, expected)
    assert layer.A.grad is None
    assert freeze_a(layer) == [layer.B]  # a second time changes nothing


@pytest.mark.parametrize("variant", OWN, ids=lambda variant: variant.name)
def test_freeze_a_is_for_variants_with_a_random_a(variant):
    handle = handle_of(fc=Numbers(variant.name))
    if variant.name in ("lora", "rslora", "dora", "dora_rslora", "eva"):
        freeze_a(handle)
        assert not handle.changes["fc"].A.requires_grad
        assert handle.changes["fc"].B.requires_grad
    else:
        with pytest.raises(
            ConfigError, match=r"A cannot be frozen\. Found: .* at fc\. Expected: .*\. Do: .*"
        ):
            freeze_a(handle)
        assert all(parameter.requires_grad for _, parameter in handle.named_parameters())


def test_freeze_a_keeps_what_is_trained_in_full_and_wants_an_adapter():
    head = nn.Linear(3, 2)
    numbers = Numbers("lora")
    pairs = [("fc.A", numbers.A), ("fc.B", numbers.B), ("head.weight", head.weight)]
    assert freeze_a(iter(pairs)) == [numbers.B, head.weight]
    with pytest.raises(ConfigError, match="no A and B"):
        freeze_a(head)
    numbers.B.requires_grad_(False)
    with pytest.raises(ConfigError, match="trained numbers A"):
        freeze_a(numbers)


# Riemannian gradients


@pytest.mark.parametrize("variant", OWN, ids=lambda variant: variant.name)
def test_precondition_is_for_what_trains_a_and_b_alone(variant):
    handle = handle_of(fc=Numbers(variant.name))
    optimizer = torch.optim.SGD([parameter for _, parameter in handle.named_parameters()], lr=0.1)
    factors = {"A", "B", "A1", "C", "E", "R", "b", "d"} & {
        name for name, _ in handle.changes["fc"].named_parameters()
    }
    if factors == {"A", "B"}:
        precondition(optimizer, handle)
    else:
        with pytest.raises(
            ConfigError, match=r"cannot be preconditioned. Found: trained numbers .* at fc"
        ):
            precondition(optimizer, handle)


TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_preconditioned_step_is_the_papers(dtype):
    torch.manual_seed(0)
    numbers = Numbers("lora", groups=2).to(dtype)
    numbers.B.data.normal_()
    head = nn.Parameter(torch.randn(3, dtype=dtype))
    before = {"A": numbers.A, "B": numbers.B, "head": head}
    before = {name: value.detach().clone().double() for name, value in before.items()}
    optimizer = torch.optim.SGD([numbers.A, numbers.B, head], lr=0.5)
    hook = precondition(
        optimizer, [("fc.A", numbers.A), ("fc.B", numbers.B), ("head", head)], damping=0.1
    )
    for parameter in (numbers.A, numbers.B, head):
        parameter.grad = torch.randn_like(parameter)
    dA, dB, dh = (p.grad.clone().double() for p in (numbers.A, numbers.B, head))
    optimizer.step()
    delta = 0.1 * torch.eye(3, dtype=torch.float64)
    A, B = before["A"], before["B"]
    expected = {
        "A": A - 0.5 * (torch.linalg.inv(B.mT @ B + delta) @ dA),
        "B": B - 0.5 * (dB @ torch.linalg.inv(A @ A.mT + delta)),
        "head": before["head"] - 0.5 * dh,
    }
    for name, value in {"A": numbers.A, "B": numbers.B, "head": head}.items():
        torch.testing.assert_close(value.detach().double(), expected[name], **TOLERANCE[dtype])
    hook.remove()
    numbers.A.grad = torch.ones_like(numbers.A)
    numbers.B.grad = head.grad = None
    kept = numbers.A.detach().clone()
    optimizer.step()
    assert torch.equal(numbers.A.detach(), kept.sub(torch.ones_like(kept), alpha=0.5))


def test_a_preconditioned_optimizer_steps_as_pefts():
    peft = pytest.importorskip("peft", reason="PEFT's optimiser to compare with is not installed")
    create = pytest.importorskip("peft.optimizers").create_riemannian_optimizer
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0", "2"]))
    pairs = [
        (name, parameter)
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    ]
    own = {name.replace(".default.weight", "").replace("lora_", ""): nn.Parameter(p.detach()[None].clone())
           for name, p in pairs}  # fmt: skip
    optimizer = torch.optim.AdamW(own.values(), lr=0.01)
    precondition(optimizer, own.items())
    reference = create(theirs, torch.optim.AdamW, lr=0.01)
    for _ in range(3):
        for (_, parameter), mine in zip(pairs, own.values(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            mine.grad = parameter.grad[None].clone()
        optimizer.step()
        reference.step()
    for (_, parameter), mine in zip(pairs, own.values(), strict=True):
        torch.testing.assert_close(mine.detach()[0], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_precondition_says_what_is_wrong():
    numbers = Numbers("lora")
    optimizer = torch.optim.SGD([numbers.B], lr=0.1)
    with pytest.raises(ConfigError, match=r"(?s)damping=0.*an optimiser without some A or B"):
        precondition(optimizer, numbers, damping=0)
    with pytest.raises(ConfigError, match="no A and B"):
        precondition(optimizer, nn.Linear(2, 2))
    numbers.A.requires_grad_(False)
    with pytest.raises(ConfigError, match="both trained"):
        precondition(torch.optim.SGD([numbers.A, numbers.B], lr=0.1), numbers)
    numbers.A.requires_grad_(True)
    optimizer = torch.optim.SGD([numbers.A, numbers.B], lr=0.1)
    precondition(optimizer, numbers)
    with pytest.raises(ConfigError, match=r"a closure.* Do: call backward"):
        optimizer.step(lambda: 0.0)


# AdaLoRA


def backward(handle, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for change in handle.changes.values():
        for parameter in change.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def two_layers(rank=4, groups=1) -> SimpleNamespace:
    handle = handle_of(
        one=Numbers("adalora", rank=rank, groups=groups),
        two=Numbers("adalora", 7, 5, rank, groups=groups),
    )
    for change in handle.changes.values():
        change.E.data.normal_()
    return handle


def masks(handle) -> list[float]:
    return [
        number for change in handle.changes.values() for number in change.mask.flatten().tolist()
    ]


def test_the_budget_falls_with_a_cube_and_the_masks_follow():
    handle = two_layers(rank=4, groups=3)
    budget = RankBudget(handle, final_rank=1.5, total_steps=20, warmup=4, final=6, every=2)
    assert [budget.budget(step) for step in (0, 4, 9, 14, 20)] == [24, 24, 9 + 15 // 8, 9, 9]
    for step in range(1, 21):
        backward(handle, step)
        assert budget.step(step) == budget.budget(step)
        if step <= 4:
            assert sum(masks(handle)) == 24
        elif step % 2 == 0 or step >= 14:
            assert sum(masks(handle)) == budget.budget(step)
        if step == 14:
            settled = masks(handle)
        for change in handle.changes.values():
            assert not change.E[change.mask == 0].any()
    assert masks(handle) == settled


def test_the_important_triplets_stay_and_a_pruned_one_may_come_back():
    """The target needs the first two singular directions of ``one`` and none of ``two``."""
    handle = handle_of(one=Numbers("adalora", rank=4), two=Numbers("adalora", rank=4))
    one, two = handle.changes["one"], handle.changes["two"]
    for change in (one, two):
        Q, _ = torch.linalg.qr(torch.randn(8, 4))
        P, _ = torch.linalg.qr(torch.randn(6, 4))
        change.A.data.copy_(Q.T[None])
        change.B.data.copy_(P[None])
    target = (3 * one.B[0, :, :2] @ one.A[0, :2]).detach()
    one.mask[0, 0] = 0  # a mistake of the past
    budget = RankBudget(handle, final_rank=1, total_steps=60, warmup=5, final=10, every=5)
    optimiser = torch.optim.Adam([one.E, two.E, one.A, one.B, two.A, two.B], lr=1e-2)
    for step in range(1, 61):
        optimiser.zero_grad()
        loss = sum(
            (
                change.variant.resolve({**change._parameters, **change._buffers}, 1.0, None)[
                    0
                ].delta()[0]
                - wanted
            )
            .square()
            .sum()
            for change, wanted in ((one, target), (two, torch.zeros_like(target)))
        )
        (loss + 0.1 * regulariser(handle)).backward()
        optimiser.step()
        budget.step(step)
    assert one.mask.tolist() == [[1, 1, 0, 0]]
    assert not two.mask.any()


def test_importance_and_choice_are_pefts():
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator

    handle = two_layers(rank=4)
    theirs = nn.ModuleDict()
    for path, change in handle.changes.items():
        theirs[path] = nn.ModuleDict({
            "lora_A": nn.ParameterDict({"default": change.A.data[0].clone()}),
            "lora_B": nn.ParameterDict({"default": change.B.data[0].clone()}),
            "lora_E": nn.ParameterDict({"default": change.E.data[0, :, None].clone()}),
        })  # fmt: skip
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, total_step=20)
    allocator = RankAllocator(theirs, config, "default")
    budget = RankBudget(handle, final_rank=2, total_steps=20, warmup=2, final=4)
    for step in range(1, 16):
        backward(handle, step)
        for path, change in handle.changes.items():
            theirs[path]["lora_A"]["default"].grad = change.A.grad[0]
            theirs[path]["lora_B"]["default"].grad = change.B.grad[0]
            theirs[path]["lora_E"]["default"].grad = change.E.grad[0, :, None]
        total, pattern = allocator.update_and_allocate(theirs, step)
        assert budget.step(step) == total
        if pattern is not None and total < budget.first_budget:
            kept = [
                float(keep) for path in handle.changes for keep in pattern[f"{path}.lora_E.default"]
            ]
            assert masks(handle) == kept


def test_a_budget_goes_on_from_its_state():
    torch.manual_seed(3)
    first = two_layers()
    torch.manual_seed(3)
    second = two_layers()
    options = {"final_rank": 2, "total_steps": 20, "warmup": 2, "final": 4}
    whole, half = RankBudget(first, **options), RankBudget(second, **options)
    for step in range(1, 21):
        if step == 9:
            state = half.state_dict()
            half = RankBudget(second, **options)
            half.load_state_dict(state)
        for handle, budget in ((first, whole), (second, half)):
            backward(handle, step)
            budget.step(step)
    assert masks(first) == masks(second)
    assert half.settled
    other = RankBudget(handle_of(three=Numbers("adalora", rank=4)), **options | {"final_rank": 1})
    with pytest.raises(ConfigError, match=r"differs at one\.A"):
        other.load_state_dict(state)


def test_a_step_with_an_overflow_is_not_counted():
    handle = two_layers()
    budget = RankBudget(handle, final_rank=2, total_steps=20)
    backward(handle, 1)
    handle.changes["one"].A.grad.fill_(float("inf"))
    handle.changes["two"].E.grad.fill_(float("nan"))
    budget.step(1)
    assert all(
        value.isfinite().all() for part in budget._averages.values() for value in part.values()
    )


def test_a_budget_says_what_is_wrong():
    options = {"final_rank": 2, "total_steps": 20}
    with pytest.raises(ConfigError, match="another variant at fc"):
        RankBudget(handle_of(fc=Numbers("lora")), **options)
    with pytest.raises(ConfigError, match="no layer with A, B, E and mask"):
        RankBudget(nn.Linear(3, 2), **options)
    with pytest.raises(ConfigError, match="another variant"):
        regulariser(nn.ModuleList([Numbers("adalora"), Numbers("vera")]))
    with pytest.raises(ConfigError, match=r"(?s)final_rank=9.*warmup=15.*beta1=1"):
        RankBudget(two_layers(), final_rank=9, total_steps=20, warmup=15, final=5, beta1=1)
    budget = RankBudget(two_layers(), **options)
    with pytest.raises(ConfigError, match=r"no gradient at one\.A"):
        budget.step(1)


def test_a_budget_takes_modules_in_every_form():
    handle = two_layers()
    one, two = handle.changes.values()
    options = {"final_rank": 2, "total_steps": 20}
    for source in (handle, nn.ModuleList([one, two]), [one, two, one], [("a", one), ("b", two)]):
        assert RankBudget(source, **options).first_budget == 8
    assert RankBudget(one, **options).first_budget == 4


def test_the_regulariser_is_zero_for_orthogonal_factors_alone():
    layer = Numbers("adalora", out=6, in_=8, rank=3, groups=2)
    A, B = layer.A.data, layer.B.data
    eye = torch.eye(3)
    expected = (
        sum((A[g] @ A[g].T - eye).norm() ** 2 + (B[g].T @ B[g] - eye).norm() ** 2 for g in range(2))
        / 4
    )
    torch.testing.assert_close(regulariser(layer), torch.as_tensor(expected))
    regulariser(layer).backward()
    assert layer.A.grad.any()
    assert layer.B.grad.any()
    layer.A.data.copy_(torch.linalg.qr(A.mT)[0].mT)
    layer.B.data.copy_(torch.linalg.qr(B)[0])
    assert regulariser(layer) < 1e-10
