"""How much an adapter can hold: random rows to remember, by rank, beside full fine-tuning."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import veneer
from experiments.experiment import REGRET, Cell, Claim, Experiment, Run, mean, spread, table
from experiments.loop import batches_of, begin, train, trained
from experiments.plots import lines

#: symbols of a completion and of a key; how many of each a row has
SYMBOLS, OTHERS, KEY, LENGTH = 32, 32, 3, 8
BITS = LENGTH * math.log2(SYMBOLS)
# : the seed whose rows the base learnt, the one by whose rows a rate is chosen, and those of the
# rows that judge
BASE, CHOOSING, JUDGING = 1000, 0, [11, 12]
RANKS, ROWS, STEPS, BATCH, RATES = (1, 4, 16), (64, 256, 1024), 1000, 32, [2e-3, 4e-3, 8e-3]
WITHIN, BEHIND, FEWER, LEARNT, MORE = 0.05, 0.2, 4, 0.95, 0.1
ABOUT = f"""Schulman et al. 2025 ([LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)) find that LoRA keeps up
with full fine-tuning while the numbers that it trains exceed the information to be learnt, and learns less efficiently
beyond. So that the information is known exactly, there is nothing here to learn but by heart: a row is a key of {KEY}
random symbols and a completion of {LENGTH} others, each of them one of {SYMBOLS} by chance: {BITS:.0f} bits a row. The
measure is the share of it that is remembered, of the very rows that were trained on: 1 - loss / log {SYMBOLS}, which is
0 for chance and 1 for all. No rows are held out, as nothing could be known of them.

The base is a Llama of ours (two blocks, 64 wide, feed-forward 192) that has learnt 512 such rows of other keys and
completions, so that it knows the form. LoRA is on all linear layers of the blocks, with alpha 32; full fine-tuning
trains embeddings and head as well. All have {STEPS:,} steps of {BATCH} rows, AdamW without weight decay, a rate that
rises over a tenth of the steps and then falls to 0, gradients clipped to a norm of 1. Each rank meets rows of as many
bits as it has numbers, and rows of 4 and 16 times as many, or as few. The rate of each method, rank and size is the
best of {len(RATES)} on the rows of one seed; what is said was measured on those of {len(JUDGING)} others.

Decided before the recorded runs, but after trials with other seeds, from which steps, batch and rates are and in which
rank 16 had 0.48 to 0.82 of 1,024 rows at rates where it learnt. The first claim
holds if LoRA with at least as many numbers as bits remembers at most {WITHIN} less than full fine-tuning, the second if
LoRA with a quarter as many or fewer remembers at least {BEHIND} less, each for all pairs of rank and size. A size of
which full fine-tuning remembers less than {LEARNT} tells nothing: there, steps are what lacks. The third is the first
with tokens for bits: by that report a token of text has about one bit; here it has {math.log2(SYMBOLS):.0f}. The
fourth (no floor, but slower learning) holds if twice the steps, at the same rate, win at least a tenth of what was not
yet remembered, for each rank that was tried so."""


def rows_of(count: int, seed: int) -> Tensor:
    """[count, KEY + LENGTH]: keys that differ, and what belongs to each."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(OTHERS**KEY, generator=draw)[:count, None]
    keys = SYMBOLS + chosen // OTHERS ** torch.arange(KEY) % OTHERS
    return torch.cat([keys, torch.randint(SYMBOLS, (count, LENGTH), generator=draw)], 1)


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """Of the completions alone, in nats a symbol."""
    logits = model(input_ids=rows[:, :-1]).logits[:, KEY - 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, KEY:].flatten())


