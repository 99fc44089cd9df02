"""A training loop in which the adapter does not train: the first step says so, and no other one is
told anything."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_pre_hook,
)

import veneer
from veneer.attach import first_step


@pytest.fixture(autouse=True)
def only_the_adapters_of_this_test():
    first_step._NEW_ADAPTERS.clear()
    yield
    first_step._NEW_ADAPTERS.clear()


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def step(model, optimizer, head=None, x=None):
    x = torch.randn(2, 4) if x is None else x
    y = model(x)
    (y if head is None else head(y)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def loaded(tmp_path, **how):
    model = mlp()
    veneer.attach(model, veneer.LoraConfig(rank=2)).save(tmp_path / "adapter")
    veneer.detach(model)
    return model, veneer.load(model, tmp_path / "adapter", **how)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]
)
def test_an_optimizer_that_was_made_before_attach_is_named_once(optimizer_class):
    model = mlp()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    veneer.attach(model, veneer.LoraConfig(rank=2), name="mine")
    with pytest.warns(
        veneer.NotTrained, match=r"holds no parameter of adapter 'mine'.*after attach"
    ) as caught:
        step(model, optimizer)
    assert caught[0].filename == __file__
    step(model, optimizer)
    assert not first_step._HOOKS


def test_one_that_was_made_before_load_too(tmp_path):
    model, handle = loaded(tmp_path)
    handle.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    veneer.load(model, tmp_path / "adapter", trainable=True)
    with pytest.warns(veneer.NotTrained, match="holds no parameter"):
        step(model, optimizer)


@pytest.mark.parametrize("with_head", [False, True])
def test_a_loaded_adapter_that_is_frozen_is_named(tmp_path, with_head):
    model, handle = loaded(tmp_path)
    head = nn.Linear(4, 1) if with_head else None
    optimizer = torch.optim.AdamW(
        [*handle.parameters(), *([] if head is None else head.parameters())], lr=0.1
    )
    x = torch.randn(2, 4, requires_grad=True)  # as with gradient checkpointing
    with pytest.warns(veneer.NotTrained, match=r"require no gradient.*trainable=True"):
        step(model, optimizer, head, x)
    assert not first_step._HOOKS


def made_after_attach(tmp_path):
    model = mlp()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    return model, [torch.optim.AdamW(handle.parameters())], None


def of_the_whole_model(tmp_path):
    model = mlp()
    veneer.attach(model, veneer.LoraConfig(rank=2))
    return model, [torch.optim.AdamW(model.parameters())], None


def loaded_to_train(tmp_path):
    model, handle = loaded(tmp_path, trainable=True)
    return model, [torch.optim.AdamW(handle.parameters())], None


def an_optimizer_of_its_own_that_steps_last(tmp_path):
    model, head = mlp(), nn.Linear(4, 1)
    first = torch.optim.SGD(head.parameters(), lr=0.1)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    return model, [first, torch.optim.AdamW(handle.parameters())], head


def a_head_on_a_frozen_adapter(tmp_path):
    model, _ = loaded(tmp_path)
    head = nn.Linear(4, 1)
    return model, [torch.optim.SGD(head.parameters(), lr=0.1)], head


def a_whole_model_of_which_a_new_adapter_trains(tmp_path):
    model, _ = loaded(tmp_path)
    veneer.attach(model, veneer.LoraConfig(rank=2), name="new")
    return model, [torch.optim.SGD(model.parameters(), lr=0.1)], None


def gradients_that_are_only_looked_at(tmp_path):
    model, head = mlp(), nn.Linear(4, 1)
    veneer.attach(model, veneer.LoraConfig(rank=2))
    return model, [torch.optim.SGD(head.parameters(), lr=0.1)], head


LOOPS = [
    made_after_attach, of_the_whole_model, loaded_to_train, an_optimizer_of_its_own_that_steps_last,
    a_head_on_a_frozen_adapter, a_whole_model_of_which_a_new_adapter_trains, gradients_that_are_only_looked_at,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_that_train_what_they_mean_are_told_nothing(tmp_path, loop):
    model, optimizers, head = loop(tmp_path)
    names = list(model._veneer.configs)
    chosen = dict.fromkeys(names, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with veneer.use(model, chosen):
                y = model(torch.randn(2, 4))
            (y if head is None else head(y)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()


def test_a_step_of_another_adapter_says_nothing_of_one_whose_optimizer_is_made_later():
    model = mlp()
    first, second = (
        veneer.attach(model, veneer.LoraConfig(rank=2), name=name) for name in ("first", "second")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("first", "second"):
            with veneer.use(model, name):
                model(torch.randn(2, 4)).square().sum().backward()
        torch.optim.SGD(first.parameters(), lr=0.1).step()
        torch.optim.SGD(second.parameters(), lr=0.1).step()


def test_the_hook_goes_with_the_first_step_of_the_adapter():
    model, (optimizer,), _ = made_after_attach(None)
    (hook,) = first_step._HOOKS
    other = mlp()
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))  # says nothing about the adapter
    assert hook.id in _global_optimizer_pre_hooks
    step(model, optimizer)
    assert hook.id not in _global_optimizer_pre_hooks
    assert not first_step._HOOKS
    veneer.attach(mlp(), veneer.LoraConfig(rank=2))  # nobody has it
    gc.collect()
    step(model, optimizer)
    assert not first_step._HOOKS


def test_the_hook_stays_while_another_one_is_registered():
    """torch iterates over the hooks while it calls them."""
    model, (optimizer,), _ = made_after_attach(None)
    steps = []
    other = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append(optimizer))
    try:
        step(model, optimizer)
        assert steps == [optimizer]
    finally:
        other.remove()
    assert first_step._HOOKS
    step(model, optimizer)
    assert not first_step._HOOKS


def test_two_threads_that_step_at_once_check_an_adapter_once(monkeypatch):
    model, (optimizer,), _ = made_after_attach(None)
    model(torch.randn(2, 4)).square().sum().backward()
    live_parameters, both_check = first_step._NewAdapter.live_parameters, threading.Barrier(2)

    def wait_for_the_other(adapter):
        with contextlib.suppress(threading.BrokenBarrierError):
            both_check.wait(0.2)
        return live_parameters(adapter)

    monkeypatch.setattr(first_step._NewAdapter, "live_parameters", wait_for_the_other)
    with ThreadPoolExecutor(2) as threads:
        for check in [threads.submit(first_step._check_step, optimizer, (), {}) for _ in "ab"]:
            check.result()
    assert not first_step._NEW_ADAPTERS
    assert not first_step._HOOKS
