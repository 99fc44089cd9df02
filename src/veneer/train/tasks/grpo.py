"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300): answers that the model
draws itself, judged by functions of the user's.

    A = (reward - mean of the group) / (standard deviation of the group + 1e-4)       a group: the answers to a prompt
    loss of an answer = mean over its tokens of  -ρ · A + β · KL(π ‖ π₀)              ρ = π / π without gradient

Answers are drawn by the model's own `generate` from the weights that train, as they lie: there is
no copy to keep up to date. Each answer is learnt from once, so ρ is 1 and has π's gradient. KL is
the estimator exp(d) - d - 1 with d = log π₀ - log π, and π₀ the base with no adapter selected; with
β = 0, the default, it is not computed.

A reward is FILE.py:NAME of a function as trl calls it: f(prompts=…, completions=…, **columns) → a
number for each; the prompts and completions are texts, or lists of messages where the prompts are
chats. An evaluation takes the likeliest answer to each prompt; its loss is -reward. A step tells
the mean reward and `reward_spread`, the mean over the prompts of the standard deviation of their
answers' rewards: where that is 0, A is 0 and nothing is learnt.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.attach.lookup import unwrap
from veneer.errors import ConfigError, DataError
from veneer.train import data, row_shape
from veneer.train.generate import continuations, encode
from veneer.train.loss import log_probabilities
from veneer.train.prepare import Prepared
from veneer.train.tasks._base import (
    SEEN,
    Rows,
    Shown,
    TaskLoss,
    function_of,
    limited,
    padded,
    reference,
    register,
)
from veneer.train.tasks._preferences import Causal
from veneer.train.tokens import IGNORED


