"""Propose the candidates of a sweep (the configurations to compare), and decide which of them end
early: at rungs (steps at which candidates are ranked by loss), or when a pruner of Optuna says so.

    ask(count)                     propose further candidates: their names and changed settings
    choose_ended(step, losses)     choose the candidates that end at this step
    report_end(name, loss, ...)    record that a candidate has ended

The results depend only on the settings and on the losses. So a resumed sweep repeats these calls
with the recorded losses, and no file needs to hold the state of a sampler or pruner.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from veneer.errors import ConfigError, nearest
from veneer.train.sweep.sweep_settings import Range, Sweep

#: settings whose values are integers, so values drawn from a range must be whole numbers
INTEGER_AXES = frozenset({"rank", "seed", "data_seed"})
#: significant digits of a value that is drawn from a range
SIGNIFICANT_DIGITS = 4


class Search:
    """The search of a sweep, whose candidates train for `steps` steps unless they end early.

    Attributes:
        count: number of candidates of the whole sweep.
        rungs: the steps after which the weaker candidates end.
        adaptive: whether candidates depend on the results of earlier ones.
        study, trials: Optuna's study, and by candidate's name its trial in the study. None and {}
            if the sweep uses neither a sampler nor a pruner of Optuna.
    """

    def __init__(self, settings: Sweep, steps: int) -> None:
        self.settings, self.rungs = settings, settings.rung_steps(steps)
        # any other sampler is one of Optuna, which uses the results of earlier candidates
        self.adaptive = settings.sampler_name not in ("grid", "random")
        self.study, self.trials = _create_study(settings, self.adaptive), dict[str, Any]()
        value_lists = [values for values in settings.axes.values() if isinstance(values, list)]
        self.count = settings.candidates or math.prod(map(len, value_lists))
        self._settings_iterator = (
            self._random_settings() if settings.range_axes else self._grid_settings()
        )
        self._proposed_count = 0

    def ask(self, count: int) -> dict[str, dict[str, Any]]:
        """Propose up to `count` new candidates, as {candidate's name: {setting: value}}. After the
        last candidate, the result is {}."""
        changes_by_name = {}
        for _ in range(min(count, self.count - self._proposed_count)):
            self._proposed_count += 1
            name = f"c{self._proposed_count:0{len(str(self.count))}}"
            if self.study is not None:
                self.trials[name] = self.study.ask()
            changes_by_name[name] = (
                self._suggest_settings(self.trials[name])
                if self.adaptive
                else next(self._settings_iterator)
            )
        return changes_by_name

    def choose_ended(self, step: int, losses: Mapping[str, float]) -> set[str]:
        """Choose the candidates that end early at `step`, and report the losses to Optuna's trials,
        if there are any. `losses`: by name of each candidate that still trains, its loss at this
        step. Returns names from `losses`, never that of the lowest loss."""
        best_name = min(losses, key=losses.__getitem__, default=None)
        for name in losses if self.study is not None else ():
            self.trials[name].report(losses[name], step)
        if self.settings.pruner is not None:
            return {name for name in losses if self.trials[name].should_prune()} - {best_name}
        if step not in self.rungs:
            return set()
        ranked_names = sorted(losses, key=losses.__getitem__)  # stable: earlier ones win ties
        return {*ranked_names[math.ceil(round(len(ranked_names) * self.settings.keep, 6)) :]}

    def report_end(self, name: str, loss: float | None, ended_early: bool) -> None:
        """Tell Optuna's study, if there is one, that a candidate has ended. `loss`: its last loss;
        None if it failed. `ended_early`: whether `choose_ended` ended it."""
        if self.study is None:
            return
        TrialState = import_module("optuna.trial").TrialState
        trial_state = (
            TrialState.FAIL
            if loss is None
            else TrialState.PRUNED
            if ended_early
            else TrialState.COMPLETE
        )
        self.study.tell(
            self.trials[name],
            None if trial_state is not TrialState.COMPLETE else loss,
            state=trial_state,
        )

    def _grid_settings(self) -> Iterator[dict[str, Any]]:
        """Yield {setting: value} for every combination of the values of all axes; the last axis
        varies fastest. For the sampler "random", yield `count` distinct combinations in random
        order instead."""
        axes: Any = self.settings.axes
        combination_indices = range(math.prod(map(len, axes.values())))
        if self.settings.sampler_name == "random":
            combination_indices = random.Random(self.settings.seed).sample(
                combination_indices, self.count
            )
        for combination_index in combination_indices:
            settings = {}
            for axis, values in reversed(axes.items()):
                combination_index, value_index = divmod(combination_index, len(values))
                settings[axis] = values[value_index]
            yield {axis: settings[axis] for axis in axes}

    def _random_settings(self) -> Iterator[dict[str, Any]]:
        random_generator = random.Random(self.settings.seed)
        while True:
            yield {
                axis: _draw_value(random_generator, axis, values)
                for axis, values in self.settings.axes.items()
            }

    def _suggest_settings(self, trial: Any) -> dict[str, Any]:
        settings = {}
        for axis, values in self.settings.axes.items():
            # suggest the index of a value: the value may be a list, which Optuna does not accept
            if isinstance(values, list):
                settings[axis] = values[trial.suggest_categorical(axis, [*range(len(values))])]
            elif axis in INTEGER_AXES:
                settings[axis] = trial.suggest_int(
                    axis, math.ceil(values.low), math.floor(values.high), log=values.log
                )
            else:
                settings[axis] = round_digits(
                    trial.suggest_float(axis, values.low, values.high, log=values.log)
                )
        return settings


def _draw_value(random_generator: random.Random, axis: str, values: list[Any] | Range) -> Any:
    """Draw a value of the setting ``axis`` from its list, or from its range: uniformly, or
    log-uniformly if ``values.log`` is set."""
    if isinstance(values, list):
        return random_generator.choice(values)
    low, high = (
        (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    )
    drawn_value = random_generator.uniform(low, high)
    drawn_value = math.exp(drawn_value) if values.log else drawn_value
    return (
        min(max(round(drawn_value), math.ceil(values.low)), math.floor(values.high))
        if axis in INTEGER_AXES
        else round_digits(drawn_value)
    )


def round_digits(number: float) -> float:
    """Round to `SIGNIFICANT_DIGITS` significant digits, for readable settings."""
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")


def _create_study(settings: Sweep, adaptive: bool) -> Any:
    """Create Optuna's study with the configured sampler and pruner; None if neither is one of
    Optuna's. ``adaptive``: whether the sampler is one. Raises `ConfigError` if Optuna is missing,
    or if it has no such sampler or pruner."""
    if not adaptive and settings.pruner is None:
        return None
    try:
        optuna: Any = import_module("optuna")
    except ImportError as error:
        problem = (
            f"sampler {settings.sampler_name!r}" if adaptive else f"pruner {settings.pruner!r}"
        )
        raise ConfigError(
            f"{problem}, and {error}", "Optuna", "pip install 'veneer[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # without a sampler of Optuna, only its pruner is used, so the sampler given here never draws
    sampler = settings.sampler if adaptive else "RandomSampler"
    return optuna.create_study(
        sampler=_create_component(optuna.samplers, sampler, "sampler", seed=settings.seed),
        pruner=_create_component(optuna.pruners, settings.pruner or "NopPruner", "pruner"),
    )


def _create_component(module: Any, class_choice: Any, role: str, **options: Any) -> Any:
    """Create a sampler or pruner of Optuna. Raises `ConfigError` if its class does not exist or
    refuses the options.

    Args:
        module: `optuna.samplers` or `optuna.pruners`.
        class_choice: the name of its class, or {"name": name of the class, option: value, ...}.
        role: "sampler" or "pruner".
        options: keyword arguments of the class; those in `class_choice` take precedence.
    """
    name = class_choice["name"] if isinstance(class_choice, dict) else class_choice
    optuna_class = getattr(module, name, None)
    if name not in module.__all__ or not isinstance(optuna_class, type):
        class_names = [
            class_name
            for class_name in module.__all__
            if class_name.lower().endswith(role) and not class_name.startswith("Base")
        ]
        valid_names = ["grid", "random", *class_names] if role == "sampler" else class_names
        raise ConfigError(
            f"{role} {name!r}{nearest(name, valid_names)}",
            f"one of {', '.join(valid_names)}",
            "correct it",
        )
    options |= (
        {key: value for key, value in class_choice.items() if key != "name"}
        if isinstance(class_choice, dict)
        else {}
    )
    try:
        return optuna_class(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{role} {name!r}, and {error}", "options that it takes", "see Optuna's page of it"
        ) from error
