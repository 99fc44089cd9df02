"""What a device computes is what the processor computes, where ``test_layers.py`` and
``test_gpu.py`` do not ask; and a device without float64."""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress

import pytest
import torch
from tests.cuda import gpu_checks
from tests.support import moe
from tests.support.banks import save_adapters
from tests.support.emulated_device import G0, without_float64
from tests.support.quantised import IN, libraries  # noqa: F401 (a fixture)
from tests.support.rows import ROWS
from tests.support.tiny import tiny_model
from tests.support.toys import adapt, error, example, randomise, selected
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import veneer
from gpu_place import Place
from veneer.layers import LAYERS
from veneer.serve.requests import Sampling
from veneer.serve.sampling import Sampler, sample
from veneer.train.loss import causal_loss
from veneer.variants import VARIANTS
from veneer.variants.dora import gain_of

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 250, (3, 17), generator=torch.Generator().manual_seed(5))
PLACE = Place(G0, quick=True)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def both(make, config, call, size=0.3):
    """Outputs and gradients of an adapted model on the processor and of its copy on the device."""
    found = []
    plain = make()
    for place in ("cpu", G0):
        model = copy.deepcopy(plain).to(place)
        handle = veneer.attach(model, config)
        if found:
            handle.model.load_state_dict(found[0][2])
        else:
            randomise(handle, size)
        y = call(model, place)
        y.float().square().mean().backward()
        found.append((y, gradients(model), model.state_dict(), handle))
    return found


def same(found, within):
    (y, grads, *_), (other, others, *_) = found
    assert error(other.float().cpu(), y.float()) < within
    largest = max(float(one.norm()) for one in grads.values())
    for name, one in grads.items():
        assert others[name].device == G0
        assert float((others[name].cpu() - one).norm()) < 20 * within * largest, name


def logits(model, place):
    return model(input_ids=IDS.to(place), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_blends_of_a_bank(dtype, tokens, variant, tmp_path):
    model = tiny_model().to(dtype)
    for name, rank in (("a", 2), ("b", 5)):
        save_adapters(
            model, tmp_path, name, config=veneer.LoraConfig(rank=rank, variant=variant), size=0.1
        )
    model.to(G0)
    choices = ["a", None, {"a": 0.5, "b": 0.25}, "b", "a", None]
    ids = torch.randint(3, 250, (6, tokens)).to(G0)
    bank = veneer.Bank(model)
    for name in "ab":
        bank.add(tmp_path / name)
    with torch.no_grad():
        with bank.rows(choices):
            mixed = model(input_ids=ids, use_cache=False).logits
        for row, choice in enumerate(choices):
            with bank.rows([choice]):
                alone = model(input_ids=ids[row : row + 1], use_cache=False).logits[0]
            assert error(mixed[row].float().cpu(), alone.float().cpu()) < (
                1e-4 if dtype is torch.float32 else 0.05
            )
    bank.close()


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_blend_of_a_call(dtype, within, variant):
    """In factors there too, and its gradients reach each adapter."""
    plain, found = (
        nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 16, bias=False)).to(dtype),
        [],
    )
    x = torch.randn(5, 64, dtype=dtype)
    for place in ("cpu", G0):
        model = copy.deepcopy(plain).to(place)
        for name, kind in (("a", variant), ("b", "lora")):
            handle = veneer.attach(
                model, veneer.LoraConfig(rank=4, targets="all", variant=kind), name
            )
            if not found:
                randomise(handle)
        if found:
            model.load_state_dict(found[0][2])
        with veneer.use(model, {"a": 0.7, "b": -0.4}):
            y = model(x.to(place))
            y.float().square().mean().backward()
        found.append((y, gradients(model), model.state_dict(), None))
    same(found, within)


@pytest.mark.parametrize("names", [["a", "a", "a"], ["a", None, "a"]], ids=repr)
def test_masks_of_attention_follow_the_rows(names):
    module = adapt(nn.MultiheadAttention(8, 2, batch_first=True), "a").to(G0)
    x, padding, mask = torch.randn(3, 4, 8), torch.rand(3, 4) > 0.7, torch.rand(6, 4, 4) > 0.7
    padding[:, 0] = mask[..., 0] = False
    x, padding, mask = x.to(G0), padding.to(G0), mask.to(G0)
    mixed, _ = selected(module, names, x, x, x, padding, True, mask)
    for row, name in enumerate(names):
        alone, _ = selected(module, name, x, x, x, padding, True, mask)
        assert error(mixed[row].cpu(), alone[row].cpu()) < 1e-5


@pytest.mark.parametrize("names", [["a", "a", "a"], ["a", None, "a"]], ids=repr)
@pytest.mark.parametrize("lengths", [[4, 2, 1], [1, 4, 2]], ids=repr)
def test_packed_sequences_of_rows(names, lengths):
    module = adapt(nn.GRU(5, 4), "a").to(G0)
    packed = pack_padded_sequence(
        torch.randn(4, 3, 5), torch.tensor(lengths), enforce_sorted=False
    ).to(G0)
    mixed, _ = pad_packed_sequence(selected(module, names, packed)[0])
    for row, name in enumerate(names):
        alone, _ = pad_packed_sequence(selected(module, name, packed)[0])
        assert error(mixed[:, row].cpu(), alone[:, row].cpu()) < 1e-5


