"""Linear layers through the fused kernel: alone and with those that read the same input, in
everything that models do around them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import transformers
from tests.support.toys import bits, error, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import context
from veneer.attach.source.source_analysis import shared_input_groups
from veneer.errors import SelectionError
from veneer.kernels import cost_model


class Attention(nn.Module):
    """Three layers on one value, and a fourth on another."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, out, bias=out > 4) for out in (width, 4, 4, width)
        )
        self.o = nn.Linear(4, width)

    def forward(self, x):
        q = self.q(x)
        k, v = self.k(x), self.v(x)
        return self.o(torch.tanh(q[..., :4] * k) + v)


def adapted(module, dtype=torch.float64, **fields):
    module = module.to(dtype)
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, **fields))
    randomise(handle)
    return module, handle


def together(handle):
    """The groups that are computed together, as paths."""
    found = {
        id(part.shared_input_layers): part.shared_input_layers
        for part in handle.layers.values()
        if part.shared_input_layers is not None
    }
    paths = {id(part): path for path, part in handle.layers.items()}
    return sorted(tuple(paths[id(part)] for _, part in group.members) for group in found.values())


def reference(module, x):
    """Output and gradients by the definition, W + ΔW."""
    with context.override(path="materialised"):
        return values(module, x)


def values(module, x):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x * 1)  # with a graph of its own, as inside a model
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in veneer.Handle(module, "default").parameters()),
    ]


def same(found, wanted, bound=1e-11):
    return all(error(one, other) < bound for one, other in zip(found, wanted, strict=True))


def test_layers_that_read_one_value_are_computed_together():
    module, handle = adapted(Attention())
    assert together(handle) == [("q", "k", "v")]
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert same(values(module, x), reference(module, x))
    calls, x = [], x.requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: calls.append(t.data_ptr()) or t, lambda t: t
    ):
        module(x)
    assert calls.count(x.data_ptr()) == 1, "x is saved once for all three"


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama.modeling_llama.LlamaAttention", {("q_proj", "k_proj", "v_proj")}),
        ("llama.modeling_llama.LlamaMLP", {("gate_proj", "up_proj")}),
        ("bert.modeling_bert.BertSelfAttention", {("query", "key", "value")}),
        ("qwen3.modeling_qwen3.Qwen3Attention", {("q_proj", "k_proj", "v_proj")}),
        ("gpt2.modeling_gpt2.GPT2MLP", set()),
    ],
)
def test_what_real_models_compute_together(name, groups):
    module, _, cls = f"transformers.models.{name}".rpartition(".")
    __import__(module)
    assert set(shared_input_groups(getattr(sys.modules[module], cls))) == groups


