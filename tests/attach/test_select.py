"""Selection belongs to the call: threads, tasks, exceptions, compiled models, checkpointing, and
the library's own trainers."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch
from tests.support.models import IDS, ConvNet, TinyLM
from tests.support.toys import Squared, error, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import context
from veneer.errors import CheckError, SelectionError


def two_adapters(model=None):
    model = model or TinyLM()
    for name in ("a", "b"):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"), name))
    outputs = {}
    for name in ("a", "b", None):
        with veneer.use(model, name), torch.no_grad():
            outputs[name] = model(IDS)
    assert error(outputs["a"], outputs["b"]) > 1e-3
    assert error(outputs["a"], outputs[None]) > 1e-3
    return model, outputs


def test_selection_nests_and_ends_with_its_block():
    model, outputs = two_adapters()
    with torch.no_grad(), veneer.use(model, "a"):
        with veneer.use(model, "b"):
            assert torch.equal(model(IDS), outputs["b"])
            with veneer.use(model, None):
                assert torch.equal(model(IDS), outputs[None])
        assert torch.equal(model(IDS), outputs["a"])
    handle = veneer.Handle(model, "b")
    with torch.no_grad(), handle.use():
        assert torch.equal(model(IDS), outputs["b"])


def test_one_selection_may_be_entered_by_several_threads():
    model, outputs = two_adapters()
    selection, wrong, barrier = veneer.use(model, "b"), [], threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(50):
            with torch.no_grad(), selection:
                wrong.append(not torch.equal(model(IDS), outputs["b"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == [False] * 200


def test_several_adapters_and_none_selected_is_an_error():
    model, outputs = two_adapters()
    with pytest.raises(SelectionError, match=r"2 adapters \(a, b\) and none selected"):
        model(IDS)
    veneer.detach(model, "b")
    assert torch.equal(model(IDS), outputs["a"])


def test_unknown_names_and_models_without_adapters():
    model, _ = two_adapters()
    with pytest.raises(SelectionError, match="no adapter named 'c'"):
        veneer.use(model, "c")
    with pytest.raises(SelectionError, match="no adapter on this Linear"):
        veneer.use(nn.Linear(2, 2), None)
    with pytest.raises(SelectionError, match="and no name"):
        veneer.merge(model)


def test_a_bare_use_is_no_silent_no_op():
    model, _ = two_adapters()
    with pytest.warns(UserWarning, match="only inside a `with` block"):
        veneer.use(model, "a")


def test_an_exception_leaves_no_trace():
    model, outputs = two_adapters()
    before = context.current
    with pytest.raises(ZeroDivisionError), veneer.use(model, "a"):
        raise ZeroDivisionError
    with pytest.raises(IndexError), veneer.use(model, "a"):
        model(IDS + 1000)
    assert context.current is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with veneer.use(model, "b"), torch.no_grad():
        assert torch.equal(model(IDS), outputs["b"])


def test_two_threads_two_adapters_while_a_third_attaches_and_detaches():
    model, outputs = two_adapters()
    wrong, errors, done = [], [], threading.Event()

    def call(name):
        try:
            for _ in range(300):
                with veneer.use(model, name), torch.no_grad():
                    if not torch.equal(model(IDS), outputs[name]):
                        wrong.append(name)
        except Exception as error:  # a thread's exception would be lost
            errors.append(error)

    def churn():
        while not done.is_set():
            veneer.attach(model, veneer.LoraConfig(rank=1), "c")
            veneer.detach(model, "c")

    threads = [threading.Thread(target=call, args=(name,)) for name in ("a", "b", None)]
    third = threading.Thread(target=churn)
    for thread in (*threads, third):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    third.join()
    assert not errors
    assert not wrong


def test_two_asyncio_tasks_two_adapters():
    model, outputs = two_adapters()

    async def call(name):
        wrong = 0
        for _ in range(100):
            with veneer.use(model, name):
                await asyncio.sleep(0)
                wrong += not torch.equal(model(IDS), outputs[name])
        return wrong

    async def both():
        return await asyncio.gather(call("a"), call("b"), call(None))

    assert asyncio.run(both()) == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")  # torch.compile's own deprecations
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_follow_the_selection(backend):
    model, outputs = two_adapters()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for name in ("a", "b", None, "a", "b"):
        with veneer.use(compiled, name), torch.no_grad():
            assert error(compiled(IDS), outputs[name]) < 1e-5

    async def call(name):
        wrong = 0
        for _ in range(20):
            with veneer.use(model, name):
                await asyncio.sleep(0)
                wrong += error(compiled(IDS), outputs[name]) > 1e-5
        return wrong

    async def both():
        return await asyncio.gather(call("a"), call("b"))

    assert asyncio.run(both()) == [0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: (TinyLM(tied=True, blocks=1), IDS),
                                  lambda: (ConvNet().eval(), torch.randn(2, 3, 8, 8)),
                                  lambda: (Squared(6, 6), torch.randn(2, 6))])  # fmt: skip
def test_compiled_training_gives_the_same_gradients(make):
    model, x = make()
    torch._dynamo.reset()
    ranks = {"depthwise": 1} if isinstance(model, ConvNet) else {}
    bias = "none" if isinstance(model, Squared) else "targets"
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", ranks=ranks, bias=bias))
    randomise(handle)
    model(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in handle.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for parameter, gradient in zip(handle.parameters(), expected, strict=True):
        assert error(parameter.grad, gradient) < 5e-4  # float32 alone is 7e-5 off here


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return checkpoint(lambda x: torch.tanh(self.second(x)), x, use_reentrant=reentrant)

    model = Checkpointed()
    handles = {
        name: veneer.attach(model, veneer.LoraConfig(rank=2, dropout=0.3), name)
        for name in ("a", "b")
    }
    for handle in handles.values():
        randomise(handle)
    x = torch.randn(4, 6)

    def gradients(run):
        model.zero_grad()
        torch.manual_seed(5)
        with veneer.use(model, "b"):
            run(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in handles["b"].parameters()]

    plain = gradients(lambda x: torch.tanh(model.second(torch.tanh(model.first(x)))))
    for found, expected in zip(gradients(model), plain, strict=True):
        assert error(found, expected) < 1e-6
    assert all(parameter.grad is None for parameter in handles["a"].parameters())


def test_inference_mode():
    model, outputs = two_adapters()
    with torch.inference_mode(), veneer.use(model, "a"):
        assert torch.equal(model(IDS), outputs["a"])


class Bypassing(nn.Module):
    """Reads weights directly in eval mode, one of them so that its code does not show which, never
    calls another layer, and detaches the last."""

    def __init__(self):
        super().__init__()
        self.seen, self.read, self.hidden, self.unused, self.cut = (
            nn.Linear(4, 4) for _ in range(5)
        )

    def forward(self, x):
        x = self.seen(x)
        x = x + (
            nn.functional.linear(x, self.read.weight)
            if not torch.is_grad_enabled()
            else self.read(x)
        )
        if not torch.is_grad_enabled():
            x = nn.functional.linear(x, dict(self.named_parameters())["hidden.weight"])
        else:
            x = self.hidden(x)
        return x + self.cut(x).detach()


def test_check_names_what_the_output_does_not_see():
    model = Bypassing()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    training = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    with pytest.raises(CheckError) as caught:
        veneer.check(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    message = str(caught.value)
    assert "'hidden.weight' (Linear) is not reached in eval mode" in message
    assert "'unused.weight' (Linear) is not reached" in message
    assert "'cut.weight' (Linear) receives no gradient" in message
    assert "'read.weight'" not in message, "a weight that is read directly is seen too"
    assert "'seen.weight'" not in message
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in handle.parameters()
    )


class Steep(nn.Module):
    """Its gradient turns over so fast that float32 has nothing of it left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.first(x) * 1e7)