def test_mixed_rows_reach_the_experts_of_each_token():
    """The experts get tokens, several of each row."""
    model, names = moe.build("mixtral", torch.float32), ["a", None]
    moe.set_way(model, "batched_mm")
    randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=moe.TARGETS), "a"))
    model, ids = model.to(G0), torch.randint(3, 50, (2, 5)).to(G0)
    with torch.no_grad():
        with veneer.use(model, names):
            mixed = model(input_ids=ids, use_cache=False).logits
        for row, name in enumerate(names):
            with veneer.use(model, name):
                alone = model(input_ids=ids[row : row + 1], use_cache=False).logits[0]
            assert error(mixed[row].cpu(), alone.cpu()) < 1e-5


def test_16_bits_are_rounded_once_with_a_bias():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256)).to(torch.bfloat16)
    x = torch.randn(32, 64).to(torch.bfloat16)
    handle = veneer.attach(module, veneer.LoraConfig(rank=4, targets="all"))
    randomise(handle, 0.005)  # its own roundings hardly move a number
    exact = copy.deepcopy(module).double()(x.double())
    found = copy.deepcopy(module).to(G0)(x.to(G0)).cpu()
    nearest = exact.to(torch.bfloat16)
    assert (found != nearest).float().mean() < 0.02  # of rounding twice, one in ten


def test_convolutions_with_dropout_in_both_layouts():
    for last, p in itertools.product((False, True), (0.0, 0.1)):
        module = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1, stride=2)
        )
        x = torch.randn(4, 8, 72, 72)
        if last:
            module, x = (
                module.to(memory_format=torch.channels_last),
                x.to(memory_format=torch.channels_last),
            )
        config = veneer.LoraConfig(rank=2, targets="all", dropout=p)
        if p:
            model = module.to(G0)
            veneer.attach(model, config)
            model.train()(x.to(G0)).sum().backward()
        else:
            same(
                both(lambda m=module: m, config, lambda model, place, x=x: model(x.to(place))), 1e-4
            )


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_layer_that_its_own_library_keeps_quantised(variant, libraries):  # noqa: F811
    x, config = torch.randn(3, IN), veneer.LoraConfig(rank=2, targets="all", variant=variant)
    make = lambda: nn.Sequential(libraries("gptq")[0])  # noqa: E731
    same(both(make, config, lambda model, place: model(x.to(place)), 0.05), 5e-3)


def test_a_loss_as_on_the_processor():
    labels = IDS.clone()
    labels[:, :4] = -100
    config = veneer.LoraConfig(rank=4, targets=["q_proj", "lm_head"])

    def call(model, place):
        return causal_loss(
            model, {"input_ids": IDS.to(place), "labels": labels.to(place)}, chunk=16
        )[None]

    same(both(lambda: tiny_model(tie_word_embeddings=False), config, call), 1e-4)


@pytest.mark.parametrize("kind", LAYERS.names())
def test_layers_without_float64(kind):
    """As on MPS: each variant that the layer takes, forward, backward, merge and unmerge."""
    for variant in VARIANTS.names():
        with (
            without_float64(),
            suppress(veneer.errors.VeneerError),
        ):  # what is refused is refused everywhere
            gpu_checks.cell(PLACE, *example(kind), variant)


@pytest.mark.parametrize("kind", [kind for kind, number in ROWS if number == 0])
def test_rows_and_banks_without_float64(kind):
    with without_float64():
        gpu_checks.rows(PLACE, kind)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_model_without_float64(variant):
    with without_float64():
        model = tiny_model().to(torch.bfloat16).to(G0)
        handle = veneer.attach(model, veneer.LoraConfig(rank=4, variant=variant, dropout=0.1))
        model.train()
        causal_loss(model, {"input_ids": IDS.to(G0), "labels": IDS.to(G0)}).backward()
        veneer.check(model, {"input_ids": IDS.to(G0), "use_cache": False})
        handle.merge()
        handle.unmerge()
        sample(
            torch.randn(2, 50, device=G0),
            [Sampler(Sampling(max_tokens=9, temperature=0.7, seed=1))] * 2,
        )


def test_float64_is_refused_there():
    with without_float64():
        for make in (
            lambda: torch.zeros(2, device=G0).double(),
            lambda: torch.ones(2, dtype=torch.float64).to(G0),
        ):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()


def test_the_gradient_of_a_magnitude_does_not_overflow_in_float16():
    """dy · y = 300 · 320 exceeds the range of float16, but the gradient does not."""
    module = nn.Sequential(nn.Linear(64, 8, bias=False)).half()
    nn.init.constant_(module[0].weight, 5.0)
    module = module.to(G0)
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets="all", variant="dora"))
    y = module(torch.ones(1, 64, device=G0, dtype=torch.float16))
    y.backward(torch.full_like(y, 300.0))
    (gradient,) = (
        parameter.grad for name, parameter in module.named_parameters() if "magnitude" in name
    )
    assert handle.changes
    assert gradient.tolist() == pytest.approx([300 * 320 / 40] * 8, rel=1e-3)


def test_a_gradient_of_a_magnitude_that_is_not_finite_stays_so():
    """GradScaler finds an overflow by it."""
    magnitude = torch.ones(3, device=G0, requires_grad=True)
    norms = torch.tensor([0.0, 1.0, 2.0], device=G0)
    gain_of(magnitude, norms).backward(torch.tensor([1.0, torch.inf, 4.0], device=G0))
    assert magnitude.grad.tolist() == [0.0, torch.inf, 2.0]