class Branches(nn.Module):
    """Calls that look alike and are not on one value."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(4, 4) for _ in range(6))

    def forward(self, x, other=None):
        y = self.a(x)
        if other is None:  # noqa: SIM108 (a statement, where the last line has an expression)
            y = y + self.b(x)
        else:
            y = y + self.c(x)
        x = torch.tanh(x)
        y = y + self.d(x)
        return y + (self.e(x) if other is None else self.f(x))


def test_branches_and_new_values_are_not_alike():
    assert shared_input_groups(Branches) == ()
    module, handle = adapted(Branches(), targets=["a", "b", "d", "e"])
    assert together(handle) == []
    x = torch.randn(3, 4, dtype=torch.float64)
    assert same(values(module, x), reference(module, x))


class Writes(Attention):
    """Writes to its input between two calls."""

    def forward(self, x):
        x = x * 1
        q = self.q(x)
        x.mul_(2)
        return self.o(torch.tanh(q[..., :4] * self.k(x)) + self.v(x))


def test_an_input_that_was_written_to_is_another_input():
    module, handle = adapted(Writes())
    assert together(handle) == [("q", "k", "v")]
    x = torch.randn(3, 6, dtype=torch.float64)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            x = x.clone().requires_grad_(mode.__class__ is torch.enable_grad)
            y = module(x)
            with context.override(path="materialised"):
                assert error(y, module(x)) < 1e-11


def test_hooks_that_change_the_input_of_one_layer_only():
    module, _ = adapted(Attention())
    module.k.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert same(values(module, x), reference(module, x))
    outputs = []
    module.v.register_forward_hook(lambda layer, args, y: outputs.append(y))
    module(x)
    assert len(outputs) == 1


def test_an_exception_leaves_nothing_that_a_later_call_takes():
    module, _ = adapted(Attention())
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = reference(module, x)

    def broken(layer, args):
        raise ArithmeticError

    hook = module.k.register_forward_pre_hook(broken)
    hook_of_v = module.v.register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError):
        module(x)
    hook.remove()
    hook_of_v.remove()
    with pytest.raises(TypeError):
        module.q(x) + module.k(None)
    assert same(values(module, x), wanted)


def other_weight(module, handle):
    module.k.weight = nn.Parameter(module.k.weight.detach() * 2, requires_grad=False)


def written_weight(module, handle):
    with torch.no_grad():
        module.k.weight.mul_(2)


def a_step(module, handle):
    with torch.no_grad():
        handle.changes["k.weight"].B.add_(1)


def other_mode(module, handle):
    module.k.eval()


def no_bias(module, handle):
    module.k.bias = None


@pytest.mark.parametrize("change", [other_weight, written_weight, a_step, other_mode, no_bias])
def test_what_was_computed_in_advance_is_not_taken_once_a_layer_has_changed(change):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    module, handle = adapted(Three(), dropout=0.5 if change is other_mode else 0.0)
    assert together(handle) == [("q", "k", "v")]
    x = torch.randn(3, 6, dtype=torch.float64).requires_grad_() * 1
    module.train().q(x)
    change(module, handle)
    found = module.k(x)
    module.eval()
    with context.override(path="materialised"):
        assert error(found, module.k(x)) < 1e-11


@pytest.mark.parametrize("records_first", [True, False])
def test_each_call_records_gradients_as_its_own_mode_says(records_first):
    module, handle = adapted(Attention(), dropout=0.1)
    assert together(handle) == [("q", "k", "v")]
    x = torch.randn(3, 6, dtype=torch.float64).requires_grad_() * 1
    with torch.set_grad_enabled(records_first):
        module.train().q(x)
    with torch.set_grad_enabled(not records_first):
        assert module.k(x).requires_grad is not records_first


def test_rows_of_several_adapters_record_gradients_as_the_mode_says():
    module = Attention()
    for name in ("a", "b"):
        randomise(veneer.attach(module, veneer.LoraConfig(rank=2), name))
    x = torch.randn(2, 6).requires_grad_() * 1
    with veneer.use(module, ["a", "b"]):
        module.q(x)
        with torch.no_grad():
            assert not module.k(x).requires_grad
        assert module.v(x).requires_grad


def test_layers_of_one_module_keep_their_own_dropout():
    module, _ = adapted(Attention(), dropout=0.5)
    module.train().k.eval()
    found, hook = (
        [],
        module.k.register_forward_hook(lambda layer, args, y: found.append((args[0], y))),
    )
    module(torch.randn(3, 6, dtype=torch.float64).requires_grad_() * 1)
    hook.remove()
    ((x, y),) = found
    assert error(y, module.k(x)) < 1e-11


def test_a_bias_that_comes_later_counts():
    module, _ = adapted(nn.Sequential(nn.Linear(5, 4, bias=False)))
    x = torch.randn(3, 5, dtype=torch.float64)
    y = module(x)
    module[0].bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    assert error(module(x), y + 1) < 1e-12


class Heads(nn.Module):
    """What several heads say of the same features."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.a(x), self.b(x)


@pytest.mark.parametrize("frozen", [True, False])
def test_each_head_may_be_differentiated_by_itself(frozen):
    """As far as it may without adapters: features that are computed once have one graph below
    them."""
    module, handle = adapted(Heads(), targets=["a", "b"])
    assert together(handle) == [("a", "b")]
    x = torch.randn(3, 6, dtype=torch.float64)
    if frozen:
        one, other = module(x)
        one.sum().backward()
        other.sum().backward()
    else:
        one, other = module(x.requires_grad_())
        one.sum().backward(retain_graph=True)
        assert all(p.grad is None for p in handle.changes["b.weight"].parameters()), (
            "nothing was learnt of b"
        )
        other.sum().backward()
    found = [p.grad.clone() for p in handle.parameters()]
    module.zero_grad()
    with context.override(path="materialised"):
        sum(y.sum() for y in module(x)).backward()
    assert same(found, [p.grad for p in handle.parameters()])


