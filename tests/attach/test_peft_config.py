"""``LoraConfig.from_peft``: the adapter that it attaches is the one that PEFT attaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.support.tiny import tiny_config, tiny_model
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import veneer
from veneer.errors import ConfigError, MethodError, TargetError

# PEFT asks transformers for an attribute that has another name by now
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

CONFIGS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "an expression": {"target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.1},
    "exclusions": {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.0\..*v_proj|layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 5},
    },
    "rank-stabilised": {"r": 4, "target_modules": ["k_proj"], "use_rslora": True},
    "DoRA": {"r": 4, "target_modules": ["k_proj"], "use_dora": True},
    "both": {"r": 4, "target_modules": ["k_proj"], "use_dora": True, "use_rslora": True},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
    "a start": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's low-rank tensors, and DoRA's magnitudes, by Veneer's name of the parameter."""
    names = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}
    tensors = {}
    for path, parameter in model.named_parameters():
        module, *kind = path.removeprefix("base_model.model.").split(".lora_")
        if parameter.requires_grad and kind:
            name = names[f"lora_{kind[0].split('.')[0]}"]
            tensors[f"{module}.weight.{name}"] = parameter
    return tensors


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_tensors_train_and_compute_the_same(case: str) -> None:
    config = peft.LoraConfig(**CONFIGS[case])
    ours = veneer.LoraConfig.from_peft(config)
    model, ids = tiny_model(), torch.randint(0, 250, (2, 9))
    handle = veneer.attach(model, ours)
    theirs: Any = peft.get_peft_model(tiny_model(), config).eval()
    tensors = trained_tensors(theirs)
    parameters = {
        name: parameter
        for name, parameter in handle.named_parameters()
        if name.rpartition(".")[2] in ("A", "B", "magnitude")
    }
    assert parameters.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                tensors[name].normal_()
            assert parameter.numel() == tensors[name].numel()
            parameter.copy_(tensors[name].reshape(parameter.shape))
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    numbers = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert handle.summary().trainable == numbers
    assert ours.dropout == config.lora_dropout


def nested_blocks() -> nn.Module:
    """Blocks at the root and below it, and blocks (experts) inside of blocks."""

    def blocks() -> nn.ModuleList:
        experts = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(4, 4)}) for _ in range(2))
        return nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(4, 4), "experts": experts}) for _ in range(2)
        )

    body = nn.ModuleDict({"blocks": blocks(), "side": blocks()})
    return nn.ModuleDict({"layers": blocks(), "body": body})


def classifier() -> nn.Module:
    return LlamaForSequenceClassification(tiny_config(num_labels=2, pad_token_id=0))


def roberta() -> nn.Module:
    """A classifier whose head has a layer with a name of the body's layers."""
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize(
    ("make_model", "fields"),
    [
        (
            tiny_model,
            {
                "target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
                "layers_to_transform": [1],
            },
        ),
        (
            tiny_model,
            {"target_modules": "all-linear", "exclude_modules": ["q_proj", "1.mlp.up_proj"]},
        ),
        (tiny_model, {"target_modules": "all-linear", "exclude_modules": r".*\.mlp(\.up_proj)?"}),
        (nested_blocks, {"target_modules": ["q"], "layers_to_transform": [1]}),
        (nested_blocks, {"target_modules": ["body.side.0.q", "q"], "layers_to_transform": 1}),
        (nested_blocks, {"target_modules": ["experts.1.w"], "layers_to_transform": [0]}),
        (
            nested_blocks,
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
        ),
        (
            nested_blocks,
            {
                "target_modules": ["w"],
                "layers_to_transform": [0],
                "layers_pattern": ["layers", "experts"],
            },
        ),
        (classifier, {"target_modules": "all-linear"}),
        (classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        (roberta, {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
        (roberta, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
        (attention, {"target_modules": "all-linear"}),
    ],
)
def test_the_layers_are_those_that_peft_adapts(
    make_model: Callable[[], nn.Module], fields: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=2, **fields)
    handle = veneer.attach(make_model(), veneer.LoraConfig.from_peft(config))
    model: Any = peft.get_peft_model(make_model(), config)
    assert {*handle.changes} == {name.rpartition(".")[0] for name in trained_tensors(model)}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [-1]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "(a|b)"},
    ],
)
def test_blocks_that_peft_would_not_match_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="indices of blocks"):
        veneer.LoraConfig.from_peft(fields)


@pytest.mark.parametrize("exclusions", ["all-linear", ["mlp"]])
def test_exclusions_that_leave_out_no_weight_in_peft_are_refused(exclusions: Any) -> None:
    """A text is an expression to PEFT, and what stands below an excluded module is adapted."""
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=exclusions)
    with pytest.raises(TargetError, match=r"'re:.*weight.*' matches no module"):
        veneer.attach(tiny_model(), veneer.LoraConfig.from_peft(config))


