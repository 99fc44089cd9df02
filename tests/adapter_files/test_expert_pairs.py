"""Adapters of experts as transformers 4 had them, a linear layer each, are read into the stacks
that they are now."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from tests.support import moe
from tests.support.moe import build
from tests.support.toys import error

import veneer
from veneer.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::veneer.adapter_files.match_base.UnverifiedAdapter")

LAYOUTS = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
}


def written(folder, pairs, **config):
    """A folder of PEFT's with pairs {path: (A, B)}."""
    folder.mkdir()
    tensors = {}
    for path, (A, B) in pairs.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({path.partition("layers.0.")[2] for path in pairs})
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps({**base, **config}))
    return folder


def pairs_of(model, layout, ranks, experts=range(4)):
    """Pairs for the projections of these experts: {path: (A, B)}."""
    above, *projections = layout
    stacks = next(module for path, module in model.named_modules() if path.endswith(".experts"))
    half, hidden = stacks.down_proj.shape[2], stacks.down_proj.shape[1]
    sizes = dict(zip(projections, [(half, hidden), (half, hidden), (hidden, half)], strict=True))
    pairs = {}
    for number in experts:
        for projection in projections:
            out, in_ = sizes[projection]
            rank = ranks.get((number, projection), 2)
            pairs[f"{above}.{number}.{projection}"] = torch.randn(rank, in_), torch.randn(out, rank)
    return pairs


def with_pairs(model, layout, pairs, scales):
    """The model with each change in its part of the stacks."""
    plain = copy.deepcopy(model)
    stacks = next(module for path, module in plain.named_modules() if path.endswith(".experts"))
    half = stacks.down_proj.shape[2]
    places = dict(
        zip(
            layout[1:], [("gate_up_proj", 0), ("gate_up_proj", half), ("down_proj", 0)], strict=True
        )
    )
    with torch.no_grad():
        for path, (A, B) in pairs.items():
            *_, number, projection = path.split(".")
            name, first = places[projection]
            getattr(stacks, name)[int(number), first : first + len(B)] += scales(path) * B @ A
    return plain


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pair_of_each_expert_is_its_part_of_the_stack(name, tmp_path):
    model = build(name, torch.float32)
    pairs = pairs_of(model, LAYOUTS[name], {})
    expected = with_pairs(model, LAYOUTS[name], pairs, lambda path: 3)
    ids = torch.randint(0, 50, (2, 7))
    handle = veneer.load(model, written(tmp_path / "old", pairs))
    with torch.no_grad():
        wanted = expected(ids).logits
        assert error(model(ids).logits, wanted) < 1e-5
        handle.merge()
        assert error(model(ids).logits, wanted) < 1e-5
    at = next(path for path in handle.changes if path.endswith("gate_up_proj"))
    assert handle.changes[at].rank == 4
    handle.unmerge()
    handle.save(tmp_path / "new")
    again = build(name, torch.float32)
    veneer.load(again, tmp_path / "new")
    assert error(again(ids).logits, wanted) < 1e-5


@pytest.mark.parametrize("rooted", [False, True])
def test_ranks_and_alphas_of_single_experts_are_kept(rooted, tmp_path):
    model, layout = build("mixtral", torch.float32), LAYOUTS["mixtral"]
    pairs = pairs_of(model, layout, {(1, "w1"): 3, (2, "w2"): 1}, experts=[0, 1, 2])
    patterns = {
        "rank_pattern": {"1.w1": 3, "2.w2": 1},
        "alpha_pattern": {"0.w3": 5},
        "use_rslora": rooted,
    }
    power = 0.5 if rooted else 1.0

    def scales(path):
        rank = 3 if path.endswith("1.w1") else 1 if path.endswith("2.w2") else 2
        return (5 if path.endswith("0.w3") else 6) / rank**power

    expected = with_pairs(model, layout, pairs, scales)
    ids = torch.randint(0, 50, (2, 7))
    handle = veneer.load(model, written(tmp_path / "old", pairs, **patterns))
    with torch.no_grad():
        assert error(model(ids).logits, expected(ids).logits) < 1e-5
    assert {change.rank for change in handle.changes.values()} == {5, 2}


