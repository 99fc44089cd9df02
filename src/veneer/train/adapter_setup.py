"""The adapter of a run: a new one as the configuration says, a given one that is trained further,
or the one of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from veneer.attach import Names, fresh_head
from veneer.config import LoraConfig, pattern_list
from veneer.handle import attach, load
from veneer.train import checkpoint, vocabulary
from veneer.train.config import TrainConfig
from veneer.train.further import OWN, load_to_train
from veneer.train.prepare import Prepared
from veneer.train.run_record import ResumePoint
from veneer.train.start_data import start_data
from veneer.train.tasks import Task


def attach_adapter(
    task: Task,
    model: Any,
    prepared: Prepared,
    ids: tuple[int, ...],
    resume_point: ResumePoint = None,
) -> Any:
    """Attach the adapter of the resume point, the one that the run trains further, or a new one.
    ``ids``: tokens to train. Returns its handle."""
    config, tokens = task.config, vocabulary.grow(model, task.processor, ids, task.config.seed)
    if resume_point is not None:
        return load(model, resume_point[0] / checkpoint.ADAPTER, name=OWN, trainable=True)
    if task.further is not None:
        return load_to_train(model, task.further)
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
