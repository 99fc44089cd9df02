"""Merging is atomic, rounds once, refuses what is not finite, and goes back to the very bits."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
import time
from typing import Any

import pytest
import torch
from tests.support.models import IDS, TinyLM
from tests.support.toys import bits, error, randomise
from torch import nn

import veneer
from veneer.attach.layer.lookup import need_adapters
from veneer.bases import storage_of
from veneer.errors import ConfigError, MergeError, NotQuantized, SelectionError
from veneer.kernels.error_feedback import find_neighbours
from veneer.kernels.reference import round_once
from veneer.layers import LAYERS
from veneer.variants import VARIANTS


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_correctly_rounded_and_come_back(dtype, tied):
    model = TinyLM(tied).to(dtype)
    before, identities = bits(model), {name: id(p) for name, p in model.named_parameters()}
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle, 0.02)
    expected = {}
    for path, change in handle.changes.items():
        weight = model.get_parameter(path)
        low, _ = change.resolve(weight)
        exact = (
            weight.detach().double()
            + change.layer.fold(low.delta(torch.float64), weight.shape).detach()
        )
        expected[path] = round_once(exact, dtype)
    for path, part in handle.layers.items():  # the weights of the norms
        for name, value in part.full.named_parameters():
            expected[f"{path}.{name}"] = round_once(value.detach().double(), dtype)
    assert len(expected) == (16 if tied else 17)
    report = handle.merge(rounding="nearest")
    merged = bits(model)
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name
    assert {name: id(p) for name, p in model.named_parameters() if name in identities} == identities
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len(report.layers) == len(expected)
    assert "of the change kept after rounding" in str(report)
    assert "of the change kept after rounding" in report.summary
    assert "still attached" in str(report)
    handle.unmerge()
    assert same(bits(model), before)


def test_retention_says_how_much_of_a_small_change_the_dtype_holds():
    torch.manual_seed(0)
    model = nn.Linear(256, 256).to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=8))
    randomise(handle)
    (part,) = handle.changes.values()
    size = part.resolve(model.weight)[0].norm()
    retention = {}
    for change in (1e-4, 1e-3, 1e-2):
        part.scale *= change * model.weight.double().norm().item() / size
        size = part.resolve(model.weight)[0].norm()
        report = handle.merge(rounding="nearest")
        (layer,) = report.layers
        assert layer.rounding == "nearest"
        assert layer.change == pytest.approx(change, rel=1e-6)
        retention[change] = report.retention
        handle.unmerge()
    assert retention[1e-4] < 0.2
    assert 0.3 < retention[1e-3] < 0.8
    assert retention[1e-2] > 0.97


@pytest.mark.parametrize("poison", [float("nan"), 1e38])
def test_what_is_not_finite_is_refused_before_anything_changes(poison):
    model = TinyLM().to(torch.float16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle, 0.02)
    before, unmerged = bits(model), model(IDS)
    for path in ("model.layers.1.mlp.up.weight", "model.layers.1.mlp.down.weight"):
        handle.changes[path]._parameters["B"].data[0, 0, 0] = poison
    with pytest.raises(MergeError, match="2 problems") as caught:
        handle.merge()
    assert "model.layers.1.mlp.up.weight: W + ΔW is not finite" in str(caught.value)
    assert same(bits(model), before)
    for path in ("model.layers.1.mlp.up.weight", "model.layers.1.mlp.down.weight"):
        handle.changes[path]._parameters["B"].data[0, 0, 0] = 0.0
    assert unmerged.shape == model(IDS).shape
    handle.merge()


def test_a_failure_while_writing_rolls_back(monkeypatch):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, train_also=["norm"]))
    randomise(handle)
    before, output = bits(model), model(IDS)
    plain = type(storage_of(model.lm_head.weight))
    calls = []

    def failing(self, weight, encoded):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError("no room")
        return original(self, weight, encoded)

    original = plain.write
    monkeypatch.setattr(plain, "write", failing)
    with pytest.raises(MemoryError, match="no room"):
        handle.merge()
    monkeypatch.undo()
    assert len(calls) > 6
    assert same(bits(model), before)
    assert torch.equal(model(IDS), output)
    handle.merge()
    handle.unmerge()
    assert same(bits(model), before)


def test_weights_edited_while_merged_are_not_overwritten():
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    handle.merge()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    edited = bits(model)
    with pytest.raises(
        MergeError, match=r"edited since the merge.*layers\.0\.self_attn\.q_proj\.weight"
    ):
        handle.unmerge()
    assert same(bits(model), edited)
    handle.detach(keep_merged=True)
    assert same(bits(model), edited)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_the_adapter_may_change_while_merged():
    model = TinyLM().to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    before = bits(model)
    handle.merge()
    for parameter in handle.parameters():
        parameter.data.zero_()
    handle.unmerge()
    assert same(bits(model), before)


def test_states_that_contradict_each_other():
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    veneer.attach(model, veneer.LoraConfig(rank=2), "other")
    with pytest.raises(MergeError, match="nothing is merged"):
        handle.unmerge()
    handle.merge()
    with pytest.raises(MergeError, match="merged already"):
        handle.merge()
    for name in ("other", None):
        with (
            pytest.raises(SelectionError, match="is merged into the weights"),
            veneer.use(model, name),
        ):
            model(IDS)
    with handle.use():
        model(IDS)
    handle.unmerge()
    handle.merge(keep=False)
    with pytest.raises(MergeError, match="keep=False"):
        handle.unmerge()


def test_a_merged_copy_can_be_unmerged_and_state_dicts_hold_no_backups():
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    before, keys = bits(model), set(model.state_dict())
    handle.merge()
    assert set(model.state_dict()) == keys
    other = copy.deepcopy(model)
    veneer.unmerge(other)
    assert same(bits(other), before)
    assert not same(bits(model), before)


def test_merging_nothing_changes_nothing():
    model = TinyLM().to(torch.bfloat16)
    before = bits(model)
    report = veneer.attach(model, veneer.LoraConfig(rank=2)).merge()
    assert report.retention == 1.0
    assert same(bits(model), before)


def test_what_is_trained_in_full_and_untied_since_is_refused():
    model = TinyLM(tied=True)
    veneer.attach(model, veneer.LoraConfig(rank=2, targets=["mlp"], train_also=["lm_head"]))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    before = bits(model)
    with pytest.raises(MergeError, match="untied since"):
        veneer.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    model.lm_head.weight = model.model.embed_tokens.weight
    veneer.merge(model)


def test_a_model_made_in_inference_mode_is_merged_in_inference_mode():
    with torch.inference_mode():
        model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    modules, before = list(model.modules()), bits(model)
    with pytest.raises(MergeError, match=r"made under torch\.inference_mode"):
        handle.merge()
    assert list(model.modules()) == modules  # no copies of weights are left behind
    with torch.inference_mode():
        y = model(IDS)
        handle.merge()
        assert error(model(IDS), y) < 1e-5
        handle.unmerge()
    assert same(bits(model), before)


def test_of_two_threads_that_merge_one_is_refused(monkeypatch):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    before, expected = bits(model), model(IDS)
    plain, inside = type(storage_of(model.lm_head.weight)), threading.Event()
    original = plain.write

    def slow(self, weight, encoded):
        inside.set()
        time.sleep(0.005)
        original(self, weight, encoded)

    monkeypatch.setattr(plain, "write", slow)
    for operation, words in (
        (handle.merge, "merged already"),
        (handle.unmerge, "nothing is merged"),
    ):
        raised: list[Exception] = []

        def other(operation=operation, raised=raised):
            inside.wait()
            try:
                operation()
            except Exception as caught:
                raised.append(caught)

        inside.clear()
        thread = threading.Thread(target=other)
        thread.start()
        operation()
        thread.join()
        assert [type(one) for one in raised] == [MergeError]
        assert words in str(raised[0])
        if operation == handle.merge:
            assert error(model(IDS), expected) < 1e-5
    assert same(bits(model), before)


class Stop:
    """Interrupts ``write`` of plain weights: the ``at``-th call before or after it writes, and
    every call from there until ``until``."""

    def __init__(self, monkeypatch, model, at, until, late, what):
        self.plain = type(storage_of(model.lm_head.weight))
        self.original, self.calls = self.plain.write, 0

        def write(storage, weight, encoded):
            self.calls += 1
            stop = at <= self.calls <= until
            if late or not stop:
                self.original(storage, weight, encoded)
            if stop:
                raise what

        monkeypatch.setattr(self.plain, "write", write)


def parts_left(model):
    """Where anything of a merge is left behind."""
    return [
        path for path, module in model.named_modules()
        if "backup" in module.__dict__ or "digests" in module.__dict__
    ]  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("at", "until"), [(2, 2), (1, 1), (5, 9), (3, 100)])
@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_unmerge_is_finished_by_another(monkeypatch, late, at, until, what):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, train_also=["norm"], bias="targets"))
    randomise(handle)
    before, output = bits(model), model(IDS)
    handle.merge()
    with monkeypatch.context() as patch, pytest.raises(what):
        Stop(patch, model, at, until, late, what)
        handle.unmerge()
    handle.unmerge()
    assert same(bits(model), before)
    assert torch.equal(model(IDS), output)
    assert not parts_left(model)
    with pytest.raises(MergeError, match="nothing is merged"):
        handle.unmerge()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("at", "until"), [(2, 2), (1, 1), (2, 100), (5, 9)])
@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_merge_leaves_nothing_or_can_be_unmerged(monkeypatch, late, at, until, keep):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, train_also=["norm"], bias="targets"))
    randomise(handle)
    before, output = bits(model), model(IDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, model, at, until, late, KeyboardInterrupt)
        handle.merge(keep=keep)
    if until == at:
        with pytest.raises(MergeError, match="nothing is merged"):
            handle.unmerge()
    elif parts_left(model):  # writing back was interrupted too
        handle.unmerge()
    assert same(bits(model), before)
    assert torch.equal(model(IDS), output)
    assert not parts_left(model)
    handle.merge(keep=keep)
    assert error(model(IDS), output) < 1e-5


def test_an_edit_after_an_interrupted_unmerge_is_still_seen(monkeypatch):
    model = TinyLM()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2))
    randomise(handle)
    handle.merge()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, model, 2, 100, False, KeyboardInterrupt)
        handle.unmerge()
    for weight in (
        model.model.layers[0].self_attn.q_proj.weight,
        model.model.layers[1].mlp["down"].weight,
    ):
        value = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(MergeError, match="edited since the merge"):
            handle.unmerge()
        with torch.no_grad():
            weight.copy_(value)
    handle.unmerge()


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
def test_an_interrupt_at_any_line_loses_nothing(operation):
    """Ctrl-C comes between any two lines: afterwards the model is merged, unmerged, or can be
    unmerged."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    handle = veneer.attach(model, veneer.LoraConfig(rank=1, bias="targets"))
    randomise(handle)
    before, x = bits(model), torch.randn(2, 2)
    expected = model(x)
    modules = ("merge", "unmerge", "stored_weights", "fold_weights")
    files, lines = {sys.modules[f"veneer.attach.merging.{name}"].__file__ for name in modules}, 0

    def interrupted(at):
        seen = 0

        def line(frame, event, _):
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == at:
                    raise KeyboardInterrupt
            return line

        sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename in files else None)
        try:
            getattr(handle, operation)()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an interrupt in the line of a `with` passes its end by
        return False

    for at in itertools.count(1):
        if operation == "unmerge":
            handle.merge()
        stopped = interrupted(at)
        lines += stopped
        if need_adapters(model).merged is not None:
            handle.unmerge()
        assert same(bits(model), before), at
        assert torch.equal(model(x), expected)
        handle.merge()
        handle.unmerge()
        assert not parts_left(model)
        if not stopped:
            break
    assert lines > 50