@register
class Grpo(Causal):
    parts, measures, item = ("prompt",), ("reward", "reward_spread", "answer_length"), "answer"

    def refers(self) -> bool:
        return bool(self.config.beta)

    @cached_property
    def functions(self) -> list[Any]:
        return [function_of(spec) for spec in self.config.reward]

    def prepare(self) -> Prepared:
        prepared = super().prepare()
        files = {spec.rpartition(":")[0] for spec in self.config.reward}
        hashes = {
            file: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
            for file in sorted(files)
        }
        # a reward that changed is another run
        return replace(prepared, hashes={**prepared.hashes, **hashes})

    def read(self, source: str, split: str) -> data.Records:
        """All columns: those besides the prompt are the reward functions'."""
        _ = self.functions  # a file that is wrong is told before the base is looked at
        raw, digest = data.raw_rows(source, split)
        records = data.select_fields(
            raw, source, digest, self.parts, self.optional, self.config.columns
        )
        column = self.config.columns.get("prompt", "prompt")
        rows = [
            {
                "prompt": record["prompt"],
                "columns": {name: value for name, value in row.items() if name != column},
            }
            for record, (_, row) in zip(records.rows, raw, strict=True)
        ]
        return replace(records, rows=rows, unused=())

    def encode(self, records: data.Records) -> Rows:
        limit = self.max_length() - self.config.answer_tokens
        if limit < 1:
            problem = (
                f"answer_tokens {self.config.answer_tokens} of at most {self.max_length()} tokens"
                " in all"
            )
            raise ConfigError(
                problem, "room for a prompt", "lower answer_tokens, or raise max_length"
            )
        rows = []
        for row, place in zip(records.rows, records.places, strict=True):
            prompt = row_shape.check_texts_or_chats(
                {"prompt": row["prompt"]}, f"{records.source}, {place}"
            )["prompt"]
            rows.append(
                {"ids": encode(prompt, self.processor), "prompt": prompt, "columns": row["columns"]}
            )
        lengths = [len(row["ids"]) for row in rows]
        kept, rows, cut = limited(
            records,
            rows,
            lengths,
            self.config,
            limit,
            lambda row: {**row, "ids": row["ids"][-limit:]},
        )
        whole = [
            (len(row["ids"]) + self.config.answer_tokens) * self.config.answers for row in rows
        ]
        learnt = [self.config.answers * self.config.answer_tokens] * len(rows)
        return Rows(rows, whole, kept, learnt, len(records) - len(rows), cut)

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        config = self.config
        drawn = (
            f"{config.answers} that the model draws, at most {config.answer_tokens} tokens each, "
        )
        return [
            Shown(False, "prompt", self.processor.decode(row["ids"])),
            Shown(True, "answers", f"{drawn}judged by {', '.join(config.reward)}"),
            *(
                Shown(False, name, f"{value} (for the judge)")
                for name, value in row["columns"].items()
            ),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["ids"] for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, 0), "attention_mask": mask, "rows": list(rows)}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """With an answer, as a step has one; of which tokens does not matter."""
        prompt = min((row["ids"] for row in prepared.train.rows), key=len)
        ids = torch.tensor([[*prompt, *range(min(SEEN, self.config.answer_tokens))]], device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["rows"]) * self.config.answers

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        each = self.config.answers if model.training else 1
        rows = [row for row in batch["rows"] for _ in range(each)]
        answers = continuations(
            unwrap(model), self.processor, [row["ids"] for row in rows], max_new_tokens=self.config.answer_tokens,
            temperature=self.config.temperature if model.training else 0.0, batch_size=len(rows),
        )  # fmt: skip
        device = batch["input_ids"].device
        rewards = self.rewards(rows, answers).to(device)
        sums = {
            "reward": rewards.sum(),
            "answer_length": torch.tensor(float(sum(map(len, answers)))),
        }
        if not model.training:
            return TaskLoss(-rewards.sum(), len(rows), sums)
        # of the answers to one prompt: without it there is nothing to learn
        spread = rewards.view(-1, each).std(1)
        sums["reward_spread"] = spread.sum() * each
        prompts = [row["ids"] for row in rows]
        pairs = [
            ([*ids, *new], [*[IGNORED] * len(ids), *new])
            for ids, new in zip(prompts, answers, strict=True)
        ]
        inputs = {name: value.to(device) for name, value in self.batch(pairs).items()}
        now = log_probabilities(model, inputs, self.config.temperature)
        before = None
        if self.config.beta:
            with reference(model):
                before = log_probabilities(model, inputs, self.config.temperature)
        there = (inputs["labels"][:, 1:] != IGNORED).to(now.device)
        own = advantages(rewards.to(now.device, now.dtype), each)
        return TaskLoss(
            losses(now, own, there, before, self.config.beta or 0.0).sum(), len(rows), sums
        )

    def rewards(self, rows: Sequence[dict[str, Any]], answers: Sequence[list[int]]) -> Tensor:
        """The sum of the reward functions for each answer, [n]. Raises `DataError` for what is no
        number."""
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        given = {"prompts": prompts, "completions": completions}
        given |= {
            name: [row["columns"].get(name) for row in rows]
            for name in rows[0]["columns"]
            if name not in given
        }
        total = torch.zeros(len(rows), dtype=torch.float64)
        for spec, function in zip(self.config.reward, self.functions, strict=True):
            total += _numbers(spec, _called(function, given), len(rows))
        return total.float()


def advantages(rewards: Tensor, each: int) -> Tensor:
    """How much better an answer is than the others to its prompt, [n], of rewards [n] with `each`
    answers a group."""
    groups = rewards.view(-1, each)
    return (
        (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ).flatten()


def losses(
    now: Tensor, advantage: Tensor, there: Tensor, before: Tensor | None, beta: float
) -> Tensor:
    """[n] of log-probabilities [n, t] now and of the base, advantages [n], and where there is a
    token [n, t]."""
    each = -torch.exp(now - now.detach()) * advantage[:, None]
    if before is not None:
        apart = before - now
        each = each + beta * (torch.exp(apart) - apart - 1)
    return (each * there).sum(1) / there.sum(1).clamp(min=1)


def _called(function: Any, given: dict[str, Any]) -> Any:
    """The function with those of the arguments that it takes."""
    wanted = inspect.signature(function).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in wanted.values()):
        return function(**given)
    return function(**{name: value for name, value in given.items() if name in wanted})


def _numbers(spec: str, values: Any, count: int) -> Tensor:
    try:
        found = torch.as_tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{spec} gave what is no list of numbers ({error})", f"{count} numbers", "mend it"
        ) from error
    if len(found) != count or not bool(found.isfinite().all()):
        raise DataError(
            f"{spec} gave {found.tolist()[:8]} for {count} answers",
            f"{count} finite numbers",
            "mend it",
        )
    return found
