"""Rows on models of transformers: the configs that PEFT's tests give to each of them, and their
options one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .rows import Row

#: what PEFT's tests of language models give to each: its own default targets
_PLAIN = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
_CAUSAL, _BOTH = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}
_FEATURES, _CLASSES = {"task_type": "FEATURE_EXTRACTION"}, {"task_type": "SEQ_CLS"}

#: model → (fields of each config on it, an attention projection, an embedding, a head)
_DECODERS = {
    "opt": ("q_proj", "model.decoder.embed_tokens", "lm_head"),
    "gpt2": ("c_attn", "wte", "lm_head"),
    "gpt-j": ("q_proj", "wte", "lm_head"),
    "gpt-neox": ("query_key_value", "embed_in", "lm_head"),
    "bloom": ("query_key_value", "word_embeddings", "lm_head"),
    "falcon": ("query_key_value", "word_embeddings", "lm_head"),
    "phi": ("q_proj", "embed_tokens", "lm_head"),
    "llama": ("q_proj", "embed_tokens", "lm_head"),
    "mistral": ("q_proj", "embed_tokens", "lm_head"),
    "qwen2": ("q_proj", "embed_tokens", "lm_head"),
    "qwen3": ("q_proj", "embed_tokens", "lm_head"),
    "gemma": ("q_proj", "embed_tokens", "lm_head"),
    "gemma3": ("q_proj", "embed_tokens", "lm_head"),
}
_ENCODERS = {
    "bert": ("query", "word_embeddings"),
    "roberta": ("query", "word_embeddings"),
    "deberta": ("in_proj", "word_embeddings"),
    "deberta-v2": ("query_proj", "word_embeddings"),
}


def _decoder(projection: str, embedding: str, head: str) -> list[dict[str, Any]]:
    return [
        _PLAIN,
        {**_PLAIN, "trainable_token_indices": [0, 1, 3]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": [projection], "use_dora": True},
        {
            "target_modules": [projection],
            "layers_to_transform": [1],
            "rank_pattern": {projection: 3},
        },
        {"target_modules": [projection, embedding], "r": 4},
        {"target_modules": [projection], "modules_to_save": [head]},
    ]


#: decoders with biases
_BIASED = ("opt", "gpt2", "gpt-j", "gpt-neox", "bloom", "phi", "qwen2")


#: what is asked of one decoder alone, since it does not depend on the model
_LLAMA: list[dict[str, Any]] = [
    {**_PLAIN, "alora_invocation_tokens": [1]},
    {**_PLAIN, "layer_replication": [[0, 2], [1, 2]]},
    {"target_modules": "all-linear", "use_dora": True},
    {"target_modules": "all-linear", "init_lora_weights": "pissa"},
    {"target_modules": "all-linear", "init_lora_weights": "olora"},
    {"target_modules": "all-linear", "init_lora_weights": "orthogonal"},
    {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj"],
        "alpha_pattern": {"q_proj": 1, "1.*up_proj": 2},
    },
    {"target_modules": r"^(?!.*mlp).*(?:q_proj|v_proj)(?=$|\.).*"},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True, "r": 4},
    {"target_modules": ["q_proj", "norm"], "exclude_modules": ["norm"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    {"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]},
    {
        "target_modules": ["k_proj"],
        "rank_pattern": {"layers.1.self_attn.k_proj": 16},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 4, "layers.1.self_attn.k_proj": 16},
    },
]
_TIED: list[dict[str, Any]] = [
    _PLAIN,
    {**_PLAIN, "trainable_token_indices": [0, 1, 3]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": "all-linear"},
]


def _encoder(projection: str, embedding: str) -> list[dict[str, Any]]:
    return [
        {**_FEATURES, **_PLAIN},
        {**_FEATURES, **_PLAIN, "trainable_token_indices": [0, 1, 3]},
        {"target_modules": "all-linear"},
        {"target_modules": [projection], "use_dora": True},
        {"target_modules": [projection, embedding], "r": 4},
        {"target_modules": [projection], "bias": "all"},
        {"target_modules": [projection], "layers_to_transform": 0},
    ]


_SEQUENCES: dict[str, list[dict[str, Any]]] = {
    "t5": [
        {**_BOTH, **_PLAIN},
        {**_BOTH, **_PLAIN, "trainable_token_indices": [0, 1, 3]},
        {"target_modules": "all-linear"},
        {"target_modules": ["k", "q", "v", "o", "wi", "wo"], "use_rslora": True},
        {"target_modules": ["q", "v"], "use_dora": True},
        {"target_modules": r".*encoder.*block\.0.*(SelfAttention|DenseReluDense)\.(k|q|v|wo|wi)$"},
        {"target_modules": ["q"], "modules_to_save": ["final_layer_norm"]},
    ],
    "bart": [
        {**_BOTH, **_PLAIN},
        {**_BOTH, **_PLAIN, "trainable_token_indices": [0, 1, 3]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True, "bias": "all"},
        {"target_modules": ["q_proj"], "exclude_modules": ".*decoder.*"},
        {"target_modules": ["fc1", "fc2"], "bias": "lora_only"},
    ],
    "whisper": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["fc1", "fc2"], "use_dora": True, "modules_to_save": ["layer_norm"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
}
_CLASSIFIERS: dict[str, list[dict[str, Any]]] = {
    "bert classifier": [
        {**_CLASSES, **_PLAIN},
        {**_CLASSES, "target_modules": "all-linear"},
        {**_CLASSES, "target_modules": ["query"], "use_dora": True},
        {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
    ],
    "roberta classifier": [
        {**_CLASSES, **_PLAIN},
        {**_CLASSES, "target_modules": "all-linear"},
        {**_CLASSES, "target_modules": ["query"], "bias": "all"},
    ],
    "llama classifier": [
        {**_CLASSES, **_PLAIN},
        {**_CLASSES, "target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    ],
    "bert tagger": [
        {"task_type": "TOKEN_CLS", **_PLAIN},
        {"task_type": "TOKEN_CLS", "target_modules": ["dense"]},
    ],
}
_IMAGES: dict[str, list[dict[str, Any]]] = {
    "vit": [
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "projection"], "use_dora": True},
        {"target_modules": ["q_proj"], "bias": "all"},
    ],
    "clip": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r"vision_model.*\.(fc1|fc2)", "use_dora": True},
        {"target_modules": ["visual_projection", "text_projection", "token_embedding"], "r": 4},
    ],
    "siglip": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["fc1", "patch_embedding"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
    ],
    "resnet": [
        {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
        {"target_modules": ["convolution"], "use_dora": True},
        {"target_modules": "all-linear"},
    ],
}


def _experts(experts: str) -> list[dict[str, Any]]:
    down, up = f"{experts}.down_proj", f"{experts}.gate_up_proj"
    return [
        {"target_modules": [], "target_parameters": [down]},
        {"target_modules": [], "target_parameters": [f"0.{up}", f"0.{down}"]},
        {"target_parameters": [down, up], "r": 8, "lora_alpha": 32},
        {"target_modules": ["q_proj", "v_proj"], "target_parameters": [down]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": [up],
            "rank_pattern": {"experts.gate_up_proj": 2},
        },
    ]


_MIXTURES = {"mixtral": "mlp.experts", "qwen3-moe": "mlp.experts", "llama4": "feed_forward.experts",
             "gpt-oss": "mlp.experts"}  # fmt: skip

#: other tuners on models of transformers, with PEFT's default targets
_TUNERS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("adalora", ["opt", "gpt2", "gpt-j", "llama", "qwen2", "gemma3", "bert", "roberta", "deberta-v2", "t5", "bart"],
     {"total_step": 1}),
    ("vera", ["opt", "llama", "qwen2", "gemma3", "bert", "roberta", "t5", "bart"], {"r": 8}),
    ("loha", ["opt", "llama", "mistral", "bert"], {}),
    ("lokr", ["opt", "llama", "mistral", "bert"], {}),
    ("ln_tuning", ["gpt2", "llama", "qwen2", "mistral", "t5", "bart"], {}),
    ("trainable_tokens", ["llama", "llama, tied", "t5", "bert"], {"token_indices": [0, 1, 3]}),
]  # fmt: skip
_IMAGE_TUNERS: list[tuple[str, dict[str, Any]]] = [
    (
        "loha",
        {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
    ),
    (
        "lokr",
        {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
    ),
]


def architecture_rows() -> Iterator[Row]:
    for model, words in _DECODERS.items():
        yield from (
            Row("Decoders", model, "lora", {**_CAUSAL, **fields}, 0.1)
            for fields in _decoder(*words)
        )
    for model in _BIASED:
        fields = {**_CAUSAL, "target_modules": [_DECODERS[model][0]], "bias": "all"}
        yield Row("Decoders", model, "lora", fields, 0.1)
    for model, configs in (("llama", _LLAMA), ("llama, tied", _TIED)):
        yield from (
            Row("Decoders", model, "lora", {**_CAUSAL, **fields}, 0.1) for fields in configs
        )
    for model, words in _ENCODERS.items():
        yield from (Row("Encoders", model, "lora", fields, 0.1) for fields in _encoder(*words))
    families = {"Encoders and decoders": _SEQUENCES, "Classifiers": _CLASSIFIERS, "Images": _IMAGES}
    for family, models in families.items():
        for model, configs in models.items():
            yield from (Row(family, model, "lora", fields, 0.1) for fields in configs)
    for model, experts in _MIXTURES.items():
        yield from (
            Row("Mixtures of experts", model, "lora", fields, 0.1) for fields in _experts(experts)
        )
    for tuner, models, fields in _TUNERS:
        yield from (
            Row("Other tuners, transformers", model, tuner, fields, 0.1) for model in models
        )
    yield from (
        Row("Other tuners, transformers", "resnet", tuner, fields, 0.1)
        for tuner, fields in _IMAGE_TUNERS
    )
