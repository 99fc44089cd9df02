"""A small Llama for tests of llama.cpp, and the fields of its GGUF files."""

from __future__ import annotations

import pytest
import torch

gguf = pytest.importorskip("gguf")


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
