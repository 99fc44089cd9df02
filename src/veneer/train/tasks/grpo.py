"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300): the model samples
answers, and the user's functions score them.

    A = (reward - mean of the group) / (standard deviation of the group + 1e-4)
    loss of an answer = mean over its tokens of  -ρ · A + β · KL(π ‖ π₀)

A group is all answers to one prompt. ρ = π / sg(π), where sg stops the gradient.

The answers are sampled from the model that trains, so no second copy of it has to be updated. By
default the engine of `veneer serve` samples them: it computes the prompt of a group once, and short
answers do not wait for long ones. Each answer is used for one step only, so ρ has the value 1, and
its gradient is that of log π. KL is estimated per token by exp(d) - d - 1 with d = log π₀ - log π.
π₀ is the reference policy, as defined in `dpo.py`. With β = 0, the default, KL is not computed.

A reward is FILE.py:NAME of a function with trl's signature: f(prompts=…, completions=…,
completion_ids=…, **columns) returns for each completion a number, or None to leave it to the other
functions. Prompts and completions are texts, or lists of messages if the prompts are chats. An
evaluation takes the greedy answer to each prompt; its loss is -reward. Measures: the mean reward
(`reward`), the mean number of tokens of an answer (`answer_length`), and in training
`reward_spread`: the standard deviation of the rewards of a prompt's answers, as a mean over the
prompts. If the spread is 0, A is 0 for all answers, so only KL has a gradient.
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
    MIN_EXAMPLE_TOKENS,
    Rows,
    RowSegment,
    TaskLoss,
    apply_max_length,
    load_function,
    pad_rows,
    reference,
    register,
)
from veneer.train.tasks._preferences import CausalTask
from veneer.train.tokens import IGNORED, must_show_tools


@register
class Grpo(CausalTask):
    required_columns = ("prompt",)
    measures = ("reward", "reward_spread", "answer_length")
    loss_unit = "answer"

    def needs_reference(self) -> bool:
        return bool(self.config.beta)

    @cached_property
    def reward_functions(self) -> list[Any]:
        return [load_function(spec) for spec in self.config.reward]

    def prepare(self) -> Prepared:
        prepared = super().prepare()
        reward_files = {spec.rpartition(":")[0] for spec in self.config.reward}
        hashes = {
            file: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
            for file in sorted(reward_files)
        }
        # with these hashes, a run does not resume if its reward functions have changed
        return replace(prepared, hashes={**prepared.hashes, **hashes})

    def read(self, source: str, split: str) -> data.Records:
        """Read the prompts, and under "columns" all other columns, because they are arguments of
        the reward functions. If a row lacks a column, its value is None. Raises `ConfigError` for a
        reward function that does not exist."""
        _ = self.reward_functions  # load them now, to report an error before the base is opened
        located_rows, digest = data.raw_rows(source, split)
        records = data.select_fields(
            located_rows,
            source,
            digest,
            self.required_columns,
            self.optional_columns,
            self.config.columns,
        )
        prompt_column = self.config.columns.get("prompt", "prompt")
        other_columns = dict.fromkeys(
            name for _, row in located_rows for name in row if name != prompt_column
        )
        rows = [
            {
                "prompt": record["prompt"],
                "columns": {name: row.get(name) for name in other_columns},
            }
            for record, (_, row) in zip(records.rows, located_rows, strict=True)
        ]
        return replace(records, rows=rows, unused=())

    def encode(self, records: data.Records) -> Rows:
        prompt_limit = self.max_length() - self.config.answer_tokens
        if prompt_limit < 1:
            raise ConfigError(
                f"answer_tokens {self.config.answer_tokens} of at most {self.max_length()} tokens"
                " in all",
                "room for a prompt",
                "lower answer_tokens, or raise max_length",
            )
        rows, shaped_rows = [], []
        for row, row_location in zip(records.rows, records.locations, strict=True):
            row_location = f"{records.source}, {row_location}"
            shaped_row = row_shape.check_texts_or_chats({"prompt": row["prompt"]}, row_location)
            prompt, tools = shaped_row["prompt"], row["columns"].get(row_shape.TOOLS)
            # a value of another form is an argument of the rewards alone
            if isinstance(tools, list) or str(tools).startswith("["):
                row_shape.add_tools(shaped_row, tools, row_location)
            shaped_rows.append(shaped_row)
            ids = encode(prompt, self.processor, row_location, shaped_row.get(row_shape.TOOLS))
            rows.append({"ids": ids, "prompt": prompt, "columns": row["columns"]})
        if not isinstance(rows[0]["prompt"], str):
            must_show_tools(replace(records, rows=shaped_rows), self.processor)
        lengths = [len(row["ids"]) for row in rows]
        retained_indices, rows, truncated_count = apply_max_length(
            records,
            rows,
            lengths,
            self.config,
            prompt_limit,
            lambda row: {**row, "ids": row["ids"][-prompt_limit:]},
        )
        lengths_with_answers = [
            (len(row["ids"]) + self.config.answer_tokens) * self.config.answers for row in rows
        ]
        head_token_counts = [self.config.answers * self.config.answer_tokens] * len(rows)
        return Rows(
            rows,
            lengths_with_answers,
            retained_indices,
            head_token_counts,
            len(records) - len(rows),
            truncated_count,
        )

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        config = self.config
        answers_text = (
            f"{config.answers} that the model draws, at most {config.answer_tokens} tokens each, "
        )
        return [
            RowSegment(False, "prompt", self.processor.decode(row["ids"])),
            RowSegment(True, "answers", f"{answers_text}judged by {', '.join(config.reward)}"),
            *(
                RowSegment(False, name, f"{value} (for the judge)")
                for name, value in row["columns"].items()
            ),
        ]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # without an attention mask, by which the trainer counts tokens: `loss` counts them instead
        return {"input_ids": pad_rows([row["ids"] for row in rows], 0), "rows": list(rows)}

    def example(self, prepared: Prepared, device: Any) -> dict[str, Any]:
        """The model's keyword arguments for the shortest prompt, followed by at most
        `MIN_EXAMPLE_TOKENS` arbitrary tokens as its answer."""
        prompt = min((row["ids"] for row in prepared.train.rows), key=len)
        ids = torch.tensor(
            [[*prompt, *range(min(MIN_EXAMPLE_TOKENS, self.config.answer_tokens))]], device=device
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def count_items(self, batch: Mapping[str, Any]) -> int:
        return len(batch["rows"]) * self.config.answers

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        answers_per_prompt = self.config.answers if model.training else 1
        rows = [row for row in batch["rows"] for _ in range(answers_per_prompt)]
        sampled_ids = continuations(
            unwrap(model),
            self.processor,
            [row["ids"] for row in rows],
            max_new_tokens=self.config.answer_tokens,
            temperature=self.config.temperature if model.training else 0.0,
            batch_size=len(rows),
            rollouts=self.config.rollouts,
        )
        device = batch["input_ids"].device
        rewards = self.rewards(rows, sampled_ids).to(device)
        measure_sums = {
            "reward": rewards.sum(),
            "answer_length": torch.tensor(float(sum(map(len, sampled_ids)))),
        }
        if not model.training:
            return TaskLoss(-rewards.sum(), len(rows), measure_sums)
        # the standard deviation of the rewards of each prompt's answers, counted once for each
        # answer, because the sum of a measure is divided by the number of answers
        reward_spreads = rewards.view(-1, answers_per_prompt).std(1)
        measure_sums["reward_spread"] = reward_spreads.sum() * answers_per_prompt
        prompt_ids = [row["ids"] for row in rows]
        labelled_answers = [
            ([*ids, *answer_ids], [*[IGNORED] * len(ids), *answer_ids])
            for ids, answer_ids in zip(prompt_ids, sampled_ids, strict=True)
        ]
        inputs = {
            name: value.to(device) for name, value in self.collate_pairs(labelled_answers).items()
        }
        measure_sums["tokens"] = inputs["attention_mask"].sum()
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
            measure_sums,
        )

    def rewards(self, rows: Sequence[dict[str, Any]], answers: Sequence[list[int]]) -> Tensor:
        """The reward of each of n answers, float32 [n]: the sum of the values of all reward
        functions. Raises `DataError` if a function does not return a finite number for each answer.

        Args:
            rows: by answer, the row of its prompt.
            answers: by answer, its token ids.
        """
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        reward_arguments: dict[str, Any] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(ids) for ids in answers],
        }
        reward_arguments |= {
            name: [row["columns"][name] for row in rows]
            for name in rows[0]["columns"]
            if name not in reward_arguments
        }
        total_rewards = torch.zeros(len(rows), dtype=torch.float64)
        for spec, function in zip(self.config.reward, self.reward_functions, strict=True):
            total_rewards += _reward_tensor(
                spec, _call_with_accepted_arguments(function, reward_arguments), len(rows)
            )
        return total_rewards.float()