def small(model, handle, ratio):
    """Make every change of the adapter ``ratio`` times as large as its weight."""
    for path, change in handle.changes.items():
        weight = weight_at(model, path)
        change.scale *= ratio * weight.double().norm().item() / change.resolve(weight)[0].norm()


def weight_at(model, path):
    return model.get_parameter(path).detach()


@pytest.mark.parametrize("kind", LAYERS.names())
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_faithful_merging_of_every_kind(kind, variant, dtype):
    """Each merged number is one of the two neighbours of gain ⊙ (W + ΔW); what was a number of the
    grid and does not change stays; unmerging restores the bits."""
    for module, _ in LAYERS[kind].examples():
        model = nn.Sequential(module).to(dtype)
        before = bits(model)
        handle = veneer.attach(model, veneer.LoraConfig(rank=1, targets="all", variant=variant))
        randomise(handle)
        small(model, handle, 1e-3)
        exact = {}
        for path, change in handle.changes.items():
            own, weight = model.get_submodule(path.rpartition(".")[0]), weight_at(model, path)
            values = change.changed_weight(weight, *change.resolve(weight), torch.float64)
            exact[path] = change.layer.apply_forward_rewrite(own, values).detach()
        report = {layer.path: layer for layer in handle.merge(rounding="faithful").layers}
        for path, values in exact.items():
            half, middle = cells(values, dtype)
            merged = weight_at(model, path).double()
            assert torch.equal((merged - middle).abs(), half), path
            bounded = (
                getattr(model.get_submodule(path.rpartition(".")[0]), "max_norm", None) is not None
            )
            assert report[path].rounding == ("nearest" if bounded else "faithful")
        handle.unmerge()
        assert same(bits(model), before)


