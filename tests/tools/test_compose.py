"""Adapters made of several: equal to float64 arithmetic on the dense changes, for every layer,
variant and rank."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import checkpoints
from tests.support.checkpoints import merged
from tests.support.models import IDS, ConvNet, Shared, Stack, TinyLM
from tests.support.toys import error, example, flat
from torch import nn

import veneer
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import read
from veneer.adapter_files.verify import verify
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.layers import LAYERS
from veneer.lowrank import LowRank
from veneer.tools.compare import compare
from veneer.tools.compose import METHODS, compose
from veneer.tools.compose.merge_methods import MERGE_METHODS, merge_vectors, nearest_product
from veneer.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]
# : relative, in the Frobenius norm of the change: what storing factors and magnitudes in float32
# leaves
BOUND = 1e-5


class Experts(nn.Module):
    """Two stacks in one module; with ``size`` 6, 4 and 3 wide, else square."""

    def __init__(self, size: int | None = None):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, size or 6, size or 4) / 2)
        self.down = nn.Parameter(torch.randn(3, size or 4, size or 3) / 2)

    def forward(self, x):
        h = torch.bmm(x, self.gate_up.mT)
        return torch.bmm(h[..., : self.down.shape[2]], self.down.mT)


class UpDown(nn.Module):
    """Two stacks in one module, the later of which has the earlier name."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 8, 6) / 3)

    def forward(self, x):
        return torch.bmm(torch.bmm(x, self.up.mT), self.down.mT)


class BelowModel(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return self.experts(x)


def trained(model, path, size=0.3, args=(IDS,), **config):
    return checkpoints.trained(model, path, size, args, **config)


def check(model, out, parts, weights, within=BOUND):
    """Assert that the composed adapter gives W + Σ w (W_i − W), where merging each of ``parts``
    gives W_i. ``weights`` may be a function of the name."""
    base = {
        name: value.double()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    each, found, changed = [merged(model, part) for part in parts], merged(model, out), False
    for name, value in base.items():
        own = weights(name) if callable(weights) else weights
        expected = sum(weight * (one[name] - value) for weight, one in zip(own, each, strict=True))
        actual = found[name] - value
        changed |= bool(expected.any())
        assert torch.equal(actual, expected) or error(actual, expected) < within, name
    assert changed


# ------------------------------------------------------------------------------------------- exact
# sums


@pytest.mark.parametrize("variants", [("lora", "rslora"), ("dora", "lora")], ids="+".join)
@pytest.mark.parametrize(("kind", "number"), EXAMPLES)
def test_a_sum_on_every_layer(kind, number, variants, tmp_path):
    module, args = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    parts = [
        trained(model, tmp_path / f"{n}", 0.1, variant=variant, rank=1)
        for n, variant in enumerate(variants)
    ]
    report = compose(parts, tmp_path / "out", weights=[0.7, -0.4], base=model)
    assert report.verified
    assert report.error == 0
    check(model, tmp_path / "out", parts, [0.7, -0.4])
    veneer.load(model, tmp_path / "out")
    assert flat(module(*args)).isfinite().all()


@pytest.mark.parametrize("variant", [v.name for v in VARIANTS if v.peft is not None])
def test_every_variant_and_plain_lora_on_a_tied_model(variant, tmp_path):
    model = TinyLM(tied=True)
    parts = [
        trained(
            model,
            tmp_path / "a",
            0.1,
            variant=variant,
            rank=3,
            train_also=["norm"],
            exclude=["norm"],
        ),
        trained(model, tmp_path / "b", rank=1, targets=["q_proj", "embed_tokens", "up"]),
    ]
    compose(parts, tmp_path / "out", weights=[-0.5, 2.0], base=model)
    check(model, tmp_path / "out", parts, [-0.5, 2.0])
    assert read(tmp_path / "out").config.variant == (
        "dora" if variant.startswith("dora") else "lora"
    )


@pytest.mark.parametrize("build", [Stack, Shared, ConvNet], ids=lambda build: build.__name__)
def test_models_with_fused_shared_and_running_parts(build, tmp_path):
    model = build()
    parts = [trained(model, tmp_path / name, rank=rank) for name, rank in (("a", 2), ("b", 1))]
    compose(parts, tmp_path / "out", weights=[0.25, 0.5], base=model)
    check(model, tmp_path / "out", parts, [0.25, 0.5])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), groups=st.integers(1, 3), out=st.integers(1, 9), in_=st.integers(1, 9), count=st.integers(1, 5),
)  # fmt: skip
def test_sums_and_their_best_approximation_as_values(data, groups, out, in_, count):
    numbers = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)
    ranks = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    weights = data.draw(st.lists(numbers, min_size=count, max_size=count))
    scales = data.draw(st.lists(numbers, min_size=count, max_size=count))
    lows = [
        LowRank(torch.randn(groups, rank, in_), torch.randn(groups, out, rank), scale)
        for rank, scale in zip(ranks, scales, strict=True)
    ]
    dense = sum(
        weight * low.delta(torch.float64) for weight, low in zip(weights, lows, strict=True)
    )
    size = sum(abs(weight) * low.norm() for weight, low in zip(weights, lows, strict=True))
    total = LowRank.sum(lows, weights)
    assert total.scale > 0
    assert total.rank == sum(ranks)
    assert (total.delta(torch.float64) - dense).norm() < 1e-6 * size
    exact = LowRank.sum([low.to(torch.float64) for low in lows], weights)
    assert (exact.delta() - dense).norm() < 1e-13 * size
    compact = exact.compact()
    assert compact.rank <= min(out, in_) or compact.rank == 1
    assert (compact.delta(torch.float64) - dense).norm() < 1e-12 * size
    svd, true = exact.svd(), torch.linalg.svdvals(dense)
    k = min(svd.S.shape[1], true.shape[1])
    assert (svd.S[:, :k] - true[:, :k]).norm() < 1e-12 * size
    assert true[:, k:].norm() < 1e-12 * size
    rank = data.draw(st.integers(1, 6))
    low, left = svd.cut(rank)
    assert left == pytest.approx(float(true[:, rank:].norm()), abs=1e-12 * size)  # Eckart and Young
    assert float((low.delta() - dense).norm()) == pytest.approx(left, abs=1e-12 * size)
    share = data.draw(st.floats(0.01, 1))
    rank = svd.rank_for(share)
    energy = true.square().sum(0).cumsum(0) / true.square().sum()
    assert energy[min(rank, k) - 1] >= share - 1e-12
    assert rank == 1 or energy[rank - 2] < share + 1e-12


