"""A merge and a check hold one layer beside the model, and a merge that cannot end leaves every bit
as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.toys import bits, error, randomise
from torch import nn
from torch.profiler import ProfilerActivity, profile

import veneer
from veneer.attach.layer.lookup import need_adapters
from veneer.bases import BASES
from veneer.errors import MergeError

SIZE, LAYERS = 1024, 8


def peak(run) -> int:
    """Bytes that torch held at most while this ran, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        run()
    events = [
        (e.start_ns(), e.nbytes())
        for e in seen.profiler.kineto_results.events()
        if e.name() == "[memory]"
    ]
    now = most = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        most = max(most, now)
    return most


def deep(dtype=torch.bfloat16, **more):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).to(dtype)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, **more))
    randomise(handle, 0.02)
    return model, handle, SIZE * SIZE * dtype.itemsize


def test_the_peak_is_measured():
    assert peak(lambda: torch.empty(1 << 20)) == 4 << 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("rounding", ["nearest", "auto"])
def test_a_merge_that_keeps_nothing_ends_with_no_copy(dtype, variant, rounding):
    """While it runs it holds a copy of what changes, which undoes it if it fails."""
    _, handle, layer = deep(dtype, variant=variant)
    assert peak(lambda: handle.merge(keep=False, rounding=rounding)) <= (LAYERS + 4) * layer
    assert not any("backup" in module.__dict__ for module in handle.changes.values())


def test_a_merge_holds_a_copy_of_what_changes_and_two_layers():
    model, handle, layer = deep()
    before = bits(model)
    assert peak(handle.merge) <= (LAYERS + 2) * layer
    assert peak(handle.unmerge) <= 2 * layer
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_check_holds_six_layers_at_most(dtype):
    model, _, layer = deep(dtype)
    x = torch.randn(2, SIZE).to(dtype)
    veneer.check(model, x)
    assert peak(lambda: veneer.check(model, x)) <= 6 * layer


def test_check_of_a_gain_holds_no_second_model():
    model, _, layer = deep(variant="dora")
    x = torch.randn(2, SIZE).bfloat16()
    veneer.check(model, x)
    assert peak(lambda: veneer.check(model, x)) <= LAYERS * layer


def full(**more):
    model = TinyLM(**more)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, train_also=["norm"], bias="targets"))
    randomise(handle)
    return model, handle


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_merge_that_keeps_nothing_puts_back_what_it_wrote(monkeypatch, at):
    model, handle = full()
    before, output = bits(model), model(IDS)
    plain = type(BASES["plain"])
    write, calls = plain.write, []

    def failing(self, weight, stored):
        calls.append(1)
        write(self, weight, stored)
        if len(calls) == at:
            raise MemoryError("no room")

    monkeypatch.setattr(plain, "write", failing)
    with pytest.raises(MemoryError, match="no room"):
        handle.merge(keep=False)
    assert len(calls) == 2 * at, "what was written is written back, and nothing else"
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert torch.equal(model(IDS), output)
    assert not any("backup" in module.__dict__ for module in model.modules())
    monkeypatch.setattr(plain, "write", write)
    assert error((handle.merge(keep=False), model(IDS))[1], output) < 1e-5


def test_what_is_not_finite_in_the_last_layer_undoes_the_others():
    for keep in (True, False):
        model, handle = full()
        before = bits(model)
        last = list(handle.changes.values())[-1]
        last._parameters["B"].data[0, 0, 0] = torch.inf
        with pytest.raises(MergeError, match="is not finite"):
            handle.merge(keep=keep)
        assert need_adapters(model).merged is None
        assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_keeping_or_not_gives_the_same_bits_and_report():
    reports, merged = [], []
    for keep in (True, False):
        torch.manual_seed(0)
        model, handle = full()
        model.to(torch.bfloat16)
        reports.append(handle.merge(keep=keep))
        merged.append(bits(model))
    assert reports[0] == reports[1]
    assert len(reports[0].layers) > 10
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())


def test_an_interrupted_merge_whose_way_back_was_interrupted_is_finished_by_unmerge(monkeypatch):
    model, handle = full()
    before = bits(model)
    plain = type(BASES["plain"])
    write, calls = plain.write, []

    def stopping(self, weight, stored):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        write(self, weight, stored)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plain, "write", stopping)
        handle.merge(keep=False)
    other = copy.deepcopy(model)
    for one in (other, model):
        veneer.unmerge(one)
        assert all(torch.equal(value, before[name]) for name, value in bits(one).items())


def test_what_is_kept_follows_no_cast_and_no_move():
    model, handle = full()
    before = bits(model)
    handle.merge()
    model.to(torch.float64)
    with pytest.raises(MergeError, match="edited since the merge"):
        handle.unmerge()
    kept = need_adapters(model) and [
        m.__dict__["backup"] for m in model.modules() if "backup" in m.__dict__
    ]
    assert {
        one.dtype for slot in kept for tensors in slot.values() for one in tensors.values()
    } == {torch.float32}
    model.to(torch.float32)
    handle.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
