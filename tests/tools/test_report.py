"""A look inside: every number is that of full decompositions in float64, and a repair takes away
what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tests.support import checkpoints
from tests.support.checkpoints import merged
from tests.support.models import ConvNet, TinyLM
from tests.support.toys import error, example, randomise
from torch import nn

import veneer
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError, BaseMismatchError, ConfigError, OutputExistsError
from veneer.layers import GENERAL_KIND, LAYERS, kind_for
from veneer.lowrank import LowRank
from veneer.tools import intruders
from veneer.tools.compare import compare
from veneer.tools.compose import compose
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.compose.repair import repair
from veneer.tools.intruders import find_intruders, leading_triples
from veneer.tools.report import Cut, ReportLayer, _next_rank, effective_rank, examine

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]


def trained(model, path, size=0.6, **config):
    return checkpoints.trained(model, path, size, **config)


def unfolded(model, path, tensor):
    """A weight as [g, out, in] in float64."""
    above, _, name = path.rpartition(".")
    module = model.get_submodule(above)
    kind = kind_for(module, name)
    return kind.unfold(tensor.double(), kind.dims(module, tensor.shape))


def reference(W, changed, count, threshold):
    """(cosines, Σ σ u vᵀ of the intruders) of one matrix, from two full SVDs."""
    X, s, _ = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = torch.linalg.svd(changed, full_matrices=False)
    count = min(count, len(S))
    X = X[:, s > 1e-6 * s[0]]
    cosines = (X.mT @ U[:, :count]).abs().amax(0)
    new = cosines < threshold
    return cosines, (U[:, :count][:, new] * S[:count][new]) @ Vh[:count][new]


# ---- singular triples, intruders
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(130, 130), (260, 110), (100, 300), (9, 4)])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_leading_triples_are_those_of_a_full_svd(shape, decay):
    torch.manual_seed(0)
    slope = torch.logspace(0, -decay, shape[1], dtype=torch.float64)
    matrix = torch.randn(shape, dtype=torch.float64) * slope
    U, S, V = leading_triples(matrix, 4)
    X, s, Yh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(S, s[:4], rtol=1e-12)
    assert ((U * X[:, :4]).sum(0).abs() - 1).abs().max() < 1e-9
    assert error((U * S) @ V.mT, (X[:, :4] * s[:4]) @ Yh[:4]) < 1e-6


def test_a_matrix_that_meets_itself_is_decomposed():
    """A bidiagonalisation from one vector sees each singular value once."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(120, 120, dtype=torch.float64))[0]
    assert intruders._bidiagonalise(Q, 3) is None
    assert leading_triples(Q, 3).S.tolist() == pytest.approx([1, 1, 1])
    assert leading_triples(torch.zeros(120, 120, dtype=torch.float64), 2).S.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("kind", "number", "variant"),
    [
        *((*which, "lora") for which in EXAMPLES),
        *((*which, "dora") for which in EXAMPLES if which[1] == 0),
    ],
)
def test_intruders_and_their_repair_on_every_layer(kind, number, variant, tmp_path):
    module, _ = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    check_repair(
        model, trained(model, tmp_path / "a", variant=variant, rank=1), tmp_path, threshold=0.9
    )