def test_check_tells_rounding_from_a_weight_that_is_not_seen():
    model = Steep()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["first"]))
    before = {
        name: (id(one), one.data_ptr(), one.clone())
        for name, one in model.state_dict(keep_vars=True).items()
    }
    assert veneer.check(model, torch.randn(3, 4)).compared == 1
    for name, one in model.state_dict(keep_vars=True).items():
        assert before[name][:2] == (id(one), one.data_ptr())
        assert torch.equal(before[name][2], one)
    assert all(one.dtype == torch.float32 for one in handle.parameters())


def test_check_passes_and_says_so():
    model = ConvNet().eval()
    veneer.attach(model, veneer.LoraConfig(rank=1, targets="all", train_also=["norm"]))
    statistics = model.norm.running_mean.clone()
    report = veneer.check(model, {"x": torch.randn(2, 3, 8, 8)})
    assert "all 6 changes reach the output and receive a gradient, 6 of them that of W + ΔW" in str(
        report
    )
    assert torch.equal(model.norm.running_mean, statistics)


def test_a_check_uses_no_cudnn_whose_recurrent_layers_have_no_backward_in_eval_mode():
    """Also after a setting of torch for which ``cudnn.flags`` raises an error."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(5, 4)

        def forward(self, x):
            used.append(torch.backends.cudnn.enabled)
            return self.lstm(x)[0]

    used: list[bool] = []
    model = Recurrent().eval()
    veneer.attach(model, veneer.LoraConfig(rank=1, targets="all"))
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        veneer.check(model, torch.randn(3, 2, 5))
        veneer.detach(model)
        config = veneer.LoraConfig(rank=1, targets="all", variant="lora_ga")
        veneer.attach(
            model, config, batches=[torch.randn(3, 2, 5)], loss=lambda m, x: m(x).square().sum()
        )
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert used
    assert not any(used)
    assert torch.backends.cudnn.enabled


class Rerun(torch.autograd.Function):
    """Calls ``model`` again in backward, in a context without a selection: what a GPU's backward
    threads do when activation checkpointing runs a layer again."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            ctx.model.rerun = contextvars.Context().run(ctx.model, IDS)
        return gradient, None


