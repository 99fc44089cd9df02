"""What vLLM would do with our folders, by the rules that its loader publishes.

The rules below are ours, written from vLLM's sources: vllm/lora/peft_helper.py (PEFTHelper: its
fields, what it refuses, the scale), vllm/lora/utils.py (parse_fine_tuned_lora_name) and
vllm/lora/lora_model.py (check_unexpected_modules), as published in 2025 and 2026. vLLM itself runs
in tests/serve/test_vllm_server.py.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tests.support.models import Stack, TinyLM
from tests.support.toys import error, randomise
from torch import nn

import veneer
from veneer.adapter_files.folder import read
from veneer.formats.vllm import parse_tensor_name, problems
from veneer.tools.convert import convert
from veneer.variants import VARIANTS

#: the default of vLLM's setting ``max_lora_rank``
DEFAULT_MAX_RANK = 16


class Refused(ValueError):  # noqa: N818
    """vLLM's answer."""


def helper(config, max_rank=DEFAULT_MAX_RANK):
    """PEFTHelper.from_dict and validate_legal: the scale of all layers, or why the adapter is
    refused."""
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if missing:
        raise Refused(f"missing {missing}")
    reasons = []
    if config.get("modules_to_save"):
        reasons.append("modules_to_save")
    if config.get("use_dora"):
        reasons.append("DoRA")
    if config["r"] > max_rank:
        reasons.append("rank")
    if config.get("bias", "none") != "none":
        reasons.append("bias")
    if reasons:
        raise Refused(", ".join(reasons))
    return config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )


def name_of(tensor):
    """parse_fine_tuned_lora_name: (module, whether A)."""
    parts = tensor.removeprefix("base_model.model.").split(".")
    if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
        return ".".join(parts[:-2]), parts[-2] == "lora_A"
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return ".".join(parts[:-1]), parts[-1] == "lora_embedding_A"
    raise Refused(f"{tensor} is unsupported")


def loaded(path, supported, max_rank=DEFAULT_MAX_RANK):
    """A folder as vLLM's loader takes it: the module's path -> (A, B, scale)."""
    config = json.loads((path / "adapter_config.json").read_text())
    scale, held = helper(config, max_rank), load_file(path / "adapter_model.safetensors")
    unexpected = [
        tensor for tensor in held
        if "base_layer" not in tensor and name_of(tensor)[0].rpartition(".")[2] not in supported
    ]  # fmt: skip
    if unexpected:
        raise Refused(f"unexpected modules {unexpected}")
    pairs = {}
    for tensor, value in held.items():
        module, is_a = name_of(tensor)
        pairs.setdefault(module, {})["A" if is_a else "B"] = value
    return {module: (pair["A"], pair["B"], scale) for module, pair in pairs.items()}


SUPPORTED = {"q_proj", "k_proj", "v_proj", "o_proj", "up", "down", "embed_tokens", "lm_head"}


def trained(model, path, **config):
    handle = veneer.attach(
        model, veneer.LoraConfig(**{"rank": 4, "alpha": 6, "targets": "all-linear", **config})
    )
    randomise(handle)
    handle.save(path)
    handle.detach()
    return read(path)


