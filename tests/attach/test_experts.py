"""Stacks of experts: outputs, gradients and merges of the definition, and W + ΔW is never formed
for a call."""

from __future__ import annotations

import pytest
import torch
from tests.support.compiled import needs_loop
from tests.support.moe import (
    IMPLEMENTATIONS,
    MODELS,
    TARGETS,
    attach_adapter,
    build,
    definition,
    inputs_for,
    set_way,
)
from tests.support.toys import error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer import context
from veneer.errors import SelectionError

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ways = pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in MODELS
        for way in IMPLEMENTATIONS
        if way == "eager" or name != "llama4"
    ],
)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@ways
def test_outputs_and_gradients_are_those_of_the_definition(name, way, dtype):
    _, module = attach_adapter(name, way, dtype)
    args = inputs_for(module, dtype)
    args[0].requires_grad_()
    y = module(*args)
    expected, leaves, x = definition(module, args)
    assert y.dtype == dtype
    assert error(y, expected) < BOUNDS[dtype]
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [*leaves, x])
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), [*parameters, args[0]])
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 2 * BOUNDS[dtype]
    with torch.no_grad():
        assert error(module(*args), expected) < BOUNDS[dtype]


class _Allocations(TorchDispatchMode):
    """The largest number of elements of a floating-point tensor that an operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        own = {
            value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)
        }
        for value in made if isinstance(made, tuple | list) else [made]:
            floats = isinstance(value, torch.Tensor) and value.is_floating_point()
            if floats and value.untyped_storage().data_ptr() not in own:
                self.largest = max(self.largest, value.numel())
        return made


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@ways
def test_nothing_of_the_size_of_a_stack_is_made(name, way, dtype):
    _, module = attach_adapter(name, way, dtype, experts=16, rank=2)
    args = inputs_for(module, dtype, tokens=1 if name == "llama4" else 3)
    args[0].requires_grad_()
    module(*args)  # what is compiled or looked up once
    with _Allocations() as seen:
        module(*args).float().square().sum().backward()
    smallest = min(
        p.numel() for n, p in module.named_parameters() if n in ("gate_up_proj", "down_proj")
    )
    assert 0 < seen.largest < smallest / 3


@ways
def test_a_merge_equals_the_adapted_model(name, way):
    model = build(name, torch.float32)
    set_way(model, way)
    handle = veneer.attach(model, veneer.LoraConfig(rank=3, targets=TARGETS))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        y = model(ids).logits
        handle.merge()
        merged = model(ids).logits
        handle.unmerge()
        assert error(y, merged) < 1e-5
        assert torch.equal(model(ids).logits, y)
        with veneer.use(model, None):
            assert error(model(ids).logits, y) > 1e-3


@ways
def test_rows_with_different_adapters_equal_each_row_alone(name, way):
    model = build(name, torch.float32)
    set_way(model, way)
    for adapter in "ab":
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=TARGETS), adapter)
        for parameter in handle.parameters():
            nn.init.normal_(parameter, std=0.3)
    names = ["a", None, "b", "a"]
    for length in (5, 1):  # a prompt, and a token of each
        ids = torch.randint(0, 50, (4, length))
        if name == "llama4":  # whose experts get all tokens, expert by expert
            with pytest.raises(SelectionError, match="rows of the batch"), veneer.use(model, names):
                model(ids)
            continue
        with veneer.use(model, names):
            mixed = model(ids).logits
        for row, own in enumerate(names):
            with veneer.use(model, own):
                assert error(mixed[row], model(ids[row : row + 1]).logits[0]) < 1e-5
        with torch.inference_mode(), veneer.use(model, names):
            assert error(model(ids).logits, mixed) < 1e-5
        loss = mixed.square().mean()
        loss.backward()


def test_as_many_rows_as_experts_of_a_token_are_rows():
    model = build("mixtral", torch.float32)  # two of each token
    for adapter in "ab":
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=TARGETS), adapter)
        for parameter in handle.parameters():
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 50, (2, 1))
    with torch.no_grad(), veneer.use(model, ["a", "b"]):
        mixed = model(ids).logits
    with torch.no_grad(), veneer.use(model, "b"):
        assert error(mixed[1], model(ids[1:]).logits[0]) < 1e-5


def test_tokens_that_are_not_a_view_of_rows_first_are_refused():
    model, module = attach_adapter("mixtral", "eager", torch.float32)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=TARGETS), "b")
    hidden, index, weights = inputs_for(module, torch.float32, tokens=6)
    time_first = hidden.view(3, 2, -1).clone()
    with (
        pytest.raises(SelectionError, match="rows of the batch"),
        veneer.use(model, ["default", "b"]),
    ):
        module(time_first.view(6, -1), index, weights)


def test_a_banks_rows_reach_experts(tmp_path):
    model = build("qwen3_moe", torch.float32)
    for adapter in "ab":
        handle = veneer.attach(
            model, veneer.LoraConfig(rank=2, targets=[TARGETS, "q_proj"]), adapter
        )
        for parameter in handle.parameters():
            nn.init.normal_(parameter, std=0.3)
        handle.save(tmp_path / adapter)
    ids = torch.randint(0, 50, (3, 5))
    alone = {}
    with torch.no_grad():
        for adapter in ("a", "b", None):
            with veneer.use(model, adapter):
                alone[adapter] = model(ids).logits
        for adapter in "ab":
            veneer.detach(model, adapter)
        bank = veneer.Bank(model)
        for adapter in "ab":
            bank.register(adapter, tmp_path / adapter)
        with bank.rows(["b", None, "a"]):
            mixed = model(ids).logits
    for row, adapter in enumerate(["b", None, "a"]):
        assert error(mixed[row], alone[adapter][row]) < 1e-5


@needs_loop("saved_inputs")
@pytest.mark.parametrize(("implementation", "token_count"), [("eager", 64), ("grouped_mm", 8192)])
def test_a_step_keeps_tokens_once_and_products_as_their_factors(implementation, token_count):
    """Beside the base's own. What is seen by the nodes themselves: under hooks, inputs are kept as
    they are."""
    _, module = attach_adapter("qwen3_moe", implementation, torch.float32)
    hidden, index, weights = inputs_for(module, torch.float32, tokens=token_count)
    x = hidden.clone().requires_grad_() * 1
    nodes, held, owned = [module(x, index, weights).grad_fn], {}, set()
    for node in nodes:  # grows
        nodes.extend(
            after for after, _ in node.next_functions if after is not None and after not in nodes
        )
        place = owned if "Grouped" not in node.name() else held
        kept = (
            node.saved_tensors
            if place is held
            else [getattr(node, f"_saved_{s}", None) for s in ("self", "other")]
        )
        for value in kept:
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                (place.setdefault(value.untyped_storage().data_ptr(), value) if place is held else
                 place.add(value.untyped_storage().data_ptr()))  # fmt: skip
    stacks = {value.untyped_storage().data_ptr() for value in module.parameters()}
    more = [
        value
        for at, value in held.items()
        if at not in owned | stacks and value.is_floating_point()
    ]
    assert [value.data_ptr() for value in more] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_blend_is_one_change_of_more_ranks(dtype):
    model, module = attach_adapter("qwen3_moe", "grouped_mm", dtype)
    second = veneer.attach(model, veneer.LoraConfig(rank=3, targets=TARGETS), "b")
    for parameter in second.parameters():
        nn.init.normal_(parameter, std=0.2)
    args = inputs_for(module, dtype)
    with torch.no_grad(), veneer.use(model, {"default": 0.7, "b": -0.4}):
        y = module(*args)
    wanted = definition(module, args, {"default": 0.7, "b": -0.4})[0]
    assert error(y, wanted) < BOUNDS[dtype]


def test_dropout_is_that_of_whole_inputs_as_where_w_is_formed():
    model, module = attach_adapter("qwen3_moe", "eager", torch.float32, dropout=0.4)
    model.train()
    args = inputs_for(module, torch.float32)
    torch.manual_seed(3)
    y = module(*args)
    torch.manual_seed(3)
    with context.override(path="materialised"):
        formed = module(*args)
    assert error(y, formed) < 1e-5
    assert error(module(*args), y) > 1e-3


class _Scaled(torch.autograd.Function):
    """What a kernel of somebody else's is to autograd."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.einsum("tk,eok->eto", x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return torch.einsum("eto,eok->tk", dy, weight), torch.einsum("eto,tk->eok", dy, x)


