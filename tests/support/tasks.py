"""Tiny bases and rows for each task of `veneer train`. A few training steps learn something from
the rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tests.support.tiny import tiny_tokenizer, write_rows, write_tiny

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
RATE = 16000  # audio samples per second; the tiny Whisper hears one second

REWARDS = '''
def letters(prompts, completions, wanted):
    """The share of an answer that is letters, a little more for the wanted one."""
    pairs = zip(completions, wanted)
    return [
        (sum(map(str.isalpha, text)) + text.count(letter)) / max(len(text), 1)
        for text, letter in pairs
    ]


def brief(completions, **_):
    return [-0.001 * len(text) for text in completions]
'''


def _save(model: Any, folder: Path, *processors: Any) -> Path:
    for component in (model, *processors):
        component.save_pretrained(folder)
    return folder


def write_llama(folder: Path) -> Path:
    """Write a tiny Llama with weights large enough for its predictions to differ."""
    return write_tiny(folder, initializer_range=0.2)


def write_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, vocab_size=259, max_position_embeddings=64, pad_token_id=0
    )
    return _save(transformers.BertModel(config), folder, tiny_tokenizer())


def write_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)
    processor = transformers.ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return _save(transformers.ViTModel(config), folder, processor)


def write_bart(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=259, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        dropout=0.0, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return _save(transformers.BartForConditionalGeneration(config), folder, tiny_tokenizer())


def write_whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=259, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=50, pad_token_id=0, max_target_positions=32,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    feature_extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, chunk_length=1
    )
    return _save(
        transformers.WhisperForConditionalGeneration(config),
        folder,
        tiny_tokenizer(),
        feature_extractor,
    )


BASES = {
    "bert": write_bert,
    "vit": write_vit,
    "bart": write_bart,
    "whisper": write_whisper,
    "llama": write_llama,
}


def rows_of(kind: str, count: int = 32) -> list[dict[str, Any]]:
    """Rows of one kind. What they teach is simple: which of two letters a text consists of."""
    draw = random.Random(0)
    letters = [draw.choice("ab") for _ in range(count)]
    texts = [" ".join(letter * draw.randint(1, 3) for _ in range(3)) for letter in letters]
    swapped = {"a": "b", "b": "a"}
    generator = np.random.default_rng(0)
    match kind:
        case "text":
            return [
                {"text": text, "label": f"is {letter}"}
                for text, letter in zip(texts, letters, strict=True)
            ]
        case "words":
            mixed = [
                [draw.choice("ab") * draw.randint(1, 2) for _ in range(4)] for _ in range(count)
            ]
            return [
                {"words": words, "labels": [word[0].upper() for word in words]} for words in mixed
            ]
        case "image":
            labels = generator.integers(0, 2, count)
            pixels = generator.integers(0, 60, (count, 8, 8)) + 150 * labels[:, None, None]
            return [
                {"image": sample.tolist(), "label": int(label)}
                for sample, label in zip(pixels, labels, strict=True)
            ]
        case "pairs":
            return [
                {"prompt": f"{x}?", "chosen": f" {x * 3}", "rejected": f" {swapped[x] * 4}"}
                for x in letters
            ]
        case "judged":
            choices = [draw.choice([x, swapped[x]]) for x in letters]
            rows = zip(letters, choices, strict=True)
            return [
                {"prompt": f"{x}?", "completion": f" {y * 3}", "label": x == y} for x, y in rows
            ]
        case "prompts":
            return [{"prompt": f"{x}?", "wanted": x} for x in letters]
        case "close":
            return [
                {"anchor": f"{i} {x}", "positive": f"{x} {i}", "negative": f"{i}"}
                for i, x in enumerate(letters)
            ]
        case "scored":
            return [{"anchor": x, "positive": draw.choice("ab") * 2, "label": 0.5} for x in letters]
        case "reversed":
            return [
                {"prompt": text, "completion": letter * 3}
                for text, letter in zip(texts, letters, strict=True)
            ]
        case "sounds":
            tones = {"a": 300.0, "b": 1500.0}
            time = np.arange(RATE // 8) / RATE
            waves = [
                np.sin(2 * np.pi * tones[x] * time) + 0.1 * generator.normal(size=len(time))
                for x in letters
            ]
            return [
                {"audio": sample.round(4).tolist(), "text": x * 2}
                for sample, x in zip(waves, letters, strict=True)
            ]
    raise ValueError(kind)


#: name of a case → (base, kind of rows, settings of the run)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classify": ("bert", "text", {"task": "classify"}),
    "classify words": ("bert", "words", {"task": "classify"}),
    "classify images": ("vit", "image", {"task": "classify"}),
    "classify with a decoder": ("llama", "text", {"task": "classify"}),
    "dpo": ("llama", "pairs", {"task": "dpo"}),
    "orpo": ("llama", "pairs", {"task": "orpo"}),
    "kto": ("llama", "judged", {"task": "kto"}),
    "reward": ("llama", "pairs", {"task": "reward"}),
    "grpo": ("llama", "prompts", {"task": "grpo", "answers": 4, "answer_tokens": 6}),
    "embed": ("bert", "close", {"task": "embed"}),
    "embed by cosine": ("bert", "scored", {"task": "embed"}),
    "seq2seq": ("bart", "reversed", {"task": "seq2seq"}),
    "speech": ("whisper", "sounds", {"task": "seq2seq"}),
}


def config_of(name: str, folder: Path, output: str = "run", **changes: Any) -> Any:
    """The configuration of a case, whose base, rows and reward functions are written to
    `folder`."""
    from veneer.train.config import make_config

    base, rows, settings = CASES[name]
    target, file = folder / base, folder / f"{rows}.jsonl"
    if not target.exists():
        BASES[base](target)
    if not file.exists():
        write_rows(file, rows_of(rows))
    if settings["task"] == "grpo":
        (folder / "rewards.py").write_text(REWARDS)
        settings = {**settings, "reward": [f"{folder}/rewards.py:letters"]}
    fields: dict[str, Any] = {
        "base": str(target), "data": str(file), "output": str(folder / output), "rank": 4,
        "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "eval_fraction": 0.25,
        "epochs": 4, "eval_every": 6, "save_every": 5, "dropout": 0.1, "schedule": "constant",
    }  # fmt: skip
    return make_config({**fields, **settings, **changes})


__all__ = ["BASES", "CASES", "config_of", "rows_of"]
