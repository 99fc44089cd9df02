"""How models are run: function transforms, inference mode, autocast, memory formats, checkpointing,
threads, hooks, shared layers. Every layer kind is found through the registry."""

from __future__ import annotations

import asyncio
import copy
import itertools
import sys
import threading
import traceback

import pytest
import torch
from tests.support.cells import pairwise
from tests.support.models import IDS, ConvNet, Shared, Stack, TinyLM
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, bits, cast, error, example, flat, numbers, randomise, selected
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

import veneer
from veneer.bases import weight_of
from veneer.layers import LAYERS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

#: torch tells once that it has no faster kernel for projections
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
examples = pytest.mark.parametrize(("kind", "number"), EXAMPLES)
kinds = pytest.mark.parametrize("kind", LAYERS.names())


def plainly(model, name="a"):
    """A plain copy of the model with the merged weights of an adapter."""
    other = copy.deepcopy(model)
    veneer.merge(other, name)
    veneer.detach(other, keep_merged=True)
    assert not any("veneer" in key for key in other.state_dict())
    return other


def works(function) -> bool:
    """Whether torch can do this at all."""
    try:
        function()
    except (RuntimeError, NotImplementedError):
        return False
    return True


# ---- torch.func
# -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore"
)  # torch's own, on rules for batches that it has not written yet
@examples
def test_function_transforms_over_an_adapters_numbers(kind, number):
    module, args = example(kind, number, torch.float64)

    def run(values):
        return flat(functional_call(module, values, args))

    def pair(values):
        return {key: torch.stack([value, 1.1 * value]) for key, value in values.items()}

    base = {key: p.detach() for key, p in module.named_parameters()}
    can_grad = works(lambda: grad(lambda values: run(values).sum())(base))
    can_vmap = works(lambda: vmap(run)(pair(base)))
    can_jvp = works(lambda: jvp(run, (base,), (base,)))
    adapt(module, "a")
    own = numbers(module)
    other = {key: value + 0.1 * torch.randn_like(value) for key, value in own.items()}
    before, replaced = flat(module(*args)), run(other)
    assert error(replaced, before) > 1e-3
    assert torch.equal(flat(module(*args)), before), "functional_call left something behind"
    edited = copy.deepcopy(module)
    edited.load_state_dict(other, strict=False)
    assert error(flat(edited(*args)), replaced) < 1e-12

    edited.zero_grad()
    flat(edited(*args)).square().sum().backward()
    if can_grad:
        gradients = grad(lambda values: run(values).square().sum())(other)
        for key, parameter in edited.named_parameters():
            if key in own:
                assert error(gradients[key], parameter.grad) < 1e-10
    if can_vmap:
        assert (
            error(
                vmap(run)(pair(own)), torch.stack([run(value) for value in _unstacked(pair(own))])
            )
            < 1e-10
        )
    if (
        can_jvp and getattr(module, "max_norm", None) is None
    ):  # to torch, that scale has no derivative
        step = {key: torch.randn_like(value) for key, value in own.items()}
        tangent = jvp(run, (own,), (step,))[1]
        ahead, behind = (
            {key: own[key] + sign * step[key] for key in own} for sign in (1e-6, -1e-6)
        )
        assert error((run(ahead) - run(behind)) / 2e-6, tangent) < 1e-5
    assert can_grad or kind == "recurrent"
    assert can_vmap or kind.startswith("recurrent")


def _unstacked(values):
    return [{key: value[number] for key, value in values.items()} for number in range(2)]


def test_gradients_of_each_row_by_vmap_follow_the_selection():
    model = adapt(TinyLM(), "a", "b")
    own = {name: numbers(model, name) for name in ("a", "b")}

    def loss(values, ids):
        return functional_call(model, values, (ids[None],)).square().mean()

    for name in ("a", "b"):
        with veneer.use(model, name):
            rows = vmap(grad(loss), in_dims=(None, 0))(own[name], IDS)
            for number, ids in enumerate(IDS):
                model.zero_grad()
                model(ids[None]).square().mean().backward()
                for key, parameter in model.named_parameters():
                    if key in own[name]:
                        assert error(rows[key][number], parameter.grad) < 1e-4
                    else:
                        assert parameter.grad is None


