"""Every storage, on its own examples: what it reads is what the module computes with, and what it
writes comes back.

Libraries that are not installed are skipped by name.
"""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tests.support.forked import printed
from tests.support.packed import LIBRARIES, x_dtype
from tests.support.toys import error
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import veneer
from veneer.bases import BASES, storage_of
from veneer.errors import MergeError, TargetError

# : what a forward may differ from the decoded weight: it computes in the dtype of x, or with 8-bit
# x, or 16-bit weights
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def need(*libraries: str) -> None:
    for library in libraries:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")


def held(module: nn.Module):
    """What a module keeps under the name of its weight."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations.weight
    return module._parameters["weight"]


def prepared(storage, module: nn.Module):
    """The module's weight, read as attaching does."""
    if hasattr(storage, "prepare"):
        storage.prepare(module)
    return held(module)


def copied(stored):
    return {name: value.detach().clone() for name, value in stored.items()}


def bits(tensors):
    """Tensors by name as bytes, which compare NaN and -0 too."""
    return {name: (value.dtype, value.shape, value.detach().contiguous().flatten().view(torch.uint8).tolist())
            for name, value in tensors.items()}  # fmt: skip


def flat_state(module: nn.Module):
    """The state dict with tensor subclasses taken apart."""
    found = {}
    for name, value in module.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            found |= {
                f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]
            }
        else:
            found[name] = value.as_tensor() if hasattr(value, "as_tensor") else value
    return found


@pytest.fixture(
    params=[storage.name for storage in BASES if not storage.opaque]
)  # those: test_opaque.py
def storage(request):
    need(*LIBRARIES.get(request.param, ()))
    return BASES[request.param]


@pytest.fixture
def examples(storage):
    found = list(storage.examples())
    assert found, f"{storage.name} has no examples"
    return found


def test_each_example_has_one_storage(storage, examples):
    for module in examples:
        weight = held(module)
        assert [other.name for other in BASES if other.holds(weight)] == [storage.name], module
        assert storage_of(weight) is storage
        assert not any(
            other.holds(value) for other in BASES for value in (None, 3, torch.ones(2, 2), module)
        )


def test_the_storage_is_one_instance_wherever_it_is_copied_to(storage):
    assert pickle.loads(pickle.dumps(storage)) is storage
    assert copy.deepcopy(storage) is storage


def test_decode_is_what_the_forward_uses(storage, examples):
    """On the identity a linear layer gives its weight; in both modes, and with the gradient to
    x."""
    for module in examples:
        dense = storage.dense(prepared(storage, module)).double()
        assert dense.shape == (module.out_features, module.in_features)
        for training in (False, True):
            module.train(training)
            if training and storage.name == "parametrized":
                continue  # spectral norm takes a step first, which a frozen base does not
            x = torch.eye(module.in_features, dtype=x_dtype(module), requires_grad=True)
            y = module(x)
            used = (y - module.bias.to(y.dtype)).mT
            assert error(used, dense) <= CLOSE[x.dtype], module
            y.sum().backward()
            assert error(x.grad, dense.sum(0).expand(len(x), -1)) <= CLOSE[x.dtype], module
            with torch.no_grad():
                assert error(module(x.detach()), y) <= CLOSE[x.dtype], module
        if storage.name != "parametrized":
            assert torch.equal(storage.dense(prepared(storage, module)).double(), dense), (
                "a call has changed the base"
            )


def test_dense_is_finite_floats_of_the_stated_shape_and_dtype(storage, examples):
    for module in examples:
        dense = storage.dense(held(module))
        assert dense.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        assert (dense.dtype, dense.shape) == (
            storage.dtype(held(module)),
            storage.shape(held(module)),
        )
        assert type(dense.detach()) is torch.Tensor
        assert dense.isfinite().all()


def test_what_did_not_change_keeps_its_bits(storage, examples):
    for module in examples:
        weight = held(module)
        before = copied(storage.stored_tensors(weight))
        dense = storage.dense(weight).double()
        same = storage.encode(weight, dense)
        assert torch.equal(storage.decode(weight, same).double(), dense), module
        if before:
            assert bits(same) == bits(before), module


