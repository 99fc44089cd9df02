"""Adapters written from the changes of others: the same outputs, the same proof of the base."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.support.models import IDS, Stack, TinyLM
from tests.support.toys import error, example, flat, randomise
from torch import nn

import veneer
from veneer.adapter_files.derived_folder import write_derived
from veneer.adapter_files.folder import read
from veneer.errors import AdapterError, BaseMismatchError
from veneer.layers import LAYERS
from veneer.lowrank import LowRank

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EXAMPLES = [(kind.name, number) for kind in LAYERS for number, _ in enumerate(kind.examples())]


def trained(model, path, **config):
    """A saved adapter with changes that are not zero."""
    handle = veneer.attach(model, veneer.LoraConfig(**{"rank": 2, "targets": "all", **config}))
    randomise(handle)
    handle.save(path)
    handle.detach()
    return read(path)


def again(files, path, **more):
    """The same changes, with products of twice the rank where the weight allows it."""
    low = {}
    for at, layer in files.low.items():
        own = layer.low
        if 2 * own.rank <= min(own.A.shape[2], own.B.shape[1]):
            own = LowRank(torch.cat([own.A, own.A], 1), torch.cat([own.B, own.B], 2), own.scale / 2)
        low[at] = replace(layer.with_low_rank(own), extras=layer.extras)
    return read(write_derived(path, [files], low, files.full, **more))


@pytest.mark.parametrize(
    ("kind", "number", "variant"),
    [  # rslora is lora with another scale, of every kind once
        pytest.param(
            *case, variant, marks=pytest.mark.slow if variant == "rslora" and case[1] else ()
        )
        for case in EXAMPLES
        for variant in ("lora", "rslora", "dora")
    ],
)
def test_a_layer_gives_the_same_outputs(kind, number, variant, tmp_path):
    module, args = example(kind, number)
    model = nn.ModuleDict({"layer": module})
    first = trained(model, tmp_path / "a", variant=variant, rank=1)
    second = again(first, tmp_path / "b", variant="dora" if variant.startswith("dora") else "lora")
    handle = veneer.load(model, first.path)
    expected = flat(module(*args))
    handle.detach()
    veneer.load(model, second.path)
    assert error(flat(module(*args)), expected) < 1e-5


@pytest.mark.parametrize("model", [lambda: TinyLM(tied=True), Stack], ids=["tied", "stack"])
def test_a_model_with_parts_trained_in_full_too(model, tmp_path):
    base = model().eval()
    also = "norm" if isinstance(base, TinyLM) else "head"
    first = trained(
        base,
        tmp_path / "a",
        train_also=(f"re:.*{also}",),
        exclude=(f"re:.*{also}",),
        bias="targets",
    )
    second = again(first, tmp_path / "b")
    twin = copy.deepcopy(base)
    veneer.load(base, first.path)
    veneer.load(twin, second.path)
    torch.testing.assert_close(twin(IDS), base(IDS), atol=1e-5, rtol=1e-5)


def test_the_base_is_still_proven(tmp_path):
    second = again(trained(TinyLM(), tmp_path / "a"), tmp_path / "b")
    with pytest.raises(BaseMismatchError):
        veneer.load(TinyLM(), second.path)


def test_adapters_of_two_bases_are_refused(tmp_path):
    one, other = trained(TinyLM(), tmp_path / "a"), trained(TinyLM(), tmp_path / "b")
    with pytest.raises(BaseMismatchError, match="different bases"):
        write_derived(tmp_path / "c", [one, other], one.low)
    assert not (tmp_path / "c").exists()


def test_what_proves_nothing_leaves_no_record(tmp_path):
    model = TinyLM()
    one = trained(model, tmp_path / "a")
    write_derived(tmp_path / "c", [one, replace(one, record=None)], one.low)
    assert read(tmp_path / "c").record is None
    with pytest.warns(veneer.UnverifiedAdapter):
        veneer.load(model, tmp_path / "c")


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="no change at all"):
        write_derived(tmp_path / "c", [trained(TinyLM(), tmp_path / "a")], {})


def test_fewer_layers_are_named_one_by_one(tmp_path):
    model = TinyLM()
    one = trained(model, tmp_path / "a", targets=["q_proj", "v_proj"])
    kept = {at: layer for at, layer in one.low.items() if not at.endswith("1.self_attn.q_proj")}
    write_derived(tmp_path / "c", [one], kept)
    assert len(veneer.load(model, tmp_path / "c").changes) == 3


def test_ranks_that_differ_are_kept(tmp_path):
    model = TinyLM()
    one = trained(
        model, tmp_path / "a", targets="all-linear", ranks={"q_proj": 1}, alphas={"v_proj": 5}
    )
    two = again(one, tmp_path / "b")
    ranks = {at: low.rank for at, low in two.products.items()}
    assert {ranks[at] for at in ranks if at.endswith("q_proj")} == {2}
    assert {ranks[at] for at in ranks if not at.endswith("q_proj")} == {4}
    for at, low in two.products.items():
        assert error(low.delta(torch.float64), one.products[at].delta(torch.float64)) < 1e-6
