"""How well a model predicts examples: loss, perplexity, share of tokens right, share of completions exactly right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from veneer.train.data import Records
from veneer.train.generate import generate
from veneer.train.loss import token_loss
from veneer.train.tokens import IGNORED, Examples


@dataclass(frozen=True)
class Evaluation:
    """`loss`: mean negative log-likelihood in nats over `tokens` labelled tokens; `accuracy`: share of them that are
    the most likely one."""

    loss: float
    accuracy: float
    tokens: int
    examples: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate(model: Any, examples: Examples, *, batch_size: int = 8) -> Evaluation:
    order = sorted(range(len(examples)), key=examples.lengths.__getitem__, reverse=True)
    total, items, correct, training = 0.0, 0, 0, model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result = token_loss(model, collate(examples, rows, model.device), accuracy=True)
            total += float(result.total)
            items += int(result.items)
            correct += int(result.correct)
    finally:
        model.train(training)
    return Evaluation(total / max(items, 1), correct / max(items, 1), items, len(examples))


def collate(examples: Examples, rows: list[int], device: Any = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [b, s] of the examples at `rows`, padded on the right."""
    width = max(examples.lengths[i] for i in rows)
    ids, labels = [examples.input_ids[i] for i in rows], [examples.labels[i] for i in rows]
    parts = {"input_ids": (ids, 0), "attention_mask": ([[1] * len(row) for row in ids], 0), "labels": (labels, IGNORED)}
    return {
        name: torch.tensor([row + [fill] * (width - len(row)) for row in lists], device=device)
        for name, (lists, fill) in parts.items()
    }


def exact(model: Any, tokenizer: Any, rows: Records, *, max_new_tokens: int = 64, batch_size: int = 16) -> float:
    """Share of prompt/completion rows whose greedy continuation is the completion, surrounding spaces aside."""
    prompts = [row["prompt"] for row in rows.rows]
    answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = [row["completion"] for row in rows.rows]
    wanted = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return sum(answer.strip() == want.strip() for answer, want in zip(answers, wanted, strict=True)) / max(len(rows), 1)
