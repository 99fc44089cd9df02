"""The adapter of a run: a new adapter as the configuration says, the adapter that the run trains
further, or the adapter of a checkpoint.

Some variants compute their initial values from calibration data, which are the first rows of the
training data. EVA and CorDA use the inputs of each layer, LoRA-GA the gradient of each weight. Each
row is a separate batch, so that the inputs contain no padding. The gradients are of the model's own
loss, a mean over the labels of the row.
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
from veneer.train.further import TRAINED_ADAPTER, load_to_train
from veneer.train.prepare import Prepared, Rows
from veneer.train.run_record import ResumePoint
from veneer.train.tasks import Task
from veneer.train.tasks._base import move_batch
from veneer.variants import VARIANTS

#: number of rows of calibration data
CALIBRATION_ROWS = 64


def attach_adapter(
    task: Task,
    model: Any,
    prepared: Prepared,
    trained_token_ids: tuple[int, ...],
    resume_point: ResumePoint = None,
) -> Any:
    """Attach the adapter of the resume point, the adapter that the run trains further, or a new
    adapter. ``trained_token_ids``: ids of the tokens to train. Returns the adapter's handle."""
    config = task.config
    ids_by_path = vocabulary.add_embedding_rows(
        model, task.processor, trained_token_ids, config.seed
    )
    if resume_point is not None:
        return load(
            model, resume_point[0] / checkpoint.ADAPTER, name=TRAINED_ADAPTER, trainable=True
        )
    if task.initial_adapter is not None:
        return load_to_train(model, task.initial_adapter)
    torch.manual_seed(config.seed)
    return attach(
        model,
        lora_config(
            config,
            model,
            ids_by_path,
            vocabulary.invocation_ids(config, task.processor, prepared.train),
        ),
        name=TRAINED_ADAPTER,
        **calibration_arguments(task, prepared.train, model),
    )


def lora_config(
    config: TrainConfig,
    model: Any,
    ids_by_path: Mapping[str, tuple[int, ...]],
    invocation_ids: tuple[int, ...] = (),
) -> LoraConfig:
    """The configuration of a run's new adapter. ``ids_by_path``: ids of the tokens to train, by the
    path of the embedding or head; ``invocation_ids``: ids of the tokens that invoke the adapter."""
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
        trainable_tokens=ids_by_path,
        invocation_tokens=invocation_ids,
    )


def invoked_example(handle: Any, example: dict[str, Any]) -> dict[str, Any]:
    """An example (``Task.example``) of one row, followed by the adapter's invocation tokens if it
    has any. Without these tokens the adapter would not act."""
    invocation_tokens = handle.config.invocation_tokens
    if not invocation_tokens:
        return example
    ids = example["input_ids"]
    ids = torch.cat((ids, ids.new_tensor([invocation_tokens]).expand(len(ids), -1)), 1)
    return {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _new_heads(model: Any, config: TrainConfig) -> list[str]:
    """The paths of the modules of a task's head that the base's files lack, which are trained in
    full. [] for the target "all-linear", which includes them already."""
    if "all-linear" in pattern_list(config.targets):
        return []
    names = Names(model)
    return sorted(
        {path for path, _ in fresh_head(names, names.fresh_parameters().values())}
        - {*config.train_also}
    )


def calibration_arguments(task: Task, rows: Rows, model: Any) -> dict[str, Any]:
    """The arguments of ``attach`` that the run's variant needs from the data: ``{"batches": …}``,
    or {} if it needs none. Other arguments, such as LoftQ's original weights, are left to the
    caller. Raises ``ConfigError`` if the variant needs gradients and the task is not sft, because
    the loss of the other tasks is not the model's own."""
    variant = task.config.variant
    needs = VARIANTS[variant].needs & {"inputs", "gradient"}
    if not needs:
        return {}
    if task.name == "sft":
        return {"batches": list(_calibration_batches(rows, model.device, "gradient" in needs))}
    if "gradient" in needs:
        raise ConfigError(
            f"variant {variant!r} for task {task.name!r}, whose loss is not the model's own",
            "task sft",
            "choose a variant that starts from inputs, such as eva",
        )
    first_batches = (task.inputs(task.collate([row])) for row in rows.rows[:CALIBRATION_ROWS])
    return {"batches": [move_batch(model.device, batch) for batch in first_batches]}


def _calibration_batches(
    rows: Rows, device: torch.device, with_labels: bool
) -> Iterator[dict[str, Any]]:
    """The first ``CALIBRATION_ROWS`` rows that have a label, in the order of the data, as keyword
    arguments of the model."""
    labelled_rows = (
        row for row, count in zip(rows.rows, rows.head_token_counts, strict=True) if count
    )
    for row in islice(labelled_rows, CALIBRATION_ROWS):
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = {"labels": torch.tensor([row["labels"]], device=device)} if with_labels else {}
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "use_cache": False,
            **labels,
        }
