"""What PEFT's tests ask of PEFT, as rows: a model, a tuner and the fields of its config.

Of test_custom_models, test_decoder_models, test_encoder_decoder_models,
test_feature_extraction_models, test_seq_classifier, test_vision_models, test_target_parameters,
test_trainable_tokens, test_initialization, test_lora_variants, test_lora_conversion and test_vera
of huggingface/peft, in our words and on models of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import peft

#: PEFT's names of the tuners that rows use
CONFIGS = {
    "lora": "LoraConfig", "adalora": "AdaLoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig",
    "vera": "VeraConfig", "ln_tuning": "LNTuningConfig", "trainable_tokens": "TrainableTokensConfig",
    "ia3": "IA3Config", "oft": "OFTConfig", "boft": "BOFTConfig", "hra": "HRAConfig", "randlora": "RandLoraConfig",
    "shira": "ShiraConfig", "fourierft": "FourierFTConfig", "vblora": "VBLoRAConfig", "miss": "MissConfig",
    "c3a": "C3AConfig", "waveft": "WaveFTConfig", "road": "RoadConfig", "delora": "DeloraConfig", "hira": "HiraConfig",
    "gralora": "GraloraConfig",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case. ``fields``: of PEFT's config. ``noise``: the size of the random numbers.
    ``converted``: PEFT turns the adapter into one of the unchanged base as it saves it.
    ``as_lora``: the rank to which PEFT converts another tuner as it saves it, which is near.
    ``reloads``: what PEFT computes from its own folder is not quite what it saved, so that only the
    folder can be a reference."""

    family: str
    model: str
    tuner: str
    fields: Mapping[str, Any]
    noise: float = 0.3
    converted: bool = False
    as_lora: int | None = None
    reloads: bool = False

    @property
    def name(self) -> str:
        values = (f"{name}={_short(value)}" for name, value in self.fields.items())
        more = [
            "converted by PEFT" if self.converted else "",
            "" if self.as_lora is None else f"saved as LoRA of rank {self.as_lora}",
        ]
        return f"{self.model}: {', '.join(filter(None, [self.tuner, *values, *more]))}"

    @property
    def single(self) -> bool:
        """Whether PEFT starts it in 32 bits at most, so that a model in float64 cannot have it."""
        start = str(self.fields.get("init_lora_weights")).lower()
        return start.startswith(("pissa", "olora", "mica"))

    def config(self) -> peft.PeftConfig:
        return getattr(peft, CONFIGS[self.tuner])(**self.fields)


def _short(value: Any) -> str:
    text = (
        type(value).__name__
        if isinstance(value, object) and hasattr(value, "__dataclass_fields__")
        else repr(value)
    )
    return text.replace("'", "")


def rows() -> list[Row]:
    """Every row, each once."""
    from .architecture_rows import architecture_rows

    found = [*custom_rows(), *other_tuners(), *architecture_rows()]
    names = [row.name for row in found]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    return found


