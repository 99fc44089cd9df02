"""The adapter of a run: a new one as the configuration says, a given one that is trained further,
or the one of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from veneer.attach import Names, fresh_head, fresh_parameters, pattern_list
from veneer.config import LoraConfig
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
    if task.further is not None:
        return load_to_train(model, task.further)
    torch.manual_seed(config.seed)
    return attach(
        model,
        lora_config(config, model, tokens),
        name=OWN,
        **start_data(task, prepared.train, model),
    )


def lora_config(
    config: TrainConfig, model: Any, tokens: Mapping[str, tuple[int, ...]]
) -> LoraConfig:
    """The configuration of a run's new adapter. ``tokens``: ids to train, by the path of the
    embedding."""
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
    )


def _new_heads(model: Any, config: TrainConfig) -> list[str]:
    """Paths of the modules of a task's head that the base's files lack. They train in full; the
    target "all-linear" includes them already."""
    if "all-linear" in pattern_list(config.targets):
        return []
    names = Names(model)
    return sorted(
        {path for path, _ in fresh_head(names, fresh_parameters(names).values())}
        - {*config.train_also}
    )
