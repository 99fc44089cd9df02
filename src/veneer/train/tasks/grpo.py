"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300): the model samples
answers, and the user's functions score them.

    A = (reward - mean of the group) / (standard deviation of the group + 1e-4)
    loss of an answer = mean over its tokens of  -ρ · A + β · KL(π ‖ π₀)

A group is the answers to one prompt; ρ = π / π without gradient.

The answers are sampled from the weights in training, so there is no second copy to update, by the
calls of the server's engine: the prompt of a group is computed once, and a short answer waits for
no long one. Each answer is used for one step, so ρ is 1 and has π's gradient. KL is estimated by
exp(d) - d - 1 with d = log π₀ - log π, and π₀ is the base with no adapter selected; with β = 0, the
default, it is not computed.

A reward is FILE.py:NAME of a function in trl's form: f(prompts=…, completions=…, **columns) → a
number for each completion. Prompts and completions are texts, or lists of messages if the prompts
are chats. An evaluation takes the greedy answer to each prompt; its loss is -reward. A training
step reports the mean reward and `reward_spread`, the mean over the prompts of the standard
deviation of their answers' rewards: if it is 0, A is 0 and nothing is learnt.
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

from veneer.attach import unwrap
from veneer.errors import ConfigError, DataError
from veneer.train import data, row_shape
from veneer.train.generate import continuations, encode
from veneer.train.loss import log_probabilities
from veneer.train.prepare import Prepared
from veneer.train.tasks._base import (
    MIN_TOKENS,
    Rows,
    RowSegment,
    TaskLoss,
    apply_max_length,
    load_function,
    pad_rows,
    reference,
    register,
)
from veneer.train.tasks._preferences import Causal
from veneer.train.tokens import IGNORED


