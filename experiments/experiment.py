"""What an experiment is: cells to run, what a run of one is, and what is said of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: whose claims several experiments try
HU = "[Hu et al. 2021](https://arxiv.org/abs/2106.09685)"
REGRET = "[Schulman et al. 2025](https://thinkingmachines.ai/blog/lora/)"
#: what one run is told, all of it, as JSON: {"method": "lora", "rank": 8, "seed": 0, "steps": 300}
Cell = dict[str, Any]
#: a cell and what its run measured; "cpu": seconds of its process
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One sentence that somebody says of LoRA, and what was found here. `held` is None where this
    size cannot tell.

    `what` and `found` are Markdown for a cell of a table; `source` names the paper and its table,
    with a link."""

    what: str
    source: str
    found: str
    held: bool | None


@dataclass(frozen=True)
class Experiment:
    """`cells(smoke)`: the runs, in the order in which they are made; of a smoke size, seconds in
    all, on tiny models and made-up rows, in the tests. `run(cell)`: one run, in a process of its
    own on one thread; what it returns is JSON. `tables(runs)`: Markdown, with seeds, spread and
    cost. `claims(runs)`: what was claimed, and whether it held. `plots(runs)`: drawings by name, as
    `plots.py` makes them; the page shows them in this order.

    `about`: Markdown for the head of the page: which table of which paper this stands for, the
    task, its data, what all runs have in common. `full`: files of `full/`. `data`: why it cannot
    run here, or None if it can."""

    title: str
    about: str
    cells: Callable[[bool], list[Cell]]
    run: Callable[[Cell], dict[str, Any]]
    tables: Callable[[Sequence[Run]], str]
    claims: Callable[[Sequence[Run]], list[Claim]]
    plots: Callable[[Sequence[Run]], dict[str, str]] = lambda runs: {}
    full: tuple[str, ...] = ()
    data: Callable[[], str | None] = lambda: None


def grouped(runs: Iterable[Run], *keys: str) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by the values of `keys`, in the order in which these first came."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run[key] for key in keys), []).append(run)
    return found


def mean(runs: Sequence[Run], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def deviation(runs: Sequence[Run], key: str) -> float:
    """Of one run from another, over seeds; 0 for one run."""
    return statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0


def spread(runs: Sequence[Run], key: str, digits: int = 3) -> str:
    """Mean ± standard deviation over the runs."""
    return f"{mean(runs, key):.{digits}f} ± {deviation(runs, key):.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True) -> str:
    """A Markdown table: the first column to the left, the others, if they hold numbers, to the
    right."""
    lines = [
        f"| {' | '.join(head)} |",
        "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