def cells(values, dtype):
    """Half of the width, and the middle, of the cell of the grid in which each value lies."""
    step, mid, half = (torch.empty_like(values) for _ in range(3))
    find_neighbours(values.contiguous().clone(), dtype, step, mid, half)
    return half.abs(), values + mid


@pytest.mark.parametrize("variant", VARIANTS.names())
def test_faithful_merging_of_every_variant(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96)).to(torch.bfloat16)
    before, batches = bits(model), [torch.randn(64, 128).bfloat16()]
    needs = VARIANTS[variant].needs
    handle = veneer.attach(
        model, veneer.LoraConfig(rank=4, variant=variant),
        batches=batches if needs & {"inputs", "gradient"} else None,
        loss=(lambda model, x: model(x).float().square().mean()) if "gradient" in needs else None,
        original=nn.Sequential(nn.Linear(128, 96)) if "original" in needs else None,
    )  # fmt: skip
    for parameter in handle.parameters():
        parameter.data += 2e-4 * torch.randn_like(parameter) * parameter.abs().mean().clamp_min(1)
    small(model, handle, 1e-3)
    ((path, change),) = handle.changes.items()
    weight = model[0].weight
    exact = change.changed_weight(weight, *change.resolve(weight), torch.float64).detach()
    (layer,) = handle.merge(rounding="faithful").layers
    assert layer.rounding == "faithful", path
    moved, wanted = (
        model[0].weight.detach().double() - before["0.weight"].double(),
        exact - before["0.weight"].double(),
    )
    retention = ((moved * wanted).sum() / wanted.square().sum()).item()
    assert layer.retention == pytest.approx(retention, abs=1e-5)
    assert abs(retention - 1) < (0.05 if change.resolve(weight)[0].rank <= 8 else 0.15)
    handle.unmerge()
    assert same(bits(model), before)