def test_encoding_is_idempotent_and_near(storage, examples):
    """What was encoded and decoded is on the grid: encoding it again moves nothing. Nothing is
    written meanwhile."""
    for module in examples:
        weight = held(module)
        before = bits(flat_state(module))
        old = storage.dense(weight).detach().double()
        values = old + 0.1 * old.std() * torch.randn_like(old)
        encoded = storage.encode(weight, values)
        once = storage.decode(weight, encoded).double()
        assert error(once, values) < 0.12, module  # fp4's grid is coarse
        assert bits(flat_state(module)) == before
        original = copied(storage.stored_tensors(weight))
        storage.write(weight, encoded)
        again = storage.encode(weight, once)
        assert bits(again) == bits(encoded), module
        storage.write(weight, original)


def test_a_small_change_is_not_drowned_by_rounding_anew(storage, examples):
    """Elements far from a step of the grid stay; so what is written is at most about as far off as
    not merging."""
    for module in examples:
        weight = held(module)
        old = storage.dense(weight).detach().double()
        change = 1e-3 * old.std() * torch.randn_like(old)
        written = storage.decode(weight, storage.encode(weight, old + change)).double()
        assert (written - old - change).norm() <= 1.1 * change.norm(), module


def test_writing_back_restores_every_bit(storage, examples):
    """100 merges and unmerges, with calls between; the parameter stays the same object."""
    for module in examples:
        module.eval()
        weight = prepared(storage, module)
        x = torch.randn(5, module.in_features, dtype=x_dtype(module))
        with torch.no_grad():
            y = module(x)
        weight = prepared(storage, module)
        before, state = bits(storage.stored_tensors(weight)), bits(flat_state(module))
        old = storage.dense(weight).detach().double()
        changed = storage.encode(weight, old + torch.randn_like(old) * old.std())
        merged = storage.decode(weight, changed)
        for round_ in range(100):
            kept = copied(storage.stored_tensors(weight))
            storage.write(weight, changed)
            if round_ % 25 == 0:
                with torch.no_grad():
                    expected = F.linear(x.double(), merged.double(), module.bias.double())
                    assert error(module(x), expected) <= max(1e-2, 3 * CLOSE[x.dtype]), module
                assert prepared(storage, module) is weight
                assert bits(storage.stored_tensors(weight)) == bits(changed)
            storage.write(weight, kept)
        assert bits(storage.stored_tensors(weight)) == before
        assert bits(flat_state(module)) == state
        with torch.no_grad():
            assert torch.equal(module(x), y), module


def test_a_copy_of_the_module_is_stored_the_same_way(storage, examples):
    if storage.name == "gguf":
        pytest.skip("diffusers' GGUFParameter itself can neither be copied nor pickled")
    for module in examples:
        weight = held(module)
        copies = [copy.deepcopy(module)]
        if storage.name not in ("parametrized", "torchao"):  # which cannot be pickled: see below
            copies.append(pickle.loads(pickle.dumps(module)))
        for other in copies:
            assert storage_of(held(other)) is storage
            assert torch.equal(storage.dense(held(other)), storage.dense(weight))
            old = storage.dense(weight).detach().double()
            storage.write(held(other), storage.encode(held(other), old + 1))
            assert torch.equal(storage.dense(weight).double(), old), (
                "writing to the copy has changed the original"
            )
            with torch.no_grad():
                used = other(torch.eye(module.in_features, dtype=x_dtype(module)))
            assert error(used, (old + 1).mT + module.bias) < 0.2, (
                "the copy's call does not see what was written"
            )


def test_what_is_not_finite_is_seen_after_encoding(storage, examples):
    """A merge decodes what it is about to write; NaN must not become a number on the way."""
    for module in examples:
        values = storage.dense(held(module)).detach().double().clone()
        values[1, 2] = torch.nan
        encoded = storage.encode(held(module), values)
        assert not storage.decode(held(module), encoded).isfinite().all(), module


