"""A language model of ours for what SmolLM2 is too dear for here: a Llama of 0.45 million numbers
that was trained from nothing, in float32, on letters and phonemes, as tokens of their own, for so
few steps that there is much to learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.pronounce import Word

from experiments import loop


def base(words: Sequence[Word], folder: Path, *, steps: int) -> str:
    """Write a model that read `steps` batches of 64 of these words, letters and phonemes alike. Its
    name."""
    tokens = sorted({token for word in words for token in (*word.spelling, *word.phonemes)})
    tokenizer, model = _tokenizer(tokens), _model(3 + len(tokens))
    _learn(model, tokenizer, words, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _learn(model: Any, tokenizer: Any, words: Sequence[Word], steps: int) -> None:
    import torch

    rows = [
        tokenizer(word.prompt + word.completion)["input_ids"] + [tokenizer.eos_token_id]
        for word in words
    ]

    def loss(chosen: list[int]) -> Any:
        width = max(len(rows[row]) for row in chosen)
        ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in chosen])
        return model(
            input_ids=ids, attention_mask=(ids != 0).long(), labels=ids.masked_fill(ids == 0, -100)
        ).loss

    model.train()
    loop.train(model.parameters(), loop.batches_of(len(rows), 64, 0), loss, steps=steps, rate=3e-3)
    model.eval()


def _tokenizer(tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {token: at for at, token in enumerate(["<pad>", "<end>", "=", *tokens])}
    backend = Tokenizer(models.WordLevel(vocab=known, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


def _model(vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)