def advantages(rewards: Tensor, group_size: int) -> Tensor:
    """The advantage of each of n answers, [n]: its reward minus the mean of its group (the answers
    to the same prompt), divided by the standard deviation of the group.

    Args:
        rewards: [n]; the answers of a group are consecutive.
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
    """The loss of each of n answers, [n].

    Args:
        log_p, reference_log_p: log-probabilities of each of t tokens under the model that trains
            and under the reference policy, [n, t]. None for ``reference_log_p`` omits the KL term.
        answer_advantages: the advantage of each answer, [n].
        answer_mask: True at the tokens of the answers, [n, t].
        beta: the factor of the KL term.
    """
    token_losses = -torch.exp(log_p - log_p.detach()) * answer_advantages[:, None]
    if reference_log_p is not None:
        log_ratio = reference_log_p - log_p
        token_losses = token_losses + beta * (torch.exp(log_ratio) - log_ratio - 1)
    return (token_losses * answer_mask).sum(1) / answer_mask.sum(1).clamp(min=1)


def _call_with_accepted_arguments(function: Any, arguments: dict[str, Any]) -> Any:
    """Call a function with those of the keyword arguments that its signature accepts."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return function(**arguments)
    return function(**{name: value for name, value in arguments.items() if name in parameters})


def _reward_tensor(spec: str, values: Any, answer_count: int) -> Tensor:
    """The values that a reward function returned, as a float64 tensor [answer_count]. None, by
    which the function leaves an answer to the other functions, counts 0, as in trl. Raises
    `DataError` if they are not one finite number or None for each answer. ``spec``: FILE.py:NAME of
    the function, for the error."""
    try:
        rewards = torch.as_tensor(
            [0.0 if value is None else float(value) for value in values], dtype=torch.float64
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{spec} gave what is no list of numbers ({error})",
            f"{answer_count} numbers",
            "mend it",
        ) from error
    if len(rewards) != answer_count or not bool(rewards.isfinite().all()):
        raise DataError(
            f"{spec} gave {rewards.tolist()[:8]} for {answer_count} answers",
            f"{answer_count} finite numbers",
            "mend it",
        )
    return rewards
