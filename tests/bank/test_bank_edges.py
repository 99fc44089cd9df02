"""Where a bank's calls, loads and modes meet: what one row, one thread or one mode does reaches no
other."""

from __future__ import annotations

import contextvars
import gc
import threading
import time
import weakref

import pytest
import torch
from tests.support.banks import Linears, alone, save_adapters
from tests.support.toys import error, randomise
from torch import nn
from torch.nn.utils import prune

import veneer
import veneer.bank.bank
from veneer.bank.batch_state import BatchedLayer
from veneer.bases import BASES
from veneer.errors import AdapterError, BankFullError, SelectionError

DORA = veneer.LoraConfig(rank=2, targets="all", variant="dora")


def bank_of(model, folder, *names, **given):
    bank = veneer.Bank(model, **given)
    for name in names:
        bank.add(folder / name)
    return bank


def test_a_row_that_is_not_finite_stays_alone(tmp_path):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    bank, x = bank_of(model, tmp_path, "a", "b"), torch.randn(3, 1, 12)
    x[0] = torch.nan
    with torch.no_grad(), bank.rows(["a", None, "b"]):
        y = model(x)
    for row, name in ((1, None), (2, "b")):
        assert error(y[row : row + 1], alone(model, tmp_path, name, x[row : row + 1])) < 1e-6


def test_a_lane_has_nothing_of_another_adapter(tmp_path):
    """Whoever was there before, or lies beside it, was of a larger rank and not finite."""
    model = save_adapters(Linears(), tmp_path, "a")
    save_adapters(model, tmp_path, "b", config=veneer.LoraConfig(rank=8, targets=["one", "two"]))
    bank, x = bank_of(model, tmp_path, "a", "b"), torch.randn(2, 1, 12)
    for part in bank._entries["b"].resident.layer_changes.values():
        part.A.fill_(torch.nan)
    with torch.no_grad(), bank.rows(["b", None]):
        model(x)
    with torch.no_grad(), bank.rows(["b", "a"]):
        y = model(x)
    assert y[0].isnan().all()
    assert error(y[1:], alone(model, tmp_path, "a", x[1:])) < 1e-6


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_inference_mode_laid_out_serves_every_mode(variant, tmp_path):
    model = save_adapters(
        Linears(),
        tmp_path,
        "a",
        "b",
        config=veneer.LoraConfig(rank=2, targets="all", variant=variant),
    )
    bank, x = veneer.Bank(model), torch.randn(2, 3, 12)
    for name in "ab":
        bank.register(name, tmp_path / name)
    with torch.inference_mode(), bank.rows(["a", None]):
        model(x)
    with torch.no_grad(), bank.rows(["b", None]):  # one more, in the same state
        y = model(x)
    assert error(y[:1], alone(model, tmp_path, "b", x[:1])) < 1e-6
    x.requires_grad_()
    with bank.rows(["a", None]):
        model(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 9])
def test_numbers_wider_than_the_base(tokens, tmp_path):
    model = save_adapters(Linears().bfloat16(), tmp_path, "a")
    bank, x = (
        bank_of(model, tmp_path, "a", dtype=torch.float32),
        torch.randn(2, tokens, 12).bfloat16(),
    )
    with torch.no_grad(), bank.rows(["a", None]):
        y = model(x)
    assert error(y[:1].float(), alone(model, tmp_path, "a", x)[:1].float()) < 2e-2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bias_that_is_pruned_before_or_after_a_load_is_added(when, tmp_path):
    model, x = Linears(), torch.randn(2, 1, 12)
    if when == "before":
        prune.l1_unstructured(model.last, "bias", amount=3)
    bank = bank_of(save_adapters(model, tmp_path, "a"), tmp_path, "a")
    if when == "after":
        prune.l1_unstructured(model.last, "bias", amount=3)
    with bank.rows(["a", None]):
        expected = model(x.clone().requires_grad_())  # by the layer's own forward
        with torch.no_grad():
            assert error(model(x), expected) < 1e-6


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def test_rows_that_may_lie_along_either_axis_are_refused(tmp_path):
    model = save_adapters(
        TimeFirst(), tmp_path, "a", config=veneer.LoraConfig(rank=2, targets=["head"])
    )
    bank = bank_of(model, tmp_path, "a")
    with (
        torch.no_grad(),
        bank.rows(["a", None]),
        pytest.raises(SelectionError, match="along two axes"),
    ):
        model(torch.randn(2, 2, 8))


def test_nothing_is_loaded_onto_merged_weights(tmp_path):
    model, x = save_adapters(Linears(), tmp_path, "a", "b", config=DORA), torch.randn(1, 1, 12)
    wanted = alone(model, tmp_path, "b", x)
    own = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"), name="own")
    randomise(own, 0.5)
    bank = bank_of(model, tmp_path, "a")  # the fingerprints of the base are known now
    own.merge()
    with pytest.raises(SelectionError, match="unmerged"):
        bank.add(tmp_path / "b")
    own.unmerge()
    bank.add(tmp_path / "b")
    with torch.no_grad(), bank.rows(["b"]):
        assert error(model(x), wanted) < 1e-6


def test_a_context_that_outlives_its_block_meets_no_other_rows(tmp_path):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    bank, x = bank_of(model, tmp_path, "a", "b"), torch.randn(2, 1, 12)
    with bank.rows(["a", "a"]):
        taken = contextvars.copy_context()  # as a task that is started here has it
    with torch.no_grad(), bank.rows(["b", "b"]), pytest.raises(SelectionError, match="has ended"):
        taken.run(model, x)