def test_a_hook_of_backward_and_checkpointing():
    """The hook gives its layer an x of its own; what forward saves, its repetition saves too."""
    module, _ = adapted(Attention())
    module.k.register_full_backward_hook(lambda *_: None)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(6):
        checkpoint(module, x * 1, use_reentrant=False).sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_layer_called_on_its_own_output(create_graph):
    """Its input then depends on the numbers that its gradient is of."""
    module, handle = adapted(nn.Sequential(nn.Linear(5, 5)), bias="targets")
    x = torch.randn(3, 5, dtype=torch.float64)

    def gradients(**options):
        y = module(torch.tanh(module(x))).square().sum()
        return torch.autograd.grad(y, handle.parameters(), **options)

    with context.override(path="materialised"):
        wanted = gradients()
    assert same(gradients(create_graph=create_graph), wanted)


def test_backward_inside_autocast_of_a_forward_outside_it():
    module, handle = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.float32)
    x = torch.randn(3, 6, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), handle.parameters())
    y = module(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, handle.parameters())
    assert same(found, wanted, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_computes_the_same_again(reentrant, dropout):
    module, _ = adapted(Attention(), dropout=dropout)
    module.train()
    x = torch.randn(3, 6, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(5)
    wanted = values(module, x)
    outer = Checkpointed()
    x = x.clone().requires_grad_()
    for _ in range(2):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        y = outer(x * 1)
        y.square().sum().backward()
        found = [
            y.detach(),
            x.grad,
            *(p.grad for p in veneer.Handle(module, "default").parameters()),
        ]
        assert same(found, wanted, 1e-12)


def test_copies_have_groups_of_their_own():
    module, handle = adapted(Attention())
    twin = copy.deepcopy(module)
    randomise(veneer.Handle(twin, "default"))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert same(values(twin, x), reference(twin, x))
    assert same(values(module, x), reference(module, x))
    theirs = veneer.Handle(twin, "default").layers
    assert {id(m) for _, m in theirs["q"].shared_input_layers.members} == {
        id(theirs[name]) for name in "qkv"
    }
    assert handle.layers["q"].shared_input_layers is not theirs["q"].shared_input_layers


def test_an_output_may_be_written_to():
    """``nn.ReLU(inplace=True)`` follows many a linear layer."""
    module = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.Hardswish(inplace=True)
    )
    module, _ = adapted(module)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    assert same(values(module, x), reference(module, x))

    class Scaled(Attention):
        def forward(self, x):
            q = self.q(x)
            q += 1
            return self.o(torch.tanh(q[..., :4] * self.k(x).mul_(2)) + self.v(x).relu_())

    module, _ = adapted(Scaled())
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    assert same(values(module, x), reference(module, x))


@pytest.mark.parametrize("name", ["Llama", "Bert", "GPT2"])
def test_a_real_model_has_the_gradients_of_the_definition(name):
    config = {
        "Llama": transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40,
        ),
        "Bert": transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
        ),
        "GPT2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32),
    }[name]  # fmt: skip
    model = transformers.AutoModel.from_config(config).double().eval()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle, 0.05)
    groups = {"Llama": 4, "Bert": 2, "GPT2": 0}[name]
    assert len(together(handle)) == groups
    ids, found = torch.randint(40, (2, 9)), []
    for path in (None, "materialised"):
        model.zero_grad()
        with context.override(path=path):
            y = model(input_ids=ids).last_hidden_state
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append(
            [y.detach(), *(p.grad.clone() for p in handle.parameters() if p.grad is not None)]
        )
    assert same(*found, 1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_hundred_steps_lose_what_the_definition_loses(dropout):
    """The losses of float32 training are off those of float64 by no more than those of the
    definition, W + ΔW, are: a factor of the growth of rounding. With dropout, which the definition
    draws otherwise, it is that they fall alike."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    handle = veneer.attach(base, veneer.LoraConfig(rank=2, alpha=8, dropout=dropout))
    randomise(handle, 0.05)
    ids = torch.randint(40, (100, 4, 12))

    def losses(dtype, path):
        model = copy.deepcopy(base).to(dtype).train()
        optimizer = torch.optim.AdamW(
            [one for one in model.parameters() if one.requires_grad], lr=1e-2
        )
        found = []
        for batch in ids % 7 + 2:  # some words only, which can be learnt
            optimizer.zero_grad()
            with context.override(path=path):
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    exact, defined = losses(torch.float64, "materialised"), losses(torch.float32, "materialised")
    fused = losses(torch.float32, None)
    assert exact[-20:].mean() < exact[:20].mean() - 0.5
    if dropout:
        assert (fused[-20:].mean() - exact[-20:].mean()).abs() < 0.05
    else:
        assert (fused - exact).abs().max() <= 4 * (defined - exact).abs().max() + 1e-6


def test_an_adapted_linear_layer_makes_few_calls():
    """Each Python call is time in every layer of a decoding step. nn.Linear itself makes 9 in this
    counting."""

    def calls(layer, x):
        count = 0

        def seen(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        layer(x)
        sys.setprofile(seen)
        try:
            (lambda: layer(x))()
        finally:
            sys.setprofile(None)
        return count

    layer = nn.Linear(8, 8)
    assert calls(layer, torch.randn(2, 3, 8)) <= 9
    veneer.attach(layer, veneer.LoraConfig(rank=2))
    assert calls(layer, torch.randn(2, 3, 8)) <= 25
    with torch.no_grad():
        assert calls(layer, torch.randn(1, 1, 8)) <= 25


def test_the_plan_forms_weights_for_many_tokens_in_float32_only():
    few, many = (
        cost_model.costs(576, 576, 8, tokens, torch.float32, True) for tokens in (64, 4096)
    )
    assert (few.choice, many.choice) == ("factored", "materialised")
    above = cost_model.max_factored_tokens(576, 576, 8, torch.float32)
    assert 64 < above < 4096
    below, beyond = (
        cost_model.costs(576, 576, 8, int(above) + step, torch.float32, True).choice
        for step in (-1, 2)
    )
    assert (below, beyond) == ("factored", "materialised")
    assert "materialised" in str(many)
    for dtype in (torch.bfloat16, torch.float16):
        assert cost_model.max_factored_tokens(576, 576, 8, dtype) == float("inf")
        assert cost_model.costs(576, 576, 8, 10**9, dtype, True).choice == "factored"


def test_the_plan_can_be_printed_and_overridden():
    module, handle = adapted(Attention(), torch.float32)
    text = str(handle.plan(4096, training=False))
    assert "inference of 4096 tokens" in text
    assert "6 x 6 at rank 2, 1 layers" in text
    assert "materialised" in text
    assert handle.plan(4096).together == (("q", "k", "v"),)
    x, outputs = torch.randn(3, 6), []
    for path in (None, "factored", "materialised"):
        with veneer.use(module, "default", path=path):
            assert context.current.path == path
            outputs.append(module(x))
    assert same(outputs[1:], outputs[:1] * 2, 1e-5)
    with pytest.raises(SelectionError, match="'materialised'"):
        veneer.use(module, "default", path="both")


@pytest.mark.parametrize("tokens", [3, 4000])
def test_both_sides_of_the_plan_give_one_answer(tokens):
    layer, handle = adapted(nn.Linear(16, 16))
    assert 3 < handle.layers[""].fused_change.max_factored_tokens < 4000
    x = torch.randn(tokens, 16, dtype=torch.float64)
    assert same(values(layer, x), reference(layer, x))
    before = bits(layer)
    layer.bfloat16()
    assert torch.isfinite(layer(x.bfloat16())).all(), (
        "a layer that has become a 16-bit one is not formed"
    )
    assert before.keys() == bits(layer).keys()
