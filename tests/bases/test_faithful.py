"""Faithful rounding onto the grid of a quantised weight: what the adapter reads survives, by
choosing for each number one of the two that lie around W + ΔW."""

from __future__ import annotations

import pytest
import torch
from tests.support.packed import LIBRARIES
from tests.support.toys import error
from torch import nn

import veneer
from veneer.bases import BASES, GridStorage, storage_of
from veneer.errors import MergeError
from veneer.kernels.grid import Grid

OUT, IN, RANK = 48, 256, 4
GRIDS = ("bitsandbytes_8bit", "bitsandbytes_4bit", "torchao")


def bits_of(stored):
    return {
        name: value.detach().contiguous().flatten().view(torch.uint8).tolist()
        for name, value in stored.items()
    }


def examples(storage: str):
    """Layers of that storage whose rows are wide enough for errors to cancel."""
    for library in LIBRARIES[storage]:
        pytest.importorskip(library)
    if storage == "torchao":
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )
        from torchao.quantization.quant_primitives import MappingType

        int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        groups = {"weight_dtype": int4, "granularity": PerGroup(32)}
        asymmetric = IntxWeightOnlyConfig(**groups, mapping_type=MappingType.ASYMMETRIC)
        for config in (
            Int8WeightOnlyConfig(),
            IntxWeightOnlyConfig(**groups),
            asymmetric,
            Float8WeightOnlyConfig(),
        ):
            linear = nn.Linear(IN, OUT)
            quantize_(linear, config)
            yield linear
        return
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    if storage == "bitsandbytes_8bit":
        yield Linear8bitLt(IN, OUT, has_fp16_weights=False).to("cpu")
        return
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            yield Linear4bit(IN, OUT, quant_type=kind, compress_statistics=nested).to("cpu")
    yield Linear4bit(IN - 6, OUT, quant_type="nf4").to("cpu")  # blocks that cross rows


def adapted(module, ratio: float):
    """(handle, change, W, ΔW) with ‖ΔW‖ = ratio ‖W‖, both float64."""
    handle = veneer.attach(module, veneer.LoraConfig(rank=RANK))
    (change,) = handle.changes.values()
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    W = change.storage.dense(module.weight).double()
    change.scale *= ratio * W.norm().item() / change.resolve(module.weight)[0].norm()
    return handle, change, W, change.resolve_float64(module.weight)[0].delta(torch.float64)[0]


@pytest.mark.parametrize("storage", GRIDS)
def test_what_is_stored_lies_on_the_grid_and_comes_back_from_it(storage):
    storage = BASES[storage]
    for module in [*storage.examples(), *examples(storage.name)]:
        stored = storage.stored_tensors(module.weight)
        dense, grid = storage.dense(module.weight), storage.grid(module.weight, stored)
        values = dense.double()
        mid, half = torch.empty_like(values), torch.empty_like(values)
        grid.find_neighbours(values, mid, half)
        assert not mid.any(), module
        assert not half.any(), module
        assert bits_of(storage.onto(module.weight, stored, values)) == bits_of(stored), module


@pytest.mark.parametrize("storage", GRIDS)
def test_a_small_change_survives_a_merge_and_nothing_is_left_of_it_afterwards(storage):
    torch.manual_seed(0)
    for module in examples(storage):
        handle, change, W, delta = adapted(module, 0.01)
        A = change.A.detach()[0].double()
        inside = A.mT @ torch.randn(RANK, 32, dtype=torch.float64)
        before = bits_of(change.storage.stored_tensors(module.weight))
        found = {}
        for rounding in ("nearest", "faithful", "auto"):
            (layer,) = handle.merge(rounding=rounding).layers
            merged = change.storage.dense(module.weight).double()
            share = ((merged - W) * delta).sum() / delta.square().sum()
            assert layer.retention == pytest.approx(share.item(), abs=1e-6), module
            found[rounding] = layer, error((merged - W) @ inside, delta @ inside)
            handle.unmerge()
            assert bits_of(change.storage.stored_tensors(module.weight)) == before, module
        (nearest, far), (faithful, near), (auto, _) = found.values()
        assert nearest.rounding == "storage"
        assert faithful.rounding == "faithful"
        assert auto == (faithful if nearest.retention < 0.99 else auto)
        assert faithful.nearest == nearest.retention == nearest.nearest
        assert faithful.retention == pytest.approx(1, abs=0.05), module
        assert near < 0.3 * far, module
        assert f"to nearest: {nearest.retention:.2%}" in str(veneer_report(handle))


def veneer_report(handle):
    report = handle.merge(rounding="faithful")
    handle.unmerge()
    return report


