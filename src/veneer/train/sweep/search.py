"""Propose the candidates of a sweep and decide which end early.

    ask(count)                     the next candidates: the settings in which each differs
    judge(step, losses)            the candidates that end at this step
    report_end(name, loss, ...)    a candidate has ended

The results depend only on the settings and on the losses. So a resumed sweep repeats these calls
with the recorded losses, and no file holds the state of a sampler or pruner.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from veneer.errors import ConfigError, nearest
from veneer.train.sweep.sweep_settings import Range, Sweep

#: settings with integer values
INTEGERS = frozenset({"rank", "seed", "data_seed"})
#: significant digits of a random number
DIGITS = 4


class Search:
    """The search of a sweep.

    Attributes:
        count: number of candidates in all.
        rungs: the steps after which the weaker candidates end.
        adaptive: whether candidates depend on the results of earlier ones.
    """

    def __init__(self, settings: Sweep, steps: int) -> None:
        self.settings, self.rungs = settings, settings.rung_steps(steps)
        # a sampler of Optuna proposes candidates by the results of earlier ones
        self.adaptive = settings.chosen not in ("grid", "random")
        self.study, self.trials = _study(settings, self.adaptive), dict[str, Any]()
        lists = [values for values in settings.axes.values() if isinstance(values, list)]
        self.count = settings.candidates or math.prod(map(len, lists))
        self._next_settings = self._random_settings() if settings.ranges else self._grid_settings()
        self._proposed_count = 0

    def ask(self, count: int) -> dict[str, dict[str, Any]]:
        """Up to `count` further candidates, as {name: settings}; empty after the last one."""
        candidates = {}
        for _ in range(min(count, self.count - self._proposed_count)):
            self._proposed_count += 1
            name = f"c{self._proposed_count:0{len(str(self.count))}}"
            if self.study is not None:
                self.trials[name] = self.study.ask()
            candidates[name] = (
                self._suggest_settings(self.trials[name])
                if self.adaptive
                else next(self._next_settings)
            )
        return candidates

    def judge(self, step: int, losses: Mapping[str, float]) -> set[str]:
        """The candidates that end at `step`, of those with a loss there; never the best one."""
        best = min(losses, key=losses.__getitem__, default=None)
        for name in losses if self.study is not None else ():
            self.trials[name].report(losses[name], step)
        if self.settings.pruner is not None:
            return {name for name in losses if self.trials[name].should_prune()} - {best}
        if step not in self.rungs:
            return set()
        ordered = sorted(losses, key=losses.__getitem__)  # of equal losses, the earlier continues
        return {*ordered[math.ceil(round(len(ordered) * self.settings.keep, 6)) :]}

    def report_end(self, name: str, loss: float | None, ended: bool) -> None:
        """Report that a candidate has ended, with its last loss, or None if it failed. `ended`: it
        ended early."""
        if self.study is None:
            return
        TrialState = import_module("optuna.trial").TrialState
        state = (
            TrialState.FAIL if loss is None else TrialState.PRUNED if ended else TrialState.COMPLETE
        )
        self.study.tell(
            self.trials[name], None if state is not TrialState.COMPLETE else loss, state=state
        )

    def _grid_settings(self) -> Iterator[dict[str, Any]]:
        """All combinations in order, or for the sampler "random" as many distinct ones as there are
        candidates."""
        axes: Any = self.settings.axes
        numbers = range(math.prod(map(len, axes.values())))
        if self.settings.chosen == "random":
            numbers = random.Random(self.settings.seed).sample(numbers, self.count)
        for number in numbers:
            settings = {}
            for name, values in reversed(axes.items()):
                number, index = divmod(number, len(values))
                settings[name] = values[index]
            yield {name: settings[name] for name in axes}

    def _random_settings(self) -> Iterator[dict[str, Any]]:
        generator = random.Random(self.settings.seed)
        while True:
            yield {
                name: _draw(generator, name, values) for name, values in self.settings.axes.items()
            }

    def _suggest_settings(self, trial: Any) -> dict[str, Any]:
        settings = {}
        for name, values in self.settings.axes.items():
            # by index: Optuna takes no lists, such as targets, as values
            if isinstance(values, list):
                settings[name] = values[trial.suggest_categorical(name, [*range(len(values))])]
            elif name in INTEGERS:
                settings[name] = trial.suggest_int(
                    name, math.ceil(values.low), math.floor(values.high), log=values.log
                )
            else:
                settings[name] = round_digits(
                    trial.suggest_float(name, values.low, values.high, log=values.log)
                )
        return settings


def _draw(generator: random.Random, name: str, values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    low, high = (
        (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    )
    number = generator.uniform(low, high)
    number = math.exp(number) if values.log else number
    return (
        min(max(round(number), math.ceil(values.low)), math.floor(values.high))
        if name in INTEGERS
        else round_digits(number)
    )


def round_digits(number: float) -> float:
    """Round to `DIGITS` significant digits, for readable settings."""
    return float(f"{number:.{DIGITS}g}")


def _study(settings: Sweep, adaptive: bool) -> Any:
    """Optuna's study, if its sampler or pruner is configured; else None. Raises `ConfigError`."""
    if not adaptive and settings.pruner is None:
        return None
    try:
        optuna: Any = import_module("optuna")
    except ImportError as error:
        problem = f"sampler {settings.chosen!r}" if adaptive else f"pruner {settings.pruner!r}"
        raise ConfigError(
            f"{problem}, and {error}", "Optuna", "pip install 'veneer[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = settings.sampler if adaptive else "RandomSampler"  # unused: it gets no axes
    return optuna.create_study(
        sampler=_create_component(optuna.samplers, sampler, "sampler", seed=settings.seed),
        pruner=_create_component(optuna.pruners, settings.pruner or "NopPruner", "pruner"),
    )


def _create_component(module: Any, choice: Any, role: str, **options: Any) -> Any:
    """Create a sampler or pruner of Optuna.

    Args:
        choice: its class name, or {"name": class name, option: value}.
        role: "sampler" or "pruner".
    """
    name = choice["name"] if isinstance(choice, dict) else choice
    optuna_class = getattr(module, name, None)
    if name not in module.__all__ or not isinstance(optuna_class, type):
        names = [
            class_name
            for class_name in module.__all__
            if class_name.lower().endswith(role) and not class_name.startswith("Base")
        ]
        choices = ["grid", "random", *names] if role == "sampler" else names
        raise ConfigError(
            f"{role} {name!r}{nearest(name, choices)}", f"one of {', '.join(choices)}", "correct it"
        )
    options |= (
        {key: value for key, value in choice.items() if key != "name"}
        if isinstance(choice, dict)
        else {}
    )
    try:
        return optuna_class(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{role} {name!r}, and {error}", "options that it takes", "see Optuna's page of it"
        ) from error
