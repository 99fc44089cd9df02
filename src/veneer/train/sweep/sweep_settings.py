"""The settings of a sweep, which are the section `sweep:` of a YAML file: the values to try of some
settings of a run (the axes), and the steps after which the weaker candidates end (the rungs).

axes       by setting, the values to try: a list, or a range {low, high, log}
sampler    grid (every combination of lists), random, or the name of a sampler of Optuna
rungs      the steps at which the weaker candidates end; or `pruner`, the name of a pruner of Optuna
judged_by  the loss that a rung compares: the loss on the held-out rows, or the mean training loss
           of the latter half of the steps so far, which needs no evaluation
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veneer.errors import ConfigError, listing, nearest
from veneer.train.config import TrainConfig, make_config, read_yaml

#: settings of a run in which candidates may differ: of the adapter, of the optimisation, and seeds
AXES = (
    "rank", "alpha", "dropout", "targets", "exclude", "layers", "train_also", "variant", "bias",
    "adapter_dtype", "learning_rate", "schedule", "warmup", "optimiser", "weight_decay",
    "adam_beta2", "max_grad_norm", "seed", "data_seed",
)  # fmt: skip
#: the axes that are seeds. Candidates that differ only in their seeds repeat the same settings.
SEED_AXES = frozenset({"seed", "data_seed"})
#: settings of a run that must keep their defaults in a sweep, which does not support them
UNSUPPORTED = (
    "packing", "cache_lower", "offload_activations", "early_stopping", "add_tokens",
    "trainable_tokens", "invocation", "trackers", "device_map", "activation_checkpointing",
    "adapter",
)  # fmt: skip
#: defaults of `rungs`, as shares of the steps of a run, and of `keep`, the share of the candidates
#: that continues after a rung
DEFAULT_RUNGS, DEFAULT_KEEP = (1 / 9, 1 / 3), 1 / 3


class Range(BaseModel):
    """A range of numbers from `low` to `high`. They are drawn uniformly, or log-uniformly if `log`
    is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} and high {self.high:g}; expected low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} on a logarithmic range; expected more than 0")
        return self