def _einsum(weight, x):
    return torch.einsum("tk,eok->eto", x, weight)


def _function(weight, x):
    return _Scaled.apply(x, weight)


def _below_python(weight, x):
    with torch._C.DisableTorchFunctionSubclass():
        return torch.bmm(x.expand(3, 2, 4), weight.mT)


def _in_place(weight, x):
    weight.mul_(2)
    return x @ weight.mT


def _slices(weight, x):
    return torch.cat([x @ weight[1:].mT, torch.stack([x @ one.T for one in weight.unbind()])[:1]])


def _halves(weight, x):
    one, other = weight.chunk(2, dim=1)
    return torch.cat([x @ one.mT, x @ other.permute(0, 2, 1)], -1)


def _ids(weight, x):
    ids = torch.tensor([2, 0, 2])
    picked = weight[ids].to(x.dtype)
    left, right = (
        torch.bmm(picked, x.mT.expand(3, 4, 2)).mT,
        torch.baddbmm(x.new_ones(1), x.expand(3, 2, 4), picked.mT),
    )
    return left + right + torch.bmm(x.expand(3, 2, 4), torch.index_select(weight, 0, ids).mT)


def _negative_ids(weight, x):
    picked = weight[torch.tensor([-1, 0])]
    return torch.bmm(x[:, None], picked.mT), torch.bmm(x.expand(2, 2, 4), picked.mT)


