"""The rule that decides a claim, and the record of an experiment's runs.

An experiment compares arms. The learning rate of an arm is chosen on rows aside, with seeds of
their own, from a grid that grows until its best rate lies inside it; all arms get as many grid
points and the same budget. Results are reported on other rows, with at least three other seeds. A
claim ends in one of three ways: it held, it did not hold, or it cannot be told at this size. The
95 % interval of Student's t over the seeds decides which.

`Tuned.check` and `Fixed.check` raise `RuleError` for runs that break the rule, so that no page is
printed from them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts import charts

from veneer.errors import sentence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
#: runs of experiments that are not complete yet
UNFINISHED = ROOT / "build" / "experiments"

HELD, FAILED, OPEN = "held", "did not hold", "cannot be told at this size"
#: seeds of the results, and of the choice of a rate
SEEDS, CHOOSING_SEEDS, FEWEST = (0, 1, 2), (100,), 3
LONGEST_GRID = 12
#: 97.5 % quantiles of Student's t, for 2 to 10 values
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

HU = "[Hu et al. 2021](https://arxiv.org/abs/2106.09685)"
REGRET = "[Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/)"

#: settings of one run, as JSON; and these settings with the numbers of the run
Cell = dict[str, Any]
Run = Mapping[str, Any]


class RuleError(Exception):
    """The runs do not allow a claim."""


# ---- cells and runs ------------------------------------------------------------------------------


def cell_id(cell: Cell) -> str:
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def index_runs(runs: Iterable[Run]) -> dict[str, Run]:
    return {run["cell"]: run for run in runs}


def score_of(run: Run) -> float:
    """The number by which a rate is chosen, the lower the better; infinite for a run that
    diverged."""
    score = run["aside"]
    return math.inf if score is None or math.isnan(score) else score


def group_runs(runs: Iterable[Run], *keys: str) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by the values of `keys`, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


# ---- plans ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """Arms, each at its best rate.

    `arms`: the settings of each arm by its name; `rates`: the grid that each starts from; `shared`:
    settings of all arms. A rate next to the grid differs by `factor`. `budget`: the setting that
    must be equal for all arms. `score`: the name of the score, which is shown times `sign`; scores
    from `worst` up are not drawn.
    """

    arms: Mapping[str, Cell]
    rates: Mapping[str, Sequence[float]]
    shared: Cell = field(default_factory=dict)
    factor: float = 2.0
    seeds: Sequence[int] = SEEDS
    choosing_seeds: Sequence[int] = CHOOSING_SEEDS
    budget: str = "steps"
    score: str = "loss"
    sign: float = 1.0
    worst: float = math.inf

    def cell(self, arm: str, rate: float, seed: int) -> Cell:
        return {"arm": arm, **self.shared, **self.arms[arm], "rate": rate, "seed": seed}

    def missing_cells(self, runs: Sequence[Run]) -> list[Cell]:
        """The runs to make next; empty if the experiment is complete."""
        length = 0
        while True:
            grids = {arm: self._grow_grid(arm, runs, length) for arm in self.arms}
            missing = [cell for _, cells in grids.values() for cell in cells]
            if missing:
                return missing
            longest = max(len(rates) for rates, _ in grids.values())
            if longest == length:
                break
            length = longest
        index = index_runs(runs)
        cells = [
            self.cell(arm, self.best_rate(arm, runs), seed)
            for seed in self.seeds
            for arm in self.arms
        ]
        return [cell for cell in cells if cell_id(cell) not in index]

    def _grow_grid(
        self, arm: str, runs: Sequence[Run], length: int
    ) -> tuple[list[float], list[Cell]]:
        """The grid of an arm with at least `length` rates, and its runs that are missing."""
        index, rates = index_runs(runs), sorted(self.rates[arm])
        while True:
            cells = [self.cell(arm, rate, seed) for rate in rates for seed in self.choosing_seeds]
            missing = [cell for cell in cells if cell_id(cell) not in index]
            if missing:
                return rates, missing
            scores = {rate: self._scores(arm, rate, index) for rate in rates}
            side = edge_of_best(scores)
            if side == 0 and len(rates) >= length:
                return rates, []
            if len(rates) >= LONGEST_GRID:
                problem = f"no best rate of {arm!r} inside {rates}"
                wanted = f"a best rate inside a grid of at most {LONGEST_GRID} rates"
                raise RuleError(sentence(problem, wanted, "start from other rates"))
            if side == 0:
                position = rates.index(best_of(scores))
                side = -1 if position < len(rates) / 2 else 1
            rates = extend_grid(rates, side, self.factor)

    def _scores(self, arm: str, rate: float, index: Mapping[str, Run]) -> list[float]:
        cells = [self.cell(arm, rate, seed) for seed in self.choosing_seeds]
        return [score_of(index[cell_id(cell)]) for cell in cells]

    def scores(self, arm: str, runs: Sequence[Run]) -> dict[float, list[float]]:
        """The score of each choosing seed by rate, for all rates that were tried."""
        index = index_runs(runs)
        rates = sorted({run["rate"] for run in runs if run["arm"] == arm})
        return {
            rate: self._scores(arm, rate, index)
            for rate in rates
            if all(cell_id(self.cell(arm, rate, seed)) in index for seed in self.choosing_seeds)
        }

    def best_rate(self, arm: str, runs: Sequence[Run]) -> float:
        """The rate with the best mean score over the choosing seeds."""
        return best_of(self.scores(arm, runs))

    def best_rates(self, arm: str, runs: Sequence[Run]) -> list[float]:
        """The best rate of each choosing seed by itself."""
        scores = self.scores(arm, runs)
        return [
            min(scores, key=lambda rate: scores[rate][number])
            for number in range(len(self.choosing_seeds))
        ]

    def results(self, arm: str, runs: Sequence[Run]) -> list[Run]:
        """The runs of the reporting seeds at the best rate, by seed."""
        index, rate = index_runs(runs), self.best_rate(arm, runs)
        ids = [cell_id(self.cell(arm, rate, seed)) for seed in self.seeds]
        return [index[key] for key in ids if key in index]

    def check(self, runs: Sequence[Run]) -> None:
        """Raise RuleError unless each arm has its best rate inside its grid, as many rates and the
        same budget as all others, and at least three reporting seeds that chose nothing."""
        problems = []
        grids = {arm: self.scores(arm, runs) for arm in self.arms}
        for arm, scores in grids.items():
            if len(scores) < FEWEST or edge_of_best(scores):
                problems.append(f"{arm}: the best rate is at an edge of {sorted(scores)}")
                continue
            seeds = {run["seed"] for run in self.results(arm, runs)}
            if len(seeds) < FEWEST:
                problems.append(f"{arm}: {len(seeds)} seeds of results")
            if seeds & set(self.choosing_seeds):
                problems.append(f"{arm}: a rate is reported on the seeds that chose it")
        if len({len(scores) for scores in grids.values()}) > 1:
            problems.append("the arms have grids of different lengths")
        if len({{**self.shared, **cell}[self.budget] for cell in self.arms.values()}) > 1:
            problems.append(f"the arms differ in {self.budget}")
        refuse(problems)


@dataclass(frozen=True)
class Fixed:
    """Cells whose settings nothing chooses. `exact`: they are counted, so that seeds would change
    nothing."""

    cells: Sequence[Cell]
    exact: bool = False

    def missing_cells(self, runs: Sequence[Run]) -> list[Cell]:
        index = index_runs(runs)
        return [cell for cell in self.cells if cell_id(cell) not in index]

    def check(self, runs: Sequence[Run]) -> None:
        """Raise RuleError unless each setting has at least three seeds."""
        seeds: dict[str, set[int]] = {}
        index = index_runs(runs)
        for cell in () if self.exact else self.cells:
            setting = {key: value for key, value in cell.items() if key != "seed"}
            group = seeds.setdefault(json.dumps(setting), set())
            if cell_id(cell) in index:
                group.add(cell["seed"])
        refuse(
            f"{setting}: {len(group)} seeds"
            for setting, group in seeds.items()
            if len(group) < FEWEST
        )


def refuse(problems: Iterable[str]) -> None:
    if problems := [*problems]:
        wanted = f"best rates inside grids of one length, one budget, at least {FEWEST} seeds"
        raise RuleError(sentence("; ".join(problems), wanted, "run the experiment again"))


def best_of(scores: Mapping[float, Sequence[float]]) -> float:
    return min(scores, key=lambda rate: statistics.mean(scores[rate]))


def edge_of_best(scores: Mapping[float, Sequence[float]]) -> int:
    """-1 if a best rate is the lowest of the grid, 1 if it is the highest, 0 if it lies inside: of
    the mean over the choosing seeds, and of each of these by itself."""
    rates = sorted(scores)
    columns = [[statistics.mean(scores[rate]) for rate in rates]]
    columns += [list(column) for column in zip(*(scores[rate] for rate in rates), strict=True)]
    for column in columns:
        position = column.index(min(column))
        if position == 0:
            return -1
        if position == len(rates) - 1:
            return 1
    return 0


def extend_grid(rates: Sequence[float], side: int, factor: float) -> list[float]:
    """One more rate below (-1) or above (1), rounded so that a record names it exactly."""
    if side < 0:
        return [float(f"{rates[0] / factor:.6g}"), *rates]
    return [*rates, float(f"{rates[-1] * factor:.6g}")]


# ---- verdicts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A sentence that a paper says of LoRA, and its end. `text` and `evidence` are Markdown for
    cells of a table."""

    text: str
    source: str
    evidence: str
    verdict: str


