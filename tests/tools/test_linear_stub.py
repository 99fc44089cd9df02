"""Adapters of linear layers are merged into a checkpoint without the model's code, where
fingerprints tell which tensor is which; everything else asks the model."""

from __future__ import annotations

import pytest
import torch
from tests.support.checkpoints import equal, in_memory, save_model, tensors, tiny, trained
from tests.support.real_models import REAL, transformers_models

import veneer
from veneer.adapter_files.folder import read
from veneer.errors import BaseMismatchError
from veneer.models.safetensors_dir import open_checkpoint
from veneer.tools.merge_checkpoint import merge_checkpoint, merge_plan
from veneer.tools.merge_checkpoint.linear_stub import linear_stub_model
from veneer.variants import VARIANTS


@pytest.fixture
def asked(monkeypatch):
    """The folders whose model was built."""
    folders, build = [], merge_plan.model_with_head
    monkeypatch.setattr(
        merge_plan,
        "model_with_head",
        lambda folder, saved: folders.append(folder) or build(folder, saved),
    )
    return folders


@pytest.mark.parametrize(
    "variant", [variant.name for variant in VARIANTS if variant.peft is not None]
)
def test_the_model_is_not_asked(variant, tmp_path, asked):
    from tests.support.toys import calibration, randomise

    model, base = tiny(tmp_path / "base")
    config = veneer.LoraConfig(rank=2, targets="all-linear", variant=variant)
    given = calibration(
        model, variant, (torch.arange(5)[None],), lambda m, b: m(*b).logits.float().sum()
    )
    handle = veneer.attach(model, config, **given)
    randomise(handle, 0.05)
    handle.save(tmp_path / "adapter")
    handle.detach()
    done = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    assert asked == []
    assert len(done.report.layers) == 14
    equal(tensors(tmp_path / "out"), in_memory(model, tmp_path / "adapter", tmp_path / "memory"))


@pytest.mark.parametrize("name", transformers_models())
def test_whatever_is_drawn_is_right(name, tmp_path):
    """In every architecture: where a skeleton is drawn, the merge with it is the merge in
    memory."""
    model = REAL[name].build()[0].to(torch.bfloat16)
    base = save_model(model, tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets="all-linear")
    drawn = linear_stub_model(open_checkpoint(base), [read(adapter)])
    if name in ("llama", "qwen3", "gemma3"):
        assert drawn is not None
    if name == "gpt2":  # whose layers lie transposed
        assert drawn is None
    if drawn is not None:
        merge_checkpoint(base, [adapter], tmp_path / "out")
        equal(tensors(tmp_path / "out"), in_memory(model, adapter, tmp_path / "memory"))


def test_an_adapter_that_tells_no_kinds(tmp_path, asked, monkeypatch):
    """As they were saved before."""
    model, base = tiny(tmp_path / "base")
    told = veneer.adapter_files.save_load._describe_change
    monkeypatch.setattr(
        veneer.adapter_files.save_load,
        "_describe_change",
        lambda change: {k: v for k, v in told(change).items() if k != "kind"},
    )
    adapter = trained(model, tmp_path / "adapter", targets="all-linear")
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert len(asked) == 1
    equal(tensors(tmp_path / "out"), in_memory(model, adapter, tmp_path / "memory"))


@pytest.mark.parametrize(
    "fields", [{"targets": "all"}, {"targets": ["q_proj"], "train_also": ["norm"]}], ids=str
)
def test_what_may_be_tied_or_is_trained_in_full(fields, tmp_path, asked):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", **fields)
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert len(asked) == 1
    equal(tensors(tmp_path / "out"), in_memory(model, adapter, tmp_path / "memory"))


def test_without_fingerprints_only_the_model_can_tell(tmp_path, asked):
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets="all-linear")
    merge_checkpoint(base, [adapter], tmp_path / "out", verify_base=False)
    assert len(asked) == 1


def test_another_base_is_asked_about_and_refused(tmp_path, asked):
    model, _ = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets="all-linear")
    _, other = tiny(tmp_path / "other")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    save_model(model, other, max_shard_size="30KB")
    with pytest.raises(BaseMismatchError, match="up_proj"):
        merge_checkpoint(other, [adapter], tmp_path / "out")
    assert len(asked) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"base", "other", "adapter"}


def test_names_that_mean_something_else_in_the_files(tmp_path, asked, monkeypatch):
    """Two layers have each other's names in the files: the fingerprints do not fit, and the model
    is asked."""
    model, base = tiny(tmp_path / "base")
    adapter = trained(model, tmp_path / "adapter", targets=["q_proj", "o_proj"])
    exact = in_memory(model, adapter, tmp_path / "memory")
    model, _ = tiny(tmp_path / "base")
    one, two = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")

    def swapped(values):
        return {{one: two, two: one}.get(name, name): value for name, value in values.items()}

    from safetensors.torch import load_file, save_file

    for file in base.glob("*.safetensors"):
        file.unlink()
    (base / "model.safetensors.index.json").unlink()
    own = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if "lm_head" not in name
    }
    save_file(swapped(own), base / "model.safetensors", metadata={"format": "pt"})
    map_checkpoint_names = merge_plan.models.map_checkpoint_names

    def rule(model, names, shape_of=None):  # as transformers' own rules of conversion would say it
        return swapped(map_checkpoint_names(model, swapped(dict.fromkeys(names))))

    monkeypatch.setattr(merge_plan.models, "map_checkpoint_names", rule)
    whole = tiny(tmp_path / "again")[0]
    real = merge_plan.plan_merge
    monkeypatch.setattr(
        veneer.tools.merge_checkpoint.job,
        "plan_merge",
        lambda checkpoint, given, saved, drawn: real(
            checkpoint, given, saved, whole if drawn is None else drawn
        ),
    )
    merge_checkpoint(base, [adapter], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    equal(swapped(found), {name: exact[name] for name in swapped(found)})


@pytest.mark.parametrize("weight", [".weight", "a..weight", "forward.weight"])
def test_names_that_no_model_has(weight, tmp_path):
    from types import SimpleNamespace

    (tmp_path / "config.json").write_text("{}")
    checkpoint = SimpleNamespace(
        folder=tmp_path, file_of={weight: "file"}, shape=lambda name: (3, 4)
    )
    record = {"base": {"weights": {weight: "0"}}, "changes": {weight: {"kind": "linear"}}}
    assert linear_stub_model(checkpoint, [SimpleNamespace(metadata=record, full={})]) is None


@pytest.mark.parametrize(
    ("other", "drawn"), [("b.q.weight", False), ("b.k.weight", True), ("b.q.bias", True)]
)
def test_a_layer_of_the_same_name_and_shape_may_be_the_same(other, drawn, tmp_path):
    """As the shared blocks of some models are, of which a file may hold each."""
    from types import SimpleNamespace

    (tmp_path / "config.json").write_text("{}")
    file_of = dict.fromkeys(["a.q.weight", other], "file")
    checkpoint = SimpleNamespace(folder=tmp_path, file_of=file_of, shape=lambda name: (3, 4))
    record = {
        "base": {"weights": {"a.q.weight": "0"}},
        "changes": {"a.q.weight": {"kind": "linear"}},
    }
    assert (
        linear_stub_model(checkpoint, [SimpleNamespace(metadata=record, full={})]) is not None
    ) is drawn
