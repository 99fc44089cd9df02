"""Linear layers of compressed-tensors in a whole model: adapted while they are packed, or after the
first call of the model, which makes them dense. Layers by themselves: test_opaque.py."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tests.support import compressed
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.errors import MergeError, TargetError

IN = 64
real = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@pytest.fixture
def library(monkeypatch):
    compressed.instead_of_the_library(monkeypatch)


class Three(nn.Module):
    """A plain layer, two quantised ones, and a plain head."""

    def __init__(self, rounds_x: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(IN, IN), nn.Linear(IN, 8)
        self.a, self.b = (compressed.quantised(nn.Linear(IN, IN), rounds_x) for _ in range(2))

    def forward(self, x):
        return self.head(self.b(self.a(self.first(x)).relu()))


def three(rounds_x: bool) -> nn.Module:
    torch.manual_seed(0)
    return compressed.packed_model(Three(rounds_x))


@pytest.mark.parametrize("rounds_x", [False, True], ids=["w4a16", "w8a8"])
def test_an_adapter_before_and_after_the_first_call_of_compressed_tensors_is_the_same(
    rounds_x, library, tmp_path
):
    x, config = torch.randn(5, IN), veneer.LoraConfig(rank=4, targets=["first", "a", "b", "head"])
    with torch.no_grad():
        bare = three(rounds_x)(x)
    found = {}
    for when in ("before", "after", "loaded before", "loaded after"):
        model = three(rounds_x)
        own = {name: type(module) for name, module in model.named_modules()}
        if "after" in when:
            with torch.no_grad():
                assert torch.equal(model(x), bare)
        if "loaded" in when:
            handle = veneer.load(
                model, tmp_path / "before", trainable=True
            )  # proves the base: packed or dense
        else:
            torch.manual_seed(1)
            handle = veneer.attach(model, config)
            randomise(handle, 0.1)
        assert handle.changes.keys() == {"first.weight", "a.weight", "b.weight", "head.weight"}
        ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
        seen = x.clone().requires_grad_()
        y = model(seen)
        y.square().sum().backward()
        assert {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }.keys() == ours.keys()
        with veneer.use(model, None), torch.no_grad():
            assert torch.equal(model(x), bare)
        veneer.check(model, x)
        if when == "before":
            handle.save(tmp_path / "before")
        found[when] = y.detach(), seen.grad, [own.grad for own in ours.values()]
        handle.detach()
        with torch.no_grad():
            assert torch.equal(model(x), bare)
        assert {name: type(module) for name, module in model.named_modules()} == own
    (y, grad, grads), *others = found.values()
    for other in others:
        assert torch.equal(other[0], y)
        assert torch.equal(other[1], grad)
        assert all(map(torch.equal, other[2], grads))
    assert all(grad.abs().max() > 0 for grad in grads)


class Rounding(nn.Linear):
    """The definition of W8A8's gradient: as if x had not been rounded."""

    def forward(self, x):
        return F.linear(x + (compressed.round_tokens(x) - x).detach(), self.weight, self.bias)


def test_what_trains_below_a_layer_that_no_adapter_changes_has_its_gradient(library):
    """W8A8 rounds x without a gradient: layers that are no targets pass it on too."""
    model, x = three(rounds_x=True), torch.randn(5, IN)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4, targets=["first"]))
    randomise(handle, 0.1)
    y = model(x)
    y.square().sum().backward()
    defined = Three(rounds_x=False)
    defined.a, defined.b = Rounding(IN, IN), Rounding(IN, IN)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if "_scale" not in name and "veneer" not in name
    }
    defined.load_state_dict(state)
    other = veneer.attach(defined, veneer.LoraConfig(rank=4, targets=["first"]))
    (mine,), (their,) = handle.changes.values(), other.changes.values()
    their.load_state_dict(mine.state_dict())
    z = defined(x)
    z.square().sum().backward()
    assert error(y, z) < 1e-6
    for own, theirs in zip(mine.parameters(), their.parameters(), strict=True):
        assert error(own.grad, theirs.grad) < 2e-6
    handle.detach()
    assert not any(hasattr(module, "veneer") for module in model.modules())


@real
@pytest.mark.parametrize("preset", ["W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_the_librarys_own_models_are_the_same_before_and_after_their_first_call(preset, tmp_path):
    from tests.support.compressed_llama import save_quantised
    from transformers import AutoModelForCausalLM

    save_quantised(tmp_path / "base", preset)
    ids, found = torch.arange(16)[None], {}
    config = veneer.LoraConfig(rank=4, targets=["q_proj", "down_proj", "lm_head"])
    for when in ("before", "after", "loaded"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        module = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert module.quantization_status == "compressed"
        if when == "after":
            with torch.no_grad():
                model(ids)
        if when == "loaded":
            handle = veneer.load(model, tmp_path / "adapter", trainable=True)
        else:
            torch.manual_seed(1)
            handle = veneer.attach(model, config)
            randomise(handle, 0.05)
        y = model(ids, labels=ids)
        assert module.quantization_status == "decompressed"
        y.loss.backward()
        veneer.check(model, ids)
        if when == "before":
            handle.save(tmp_path / "adapter")
        found[when] = y.logits.detach(), [p.grad for p in model.parameters() if p.requires_grad]
        with pytest.raises(MergeError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
            handle.merge()
        handle.detach()
        assert type(module) is nn.Linear
    for when in ("after", "loaded"):
        assert torch.equal(found[when][0], found["before"][0])
        assert all(map(torch.equal, found[when][1], found["before"][1]))


@pytest.mark.parametrize("state", ["frozen", "offloaded", "embedding"])
def test_compressed_tensors_that_answer_otherwise_are_refused_with_the_way_out(state):
    """What is quantised anew in each call has another gradient than its weight, accelerate's hooks
    take the place of forward before the library does, and an embedding is no matrix that x goes
    through."""
    layer = compressed.quantised(nn.Linear(32, 16))
    if state == "frozen":
        layer.quantization_status = "frozen"
    elif state == "offloaded":
        layer._hf_hook = object()  # pyright: ignore[reportArgumentType]
    else:
        scheme, layer = layer.quantization_scheme, nn.Embedding(32, 16)
        layer.quantization_scheme, layer.quantization_status = scheme, "compressed"
    with pytest.raises(
        TargetError, match=r"compressed-tensors.*CompressedTensorsConfig\(dequantize=True\)"
    ):
        veneer.attach(nn.Sequential(layer), veneer.LoraConfig(rank=2, targets="0"))