def mean(runs: Sequence[Run], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    quantile = T_QUANTILES[min(len(values), len(T_QUANTILES) + 1) - 2]
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def exceeds(values: Sequence[float], limit: float = 0.0) -> str:
    """The end of a claim that a number is above `limit`, from its value for each seed."""
    if len(values) < FEWEST:
        return OPEN
    middle, half = interval(values)
    if middle - half > limit:
        return HELD
    return FAILED if middle + half < limit else OPEN


def stays_within(values: Sequence[float], margin: float) -> str:
    """The end of a claim that a number is at most `margin` away from 0."""
    if len(values) < FEWEST:
        return OPEN
    middle, half = interval(values)
    if abs(middle) + half <= margin:
        return HELD
    return FAILED if abs(middle) - half > margin else OPEN


def all_of(verdicts: Iterable[str]) -> str:
    """The end of a claim with several parts: held if each is, not held if one is not."""
    verdicts = [*verdicts]
    if FAILED in verdicts:
        return FAILED
    return HELD if verdicts and set(verdicts) == {HELD} else OPEN


def differences(runs: Sequence[Run], baseline: Sequence[Run], key: str) -> list[float]:
    """`runs` minus `baseline`, seed by seed."""
    by_seed = {run["seed"]: run[key] for run in baseline}
    return [run[key] - by_seed[run["seed"]] for run in runs if run["seed"] in by_seed]


def show(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± half of the 95 % interval."""
    middle, half = interval(values)
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"


def show_runs(runs: Sequence[Run], key: str, digits: int = 3) -> str:
    """`show` for a number of runs that may be missing in some of them."""
    values = [run[key] for run in runs if run[key] is not None]
    return show(values, digits) if values else "–"


# ---- tables and plots ----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: bool = True) -> str:
    """A Markdown table; all columns but the first are aligned to the right if they are numeric."""
    rule = "|---|" + ("---:|" if numeric else "---|") * (len(head) - 1)
    lines = [f"| {' | '.join(head)} |", rule]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def results_table(plan: Tuned, runs: Sequence[Run], columns: Mapping[str, str]) -> str:
    """A row for each arm at its best rate. `columns`: headings of the numbers of a run, by key."""
    rows = []
    for arm in plan.arms:
        results = plan.results(arm, runs)
        numbers = (f"{mean(results, 'numbers'):,.0f}", f"{plan.best_rate(arm, runs):g}")
        cells = (show_runs(results, key) for key in columns)
        rows.append((arm, *numbers, *cells, f"{mean(results, 'cpu'):.1f} s"))
    head = ("", "numbers trained", "best rate", *columns.values(), "CPU a run")
    note = f"Mean ± half of the 95 % interval over {len(plan.seeds)} seeds."
    return f"{table(head, rows)}\n\n{note}"


def rates_table(plan: Tuned, runs: Sequence[Run]) -> str:
    """The scores by which rates were chosen."""
    rows = []
    for arm in plan.arms:
        best, cells = plan.best_rate(arm, runs), []
        for rate, values in plan.scores(arm, runs).items():
            score = statistics.mean(values)
            text = f"{plan.sign * score:.3f}" if score < plan.worst else "–"
            cells.append(f"**{rate:g}: {text}**" if rate == best else f"{rate:g}: {text}")
        rows.append((arm, ", ".join(cells)))
    seeds = ", ".join(map(str, plan.choosing_seeds))
    lead = f"Rates and their {plan.score} on the rows aside, seed {seeds}; the best is in bold:"
    return f"{lead}\n\n{table(('', 'rate: score'), rows, numeric=False)}"


def rates_plot(plan: Tuned, runs: Sequence[Run]) -> str:
    series = {
        arm: [
            (math.log10(rate), plan.sign * statistics.mean(values))
            for rate, values in plan.scores(arm, runs).items()
            if statistics.mean(values) < plan.worst
        ]
        for arm in plan.arms
    }
    return charts.lines_file(series, x="log10 of the rate", y=f"{plan.score}, aside", bottom=None)


# ---- experiments and their records ---------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A page of docs/paper/.

    `run(cell)` makes one run, on one thread, and returns its numbers as JSON; "numbers" is the
    count of trained parameters, and "aside" the score by which a rate is chosen. `columns`:
    headings of the numbers that the table of results shows, by key. `tables(runs)`: further
    Markdown. `plots(runs)`: SVG texts by name. `toy`: settings that make a run small enough for a
    test. `earlier`: what the page showed before the rule. `full`: files of `full/`.
    `missing_data()`: why it cannot run here, or None.
    """

    title: str
    about: str
    plan: Tuned | Fixed
    run: Callable[[Cell], dict[str, Any]]
    claims: Callable[[Sequence[Run]], list[Claim]]
    columns: Mapping[str, str] = field(default_factory=dict)
    tables: Callable[[Sequence[Run]], str] = lambda runs: ""
    plots: Callable[[Sequence[Run]], dict[str, str]] = lambda runs: {}
    toy: Cell = field(default_factory=dict)
    earlier: str = ""
    full: tuple[str, ...] = ()
    missing_data: Callable[[], str | None] = lambda: None


def run_cell(experiment: Experiment, cell: Cell) -> Run:
    start = time.process_time()
    numbers = replace_infinite(experiment.run(cell))
    gc.collect()
    seconds = round(time.process_time() - start, 1)
    return {**cell, **numbers, "cpu": seconds, "cell": cell_id(cell)}


def replace_infinite(numbers: Any) -> Any:
    """JSON has no infinity: null stands for what is not finite."""
    if isinstance(numbers, dict):
        return {key: replace_infinite(number) for key, number in numbers.items()}
    if isinstance(numbers, list | tuple):
        return [replace_infinite(number) for number in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers


def complete_runs(
    experiment: Experiment, runs: list[Run], run: Callable[[Cell], Run], save: Callable[[], None]
) -> None:
    """Make the missing runs, round after round, and save after each."""
    while cells := experiment.plan.missing_cells(runs):
        for cell in cells:
            runs.append(json.loads(json.dumps(run(cell))))
            save()


def record(name: str, experiment: Experiment, *, fresh: bool = False) -> Path:
    """Run what is missing of an experiment and write results/NAME.json. A run that was stopped
    goes on where it was, unless `fresh` starts over."""
    import torch
    from benchmarks.runner import machine

    torch.set_num_threads(1)
    unfinished, runs = UNFINISHED / f"{name}.json", []
    if unfinished.exists() and not fresh:
        runs = json.loads(unfinished.read_text())

    def run_and_print(cell: Cell) -> Run:
        run = run_cell(experiment, cell)
        print(f"  {name} {json.dumps(cell)}: {run['cpu']} s", flush=True)
        return run

    complete_runs(experiment, runs, run_and_print, lambda: write_json(unfinished, runs))
    return write_json(RESULTS / f"{name}.json", {"name": name, "runs": runs, **machine()})


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    return temporary.replace(path)
