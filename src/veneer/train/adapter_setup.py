"""The adapter of a run: a new one as the configuration says, a given one that is trained further,
or the one of a checkpoint.

Some variants compute their initial values from calibration data: the first rows of the training
data. EVA and CorDA use the inputs of each layer, LoRA-GA the gradient of each weight. Each row is a
batch of its own, so that the inputs contain no padding. The loss is the model's own, a mean over
the labels of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from veneer.attach import Names, fresh_head
from veneer.config import LoraConfig, pattern_list
from veneer.errors import ConfigError
from veneer.handle import attach, load
from veneer.train import checkpoint, vocabulary
from veneer.train.config import TrainConfig
from veneer.train.further import OWN, load_to_train
from veneer.train.prepare import Prepared
from veneer.train.run_record import ResumePoint
from veneer.train.tasks import Task
from veneer.train.tokens import IGNORED, Examples
from veneer.variants import VARIANTS

#: number of rows of calibration data
ROWS = 64


def attach_adapter(
    task: Task,
    model: Any,
    prepared: Prepared,
    trained_token_ids: tuple[int, ...],
    resume_point: ResumePoint = None,
) -> Any:
    """Attach the adapter of the resume point, the one that the run trains further, or a new one.
    ``trained_token_ids``: tokens to train. Returns its handle."""
    config, tokens = (
        task.config,
        vocabulary.grow(model, task.processor, trained_token_ids, task.config.seed),
    )
    if resume_point is not None:
        return load(model, resume_point[0] / checkpoint.ADAPTER, name=OWN, trainable=True)
    if task.initial_adapter is not None:
        return load_to_train(model, task.initial_adapter)
    torch.manual_seed(config.seed)
    return attach(
        model,
        lora_config(
            config,
            model,
            tokens,
            vocabulary.invocation_ids(config, task.processor, prepared.train),
        ),
        name=OWN,
        **start_data(task, prepared.train, model),
    )


def lora_config(
    config: TrainConfig,
    model: Any,
    tokens: Mapping[str, tuple[int, ...]],
    invocation: tuple[int, ...] = (),
) -> LoraConfig:
    """The configuration of a run's new adapter. ``tokens``: ids to train, by the path of the
    embedding; ``invocation``: ids that invoke the adapter."""
    dtype = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}[config.adapter_dtype]
    return LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.targets,
        exclude=config.exclude,
        layers=config.layers,
        train_also=[*config.train_also, *_new_heads(model, config)],
        bias=config.bias,
        variant=config.variant,
        dtype=dtype,
        trainable_tokens=tokens,
        invocation_tokens=invocation,
    )


def invoked_example(handle: Any, example: dict[str, Any]) -> dict[str, Any]:
    """An example (``Task.example``) of one row, with the adapter's invocation tokens behind it, if
    it has any: without them the adapter would not act."""
    tokens = handle.config.invocation_tokens
    if not tokens:
        return example
    ids = example["input_ids"]
    ids = torch.cat((ids, ids.new_tensor([tokens]).expand(len(ids), -1)), 1)
    return {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _new_heads(model: Any, config: TrainConfig) -> list[str]:
    """Paths of the modules of a task's head that the base's files lack. They train in full; the
    target "all-linear" includes them already."""
    if "all-linear" in pattern_list(config.targets):
        return []
    names = Names(model)
    return sorted(
        {path for path, _ in fresh_head(names, names.fresh_parameters().values())}
        - {*config.train_also}
    )


def start_data(task: Task, rows: Any, model: Any) -> dict[str, Any]:
    """The arguments of ``attach`` that the task's variant needs: ``batches``, or nothing. The
    caller provides arguments that do not come from the data, such as LoftQ's original weights.
    Raises ``ConfigError`` for a variant that needs gradients and a task whose loss is not the
    model's own."""
    variant = task.config.variant
    needs = VARIANTS[variant].needs & {"inputs", "gradient"}
    if not needs:
        return {}
    if isinstance(rows, Examples):
        return {"batches": list(_batches(rows, model.device, "gradient" in needs))}
    if "gradient" in needs:
        problem = f"variant {variant!r} for task {task.name!r}, whose loss is not the model's own"
        raise ConfigError(
            problem, "task sft", "choose a variant that starts from inputs, such as eva"
        )
    first = (task.inputs(task.collate([row])) for row in rows.rows[:ROWS])
    return {
        "batches": [
            {name: _on(value, model.device) for name, value in batch.items()} for batch in first
        ]
    }


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _batches(examples: Examples, device: torch.device, learns: bool) -> Iterator[dict[str, Any]]:
    """The first ``ROWS`` rows that have a label, as arguments of the model, in the order of the
    data."""
    learnt = (
        row
        for row, labels in enumerate(examples.labels)
        if any(label != IGNORED for label in labels[1:])
    )
    for row in islice(learnt, ROWS):
        ids = torch.tensor([examples.input_ids[row]], device=device)
        labels = {"labels": torch.tensor([examples.labels[row]], device=device)} if learns else {}
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
            **labels,
        }
