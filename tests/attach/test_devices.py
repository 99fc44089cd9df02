"""Devices that lack float64, or half of the model. ``meta`` plays the device, whose numbers read as
zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer import precision
from veneer.attach.merging import fold_weights
from veneer.errors import MergeError
from veneer.kernels import rounding
from veneer.kernels.rounding import fold
from veneer.lowrank import LowRank
from veneer.precision import compute_device, double, has_float64

META = torch.device("meta")


class Narrow(TorchDispatchMode):
    """The device has no float64, and what is copied from it to the processor is zero."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            function in (torch.ops.aten._to_copy.default,)
            and args[0].is_meta
            and kwargs.get("device") == precision._CPU
        ):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].zero_()
        out = function(*args, **kwargs)
        for one in pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.is_meta and one.dtype is torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
                )
        return out


@pytest.fixture
def narrow(monkeypatch):
    original = precision.has_float64
    monkeypatch.setattr(precision, "has_float64", lambda device: device != META)
    monkeypatch.setattr(rounding, "has_float64", lambda device: device != META)
    monkeypatch.setattr(fold_weights, "has_float64", lambda device: device != META)
    with Narrow():
        with pytest.raises(TypeError):  # the mode refuses
            torch.zeros(2, device=META).double()
        yield original


def test_float64_is_asked_of_the_device(monkeypatch):
    assert has_float64(torch.device("cpu"))
    asked = []

    def empty(*_, device, **__):
        asked.append(device.type)
        raise TypeError("no float64")

    monkeypatch.setattr(torch, "empty", empty)
    assert not has_float64(torch.device("mps"))
    assert compute_device(torch.device("mps")) == torch.device("cpu")
    assert compute_device(torch.device("mps"), torch.float32) == torch.device("mps")
    assert asked == ["mps", "mps"]


def test_what_is_made_wide_is_differentiable():
    x = torch.randn(3, requires_grad=True)
    double(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_weight_is_folded_by_the_processor_where_its_device_has_no_float64(narrow, side):
    low = LowRank(torch.zeros(1, 2, 6, device=META), torch.zeros(1, 5, 2, device=META), 1.0)
    for gain in (None, torch.ones(5, device=META)):
        folded = fold(torch.zeros(1, 5, 6, dtype=torch.bfloat16, device=META), low, gain, side=side)
        assert folded.weight.is_meta
        assert folded.weight.dtype is torch.bfloat16
        assert folded.finite


@pytest.mark.parametrize("variant", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_merge_needs_no_float64_of_the_device(narrow, variant, keep):
    model = (
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Embedding(5, 8, max_norm=1.0))
        .to(torch.bfloat16)
        .to(META)
    )
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=2, variant=variant, targets="all", train_also=["1"])
    )
    assert len(handle.merge(keep=keep).layers) == 4
    assert {one.device for one in model.parameters()} == {META}
    if keep:
        handle.unmerge()


def test_a_change_is_measured_without_float64_on_the_device(narrow):
    low = LowRank(torch.zeros(1, 2, 6, device=META), torch.zeros(1, 5, 2, device=META), 1.0)
    assert low.norm() == low.inner(low) == 0
    assert low.core().device == low.svd().U.device == torch.device("cpu")


def test_sampling_needs_no_float64_of_the_device(monkeypatch):
    from veneer.serve import sampling
    from veneer.serve.requests import Sampling

    seen = []

    class Narrow(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(
                one.dtype
                for one in torch.utils._pytree.tree_leaves(out)
                if isinstance(one, torch.Tensor)
            )
            return out

    settings = [
        Sampling(4, temperature=1.0, top_p=0.5, seed=1),
        Sampling(4, temperature=1.0, top_k=3, seed=2),
    ]
    rows = [sampling.Sampler(one) for one in settings]
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    with Narrow():
        tokens = sampling.sample(torch.randn(2, 50), rows)
    assert len(tokens) == 2
    assert torch.float32 in seen
    assert torch.float64 not in seen


def test_a_packed_weight_on_such_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(fold_weights, "has_float64", lambda device: False)
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    with pytest.raises(MergeError, match=r"stored packed, on cpu, which has no float64.*model\.to"):
        handle.merge()


@pytest.mark.parametrize("size", [64, 512])
def test_a_tile_on_a_device_is_a_share_of_the_weight(monkeypatch, size):
    weight = torch.randn(1, size, size).bfloat16()
    low = LowRank(torch.randn(1, 4, size) * 0.02, torch.randn(1, size, 4) * 0.02, 1.0)
    expected = fold(weight, low, rounding="nearest")

    def tile(like):
        return max(-(-like.numel() // rounding.TILES_PER_WEIGHT), rounding.MIN_TILE_SIZE)

    monkeypatch.setattr(rounding, "_tile_size", tile)
    monkeypatch.setattr(rounding, "_bound", lambda *_: None)  # as on any other device
    found = fold(weight, low, rounding="nearest")
    assert torch.equal(found.weight, expected.weight)
    assert found.retention == pytest.approx(expected.retention, abs=1e-5)
    like = torch.empty(1, size, size, device=META)
    monkeypatch.undo()
    assert rounding._tile_size(like) == max(size * size // 8, 1 << 10)
    assert rounding._tile_size(weight) == rounding.TILE_SIZE


class Spread(nn.Module):
    """A language model whose head is on another device, as device_map spreads them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, device=META)
        self.embed.requires_grad_(False)

    def forward(self, input_ids, use_cache=False):
        return type(
            "Out", (), {"logits": self.head(self.embed(input_ids).to(META)), "aux_loss": None}
        )


class Keeping(Spread):
    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        hidden = self.embed(input_ids).to(META)
        assert not isinstance(logits_to_keep, torch.Tensor), (
            "indices of one device for hidden states of another"
        )
        return type("Out", (), {"logits": self.head(hidden[:, logits_to_keep]), "aux_loss": None})


@pytest.mark.parametrize("kind", [Spread, Keeping])
def test_the_loss_of_a_model_on_two_devices(kind):
    from veneer.train.loss import causal_loss, token_loss

    model = kind()
    ids = torch.arange(10).view(2, 5)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    loss = token_loss(model, {"input_ids": ids, "labels": labels}, accuracy=True)
    assert {one.device for one in loss[:3]} == {META}
    causal_loss(model, {"input_ids": ids, "labels": labels}).backward()
    assert model.head.weight.grad.is_meta
