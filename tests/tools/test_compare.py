"""Two adapters side by side: equal to dense float64 arithmetic, whatever their ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import ConvNet, TinyLM
from tests.support.toys import randomise
from torch import nn

import veneer
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError
from veneer.lowrank import LowRank
from veneer.tools.compare import _compare_layer, compare
from veneer.tools.compose import compose


def trained(model, path, **config):
    handle = veneer.attach(
        model, veneer.LoraConfig(**{"rank": 2, "targets": "all-linear", **config})
    )
    randomise(handle)
    handle.save(path)
    handle.detach()
    return path


def spaces(dense, rank):
    """Orthonormal bases of the row and column space of one dense change."""
    u, _, v = torch.linalg.svd(dense)
    return v[:rank].mT, u[:, :rank]


@settings(max_examples=50, deadline=None)
@given(out=st.integers(4, 9), in_=st.integers(4, 9), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
       extra=st.integers(0, 2))  # fmt: skip
def test_numbers_are_those_of_the_dense_changes(out, in_, ranks, extra):
    lows = []
    for rank in ranks:
        A, B = torch.randn(1, rank, in_), torch.randn(1, out, rank)
        # factors that lack rank: further columns that repeat others
        lows.append(
            LowRank(
                torch.cat([A, A[:, :1].expand(1, extra, in_)], 1),
                torch.cat([B, B[:, :, :1].expand(1, out, extra)], 2),
                0.5,
            )
        )
    a, b = (low.delta(torch.float64)[0] for low in lows)
    found = _compare_layer("x", *lows, {}, {})
    assert found.ranks == (ranks[0] + extra, ranks[1] + extra)
    assert found.norms == (pytest.approx(float(a.norm())), pytest.approx(float(b.norm())))
    assert found.difference == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())))
    assert found.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-9)
    for space, one, other in zip(
        (found.rows, found.columns), spaces(a, ranks[0]), spaces(b, ranks[1]), strict=True
    ):
        cosines = torch.linalg.svdvals(one.mT @ other).clamp(max=1)
        assert space.similarity == pytest.approx(
            float(cosines.square().sum()) / min(ranks), abs=1e-9
        )
        assert len(space.angles) == min(ranks)
        assert list(space.angles) == pytest.approx(cosines.acos().rad2deg().tolist(), abs=1e-5)
        assert list(space.angles) == sorted(space.angles)


def test_angles_keep_their_digits_near_nought():
    """A turn by 1e-9 rad, which an arccosine cannot see."""
    turn = 1e-9
    one, other = (
        torch.eye(2, dtype=torch.float64)[None, :1],
        torch.tensor([[[math.cos(turn), math.sin(turn)]]]).double(),
    )
    B = torch.ones(1, 3, 1, dtype=torch.float64)
    other = torch.tensor([[[math.cos(turn), math.sin(turn)]]], dtype=torch.float64)
    found = _compare_layer("x", LowRank(one, B, 1.0), LowRank(other, B, 1.0), {}, {})
    assert found.rows.angles[0] == pytest.approx(math.degrees(turn), rel=1e-6)
    assert found.difference == pytest.approx(turn, rel=1e-6)
    assert found.columns.angles[0] < 1e-13


def test_groups_and_changes_of_nothing():
    low = LowRank(torch.randn(2, 2, 4), torch.randn(2, 5, 2), 1.0)
    half = LowRank(low.A, torch.cat([low.B[:1], torch.zeros(1, 5, 2)]), 1.0)
    found = _compare_layer("x", low, half, {}, {})
    assert found.rows.similarity == pytest.approx(1)  # of the group that both change
    assert len(found.rows.angles) == 2
    nothing = LowRank(low.A, torch.zeros(2, 5, 2), 1.0)
    found = _compare_layer("x", low, nothing, {}, {})
    assert (found.difference, found.cosine, found.rows, found.columns) == (1, 0, None, None)
    found = _compare_layer("x", nothing, nothing, {}, {})
    assert (found.difference, found.cosine, found.rows) == (0, 0, None)


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
def test_an_adapter_is_identical_to_itself(variant, tmp_path):
    a = trained(TinyLM(tied=True), tmp_path / "a", variant=variant, targets="all", bias="targets")
    found = compare(a, a)
    assert found.identical
    assert found.same_change
    assert found.relative == 0
    assert found.cosine == pytest.approx(1)
    assert "identical" in str(found)
    assert all(layer.rows.similarity == pytest.approx(1) for layer in found.layers)


def test_what_only_one_of_them_changes_and_what_differs(tmp_path):
    model = TinyLM()
    a = trained(
        model, tmp_path / "a", targets=["q_proj", "up"], train_also=["lm_head", "model.norm"]
    )
    b = trained(
        model, tmp_path / "b", targets=["q_proj", "down"], rank=3, train_also=["model.norm"]
    )
    found = compare(a, b)
    assert {at.rpartition(".")[2] for at in found.only_a} == {"up", "weight"}
    assert "lm_head.weight" in found.only_a
    assert {at.rpartition(".")[2] for at in found.only_b} == {"down"}
    assert len(found.layers) == 2
    assert {entry.path for entry in found.full} == {"model.norm.weight", "model.norm.bias"}
    norms = [read(path).full["model.norm"]["weight"] for path in (a, b)]
    entry = next(entry for entry in found.full if entry.path.endswith("weight"))
    assert entry.difference == pytest.approx(
        float((norms[0] - norms[1]).norm() / max(n.norm() for n in norms))
    )
    assert found.base == "same"
    assert found.config["rank"] == (2, 3)
    assert not found.identical
    assert not found.same_change
    text = str(found)
    for part in (
        "only A  3",
        "only B  2",
        "rank: 2 → 3",
        "both    2 weights",
        "full    2 of 2 differ",
        "the same weights",
    ):
        assert part in text


def test_totals_are_those_of_the_whole_change(tmp_path):
    model = TinyLM()
    a, b = (trained(model, tmp_path / name) for name in "ab")
    found = compare(a, b)
    whole = [
        torch.cat([low.delta(torch.float64).flatten() for low in read(path).products.values()])
        for path in (a, b)
    ]
    assert found.relative == pytest.approx(
        float((whole[0] - whole[1]).norm() / max(w.norm() for w in whole))
    )
    assert found.cosine == pytest.approx(
        float(torch.dot(*whole) / (whole[0].norm() * whole[1].norm()))
    )


def test_the_same_change_in_another_form(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a")
    compose([a], tmp_path / "b")
    found = compare(a, tmp_path / "b")
    assert found.same_change
    assert not found.identical  # it names its targets otherwise
    assert "the same change" in str(found)
    compose([a], tmp_path / "c", weights=[-2])
    found = compare(a, tmp_path / "c")
    assert found.cosine == pytest.approx(-1)
    assert found.relative == pytest.approx(1.5)
    assert all(layer.rows.similarity == pytest.approx(1) for layer in found.layers)


def test_the_same_numbers_in_another_dtype(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", dtype="bfloat16")
    compose(a, tmp_path / "b")
    assert compare(a, tmp_path / "b").same_change


def test_other_bases_and_none(tmp_path):
    a, b = trained(TinyLM(), tmp_path / "a"), trained(TinyLM(), tmp_path / "b")
    found = compare(a, b)
    assert found.base == "different"
    assert {f"{layer.path}.weight" for layer in found.layers} < {*found.base_weights}, (
        "the rest differs too"
    )
    assert "different weights" in str(found)
    assert compare(a, replace(read(b), record=None)).base == "unknown"
    assert "unknown" in str(compare(a, replace(read(b), record=None)))
    with pytest.raises(AdapterError, match=r"\(groups, out, in\) = \(1, 8, 8\) and \(1, 12, 12\)"):
        compare(a, trained(TinyLM(width=12), tmp_path / "wide"))


def test_magnitudes_of_dora(tmp_path):
    model = TinyLM()
    a = trained(model, tmp_path / "a", variant="dora", targets=["q_proj"])
    files = read(a)
    more = {
        at: replace(layer, extras={name: 2 * vector for name, vector in layer.extras.items()})
        for at, layer in files.low.items()
    }
    write_derived(tmp_path / "b", [files], more, variant="dora")
    found = compare(a, tmp_path / "b")
    assert [layer.magnitude for layer in found.layers] == [pytest.approx(0.5)] * 2
    assert all(layer.difference == 0 for layer in found.layers)
    assert not found.same_change
    plain = write_derived(
        tmp_path / "c", [files], {at: replace(one, extras={}) for at, one in files.low.items()}
    )
    found = compare(a, plain)
    assert all(layer.magnitude == math.inf for layer in found.layers)
    assert not found.same_change


def test_convolutions_and_statistics(tmp_path):
    model = ConvNet()
    a, b = (trained(model, tmp_path / name, targets="all") for name in "ab")
    found = compare(a, b)
    assert {layer.path for layer in found.layers} == {"stem", "depthwise", "pointwise", "score"}
    assert {entry.path for entry in found.full} >= {"norm.weight", "norm.running_mean"}


def test_pefts_out_projection_counts_as_peft_applies_it(tmp_path):
    """PEFT adds that change twice: an adapter of it and Veneer's copy of it are one change."""
    peft = pytest.importorskip("peft")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    model = Model()
    made = peft.get_peft_model(Model(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attn"]))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "theirs")
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(model, tmp_path / "theirs").save(tmp_path / "ours")
    found = compare(tmp_path / "theirs", tmp_path / "ours")
    assert {layer.path for layer in found.layers} == {"attn", "attn.out_proj"}
    assert found.same_change
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    (tmp_path / "theirs" / "adapter_config.json").write_text(
        json.dumps({**config, "peft_version": "0.99.0"})
    )
    with pytest.raises(AdapterError, match=r"0\.99"):
        compare(tmp_path / "theirs", tmp_path / "ours")
