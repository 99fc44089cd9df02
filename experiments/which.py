"""Tables 5 and 6 of the LoRA paper: which weights, and which rank. `veneer sweep`, on digits turned
by a quarter."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.experiment import (
    HU,
    REGRET,
    Cell,
    Claim,
    Experiment,
    Run,
    grouped,
    mean,
    spread,
    table,
)
from experiments.plots import lines
from experiments.turned import lacking

STEPS, SEEDS = 120, [0, 1, 2, 3, 4]
TRIED = [1e-3, 2e-3, 4e-3, 8e-3]
WEIGHTS: dict[str, str | list[str]] = {
    "query": ["q_proj"], "key": ["k_proj"], "value": ["v_proj"], "output": ["o_proj"],
    "query, value": ["q_proj", "v_proj"], "all of attention": "attention", "feed-forward": "mlp",
    "all linear layers": "all-linear",
}  # fmt: skip
RANKS = (1, 2, 4, 8, 64)
#: weights and rank; those of EQUAL train as many numbers
EQUAL = (
    ("query", 8), ("key", 8), ("value", 8), ("output", 8), ("query, value", 4), ("all of attention", 2),
    ("feed-forward", 2), ("all linear layers", 1),
)  # fmt: skip
SETTINGS = (
    *EQUAL,
    *((name, rank) for name in ("query, value", "all linear layers") for rank in RANKS),
)
#: settings that were best at the highest of TRIED, and for which this rate was tried as well
EDGE = (*(one for one in EQUAL[:5]), *(("query, value", rank) for rank in (1, 8, 64)))
FURTHER = 1.6e-2
#: the best rate of each setting, on the rows aside
RATES: dict[tuple[str, int], float] = {
    ("query", 8): 8e-3, ("key", 8): 1.6e-2, ("value", 8): 8e-3, ("output", 8): 8e-3, ("query, value", 4): 8e-3,
    ("all of attention", 2): 4e-3, ("feed-forward", 2): 4e-3, ("all linear layers", 1): 2e-3,
    ("query, value", 1): 8e-3, ("query, value", 2): 4e-3, ("query, value", 8): 8e-3, ("query, value", 64): 8e-3,
    ("all linear layers", 2): 4e-3, ("all linear layers", 4): 4e-3, ("all linear layers", 8): 4e-3,
    ("all linear layers", 64): 4e-3,
}  # fmt: skip
ABOUT = """Tables 5 and 6 of [Hu et al. 2021](https://arxiv.org/abs/2106.09685) ask which weights of GPT-3 to adapt at
equal trainable numbers, and with which rank, on WikiSQL and MNLI. Here: the 1,797 handwritten digits of scikit-learn
for a ViT of four blocks, 64 wide, feed-forward 192 (so that these settings train the very same number of parameters),
trained on 700 of them upright and then adapted to others that are turned by a quarter: 400 to train on, 497 that judge.
The head is frozen.

Each setting is a `veneer sweep`, whose candidates share the base: of four rates with one seed (of a fifth, where the
highest was the best), judged by 200 rows that no run trains on; then of five seeds at the best of these rates. 120
steps of 32 rows, AdamW without weight decay, a rate that rises over a tenth of the steps and then falls to 0, alpha 32.
The comparisons were decided before the runs: means over seeds of the images that are right."""


def run(cell: Cell) -> dict[str, Any]:
    """A sweep for each setting: of rates, or of seeds."""
    from experiments.turned import base, swept, turned, write

    smoke, found = cell["smoke"], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, aside, test = turned(smoke)
        write(folder, base(smoke), train=train, judge=test if cell["judged"] == "test" else aside)
        for weights, rank, rate in cell["settings"]:
            axes = {"learning_rate": [rate] if rate else TRIED, "seed": cell["seeds"]}
            own = swept(folder, axes, steps=cell["steps"], targets=WEIGHTS[weights], rank=rank)
            found += [{"weights": weights, "rank": rank, **one} for one in own]
    return {"found": found}


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        settings = [("all linear layers", 1, 1e-3)]
        return [{"judged": "test", "settings": settings, "seeds": [0], "steps": 2, "smoke": True}]
    own = [*dict.fromkeys(SETTINGS)]
    tried = {"judged": "aside", "settings": [(*one, None) for one in own], "seeds": [100]}
    further = {"judged": "aside", "settings": [(*one, FURTHER) for one in EDGE], "seeds": [100]}
    judged = {
        "judged": "test",
        "settings": [(*one, RATES[one]) for one in own if one in RATES],
        "seeds": SEEDS,
    }
    return [
        {**one, "steps": STEPS, "smoke": False}
        for one in (tried, further, judged)
        if one["settings"]
    ]


def judged(runs: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """By weights and rank."""
    found = [one for run in runs if run["judged"] == "test" for one in run["found"]]
    return {(name, rank): own for (name, rank), own in grouped(found, "weights", "rank").items()}


def tables(runs: Sequence[Run]) -> str:
    own = judged(runs)

    def part(settings: Sequence[tuple[str, int]]) -> str:
        rows = [
            (
                name, rank, f"{mean(own[name, rank], 'numbers'):,.0f}", f"{own[name, rank][0]['learning_rate']:g}",
                spread(own[name, rank], "right"), spread(own[name, rank], "loss"),
            )
            for name, rank in settings
            if (name, rank) in own
        ]  # fmt: skip
        return table(("weights", "rank", "trainable", "rate", "right", "loss"), rows)

    ranks = [(name, rank) for name in ("query, value", "all linear layers") for rank in RANKS]
    seeds = max(map(len, own.values()))
    parts = (
        f"Mean ± deviation over {seeds} seeds. At equal numbers:",
        part(EQUAL),
        "By rank:",
        part(ranks),
    )
    return "\n\n".join(parts)


def claims(runs: Sequence[Run]) -> list[Claim]:
    own = {one: mean(found, "right") for one, found in judged(runs).items()}
    full = all(one in own for one in SETTINGS)

    def said(*settings: tuple[str, int]) -> str:
        return ", ".join(
            f"{name}, rank {rank}: {own[name, rank]:.3f}"
            for name, rank in settings
            if (name, rank) in own
        )

    def beats(one: tuple[str, int], *others: tuple[str, int]) -> bool | None:
        return all(own[one] > own[other] for other in others) if full else None

    every, attention, pair = ("all linear layers", 1), ("all of attention", 2), ("query, value", 4)
    single = [("query", 8), ("key", 8)]
    small = [(name, 1) for name in ("query, value", "all linear layers")]
    enough = all(own[one] >= own[one[0], 64] - 0.01 for one in small) if full else None
    return [
        Claim(
            "At equal numbers, all linear layers beat attention alone", REGRET, said(every, attention, pair),
            beats(every, attention, pair),
        ),
        Claim(
            "At equal numbers, query and value together beat query or key alone", f"{HU}, table 5",
            said(pair, *single), beats(pair, *single),
        ),
        Claim(
            "Rank 1 is enough: within 0.01 of rank 64, on query and value and on all layers", f"{HU}, table 6",
            said(*(setting for one in small for setting in (one, (one[0], 64)))), enough,
        ),
    ]  # fmt: skip


def plots(runs: Sequence[Run]) -> dict[str, str]:
    own = judged(runs)
    series = {
        name: [
            (math.log2(rank), mean(own[name, rank], "right"))
            for rank in RANKS
            if (name, rank) in own
        ]
        for name in ("query, value", "all linear layers")
    }
    return {
        "rank": lines(
            {name: points for name, points in series.items() if points},
            x="log2 of the rank",
            y="right",
            bottom=None,
        )
    }


EXPERIMENT = Experiment(
    title="Which weights, which rank",
    about=ABOUT,
    cells=cells,
    run=run,
    tables=tables,
    claims=claims,
    plots=plots,
    full=("which.yaml",),
    data=lacking,
)
