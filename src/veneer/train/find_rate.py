"""`veneer train --find-rate`: which learning rate suits a run, from a short sweep over its own
data.

    rate_k = low · (high / low)^(k / steps)        one step each, from the run's own start, with its optimiser

The loss falls first, faster as the rate grows, and rises where the rate is too high. Suggested is a
tenth of the rate at the lowest smoothed loss: at the lowest one a step is about to be too long.
Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, has the sweep.
Nothing is written, and what the sweep trained is dropped.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from veneer.errors import ConfigError, TrainingError
from veneer.models.remote_code import with_trust_of_config
from veneer.train import vocabulary
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import say
from veneer.train.config import TrainConfig
from veneer.train.further import as_reference
from veneer.train.hidden_state_cache import HiddenStateCache
from veneer.train.run import attach_as
from veneer.train.tasks import TASKS
from veneer.train.trainer import trainer_of

LOW, HIGH, STEPS = 1e-6, 1.0, 80
#: a share of the lowest smoothed loss above which the sweep ends, once it has seen a third of the
#: rates
WORSE = 1.5
#: of the losses' running mean
KEPT = 0.8


@dataclass(frozen=True)
class RateSweep:
    """``rates``, and the ``losses`` (sft: nats a token) of the step before each was applied;
    ``smoothed``: their running mean."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed(self) -> tuple[float, ...]:
        found, mean = [], 0.0
        for count, loss in enumerate(self.losses, 1):
            mean = KEPT * mean + (1 - KEPT) * loss
            found.append(mean / (1 - KEPT**count))  # as if there had been no zero before the first
        return tuple(found)

    @property
    def suggested(self) -> float:
        """A learning rate, to one digit. ``TrainingError``: the loss fell nowhere."""
        smoothed = self.smoothed
        best = min(range(len(smoothed)), key=smoothed.__getitem__)
        if best == 0 or smoothed[best] > 0.995 * smoothed[0]:
            problem = (
                f"a loss that no rate from {self.rates[0]:.0e} to {self.rates[-1]:.0e} brings down"
            )
            do = "look at the data (--dry-run shows an example), or start with the default rate"
            raise TrainingError(problem, "one that falls somewhere", do)
        rate = self.rates[best] / 10
        digit = 10.0 ** math.floor(math.log10(rate))
        return float(f"{round(rate / digit) * digit:.0e}")

    def lines(self, count: int = 16) -> list[str]:
        """A table for people: some of the rates with their smoothed losses, drawn as bars."""
        smoothed = self.smoothed
        low, high = min(smoothed), max(smoothed[0], min(smoothed))
        shown = sorted({round(k * (len(smoothed) - 1) / (count - 1)) for k in range(count)})
        lines = ["     rate     loss"]
        for k in shown:
            share = min(max((smoothed[k] - low) / ((high - low) or 1.0), 0.0), 1.2)
            lines.append(
                f"{self.rates[k]:9.1e} {smoothed[k]:8.4f}  {'█' * (1 + round(28 * share))}"
            )
        return lines


class _Sweep(TrainerCallback):
    """Gives each step its rate and keeps its loss; ends where the loss has left the lowest one
    behind."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        rate = LOW * (HIGH / LOW) ** (state.global_step / (STEPS - 1))
        self.rates.append(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            control.should_training_stop = True
            return
        self.losses.append(loss)
        smoothed = self.result.smoothed
        if len(smoothed) > STEPS // 3 and smoothed[-1] > WORSE * min(smoothed):
            control.should_training_stop = True

    @property
    def result(self) -> RateSweep:
        return RateSweep(tuple(self.rates[: len(self.losses)]), tuple(self.losses))


@with_trust_of_config
def find_rate(config: TrainConfig, *, console: Console | None = None) -> RateSweep:
    """Sweep the rates on the data of ``config``, one step each. The output folder is not looked at.

    Raises: as ``fit`` does before its first step; ``ConfigError``: the task is grpo, whose loss
    tells nothing; ``TrainingError``: not even the first loss is a number.
    """
    if config.task == "grpo":
        problem, do = (
            "task grpo, whose loss is zero at every rate",
            "try a few rates, and watch reward in log.jsonl",
        )
        raise ConfigError(problem, "a task whose loss falls as it learns", do)
    console = console or Console(stderr=True)
    task = TASKS[config.task](config)
    task.read_data()
    ids = vocabulary.learn(config, task.open())
    prepared = task.prepare()
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(config, Path(folder), prepared)
        arguments.max_steps, arguments.warmup_steps = STEPS, 0
        arguments.eval_strategy = arguments.save_strategy = IntervalStrategy.NO
        arguments.lr_scheduler_type, arguments.load_best_model_at_end = (
            SchedulerType.CONSTANT,
            False,
        )
        arguments.report_to, arguments._n_gpu = [], min(arguments.n_gpu, 1)
        set_seed(config.seed)
        base = task.load()._replace(tokenizer=task.processor)
        handle = attach_as(task, base.model, prepared, ids)
        sweep = _Sweep()
        trainer = trainer_of(
            task, base.model, HiddenStateCache(base.model) if config.cache_lower else None,
            args=arguments, train_dataset=prepared.train_set, processing_class=base.tokenizer, callbacks=[sweep],
            adapter=handle, base_name=config.base,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        say(
            console,
            f"Sweep    {STEPS} steps of {config.batch_size * config.grad_accum} examples, rates"
            f" {LOW:g} to {HIGH:g}",
        )
        with as_reference(base.model, task.further, task.refers()):
            trainer.train()
    if not sweep.losses:
        problem, do = (
            "a loss that is not a number at the first step",
            "train in fp32 (--precision fp32)",
        )
        raise TrainingError(problem, "a finite number", do)
    return sweep.result
