"""Callbacks of a run: the log file, the progress display, and the stops on a signal and on a loss
that is not finite."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from transformers import TrainerCallback

from veneer.errors import TrainingError
from veneer.train.checkpoint import LOG

if TYPE_CHECKING:
    from veneer.train.tasks import Task


#: the warning of the task grpo if, in the first step of a run, all answers to each prompt get equal
#: rewards
EQUAL_REWARDS_WARNING = (
    "step {step:>5}  Every answer to a prompt got the same reward ({reward:.3f}), so that this step"
    " taught nothing. If later steps show ± 0.000 too, nothing is trained: see what the reward"
    " function gets and gives, raise the temperature, or draw more answers."
)


class LossLog(TrainerCallback):
    """Appends one JSON line per step to output/log.jsonl: step, loss, grad_norm, learning_rate,
    epoch, tokens and seconds of the run so far, and the measures of the task; and one line per
    evaluation, with eval_loss and each measure under its name with the prefix eval_.

    Args:
        previous_lines: if the run is resumed, the last lines of its log; the `seconds` of the new
            lines continue from the last of them. [] for a new run.
    """

    def __init__(self, output: Path, previous_lines: list[dict[str, Any]], task: Task) -> None:
        self.path, self.measure_names = output / LOG, task.measures
        self.seconds_before = float(previous_lines[-1]["seconds"]) if previous_lines else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start_time = time.perf_counter() - self.seconds_before

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        logged_names = {
            "loss",
            "grad_norm",
            "learning_rate",
            "epoch",
            "eval_loss",
            *self.measure_names,
            *(f"eval_{name}" for name in self.measure_names),
        }
        line: dict[str, Any] = {
            "step": state.global_step,
            **{name: logs[name] for name in logs if name in logged_names},
        }
        if not line.keys() & {"loss", "eval_loss"}:
            return  # this is transformers' summary at the end of a run, not the log of a step
        if "num_tokens" in logs:
            line["tokens"] = int(logs["num_tokens"])
        line["seconds"] = round(time.perf_counter() - self.start_time, 3)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class StopOnNan(TrainerCallback):
    """Raises `TrainingError` if the loss or the gradient is not finite, because further steps would
    only spoil the adapter."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"the {name.replace('_', ' ')} is {value} at step {state.global_step}",
                    "a finite number",
                    "lower the learning rate, lengthen the warm-up, or train in fp32 (--precision"
                    " fp32); the last checkpoint is intact",
                )


class StopOnSignal(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, on Ctrl-C or SIGTERM. A second Ctrl-C
    ends the run immediately. A second SIGTERM does not, because a scheduler and torchrun may each
    send one. Use as a context manager around `trainer.train()`.

    Attributes:
        requested: whether a signal arrived in this process, or `stop_order` returned True.
            (`stop_order` is called after each step.)
        stopped: whether the run ends after this step.
        single_process: whether the run has one process. Several processes must all end after the
            same step, so the trainer then sets `stopped` in all of them together.
    """

    def __init__(
        self,
        console: Console,
        single_process: bool = True,
        stop_order: Callable[[], bool] | None = None,
    ) -> None:
        self.requested, self.stopped = False, False
        self.single_process, self.console = single_process, console
        self._stop_order = stop_order
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only; a run in another thread gets none
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {
                signal_number: signal.signal(signal_number, self._handle_signal)
                for signal_number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *exception: object) -> None:
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)

    def _handle_signal(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            say(self.console, "Stopping after this step … (Ctrl-C to stop at once)")
        self.requested, self.stopped = True, self.stopped or self.single_process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop_order is not None and not self.requested and self._stop_order():
            self.requested, self.stopped = True, self.single_process
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """Shows the loss, the tokens per second and the remaining time: as a live bar on a terminal,
    else as a line every ten seconds. `start_step`: the step that the run resumes from, or 0."""

    def __init__(self, console: Console, start_step: int, task: Task) -> None:
        self.measure_formatters = {
            f"eval_{name}": measure_formatter(name, task.loss_unit) for name in task.measures
        }
        self.console, self.start_step = console, start_step
        self.bar: Progress | None = None
        self.bar_task_id: Any = None
        # (time in seconds, number of tokens since the start of the run, step) at the end of each of
        # the last 51 steps, so that the speed is a mean over 50 steps
        self.recent_steps: deque[tuple[float, int, int]] = deque(maxlen=51)
        self.last_print_time = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                expand=True,
                refresh_per_second=4,
            )
            self.bar_task_id = self.bar.add_task(
                "", total=state.max_steps, completed=state.global_step, text="first step …"
            )
            self.bar.start()
        self.last_print_time = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        step, now = state.global_step, time.perf_counter()
        if "eval_loss" in logs:
            measures_text = "".join(
                f", {format_measure(logs[name])}"
                for name, format_measure in self.measure_formatters.items()
                if name in logs
            )
            say(
                self.console,
                f"step {step:>5}  evaluation loss {logs['eval_loss']:.4f}{measures_text}",
            )
        if "loss" not in logs:
            return
        self.recent_steps.append((now, int(logs.get("num_tokens", 0)), step))
        progress_text = (
            f"loss {logs['loss']:.4f}{_format_reward(logs)}{self._format_speed(state.max_steps)}"
        )
        if step == self.start_step + 1 and logs.get("reward_spread", 1.0) <= 1e-6 * max(
            1.0, abs(logs.get("reward", 0.0))
        ):
            say(self.console, EQUAL_REWARDS_WARNING.format(step=step, reward=logs["reward"]))
        if self.bar is not None:
            self.bar.update(self.bar_task_id, completed=step, text=progress_text)
        elif step in (self.start_step + 1, state.max_steps) or now - self.last_print_time > 10:
            self.last_print_time = now
            say(self.console, f"step {step:>5}/{state.max_steps}  {progress_text}")

    def _format_speed(self, total_steps: int) -> str:
        first_time, first_token_count, first_step = self.recent_steps[0]
        last_time, last_token_count, step = self.recent_steps[-1]
        if step == first_step or last_time <= first_time:
            return ""
        remaining_seconds = (total_steps - step) * (last_time - first_time) / (step - first_step)
        tokens_per_second = (last_token_count - first_token_count) / (last_time - first_time)
        return f"  {tokens_per_second:,.0f} tokens/s  {format_duration(remaining_seconds)} left"

    def close(self) -> None:
        """Remove the bar. Must be called after errors too, because the bar hides the cursor."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _format_reward(logs: dict[str, Any]) -> str:
    """The rewards of a step as text: their mean, then ± the standard deviation among the answers to
    one prompt, averaged over the prompts. "" if the log entry has no rewards."""
    if "reward_spread" not in logs:
        return ""
    return f"  reward {logs['reward']:.3f} ± {logs['reward_spread']:.3f}"


def say(console: Console, text: str) -> None:
    """Print a line unchanged: without rich's markup, since a path may contain brackets, and without
    line breaks."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def measure_formatter(name: str, loss_unit: str) -> Callable[[float], str]:
    """A function that formats the value of the measure with this name. ``loss_unit``: what the loss
    is a mean over, such as "token" or "pair" (`Task.loss_unit`)."""
    if name == "accuracy":
        return lambda value: f"{value:.1%} of {loss_unit}s right"
    return lambda value: f"{name} {value:.4f}"


def format_duration(seconds: float) -> str:
    """A readable duration: 42 s, 3 min 5 s, 2 h 10 min."""
    minutes, seconds_left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"