def test_a_small_change_survives_a_merge():
    """What an adapter at 10⁻³ of its weights says is lost by half to nearest, and kept by
    default."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(200, 200) for _ in range(3))).to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=4))
    randomise(handle)
    small(model, handle, 1e-3)
    reports = {}
    for rounding in ("nearest", "auto", "faithful"):
        reports[rounding] = handle.merge(rounding=rounding)
        handle.unmerge()
    assert reports["nearest"].retention < 0.75
    assert abs(reports["auto"].retention - 1) < 0.03
    assert "; 3 rounded faithfully" in str(reports["auto"])
    assert "faithfully" not in str(reports["nearest"])
    assert {layer.rounding for layer in reports["faithful"].layers} == {"faithful"}


def test_an_embedding_keeps_what_each_token_learnt():
    """The inputs of an embedding are indices: what is kept right is what B writes for each
    token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400, 256, padding_idx=3)).to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    small(model, handle, 1e-3)
    (change,) = handle.changes.values()
    weight = model[0].weight
    low, _ = change.resolve(weight)
    before, delta = weight.detach().double(), low.delta(torch.float64)[0].T.detach()
    errors = {}
    for rounding in ("nearest", "faithful"):
        handle.merge(rounding=rounding)
        error = model[0].weight.detach().double() - before - delta
        errors[rounding] = (
            (error @ low.B[0].double()).norm() / (delta @ low.B[0].double()).norm()
        ).item()
        assert torch.equal(model[0].weight.detach()[3].double(), before[3])
        handle.unmerge()
    assert errors["faithful"] < 0.05 < 0.3 < errors["nearest"]


def test_what_faithful_rounding_does_not_concern():
    """Weights of more bits, and parameters that are trained in full."""
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(dtype)
        handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"], train_also=["1"]))
        randomise(handle)
        found = {layer.path: layer.rounding for layer in handle.merge(rounding="faithful").layers}
        expected = "nearest" if dtype == torch.float32 else "faithful"
        assert found == {"0.weight": expected, "1.weight": "nearest", "1.bias": "nearest"}