@pytest.mark.parametrize(
    "build", [lambda: TinyLM(tied=True), ConvNet], ids=["tied", "convolutions"]
)
def test_intruders_and_their_repair_in_a_model(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    path = trained(model, tmp_path / "a", size=1.0, train_also=["norm"], exclude=["norm"])
    assert check_repair(model, path, tmp_path, threshold=0.9)


def check_repair(model, path, tmp_path, threshold, count=3, factor=0.25):
    """Cosines, counts and the repaired weights against the reference; how many intruders there
    are."""
    base, changed = model.state_dict(), merged(model, path)
    found = {
        one.aligned_weight.weight_path: one
        for one in find_intruders(
            read(path), FrozenWeights(model), count=count, threshold=threshold, control=True
        )
    }
    report = repair(
        path, tmp_path / "out", base=model, factor=factor, count=count, threshold=threshold
    )
    after, total = merged(model, tmp_path / "out"), 0
    assert found.keys() == read(path).metadata["changes"].keys()
    for name, one in found.items():
        W, new = (unfolded(model, name, state[name]) for state in (base, changed))
        cosines, parts = zip(
            *(reference(*pair, count, threshold) for pair in zip(W, new, strict=True)), strict=True
        )
        cosines, part = torch.cat(cosines), torch.stack(parts)
        assert (torch.tensor(one.cosines, dtype=torch.float64) - cosines).abs().max() < 1e-4
        assert len(one.control) == len(one.cosines)
        assert one.norm == pytest.approx(float(W.norm()), rel=1e-9)
        assert one.distance == pytest.approx(float((new - W).norm()), rel=1e-5)
        total += one.count
        assert one.count == int((cosines < threshold).sum())
        frozen = (new == W).all(2, keepdim=True) | (new == W).all(1, keepdim=True)
        expected = new + ((factor - 1) * part).masked_fill(frozen, 0)
        assert error(unfolded(model, name, after[name]), expected) < 1e-5, name
    assert sum(one.count for one in found.values()) == report.intruders
    if report.intruders:
        assert report.removed > 0
        assert f"scaled by {factor}" in str(report)
    for name, value in changed.items():  # what is trained in full stays
        if (
            name not in found
            and value.is_floating_point()
            and not any(value is changed[other] for other in found)
        ):
            tied = any(torch.equal(value, changed[other]) for other in found)
            assert tied or torch.equal(after[name], value), name
    return total


def test_a_direction_that_the_base_has_is_no_intruder_and_a_new_one_is(tmp_path):
    """Of a diagonal base the singular vectors are known by hand."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    model[0].weight.data = torch.diag(torch.tensor([6.0, 5, 4, 3, 2, 1]))
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, alpha=2, targets="all"))
    change = handle.changes["0.weight"]
    even = torch.tensor([1.0, 1, 1, 1, 1, 0]) / 5**0.5
    with torch.no_grad():
        dict(change.named_parameters())["A"].copy_(torch.stack([torch.eye(6)[5], even]))
        dict(change.named_parameters())["B"].copy_(
            torch.stack([20 * torch.eye(6)[5], 100 * even]).mT
        )
    handle.save(tmp_path / "a")
    handle.detach()
    (one,) = find_intruders(read(tmp_path / "a"), FrozenWeights(model), count=2, threshold=0.75)
    assert (
        one.count == 1
    )  # five of the six alike, not the last one that was raised to the second place
    assert one.cosines[0] == pytest.approx(5**-0.5, abs=0.05)
    assert one.cosines[1] == pytest.approx(1)
    assert one.intruders[0].S.item() == pytest.approx(104, abs=2)
    gone = repair(tmp_path / "a", tmp_path / "b", base=model, factor=0, count=2, threshold=0.75)
    assert gone.intruders == 1
    assert torch.linalg.matrix_norm(merged(model, tmp_path / "b")["0.weight"], 2) < 25


def test_the_control_is_as_large_as_the_change():
    low = LowRank(torch.randn(1, 3, 20), torch.randn(1, 30, 3), 0.7)
    random = intruders._random_change_like(low, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.linalg.svdvals(random)[:3], low.svd().S[0], rtol=1e-12)
    assert torch.linalg.svdvals(random)[3:].max() < 1e-12
    assert (low.delta(torch.float64)[0] * random).sum().abs() < 0.5 * low.norm() ** 2


# ---- the numbers of a report
# -----------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    torch.manual_seed(0)
    model = TinyLM()
    return (
        model,
        trained(model, tmp_path / "a", rank=3),
        trained(model, tmp_path / "b", rank=2, targets=["q_proj", "up"]),
    )


def test_a_report_has_the_numbers_of_the_dense_changes(pair):
    model, path, other = pair
    report = examine(path, base=model, base_name="tiny", other=other, count=2)
    dense = {at: low.delta(torch.float64) for at, low in read(path).products.items()}
    beside = {layer.path: layer for layer in compare(path, other).layers}
    left, whole = dict.fromkeys((1, 2), 0.0), 0.0
    for layer in report.layers:
        S = torch.linalg.svdvals(dense[layer.path][0])
        assert torch.allclose(torch.tensor(layer.spectrum, dtype=torch.float64)[:3], S[:3])
        shares = S[:3] / S[:3].sum()
        assert layer.effective_rank == pytest.approx(
            float(torch.exp(-(shares * shares.log()).sum()))
        )
        assert layer.used == layer.effective_rank / 3
        kept = (S.square().cumsum(0) / S.square().sum())[: layer.rank_90]
        assert kept[-1] >= 0.9 - 1e-12
        assert len(kept) == 1 or kept[-2] < 0.9
        left = {rank: lost + float(S[rank:].square().sum()) for rank, lost in left.items()}
        whole += float(S.square().sum())
        shared = beside.get(layer.path)
        assert (layer.shared is None) == (shared is None)
        if shared is not None:
            assert layer.shared.read == shared.rows.similarity
            assert layer.shared.angles_written == shared.columns.angles
            assert layer.shared.chance_read == 3 / 8
    assert [cut.rank for cut in report.cuts] == [1, 2, 3]
    assert [cut.lost for cut in report.cuts] == pytest.approx(
        [math.sqrt(left[1] / whole), math.sqrt(left[2] / whole), 0]
    )
    assert report.norm == pytest.approx(math.sqrt(whole))
    by_kind = {(layer.block, layer.kind) for layer in report.layers}
    assert {(0, "q_proj"), (1, "down"), (None, "lm_head")} <= by_kind
    facts = report.to_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["layers"][0]["used"] == report.layers[0].used


def test_a_cut_is_what_composing_to_that_rank_leaves_out(pair, tmp_path):
    _, path, _ = pair
    lost = {cut.rank: cut.lost for cut in examine(path).cuts}
    assert compose(path, tmp_path / "cut", rank=2).error == pytest.approx(lost[2])


def test_an_adapter_that_was_not_trained(tmp_path):
    model = TinyLM()
    veneer.attach(model, veneer.LoraConfig(rank=2)).save(tmp_path / "a")
    veneer.detach(model)
    report = examine(tmp_path / "a", base=model, other=tmp_path / "a")
    assert report.norm == 0
    assert "was not trained" in report.why
    assert all(layer.intruders == (0, 0) for layer in report.layers)


def layer(rank, spectrum):
    norm = math.hypot(*spectrum)
    return ReportLayer(
        "0",
        0,
        "x",
        (1, 9, 9),
        rank,
        norm,
        tuple(spectrum),
        effective_rank(torch.tensor(spectrum)),
        1,
        1,
    )


@pytest.mark.parametrize(
    ("spectrum", "cuts", "rank"),
    [
        ([1.0, 0.01, 0.0, 0.0], [(1, 0.01), (2, 0.0), (4, 0.0)], 1),
        ([1.0, 1.0, 1.0, 1.0], [(1, 0.87), (2, 0.7), (4, 0.0)], 8),
        ([1.0, 0.2, 0.15, 0.1], [(1, 0.26), (2, 0.17), (4, 0.0)], 4),
    ],
)
def test_the_rank_to_use_next(spectrum, cuts, rank):
    assert _next_rank([layer(4, spectrum)], [Cut(*cut) for cut in cuts])[0] == rank


# ---- bad input
# -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_looked_at_or_repaired(pair, tmp_path):
    model, path, _ = pair
    elsewhere = TinyLM()
    for call in (
        lambda: examine(path, base=elsewhere),
        lambda: repair(path, tmp_path / "out", base=elsewhere),
    ):
        with pytest.raises(BaseMismatchError, match="another weight"):
            call()
    with pytest.raises(AdapterError, match="in the base"):
        examine(path, base={})
    with pytest.raises(ConfigError, match="without the base"):
        repair(path, tmp_path / "out", base=None)
    for bad in (
        {"factor": 1.5},
        {"factor": math.nan},
        {"factor": True},
        {"count": -1},
        {"threshold": 0},
    ):
        with pytest.raises(ConfigError, match="Do: "):
            repair(path, tmp_path / "out", base=model, **bad)
    with pytest.raises(OutputExistsError):
        repair(path, path, base=model)
    assert not (tmp_path / "out").exists()
    wide = TinyLM(width=16)
    with pytest.raises(AdapterError, match="cannot be compared"):
        examine(path, other=trained(wide, tmp_path / "wide"))
    write_derived(tmp_path / "full", [read(path)], {}, {"model.norm": {"bias": torch.ones(8)}})
    with pytest.raises(AdapterError, match="no weight at a low rank"):
        examine(tmp_path / "full")


def test_trained_tokens_are_told_and_not_repaired(tmp_path):
    model = TinyLM()
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=1, targets=["q_proj"], trainable_tokens=[1, 2])
    )
    randomise(handle)
    handle.save(tmp_path / "a")
    handle.detach()
    assert examine(tmp_path / "a", base=model).in_full == ("2 tokens of model.embed_tokens",)
    with pytest.raises(AdapterError, match="trained tokens"):
        repair(tmp_path / "a", tmp_path / "b", base=model)


def test_a_change_beside_trained_tokens_is_looked_at_on_its_own_base(tmp_path):
    model = TinyLM()
    path = trained(model, tmp_path / "a", targets=["embed_tokens"], trainable_tokens=[1, 2])
    weight = model.model.embed_tokens.weight.detach()
    weight[1] += 1  # a row that the adapter replaces
    (one,) = examine(path, base=model).weight_intruders
    assert one.aligned_weight.weight_path == "model.embed_tokens.weight"
    weight[3] += 1
    with pytest.raises(BaseMismatchError, match="another weight"):
        examine(path, base=model)


def test_stacks_of_experts_are_looked_at_one_by_one(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.randn(3, 6, 4))
    path = trained(model, tmp_path / "a", rank=1)
    (one,) = find_intruders(read(path), FrozenWeights(model), count=2)
    assert kind_for(model["experts"], "up") is GENERAL_KIND
    assert len(one.cosines) == 6
    assert len(one.intruders) == 3