def test_an_adapter_removed_in_use_keeps_its_factors_and_leaves_nothing(tmp_path, monkeypatch):
    model = save_adapters(Linears(128), tmp_path, "a", "b")
    bank, x, made = bank_of(model, tmp_path, "a", "b"), torch.randn(2, 1, 128), []
    stack_factors = BatchedLayer.stack_factors
    monkeypatch.setattr(
        BatchedLayer,
        "stack_factors",
        lambda *given: (made.append(given[0].weight_name), stack_factors(*given))[1],
    )
    lease = bank.acquire({"a": 1.0}).result()
    for turn in range(3):
        with torch.no_grad(), bank.rows([lease, "b"] if turn < 2 else ["b", lease]):
            model(x)
        if not turn:
            bank.remove("a")
    assert len(made) == 3  # layers, each once
    held = weakref.ref(lease.uses[0][0])
    lease.release()
    bank.remove("b")
    del lease
    gc.collect()
    assert held() is None
    (batch_state,) = bank._batch_states
    assert not batch_state.assignments


def test_an_adapter_without_a_product_leaves_nothing_when_it_is_removed_in_use(tmp_path):
    model = save_adapters(nn.Sequential(nn.Conv1d(3, 4, 3)), tmp_path, "a")
    bank, x = bank_of(model, tmp_path, "a"), torch.randn(2, 3, 8)
    lease = bank.acquire({"a": 1.0}).result()
    held = weakref.ref(lease.uses[0][0])
    with bank.rows([lease, None]), torch.no_grad():
        model(x)
        bank.remove("a")
        lease.release()
    del lease
    gc.collect()
    assert held() is None
    assert not bank.nbytes


def slow_load(monkeypatch, begun, go):
    load = veneer.bank.bank.load_resident

    def slow(*args, **given):
        begun.set()
        assert go.wait(10)
        return load(*args, **given)

    monkeypatch.setattr(veneer.bank.bank, "load_resident", slow)


def test_a_bank_that_loads_is_not_closed(tmp_path, monkeypatch):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    bank, begun, go = bank_of(model, tmp_path, "a"), threading.Event(), threading.Event()
    slow_load(monkeypatch, begun, go)
    thread = threading.Thread(target=lambda: bank.add(tmp_path / "b", "a", replace=True))
    thread.start()
    assert begun.wait(10)
    with pytest.raises(SelectionError, match="loads"):
        bank.close()
    go.set()
    thread.join()
    bank.close()
    assert type(model.one) is nn.Linear
    assert not bank.nbytes


def test_blends_that_need_each_others_room_take_turns(tmp_path, monkeypatch):
    model = save_adapters(Linears(), tmp_path, *"abcd")
    bank = bank_of(model, tmp_path, "a")
    bank.capacity = int(2.5 * bank.nbytes)
    for name in "bcd":
        bank.register(name, tmp_path / name)
    bank.remove("a")
    bank.register("a", tmp_path / "a")
    monkeypatch.setattr(veneer.bank.bank, "MAX_WAIT_SECONDS", 2.0)
    load, outcomes = veneer.bank.bank.load_resident, []
    monkeypatch.setattr(
        veneer.bank.bank,
        "load_resident",
        lambda *args, **given: (time.sleep(0.1), load(*args, **given))[1],
    )

    def blend(*names):
        with bank.rows([dict.fromkeys(names, 0.5)]):
            outcomes.append(names)

    threads = [threading.Thread(target=blend, args=names) for names in ("ab", "cd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 2


def test_an_adapter_that_can_never_fit_evicts_nothing(tmp_path):
    model = Linears(128)
    save_adapters(model, tmp_path, "a", "b", config=veneer.LoraConfig(rank=1, targets=["last"]))
    bank, events = bank_of(model, tmp_path, "a", "b"), []
    bank.capacity = bank.nbytes
    bank.on_event = lambda kind, name, _: events.append((kind, name))
    large = veneer.attach(model, veneer.LoraConfig(rank=8, targets=["one", "two"]), "large")
    bank.put("large", large.save(tmp_path / "large"), "large")
    with pytest.raises(BankFullError, match="beside 0 that are pinned"):
        bank.pin("large")
    assert events == [("fail", "large")]
    assert bank.nbytes == bank.capacity


def test_a_damaged_replacement_evicts_nothing(tmp_path):
    model = save_adapters(Linears(), tmp_path, "a", "b")
    bank = bank_of(model, tmp_path, "a")
    bank.capacity = bank.nbytes  # for one of them
    tensors = tmp_path / "b" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\x00\x00\x80\x3f")  # 1.0
    for pinned in (False, True):
        (bank.pin if pinned else bank.unpin)("a")
        with pytest.raises(AdapterError):
            bank.add(tmp_path / "b", "a", replace=True)
        (status,) = bank.status()
        assert (status.path, status.resident) == (tmp_path / "a", True)


def test_storages_are_released_when_nobody_needs_the_sites(tmp_path, monkeypatch):
    """What ``prepare`` set on a module is undone by the last of banks and adapters, whichever that
    is."""
    model = save_adapters(Linears(), tmp_path, "a")
    released = []
    monkeypatch.setattr(
        type(BASES["plain"]), "release", lambda self, module: released.append(module)
    )
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    released.clear()  # what was read for its fingerprint before anybody needed it
    veneer.attach(model, veneer.LoraConfig(rank=2))
    veneer.detach(model)
    assert released == []
    bank.close()
    assert {id(module) for module in released} == {
        id(module) for module in (model.one, model.two, model.last)
    }


def test_an_adapter_that_is_loaded_in_training_mode_drops_nothing(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).train()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all", dropout=0.5))
    randomise(handle)
    handle.save(tmp_path / "a")
    handle.detach()
    bank = veneer.Bank(model)
    bank.add(tmp_path / "a")
    x = torch.randn(1, 3, 8, 8)
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), bank.rows(["a"]):
            assert torch.equal(model(x), model(x))
    bank.close()
