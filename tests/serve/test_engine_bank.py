"""The engine and the bank: requests of many adapters in one batch are answered as by a merged model
each."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from tests.support.serving import Client, alone, asked, make, prompts
from tests.support.tiny import tiny_tokenizer

import veneer
from veneer.serve.engine import Engine

NAMES = ("plain", "tall", "magnitudes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of differing ranks and variants of the tiny Llama, with changes that show."""
    configs = [
        {"rank": 2},
        {"rank": 5, "variant": "rslora"},
        {"rank": 3, "variant": "dora", "targets": ["q_proj", "v_proj", "down_proj"]},
    ]
    found = {}
    for seed, (name, config) in enumerate(zip(NAMES, configs, strict=True)):
        model = make("llama")
        handle = veneer.attach(model, veneer.LoraConfig(**config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        handle.save(found[name])
    return found


def merged(folders, name):
    model = make("llama")
    if name is not None:
        veneer.load(model, folders[name]).merge(keep=False)
    return model


@pytest.fixture
def serving(folders):
    """A bank with all adapters, and an engine on it; both are closed, and no lease is left."""
    opened = []

    def make_both(capacity=None, **options):
        model = make("llama")
        bank = veneer.Bank(model, capacity)
        for name, path in folders.items():
            bank.register(name, path)
        engine = Engine(model, tiny_tokenizer(), bank, **options)
        opened.append((engine, bank))
        engine.start()
        return engine, bank

    yield make_both
    for engine, bank in opened:
        engine.close()
        assert not any(one.users for one in bank.status())
        bank.close()


@pytest.mark.parametrize("capacity", ["all", "two"])
def test_64_mixed_requests_at_once_are_those_of_merged_models(capacity, serving, folders):
    largest = None
    if capacity == "two":
        _, bank = serving()
        for name in NAMES:
            bank.pin(name)
        sizes = sorted(one.bytes for one in bank.status())
        largest = sizes[-1] + sizes[-2]
    engine, bank = serving(largest, rows=6, prefill=40)
    draw = random.Random(0)
    asks = [(ask, draw.choice([None, *NAMES])) for ask in prompts(64, 40)]
    models = {name: merged(folders, name) for name in (None, *NAMES)}
    wanted = [alone(models[name], ask, 8) for ask, name in asks]
    base = [alone(models[None], ask, 8) for ask, _ in asks]
    assert sum(a != b for a, b in zip(wanted, base, strict=True)) > 24  # adapters show
    clients = [
        Client(engine, asked(ask, 8, blend={name: 1.0} if name else {})) for ask, name in asks
    ]
    assert [client.wait().tokens for client in clients] == wanted
    if largest is not None:
        assert bank.nbytes <= largest


def test_blends_run_beside_others(serving):
    engine, bank = serving(rows=4)
    blends = [{"plain": 0.7, "tall": 0.3}, {"magnitudes": 0.5, "plain": -0.25}, {}, {"tall": 1.0}]
    asks = list(zip(prompts(12, 30, seed=3), blends * 3, strict=True))
    clients = [Client(engine, asked(ask, 6, blend=blend)) for ask, blend in asks]
    found = [client.wait().tokens for client in clients]
    assert engine.drain(30)
    engine.close()
    for (ask, blend), tokens in zip(asks, found, strict=True):
        ids = torch.tensor([ask])
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
        }
        assert bank.generate(ids, adapters=[blend], **options)[0, len(ask) :].tolist() == tokens


def test_an_unknown_adapter_is_an_error_of_its_request(serving):
    engine, _ = serving()
    unknown = Client(engine, asked((5, 6), blend={"plian": 1.0}))
    known = Client(engine, asked((5, 6), blend={"plain": 1.0}))
    assert unknown.wait().finish == "error"
    assert "plain" in unknown.error
    assert known.wait().finish in ("stop", "length")


def test_a_removed_adapter_serves_those_who_have_it_and_its_name_can_be_another(serving, folders):
    engine, bank = serving(rows=2)
    running = Client(engine, asked((5, 6, 7), 60, blend={"plain": 1.0}, ignore_eos=True))
    assert running.first.wait(30)
    bank.remove("plain")
    bank.register("plain", folders["tall"])
    other = Client(engine, asked((5, 6, 7), 60, blend={"plain": 1.0}, ignore_eos=True))
    same = Client(engine, asked((5, 6, 7), 60, blend={"tall": 1.0}, ignore_eos=True))
    assert other.wait().tokens == same.wait().tokens != running.wait().tokens
    assert (
        running.tokens[:8] == alone(merged(folders, "plain"), (5, 6, 7), 8)
        or 2 in running.tokens[:8]
    )


def test_who_needs_memory_that_others_always_use_is_answered(serving, folders):
    """Two adapters fit, and of each of them a request begins before the one before it has ended."""
    engine, bank = serving()
    for name in NAMES:
        bank.acquire({name: 1.0}).result().release()
    cold, bank.capacity = NAMES[0], bank.nbytes - 1
    bank.remove(cold)
    bank.register(cold, folders[cold])
    over, busy, ended = threading.Event(), [], []

    def ask(name):
        follow = [name]

        def note(piece):
            if follow and not over.is_set() and len(ended) < 1500:
                ask(follow.pop())
            if piece.finish:
                ended.append(name)

        busy.append(Client(engine, asked((5, 6, 7), 12, blend={name: 1.0}, ignore_eos=True), note))

    for name in NAMES[1:]:
        ask(name)
    assert busy[0].wait().finish == "length"
    before = len(ended)
    client = Client(engine, asked((5, 6, 7), 3, blend={cold: 1.0}, ignore_eos=True))
    assert client.wait().finish == "length"
    after = len(ended)
    over.set()
    for one in busy:
        one.wait()
    assert (
        after - before < 500
    )  # not the 1,500 after which they end; few, but a busy machine reads the file slowly


def test_a_load_that_waited_in_vain_is_tried_again_when_it_fits(serving, folders, monkeypatch):
    """Each try excludes the requests for adapters in memory for as long as it waits."""
    monkeypatch.setattr("veneer.bank.bank.MAX_WAIT_SECONDS", 0.5)
    engine, bank = serving(rows=4)
    for name in NAMES:
        bank.acquire({name: 1.0}).result().release()
    used, cold, warm = NAMES
    (size,) = (status.bytes for status in bank.status() if status.name == used)
    bank.capacity = bank.nbytes - size // 2
    bank.remove(cold)
    bank.register(cold, folders[cold])
    over, failures, has_failed = threading.Event(), [], threading.Event()

    def note(kind, name, seconds):
        if kind == "fail":
            failures.append(name)
            has_failed.set()

    bank.on_event = note
    # the pause makes it outlast the other requests
    long = Client(
        engine,
        asked((5, 6, 7), 240, blend={used: 1.0}, ignore_eos=True),
        lambda _: over.wait(0.02),
    )
    assert long.first.wait(30)
    blend = Client(engine, asked((5, 6, 7), 3, blend={cold: 0.5, warm: 0.5}, ignore_eos=True))
    assert has_failed.wait(30)
    for _ in range(3):
        client = Client(engine, asked((5, 6, 7), 3, blend={warm: 1.0}, ignore_eos=True))
        assert client.wait().finish == "length"
    assert failures == [cold]
    assert not bank.crowded
    assert not any(client.over.is_set() for client in (blend, long))
    long.ticket.cancel()
    over.set()
    assert blend.wait().finish == "length"


def test_a_blend_that_can_never_fit_is_refused_while_others_run(serving, folders):
    engine, bank = serving(rows=4)
    for name in NAMES:
        bank.acquire({name: 1.0}).result().release()
    sizes = {status.name: status.bytes for status in bank.status()}
    _, large, other = NAMES
    bank.capacity = sizes[large] + sizes[other] - 1
    over = threading.Event()
    long = Client(engine, asked((5, 6, 7), 240, ignore_eos=True), lambda _: over.wait(0.02))
    assert long.first.wait(30)
    bank.remove(large)
    bank.register(large, folders[large])
    blend = Client(engine, asked((5, 6, 7), 3, blend={large: 0.5, other: 0.5}))
    assert blend.wait().finish == "error"
    assert "asked for with it" in blend.error
    assert not long.over.is_set()
    over.set()
    long.ticket.cancel()
