"""Build a tiny random Llama and a byte-level tokenizer in a few milliseconds, without downloads.

    write_tiny(folder)          a model folder that `transformers` and `veneer train` load
    write_rows(path, rows)      a JSONL file

The tokenizer is byte-level without merges: a token is one byte, so that token counts of a text are
easy to tell. The chat template is ChatML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` of 256 bytes + 3 special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(**changes: Any) -> Any:
    """The configuration of the tiny Llama: 2 layers, width 32, 4 query heads, 2 key-value heads,
    context 256."""
    from transformers import LlamaConfig

    fields: dict[str, Any] = {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """The tiny Llama with random weights; the same seed gives the same weights."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save model and tokenizer into `folder` and return it."""
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    """`count` rows of different lengths: the prompt is a small sum, the completion its result."""
    rows = []
    for i in range(start, start + count):
        a, b = (7 * i + 3) % 97, (13 * i * i + 5) % 1013
        rows.append({"prompt": f"{a} + {b} =", "completion": f" {a + b}"})
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write `rows` as JSONL and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