@pytest.mark.parametrize("storage", GRIDS)
def test_each_number_is_one_of_the_two_around_the_exact_one(storage):
    """By search among all numbers of the grid, in float64."""
    torch.manual_seed(0)
    for module in examples(storage):
        handle, change, W, delta = adapted(module, 0.05)
        handle.merge(rounding="faithful")
        storage = change.storage
        grid, merged = (
            storage.grid(module.weight, storage.stored_tensors(module.weight)),
            storage.dense(module.weight),
        )
        level = grid.levels.view(-1, 1, 1)
        numbers = (
            (level if grid.zero is None else level - grid.zero) * grid.scale
        ).double()  # [n, out, in]
        exact = W + delta
        below = torch.where(numbers <= exact, numbers, -torch.inf).amax(0)
        above = torch.where(numbers >= exact, numbers, torch.inf).amin(0)
        below, above = (
            torch.where(below.isinf(), above, below),
            torch.where(above.isinf(), below, above),
        )
        merged = merged.double()
        assert (
            torch.minimum((merged - below).abs(), (merged - above).abs()).max()
            <= 1e-6 * W.abs().max()
        ), module


@pytest.mark.parametrize("storage", GRIDS)
def test_rows_that_do_not_change_keep_their_numbers(storage):
    torch.manual_seed(0)
    for module in examples(storage):
        handle, change, W, _ = adapted(module, 0.05)
        with torch.no_grad():
            change.B[:, 5:9] = 0
        handle.merge(rounding="faithful")
        merged = change.storage.dense(module.weight).double()
        crosses = module.in_features != IN or "nested_code" in change.storage.stored_tensors(
            module.weight
        )
        assert error(merged[5:9], W[5:9]) <= (0.02 if crosses else 0), module
        assert not torch.equal(merged[:5], W[:5])


def test_a_change_that_nearest_keeps_is_rounded_to_nearest():
    torch.manual_seed(0)
    for module in examples("bitsandbytes_8bit"):
        handle, *_ = adapted(module, 0.2)
        (layer,) = handle.merge().layers
        assert layer.rounding == "storage"
        assert layer.retention == layer.nearest == pytest.approx(1, abs=0.01)


def test_measured_inputs_are_protected_too():
    torch.manual_seed(0)
    (module,) = examples("bitsandbytes_8bit")
    handle, change, W, delta = adapted(module, 1e-3)
    x = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, IN, dtype=torch.float64)
    found = []
    for inputs in (None, {"weight": (x.mT @ x)[None]}):
        handle.merge(rounding="faithful", inputs=inputs)
        found.append(error(x @ (change.storage.dense(module.weight).double() - W).mT, x @ delta.mT))
        handle.unmerge()
    assert found[1] < 0.2 * found[0]


def test_an_embedding_protects_what_it_writes():
    """Its inputs are indices: there the change is in the outputs, B's columns."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = bitsandbytes.nn.Embedding4bit(256, 64).to("cpu")
    assert storage_of(module.weight) is BASES["bitsandbytes_4bit"]
    handle = veneer.attach(module, veneer.LoraConfig(rank=2, targets="all"))
    (change,) = handle.changes.values()
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    W = change.storage.dense(module.weight).double()
    change.scale *= 0.01 * W.norm().item() / change.resolve(module.weight)[0].norm()
    (layer,) = handle.merge().layers
    assert layer.rounding == "faithful"
    assert layer.nearest < 0.2
    assert layer.retention == pytest.approx(1, abs=0.1)


def test_beyond_the_grid_the_last_number_is_all_there_is():
    grid = Grid(torch.tensor([-1.0, 0.0, 0.5]), torch.tensor([[2.0, -2.0, 0.0]]))
    value = torch.tensor([[3.0, 3.0, 3.0]], dtype=torch.float64)
    mid, half = torch.empty_like(value), torch.empty_like(value)
    grid.find_neighbours(value, mid, half)
    assert mid.tolist() == [[-2.0, -1.0, -3.0]]
    assert half.tolist() == [[0.0, 0.0, 0.0]]
    inside = torch.tensor([[0.25, -0.25, 0.0]], dtype=torch.float64)
    grid.find_neighbours(inside, mid, half)
    assert mid.tolist() == [[0.25, -0.25, 0.0]]
    assert half.abs().tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    "storage",
    [one.name for one in BASES if one.name in LIBRARIES and not isinstance(one, GridStorage)],
)
def test_inputs_to_protect_are_refused_where_there_is_no_grid(storage):
    """They would be left out without a word."""
    for library in LIBRARIES[storage]:
        pytest.importorskip(library)
    for module in BASES[storage].examples():
        model = nn.Sequential(module)
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
        before = bits_of(BASES[storage].stored_tensors(module.weight))
        with pytest.raises(
            MergeError, match=r"0\.weight: inputs= of a weight that is rounded as it is stored"
        ):
            handle.merge(
                inputs={"0.weight": torch.eye(BASES[storage].shape(module.weight)[1])[None]}
            )
        assert bits_of(BASES[storage].stored_tensors(module.weight)) == before