#: model → the fields of LoRA configs on it
LORA: dict[str, list[dict[str, Any]]] = {
    "mlp": [
        {"target_modules": "lin0"},
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1},
        {"target_modules": ["lin0"], "use_dora": True},
        {"target_modules": ["lin0", "lin1"], "use_dora": True},
        {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32},
        {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32},
        {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]},
        {"target_modules": ["lin0"], "use_rslora": True},
        {"target_modules": ["lin0"], "r": 16},
        {"target_modules": ["lin0"], "use_rslora": True, "use_dora": True, "lora_alpha": 3},
        {"target_modules": ["lin0"], "bias": "all"},
        {"target_modules": ["lin0"], "bias": "lora_only"},
        {"target_modules": ["lin0", "lin1"], "bias": "lora_only", "use_dora": True},
        {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "init_lora_weights": False},
        {"target_modules": ["lin0"], "init_lora_weights": "gaussian"},
        {"target_modules": ["lin0"], "init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ".*1"},
        {"target_modules": ".*lin[01]"},
        {"target_modules": r"^(?!.*lin1).*lin\d(?=$|\.).*"},
        {
            "target_modules": ["lin0", "lin1"],
            "rank_pattern": {"lin1": 2},
            "alpha_pattern": {"lin0": 5},
        },
        {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin.": 2}, "use_rslora": True},
    ],
    "mlp without biases": [
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin0"], "use_dora": True},
        {"target_modules": ["lin0"], "lora_bias": True},
    ],
    "mlp with norms": [
        {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"]},
        {"target_modules": ["lin0", "lin1"], "modules_to_save": ["layernorm0", "layernorm1"]},
        {"target_modules": "all-linear", "bias": "all"},
    ],
    "mlp with a GRU": [
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin0", "fc"]},
        {"target_modules": ["lin0"], "modules_to_save": ["gru"]},
        {"target_modules": ["lin0"], "modules_to_save": ["fc"], "use_dora": True},
        {"target_modules": "all-linear", "exclude_modules": ["gru"]},
    ],
    "mlp of four": [
        {"target_modules": ["lin1", "lin2"]},
        {"target_modules": "all-linear", "exclude_modules": ["lin3"]},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"lin1": 4, "lin2": 12},
            "alpha_pattern": {"lin2": 1},
        },
        {"target_modules": ["lin0", "lin1", "lin2"], "use_dora": True, "rank_pattern": {"lin2": 3}},
    ],
    "deep mlp": [
        {"target_modules": ["lin0"]},
        {
            "target_modules": ["lin0", "lin1"],
            "layers_to_transform": [0, 3, 11],
            "layers_pattern": "layers",
        },
        {"target_modules": ["lin0", "head"], "layers_to_transform": [1], "r": 2},
        {
            "target_modules": ["lin0", "head"],
            "layers_to_transform": [1],
            "layers_pattern": ["layers"],
        },
        {"target_modules": ["lin0", "lin1"], "layers_to_transform": 5, "layers_pattern": "layers"},
        {"target_modules": ["lin1"], "layers_to_transform": [10], "layers_pattern": ["layers"]},
        {"target_modules": r"layers\.(1|3|11)\.lin1"},
        {"target_modules": ["1.lin0"]},
        {"target_modules": ["lin0"], "rank_pattern": {"1.lin0": 3}},
        {
            "target_modules": ["lin0"],
            "rank_pattern": {"^layers.1.lin0": 3},
            "alpha_pattern": {"layers.1.lin0": 5},
        },
        {
            "target_modules": ["lin0"],
            "modules_to_save": ["head"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ],
    "nested": [
        {"target_modules": ["linear"]},
        {"target_modules": "linear"},
        {"target_modules": ["model.0.linear"]},
        {
            "target_modules": ["linear"],
            "rank_pattern": {"linear": 8},
            "alpha_pattern": {"0.linear": 2},
            "lora_alpha": 1,
        },
        {"target_modules": ["linear"], "rank_pattern": {"^linear": 2, "1.1.0.linear": 3}},
        {"target_modules": ["linear"], "exclude_modules": ["1.0.linear"]},
    ],
    "embedding and Conv1D": [
        {"target_modules": ["conv1d"]},
        {"target_modules": ["emb"]},
        {"target_modules": ["emb", "conv1d"]},
        {"target_modules": ["conv1d"], "use_dora": True},
        {"target_modules": ["emb"], "use_dora": True},
        {"target_modules": ["emb", "conv1d"], "use_dora": True},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
        {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 3]}},
        {"target_modules": ["lin0"], "modules_to_save": ["emb"]},
        {"target_modules": ["emb"], "r": 3, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_parameters": ["emb.weight", "conv1d.weight"]},
    ],
    "wide Conv1D": [
        {"target_modules": ["conv1d"], "r": 4},
        {"target_modules": ["conv1d"], "r": 4, "fan_in_fan_out": True},
        {"target_modules": ["conv1d"], "r": 4, "use_dora": True},
        {"target_modules": ["emb", "conv1d"], "r": 2, "use_dora": True},
        {"target_modules": ["conv1d"], "bias": "lora_only"},
        {"target_modules": "all-linear", "r": 3},
        {"target_modules": ["conv1d"], "init_lora_weights": "orthogonal", "r": 4},
        {"target_parameters": ["conv1d.weight"], "r": 2},
    ],
    "embedding with a getter": [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lin0"]},
        {"target_modules": ["lin0"], "trainable_token_indices": [0, 1, 3]},
    ],
    "embedding with a sibling": [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lin0"]},
        {"target_modules": ["embed_tokens_extra"]},
        {"target_modules": ["lin0"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["lin0"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
    ],
    "two embeddings": [
        {"target_modules": ["emb_text", "emb_image"]},
        {
            "target_modules": ["lin0"],
            "trainable_token_indices": {"emb_text": [0, 1], "emb_image": [3, 10]},
        },
        {"target_modules": ["emb_text"], "trainable_token_indices": {"emb_image": [0, 1, 3]}},
    ],
    "tied embedding and head": [
        {"target_modules": ["linear"]},
        {"target_modules": ["linear"], "modules_to_save": ["emb", "head"]},
        {"target_modules": ["emb"]},
        {"target_modules": ["head"]},
        {"target_modules": ["linear"], "modules_to_save": ["head"]},
        {"target_modules": ["linear"], "modules_to_save": ["emb"]},
        {"target_modules": ["emb"], "use_dora": True},
        {"target_modules": ["linear"], "trainable_token_indices": {"emb": [0, 1, 3]}},
    ],
    "untied embedding and head": [
        {"target_modules": ["emb", "head"]},
        {"target_modules": ["emb", "head"], "use_dora": True},
        {"target_modules": ["linear"], "modules_to_save": ["emb", "head"]},
        {"target_modules": ["linear"], "trainable_token_indices": {"emb": [0, 1, 3]}},
        {
            "target_modules": "all-linear",
            "trainable_token_indices": {"emb": [10]},
            "use_rslora": True,
        },
    ],
    "Conv1d": [{"target_modules": ["conv1d"]}, {"target_modules": ["conv1d"], "use_dora": True}],
    "larger Conv1d": [
        {"target_modules": ["conv1d"]},
        {"target_modules": ["conv1d", "lin0"], "use_dora": True},
        {"target_modules": ["conv1d"], "bias": "lora_only", "use_rslora": True},
        {"target_modules": ["conv1d"], "lora_bias": True},
    ],
    "Conv1d of kernel 1": [
        {"target_modules": ["conv1d"], "r": 2},
        {"target_modules": ["conv1d"], "use_dora": True},
        {"target_modules": ["lin0"], "modules_to_save": ["conv1d"]},
    ],
    "Conv1d in groups": [
        {"target_modules": ["conv1d"]},
        {"target_modules": ["lin0"], "modules_to_save": ["conv1d"]},
    ],
    "Conv2d": [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d", "lin0"]},
        {"target_modules": ["conv2d"], "use_dora": True},
        {"target_modules": ["conv2d", "lin0"], "use_dora": True},
        {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32},
        {"target_modules": ["conv2d"], "init_lora_weights": False},
        {"target_modules": ["conv2d"], "init_lora_weights": "gaussian"},
        {"target_modules": ["conv2d"], "modules_to_save": ["lin0"], "bias": "all"},
        {"target_modules": ["lin0"], "modules_to_save": ["conv2d"]},
        {
            "target_modules": ["conv2d", "first"],
            "rank_pattern": {"conv2d": 2},
            "alpha_pattern": {"first": 3},
        },
    ],
    "Conv2d without a bias": [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d"], "use_dora": True},
    ],
    "Conv2d of kernel 1": [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d"], "use_dora": True},
    ],
    "Conv2d in 8 groups": [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d"], "use_dora": True},
        {"target_modules": ["lin0"], "modules_to_save": ["conv2d"]},
    ],
    "Conv2d in 2 groups": [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d"], "use_dora": True},
    ],
    "Conv2d between linear layers": [
        {"target_modules": ["lin0", "conv2d"]},
        {"target_modules": ["lin0", "conv2d", "lin1"], "use_dora": True},
        {"target_modules": ["conv2d"], "use_rslora": True, "bias": "all"},
    ],
    "Conv3d": [
        {"target_modules": ["conv3d"]},
        {"target_modules": ["conv3d", "lin0"]},
        {"target_modules": ["conv3d"], "use_dora": True},
        {"target_modules": ["conv3d", "lin0"], "use_dora": True},
        {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32},
    ],
    "attention of torch": [
        {"target_modules": ["mha"]},
        {"target_modules": ["mha", "lin0"]},
        {"target_modules": ["lin0"]},
        {"target_modules": ["mha"], "init_lora_weights": False, "lora_alpha": 16},
        {"target_modules": ["lin0"], "modules_to_save": ["mha"]},
    ],
    "mlp of parameters": [
        {"target_parameters": ["lin0.weight"]},
        {"target_parameters": ["lin0.weight", "lin1.weight"]},
        {"target_parameters": ["lin0.weight"], "modules_to_save": ["lin1"]},
        {"target_parameters": ["lin0.weight"], "use_rslora": True, "lora_alpha": 3},
        {"target_parameters": ["lin0.weight"], "rank_pattern": {"lin0.weight": 2}},
    ],
    "linear, embedding and Conv2d": [
        {"target_modules": ["linear", "embed", "conv2d"], "lora_alpha": 3, "r": 16},
        {
            "target_modules": ["linear", "embed", "conv2d"],
            "lora_alpha": 3,
            "r": 16,
            "use_rslora": True,
        },
        {
            "target_modules": ["linear", "embed", "conv2d"],
            "r": 8,
            "rank_pattern": {"embed": 9, "conv2d": 16},
            "alpha_pattern": {"linear": 11, "conv2d": 13},
        },
        {
            "target_modules": ["linear", "embed", "conv2d"],
            "r": 8,
            "use_rslora": True,
            "rank_pattern": {"embed": 9, "conv2d": 16},
            "alpha_pattern": {"linear": 11, "conv2d": 13},
        },
        {"target_modules": ["embed"], "init_lora_weights": "gaussian"},
        {"target_modules": ["embed"], "init_lora_weights": False},
        {"target_modules": ["linear"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["linear"], "init_lora_weights": "pissa"},
        {
            "target_modules": ["linear"],
            "init_lora_weights": "pissa",
            "rank_pattern": {"linear": 32},
        },
        {"target_modules": ["linear"], "init_lora_weights": "olora"},
        {
            "target_modules": ["linear"],
            "init_lora_weights": "olora",
            "alpha_pattern": {"linear": 5},
        },
        {"target_modules": ["linear"], "init_lora_weights": "pissa", "use_rslora": True},
    ],
    "every kind that DoRA knows": [
        {"target_modules": ["linear1", "linear2", "conv1d", "conv2d", "embedding"]},
        {
            "target_modules": ["linear1", "linear2", "conv1d", "conv2d", "embedding"],
            "use_dora": True,
        },
        {
            "target_modules": ["linear1", "conv1d", "conv2d", "embedding"],
            "use_dora": True,
            "use_rslora": True,
        },
        {
            "target_modules": ["linear1", "embedding"],
            "bias": "all",
            "rank_pattern": {"embedding": 3},
        },
    ],
}

_STARTS = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "rank_pattern": {"linear": 32}},
    {"init_lora_weights": "pissa", "alpha_pattern": {"linear": 5}},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "pissa_niter_3"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "olora", "rank_pattern": {"linear": 32}},
    {"init_lora_weights": "olora", "alpha_pattern": {"linear": 5}},
    {"init_lora_weights": "olora", "use_rslora": True},
]

#: the other tuners that Veneer has a variant for
TUNERS: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("adalora", "mlp", [
        {"target_modules": ["lin0"], "total_step": 1, "orth_reg_weight": 0},
        {"target_modules": ["lin0", "lin1"], "total_step": 1},
        {"target_modules": ["lin0"], "total_step": 1, "init_r": 6, "lora_alpha": 32},
    ]),
    ("adalora", "Conv2d between linear layers", [{"target_modules": ["lin0", "lin1"], "total_step": 1}]),
    ("loha", "mlp", [
        {"target_modules": "lin0"},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "alpha": 4, "module_dropout": 0.1},
        {"target_modules": "lin0", "rank_dropout": 0.5},
    ]),
    ("loha", "Conv2d", [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d", "lin0"]},
        {"target_modules": ["conv2d"], "use_effective_conv2d": True},
    ]),
    ("loha", "Conv1d", [{"target_modules": ["conv1d"], "r": 2}]),
    ("loha", "larger Conv1d", [
        {"target_modules": ["conv1d"], "r": 2},
        {"target_modules": ["conv1d"], "r": 2, "use_effective_conv2d": True},
    ]),
    ("loha", "Conv2d of kernel 1", [{"target_modules": ["conv2d"]}]),
    ("loha", "Conv2d in 2 groups", [{"target_modules": ["conv2d"]}]),
    ("lokr", "mlp", [
        {"target_modules": "lin0"},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "alpha": 4, "module_dropout": 0.1},
        {"target_modules": "lin0", "decompose_both": True, "r": 1, "alpha": 1},
    ]),
    ("lokr", "Conv2d", [
        {"target_modules": ["conv2d"]},
        {"target_modules": ["conv2d", "lin0"]},
        {"target_modules": ["conv2d", "lin0"], "use_effective_conv2d": True, "decompose_both": True},
        {"target_modules": ["conv2d", "lin0"], "use_effective_conv2d": True, "decompose_factor": 4},
    ]),
    ("lokr", "larger Conv1d", [
        {"target_modules": ["conv1d"], "r": 2},
        {"target_modules": ["conv1d"], "r": 2, "use_effective_conv2d": True},
    ]),
    ("lokr", "Conv2d of kernel 1", [{"target_modules": ["conv2d"]}]),
    ("lokr", "Conv1d in groups", [{"target_modules": ["conv1d"], "r": 4}]),
    ("vera", "mlp", [
        {"target_modules": "lin0"},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0", "lin1"], "r": 4, "d_initial": 0.5},
    ]),
    ("vera", "mlp of four", [
        {"target_modules": ["lin1", "lin2"]},
        {"target_modules": ["lin0", "lin1", "lin2", "lin3"], "save_projection": False},
        {"target_modules": ["lin1", "lin2"], "projection_prng_key": 123, "r": 8},
    ]),
    ("vera", "wide Conv1D", [{"target_modules": ["conv1d"]}]),
    ("ln_tuning", "mlp with norms", [
        {"target_modules": "layernorm0"},
        {"target_modules": ["layernorm0"]},
        {"target_modules": ["layernorm0"], "modules_to_save": ["layernorm1"]},
        {"target_modules": ["lin0"]},
    ]),
    ("trainable_tokens", "embedding and Conv1D", [{"target_modules": ["emb"], "token_indices": [0, 1, 3]}]),
    ("trainable_tokens", "two embeddings", [{"target_modules": ["emb_text", "emb_image"], "token_indices": [0, 1]}]),
    ("trainable_tokens", "embedding with a getter", [{"token_indices": [0, 1, 3]}]),
]  # fmt: skip

