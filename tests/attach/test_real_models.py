"""The whole life of an adapter on real architectures: attach to everything, check, train, merge,
save, load, detach."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from tests.support.real_models import REAL, RealModel
from tests.support.toys import error
from torch import Tensor, nn

import veneer
from veneer.fileio.hashing import digest
from veneer.layers import parameter_path

CASES = {"weights": {}, "weights-and-biases": {"bias": "all"}}
every_model = pytest.mark.parametrize("entry", REAL.values(), ids=REAL)


def cases(marks):
    """Every model with every case that says something of it; ``marks`` are those of weights alone
    where there are biases too."""
    return pytest.mark.parametrize(
        ("entry", "case"),
        [
            pytest.param(
                entry,
                case,
                id=f"{name}-{case}",
                marks=marks if entry.biases and case == "weights" else (),
            )
            for name, entry in REAL.items()
            for case in CASES
            if entry.biases or case == "weights"
        ],
    )


every_case = cases(())
#: for what each parameter does by itself: who trains weights and biases trains the weights as well
fullest_case = cases(pytest.mark.slow)


def floats(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output of nested containers, in order."""
    if isinstance(output, Tensor):
        return [output.detach()] if output.is_floating_point() else []
    values = (
        output.values()
        if isinstance(output, Mapping)
        else output
        if isinstance(output, list | tuple)
        else ()
    )
    return [tensor for value in values for tensor in floats(value)]


def run(model: nn.Module, example: Mapping[str, Any]) -> list[Tensor]:
    """What the model answers in eval mode, without gradients."""
    with torch.no_grad():
        return floats(model.eval()(**example))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of one of the outputs."""
    assert len(actual) == len(expected) > 0
    return max(map(error, actual, expected))


def named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, persistent or not, under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Snapshot:
    """All that a model is: its classes, tensors, bits, ties, modes and flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = dict(named(model))
        self.bits = self.hashes()
        self.state = {key: digest(value) for key, value in model.state_dict().items()}
        self.graph = self.objects()

    def hashes(self) -> dict[str, str]:
        """The bits of the tensors that the model had when the snapshot was taken."""
        return {name: digest(tensor) for name, tensor in self.tensors.items()}

    def objects(self) -> dict[str, Any]:
        model = self.model
        return {
            "classes": [
                (path, type(module)) for path, module in model.named_modules(remove_duplicate=False)
            ],
            "attributes": {path: sorted(module.__dict__) for path, module in model.named_modules()},
            "tensors": [
                (name, id(tensor)) for name, tensor in named(model)
            ],  # names that share one are tied
            "trained": [(name, p.requires_grad) for name, p in model.named_parameters()],
            "keys": list(model.state_dict()),
        }

    def base_is_untouched(self) -> bool:
        """Also while adapters are attached: the same objects under the same names, with the same
        bits."""
        now = dict(named(self.model))
        return self.hashes() == self.bits and all(
            now[name] is tensor for name, tensor in self.tensors.items()
        )

    def is_restored(self) -> bool:
        now = {key: digest(value) for key, value in self.model.state_dict().items()}
        return self.hashes() == self.bits and now == self.state and self.objects() == self.graph


def attach(entry: RealModel, model: nn.Module, case: str) -> veneer.Handle:
    """Attach to everything; what is left out must be what the entry lists, and all of it."""
    config = veneer.LoraConfig(rank=2, targets="all", **CASES[case])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", veneer.SkippedLayers)
        handle = veneer.attach(model, config)
    text = "\n".join(
        str(warning.message) for warning in caught if warning.category is veneer.SkippedLayers
    )
    paths = re.findall(r"^\s*Found: '([^']*)'", text, flags=re.MULTILINE)
    assert bool(text) == bool(paths), text
    assert not [
        path for path in paths if not any(fnmatchcase(path, glob) for glob in entry.skipped)
    ], text
    assert not [
        glob for glob in entry.skipped if not any(fnmatchcase(path, glob) for path in paths)
    ], text
    return handle