def told(files):
    held = load_file(files.path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return problems(files.peft_config, held, shapes=shapes)


# the one alpha of the config is for all layers: the variants whose rank is what it says
PLAIN = [
    v.name
    for v in VARIANTS
    if v.peft is not None and not v.peft_keys and not v.needs and v.name != "adalora"
]


@pytest.mark.parametrize("variant", PLAIN)
def test_what_is_said_to_load_loads_and_computes_the_same(variant, tmp_path):
    first = trained(TinyLM(), tmp_path / "a", variant=variant)
    assert told(first) == []
    found = loaded(first.path, SUPPORTED, max_rank=512)
    assert found.keys() == first.products.keys()
    for at, low in first.products.items():
        A, B, scale = found[at]
        assert error(scale * B.double() @ A.double(), low.delta(torch.float64)[0]) < 1e-6


def test_embeddings_and_heads_keep_their_names(tmp_path):
    first = trained(TinyLM(), tmp_path / "a", targets=["embed_tokens", "lm_head", "q_proj"])
    assert told(first) == []
    found = loaded(first.path, SUPPORTED)
    A, B, scale = found["model.embed_tokens"]
    assert A.shape == (4, 17)  # [rank, vocabulary], as vLLM compares it
    assert (
        error(
            scale * B.double() @ A.double(),
            first.products["model.embed_tokens"].delta(torch.float64)[0],
        )
        < 1e-6
    )


def test_the_record_is_no_obstacle(tmp_path):
    """vLLM drops the fields that it does not know, and reads the two files of PEFT alone."""
    first = trained(TinyLM(), tmp_path / "a")
    convert(first.path, tmp_path / "b", to="peft")
    one, other = loaded(first.path, SUPPORTED), loaded(tmp_path / "b", SUPPORTED)
    assert one.keys() == other.keys()
    assert all(
        torch.equal(one[at][0], other[at][0]) and torch.equal(one[at][1], other[at][1])
        for at in one
    )


REFUSED = {
    "DoRA": ({"variant": "dora"}, "it is a DoRA", "DoRA"),
    "modules in full": ({"train_also": ("lm_head",)}, "modules in full", "modules_to_save"),
    "biases": ({"bias": "targets"}, "trains biases", "bias"),
}


@pytest.mark.parametrize(("config", "reason", "theirs"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_said_not_to_load_is_refused(config, reason, theirs, tmp_path):
    first = trained(TinyLM(), tmp_path / "a", **config)
    assert any(reason in problem for problem in told(first)), told(first)
    with pytest.raises(Refused, match=theirs):
        loaded(first.path, SUPPORTED)


def test_the_rank_is_compared_with_the_servers(tmp_path):
    model = nn.ModuleDict({"q_proj": nn.Linear(40, 40)})
    first = trained(model, tmp_path / "a", rank=32, targets=["q_proj"])
    names = list(load_file(first.path / "adapter_model.safetensors"))
    assert problems(first.peft_config, names) == []
    assert any(
        "rank is 32" in problem
        for problem in problems(first.peft_config, names, max_rank=DEFAULT_MAX_RANK)
    )
    with pytest.raises(Refused, match="rank"):
        loaded(first.path, SUPPORTED)


def test_scales_of_single_layers_are_told(tmp_path):
    """Releases without rank_pattern and alpha_pattern use one scale for all, which is right where
    layers share it."""
    one = trained(
        TinyLM(), tmp_path / "a", ranks={"q_proj": 2}, alphas={"q_proj": 3}
    )  # 3 / 2 = 6 / 4
    assert told(one) == []
    other = trained(TinyLM(), tmp_path / "b", alphas={"q_proj": 3})
    assert any("scales of their own" in problem for problem in told(other))
    wrong = loaded(other.path, SUPPORTED)["model.layers.0.self_attn.q_proj"]
    right = other.products["model.layers.0.self_attn.q_proj"]
    assert (
        error(wrong[2] * wrong[1].double() @ wrong[0].double(), right.delta(torch.float64)[0]) > 0.5
    )


def test_layers_that_vllm_has_not_are_told(tmp_path):
    first = trained(Stack(), tmp_path / "a", targets="all", rank=2)
    found = " ".join(told(first))
    assert "peft_type" in found
    assert "convolutions" in found
    assert "tensors besides the factors (encoder.norm1.weight" in found
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["attn"]}
    names = [f"base_model.model.attn.base_layer.out_proj.lora_{side}.weight" for side in "AB"]
    assert problems(config, names) == [
        "it changes what stands below a wrapper (attn.base_layer.out_proj)"
    ]
    experts = [f"base_model.model.mlp.experts.base_layer.lora_{side}.weight" for side in "AB"]
    assert (
        problems({**config, "target_modules": ["experts"]}, experts) == []
    )  # gate_up_proj, which it knows so
    conv = trained(nn.ModuleDict({"c": nn.Conv2d(3, 8, 3)}), tmp_path / "b", targets="all", rank=2)
    assert told(conv) == ["it changes convolutions (c.lora_A.weight, c.lora_B.weight)"]


@pytest.mark.parametrize(
    ("name", "means"),
    [
        (
            "base_model.model.model.layers.0.q_proj.lora_A.weight",
            ("model.layers.0.q_proj", "lora_a"),
        ),
        ("base_model.model.lm_head.lora_B.weight", ("lm_head", "lora_b")),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ("model.embed_tokens", "lora_a")),
        ("base_model.model.q_proj.lora_magnitude_vector", None),
        ("base_model.model.head.weight", None),
        ("base_model.model.lora_A.weight", None),
    ],
)
def test_names_are_parsed_as_there(name, means):
    assert parse_tensor_name(name) == means
    if means is not None:
        assert name_of(name) == (means[0], means[1] == "lora_a")