def test_inputs_are_protected_and_checked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64)).to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0"]))
    randomise(handle)
    small(model, handle, 1e-3)
    before = bits(model)
    x = (torch.randn(100, 3) @ torch.randn(3, 64)).double()
    weight, (change,) = model[0].weight, handle.changes.values()
    exact = change.changed_weight(weight, *change.resolve(weight), torch.float64).detach()
    errors = []
    for inputs in (None, {"0.weight": (x.T @ x)[None]}):
        handle.merge(rounding="faithful", inputs=inputs)
        errors.append((x @ (model[0].weight.detach().double() - exact).T).norm().item())
        handle.unmerge()
    assert errors[1] < 0.3 * errors[0]
    wrong = {"0.weight": (x.T @ x), "1.weight": (x.T @ x)[None]}
    with pytest.raises(MergeError, match="2 problems") as caught:
        handle.merge(inputs=wrong)
    assert "0.weight: inputs= of shape (64, 64)" in str(caught.value)
    assert "inputs of '1.weight'" in str(caught.value)
    with pytest.raises(MergeError, match=r"0\.weight: inputs= with numbers that are not finite"):
        handle.merge(rounding="faithful", inputs={"0.weight": (x.T @ x)[None] * torch.nan})
    with pytest.raises(ConfigError, match="rounding='random'"):
        handle.merge(rounding="random")
    assert same(bits(model), before)


def test_inputs_that_would_be_ignored_are_refused():
    """Of a weight that is trained in full, and of an embedding that is rewritten as it is read."""
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Linear(8, 8), nn.Linear(8, 8)).to(
        torch.bfloat16
    )
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets=["0", "1"], train_also=["2"]))
    randomise(handle)
    before = bits(model)
    inputs = {
        "0.weight": torch.eye(9)[None],
        "1.weight": torch.eye(8)[None],
        "2.weight": torch.eye(8)[None],
    }
    with pytest.raises(MergeError, match="2 problems") as caught:
        handle.merge(rounding="faithful", inputs=inputs)
    assert "0.weight: inputs= of a weight that is rounded as it is stored or read" in str(
        caught.value
    )
    assert "inputs of '2.weight'" in str(caught.value)
    assert same(bits(model), before)
    handle.merge(rounding="faithful", inputs={"1.weight": torch.eye(8)[None]})


@pytest.mark.parametrize("tokens", [9, 8])  # as many as features, too
def test_inputs_of_an_embedding_are_refused(tokens):
    model = nn.Sequential(nn.Embedding(tokens, 8)).to(torch.bfloat16)
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    before = bits(model)
    with pytest.raises(MergeError, match=r"0\.weight: inputs= of an embedding.*leave it out"):
        handle.merge(rounding="faithful", inputs={"0.weight": torch.eye(tokens)[None]})
    assert same(bits(model), before)


def test_chosen_rows_of_a_fused_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(32, 4)).to(torch.bfloat16)
    config = veneer.LoraConfig(
        rank=2, targets=["0.in_proj_weight"], slices={"in_proj_weight": [True, False, True]}
    )
    handle = veneer.attach(model, config)
    randomise(handle)
    small(model, handle, 1e-3)
    before = bits(model)
    (layer,) = handle.merge(rounding="faithful").layers
    assert layer.rounding == "faithful"
    merged = model[0].in_proj_weight.detach()
    assert torch.equal(merged[32:64], before["0.in_proj_weight"][32:64])
    assert not torch.equal(merged[:32], before["0.in_proj_weight"][:32])


@pytest.mark.filterwarnings(
    "ignore:torch.* deprecated"
)  # torch's own words on this way to quantise
def test_quantising_an_attached_model_warns_and_names_the_plain_form_which_is_quantised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    handle = veneer.attach(model, veneer.LoraConfig(rank=2, targets="all"))
    randomise(handle)
    x = torch.randn(8, 64)
    expected = model(x)
    assert "detach(keep_merged=True)" in str(handle.merge())
    quantize: Any = torch.ao.quantization.quantize_dynamic  # pyright: ignore[reportPrivateImportUsage]
    with pytest.warns(NotQuantized, match=r"detach\(keep_merged=True\)"):
        passed_by = quantize(model)
    assert isinstance(
        passed_by[0].weight, torch.Tensor
    )  # not packed: as torch does it, and why it is said
    assert not hasattr(model[0], "qconfig")
    assert error(passed_by(x), expected) < 1e-5

    with pytest.warns(NotQuantized):
        quantize(model, inplace=True)
    handle.detach(keep_merged=True)
    packed = quantize(model)
    assert all(callable(packed[n].weight) for n in (0, 2))
    assert 1e-6 < error(packed(x), expected) < 0.05
    assert error(quantize(copy.deepcopy(model))(x), packed(x)) == 0