def test_zero_weights_stay_zero(storage, examples):
    for module in examples:
        weight = held(module)
        kept = copied(storage.stored_tensors(weight))
        storage.write(
            weight, storage.encode(weight, torch.zeros(storage.shape(weight), dtype=torch.float64))
        )
        assert storage.dense(weight).abs().max() < 1e-6
        storage.write(weight, kept)


def test_no_library_is_imported():
    heavy = "bitsandbytes torchao gguf diffusers transformers"
    code = f"import sys, veneer.bases; print([name for name in '{heavy}'.split() if name in sys.modules])"
    assert printed(code).strip() == "[]"


# ----------------------------------------------------------------------------------------------
# plain


def test_a_parameter_of_another_library_is_not_plain():
    """Floating-point bytes may mean anything there; torch's own kinds of parameters mean what they
    say."""

    class Packed(nn.Parameter):
        pass

    assert storage_of(Packed(torch.ones(2, 2))) is None
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert storage_of(nn.Linear(2, 2).weight) is BASES["plain"]


# ----------------------------------------------------------------------------------------------
# parametrized


class Counts(nn.Module):
    """A parametrization that changes its own state whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.total = 0

    def forward(self, original):
        self.calls += 1
        self.calls.mul_(1)
        self.total += 1
        return original * 2


def test_reading_a_parametrized_weight_changes_no_state():
    module = spectral_norm(nn.Linear(6, 5)).train()
    module(torch.ones(1, 6))
    before = bits(module.state_dict())
    first = BASES["parametrized"].dense(held(module))
    assert torch.equal(BASES["parametrized"].dense(held(module)), first)
    assert bits(module.state_dict()) == before
    assert module.parametrizations.weight.training
    assert module.parametrizations.weight[0].training
    module(torch.ones(1, 6))
    assert bits(module.state_dict()) != before  # as training mode means it

    counting = nn.Linear(3, 3)
    parametrize.register_parametrization(counting, "weight", Counts())
    inner = counting.parametrizations.weight[0]
    seen = (inner.calls.item(), inner.total)
    assert torch.equal(BASES["parametrized"].dense(held(counting)), held(counting).original * 2)
    assert (inner.calls.item(), inner.total) == seen


@pytest.mark.parametrize("make", [weight_norm, spectral_norm, orthogonal])
def test_a_merged_parametrized_weight_is_the_merged_one_bit_for_bit(make):
    storage, module = BASES["parametrized"], make(nn.Linear(4, 4)).train()
    weight = held(module)
    before, keys = bits(module.state_dict()), list(module.state_dict())
    merged = storage.encode(weight, torch.randn(4, 4, dtype=torch.float64))
    storage.write(weight, merged)
    assert torch.equal(module.weight, merged["merged"])
    assert held(module) is weight
    assert parametrize.is_parametrized(module, "weight")
    assert set(module.state_dict()) == {*keys, "parametrizations.weight.merged"}
    with pytest.raises(MergeError, match="unmerge"):
        module.weight = torch.ones(4, 4)
    assert torch.equal(copy.deepcopy(module).weight, merged["merged"])
    for _ in range(3):
        module(torch.ones(1, 4))  # in training mode: u and v of spectral norm rest
    assert torch.equal(storage.decode(weight, {}), storage.dense(_restored(storage, weight)))
    assert list(module.state_dict()) == keys
    assert bits(module.state_dict()) == before
    assert type(weight) is parametrize.ParametrizationList


def _restored(storage, weight):
    storage.write(weight, {})
    return weight


def test_removing_the_parametrization_of_a_merged_weight_leaves_the_merged_one():
    storage, module = BASES["parametrized"], spectral_norm(nn.Linear(4, 3))
    merged = storage.encode(held(module), torch.randn(3, 4, dtype=torch.float64))
    storage.write(held(module), merged)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert torch.equal(module.weight, merged["merged"])
    assert storage_of(module.weight) is BASES["plain"]


def test_torch_refuses_to_pickle_parametrized_modules():
    """If this fails, torch has learnt it: then the copies above should be pickled too."""
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(weight_norm(nn.Linear(4, 3)))


# ----------------------------------------------------------------------------------------------
# bitsandbytes


def linear4bit(**settings):
    need("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(64, 32, **settings).to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_that_bitsandbytes_misreads_on_a_cpu_is_refused(kind):
    """Rows of 96 numbers are one and a half blocks; each row is as large as its number here, so the
    scales differ."""
    need("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    def made(width):
        module = Linear4bit(width, 32, quant_type=kind, bias=False)
        module.weight.data.mul_(torch.arange(1.0, 33)[:, None])
        dense = module.weight.data.clone()
        module = module.to("cpu")
        return module, error(module(torch.eye(width)).mT, dense)

    (odd, wrong), (whole, right) = made(96), made(128)
    assert wrong > 0.25
    assert right < 0.2
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(8, 8)})
    with pytest.raises(
        TargetError, match=r"'odd' \(32, 96\) in 4 bits on a CPU.*int8.*llm_int8_skip_modules"
    ):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["plain"]))
    assert not hasattr(model, "_veneer")
    model["odd"] = whole
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["odd", "plain"]))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 64), (3, 50), (5, 64)])
def test_4bit_encoding_is_that_of_bitsandbytes(kind, shape):
    need("bitsandbytes")
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit

    storage, module = (
        BASES["bitsandbytes_4bit"],
        Linear4bit(shape[1], shape[0], quant_type=kind).to("cpu"),
    )
    module.weight.quant_state.state2 is not None and storage.write(
        module.weight, _flat(module.weight)
    )
    values = torch.randn(shape)
    encoded = storage.encode(module.weight, values.double())
    theirs, state = quantize_4bit(values, quant_type=kind)
    fresh = encoded["absmax"] == state.absmax  # where the old scale does not come closer by chance
    assert fresh.double().mean() > 0.8
    decode = storage.decode(module.weight, {"packed": theirs.flatten(), "absmax": state.absmax})
    same = (storage.decode(module.weight, encoded) == decode).flatten()
    assert same[fresh.repeat_interleave(64)[: same.numel()]].double().mean() > 0.99
    assert error(storage.decode(module.weight, encoded), values) <= error(decode, values) + 1e-6


def _flat(weight):
    """A nested weight's stored tensors with plain scales."""
    from veneer.bases.bitsandbytes import _scales

    stored = BASES["bitsandbytes_4bit"].stored_tensors(weight)
    return {"packed": stored["packed"].clone(), "absmax": _scales(stored)}