def test_equal_scales_are_kept_bit_for_bit(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name, targets="all-linear") for name in "ab")
    compose([a, b], tmp_path / "out", weights=[1, -1])
    one, other, out = read(a).products, read(b).products, read(tmp_path / "out").products
    for at, low in out.items():
        assert low.scale == one[at].scale
        assert torch.equal(low.A, torch.cat([one[at].A, other[at].A], 1))
        assert torch.equal(low.B, torch.cat([one[at].B, -other[at].B], 2))


def test_the_negation_takes_back_what_the_adapter_does(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", targets="all-linear")
    compose([a], tmp_path / "minus", weights=[-1])
    check(model, tmp_path / "minus", [a], [-1])
    compose([a, tmp_path / "minus"], tmp_path / "nothing", method="svd", rank=1)
    assert max(low.norm() for low in read(tmp_path / "nothing").products.values()) < 1e-12


def test_a_rank_that_no_weight_has_is_compacted(tmp_path):
    model = TinyLM()  # width 8
    parts = [trained(model, tmp_path / str(n), targets=["q_proj", "up"], rank=5) for n in range(3)]
    report = compose(parts, tmp_path / "out")
    assert {layer.rank for layer in report.layers} == {8}
    assert all(layer.ranks == (5, 5, 5) for layer in report.layers)
    check(model, tmp_path / "out", parts, [1, 1, 1])


@pytest.mark.parametrize(
    "rows", [[[True, False, True]] * 2, [[True, False, False], [False, False, True]]]
)
def test_rows_that_change_alone(rows, tmp_path):
    model = nn.Sequential(nn.Linear(6, 9))
    parts = [
        trained(model, tmp_path / str(n), targets=["0"], rank=3, slices={"0": part})
        for n, part in enumerate(rows)
    ]
    for name, more in (("exact", {}), ("small", {"rank": 2})):
        compose(parts, tmp_path / name, **more)
        veneer.load(
            model, tmp_path / name
        ).detach()  # refused where a row changes that the record does not name
        change = read(tmp_path / name).products["0"].delta()[0]
        assert change[:3].any()
        assert not change[3:6].any()
    check(model, tmp_path / "exact", parts, [1, 1])


def test_a_padding_row_stays_at_rest(tmp_path):
    model = nn.ModuleDict({"e": nn.Embedding(9, 5, padding_idx=3)})
    parts = [trained(model, tmp_path / str(n), rank=4) for n in range(2)]
    for method, more in (("sum", {}), ("svd", {"rank": 2}), ("ties", {"rank": 2, "density": 0.5})):
        compose(parts, tmp_path / method, method=method, **more)
        veneer.load(model, tmp_path / method).detach()  # refused where that row changes
        assert not read(tmp_path / method).products["e"].delta()[0, :, 3].any()


def test_sixteen_bits_are_summed_in_float32(tmp_path):
    model = TinyLM()
    parts = [
        trained(model, tmp_path / str(n), targets="all-linear", dtype="bfloat16") for n in range(2)
    ]
    compose(parts, tmp_path / "out", weights=[0.3, 0.3])
    assert read(tmp_path / "out").config.dtype is None
    check(model, tmp_path / "out", parts, [0.3, 0.3])


def test_weights_a_layer(tmp_path):
    model = TinyLM()
    parts = [trained(model, tmp_path / name, targets="all-linear") for name in "ab"]
    layers = {"model.layers.0.*": 0, "re:.*k_proj": [1, -3], "up": 0.5}
    compose(parts, tmp_path / "out", weights=[1, 2], layers=layers)

    def weights(name):
        factors = (
            (0, 0)
            if "layers.0" in name
            else (1, -3)
            if "k_proj" in name
            else (0.5, 0.5)
            if "up" in name
            else (1, 1)
        )
        return factors[0], 2 * factors[1]

    check(model, tmp_path / "out", parts, weights)
    assert not any("layers.0" in at for at in read(tmp_path / "out").products)


def test_a_tied_weight_goes_by_each_of_its_names(tmp_path):
    model = TinyLM(tied=True)
    parts = [trained(model, tmp_path / name, targets=["q_proj", "embed_tokens"]) for name in "ab"]
    for name in ("lm_head", "embed_tokens"):
        compose(parts, tmp_path / name, layers={name: [2, 1]})
        check(model, tmp_path / name, parts, lambda at: (2, 1) if "q_proj" not in at else (1, 1))


def test_a_weight_of_nought_leaves_an_adapter_out_and_says_so(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name, targets="all-linear") for name in "ab")
    report = compose([a, b], tmp_path / "out", weights=[1, 0])
    assert "weight 0" in str(report)
    assert "b has" in report.notes[0]
    check(model, tmp_path / "out", [a], [1])