def base(smoke: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, count, steps = (16, 1, 16, 2) if smoke else (64, 2, 512, 300)
    config = LlamaConfig(
        vocab_size=SYMBOLS + OTHERS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16, use_cache=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    rows = rows_of(count, BASE)
    batches = batches_of(count, 128, 0)
    train(
        model.parameters(),
        batches,
        lambda chosen: loss_of(model, rows[chosen]),
        steps=steps,
        rate=3e-3,
    )
    return model


def remembered(model: Any, cell: Cell, rate: float, seed: int) -> dict[str, Any]:
    """A copy of `model`, trained on the rows of a seed: the share of their bits that it has
    then."""
    rows, model = rows_of(cell["rows"], seed), copy.deepcopy(model)
    torch.manual_seed(seed)
    lora = veneer.LoraConfig(rank=cell["rank"], alpha=32) if cell["rank"] else None
    numbers = begin(model, "lora" if lora else "full", lora=lora)
    batches = batches_of(cell["rows"], cell["batch"], seed)
    train(
        trained(model),
        batches,
        lambda chosen: loss_of(model, rows[chosen]),
        steps=cell["steps"],
        rate=rate,
    )
    with torch.no_grad():
        share = 1 - loss_of(model, rows).item() / math.log(SYMBOLS)
    return {"rate": rate, "seed": seed, "numbers": numbers, "share": share}


def run(cell: Cell) -> dict[str, Any]:
    """One rank (0: full fine-tuning) and number of rows: all rates on the rows that choose, the
    best on the others."""
    model = base(cell["smoke"])
    tried = [remembered(model, cell, rate, CHOOSING) for rate in cell["rates"]]
    rate = max(tried, key=lambda one: one["share"])["rate"]
    judged = [remembered(model, cell, rate, seed) for seed in cell["seeds"]]
    twice = {**cell, "steps": 2 * cell["steps"]}
    longer = [remembered(model, twice, rate, seed) for seed in cell["seeds"] if cell["longer"]]
    return {
        "numbers": judged[0]["numbers"],
        "rate": rate,
        "tried": tried,
        "judged": judged,
        "longer": longer,
    }


def cells(smoke: bool) -> list[Cell]:
    same = {"steps": STEPS, "batch": BATCH, "rates": RATES, "seeds": JUDGING, "smoke": False}
    if smoke:
        same = {"steps": 2, "batch": 8, "rates": [4e-3], "seeds": [11], "smoke": True}
        return [{"rows": 8, "rank": rank, "longer": rank == 1, **same} for rank in (0, 1)]
    return [
        {"rows": rows, "rank": rank, "longer": rows == max(ROWS) and rank in RANKS[1:], **same}
        for rows in ROWS
        for rank in (0, *RANKS)
    ]


def bits_of(run: Run) -> float:
    return run["rows"] * BITS


def name_of(run: Run) -> str:
    return f"LoRA, rank {run['rank']}" if run["rank"] else "full fine-tuning"


def rate_of(run: Run) -> str:
    return f"{run['rate']:g}{' *' * (run['rate'] in (min(run['rates']), max(run['rates'])))}"


def tables(runs: Sequence[Run]) -> str:
    found = [
        (
            name_of(run), f"{run['rows']:,}", f"{bits_of(run):,.0f}", f"{run['numbers']:,}",
            f"{run['numbers'] / bits_of(run):.3g}", rate_of(run), spread(run["judged"], "share"),
            f"{mean(run['judged'], 'share') * bits_of(run) / run['numbers']:.2f}", f"{run['cpu']:.0f} s",
        )
        for run in runs
    ]  # fmt: skip
    head = (
        "method",
        "rows",
        "bits",
        "numbers",
        "numbers / bits",
        "best rate",
        "remembered",
        "bits a number",
        "CPU",
    )
    seeds = f"Mean ± deviation over {len(runs[0]['judged'])} seeds. The CPU time is of all rates and seeds."
    seeds += " A rate with a * is the lowest or the highest that was tried: there may be a better one beyond."
    longer = [
        (
            name_of(run),
            f"{run['rows']:,}",
            spread(run["judged"], "share"),
            spread(run["longer"], "share"),
        )
        for run in runs
        if run["longer"]
    ]
    twice = table(("method", "rows", f"{runs[0]['steps']:,} steps", "twice as many"), longer)
    return f"{table(head, found)}\n\n{seeds}\n\nRemembered after more steps:\n\n{twice}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    whole = {run["rows"]: mean(run["judged"], "share") for run in runs if not run["rank"]}
    pairs = [run for run in runs if run["rank"] and whole[run["rows"]] >= LEARNT]

    def behind(chosen: list[Run]) -> tuple[list[float], str]:
        """How much less each remembers than full fine-tuning, and what to say of it."""
        gaps = [whole[run["rows"]] - mean(run["judged"], "share") for run in chosen]
        return gaps, "; ".join(
            f"rank {run['rank']}, {run['rows']:,} rows: {gap:.3f} less"
            for run, gap in zip(chosen, gaps, strict=True)
        )

    enough, said_enough = behind([run for run in pairs if run["numbers"] >= bits_of(run)])
    few, said_few = behind([run for run in pairs if FEWER * run["numbers"] <= bits_of(run)])
    tokens, said_tokens = behind([run for run in pairs if run["numbers"] >= LENGTH * run["rows"]])
    longer = [
        (name_of(run), (mean(run["judged"], "share"), mean(run["longer"], "share")))
        for run in runs
        if run["longer"]
    ]
    nothing = "no size that full fine-tuning learnt"
    return [
        Claim(
            "LoRA equals full fine-tuning while its numbers are at least the bits to be learnt", REGRET,
            said_enough or nothing, max(enough) <= WITHIN if enough else None,
        ),
        Claim(
            "It falls behind where they are a quarter or fewer", REGRET,
            said_few or nothing, min(few) >= BEHIND if few else None,
        ),
        Claim(
            "LoRA equals full fine-tuning while its numbers are at least the completion tokens", REGRET,
            said_tokens or nothing, max(tokens) <= WITHIN if tokens else None,
        ),
        Claim(
            "At and beyond its capacity LoRA meets no floor: more steps teach it more", REGRET,
            "; ".join(f"{name}: {before:.3f}, after twice the steps {after:.3f}" for name, (before, after) in longer)
            or "none was tried for longer",
            all(after - before >= MORE * (1 - before) for _, (before, after) in longer) if longer else None,
        ),
    ]  # fmt: skip


def plots(runs: Sequence[Run]) -> dict[str, str]:
    series: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        point = (math.log2(run["rows"]), mean(run["judged"], "share"))
        series.setdefault(name_of(run), []).append(point)
    return {
        "share": lines(
            series, x=f"log2 of the rows, each of {BITS:.0f} bits", y="share remembered", top=1.0
        )
    }


EXPERIMENT = Experiment(
    title="What an adapter can hold",
    about=ABOUT,
    cells=cells,
    run=run,
    tables=tables,
    claims=claims,
    plots=plots,
)