def test_the_bias_of_an_excluded_layer_trains_as_in_peft() -> None:
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], exclude_modules=["b"], bias="all")
    models = [nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"}) for _ in range(2)]
    handle = veneer.attach(models[0], veneer.LoraConfig.from_peft(config))
    theirs: Any = peft.get_peft_model(models[1], config)
    numbers = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert handle.summary().trainable == numbers


def test_a_config_is_read_from_an_object_a_mapping_a_file_and_a_folder(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    expected = veneer.LoraConfig(rank=4, alpha=8, targets=["q_proj"], variant="rslora")
    config.save_pretrained(str(tmp_path))
    assert veneer.LoraConfig.from_peft(config) == expected
    assert veneer.LoraConfig.from_peft(config.to_dict()) == expected
    assert veneer.LoraConfig.from_peft(tmp_path) == expected
    assert veneer.LoraConfig.from_peft(str(tmp_path / "adapter_config.json")) == expected
    (tmp_path / "adapter_config.json").write_text("[]")
    for wrong in (tmp_path, tmp_path / "nothing.json", 3):
        with pytest.raises(ConfigError, match=r"of PEFT|check the path"):
            veneer.LoraConfig.from_peft(wrong)


@pytest.mark.parametrize(
    ("task", "head"),
    [("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")],
)
def test_a_task_head_is_trained_in_full_whether_it_is_named_or_not(task: str, head: str) -> None:
    for names in (None, [head]):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type=task, modules_to_save=names)
        model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), head: nn.Linear(8, 2)})
        handle = veneer.attach(model, veneer.LoraConfig.from_peft(config))
        assert {f"{head}.weight", f"{head}.bias"} <= {name for name, _ in handle.named_parameters()}


def test_names_that_are_patterns_here_keep_their_meaning() -> None:
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    config = peft.LoraConfig(target_modules=["mlp"])
    handle = veneer.attach(model, veneer.LoraConfig.from_peft(config))
    assert list(handle.changes) == ["mlp.weight"]


def test_every_field_that_cannot_be_expressed_is_named_at_once() -> None:
    fields = {
        "r": 4, "target_modules": ["q_proj"], "lora_bias": True, "layer_replication": [[0, 2]],
        "velora_config": {"rate": 1}, "init_lora_weights": "gaussian", "of_the_future": 3,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="5 problems") as raised:
        veneer.LoraConfig.from_peft(fields)
    for name in fields.keys() - {"r", "target_modules"}:
        assert name in str(raised.value)
    for wrong, words in (
        ({"peft_type": "IA3"}, "other tuners"),
        ({"r": 4}, "target_modules"),
        ({"target_modules": ["a"], "init_lora_weights": "pissa", "use_dora": True}, "use_dora=True with init"),
        ({"target_modules": ["a"], "init_lora_weights": False}, "init_lora_weights=False"),
        ({"target_modules": ["a"], "use_qalora": True, "qalora_group_size": 8}, "qalora_group_size=8"),
        ({"target_modules": ["a"], "bias": "some"}, "bias='some'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            veneer.LoraConfig.from_peft(wrong)


def test_every_field_of_peft_is_expressed_passed_over_or_refused() -> None:
    """A field that a release of PEFT adds is decided here, and in docs/from-peft.md."""
    from dataclasses import fields

    from veneer.config import PEFT_FIELDS, PEFT_ONLY, PEFT_UNNEEDED

    names = {field.name for field in fields(peft.LoraConfig)}
    assert names - {*PEFT_FIELDS, *PEFT_UNNEEDED, *PEFT_ONLY} == {"bias"}


def test_the_fields_of_peft_are_answered_together_by_ours() -> None:
    make: Any = veneer.LoraConfig
    with pytest.raises(ConfigError, match="8 problems") as raised:
        make(
            r=8, lora_alpha=16, target_modules=["q_proj"], use_dora=True, modules_to_save=["head"],
            init_lora_weights="pissa", task_type="CAUSAL_LM", arrow_config={},
        )  # fmt: skip
    for words in (
        "PEFT's `r` is `rank` here",
        'write variant="dora"',
        "not needed",
        "from-peft.md",
    ):
        assert words in str(raised.value)
    with pytest.raises(ConfigError, match="'lora_only' is 'targets' here"):
        make(bias="lora_only")


@pytest.mark.parametrize(
    ("name", "counterpart"),
    [
        ("get_peft_model", r"veneer\.attach"),
        ("print_trainable_parameters", r"handle\.summary\(\)"),
        ("PeftModel", r"veneer\.load"),
    ],
)
def test_names_of_the_package_peft_are_answered_by_ours(name: str, counterpart: str) -> None:
    with pytest.raises(MethodError, match=counterpart):
        getattr(veneer, name)
    assert not hasattr(veneer, name)


def test_a_typo_of_a_variant_or_dtype_fails_as_the_config_is_made() -> None:
    with pytest.raises(ConfigError, match=r"variant='dorra' \(nearest: 'dora'"):
        veneer.LoraConfig(variant="dorra")
    with pytest.raises(ConfigError, match=r"dtype='bfloat61' \(nearest: 'bfloat16'"):
        veneer.LoraConfig(dtype="bfloat61")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"])
def test_a_dtype_has_one_meaning_in_each_spelling(dtype: Any) -> None:
    config = veneer.LoraConfig(rank=2, dtype=dtype)
    assert config == veneer.LoraConfig(rank=2, dtype="bfloat16")
    assert json.loads(json.dumps(config.to_dict()))["dtype"] == "bfloat16"
    handle = veneer.attach(nn.Sequential(nn.Linear(4, 4)), config)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.bfloat16}
