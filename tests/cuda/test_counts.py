"""How often a device is launched, and how often the host waits for it. The limits are what the code
does now."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.support.banks import save_adapters
from tests.support.emulated_device import G0, G1, count, waits_of
from tests.support.tiny import tiny_model
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.kernels import device, dropout, fused
from veneer.models.decode.forward import Forward
from veneer.models.decode.slots import Slots
from veneer.serve.processors import processors_of
from veneer.serve.requests import Sampling
from veneer.serve.sampling import Sampler, sample
from veneer.train.loss import causal_loss, token_loss

IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))
HALF = torch.bfloat16


def layer(dtype=HALF, bias=False, autocast=False, trained=None, **config):
    """A call of an adapted layer and its backward: ([launches forward, launches backward],
    waits)."""
    module = nn.Sequential(nn.Linear(64, 48, bias=bias)).to(dtype).to(G0)
    randomise(
        veneer.attach(module, veneer.LoraConfig(rank=4, targets="all", dtype=trained, **config))
    )
    module.train()
    x, seen = torch.randn(2, 5, 64, device=G0, dtype=dtype).requires_grad_() * 1, []
    for _ in range(2):  # the first may build what later ones find
        with torch.autocast("cuda", dtype=HALF, enabled=autocast), count() as ahead:
            y = module(x)
        dy = torch.randn_like(y)
        with count() as back:
            torch.autograd.grad(y, [x, *(p for p in module.parameters() if p.requires_grad)], dy)
        seen = [ahead, back]
    return [len(one.launches) for one in seen], [name for one in seen for name in one.waits]


LIMITS = {
    "float32 adapter": ({}, 4, 6),
    "16-bit adapter": ({"trained": "bfloat16"}, 3, 5),
    "float32": ({"dtype": torch.float32}, 3, 5),
    "bias": ({"bias": True}, 5, 6),
    "float32, bias": ({"dtype": torch.float32, "bias": True}, 3, 5),
    "autocast": ({"autocast": True}, 4, 6),
    "autocast over float32": ({"dtype": torch.float32, "autocast": True}, 4, 6),
    "dropout": ({"dropout": 0.1}, 6, 8),
    "dora": ({"variant": "dora"}, 10, 13),
    "dora in float32": ({"variant": "dora", "dtype": torch.float32}, 9, 13),
    "rslora": ({"variant": "rslora"}, 4, 6),
    "pissa": ({"variant": "pissa"}, 13, 19),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_layer_takes_few_launches_and_no_wait(name):
    given, ahead, back = LIMITS[name]
    launches, waits = layer(**given)
    assert launches[0] <= ahead
    assert launches[1] <= back
    assert waits == []


def llama(dtype=HALF, **config):
    model = tiny_model().to(dtype).to(G0)
    if config:
        randomise(veneer.attach(model, veneer.LoraConfig(rank=4, **config)))
    return model.train()


def step(model, **inputs):
    ids = IDS.to(G0)

    def run():
        y = model(input_ids=ids, use_cache=False, **inputs).logits.float().square().mean()
        if y.requires_grad:
            y.backward()

    return run


@pytest.mark.parametrize(
    "config",
    [
        {"targets": "all-linear"},
        {"dropout": 0.1},
        {"dropout": 0.6},
        {"variant": "dora"},
        {"targets": "all"},
        {"targets": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_a_step_does_not_wait(config):
    frozen = llama()
    assert waits_of(step(llama(**config)), step(frozen.requires_grad_(False))).total() == 0


def test_layers_that_read_one_input_share_launches():
    model = tiny_model().to(G0)
    veneer.attach(model, veneer.LoraConfig(rank=4, targets="attention"))
    attention, x = (
        model.model.layers[0].self_attn,
        torch.randn(1, 3, 32, device=G0).requires_grad_() * 1,
    )
    with count() as seen:
        for name in ("q_proj", "k_proj", "v_proj"):
            attention._modules[name](x)
    assert len(seen.launches) <= 2 + 3 * 2


def test_a_loss_waits_once_and_not_at_all_if_labels_are_counted():
    model, ids = llama(targets="all-linear"), IDS.to(G0)
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"input_ids": ids, "labels": labels}
    frozen = step(llama().requires_grad_(False))
    assert waits_of(lambda: causal_loss(model, batch, chunk=16).backward(), frozen).total() == 1
    known = int((labels[:, 1:] != -100).sum())

    def run():
        token_loss(model, batch, chunk=16, count=known).total.backward()

    assert waits_of(run, frozen).total() == 0
    found, expected = (
        token_loss(model, batch, chunk=16, count=known).total,
        token_loss(model, batch).total,
    )
    torch.testing.assert_close(found, expected)


def test_an_embedding_with_padding_and_slices_of_a_fused_matrix_do_not_wait():
    module = nn.Sequential(nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 16)).to(G0)
    veneer.attach(module, veneer.LoraConfig(rank=2, targets="all", slices={"1": [True, False]}))
    ids = torch.randint(0, 50, (4, 5)).to(G0)
    assert waits_of(lambda: module(ids).sum().backward()).total() == 0


def test_rows_of_several_adapters_do_not_wait():
    model, ids = tiny_model().to(G0), IDS.to(G0)
    for name in "ab":
        veneer.attach(model, veneer.LoraConfig(rank=4), name=name)

    def run(names=("a", None, "b")):
        with veneer.use(model, names), torch.no_grad():
            model(input_ids=ids, use_cache=False)

    assert waits_of(run, partial(run, None)).total() == 0


@pytest.fixture
def bank(tmp_path):
    model = tiny_model().to(HALF)
    save_adapters(model, tmp_path, *"01234567", config=veneer.LoraConfig(rank=4))
    bank = veneer.Bank(model.to(G0))
    for name in "01234567":
        bank.register(name, tmp_path / name)
    yield bank, model
    bank.close()


@pytest.mark.parametrize(("tokens", "times"), [(12, 1.5), (1, 1.6)])
def test_a_mixed_batch_of_a_bank_takes_less_than_twice_the_launches(bank, tokens, times):
    bank, model = bank
    ids = torch.randint(3, 250, (16, tokens)).to(G0)

    def run(names):
        with bank.rows(names), torch.no_grad(), count() as seen:
            model(input_ids=ids, use_cache=False)
        return seen

    mixed = [str(i % 8) for i in range(16)]
    run(mixed)
    base, again, other = run([None] * 16), run(mixed), run(mixed[::-1])
    assert len(again.launches) <= times * len(base.launches)
    assert len(other.launches) <= times * len(base.launches)
    assert len(again.waits) == len(base.waits) == len(other.waits)


def test_a_step_of_the_engine_waits_for_the_tokens_alone():
    model = tiny_model().to(G0)
    forward, slots, lengths = Forward(model), Slots(4, 64, G0), [3, 2]
    with torch.inference_mode():
        rows = [slots.allocate(64), slots.allocate(64)]
        forward.fill(slots, rows, [[4, 5, 6], [4, 5]])

        def run():
            y = forward.decode(slots, rows, [7, 8], list(lengths))
            sample(y, [Sampler(Sampling(max_tokens=9, temperature=0.0))] * 2)
            lengths[0], lengths[1] = lengths[0] + 1, lengths[1] + 1

        assert waits_of(run).total() == 1
    forward.close()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 0.8, "min_p": 0.1},
        {"temperature": 0.8},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_sampling_waits_once(sampling):
    logits = torch.randn(16, 2000, device=G0) * 4
    rows = [Sampler(Sampling(max_tokens=9, seed=i, **sampling)) for i in range(15)]
    rows.append(Sampler(Sampling(max_tokens=9, temperature=0.0)))
    assert waits_of(lambda: sample(logits, rows)).total() == 1


def test_logits_are_processed_on_the_device_as_on_the_processor():
    sampling = Sampling(
        9,
        logit_bias={5: 2.0, 7: -100.0},
        allowed_tokens=frozenset(range(90)),
        bad_words=((3,), (4, 6)),
        min_tokens=4,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    logits, processed = torch.randn(100), []
    for target in (torch.device("cpu"), G0):
        row = Sampler(sampling, None, processors_of(sampling, (8, 9), (2,), 100, target))
        for token in (5, 5, 4):
            row.accept(token)
        processed.append(row.process(logits.to(target)).cpu())
    assert torch.equal(*processed)


def test_a_merge_takes_as_many_launches_whatever_the_size():
    launches = {}
    for rounding in ("nearest", "faithful"):
        for rows in (256, 1024):
            module = nn.Sequential(nn.Linear(64, rows, bias=False)).to(HALF).to(G0)
            handle = veneer.attach(module, veneer.LoraConfig(rank=4, targets="all"))
            randomise(handle, 0.01)
            with count() as seen:
                handle.merge(rounding=rounding)
            launches[rounding, rows] = len(seen.launches)
    assert launches["nearest", 256] == launches["nearest", 1024] <= 300
    assert launches["faithful", 1024] == launches["faithful", 256] <= 1400


# What these tests are worth: each of these changes is found.


def test_a_wait_is_seen(monkeypatch):
    mask = dropout.keep_mask
    monkeypatch.setattr(
        device, "keep_mask", lambda *given: mask(*given) if mask(*given).sum().item() >= 0 else None
    )
    assert layer(dropout=0.1)[1] != []


def test_a_launch_more_is_seen(monkeypatch):
    product = device.product
    monkeypatch.setattr(device, "product", lambda *given: product(*given).mul_(1.0))
    assert layer()[0][0] == 5


def test_another_device_is_seen(monkeypatch):
    mask = dropout.keep_mask
    monkeypatch.setattr(device, "keep_mask", lambda shape, p, seed, _: mask(shape, p, seed, G1))
    with pytest.raises(RuntimeError, match="at least two devices"):
        layer(dropout=0.1)


def test_the_processors_kernel_is_not_for_a_device():
    x = torch.randn(2, 4, device=G0)
    weight = nn.Parameter(torch.randn(3, 4, device=G0), requires_grad=False)
    assert device.applies(x, weight)
    assert not fused.applies(x, weight)
    assert not device.applies(x.to(G1), weight)