def test_4bit_a_change_in_one_block_leaves_the_others_alone():
    module, storage = linear4bit(quant_type="nf4"), BASES["bitsandbytes_4bit"]
    values = storage.dense(module.weight).double()
    values[7] *= 3  # a row is a block here
    encoded = storage.encode(module.weight, values)
    dense, rows = storage.decode(module.weight, encoded).double(), torch.arange(32) != 7
    # All 32 scales lie in one block of 256 nested ones, so they are rounded anew, to within their 8
    # bits.
    assert error(dense[rows], values[rows]) < 0.02
    flat, stored = module, _flat(module.weight)
    storage.write(flat.weight, stored)
    dense = storage.decode(flat.weight, storage.encode(flat.weight, values)).double()
    assert torch.equal(dense[rows], storage.dense(flat.weight).double()[rows])


def repacks(module) -> bool:
    from bitsandbytes.functional import has_avx512bf16

    with torch.no_grad():
        module.eval()(torch.ones(1, 64))
    repacked = bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))
    assert repacked == bool(has_avx512bf16())
    return repacked


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("label", [torch.uint8, torch.bfloat16])
def test_4bit_weights_that_a_call_has_repacked_are_read_and_written(nested, label):
    """On CPUs with AVX512-BF16 a call in evaluation mode changes the layout, and rounds the scales
    to bfloat16."""
    storage = BASES["bitsandbytes_4bit"]
    module = linear4bit(quant_type="nf4", compress_statistics=nested, quant_storage=label)
    weight, before, dense = (
        module.weight,
        copied(storage.stored_tensors(module.weight)),
        storage.dense(module.weight),
    )
    if not repacks(module):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack")
    assert torch.equal(storage.stored_tensors(weight)["packed"], before["packed"])
    assert 0 < error(storage.dense(weight), dense) < 0.01  # the base has moved
    held_now = storage.dense(weight)
    storage.prepare(module)
    assert torch.equal(storage.dense(weight), held_now)
    assert repr(module.weight.dtype) == repr(label)
    module.eval()(torch.ones(1, 64))
    assert not weight.quant_state.packing_format_for_cpu
    x = torch.ones(1, 64, requires_grad=True)
    module(x).sum().backward()
    assert error(x.grad[0], held_now.sum(0)) < 1e-5
    storage.write(weight, before)  # from before the repacking
    assert bits(storage.stored_tensors(weight)) == bits(before)
    storage.release(module)
    assert repacks(module)
    storage.write(weight, before)
    assert bits(storage.stored_tensors(weight)) == bits(before)