def test_layers_that_run_again_during_backward_keep_the_selection_of_its_caller():
    model, outputs = two_adapters()
    x = torch.zeros(1, requires_grad=True)
    for name in ("a", "b"):
        with veneer.use(model, name):
            Rerun.apply(x, model).sum().backward()
        assert torch.equal(model.rerun, outputs[name])
    with pytest.raises(SelectionError, match="none selected"):
        model(IDS)  # outside backward nothing lingers
    with pytest.raises(SelectionError, match="none selected"):
        Rerun.apply(x, model).sum().backward()


@pytest.mark.parametrize("selection", [None, ["a", None]], ids=str)
def test_layers_that_run_again_during_backward_do_not_fall_back_to_the_only_adapter(selection):
    model, _ = two_adapters()
    veneer.detach(model, "b")
    x = torch.zeros(1, requires_grad=True)
    with veneer.use(model, selection):
        expected = model(IDS)
        Rerun.apply(x, model).sum().backward()
    assert torch.equal(model.rerun, expected)
    Rerun.apply(x, model).sum().backward()
    assert torch.equal(model.rerun, model(IDS))


class Gated(nn.Module):
    """A block whose gate starts at zero, as LayerScale, ReZero and zero convolutions do."""

    def __init__(self, gates=1):
        super().__init__()
        self.down, self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(8)) for _ in range(gates)])
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        change = self.up(torch.relu(self.down(x)))
        return self.head(x + sum(gate * change for gate in self.gates))


GATED = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_check_names_the_zero_weight_that_stands_before_the_output():
    model = Gated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = {name: value.data_ptr() for name, value in model.named_parameters()}
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["down", "up", "head"]))
    with pytest.raises(CheckError, match="2 problems") as caught:
        veneer.check(model, GATED)
    message = str(caught.value)
    for name in ("down", "up"):
        assert (
            f"'{name}.weight' (Linear) receives no gradient: every path from it to the output goes through"
            in message
        )
    assert "exactly zero and do not train: 'gates.0'." in message
    assert "bias" not in message, "a bias of zeros only adds"
    assert "'head.weight'" not in message
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
            assert parameter.data_ptr() == memory[name]


def test_check_names_every_zero_weight_of_ways_that_lie_side_by_side():
    model = Gated(gates=2)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["down"]))
    with pytest.raises(CheckError, match=r"do not train: 'gates\.0', 'gates\.1'"):
        veneer.check(model, GATED)


def test_check_lets_a_zero_weight_pass_that_trains():
    model = Gated()
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["down", "up", "gates.0"]))
    assert len(veneer.check(model, GATED).weights) == 3


def test_check_of_a_way_that_is_cut_names_no_weight():
    model = Bypassing()
    nn.init.zeros_(model.seen.bias)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["cut"]))
    with pytest.raises(
        CheckError,
        match=r"'cut\.weight' \(Linear\) receives no gradient\. Expected: a layer that the",
    ):
        veneer.check(model, GATED[:, :4])


class ReadsMore(nn.Linear):
    """Looks at its weight before it uses it, and at all of its parameters."""

    def forward(self, x):
        weights = dict(self._parameters)
        assert {name for name, _ in self.named_parameters(recurse=False)} >= set(weights)
        x = x.to(self.weight.dtype) + self._parameters.get("weight").mean() * 0
        return nn.functional.linear(x, weights["weight"].mT.contiguous().mT, self.bias)


@pytest.mark.parametrize("variant", ["lora", "dora", "lokr", "pissa"])
def test_check_compares_whoever_reads_the_weight_and_however(variant):
    model = nn.Sequential(ReadsMore(4, 5), nn.LSTM(5, 4), First(), nn.Linear(4, 4))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all-linear", variant=variant))
    tables = [module._parameters for module in model.modules()]
    report = veneer.check(model, torch.randn(2, 3, 4))
    assert report.compared == len(report.weights) == len(handle.changes)
    assert all(
        module._parameters is table for module, table in zip(model.modules(), tables, strict=True)
    )


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]