def train(handle: veneer.Handle, example: Mapping[str, Any], loss, steps: int = 3) -> list[float]:
    """The losses of a few steps in train mode."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        value = loss(handle.model.train()(**example))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    handle.model.eval()
    return losses


def trained(entry: RealModel, case: str) -> tuple[veneer.Handle, dict[str, Any]]:
    model, example, loss = entry.build()
    handle = attach(entry, model, case)
    train(handle, example, loss)
    return handle, example


@every_model
def test_the_example_reaches_every_parameter(entry):
    """Of the registry, not of Veneer: where an example reaches nothing, the tests below would prove
    nothing."""
    model, example, loss = entry.build()
    loss(model(**example)).backward()
    sizes = {
        name: None if p.grad is None else p.grad.abs().max().item()
        for name, p in model.named_parameters()
    }
    typical = torch.tensor([size for size in sizes.values() if size is not None]).median().item()
    dark = [name for name, size in sizes.items() if size is None or size < 1e-5 * typical]
    listed = [*entry.no_gradient, *entry.fixed]
    assert not [name for name in dark if not any(fnmatchcase(name, glob) for glob in listed)]
    assert not [glob for glob in listed if not any(fnmatchcase(name, glob) for name in dark)]


@every_model
def test_a_build_is_the_same_each_time(entry):
    (first, example, loss), (second, again, _) = entry.build(), entry.build()
    assert Snapshot(first).bits == Snapshot(second).bits
    assert same(run(first, example), run(second, again))
    assert loss(first(**example)).item() == loss(second(**again)).item()


@every_case
def test_attaching_changes_nothing_and_everything_is_seen(entry, case):
    model, example, _ = entry.build()
    before, plain = Snapshot(model), run(model, example)
    handle = attach(entry, model, case)
    assert same(run(model, example), plain)
    assert before.base_is_untouched()
    report = veneer.check(model, example)
    trained = {
        parameter_path(path, own)
        for path, part in handle.layers.items()
        for own, _ in part.full.named_parameters()
    }
    assert set(report.weights) <= set(handle.changes) | trained
    assert len(report.weights) == len(
        {id(p) for p in handle.parameters()} - {id(c.A) for c in handle.changes.values()}
    )
    packed = [change for change in handle.changes.values() if change.storage.name != "plain"]
    assert report.compared == len(report.weights) - len(packed)
    assert same(run(model, example), plain)
    assert before.base_is_untouched()


@every_case
def test_training_moves_the_adapter_alone(entry, case):
    model, example, loss = entry.build()
    before, plain = Snapshot(model), run(model, example)
    handle = attach(entry, model, case)
    start = {name: parameter.detach().clone() for name, parameter in handle.named_parameters()}
    losses = train(handle, example, loss)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    frozen_input = [
        name for name, parameter in handle.named_parameters() if torch.equal(parameter, start[name])
    ]
    dark = [
        glob.replace(".bias", "*.bias") for glob in entry.no_gradient
    ]  # the adapter's own copy of the bias
    assert not [name for name in frozen_input if not any(fnmatchcase(name, glob) for glob in dark)]
    assert before.base_is_untouched()
    assert distance(run(model, example), plain) > 1e-3
    with veneer.use(model, None):
        assert same(run(model, example), plain)


@fullest_case
def test_merging_is_exact_and_unmerging_restores_the_bits(entry, case):
    handle, example = trained(entry, case)
    model = handle.model
    before, adapted = Snapshot(model), run(model, example)
    report = handle.merge()
    assert report.retention > 0.999
    assert distance(run(model, example), adapted) < 1e-5
    handle.unmerge()
    assert before.is_restored()
    assert same(run(model, example), adapted)


@fullest_case
def test_a_saved_adapter_gives_the_same_answers_on_an_equal_base(entry, case, tmp_path):
    handle, example = trained(entry, case)
    adapted = run(handle.model, example)
    folder = handle.save(tmp_path / "adapter")
    fresh, _, _ = entry.build()
    before, plain = Snapshot(fresh), run(fresh, example)
    loaded = veneer.load(
        fresh, folder, trainable=True
    )  # PyTorch may multiply in another order where nothing trains
    assert same(run(fresh, example), adapted)
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    assert distance(run(fresh, example), adapted) < 1e-6
    assert before.base_is_untouched()
    loaded.detach()
    assert before.is_restored()
    assert same(run(fresh, example), plain)


@fullest_case
def test_detaching_gives_back_the_very_model(entry, case):
    model, example, loss = entry.build()
    before, plain = Snapshot(model), run(model, example)
    handle = attach(entry, model, case)
    train(handle, example, loss)
    handle.merge()
    handle.unmerge()
    handle.detach()
    assert before.is_restored()
    assert same(run(model, example), plain)