def test_experts_of_many_layers(tmp_path, monkeypatch):
    """As many as Qwen3-30B-A3B has: ranks and alphas of 96 stacks."""
    monkeypatch.setitem(moe._SHAPE, "num_hidden_layers", 48)
    model, (_, *projections) = build("qwen3_moe", torch.float32), LAYOUTS["qwen3_moe"]
    pairs = {
        path: pair
        for number in range(48)
        for path, pair in pairs_of(
            model, (f"model.layers.{number}.mlp.experts", *projections), {}, experts=[0]
        ).items()
    }
    handle = veneer.load(model, written(tmp_path / "old", pairs, target_modules=projections))
    ranks = {(path.rpartition(".")[2], change.rank) for path, change in handle.changes.items()}
    assert len(handle.changes) == 96
    assert ranks == {("gate_up_proj", 4), ("down_proj", 2)}


def test_pairs_beside_other_layers_and_of_one_projection(tmp_path):
    model, layout = build("mixtral", torch.float32), LAYOUTS["mixtral"]
    pairs = {
        path: pair for path, pair in pairs_of(model, layout, {}).items() if path.endswith("w3")
    }
    query = model.model.layers[0].self_attn.q_proj.weight
    own = torch.randn(2, query.shape[1]), torch.randn(query.shape[0], 2)
    expected = with_pairs(model, layout, pairs, lambda path: 3)
    with torch.no_grad():
        expected.model.layers[0].self_attn.q_proj.weight += 3 * own[1] @ own[0]
    folder = written(tmp_path / "old", {**pairs, "model.layers.0.self_attn.q_proj": own})
    veneer.load(model, folder)
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        assert error(model(ids).logits, expected(ids).logits) < 1e-5


def test_a_pair_that_does_not_fit_is_named(tmp_path):
    model, layout = build("mixtral", torch.float32), LAYOUTS["mixtral"]
    pairs = pairs_of(model, layout, {})
    path = f"{layout[0]}.1.w1"
    pairs[path] = pairs[path][0][:, :-1], pairs[path][1]
    with pytest.raises(AdapterError, match=r"experts\.1\.w1"):
        veneer.load(model, written(tmp_path / "old", pairs))


def test_an_expert_of_alpha_zero_changes_nothing_and_the_others_stay(tmp_path):
    model = build("mixtral", torch.float32)
    pairs = pairs_of(model, LAYOUTS["mixtral"], {})
    expected = with_pairs(
        model, LAYOUTS["mixtral"], pairs, lambda path: 0 if ".experts.0." in path else 3
    )
    ids = torch.randint(0, 50, (2, 7))
    veneer.load(model, written(tmp_path / "old", pairs, alpha_pattern={r"experts\.0\.w[123]": 0}))
    assert error(model(ids).logits, expected(ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("experts", [False, True])
def test_a_router_of_old_is_what_peft_makes_of_it(name, experts, tmp_path):
    """A linear layer in transformers 4, elsewhere in Mixtral; now a parameter of a router."""
    model, layout = build(name, torch.float32), LAYOUTS[name]
    above = layout[0].removesuffix(".experts")
    pairs = pairs_of(model, layout, {}) if experts else {}
    pairs[f"{above}.gate"] = torch.randn(2, 16), torch.randn(4, 2)
    query = model.model.layers[0].self_attn.q_proj.weight
    pairs["model.layers.0.self_attn.q_proj"] = (
        torch.randn(2, query.shape[1]),
        torch.randn(query.shape[0], 2),
    )
    targets = ["gate", "q_proj", *(layout[1:] if experts else ())]
    folder = written(tmp_path / "old", pairs, target_modules=targets)
    theirs = peft.PeftModel.from_pretrained(build(name, torch.float32), folder).eval()
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        expected = theirs(ids).logits
    handle = veneer.load(model, folder)
    assert error(model(ids).logits, expected) < 1e-5
    assert error(build(name, torch.float32)(ids).logits, expected) > 1e-2
    assert "model.layers.0.mlp.gate.weight" in handle.changes
    handle.merge()
    assert error(model(ids).logits, expected) < 1e-5
