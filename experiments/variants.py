"""Variants of LoRA, each at its own best rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import veneer
from experiments.experiment import Cell, Claim, Experiment, Run, mean, spread, table
from experiments.plots import lines
from experiments.turned import ABOUT as TASK
from experiments.turned import base, by_rate, lacking, tried, tuned

STEPS, RANK, SEEDS, RATES = 120, 4, [0, 1, 2], [5e-4 * 2**i for i in range(5)]
#: of A, in LoRA+
PLUS = [rate / 8 for rate in RATES]
#: what the page calls it, and the variant of the config
NAMES = {
    "LoRA": "lora", "rsLoRA": "rslora", "DoRA": "dora", "PiSSA": "pissa", "OLoRA": "olora", "LoRA+": "lora",
}  # fmt: skip
WITHIN = 0.02
TUNED = "[Lee et al. 2026](https://arxiv.org/abs/2602.04998)"
ABOUT = f"""Lee et al. 2026 ([arXiv:2602.04998](https://arxiv.org/abs/2602.04998)) compare variants of LoRA with plain
LoRA on language models and find that they favour different rates, and that all reach the same quality within 1 to 2 %
once the rate of each is tuned.

{TASK}

{STEPS} steps of 32 rows, rank {RANK} on all linear layers, each variant with its own default alpha; LoRA+ trains B at
16 times the rate of A. Of {len(RATES)} rates, each twice the one before, the one with the least mean loss on the rows
aside over three seeds; what is said of quality was measured on the others. The rates of A in LoRA+ are an eighth of the
others': in a first run they were the same, and the lowest was the best. Decided before the runs: a variant counts as
equal if its share of images that are right is within {WITHIN} of that of plain LoRA."""


def run(cell: Cell) -> dict[str, Any]:
    """All rates and seeds of one variant."""
    lora = veneer.LoraConfig(rank=RANK, variant=NAMES[cell["variant"]])
    plus = cell["variant"] == "LoRA+"
    return {"found": tried(cell, base(cell["smoke"]), "lora", cell["steps"], lora=lora, plus=plus)}


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        few = {"rates": [1e-3], "seeds": [0], "steps": 2, "smoke": True}
        return [{"variant": name, **few} for name in ("LoRA", "PiSSA", "LoRA+")]
    shared = {"seeds": SEEDS, "steps": STEPS, "smoke": False}
    return [
        {"variant": name, "rates": PLUS if name == "LoRA+" else RATES, **shared} for name in NAMES
    ]


def tables(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        best = tuned(run["found"])
        rows.append((
            run["variant"], f"{best[0]['numbers']:,}", f"{best[0]['rate']:g}", spread(best, "right"),
            spread(best, "loss"), len(best), f"{run['cpu']:.0f} s",
        ))  # fmt: skip
    return table(
        ("variant", "trainable", "best rate", "right", "loss", "seeds", "CPU time, all rates"), rows
    )


def claims(runs: Sequence[Run]) -> list[Claim]:
    best = {run["variant"]: tuned(run["found"]) for run in runs}
    right = {name: mean(own, "right") for name, own in best.items()}
    rates = {name: own[0]["rate"] for name, own in best.items()}
    plain, whole = right["LoRA"], len(best) == len(NAMES)
    others = ", ".join(
        f"{name} {own - plain:+.3f}" for name, own in right.items() if name != "LoRA"
    )
    return [
        Claim(
            f"Once the rate is tuned, variants are within {WITHIN} of plain LoRA", TUNED,
            f"LoRA {plain:.3f}; {others}",
            all(abs(own - plain) <= WITHIN for own in right.values()) if whole else None,
        ),
        Claim(
            "Variants favour different rates", TUNED, ", ".join(f"{name} {rate:g}" for name, rate in rates.items()),
            len({*rates.values()}) > 1 if whole else None,
        ),
    ]  # fmt: skip


def plots(runs: Sequence[Run]) -> dict[str, str]:
    series = {run["variant"]: by_rate(run["found"], "right") for run in runs}
    return {"right": lines(series, x="log10 of the rate", y="right")}


EXPERIMENT = Experiment(
    title="Variants, each at its best rate",
    about=ABOUT,
    cells=cells,
    run=run,
    tables=tables,
    claims=claims,
    plots=plots,
    data=lacking,
)
