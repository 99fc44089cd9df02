"""Which candidates a sweep has, and who of them goes on.

    ask(count)              the next ones: the settings in which each differs
    judge(step, losses)     who ends here
    tell(name, loss)        how one ended

All of it is a function of the settings and of what was measured: a sweep that goes on asks and
tells again what its record says, and is where it was. So nothing of a sampler's or pruner's own is
kept in a file.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from veneer.errors import ConfigError, nearest
from veneer.train.sweep.settings import Range, Sweep

#: settings that are whole numbers
WHOLE = frozenset({"rank", "seed", "data_seed"})
#: digits of a number that is drawn
DIGITS = 4


class Search:
    """``count``: how many candidates there are in all; ``rungs``: the steps after which the weaker
    end."""

    def __init__(self, settings: Sweep, steps: int) -> None:
        self.settings, self.rungs = settings, settings.rung_steps(steps)
        self.sampled = settings.chosen not in ("grid", "random")  # each depends on how others did
        self.study, self.trials = _study(settings, self.sampled), dict[str, Any]()
        lists = [values for values in settings.axes.values() if isinstance(values, list)]
        self.count = settings.candidates or math.prod(map(len, lists))
        self._listed = self._drawn() if settings.ranges else self._grid()
        self._asked = 0

    def ask(self, count: int) -> dict[str, dict[str, Any]]:
        """Up to `count` more candidates by name; none when there were all."""
        found = {}
        for _ in range(min(count, self.count - self._asked)):
            self._asked += 1
            name = f"c{self._asked:0{len(str(self.count))}}"
            if self.study is not None:
                self.trials[name] = self.study.ask()
            found[name] = self._suggested(self.trials[name]) if self.sampled else next(self._listed)
        return found

    def judge(self, step: int, losses: Mapping[str, float]) -> set[str]:
        """Who of those that were evaluated after `step` ends here; never the best one."""
        best = min(losses, key=losses.__getitem__, default=None)
        for name in losses if self.study is not None else ():
            self.trials[name].report(losses[name], step)
        if self.settings.pruner is not None:
            return {name for name in losses if self.trials[name].should_prune()} - {best}
        if step not in self.rungs:
            return set()
        ordered = sorted(losses, key=losses.__getitem__)  # of equal ones, the earlier stays
        return {*ordered[math.ceil(round(len(ordered) * self.settings.keep, 6)) :]}

    def tell(self, name: str, loss: float | None, ended: bool) -> None:
        """That a candidate is through, with its last loss; `ended`: early; None: it failed."""
        if self.study is None:
            return
        TrialState = import_module("optuna.trial").TrialState
        state = (
            TrialState.FAIL if loss is None else TrialState.PRUNED if ended else TrialState.COMPLETE
        )
        self.study.tell(
            self.trials[name], None if state is not TrialState.COMPLETE else loss, state=state
        )

    def _grid(self) -> Iterator[dict[str, Any]]:
        """Every combination in order, or as many as are asked for, none twice."""
        axes: Any = self.settings.axes
        numbers = range(math.prod(map(len, axes.values())))
        if self.settings.chosen == "random":
            numbers = random.Random(self.settings.seed).sample(numbers, self.count)
        for number in numbers:
            found = {}
            for name, values in reversed(axes.items()):
                number, place = divmod(number, len(values))
                found[name] = values[place]
            yield {name: found[name] for name in axes}

    def _drawn(self) -> Iterator[dict[str, Any]]:
        source = random.Random(self.settings.seed)
        while True:
            yield {name: _draw(source, name, values) for name, values in self.settings.axes.items()}

    def _suggested(self, trial: Any) -> dict[str, Any]:
        found = {}
        for name, values in self.settings.axes.items():
            # by number: Optuna takes no lists, such as targets, as values
            if isinstance(values, list):
                found[name] = values[trial.suggest_categorical(name, [*range(len(values))])]
            elif name in WHOLE:
                found[name] = trial.suggest_int(
                    name, math.ceil(values.low), math.floor(values.high), log=values.log
                )
            else:
                found[name] = rounded(
                    trial.suggest_float(name, values.low, values.high, log=values.log)
                )
        return found


def _draw(source: random.Random, name: str, values: list[Any] | Range) -> Any:
    if isinstance(values, list):
        return source.choice(values)
    low, high = (
        (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    )
    number = source.uniform(low, high)
    number = math.exp(number) if values.log else number
    return (
        min(max(round(number), math.ceil(values.low)), math.floor(values.high))
        if name in WHOLE
        else rounded(number)
    )


def rounded(number: float) -> float:
    """To a few digits: what a person would write, and read."""
    return float(f"{number:.{DIGITS}g}")


def _study(settings: Sweep, sampled: bool) -> Any:
    """The study of Optuna's, if its sampler or pruner is asked for. Raises `ConfigError`."""
    if not sampled and settings.pruner is None:
        return None
    try:
        optuna: Any = import_module("optuna")
    except ImportError as error:
        problem = f"sampler {settings.chosen!r}" if sampled else f"pruner {settings.pruner!r}"
        raise ConfigError(
            f"{problem}, and {error}", "Optuna", "pip install 'veneer[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = settings.sampler if sampled else "RandomSampler"  # without axes it draws nothing
    return optuna.create_study(
        sampler=_made(optuna.samplers, sampler, "sampler", seed=settings.seed),
        pruner=_made(optuna.pruners, settings.pruner or "NopPruner", "pruner"),
    )


def _made(module: Any, given: Any, what: str, **options: Any) -> Any:
    name = given["name"] if isinstance(given, dict) else given
    kind = getattr(module, name, None)
    if name not in module.__all__ or not isinstance(kind, type):
        names = [
            word
            for word in module.__all__
            if word.lower().endswith(what) and not word.startswith("Base")
        ]
        more = ["grid", "random", *names] if what == "sampler" else names
        raise ConfigError(
            f"{what} {name!r}{nearest(name, more)}", f"one of {', '.join(more)}", "correct it"
        )
    options |= (
        {key: value for key, value in given.items() if key != "name"}
        if isinstance(given, dict)
        else {}
    )
    try:
        return kind(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{what} {name!r}, and {error}", "options that it takes", "see Optuna's page of it"
        ) from error
