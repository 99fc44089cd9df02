"""`veneer train --find-rate`: a learning rate for a run, from a short range test on its data.

    rate_k = lowest · (highest / lowest)^(k / (steps - 1))        for step k = 0, 1, …

Every step uses the run's optimiser. The loss falls at first, faster as the rate grows, and rises
once the rate is too high. At the lowest smoothed loss, the rate begins to be too high, so a tenth
of the rate of that step is suggested.
The test is from Smith 2017, "Cyclical Learning Rates for Training Neural Networks",
arXiv:1506.01186. It writes no files and discards the trained adapter.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from veneer.errors import ConfigError, TrainingError
from veneer.models.remote_code import with_trust_of_config
from veneer.train.arguments import arguments_of
from veneer.train.callbacks import say
from veneer.train.config import TrainConfig
from veneer.train.further import as_reference
from veneer.train.run import load_model, make_trainer, prepare_data
from veneer.train.tasks import TASKS

#: the first and the last learning rate of the test, and its number of steps
LOWEST_RATE, HIGHEST_RATE, STEPS = 1e-6, 1.0, 80
#: the test ends when the smoothed loss reaches this multiple of its lowest value, but not before a
#: third of the steps
STOP_FACTOR = 1.5
#: decay of the exponential moving average of the losses
MEAN_DECAY = 0.8
#: how many steps a printed table shows at most
SHOWN_STEPS = 16


@dataclass(frozen=True)
class RateSweep:
    """The result of a range test.

    Fields:
        rates: the learning rate of each step.
        losses: the loss of each step, before its rate was applied (sft: nats per token).
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smoothed_losses(self) -> tuple[float, ...]:
        """The exponential moving average of the losses after each step, with Adam's bias
        correction."""
        means, mean = [], 0.0
        for step_count, loss in enumerate(self.losses, 1):
            mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * loss
            # the division corrects the bias of the mean's initial value 0
            means.append(mean / (1 - MEAN_DECAY**step_count))
        return tuple(means)

    @property
    def suggested_rate(self) -> float:
        """The suggested learning rate: a tenth of the rate at the lowest smoothed loss, rounded to
        one digit. Raises ``TrainingError`` if the smoothed loss falls by less than 0.5 %."""
        smoothed_losses = self.smoothed_losses
        best_index = min(range(len(smoothed_losses)), key=smoothed_losses.__getitem__)
        if best_index == 0 or smoothed_losses[best_index] > 0.995 * smoothed_losses[0]:
            raise TrainingError(
                f"a loss that no rate from {self.rates[0]:.0e} to {self.rates[-1]:.0e} brings down",
                "one that falls somewhere",
                "look at the data (--dry-run shows an example), or start with the default rate",
            )
        rate = self.rates[best_index] / 10
        power_of_ten = 10.0 ** math.floor(math.log10(rate))
        return float(f"{round(rate / power_of_ten) * power_of_ten:.0e}")

    def lines(self) -> list[str]:
        """The lines of a table of up to `SHOWN_STEPS` steps: the rate, and the smoothed loss as a
        number and as a bar. A header comes first."""
        smoothed_losses = self.smoothed_losses
        min_loss, first_loss = min(smoothed_losses), max(smoothed_losses[0], min(smoothed_losses))
        last_index = len(smoothed_losses) - 1
        shown_indices = sorted(
            {round(k * last_index / (SHOWN_STEPS - 1)) for k in range(SHOWN_STEPS)}
        )
        lines = ["     rate     loss"]
        for step in shown_indices:
            bar_share = min(
                max((smoothed_losses[step] - min_loss) / ((first_loss - min_loss) or 1.0), 0.0), 1.2
            )
            bar = "█" * (1 + round(28 * bar_share))
            lines.append(f"{self.rates[step]:9.1e} {smoothed_losses[step]:8.4f}  {bar}")
        return lines


class _SweepCallback(TrainerCallback):
    """Sets the learning rate of each step and records its loss. Stops the run at a loss that is not
    finite, and when the smoothed loss is far above its lowest value (`STOP_FACTOR`)."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        rate = LOWEST_RATE * (HIGHEST_RATE / LOWEST_RATE) ** (state.global_step / (STEPS - 1))
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
        smoothed_losses = self.result.smoothed_losses
        if len(smoothed_losses) > STEPS // 3 and smoothed_losses[-1] > STOP_FACTOR * min(
            smoothed_losses
        ):
            control.should_training_stop = True

    @property
    def result(self) -> RateSweep:
        return RateSweep(tuple(self.rates[: len(self.losses)]), tuple(self.losses))


@with_trust_of_config
def find_rate(config: TrainConfig, *, console: Console | None = None) -> RateSweep:
    """Train on the data of ``config`` with one step for each rate. Ignores the output folder.
    Prints one line to ``console``, by default stderr.

    Raises:
        ConfigError: the task is grpo, whose loss does not measure progress.
        TrainingError: the first loss is not finite.
        VeneerError: the errors that ``fit`` raises before its first step.
    """
    if config.task == "grpo":
        raise ConfigError(
            "task grpo, whose loss is zero at every rate",
            "a task whose loss falls as it learns",
            "try a few rates, and watch reward in log.jsonl",
        )
    console = console or Console(stderr=True)
    task = TASKS[config.task](config)
    trained_token_ids, prepared = prepare_data(task)
    with tempfile.TemporaryDirectory() as temporary_folder:
        arguments = arguments_of(config, Path(temporary_folder), prepared)
        arguments.max_steps, arguments.warmup_steps = STEPS, 0
        arguments.eval_strategy = arguments.save_strategy = IntervalStrategy.NO
        arguments.lr_scheduler_type = SchedulerType.CONSTANT
        arguments.load_best_model_at_end = False
        arguments.report_to, arguments._n_gpu = [], min(arguments.n_gpu, 1)
        set_seed(config.seed)
        base, handle, hidden_state_cache = load_model(
            task, task.load, prepared, trained_token_ids, None
        )
        callback = _SweepCallback()
        trainer = make_trainer(
            task,
            base.model,
            hidden_state_cache,
            args=arguments,
            train_dataset=prepared.train_set,
            processing_class=base.tokenizer,
            callbacks=[callback],
            adapter=handle,
            base_name=config.base,
        )
        say(
            console,
            f"Sweep    {STEPS} steps of {config.batch_size * config.grad_accum} examples, rates"
            f" {LOWEST_RATE:g} to {HIGHEST_RATE:g}",
        )
        with as_reference(base.model, task.initial_adapter, task.needs_reference()):
            trainer.train()
    if not callback.losses:
        raise TrainingError(
            "a loss that is not a number at the first step",
            "a finite number",
            "train in fp32 (--precision fp32)",
        )
    return callback.result