# ---------------------------------------------------------------------------------------------------
# DoRA


def lying(model):
    """Base weights by path, as a checkpoint gives them."""
    return dict(model.state_dict())


@pytest.mark.parametrize(("kind", "number"), EXAMPLES)
def test_dora_with_weights_alone(kind, number, tmp_path):
    """Tensors by path serve as the base: the shapes tell how they are used."""
    module, _ = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    parts = [trained(model, tmp_path / name, 0.1, variant="dora", rank=1) for name in "ab"]
    base = lying(model) if number % 2 else lying(model).__getitem__
    compose(parts, tmp_path / "out", weights=[1.5, -0.5], base=base)
    check(model, tmp_path / "out", parts, [1.5, -0.5])


def test_a_square_stack_that_may_lie_either_way_asks_for_the_model(tmp_path):
    model = nn.ModuleDict({"experts": Experts(5)})
    parts = [trained(model, tmp_path / name, 0.1, variant="dora", rank=1) for name in "ab"]
    with pytest.raises(AdapterError, match=r"may be plain, stack of transposed.*pass model= too"):
        compose(parts, tmp_path / "out", base=lying(model), layers={"down": 0})
    compose(parts, tmp_path / "out", base=model)
    check(model, tmp_path / "out", parts, [1, 1])