#: tuners that Veneer does not have, and whether PEFT can save them as LoRA
OTHER: list[tuple[str, dict[str, Any], bool]] = [
    ("ia3", {"target_modules": ["lin0"], "feedforward_modules": ["lin0"]}, False),
    (
        "oft",
        {"target_modules": ["lin0"], "r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
        False,
    ),
    ("boft", {"target_modules": ["lin1"], "boft_block_size": 2}, False),
    ("hra", {"target_modules": ["lin0"]}, False),
    ("randlora", {"target_modules": ["lin0"], "randlora_alpha": 1}, True),
    ("shira", {"target_modules": ["lin0"], "r": 1}, False),
    ("fourierft", {"target_modules": ["lin0"], "n_frequency": 10}, True),
    ("vblora", {"target_modules": ["lin0"], "vector_length": 1, "num_vectors": 5}, True),
    ("miss", {"target_modules": ["lin0"], "r": 2}, True),
    ("c3a", {"target_modules": ["lin0"], "block_size": 2}, True),
    ("waveft", {"target_modules": ["lin0"], "n_frequency": 8}, True),
    ("road", {"target_modules": ["lin0"], "group_size": 2}, False),
    ("delora", {"target_modules": ["lin0"]}, True),
    ("hira", {"target_modules": ["lin0"]}, False),
    ("gralora", {"target_modules": ["lin0"], "gralora_k": 2}, True),
]


def custom_rows() -> Iterator[Row]:
    for model, configs in LORA.items():
        yield from (Row("LoRA, small models", model, "lora", fields) for fields in configs)
    for fields in _STARTS:
        fields = {"target_modules": ["linear"], **fields}
        yield Row(
            "LoRA, small models", "linear, embedding and Conv2d", "lora", fields, converted=True
        )
    for fields in _research_options():
        yield Row("LoRA, small models", "mlp", "lora", {"target_modules": ["lin0"], **fields})
    for tuner, model, configs in TUNERS:
        yield from (Row("Other tuners, small models", model, tuner, fields) for fields in configs)


def _research_options() -> list[dict[str, Any]]:
    """Options of LoRA of which docs/from-peft.md says that they are not offered."""
    from peft.tuners.lora.config import BdLoraConfig

    return [
        {"kasa_config": peft.KasaConfig(), "r": 4},
        {"init_lora_weights": "mica", "r": 4},
        {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
        {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
        {
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], nblocks=2, match_strict=False),
            "r": 4,
        },
        {"use_qalora": True, "qalora_group_size": 2},
    ]


def other_tuners() -> Iterator[Row]:
    for tuner, fields, convertible in OTHER:
        yield Row("Other tuners, small models", "mlp", tuner, fields)
        if convertible:
            yield Row("Other tuners, small models", "mlp", tuner, fields, as_lora=8, reloads=True)
