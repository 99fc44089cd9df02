"""The best rate of LoRA beside that of full fine-tuning, and by rank; and what larger batches cost
either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import veneer
from experiments.experiment import (
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
from experiments.turned import ABOUT as TASK
from experiments.turned import base, by_rate, lacking, tried, tuned

ROWS, SEEDS, RANKS, BATCHES = 3840, [0, 1, 2], (1, 4, 16, 64), (8, 32, 128)
#: each twice the one before
RATES = {"full": [2.5e-4 * 2**i for i in range(5)], "lora": [5e-4 * 2**i for i in range(6)]}
ABOUT = f"""Schulman et al. 2025 ([LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)) find that the best rate
of LoRA is about ten times that of full fine-tuning, and fifteen times in a run of few steps; that with a scale of
alpha / r it hardly depends on the rank; and that LoRA loses more than full fine-tuning does where batches are large.

{TASK}

Each run sees {ROWS:,} rows: 480 steps of 8, 120 of 32, or 30 of 128. LoRA is on all linear layers with alpha 32, of
rank 4 where batches differ. Rates are tried in steps of two, with three seeds each. The best one is that with the least
mean loss on the rows aside; what is said of quality was measured on the others. Decided before the runs: the ratio
counts as ten from 5 to 20, the best rate as the same at two ranks if it is at most one step away, and LoRA pays more
for large batches if its loss from batches of 8 to 128 rises by more than that of full fine-tuning."""


def run(cell: Cell) -> dict[str, Any]:
    """All rates and seeds of one method."""

    batch, lora = cell["batch"], None
    if cell["method"] == "lora":
        lora = veneer.LoraConfig(rank=cell["rank"], alpha=32)
    steps = cell["rows"] // batch
    return {
        "found": tried(cell, base(cell["smoke"]), cell["method"], steps, batch=batch, lora=lora)
    }


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        few = {"rates": [1e-3], "seeds": [0], "rows": 32, "smoke": True}
        shapes = [("full", 0, 8), ("full", 0, 16), ("lora", 2, 8), ("lora", 2, 16)]
        return [
            {"method": method, "rank": rank, "batch": batch, **few}
            for method, rank, batch in shapes
        ]
    shapes = [("full", 0, 32), *(("lora", rank, 32) for rank in RANKS)]
    shapes += [
        (method, 4 if method == "lora" else 0, batch) for batch in (8, 128) for method in RATES
    ]
    return [
        {
            "method": method, "rank": rank, "batch": batch, "rates": RATES[method], "seeds": SEEDS, "rows": ROWS,
            "smoke": False,
        }
        for method, rank, batch in shapes
    ]  # fmt: skip


def name_of(run: Run) -> str:
    return "full fine-tuning" if run["method"] == "full" else f"LoRA, rank {run['rank']}"


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        best = tuned(run["found"])
        rows.append((
            name_of(run), run["batch"], f"{best[0]['numbers']:,}", f"{best[0]['rate']:g}", spread(best, "loss"),
            spread(best, "right"), len(best),
        ))  # fmt: skip
    return table(("method", "batch", "trainable", "best rate", "loss", "right", "seeds"), rows)


def claims(runs: Sequence[Run]) -> list[Claim]:
    first = runs[0]["batch"]  # in which ranks are compared
    rate = {run["rank"]: tuned(run["found"])[0]["rate"] for run in runs if run["batch"] == first}
    full = rate.pop(0)
    ratio = math.exp(sum(math.log(own / full) for own in rate.values()) / len(rate))
    whole = len(rate) == len(RANKS)
    rise = {}
    for method in RATES:
        by_batch = max(
            grouped((run for run in runs if run["method"] == method), "rank").values(), key=len
        )
        loss = {run["batch"]: mean(tuned(run["found"]), "loss") for run in by_batch}
        rise[method] = loss[max(loss)] - loss[min(loss)]
        sizes = f"{min(loss)} to {max(loss)}"
    return [
        Claim(
            "LoRA's best rate is about ten times that of full fine-tuning", REGRET,
            f"{ratio:.1f} times (geometric mean over ranks), full {full:g}", 5 <= ratio <= 20 if whole else None,
        ),
        Claim(
            "With a scale of alpha / r the best rate hardly depends on the rank", REGRET,
            ", ".join(f"rank {rank}: {own:g}" for rank, own in rate.items()),
            max(rate.values()) <= 2.01 * min(rate.values()) if whole else None,
        ),
        Claim(
            "LoRA loses more by large batches than full fine-tuning does", REGRET,
            f"loss from batches of {sizes}: LoRA {rise['lora']:+.3f}, full {rise['full']:+.3f}",
            rise["lora"] > rise["full"] if whole else None,
        ),
    ]  # fmt: skip


def plots(runs: Sequence[Run]) -> dict[str, str]:
    most = [run for run in runs if run["batch"] == runs[0]["batch"]]
    series = {name_of(run): by_rate(run["found"], "loss") for run in most}
    return {"loss": lines(series, x="log10 of the rate", y="loss", top=3.0)}


EXPERIMENT = Experiment(
    title="The best rate, by rank and by batch",
    about=ABOUT,
    cells=cells,
    run=run,
    tables=tables,
    claims=claims,
    plots=plots,
    data=lacking,
)