def _one(weight, x):
    matrix = weight[-1]
    ones = x.new_ones(5)
    products = matrix @ x.mT, torch.addmm(ones, x, matrix.t()), x[0] @ matrix.T, matrix @ x[0]
    return *products, nn.functional.linear(x, matrix, ones)


class _Reads(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = read
        self.proj = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return _joined(self.read(self.proj, x))


def _joined(y):
    return torch.cat([part.flatten() for part in y]) if isinstance(y, tuple) else y


READS = (_einsum, _function, _below_python, _in_place, _slices, _halves, _ids, _negative_ids, _one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", READS)
def test_whatever_a_forward_does_it_sees_the_changed_weight(read, dtype):
    module = _Reads(read).to(dtype)
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets=["proj"]))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, dtype=dtype)
    A, B = (p.detach().double().requires_grad_() for p in handle.parameters())
    scale = handle.changes["proj"].scale
    expected = _joined(read(module.proj.double() + scale * B @ A, x.double()))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        assert error(module(x), expected) < bound
    y = module(x)
    assert error(y, expected) < bound
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (A, B))
    found = torch.autograd.grad((y * weights.to(dtype)).sum(), tuple(handle.parameters()))
    for own, gradient in zip(found, wanted, strict=True):
        assert error(own, gradient) < 3 * bound


def _written_ids(weight, x):
    ids = torch.tensor([2, 0])
    picked = weight[ids]
    products = [torch.bmm(x[:, None], picked.mT)]
    ids.copy_(torch.tensor([1, -1]))
    products.append(torch.bmm(x[:, None], weight[ids].mT))
    products += [torch.bmm(rows, picked.mT) for rows in (x[:, None], x.expand(2, 2, 4))]
    return tuple(products)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_indices_that_are_written_after_use_select_as_before(mode):
    module = _Reads(_written_ids)
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets=["proj"]))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4)
    with mode():
        y = module(x)
    with torch.no_grad():
        A, B = handle.parameters()
        changed = module.proj + handle.changes["proj"].scale * B @ A
        assert error(y, _joined(_written_ids(changed, x))) < 1e-5


def _written_ends(weight, x):
    ends, rows = torch.tensor([1, 2, 2], dtype=torch.int32), x.repeat(2, 2)
    first = torch._grouped_mm(rows, weight.mT, offs=ends)
    ends.copy_(torch.tensor([0, 1, 4], dtype=torch.int32))
    return first[:2], torch._grouped_mm(rows, weight.mT, offs=ends)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch has no _grouped_mm")
def test_row_ends_that_are_written_between_products_count():
    module = _Reads(_written_ends)
    module.proj = nn.Parameter(torch.randn(3, 8, 8))
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets=["proj"]))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4)
    with torch.no_grad():
        A, B = handle.parameters()
        W = module.proj + handle.changes["proj"].scale * B @ A
        rows = x.repeat(2, 2)
        pieces = (rows[:1] @ W[0].T, rows[1:2] @ W[1].T, rows[:1] @ W[1].T, rows[1:] @ W[2].T)
        assert error(module(x), torch.cat([piece.flatten() for piece in pieces])) < 1e-5


def test_a_loaded_adapter_lies_in_memory_as_a_fresh_one(tmp_path):
    """PEFT's layout of stacks is transposed; what products read and the optimiser steps over is
    not."""
    model, _ = attach_adapter("gpt_oss", "grouped_mm", torch.float32)
    veneer.save(model, tmp_path / "adapter")
    handle = veneer.load(build("gpt_oss", torch.float32), tmp_path / "adapter", trainable=True)
    assert all(parameter.is_contiguous() for parameter in handle.parameters())