# ---- gradients off, autocast, memory formats
# --------------------------------------------------------------------


@examples
def test_inference_mode_inside_and_outside(kind, number):
    module, args = example(kind, number)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.inference_mode():
        adapt(module, "a")
        inside = flat(module(*args))
        veneer.merge(module)
        merged = flat(module(*args))
    with torch.no_grad():
        assert torch.equal(flat(module(*args)), merged)
    assert error(merged, inside) < 1e-5
    veneer.unmerge(module)
    with torch.no_grad():
        assert torch.equal(flat(module(*args)), inside)
    # with gradients another kernel may compute a single row, which rounds in another order
    assert error(flat(module(*args)), inside) < 1e-6
    flat(module(*args)).square().sum().backward()  # what was attached inside can be trained outside
    for key, parameter in module.named_parameters():
        assert (parameter.grad is not None) == ("veneer" in key)
    veneer.merge(module)
    with torch.inference_mode():
        veneer.unmerge(module)
        assert torch.equal(flat(module(*args)), inside)
        veneer.detach(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    adapt(module, "b")
    flat(module(*args)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in veneer.Handle(module, "b").parameters())


@examples
def test_autocast_gives_what_merged_weights_give(kind, number):
    module, args = example(kind, number)
    plain = plainly(adapt(module, "a"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = (_leaves(model(*args)) for model in (module, plain))
    assert [leaf.dtype for leaf in actual] == [leaf.dtype for leaf in expected]
    assert error(flat(actual).float(), flat(expected).float()) < 2e-2


def _leaves(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "make_model", [lambda: (TinyLM(), IDS), lambda: (ConvNet(), torch.randn(4, 3, 8, 8))]
)
def test_autocast_on_whole_models(make_model):
    model, x = make_model()
    plain = plainly(adapt(model.eval(), "a", size=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), plain(x)
        actual.float().square().mean().backward()
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert error(actual.float(), expected.float()) < 3e-2
    assert all(p.grad.dtype == p.dtype for p in veneer.Handle(model, "a").parameters())


IMAGES = [
    example
    for example in EXAMPLES
    if example[0] in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")
]


@pytest.mark.parametrize(
    ("kind", "number", "variant", "weights"),
    pairwise(itertools.product(IMAGES, ["lora", "dora"], [False, True])),
)
def test_channels_last_stays_channels_last(kind, number, variant, weights):
    module, (x,) = example(kind, number)
    memory = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    adapt(module, "a", config=veneer.LoraConfig(rank=2, variant=variant, targets="all"))
    with torch.no_grad():
        expected = module(x)
        plain = plainly(module)
        if weights:
            module, plain = module.to(memory_format=memory), plain.to(memory_format=memory)
        y, wanted = (model(x.contiguous(memory_format=memory)) for model in (module, plain))
        assert error(y, expected) < 1e-5
        assert y.is_contiguous(memory_format=memory) == wanted.is_contiguous(memory_format=memory)
        weight = weight_of(module, "weight")
        strides = weight.stride()
        veneer.merge(module)
        assert weight.stride() == strides
        veneer.unmerge(module)
        assert weight.stride() == strides


# ---- activation checkpointing, threads, tasks
# -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # transformers' own, on what it turns off while checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("selection", ["b", ["b", None, "b"]], ids=str)
def test_gradient_checkpointing_of_a_llama(reentrant, selection):
    model = tiny_model().train()
    ids = torch.arange(24).view(3, 8)
    adapt(model, "a", "b", config=veneer.LoraConfig(rank=2, dropout=0.2 if selection == "b" else 0))

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        with veneer.use(model, selection):
            model(input_ids=ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    model.enable_input_require_grads()  # reentrant checkpointing needs it; dropout then draws once for q, k and v
    expected = gradients()
    assert set(expected) == set(numbers(model, "b"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = gradients()
    assert set(actual) == set(expected)
    assert all(error(actual[key], value) < 1e-5 for key, value in expected.items())


@pytest.fixture
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching_often")
def test_threads_and_tasks_while_another_attaches_saves_and_detaches(tmp_path):
    model = adapt(Stack().eval(), "a", "b")
    expected = {name: selected(model, name, IDS) for name in ("a", "b", None)}
    assert error(expected["a"], expected["b"]) > 1e-3
    wrong, raised, changes, done = [], [], [], threading.Event()

    def guarded(function):
        def run(*args):
            try:
                function(*args)
            except Exception:  # a thread's exception would be lost
                raised.append(traceback.format_exc())

        return run

    def call(name):
        for _ in range(250):
            if not torch.equal(selected(model, name, IDS), expected[name]):
                wrong.append(name)

    def change():
        while not done.is_set():
            name = f"c{len(changes)}"
            adapt(model, name)
            veneer.save(model, tmp_path / "c", name=name, overwrite=True)
            veneer.detach(model, name)
            changes.append(name)

    async def task(name):
        for _ in range(250):
            with veneer.use(model, name):
                await asyncio.sleep(0)
                if not torch.equal(model(IDS), expected[name]):
                    wrong.append(name)

    async def both():
        await asyncio.gather(task("a"), task("b"), task(None))

    @torch.no_grad()  # around both tasks: torch keeps it for the thread, not for a task
    def tasks():
        asyncio.run(both())

    other = threading.Thread(target=guarded(change))
    other.start()
    threads = [threading.Thread(target=guarded(call), args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guarded(tasks)()
    done.set()
    other.join()
    assert not raised
    assert not wrong
    assert len(changes) > 2


# ---- hooks, and modules that are called more than once
# ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # for an input of indices
@examples
def test_hooks_fire_once_a_call(kind, number):
    module, args = example(kind, number)
    fired = []

    def watch(moment):
        module.register_forward_pre_hook(lambda *_: fired.append(f"pre {moment}"))
        module.register_forward_hook(lambda *_: fired.append(f"forward {moment}"))
        if not isinstance(args[0], PackedSequence):
            module.register_full_backward_hook(lambda *_: fired.append(f"backward {moment}"))

    watch("before")
    adapt(module, "a", "b")
    watch("after")
    count = 4 if isinstance(args[0], PackedSequence) else 6
    for name in ("a", None):
        fired.clear()
        with veneer.use(module, name):
            y = flat(module(*pytree.tree_map(_leaf, args)))
            if y.requires_grad:
                y.sum().backward()
        assert len(fired) == len(set(fired)) == (count if y.requires_grad else 4)
    veneer.detach(module)
    fired.clear()
    module(*args)
    assert sorted(fired) == ["forward after", "forward before", "pre after", "pre before"]


def _leaf(leaf):
    floats = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.clone().requires_grad_() if floats else leaf


class Twice(nn.Module):
    """One module under two names, called twice."""

    def __init__(self, module) -> None:
        super().__init__()
        self.one = self.two = module

    def forward(self, *args):
        return torch.cat([flat(self.one(*args)), flat(self.two(*_scaled(args))).square()])


def _scaled(args):
    return cast(pytree.tree_map(lambda x: x * 0.5 if _is_float(x) else x, args), torch.float64)


def _is_float(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


@examples
def test_the_gradient_of_a_module_that_is_called_twice_is_the_sum(kind, number):
    module, args = example(kind, number, torch.float64)
    model = adapt(Twice(module), "a")
    own = numbers(model)
    model(*args).sum().backward()
    actual = {key: p.grad for key, p in model.named_parameters() if key in own}
    model.zero_grad()
    for part in (flat(model.one(*args)), flat(model.two(*_scaled(args))).square()):
        part.sum().backward()  # accumulates
    assert set(actual) == set(own)
    assert all(
        error(actual[key], p.grad) < 1e-10 for key, p in model.named_parameters() if key in own
    )


def albert():
    from transformers import AlbertConfig, AlbertModel

    sizes = {
        "embedding_size": 8,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return AlbertModel(
        AlbertConfig(vocab_size=17, num_hidden_layers=3, max_position_embeddings=16, **sizes)
    ).eval()


@pytest.mark.parametrize("make_model", [albert, Shared])
def test_shared_layers_against_autograd_through_the_changed_weights(make_model):
    model = make_model().double()
    x = torch.randn(3, 6, dtype=torch.float64) if isinstance(model, Shared) else IDS
    plain = copy.deepcopy(model)
    with torch.no_grad():
        base = flat(model(x))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    flat(model(x)).square().sum().backward()
    weights = {path: dict(plain.named_parameters())[path].detach() for path in handle.changes}
    leaves = {path: (c.A.detach().clone().requires_grad_(), c.B.detach().clone().requires_grad_(), c.scale)
              for path, c in handle.changes.items()}  # fmt: skip
    values = {path: weights[path] + scale * B[0] @ A[0] for path, (A, B, scale) in leaves.items()}
    y = flat(functional_call(plain, values, (x,)))
    assert error(y, base) > 1e-3
    y.square().sum().backward()
    for path, change in handle.changes.items():
        assert error(change.A.grad, leaves[path][0].grad) < 1e-10
        assert error(change.B.grad, leaves[path][1].grad) < 1e-10


class Remembering(nn.Module):
    """Writes to itself in forward: a counter, a cache, a buffer; and drops an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.calls = 0
        self.fresh = True

    def forward(self, x):
        self.calls += 1
        self.last = x
        self.register_buffer("mean", x.detach().mean(0))
        if hasattr(self, "fresh"):
            del self.fresh
        return x @ self.weight


class Reading(nn.Module):
    """Calls what is below, and reads a weight of it directly."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": Remembering()})

    def forward(self, x):
        return self.inner["layer"](x) + x @ self.inner["layer"].weight


@pytest.mark.parametrize("make_model", [Remembering, Reading])
def test_what_forward_writes_to_a_module_stays(make_model):
    model, x = adapt(make_model(), "a", "b"), torch.randn(3, 4)
    module = model if make_model is Remembering else model.inner["layer"]
    y = []
    for name in ("a", "b", "a"):
        with veneer.use(model, name):
            y.append(model(x))
    assert torch.equal(y[0], y[2])
    assert module.calls == 3
    assert module.last is x
    assert torch.equal(module.mean, x.mean(0))
    assert not hasattr(module, "fresh")
    assert "mean" in dict(module.named_buffers())


@examples
def test_a_call_leaves_a_module_as_the_base_leaves_it(kind, number):
    """Other threads may run the base on it meanwhile, so nothing of an adapter may stay."""
    module, args = example(kind, number)
    module(*args)
    adapt(module, "a", "b")

    def state():
        own = {
            path: {k: id(v) for k, v in part.__dict__.items()}
            for path, part in module.named_modules()
        }
        return own, bits(module)

    (before, values) = state()
    weights = list(
        getattr(module, "_flat_weights", [])
    )  # which a recurrent layer hands to its kernel
    for train in (True, False):
        module.train(train)
        selected(module, "a", *args)
        with veneer.use(module, "b"):
            flat(module(*args))
    after, now = state()
    assert after == before
    assert all(torch.equal(now[key], value) for key, value in values.items())
    assert all(
        one is other
        for one, other in zip(getattr(module, "_flat_weights", []), weights, strict=True)
    )
