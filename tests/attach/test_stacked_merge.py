"""An adapter that is attached while another one is merged is one of the merged weights: trained,
checked, saved, merged and unmerged there to the very bits, and refused on any others. Adapters of
one base are merged over each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.tiny import tiny_model
from tests.support.toys import ALL, adapt, error, randomise, selected
from torch import nn

import veneer
from veneer.adapter_files.save_pretrained import LoadedElsewhere
from veneer.attach.layer.state import LAYER_STATE_NAME
from veneer.errors import BaseMismatchError, CheckError, MergeError, SelectionError, VeneerError
from veneer.tools.compare import compare

#: low-rank changes alone
LINEAR = veneer.LoraConfig(rank=2, targets="all-linear")


def bits(model):
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        path: value.detach().clone()
        for path, value in own.items()
        if LAYER_STATE_NAME not in path.split(".")
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) for key, value in one.items()
    )


def stacked(model: Any = None, config=ALL) -> Any:
    """A model with "a" merged and "b" on top, and a plain model of the merged weights with a copy
    of "b" alone."""
    model = TinyLM().double() if model is None else model
    adapt(model, "a", config=config)
    veneer.merge(model, "a")
    plain = copy.deepcopy(model)
    veneer.detach(plain, "a", keep_merged=True)
    adapt(model, "b", config=config)
    twin = veneer.attach(plain, config, "b")
    for key, parameter in dict(twin.named_parameters()).items():
        parameter.data.copy_(dict(veneer.Handle(model, "b").named_parameters())[key])
    return model, plain


def test_it_computes_and_trains_as_on_a_plain_model_of_the_merged_weights():
    model, plain = stacked()
    probe = torch.randn_like(plain(IDS))
    with veneer.use(model, "b"):
        y = model(IDS)
        (y * probe).sum().backward()
    (plain(IDS) * probe).sum().backward()
    assert torch.equal(y, plain(IDS))
    theirs = dict(veneer.Handle(plain, "b").named_parameters())
    for key, parameter in veneer.Handle(model, "b").named_parameters():
        ours, other = parameter.grad, theirs[key].grad
        assert ours is not None
        assert other is not None
        assert torch.equal(ours, other)
    assert all(p.grad is None for p in veneer.Handle(model, "a").parameters())
    assert veneer.check(model, IDS, "b").compared
    veneer.detach(plain)
    with veneer.use(model, "a"):
        assert torch.equal(model(IDS), plain(IDS))
    with veneer.use(model, {"b": 0.5}):
        assert error(model(IDS), y) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merged_on_top_and_unmerged_in_reverse_order_gives_the_very_bits(dtype, variant):
    model = TinyLM().to(dtype)
    base = bits(model)
    config = veneer.LoraConfig(rank=2, targets="all", variant=variant)
    model, plain = stacked(model, config)
    merged_a = bits(model)
    veneer.merge(model, "b")
    veneer.merge(plain, "b")
    assert same(bits(model), bits(plain))
    with veneer.use(model, "b"):
        assert torch.equal(model(IDS), plain(IDS))
    for name in ("a", None, {"a": 1.0, "b": 0.5}):
        with pytest.raises(SelectionError), veneer.use(model, name):
            model(IDS)
    with pytest.raises(
        MergeError, match=r"unmerge of 'a' while 'b' is merged, which lies on top of it.*'b' first"
    ):
        veneer.Handle(model, "a").unmerge()
    veneer.unmerge(model)
    assert same(bits(model), merged_a)
    veneer.unmerge(model, "a")
    assert same(bits(model), base)


def test_an_adapter_stays_when_the_one_below_is_unmerged_and_runs_once_it_is_merged_again():
    model, _ = stacked()
    y = selected(model, "b", IDS)
    veneer.unmerge(model)
    for forbidden in (
        lambda: selected(model, "b", IDS),
        lambda: selected(model, ["a", "b"], IDS),
        lambda: selected(model, {"a": 1.0, "b": 1.0}, IDS),
    ):
        with pytest.raises(SelectionError, match=r"'b'.*'a' was merged"):
            forbidden()
    with pytest.raises(
        MergeError, match="a merge of 'b', attached while 'a' was merged, which it no longer is"
    ):
        veneer.merge(model, "b")
    with pytest.raises(CheckError, match="'b' does not run"):
        veneer.check(model, IDS, "b")
    with pytest.raises(
        MergeError, match="'b', attached while 'a' was merged, which is to be detached"
    ):
        veneer.detach(model, "a")
    selected(model, "a", IDS)
    veneer.merge(model, "a")
    assert torch.equal(selected(model, "b", IDS), y)
    again = copy.deepcopy(model)
    assert torch.equal(selected(again, "b", IDS), y)


def test_an_adapter_of_the_base_does_not_run_on_merged_weights():
    model = adapt(TinyLM(), "a", "c")
    veneer.merge(model, "a")
    adapt(model, "b")
    with pytest.raises(MergeError, match="'a', merged already"):
        veneer.merge(model, "a")
    for choice in ("c", {"b": 1.0, "c": 1.0}, ["b", None], ["a", "b"]):
        with pytest.raises(SelectionError, match=r"'c'|None|in one call"):
            selected(model, choice, IDS)
    adapt(model, "d")
    selected(model, ["b", "d"], IDS)
    assert error(selected(model, {"b": 1.0, "d": 0.5}, IDS), selected(model, "b", IDS)) > 1e-6


def test_adapters_of_the_base_are_merged_over_each_other_and_undone_in_reverse():
    model = adapt(TinyLM(), "a", "c").double()  # low-rank changes, and norms in full
    base = bits(model)
    both = selected(model, {"a": 1.0, "c": 1.0}, IDS)
    veneer.merge(model, "a")
    first = bits(model)
    alone = selected(model, "a", IDS)
    veneer.merge(model, "c")
    assert error(model(IDS), both) < 1e-9
    for choice in ("a", "c", None, {"a": 1.0, "c": 1.0}):
        with pytest.raises(SelectionError, match=r"while 'a \+ c' is merged|detached"):
            selected(model, choice, IDS)
    with pytest.raises(VeneerError, match=r"'a \+ c' merged into the weights"):
        adapt(model, "d", config=LINEAR)
    with pytest.raises(MergeError, match=r"'c', merged already"):
        veneer.merge(model, "c")
    with pytest.raises(
        MergeError, match=r"unmerge of 'a' while 'c' is merged, which lies on top of it"
    ):
        veneer.unmerge(model, "a")
    again = copy.deepcopy(model)
    assert torch.equal(again(IDS), model(IDS))
    veneer.unmerge(again)
    assert same(bits(again), first)
    veneer.unmerge(model)
    assert same(bits(model), first)
    assert torch.equal(selected(model, "a", IDS), alone)
    veneer.unmerge(model, "a")
    assert same(bits(model), base)
    selected(model, "c", IDS)


def test_an_adapter_on_top_runs_on_no_other_stack_of_the_same_names():
    model = adapt(TinyLM(), "a", "c", config=LINEAR)
    veneer.merge(model, "a")
    adapt(model, "b", config=LINEAR)  # of W + a
    y = selected(model, "b", IDS)
    veneer.unmerge(model)
    veneer.merge(model, "c")
    veneer.merge(model, "a")  # the last one merged is "a" again, over "c"
    with pytest.raises(SelectionError, match=r"'b'.*'c \+ a' is merged"):
        selected(model, "b", IDS)
    with pytest.raises(MergeError, match=r"a merge of 'b'"):
        veneer.merge(model, "b")
    veneer.unmerge(model)
    veneer.unmerge(model)
    veneer.merge(model, "a")
    assert torch.equal(selected(model, "b", IDS), y)


def test_a_stack_can_stay_whole_or_from_below():
    model = adapt(TinyLM(), "a", "c", config=LINEAR).double()
    both = selected(model, {"a": 1.0, "c": 1.0}, IDS)
    veneer.merge(model, "a")
    veneer.merge(model, "c")
    with pytest.raises(MergeError, match="'c' merged on top of 'a', which stays"):
        veneer.detach(model, "c", keep_merged=True)
    other = copy.deepcopy(model)
    veneer.detach(model, keep_merged=True)
    assert not hasattr(model, "_veneer")
    assert error(model(IDS), both) < 1e-9
    veneer.detach(other, "a", keep_merged=True)
    assert error(selected(other, "c", IDS), both) < 1e-9
    veneer.unmerge(other)
    assert error(selected(other, "c", IDS), both) < 1e-9


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_stack_over_a_merge_that_keeps_no_weights(variant):
    config = veneer.LoraConfig(rank=2, targets="all-linear", variant=variant)
    model = adapt(TinyLM(), "a", "c", config=config).double()
    both = selected(model, {"a": 1.0, "c": 1.0}, IDS)
    veneer.merge(model, "a", keep=False)
    merged = bits(model)
    if variant == "lora":
        veneer.merge(model, "c")
        assert error(model(IDS), both) < 1e-9
        veneer.unmerge(model)
    else:
        with pytest.raises(
            MergeError, match=r"merged with keep=False.*the weight that 'c' was attached to"
        ):
            veneer.merge(model, "c")
    assert same(bits(model), merged)


def test_statistics_of_two_adapters_are_not_merged_over_each_other():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    for name in ("a", "c"):
        veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"], train_also=["1"]), name)
    veneer.merge(model, "a")
    merged = bits(model)
    with pytest.raises(
        MergeError, match="statistics that 'c' and a merged adapter have of their own"
    ):
        veneer.merge(model, "c")
    assert same(bits(model), merged)


def test_a_stack_keeps_what_the_folder_of_each_is_of(tmp_path):
    model = adapt(TinyLM(), "a", "c", config=LINEAR)
    for name in ("a", "c"):
        veneer.save(model, tmp_path / f"before_{name}", name=name)
    veneer.merge(model, "a")
    veneer.merge(model, "c")
    for name in ("a", "c"):
        veneer.save(model, tmp_path / name, name=name)
        assert compare(tmp_path / name, tmp_path / f"before_{name}").identical


def test_what_stays_merged_becomes_the_base_of_those_on_top():
    model, _ = stacked()
    y = selected(model, "b", IDS)
    veneer.merge(model, "b")
    with pytest.raises(MergeError, match="'b' merged on top of 'a', which stays"):
        veneer.detach(model, "b", keep_merged=True)
    with pytest.raises(MergeError, match="'a' is merged into the weights"):
        veneer.detach(model, "a")
    veneer.detach(model, "a", keep_merged=True)
    veneer.unmerge(model)
    assert torch.equal(selected(model, "b", IDS), y)
    veneer.merge(model)
    veneer.detach(model, keep_merged=True)
    assert not hasattr(model, "_veneer")
    assert error(model(IDS), y) < 1e-9


def test_a_failed_merge_on_top_leaves_the_one_below():
    model, _ = stacked()
    before = bits(model)
    next(iter(veneer.Handle(model, "b").parameters())).data.fill_(float("nan"))
    with pytest.raises(MergeError, match="not finite"):
        veneer.merge(model, "b")
    assert same(bits(model), before)
    veneer.unmerge(model, "a")


def test_its_folder_is_of_the_merged_weights(tmp_path):
    base = tiny_model()
    base.config._name_or_path = "here/base"
    config = veneer.LoraConfig(rank=2, targets="all-linear")
    model, _ = stacked(copy.deepcopy(base), config)
    veneer.save(model, tmp_path / "a", name="a")
    veneer.save(model, tmp_path / "b", name="b")
    with veneer.use(model, "b"):
        with pytest.warns(LoadedElsewhere, match="one of merged weights"):
            model.save_pretrained(tmp_path / "trainer")
        y = model(IDS).logits
    veneer.merge(model, "b")
    veneer.save(model, tmp_path / "late", name="b")
    veneer.unmerge(model)
    veneer.unmerge(model)
    with pytest.raises(
        MergeError, match="the base of 'b', attached while 'a' was merged, which it no longer is"
    ):
        veneer.save(model, tmp_path / "gone", name="b")
    for folder in ("b", "trainer", "late"):
        assert (
            veneer.adapter_files.read(tmp_path / folder).peft_config["base_model_name_or_path"]
            is None
        )
        with pytest.raises(BaseMismatchError):
            veneer.load(copy.deepcopy(base), tmp_path / folder)
        other = copy.deepcopy(base)
        veneer.load(other, tmp_path / "a", name="a").merge()
        veneer.load(other, tmp_path / folder, name="b")
        assert error(selected(other, "b", IDS).logits, y) < 1e-5
        with pytest.raises(BaseMismatchError):
            veneer.load(other, tmp_path / "a", name="c")


def test_a_weight_that_only_one_of_them_changes():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    base, x = bits(model), torch.randn(3, 6).double()
    for name, target in (("a", "0"), ("b", "1")):
        randomise(veneer.attach(model, veneer.LoraConfig(rank=2, targets=[target]), name))
        veneer.merge(model, name)
    with veneer.use(model, "b"):
        model(x)
    veneer.unmerge(model, "b")
    veneer.unmerge(model, "a")
    assert same(bits(model), base)