@register
class Grpo(Causal):
    required_columns = ("prompt",)
    measures = ("reward", "reward_spread", "answer_length")
    item = "answer"

    def needs_reference(self) -> bool:
        return bool(self.config.beta)

    @cached_property
    def functions(self) -> list[Any]:
        return [load_function(spec) for spec in self.config.reward]

    def prepare(self) -> Prepared:
        prepared = super().prepare()
        files = {spec.rpartition(":")[0] for spec in self.config.reward}
        hashes = {
            file: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
            for file in sorted(files)
        }
        # a run whose reward functions have changed must not resume
        return replace(prepared, hashes={**prepared.hashes, **hashes})

    def read(self, source: str, split: str) -> data.Records:
        """Read all columns: the reward functions get those besides the prompt."""
        _ = self.functions  # report an invalid file before the base is read
        raw, digest = data.raw_rows(source, split)
        records = data.select_fields(
            raw, source, digest, self.required_columns, self.optional_columns, self.config.columns
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
        for row, location in zip(records.rows, records.locations, strict=True):
            prompt = row_shape.check_texts_or_chats(
                {"prompt": row["prompt"]}, f"{records.source}, {location}"
            )["prompt"]
            rows.append(
                {"ids": encode(prompt, self.processor), "prompt": prompt, "columns": row["columns"]}
            )
        lengths = [len(row["ids"]) for row in rows]
        kept_indices, rows, truncated_count = apply_max_length(
            records,
            rows,
            lengths,
            self.config,
            limit,
            lambda row: {**row, "ids": row["ids"][-limit:]},
        )
        lengths_with_answers = [
            (len(row["ids"]) + self.config.answer_tokens) * self.config.answers for row in rows
        ]
        learnt = [self.config.answers * self.config.answer_tokens] * len(rows)
        return Rows(
            rows,
            lengths_with_answers,
            kept_indices,
            learnt,
            len(records) - len(rows),
            truncated_count,
        )

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        config = self.config
        answers = (
            f"{config.answers} that the model draws, at most {config.answer_tokens} tokens each, "
        )
        return [
            RowSegment(False, "prompt", self.processor.decode(row["ids"])),
            RowSegment(True, "answers", f"{answers}judged by {', '.join(config.reward)}"),
            *(
                RowSegment(False, name, f"{value} (for the judge)")
                for name, value in row["columns"].items()
            ),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [row["ids"] for row in rows]
        mask = pad_rows([[1] * len(row) for row in ids], 0)
        return {"input_ids": pad_rows(ids, 0), "attention_mask": mask, "rows": list(rows)}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """A prompt with an answer, as in a step; the answer's tokens are arbitrary."""
        prompt = min((row["ids"] for row in prepared.train.rows), key=len)
        ids = torch.tensor(
            [[*prompt, *range(min(MIN_TOKENS, self.config.answer_tokens))]], device=device
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["rows"]) * self.config.answers

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        answers_per_prompt = self.config.answers if model.training else 1
        rows = [row for row in batch["rows"] for _ in range(answers_per_prompt)]
        answers = continuations(
            unwrap(model),
            self.processor,
            [row["ids"] for row in rows],
            max_new_tokens=self.config.answer_tokens,
            temperature=self.config.temperature if model.training else 0.0,
            batch_size=len(rows),
            rollouts=self.config.rollouts,
        )
        device = batch["input_ids"].device
        rewards = self.rewards(rows, answers).to(device)
        sums = {
            "reward": rewards.sum(),
            "answer_length": torch.tensor(float(sum(map(len, answers)))),
        }
        if not model.training:
            return TaskLoss(-rewards.sum(), len(rows), sums)
        # standard deviation by prompt
        reward_spreads = rewards.view(-1, answers_per_prompt).std(1)
        sums["reward_spread"] = reward_spreads.sum() * answers_per_prompt
        prompts = [row["ids"] for row in rows]
        pairs = [
            ([*ids, *answer_ids], [*[IGNORED] * len(ids), *answer_ids])
            for ids, answer_ids in zip(prompts, answers, strict=True)
        ]
        inputs = {name: value.to(device) for name, value in self.batch(pairs).items()}
        log_p = log_probabilities(model, inputs, self.config.temperature)
        reference_log_p = None
        if self.config.beta:
            with reference(model):
                reference_log_p = log_probabilities(model, inputs, self.config.temperature)
        answer_mask = (inputs["labels"][:, 1:] != IGNORED).to(log_p.device)
        answer_advantages = advantages(rewards.to(log_p.device, log_p.dtype), answers_per_prompt)
        return TaskLoss(
            losses(
                log_p, answer_advantages, answer_mask, reference_log_p, self.config.beta or 0.0
            ).sum(),
            len(rows),
            sums,
        )

    def rewards(self, rows: Sequence[dict[str, Any]], answers: Sequence[list[int]]) -> Tensor:
        """The sum of the reward functions for each answer, [n]. Raises `DataError` if a function
        returns no finite number for an answer."""
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        arguments = {"prompts": prompts, "completions": completions}
        arguments |= {
            name: [row["columns"].get(name) for row in rows]
            for name in rows[0]["columns"]
            if name not in arguments
        }
        total = torch.zeros(len(rows), dtype=torch.float64)
        for spec, function in zip(self.config.reward, self.functions, strict=True):
            total += _reward_tensor(spec, _call_with_accepted(function, arguments), len(rows))
        return total.float()


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """The advantage of each answer over its group, [n].

    Args:
        rewards: [n], group after group.
        group_size: number of answers to a prompt.
    """
    groups = rewards.view(-1, group_size)
    return (
        (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ).flatten()


def losses(
    log_p: Tensor,
    answer_advantages: Tensor,
    answer_mask: Tensor,
    reference_log_p: Tensor | None,
    beta: float,
) -> Tensor:
    """The loss of each answer, [n].

    Args:
        log_p, reference_log_p: log π and log π₀ of each token, [n, t]; no KL term without the
            second.
        answer_advantages: [n].
        answer_mask: True at the tokens of the answers, [n, t].
    """
    token_losses = -torch.exp(log_p - log_p.detach()) * answer_advantages[:, None]
    if reference_log_p is not None:
        log_ratio = reference_log_p - log_p
        token_losses = token_losses + beta * (torch.exp(log_ratio) - log_ratio - 1)
    return (token_losses * answer_mask).sum(1) / answer_mask.sum(1).clamp(min=1)


def _call_with_accepted(function: Any, arguments: dict[str, Any]) -> Any:
    """Call a function with those arguments that its signature accepts."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function(**arguments)
    return function(**{name: value for name, value in arguments.items() if name in parameters})


def _reward_tensor(spec: str, values: Any, count: int) -> Tensor:
    try:
        rewards = torch.as_tensor([float(value) for value in values], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{spec} gave what is no list of numbers ({error})", f"{count} numbers", "mend it"
        ) from error
    if len(rewards) != count or not bool(rewards.isfinite().all()):
        raise DataError(
            f"{spec} gave {rewards.tolist()[:8]} for {count} answers",
            f"{count} finite numbers",
            "mend it",
        )
    return rewards
