"""Models of transformers and torchvision at a toy's size, with random weights: those on which
PEFT's tests run, which take theirs from a hub. ``ARCHITECTURES[name]()`` is (the model in eval
mode, the keyword arguments of a call)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tests.support import moe
from tests.support.real_models import REAL, grow_up
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
ARCHITECTURES: dict[str, Callable[[], Built]] = {}

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip


def _ids(rows: int = 3, length: int = 8) -> torch.Tensor:
    """Tokens, with those that rows train among them."""
    ids = torch.randint(4, 60, (rows, length))
    ids[0, :3] = torch.tensor([1, 3, 5])
    return ids


def _text() -> dict[str, Any]:
    ids = _ids()
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _two_texts() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": _ids(length=6)}


def _add(
    name: str, inputs: Callable[[], dict[str, Any]], model: str, config: str, **sizes: Any
) -> None:
    def build() -> Built:
        made, example = (
            getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval(),
            inputs(),
        )
        with torch.no_grad():
            grow_up(made, example)
        return made, example

    ARCHITECTURES[name] = build


_add("opt", _text, "OPTForCausalLM", "OPTConfig", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
     num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32)  # fmt: skip
_add("gpt2", _text, "GPT2LMHeadModel", "GPT2Config", **_GPT)
_add("gpt-j", _text, "GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4)
_add("gpt-neox", _text, "GPTNeoXForCausalLM", "GPTNeoXConfig", **_SIZES)
_add(
    "bloom",
    _text,
    "BloomForCausalLM",
    "BloomConfig",
    vocab_size=64,
    hidden_size=32,
    n_layer=2,
    n_head=4,
)
_add("falcon", _text, "FalconForCausalLM", "FalconConfig", vocab_size=64, hidden_size=32, num_hidden_layers=2,
     num_attention_heads=4, alibi=False)  # fmt: skip
_add("phi", _text, "PhiForCausalLM", "PhiConfig", **_SIZES)
_add("llama", _text, "LlamaForCausalLM", "LlamaConfig", **_GROUPED)
_add("llama, tied", _text, "LlamaForCausalLM", "LlamaConfig", **_GROUPED, tie_word_embeddings=True)
_add(
    "llama classifier",
    _text,
    "LlamaForSequenceClassification",
    "LlamaConfig",
    **_GROUPED,
    num_labels=3,
)
_add("mistral", _text, "MistralForCausalLM", "MistralConfig", **_GROUPED)
_add("qwen2", _text, "Qwen2ForCausalLM", "Qwen2Config", **_GROUPED)
_add("qwen3", _text, "Qwen3ForCausalLM", "Qwen3Config", **_GROUPED, head_dim=8)
_add("gemma", _text, "GemmaForCausalLM", "GemmaConfig", **_GROUPED, head_dim=8)
_add("gemma3", _text, "Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, head_dim=8)
_add("bert", _text, "BertModel", "BertConfig", **_SIZES)
_add(
    "bert classifier", _text, "BertForSequenceClassification", "BertConfig", **_SIZES, num_labels=3
)
_add("bert tagger", _text, "BertForTokenClassification", "BertConfig", **_SIZES, num_labels=3)
_add("roberta", _text, "RobertaModel", "RobertaConfig", **_SIZES)
_add(
    "roberta classifier",
    _text,
    "RobertaForSequenceClassification",
    "RobertaConfig",
    **_SIZES,
    num_labels=3,
)
_add(
    "deberta",
    _text,
    "DebertaModel",
    "DebertaConfig",
    **_SIZES,
    relative_attention=True,
    pos_att_type="c2p|p2c",
)
_add("deberta-v2", _text, "DebertaV2Model", "DebertaV2Config", **_SIZES, relative_attention=True,
     position_buckets=4, pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", share_att_key=True)  # fmt: skip
_add("t5", _two_texts, "T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=48,
     num_layers=2, num_heads=4, decoder_start_token_id=0)  # fmt: skip
_add("bart", _two_texts, "BartForConditionalGeneration", "BartConfig", vocab_size=64, d_model=32, encoder_layers=2,
     decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
     max_position_embeddings=32)  # fmt: skip
_add("siglip", lambda: {"input_ids": _ids(), "pixel_values": torch.randn(3, 3, 16, 16)}, "SiglipModel", "SiglipConfig",
     text_config={**_SIZES, "projection_size": 32}, vision_config={
         "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 16, "patch_size": 4})  # fmt: skip
_add("resnet", lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, "ResNetForImageClassification", "ResNetConfig",
     embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)  # fmt: skip


def _borrow(name: str, real: str) -> None:
    def build() -> Built:
        model, example, _ = REAL[real].build()
        return model, example

    ARCHITECTURES[name] = build


for _name in ("vit", "clip", "whisper"):
    _borrow(_name, _name)


def _experts(name: str) -> None:
    def build() -> Built:
        return moe.build(name, torch.float32), {"input_ids": torch.randint(4, 48, (2, 8))}

    ARCHITECTURES[name.replace("_", "-")] = build


for _name in ("mixtral", "qwen3_moe", "llama4", "gpt_oss"):
    _experts(_name)
