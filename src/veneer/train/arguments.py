"""The arguments of transformers' `Trainer`, or of trl's `SFTTrainer` for the task sft, made from a
configuration."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import OptimizerNames, TrainingArguments

from veneer.errors import ConfigError, listing, nearest
from veneer.models.load import best_device
from veneer.train.config import TrainConfig
from veneer.train.prepare import Prepared

#: transformers' name of a schedule, by its name in the configuration; other names are equal
SCHEDULES = {"constant": "constant_with_warmup"}


def arguments_of(config: TrainConfig, output: Path, prepared: Prepared) -> TrainingArguments:
    """The trainer's arguments for a configuration and its data. Raises `ConfigError` for an
    optimiser or a tracker that transformers does not know, and for offloading activations on a
    CPU."""
    is_on_cpu = "cpu" in (config.device_map, config.device or best_device())
    _check_settings(config, is_on_cpu)
    # Early stopping keeps the checkpoint with the lowest evaluation loss, so each checkpoint needs
    # an evaluation: if only one of the two intervals is set, the other gets the same value.
    early_stopping = config.early_stopping
    eval_every = (
        config.eval_every
        or (early_stopping and config.save_every)
        or max(1, math.ceil(prepared.steps / 5))
    )
    default_save_every = eval_every if early_stopping else max(1, math.ceil(prepared.steps / 10))
    arguments_class, sft_arguments = TrainingArguments, {}
    if config.task == "sft":  # no other task needs trl, which takes half a second to import
        from trl.trainer.sft_config import SFTConfig

        arguments_class = SFTConfig
        sft_arguments = {
            "max_length": prepared.max_length,
            "packing": config.packing,
            # the data set is already tokenised and packed
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "activation_offloading": config.offload_activations,
        }
    return arguments_class(
        output_dir=str(output),
        max_steps=prepared.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES.get(config.schedule, config.schedule),
        warmup_steps=config.warmup,
        optim=config.optimiser,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.data_seed,
        eval_strategy="no" if prepared.eval_set is None else "steps",
        eval_steps=eval_every,
        prediction_loss_only=True,
        save_steps=config.save_every or default_save_every,
        # early stopping needs the newest checkpoint and the one with the lowest evaluation loss,
        # which is loaded at the end
        save_total_limit=max(config.keep_checkpoints, 2 if early_stopping else 1),
        load_best_model_at_end=bool(early_stopping),
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a filter would hide a nan from `StopOnNan`
        report_to=config.trackers or "none",
        activation_checkpointing=config.activation_checkpointing,
        gradient_checkpointing=None,  # pyright: ignore[reportArgumentType]
        bf16=False,  # no autocast: the weights already have their dtype
        disable_tqdm=True,
        remove_unused_columns=config.task == "sft",  # collators of other tasks read all columns
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=is_on_cpu,
        **sft_arguments,
    )


def _check_settings(config: TrainConfig, is_on_cpu: bool) -> None:
    """Raise `ConfigError` for an unknown optimiser or tracker, and for offloading activations on a
    CPU. transformers would refuse an unknown optimiser or tracker too, but later and with a
    traceback."""
    if config.offload_activations and is_on_cpu:
        raise ConfigError(
            "offload_activations, and a run on the processor, whose activations are in main memory"
            " already",
            "a GPU",
            "leave it out; to hold fewer of them, set activation_checkpointing or a smaller"
            " batch_size",
        )
    optimiser_names = [str(member.value) for member in OptimizerNames]
    if config.optimiser not in optimiser_names:
        raise ConfigError(
            f"optimiser {config.optimiser!r}{nearest(config.optimiser, optimiser_names)}",
            "one that transformers knows",
            f"choose for example {listing(optimiser_names, 4)}",
        )
    for tracker in config.trackers:
        if tracker not in (installed_trackers := get_available_reporting_integrations()):
            raise ConfigError(
                f"tracker {tracker!r}{nearest(tracker, INTEGRATION_TO_CALLBACK)}, which is unknown"
                " or not installed",
                f"one that is (here: {listing(installed_trackers)})",
                "install its package, or correct it",
            )
