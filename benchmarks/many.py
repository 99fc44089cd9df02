"""Adapters trained at once on SmolLM2-135M's shape against the same steps one after another: CPU time of one thread, in
interleaved rounds. Adapters of rank 8 on all linear layers; each step has a forward, a backward and AdamW's step.

    apart           N steps of adapters of their own, T tokens each, as a loop with `causal_loss` does them (the floor)
    at once         one `Runs.backward` of all, and one AdamW over the parameters of all
    frozen          the base alone on the rows of all at once, without adapters: what no step at once can be below

    python benchmarks/many.py                         8 × 16, 8 × 64, 8 × 256 and 32 × 16 tokens, 4 layers
    python benchmarks/many.py --dtype float32 --layers 30

Predicted, as products of 16 tokens reach half of a processor's speed and those of 64 nearly all of it: 8 × 64 0.60 in
bfloat16 and 0.72 in float32, 8 × 16 0.45, 32 × 16 0.35, 8 × 256 0.9. Wanted: 0.55 and 0.65, 0.42, 0.30, 1.0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import veneer
from candidates import ALPHA, DTYPES, llama, make, options, sharing, with_products
from report import measure, show, write
from veneer.train.loss import causal_loss

RANK = 8
SIZES = ((8, 16), (8, 64), (8, 256), (32, 16))


def timed(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def config() -> veneer.LoraConfig:
    return veneer.LoraConfig(rank=RANK, alpha=ALPHA)


def case(dtype: str, layers: int, count: int, tokens: int, runs: int, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    base: Any = llama(layers, tokens, tiny=tiny).to(DTYPES[dtype])
    with_products(base)
    names = [f"run-{number}" for number in range(count)]
    batches = {name: torch.randint(0, base.config.vocab_size, (1, tokens)) for name in names}
    batches = {name: {"input_ids": ids, "labels": ids} for name, ids in batches.items()}

    alone = []
    for name in names:
        model = sharing(base)
        parameters = veneer.attach(model, config()).parameters()
        alone.append((model, torch.optim.AdamW(parameters, lr=1e-4, fused=True), batches[name]))

    def apart() -> None:
        for model, optimizer, batch in alone:
            causal_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    together = veneer.train_many(sharing(base), {name: config() for name in names})
    everything = [parameter for run in together.values() for parameter in run.parameters()]
    optimizer = torch.optim.AdamW(everything, lr=1e-4, fused=True)

    def at_once() -> None:
        together.backward(batches, causal_loss)
        optimizer.step()
        optimizer.zero_grad()

    frozen = make("floor", sharing(base), "llama", RANK).model
    joined = {key: torch.cat([batch[key] for batch in batches.values()]) for key in ("input_ids", "labels")}
    calls = {
        "apart": lambda: timed(apart),
        "at once": lambda: timed(at_once),
        "frozen": lambda: timed(lambda: causal_loss(frozen, joined).backward()),
    }
    setting = {"dtype": dtype, "layers": layers, "adapters": count, "tokens": tokens}
    return measure(calls, floor="apart", runs=runs, **setting)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, layers=4, runs=7)
    parser.add_argument("--sizes", nargs="+", default=[f"{count}x{tokens}" for count, tokens in SIZES])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for dtype in chosen.dtype:
        for size in chosen.sizes:
            count, tokens = map(int, size.split("x"))
            cases.append(case(dtype, chosen.layers, count, tokens, chosen.runs, chosen.tiny))
            show("many", cases[-1])
    usual = chosen.dtype == list(DTYPES) and len(chosen.sizes) == len(SIZES) and not chosen.tiny
    if chosen.out is None and not usual:
        return {"name": "many", "cases": cases}
    return write("many", {"cases": cases}, chosen.out)


if __name__ == "__main__":
    main()