def test_a_square_weight_that_may_lie_either_way_asks_for_the_model(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.ModuleDict({"square": conv1d(6, 6), "wide": conv1d(9, 6)})
    a, b = (trained(model, tmp_path / name, variant="dora") for name in "ab")
    with pytest.raises(AdapterError, match="pass model= too"):
        compose([a, b], tmp_path / "out", base=lying(model))
    compose([a, b], tmp_path / "out", base=lying(model), model=copy.deepcopy(model).to("meta"))
    check(model, tmp_path / "out", [a, b], [1, 1])
    only = {"square": 0}
    compose([a, b], tmp_path / "wide", base=lying(model), layers=only)
    check(model, tmp_path / "wide", [a, b], lambda name: (0, 0) if "square" in name else (1, 1))


def test_a_stack_that_lies_transposed(tmp_path):
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.proj = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.bmm(x, self.proj)

    model = nn.ModuleDict({"experts": Experts()})
    parts = [
        trained(model, tmp_path / name, variant=variant)
        for name, variant in (("a", "dora"), ("b", "rslora"))
    ]
    for base in (model, lying(model)):
        compose(parts, tmp_path / "out", weights=[0.5, 0.5], base=base, overwrite=True)
        check(model, tmp_path / "out", parts, [0.5, 0.5])


def test_a_sum_of_dora_to_a_rank_has_the_error_that_it_says(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    parts = [trained(model, tmp_path / str(n), variant="dora", rank=4) for n in range(2)]
    report = compose(parts, tmp_path / "out", weights=[0.5, 0.5], rank=3, base=model)
    W = model["layer"].weight.detach().double()
    expected = sum(0.5 * (merged(model, part)["layer.weight"] - W) for part in parts)
    found = merged(model, tmp_path / "out")["layer.weight"] - W
    assert 0.01 < report.error < 1
    assert report.layers[0].norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(
        report.error, rel=1e-4
    )


def test_dora_needs_the_base(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name, variant="dora", targets=["q_proj"]) for name in "ab")
    with pytest.raises(AdapterError, match=r"DoRA.*without the base.*pass base="):
        compose([a, b], tmp_path / "out")
    with pytest.raises(BaseMismatchError, match="another weight"):
        compose([a, b], tmp_path / "out", base=TinyLM())
    with pytest.raises(AdapterError, match="in the base"):
        compose([a, b], tmp_path / "out", base={})
    with pytest.raises(AdapterError, match="meta device"):
        compose([a, b], tmp_path / "out", base=copy.deepcopy(model).to("meta"))
    assert not (tmp_path / "out").exists()
    compose([a], tmp_path / "out")  # itself
    check(model, tmp_path / "out", [a], [1])


def test_a_merged_model_is_no_base(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", variant="dora", targets=["q_proj"])
    veneer.load(model, a).merge()
    with pytest.raises(AdapterError, match="unmerge"):
        compose([a], tmp_path / "out", weights=[2], base=model)
    veneer.unmerge(model)
    compose([a], tmp_path / "out", weights=[2], base=model)


def test_variants_of_other_layers_keep_their_strength(tmp_path):
    model = TinyLM()
    parts = [
        trained(model, tmp_path / variant, variant=variant, targets=[target], rank=3)
        for variant, target in (("rslora", "q_proj"), ("lora", "v_proj"), ("loha", "up"))
    ]
    compose(parts, tmp_path / "out")
    check(model, tmp_path / "out", parts, [1, 1, 1])


def test_dora_of_other_layers_needs_none(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", variant="dora", targets=["q_proj"])
    b = trained(model, tmp_path / "b", variant="dora", targets=["v_proj"])
    compose([a, b], tmp_path / "out")
    check(model, tmp_path / "out", [a, b], [1, 1])


def test_rows_that_a_sum_scales_to_nothing(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(6, 4)})
    files = read(trained(model, tmp_path / "a", variant="dora"))
    entry = files.low["layer"]
    weight = model["layer"].weight.double()
    norms = (weight + entry.low.delta(torch.float64)[0]).norm(dim=1)
    doubled = replace(entry, extras={"lora_magnitude_vector": 2 * norms})
    path = write_derived(tmp_path / "b", [files], {"layer": doubled}, variant="dora")
    with pytest.raises(AdapterError, match="scales 4 rows of 'layer' to 0"):
        compose([path], tmp_path / "out", weights=[-1], base=model)  # G = 1 − (2 − 1)


# ------------------------------------------------------------------------------- sums of a smaller
# rank


def test_the_error_of_a_rank_is_the_best_there_is(tmp_path):
    model = TinyLM()
    parts = [trained(model, tmp_path / str(n), targets="all-linear", rank=3) for n in range(2)]
    report = compose(parts, tmp_path / "out", rank=4)
    out, lows = read(tmp_path / "out").products, [read(part).products for part in parts]
    left, whole = [], []
    for layer in report.layers:
        dense = sum(low[layer.path].delta(torch.float64) for low in lows)
        singular = torch.linalg.svdvals(dense)
        assert layer.rank == 4
        assert layer.norm == pytest.approx(float(dense.norm()), rel=1e-6)
        assert layer.error == pytest.approx(
            float(singular[:, 4:].norm() / singular.norm()), rel=1e-5
        )
        assert error(out[layer.path].delta(torch.float64), dense) == pytest.approx(
            layer.error, rel=1e-4
        )
        left.append(float(singular[:, 4:].norm()))
        whole.append(float(singular.norm()))
    assert report.error == pytest.approx(math.hypot(*left) / math.hypot(*whole), rel=1e-5)
    assert f"{report.error:.2%}" in str(report)


def test_an_energy_chooses_the_rank_of_each_layer(tmp_path):
    model = TinyLM()
    parts = [trained(model, tmp_path / str(n), targets="all-linear", rank=4) for n in range(2)]
    report = compose(parts, tmp_path / "out", energy=0.9)
    assert len({layer.rank for layer in report.layers}) > 1
    assert all(layer.error**2 <= 0.1 for layer in report.layers)
    check(model, tmp_path / "out", parts, [1, 1], within=math.sqrt(0.1))
    assert compose(parts, tmp_path / "all", energy=1).error < 1e-7


def test_a_rank_that_is_large_enough_leaves_nothing_out(tmp_path):
    model = TinyLM()
    parts = [trained(model, tmp_path / str(n), targets="all-linear") for n in range(2)]
    report = compose(parts, tmp_path / "out", rank=100)
    assert report.error == 0
    check(model, tmp_path / "out", parts, [1, 1])


# -------------------------------------------------------------------------------------------
# mixtures


def ties_by_hand(vectors, weights, density):
    """The three steps of the paper, entry by entry."""
    trimmed = []
    for vector, weight in zip(vectors, weights, strict=True):
        order = vector.abs().flatten().argsort(descending=True)[: round(density * vector.numel())]
        flat_ = torch.zeros(vector.numel(), dtype=torch.float64)
        flat_[order] = vector.flatten()[order] * weight
        trimmed.append(flat_)
    result = torch.zeros_like(trimmed[0])
    for place in range(len(result)):
        entries = [float(vector[place]) for vector in trimmed]
        sign = math.copysign(1, sum(entries))
        agreeing = [entry for entry in entries if entry * sign > 0]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result.reshape(vectors[0].shape)


@settings(max_examples=30, deadline=None)
@given(
    density=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    weights=st.lists(st.floats(0.1, 2) | st.floats(-2, -0.1), min_size=1, max_size=4),
)
def test_ties_is_the_papers(density, weights):
    vectors = [torch.randn(2, 5, 4, dtype=torch.float64) for _ in weights]
    found = merge_vectors(
        MERGE_METHODS["ties"], [lambda v=v: v for v in vectors], weights, density, "0"
    )
    torch.testing.assert_close(found, ties_by_hand(vectors, weights, density))


@pytest.mark.parametrize("method", ["ties", "prune"])
def test_mixtures_are_pefts_on_dense_vectors(method):
    peers = pytest.importorskip("peft.utils.merge_utils")
    vectors = [torch.randn(1, 20, 10, dtype=torch.float64) for _ in range(3)]
    peer = peers.ties if method == "ties" else peers.magnitude_prune
    expected = peer(
        [vector.clone() for vector in vectors], torch.full((3,), 0.7, dtype=torch.float64), 0.2
    )
    found = merge_vectors(
        MERGE_METHODS[method], [lambda v=v: v for v in vectors], [0.7] * 3, 0.2, "0"
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_drops_at_random_and_rescales(method):
    ones, merge_method = torch.ones(1, 200, 100, dtype=torch.float64), MERGE_METHODS[method]

    def run(seed):
        return merge_vectors(merge_method, [lambda: ones], [2.0], 0.25, seed)

    found = run("0")
    assert set(found.unique().tolist()) == {0.0, 8.0}
    assert float(found.mean()) == pytest.approx(2, abs=4 * 8 * math.sqrt(0.25 * 0.75 / 20000))
    assert torch.equal(found, run("0"))
    assert not torch.equal(found, run("1"))
    two = merge_vectors(merge_method, [lambda: ones, lambda: ones], [1.0, 1.0], 0.25, "0")
    kinds = (
        {0.0, 4.0, 8.0} if method == "dare" else {0.0, 4.0}
    )  # drawn independently; the mean of those that agree
    assert set(two.unique().tolist()) == kinds


@pytest.mark.parametrize("method", list(MERGE_METHODS))
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_mixtures_of_adapters_are_those_of_their_dense_changes(method, variant, tmp_path):
    """On models with a tie or fused weights; the rank is all there is, so nothing is left out."""
    model = Stack() if variant == "dora" else TinyLM(tied=True)
    parts = [trained(model, tmp_path / str(n), variant=variant, rank=2) for n in range(2)]
    report = compose(
        parts,
        tmp_path / "out",
        weights=[1, -0.5],
        method=method,
        density=0.5,
        rank=1000,
        base=model,
    )
    assert report.error < 1e-9
    each, found = [merged(model, part) for part in parts], merged(model, tmp_path / "out")
    if MERGE_METHODS[method].keeps_random:
        again = compose(
            parts,
            tmp_path / "again",
            weights=[1, -0.5],
            method=method,
            density=0.5,
            rank=1000,
            base=model,
        )
        assert torch.equal(flat(merged(model, again.path)), flat(found))
        other = compose(
            parts,
            tmp_path / "other",
            weights=[1, -0.5],
            method=method,
            density=0.5,
            rank=1000,
            base=model,
            seed=1,
        )
        assert not torch.equal(flat(merged(model, other.path)), flat(found))
        return
    for name, base in model.state_dict().items():
        vectors = [one[name] - base.double() for one in each]
        expected = merge_vectors(
            MERGE_METHODS[method], [lambda v=v: v for v in vectors], [1, -0.5], 0.5, "0"
        )
        assert error(found[name] - base.double(), expected) < 1e-4 or not expected.any(), name


def test_a_mixture_to_a_rank_tells_its_error(tmp_path):
    model = nn.ModuleDict({"layer": nn.Linear(120, 90)})
    parts = [trained(model, tmp_path / str(n), rank=3) for n in range(2)]
    report = compose(parts, tmp_path / "out", method="ties", density=0.3, rank=8)
    vectors = [read(part).products["layer"].delta(torch.float64) for part in parts]
    dense = merge_vectors(MERGE_METHODS["ties"], [lambda v=v: v for v in vectors], [1, 1], 0.3, "")
    found = read(tmp_path / "out").products["layer"].delta(torch.float64)
    assert report.layers[0].rank == 8
    assert 0.05 < report.error < 0.9
    assert error(found, dense) == pytest.approx(report.error, rel=1e-5)
    best = torch.linalg.svdvals(dense)[0, 8:].norm() / dense.norm()
    assert report.error < 1.001 * float(best)
    assert compose(parts, tmp_path / "usual", method="ties", density=0.3).layers[0].rank == 6


@pytest.mark.parametrize("shape", [(1, 600, 800), (2, 90, 120), (1, 120, 90), (1, 5, 4)])
def test_factors_of_a_merge_are_nearly_the_best(shape):
    dense = (
        torch.randn(shape, dtype=torch.float64) @ torch.diag(0.9 ** torch.arange(shape[2])).double()
    )
    low, left = nearest_product(dense, 3, None)
    best = float(torch.linalg.svdvals(dense)[:, 3:].norm())
    assert low.rank == 3
    assert left == pytest.approx(float((low.delta() - dense).norm()))
    assert best * (1 - 1e-9) <= left <= (1.02 if 600 in shape else 1.001) * best


# ------------------------------------------------------------------------------- what is trained in
# full


def heads(tmp_path, model):
    return [
        trained(
            model,
            tmp_path / name,
            targets=["q_proj"],
            train_also=["lm_head", "norm"],
            bias="targets",
        )
        for name in "ab"
    ]


def test_parts_trained_in_full(tmp_path):
    model = TinyLM()
    parts = heads(tmp_path, model)
    compose(parts, tmp_path / "out", weights=[0.7, -0.2], base=model)
    check(model, tmp_path / "out", parts, [0.7, -0.2])
    compose(parts, tmp_path / "mean", weights=[0.25, 0.75])  # adds up to 1: no base
    check(model, tmp_path / "mean", parts, [0.25, 0.75])
    compose(parts[0], tmp_path / "one")
    check(model, tmp_path / "one", parts[:1], [1])
    with pytest.raises(AdapterError, match=r"no base values of .*lm_head.*add up to 1"):
        compose(parts, tmp_path / "none")
    compose(parts, tmp_path / "low", layers={"lm_head": 0, "norm": 0, "re:.*bias": 0})
    assert not read(tmp_path / "low").full
    with pytest.raises(AdapterError, match="no base values of"):
        compose(parts, tmp_path / "none", method="ties", density=0.5, weights=[0.5, 0.5])
    with pytest.raises(AdapterError, match="no base values of lm_head"):
        compose(
            parts,
            tmp_path / "none",
            base={n: v for n, v in model.state_dict().items() if "lm_head" not in n},
        )
    assert not (tmp_path / "none").exists()


def test_a_module_in_full_here_and_at_a_low_rank_there_is_refused(tmp_path):
    model = TinyLM()
    full = trained(model, tmp_path / "full", targets=["q_proj"], train_also=["lm_head"])
    low = trained(model, tmp_path / "low", targets=["q_proj", "lm_head"])
    for parts in ([full, low], [low, full]):
        with pytest.raises(
            AdapterError, match=r"'lm_head\.weight', trained in full in \S+full and .* \S+low"
        ):
            compose(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_trained_in_full_stays_tied(tmp_path):
    model = TinyLM(tied=True)
    parts = [
        trained(model, tmp_path / n, targets=["q_proj"], train_also=["embed_tokens", "lm_head"])
        for n in "ab"
    ]
    for method in ("sum", "dare"):
        density = None if method == "sum" else 0.5
        compose(
            parts, tmp_path / method, weights=[1, 2], base=model, method=method, density=density
        )
        full = read(tmp_path / method).full
        assert torch.equal(full["lm_head"]["weight"], full["model.embed_tokens"]["weight"])


def test_a_variance_below_nought_is_refused(tmp_path):
    model = ConvNet()
    parts = []
    for name, variance in (("a", 3.0), ("b", 0.1)):
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
        handle.layers["norm"].full._buffers["running_var"].fill_(variance)
        handle.save(tmp_path / name)
        handle.detach()
        parts.append(tmp_path / name)
    with pytest.raises(AdapterError, match=r"variance below 0 in 'norm\.running_var'"):
        compose(parts, tmp_path / "out", weights=[-1, 1], base=model)
    compose(parts, tmp_path / "out", weights=[0.5, 0.5], base=model)
    check(model, tmp_path / "out", parts, [0.5, 0.5])


# ------------------------------------------------------------------------------------------- side
# by side


def test_parameters_that_are_nested_otherwise_in_each_file(tmp_path):
    model = nn.ModuleDict({"experts": Experts(), "out": nn.Linear(4, 4)})
    up, down, both = (
        trained(model, tmp_path / name, targets=targets)
        for name, targets in (
            ("up", ["gate_up", "out"]), ("down", ["down"]), ("both", ["gate_up", "down"]),
        )
    )  # fmt: skip
    compose([up, both], tmp_path / "a", weights=[1, 2])
    check(model, tmp_path / "a", [up, both], [1, 2])
    with pytest.raises(AdapterError, match=r"parameters of 'experts'.*pass the model"):
        compose([down, up], tmp_path / "b")
    compose([down, up], tmp_path / "b", model=copy.deepcopy(model).to("meta"))
    check(model, tmp_path / "b", [down, up], [1, 1])
    for folder in ("a", "b"):  # read without a model, each is still where it was
        for at, low in read(tmp_path / folder).products.items():
            parts = [(read(part).products.get(at), weight) for part, weight in
                     (((up, 1), (both, 2)) if folder == "a" else ((down, 1), (up, 1)))]  # fmt: skip
            dense = sum(
                weight * part.delta(torch.float64) for part, weight in parts if part is not None
            )
            assert error(low.delta(torch.float64), dense) < BOUND


# PEFT looks for modules alone there, and uses the patterns all the same
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_peft_loads_parameters_that_are_nested(tmp_path):
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.out = Experts(), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.experts(x))

    model, x = Model(), torch.randn(3, 2, 4)
    parts = [trained(model, tmp_path / name, targets=[name, "out"]) for name in ("down", "gate_up")]
    compose(parts, tmp_path / "out", weights=[0.5, 2], base=model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
    veneer.load(model, tmp_path / "out")
    assert error(theirs(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore")  # PEFT's own, and that its adapters carry no fingerprint
def test_parameters_that_peft_lists_in_another_order_than_the_models(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(9)
    model, paths = BelowModel(UpDown()), [tmp_path / name for name in "ab"]
    for path in paths:
        config = peft.LoraConfig(
            r=2,
            lora_alpha=2,
            target_modules=[],
            target_parameters=["experts.down", "experts.up"],
            rank_pattern={"experts.up": 4},
            alpha_pattern={"experts.up": 4},
        )
        made = peft.get_peft_model(copy.deepcopy(model), config)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(path)
    for use in (
        lambda: compose(paths, tmp_path / "out"),
        lambda: compare(*paths),
        lambda: read(paths[0]).products,
    ):
        with pytest.raises(AdapterError, match=r"parameters of 'experts'.*pass the model"):
            use()
    assert not (tmp_path / "out").exists()
    assert verify(paths[0]).ok
    compose(paths, tmp_path / "out", model=copy.deepcopy(model).to("meta"))
    check(model, tmp_path / "out", paths, [1, 1])
    # read without a model, the result, which Veneer wrote, has the changes where they are
    full = merged(model, tmp_path / "out")
    for path, low in read(tmp_path / "out").products.items():
        delta = full[path] - model.state_dict()[path]
        assert error(low.delta(torch.float64).norm(), delta.norm()) < BOUND


def test_adapters_that_do_not_belong_together(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", targets=["q_proj"])
    with pytest.raises(BaseMismatchError, match="different bases"):
        compose([a, trained(TinyLM(), tmp_path / "b", targets=["q_proj"])], tmp_path / "out")
    wide = trained(TinyLM(width=12), tmp_path / "wide", targets=["q_proj"])
    foreign = [replace(read(path), record=None) for path in (a, wide)]
    with pytest.raises(AdapterError, match=r"changes of 'model\.layers\.0\.self_attn\.q_proj'"):
        compose(foreign, tmp_path / "out")
    tied, untied = TinyLM(tied=True), TinyLM()
    untied.load_state_dict(tied.state_dict())
    one = trained(tied, tmp_path / "tied", targets=["embed_tokens"])
    other = trained(untied, tmp_path / "untied", targets=["embed_tokens", "lm_head"])
    with pytest.raises(AdapterError, match="tied to another weight in one"):
        compose([one, other], tmp_path / "out")
    as_parameter = trained(model, tmp_path / "p", targets=["q_proj"])
    layer = replace(
        next(iter(read(a).low.values())), target_path="model.layers.0.self_attn.q_proj.weight"
    )
    odd = replace(read(as_parameter), low={"model.layers.0.self_attn.q_proj": layer}, record=None)
    with pytest.raises(AdapterError, match="of its parameter"):
        compose([a, odd], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_record_nothing_is_proven(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name, targets=["q_proj"]) for name in "ab")
    report = compose([a, replace(read(b), record=None)], tmp_path / "out")
    assert not report.verified
    assert "no record of the base" in str(report)
    assert read(tmp_path / "out").record is None


def test_pefts_adapters_are_summed_as_peft_applies_them(tmp_path):
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(7)
        return nn.ModuleDict(
            {"attn": nn.MultiheadAttention(8, 2, batch_first=True), "up": nn.Linear(8, 12)}
        )

    def outputs(model):
        x = torch.linspace(-1, 1, 24).reshape(1, 3, 8)
        return flat((model["attn"](x, x, x)[0], model["up"](x)))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = build()

        def forward(self, x):
            return self.parts["up"](self.parts["attn"](x, x, x)[0])

    x, paths = torch.randn(2, 3, 8), []
    for number, rslora in enumerate((False, True)):
        made = peft.get_peft_model(
            Both(),
            peft.LoraConfig(
                r=2 + number, lora_alpha=4, target_modules=["attn", "up"], use_rslora=rslora
            ),
        )
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        made.save_pretrained(tmp_path / f"p{number}")
        paths.append(tmp_path / f"p{number}")
    compose(paths, tmp_path / "out", weights=[0.5, -0.75])
    theirs = peft.PeftModel.from_pretrained(Both(), tmp_path / "out").eval()
    ours = Both()
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(ours, tmp_path / "out")
    assert error(ours(x), theirs(x)) < 1e-6
    dense = []
    for path in paths:
        twin = Both().double()
        with pytest.warns(veneer.UnverifiedAdapter):
            veneer.load(twin, path)
        veneer.merge(twin)
        dense.append(twin.parts["attn"].out_proj.weight.detach().clone())
    base = build()["attn"].out_proj.weight.double()
    veneer.merge(ours)
    found = ours.parts["attn"].out_proj.weight.double() - base
    assert error(found, 0.5 * (dense[0] - base) - 0.75 * (dense[1] - base)) < 1e-5


def test_not_for_peft_and_without_a_record_do_not_mix(tmp_path):
    model = nn.ModuleDict({"c": nn.Conv1d(4, 4, 3, dilation=2)})
    a, b = (trained(model, tmp_path / name) for name in "ab")
    with pytest.raises(AdapterError, match="PEFT applies otherwise"):
        compose([a, replace(read(b), record=None)], tmp_path / "out")


# -------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1]}, "1 weights for 2"),
        ({"weights": [1, math.nan]}, "finite"),
        ({"weights": [0, 0]}, "all 0"),
        ({"method": "tie"}, "nearest: 'ties'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"rank": 2, "energy": 0.5}, "both a rank and an energy"),
        ({"method": "sum", "rank": 2}, "exact sum"),
        ({"method": "svd"}, "neither a rank nor an energy"),
        ({"method": "ties"}, r"density=None for ties.*density=0\.2"),
        ({"method": "dare", "density": 0}, "density=0"),
        ({"density": 0.5}, "a density for sum"),
        ({"layers": {"q_prj": 2}}, "nearest: 'q_proj'"),
        ({"layers": {"q_proj": [1, 2, 3]}}, "other than 2"),
        ({"layers": {"re:(": 1}}, "regular expression"),
        ({"layers": {"q_proj": "x"}}, "finite|other than"),
    ],
)
def test_options_that_cannot_be(options, match, tmp_path):
    model = TinyLM()
    parts = [trained(model, tmp_path / name, targets=["q_proj"]) for name in "ab"]
    with pytest.raises(ConfigError, match=match):
        compose(parts, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_adapters_and_a_path_that_exists(tmp_path):
    with pytest.raises(ConfigError, match="no adapter"):
        compose([], tmp_path / "out")
    a = trained(TinyLM(), tmp_path / "a", targets=["q_proj"])
    with pytest.raises(OutputExistsError):
        compose([a], a)
    before = read(a).products
    compose([a], a, weights=[2], overwrite=True)  # onto itself: everything was read before
    for at, low in read(a).products.items():
        assert error(low.delta(), 2 * before[at].delta()) < 1e-6


@pytest.mark.parametrize("weight", [1e10, 1e300])
def test_a_sum_that_nobody_could_read_takes_no_other_s_place(weight, tmp_path):
    a = trained(TinyLM(), tmp_path / "a", targets=["q_proj"])
    before = {path.name: path.read_bytes() for path in a.iterdir()}
    with pytest.raises(AdapterError, match="at most"):
        compose([a], a, weights=[weight], overwrite=True)
    assert {path.name: path.read_bytes() for path in a.iterdir()} == before
    read(a)


def test_a_base_is_no_path(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", targets=["q_proj"], variant="dora")
    with pytest.raises(ConfigError, match="open_checkpoint"):
        compose([a], tmp_path / "out", weights=[2], base=str(tmp_path))


def test_every_method_is_documented():
    assert set(METHODS) == {"sum", "svd", *MERGE_METHODS}
    for method in METHODS:
        assert method in str(sys.modules["veneer.tools.compose"].__doc__)


def test_the_record_says_what_it_was_made_of(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name, targets=["q_proj"]) for name in "ab")
    compose(
        [a, b],
        tmp_path / "out",
        weights=[1, 0.5],
        rank=3,
        provenance={"why": "a test"},
        layers={"q_proj": 2},
    )
    said = json.loads((tmp_path / "out" / "veneer.json").read_text())["provenance"]
    assert said["why"] == "a test"
    assert said["composed"]["method"] == "svd"
    assert said["composed"]["rank"] == 3
    assert said["composed"]["layers"] == {"q_proj": [2]}
    record = read(b).metadata["hashes"]["record"]
    assert said["composed"]["of"][1] == {"adapter": "b", "record": record, "weight": 0.5}


def test_parts_trained_in_full_need_the_base_that_they_were_trained_on(tmp_path):
    model = TinyLM()
    parts, other = heads(tmp_path, model), copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(1)
    with pytest.raises(BaseMismatchError, match="another weight"):
        compose(parts, tmp_path / "out", weights=[1, 1], base=other)
    assert not (tmp_path / "out").exists()