def test_4bit_prepare_keeps_a_call_from_changing_the_base():
    module, storage = linear4bit(quant_type="nf4"), BASES["bitsandbytes_4bit"]
    storage.prepare(module)
    before = bits(flat_state(module))
    with torch.no_grad():
        module.eval()(torch.ones(1, 64))
    assert bits(flat_state(module)) == before


@pytest.mark.parametrize("name", ["Embedding4bit", "Embedding8bit"])
def test_embeddings_of_bitsandbytes(name):
    need("bitsandbytes")
    import bitsandbytes

    module = getattr(bitsandbytes.nn, name)(20, 64).to("cpu")
    storage = storage_of(module.weight)
    storage.prepare(module)
    assert isinstance(module, storage.modules())
    rows = torch.tensor([3, 0, 3])
    assert error(module(rows), storage.dense(module.weight)[rows]) < 1e-6
    storage.write(
        module.weight, storage.encode(module.weight, torch.ones(20, 64, dtype=torch.float64))
    )
    assert error(module(rows), torch.ones(3, 64)) < 1e-6


def test_8bit_the_scale_is_found_after_the_first_call():
    need("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    storage, module = (
        BASES["bitsandbytes_8bit"],
        Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").train(),
    )
    before = bits(storage.stored_tensors(module.weight))
    module(torch.ones(1, 64))
    with pytest.raises(TargetError, match="prepare"):
        storage.stored_tensors(module.weight)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        storage.prepare(other)
        assert bits(storage.stored_tensors(other.weight)) == before
        storage.write(
            other.weight, storage.encode(other.weight, torch.ones(32, 64, dtype=torch.float64))
        )
        assert error(other(torch.eye(64)) - other.bias, torch.ones(64, 32)) < 1e-5
        storage.prepare(other)
        assert (storage.dense(other.weight) == storage.dense(other.weight)[0, 0]).all()


def test_8bit_a_prepared_weight_keeps_its_scale_through_calls():
    need("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    storage, module = (
        BASES["bitsandbytes_8bit"],
        Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").train(),
    )
    keys = list(module.state_dict())
    storage.prepare(module)
    before = bits(storage.stored_tensors(module.weight))
    for training in (True, False):
        module.train(training)(torch.ones(1, 64))
        assert bits(storage.stored_tensors(module.weight)) == before
    storage.write(
        module.weight, storage.encode(module.weight, torch.ones(32, 64, dtype=torch.float64))
    )
    storage.prepare(module)
    module(torch.ones(1, 64))
    assert (storage.stored_tensors(module.weight)["values"] == 127).all()
    assert list(module.state_dict()) == keys


