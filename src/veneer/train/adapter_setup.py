"""Attach the adapter that a run trains: a new one from the configuration, an earlier adapter that
the run trains further, or the adapter in the checkpoint from which the run resumes.

Some variants compute the initial values of A and B from calibration data: EVA and CorDA from the
inputs of each adapted layer, LoRA-GA from the gradient of each adapted weight. The calibration data
are the first rows of the training data. Each row is a batch of its own, so that no padding
influences the values. The gradients are those of the loss that the model's own forward returns: the
mean cross-entropy of the row's labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from veneer.attach import ModelIndex, fresh_head
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

#: maximal number of rows of calibration data (see the top of this file)
CALIBRATION_ROWS = 64


def attach_adapter(
    task: Task,
    model: Any,
    prepared: Prepared,
    trained_token_ids: tuple[int, ...],
    resume_point: ResumePoint = None,
) -> Any:
    """Attach the adapter of a run to its base, and return the adapter's handle. The adapter is the
    one in the checkpoint of ``resume_point``, else the one that the run trains further, else new.
    For a new adapter, torch's global seed is set to the seed of the configuration.

    Args:
        prepared: the run's data, for adapters whose initial values depend on them.
        trained_token_ids: ids of the tokens whose embedding rows the adapter trains. If the base
            has too few embedding rows for them, it first gets one for each token of the tokenizer.
    """
    config = task.config
    token_ids_by_path = vocabulary.add_embedding_rows(
        model, task.processor, trained_token_ids, config.seed
    )
    if resume_point is not None:
        return load(
            model, resume_point[0] / checkpoint.ADAPTER, name=TRAINED_ADAPTER, trainable=True
        )
    if task.initial_adapter is not None:
        if invocation_tokens := task.initial_adapter.invocation_tokens:
            vocabulary.must_occur(invocation_tokens, "of the adapter", prepared.train)
        return load_to_train(model, task.initial_adapter)
    torch.manual_seed(config.seed)
    return attach(
        model,
        lora_config(
            config,
            model,
            token_ids_by_path,
            vocabulary.invocation_ids(config, task.processor, prepared.train),
        ),
        name=TRAINED_ADAPTER,
        **calibration_arguments(task, prepared.train, model),
    )


def lora_config(
    config: TrainConfig,
    model: Any,
    token_ids_by_path: Mapping[str, tuple[int, ...]],
    invocation_ids: tuple[int, ...] = (),
) -> LoraConfig:
    """The configuration of a run's new adapter.

    Args:
        token_ids_by_path: the ids of the tokens to train, by the module path of the embedding or
            output head whose rows train.
        invocation_ids: the ids of the tokens from which on the adapter acts (aLoRA); () for an
            adapter that acts on every token.
    """
    dtype_name = {"auto": None, "fp32": "float32", "bf16": "bfloat16"}[config.adapter_dtype]
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
        dtype=dtype_name,
        trainable_tokens=token_ids_by_path,
        invocation_tokens=invocation_ids,
    )


def invoked_example(handle: Any, example: dict[str, Any]) -> dict[str, Any]:
    """Append the adapter's invocation tokens, if it has any, to the input_ids of an example. Such
    an adapter acts only from these tokens on (aLoRA), so without them it would not act on the
    example. The new attention_mask is 1 everywhere.

    Args:
        example: keyword arguments of the model for one row (``Task.example``), with input_ids
            [1, s]. It is not changed.
    """
    invocation_tokens = handle.config.invocation_tokens
    if not invocation_tokens:
        return example
    ids = example["input_ids"]
    ids = torch.cat((ids, ids.new_tensor([invocation_tokens]).expand(len(ids), -1)), 1)
    return {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _new_heads(model: Any, config: TrainConfig) -> list[str]:
    """The sorted paths of the modules of the model's head whose weights the base's files lack, such
    as a new classifier. These weights are random, so the run trains them in full. Modules that the
    configuration already lists in ``train_also`` are left out. [] for the target "all-linear",
    which includes such modules."""
    if "all-linear" in pattern_list(config.targets):
        return []
    model_index = ModelIndex(model)
    return sorted(
        {path for path, _ in fresh_head(model_index, model_index.fresh_parameters().values())}
        - {*config.train_also}
    )


def calibration_arguments(task: Task, rows: Rows, model: Any) -> dict[str, Any]:
    """The arguments of ``attach`` that the run's variant needs from the data: ``{"batches": …}``,
    or {} if it needs none. Other arguments, such as LoftQ's original weights, are left to the
    caller. Raises ``ConfigError`` if the variant needs gradients and the task is not sft, because
    ``attach`` takes the gradients of the loss that the model's forward returns, and only sft trains
    with that loss."""
    variant = task.config.variant
    needed_data = VARIANTS[variant].needs & {"inputs", "gradient"}
    if not needed_data:
        return {}
    if task.name == "sft":
        return {
            "batches": list(_calibration_batches(rows, model.device, "gradient" in needed_data))
        }
    if "gradient" in needed_data:
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
    """The first ``CALIBRATION_ROWS`` rows that have a label, in the order of the data, each as the
    keyword arguments of the model for a batch of one row. ``with_labels``: whether to include the
    labels, which only variants that start from gradients need."""
    labelled_rows = (
        row
        for row, label_count in zip(rows.rows, rows.head_token_counts, strict=True)
        if label_count
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
