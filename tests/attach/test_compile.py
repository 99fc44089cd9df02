"""Exported and compiled models: for every layer kind what eager calls give, and one graph for many
adapters."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import pytest
import torch
from tests.support.models import IDS, ConvNet, TinyLM
from tests.support.toys import adapt, error, example, flat, numbers
from torch import nn

import veneer
from veneer.layers import LAYERS

# transformers' Conv1D is a kind only once transformers has been imported
import transformers.pytorch_utils  # noqa: F401  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own: deprecations, projections, tracing

kinds = pytest.mark.parametrize("kind", LAYERS.names())


@kinds
@pytest.mark.parametrize("merged", [False, True])
def test_exported_programs_equal_eager_calls(kind, merged):
    module, args = example(kind)
    adapt(module, "a")
    if merged:
        veneer.merge(module)
    expected = flat(module(*args))
    program = torch.export.export(module, args)
    assert error(flat(program.module()(*args)), expected) < 1e-6


def test_an_export_takes_the_selected_adapter_any_batch_and_a_file(tmp_path):
    model = adapt(TinyLM(tied=True, blocks=1), "a", "b").eval()
    for selection in ("b", None, ["a", "b"]):
        with veneer.use(model, selection):
            expected = model(IDS)
            sizes = (
                None
                if isinstance(selection, list)
                else ({0: torch.export.Dim("batch", min=1, max=64)},)
            )
            program = torch.export.export(model, (IDS,), dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "model.pt2")
        run = torch.export.load(tmp_path / "model.pt2").module()
        assert error(run(IDS), expected) < 1e-6
        if sizes is not None:
            assert error(run(IDS.repeat(3, 1)), expected.repeat(3, 1, 1)) < 1e-6


def counting():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    return backend, graphs


@kinds
def test_the_adapters_of_every_kind_are_one_graph(kind, monkeypatch):
    """Whatever is imported meanwhile."""
    module, args = example(kind)
    adapt(module, "a", "b", "c")
    torch._dynamo.reset()
    backend, graphs = counting()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True, allow_rnn=True):
        for name in "abca":
            monkeypatch.setitem(sys.modules, f"imported_for_{name}", ModuleType(name))
            with veneer.use(module, name), torch.no_grad():
                assert error(flat(compiled(*args)), flat(module(*args))) < 1e-5
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "make_model",
    [lambda: (TinyLM(tied=True, blocks=1), IDS), lambda: (ConvNet(), torch.randn(2, 3, 8, 8))],
    ids=["lm", "conv"],
)
def test_twelve_adapters_are_one_graph(make_model, monkeypatch):
    """Whatever is imported meanwhile."""
    model, x = make_model()
    names = [f"a{number}" for number in range(12)]
    adapt(model.eval(), *names)
    torch._dynamo.reset()
    backend, graphs = counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in (*names, *reversed(names)):
            monkeypatch.setitem(sys.modules, f"imported_for_{name}", ModuleType(name))
            with veneer.use(model, name), torch.no_grad():
                assert error(compiled(x), model(x)) < 1e-5
    assert len(graphs) == 1


def test_what_makes_another_graph_and_what_does_not():
    """Another alpha or rank is a dynamic number of the second graph, the base and mixed rows are
    other code."""
    model = TinyLM().eval()
    for number in range(6):
        adapt(model, f"a{number}", config=veneer.LoraConfig(rank=number + 2, alpha=number + 1))
    torch._dynamo.reset()
    backend, graphs = counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run(*selections):
        for selection in selections:
            with veneer.use(model, selection), torch.no_grad():
                assert error(compiled(IDS), model(IDS)) < 1e-5
        return len(graphs)

    # torch fixes the shapes of parameters unless told otherwise: without this, each rank is a graph
    dynamic = torch._dynamo.config.patch(
        force_parameter_static_shapes=False, fail_on_recompile_limit_hit=True
    )
    with dynamic:
        known = run(*model.__dict__["_veneer"].configs)
        assert known <= 3
        assert run(None) <= known + 1
        known = run(["a1", "a3"], ["a3", "a1"])
        assert run(["a4", "a1"], ["a1", "a3"], "a0", "a5") == known
        for name in ("late", "later"):
            adapt(model, name, config=veneer.LoraConfig(rank=3, alpha=9))
        known = run("late")
        assert run("later", "a2") == known
        veneer.merge(model, "late")
        known = run("late")
        veneer.unmerge(model)
        veneer.detach(model, "late")
        assert run("later", "a2") == known


def test_training_under_compile_alternates_adapters_as_eager_training_does():
    states = []
    for mode in ("eager", "compiled"):
        torch.manual_seed(0)
        model = adapt(TinyLM(tied=True), "a", "b")
        torch._dynamo.reset()
        run = (
            torch.compile(model, backend="aot_eager", fullgraph=True)
            if mode == "compiled"
            else model
        )
        optimisers = {
            n: torch.optim.SGD(veneer.Handle(model, n).parameters(), lr=0.05) for n in ("a", "b")
        }
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("a", "b", "b", "a"):
                with veneer.use(model, name):
                    nn.functional.cross_entropy(run(IDS).flatten(0, 1), IDS.flatten()).backward()
                optimisers[name].step()
                optimisers[name].zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        states.append({**numbers(model, "a"), **numbers(model, "b")})
    for key, value in states[0].items():
        assert error(states[1][key], value) < 1e-5, key


def test_inductor():
    model = adapt(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)), "a", "b")
    x = torch.randn(3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for name in ("a", "b", "a"):
            with veneer.use(model, name):
                assert error(compiled(x), model(x)) < 1e-5


def test_compiled_calls_follow_whatever_is_done_to_the_adapters():
    """Guards that miss something would show as an answer of another adapter."""
    choose = random.Random(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3)).eval(), torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    names, merged, called = [], None, set()

    def call(run, selection):
        with torch.set_grad_enabled(choose.random() < 0.3):
            if selection == "default":
                return run(x)
            with veneer.use(model, selection):
                return run(x)

    with torch._dynamo.config.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True):
        for step in range(60):
            what = choose.choice(["attach", "detach", "merge", "unmerge", "rows", *["call"] * 5])
            if what == "attach" and merged is None and len(names) < 4:
                names.append(f"n{step}")
                fields = {
                    "targets": choose.choice(["all", ["0"]]),
                    "variant": choose.choice(["lora", "dora"]),
                }
                adapt(model, names[-1], config=veneer.LoraConfig(rank=2, **fields))
            elif what == "detach" and names and merged is None:
                veneer.detach(model, names.pop(choose.randrange(len(names))))
            elif what == "merge" and names and merged is None:
                merged = choose.choice(names)
                veneer.merge(model, merged)
            elif what == "unmerge" and merged is not None:
                merged = veneer.unmerge(model)
            elif what in ("call", "rows") and (names or what == "call"):
                one = ["default"] * (len(names) < 2) + (
                    [*names, None] if names and merged is None else []
                )
                one = [merged] if merged is not None else one
                rows = what == "rows" and merged is None
                selection = (
                    [choose.choice([*names, None]) for _ in x] if rows else choose.choice(one)
                )
                called.add(str(selection))
                assert error(call(compiled, selection), call(model, selection)) < 1e-5, (
                    step,
                    selection,
                )
    assert len(called) > 5