class Sweep(BaseModel):
    """The section `sweep:` of a YAML file. Ending the weaker candidates at rungs is successive
    halving (Jamieson and Talwalkar 2016, arXiv:1502.07943).

    Fields:
        axes: by setting of a run, the values to try.
        candidates: number of candidates; None for the grid, which has one for each combination.
        sampler, pruner: the name, or {"name": name, option: value, ...} for a class of Optuna.
        rungs: the steps after which the weaker candidates end. Numbers below 1 are shares of the
            run. None: `DEFAULT_RUNGS`, or no rungs if there is a pruner.
        keep: the share of the candidates that continues after a rung.
        judged_by: the loss that a rung compares.
        at_once: the largest number of candidates that train at the same time.
        seed: the seed of the sampler.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    axes: dict[str, list[Any] | Range] = Field(min_length=1)
    candidates: int | None = Field(None, ge=2)
    sampler: str | dict[str, Any] | None = None
    pruner: str | dict[str, Any] | None = None
    rungs: list[float] | None = None
    keep: float = Field(DEFAULT_KEEP, gt=0, lt=1)
    judged_by: Literal["held_out", "training"] = "held_out"
    at_once: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_fields(self) -> Sweep:
        for name, values in self.axes.items():
            if name not in AXES:
                raise ValueError(
                    f"axis {name!r}{nearest(name, AXES)}; expected {listing(AXES, len(AXES))}"
                )
            if isinstance(values, list) and not values:
                raise ValueError(f"axis {name!r} without values; expected some")
        range_axes = self.range_axes
        combination_count = math.prod(
            len(values) for values in self.axes.values() if isinstance(values, list)
        )
        for component in (self.sampler, self.pruner):
            if isinstance(component, dict) and not isinstance(component.get("name"), str):
                raise ValueError(f"{component}; expected a name, and options of Optuna's")
        judges_training_loss = self.judged_by == "training"
        grid_conflict = (
            f"axis {range_axes[0]!r}, a range" if range_axes else f"candidates: {self.candidates}"
        )
        problems: list[tuple[Any, str]] = [
            (
                self.sampler == "grid" and (range_axes or self.candidates),
                f"sampler grid and {grid_conflict}; expected lists of values alone, all of which"
                " are tried",
            ),
            (
                self.sampler_name != "grid" and self.candidates is None,
                "no `candidates:`; expected how many to draw, since not every combination is tried",
            ),
            (
                self.sampler_name == "random"
                and not range_axes
                and (self.candidates or 0) > combination_count,
                f"candidates: {self.candidates}, and {combination_count} combinations of the axes'"
                " values; expected no more, since each is tried once",
            ),
            (
                self.pruner is not None and self.rungs is not None,
                "pruner and rungs; expected one of them",
            ),
            (
                judges_training_loss and (self.pruner is not None or self.rungs == []),
                "judged_by training and no rungs, where alone it counts; expected rungs, or"
                " held_out",
            ),
            (
                judges_training_loss and "dropout" in self.axes,
                "judged_by training and axis 'dropout', which raises the loss in training of those"
                " that have more; expected judged_by held_out",
            ),
            (
                any(rung <= 0 for rung in self.rungs or ()),
                f"rungs {self.rungs}; expected steps, or shares of a run",
            ),
        ]
        for applies, problem in problems:
            if applies:
                raise ValueError(problem)
        return self

    @property
    def sampler_name(self) -> str:
        """The name of the sampler. By default "random" if an axis is a range or `candidates` is
        set; else "grid", which tries all combinations."""
        name = self.sampler["name"] if isinstance(self.sampler, dict) else self.sampler
        return name or ("random" if self.range_axes or self.candidates else "grid")

    @property
    def range_axes(self) -> list[str]:
        """The names of the axes whose values are a range."""
        return [name for name, values in self.axes.items() if isinstance(values, Range)]

    def rung_steps(self, steps: int) -> list[int]:
        """The steps after which the weaker candidates end, in a run of `steps` steps. Raises
        `ConfigError` for a rung at or after the last step."""
        if late_rungs := [rung for rung in self.rungs or () if rung >= max(steps, 1)]:
            raise ConfigError(
                f"rung {late_rungs[0]:g} in a run of {steps} steps",
                f"less than {steps}",
                "name an earlier step, or a share such as 0.3",
            )
        rung_settings = (
            [] if self.pruner is not None else DEFAULT_RUNGS if self.rungs is None else self.rungs
        )
        steps_of_rungs = {
            max(1, round(rung if rung >= 1 else rung * steps)) for rung in rung_settings
        }
        return sorted(step for step in steps_of_rungs if step < steps)

    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def load_sweep(path: Path, **changes: Any) -> tuple[TrainConfig, Sweep]:
    """Read the configuration of a run and the section `sweep:` from a YAML file. `changes`: values
    that override those of the file, by setting; None overrides nothing. Raises `ConfigError` for an
    invalid or missing value."""
    fields = {
        **read_yaml(path),
        **{name: value for name, value in changes.items() if value is not None},
    }
    section = fields.pop("sweep", None)
    if not isinstance(section, dict):
        raise ConfigError(
            f"{path}"
            f" {'without a section' if section is None else f'with a {type(section).__name__} as'}"
            " `sweep:`",
            "what to try, as in `sweep: {axes: {rank: [4, 16]}}`",
            "add it",
        )
    return make_config(fields, str(path)), make_sweep(section, str(path))


def make_sweep(fields: dict[str, Any], source: str = "the arguments") -> Sweep:
    """Create a `Sweep` from the fields of the section `sweep:`. Raises one `ConfigError` that lists
    all validation errors. `source`: where the section stands, for the error."""
    try:
        return Sweep(**fields)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe_problem(problem) for problem in error.errors()))
    raise ConfigError(
        f"The section `sweep:` of {source} is not valid:\n"
        + "\n".join(f"  - {line}" for line in lines)
    )


def _describe_problem(problem: Any) -> str:
    """One line of text for an entry of pydantic's `ValidationError.errors()`."""
    loc_path = [
        str(component)
        for component in problem["loc"]
        if not str(component).startswith(("list[", "Range"))
    ]
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    if problem["type"] == "extra_forbidden":
        return (
            "unknown field"
            f" {loc_path[-1]!r}{nearest(loc_path[-1], [*Sweep.model_fields, *Range.model_fields])}"
        )
    return f"{'.'.join(loc_path)}: {message}" if loc_path else message


def check_sweep_support(config: TrainConfig) -> None:
    """Raise `ConfigError` if the run has a setting that a sweep does not support, or no held-out
    rows to compare the candidates on."""
    if unsupported_names := config.changed_names(UNSUPPORTED):
        raise ConfigError(
            f"{unsupported_names[0]} in a sweep",
            "candidates that share each pass of the base",
            "leave it out",
        )
    if config.eval_data is None and not config.eval_fraction:
        raise ConfigError(
            "nothing to evaluate on",
            "rows by which candidates are compared",
            "give eval_data, or eval_fraction: 0.05",
        )