def test_8bit_encoding_is_that_of_bitsandbytes():
    need("bitsandbytes")
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Linear8bitLt

    storage, module = (
        BASES["bitsandbytes_8bit"],
        Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
    )
    values = torch.randn(32, 64).half()
    encoded = storage.encode(module.weight, values.double())
    theirs, scale, _ = int8_vectorwise_quant(values)
    fresh = encoded["scale"] == scale  # where the old scale does not come closer by chance
    assert fresh.double().mean() > 0.8
    assert (encoded["values"] - theirs)[fresh].abs().max() <= 1  # theirs divides in float16
    assert (encoded["values"] == theirs)[fresh].double().mean() > 0.9
    decode = storage.decode(module.weight, {"values": theirs, "scale": scale})
    assert error(storage.decode(module.weight, encoded), values) <= error(decode, values)


def test_what_bitsandbytes_has_not_quantised_is_refused():
    """8 bits made anew in calls, and weights that no .to(device) has quantised yet."""
    need("bitsandbytes")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in (
        Linear8bitLt(64, 32),
        Linear8bitLt(64, 32, has_fp16_weights=False),
        Linear4bit(64, 32),
    ):
        assert storage_of(module.weight) is None
    model = nn.Sequential(Linear4bit(64, 32), nn.Linear(32, 8))
    with pytest.raises(TargetError, match="'0', a Linear4bit"):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["1"]))


# ----------------------------------------------------------------------------------------------
# torchao


def quantised(config, dtype=torch.float32):
    from torchao.quantization import quantize_

    module = nn.Linear(64, 32, dtype=dtype)
    quantize_(module, config)
    return module


def test_torchao_encoding_is_that_of_quantize():
    need("torchao")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )

    storage = BASES["torchao"]
    for config in (
        Int8WeightOnlyConfig(),
        IntxWeightOnlyConfig(weight_dtype=torch.int4),
        Float8WeightOnlyConfig(),
    ):
        module, other = quantised(config), nn.Linear(64, 32)
        values = other.weight.detach().double()
        encoded = storage.encode(module.weight, values)
        quantize_(other, config)
        theirs = storage.stored_tensors(other.weight)
        assert encoded.keys() == theirs.keys()
        fresh = (
            encoded["scale"][:, 0] == theirs["scale"][:, 0]
        )  # where the old scale does not come closer
        same = encoded["qdata"].float() == theirs["qdata"].float()
        assert fresh.any()
        assert same[fresh].float().mean() > 0.99, config
        ours, theirs = (storage.decode(module.weight, each) for each in (encoded, theirs))
        assert error(ours, values) <= error(theirs, values) + 1e-6, config


def test_torchao_asymmetric_integers_stay_so():
    need("torchao")
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.quant_primitives import MappingType

    storage = BASES["torchao"]
    module = quantised(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, mapping_type=MappingType.ASYMMETRIC)
    )
    values = 1 + torch.rand(32, 64, dtype=torch.float64)
    encoded = storage.encode(module.weight, values)
    assert encoded["zero_point"].any()
    once = storage.decode(module.weight, encoded)
    storage.write(module.weight, encoded)
    assert bits(storage.encode(module.weight, once.double())) == bits(encoded)


def test_torchao_a_scale_of_x_belongs_to_the_weight():
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    storage, module = BASES["torchao"], quantised(Int8WeightOnlyConfig())
    module.weight.act_pre_scale = torch.linspace(0.5, 2, 64)
    dense = storage.dense(module.weight)
    assert error((module(torch.eye(64)) - module.bias).mT, dense) < 1e-6
    values = dense.double() + 0.01
    storage.write(module.weight, storage.encode(module.weight, values))
    assert error(storage.dense(module.weight), values) < 0.02
    assert error((module(torch.eye(64)) - module.bias).mT, values) < 0.02


def test_torchao_weights_that_quantise_x_are_refused():
    """Their call gives x no gradient, so training through them would be silently wrong."""
    need("torchao")
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
    )

    for config in (
        Int8DynamicActivationInt8WeightConfig(),
        Int8DynamicActivationIntxWeightConfig(),
    ):
        module = quantised(config)
        x = torch.randn(3, 64, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is None
        assert storage_of(module.weight) is None


def test_torchao_weights_that_cannot_be_dequantised_are_refused_before_the_training():
    need("torchao")
    from torchao.quantization import Int4Tensor

    weight = Int4Tensor(
        torch.zeros(32, 32, dtype=torch.int8),
        torch.ones(2, 32, dtype=torch.bfloat16),
        torch.zeros(2, 32, dtype=torch.bfloat16),
        [1, 32],
        torch.Size([32, 64]),
    )
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 4))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    assert storage_of(model[0].weight) is None
    with pytest.raises(TargetError):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["1"]))
    assert list(handle.changes) == ["1.weight"]


def test_torchao_a_layout_that_cannot_be_written_is_read_and_refused_by_a_merge():
    need("torchao")
    from torchao.utils import TorchAOBaseTensor

    class Odd(TorchAOBaseTensor):
        tensor_data_names = ["qdata"]
        tensor_attribute_names = []

        def __new__(cls, qdata):
            return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

        def __init__(self, qdata):
            self.qdata = qdata

        def dequantize(self):
            return self.qdata.float() / 2

    weight, storage = (
        nn.Parameter(Odd(torch.ones(2, 2, dtype=torch.int8)), requires_grad=False),
        BASES["torchao"],
    )
    assert storage_of(weight) is storage
    assert torch.equal(storage.dense(weight), torch.full((2, 2), 0.5))
    with pytest.raises(MergeError, match=r"Odd.*Float8Tensor.*unmerged"):
        storage.encode(weight, torch.ones(2, 2, dtype=torch.float64))


def test_torchao_itself_makes_modules_that_cannot_be_pickled():
    """If this fails, torchao has learnt it: then the copies above should be pickled too."""
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    with pytest.raises(AttributeError, match="partial"):
        pickle.dumps(quantised(Int8WeightOnlyConfig()))


# ----------------------------------------------------------------------------------------------
# gguf

READ_ONLY = [
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ1_M",
]


def packed_parameter(kind: str, rows: int = 16, columns: int = 512):
    """Blocks of random bytes with small scales, so that no type gives NaN."""
    need("gguf", "diffusers")
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    qtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    data = torch.randint(0, 60, (rows, columns // block * size), dtype=torch.uint8)
    return GGUFParameter(data, quant_type=qtype)


@pytest.mark.parametrize("kind", READ_ONLY)
def test_gguf_types_without_a_quantiser_are_read_exactly_and_refused_by_a_merge(kind):
    weight, storage = packed_parameter(kind), BASES["gguf"]
    import gguf

    assert storage_of(weight) is storage
    dense = storage.dense(weight)
    assert dense.shape == storage.shape(weight) == (16, 512)
    exact = torch.from_numpy(gguf.quants.dequantize(weight.as_tensor().numpy(), weight.quant_type))
    assert torch.equal(dense, exact)
    with pytest.raises(
        MergeError, match=rf"{kind}, which gguf can read but not write.*Q8_0.*unmerged"
    ):
        storage.encode(weight, dense.double() + 1)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_NL"])
def test_gguf_layers_of_such_types_run_forward_and_backward(kind):
    weight = packed_parameter(kind)
    from diffusers.quantizers.gguf.utils import GGUFLinear

    module = GGUFLinear(512, 16, compute_dtype=torch.float32)
    module.weight = weight
    x = torch.eye(512, requires_grad=True)
    y = module(x)
    y.sum().backward()
    dense = BASES["gguf"].dense(weight)
    assert error(y.mT, dense) < 2e-3  # diffusers computes the weights in float16
    assert error(x.grad, dense.sum(0).expand(512, -1)) < 2e-3


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4"]
)
def test_gguf_types_with_a_quantiser_keep_unchanged_blocks(kind):
    weight, storage = packed_parameter(kind), BASES["gguf"]
    import gguf

    made = gguf.quants.quantize(torch.randn(16, 512).numpy(), weight.quant_type)
    storage.write(weight, {"blocks": torch.from_numpy(made)})
    values = storage.dense(weight).double()
    values[3] *= 2
    dense = storage.decode(weight, storage.encode(weight, values)).double()
    rows = torch.arange(16) != 3
    assert torch.equal(dense[rows], values[rows])
    assert error(dense[3], values[3]) < 0.1
