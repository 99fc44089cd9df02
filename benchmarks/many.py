"""Adapters trained at once on SmolLM2-135M's shape against the same steps one after another: CPU time of one thread, in
interleaved rounds. Adapters of rank 8 on all linear layers; each step has a forward, a backward and AdamW's step.

    apart           N steps of adapters of their own, T tokens each, as a loop with `causal_loss` does them (the floor)
    at once         one `Runs.backward` of all, and one AdamW over the parameters of all
    frozen          the base alone on the rows of all at once, without adapters: what no step at once can be below
    peft, apart     the N steps with PEFT, as its users do them, in rounds of their own beside "apart" and "at once";
                    "at once, of peft's" is the ratio to these

    python benchmarks/many.py                         8 × 16, 8 × 64, 8 × 256 and 32 × 16 tokens, 4 layers; memory
    python benchmarks/many.py --dtype float32 --sizes 8x64 --layers 30

Memory is what a step of 8 × 64 tokens holds at most, in a process of its own that gives back what is freed, above what
it had with all libraries loaded: of eight adapters at once; of one that has all rows in its batch; the numbers,
gradients and AdamW's states of the seven others, counted; and what `veneer sweep` says before it starts.

Predicted, as products of 16 tokens reach half of a processor's speed and those of 64 nearly all of it: 8 × 64 0.60 in
bfloat16 and 0.72 in float32, 8 × 16 0.45, 32 × 16 0.35, 8 × 256 0.9. Wanted: 0.55 and 0.65, 0.42, 0.30, 1.0. What came
out: in bfloat16 8 × 16 (0.34) and 32 × 16 (0.28) are there, 8 × 64 (0.56) is not. In float32 none but 8 × 256 (0.95): 8
× 16 is at 0.46, and the base alone is at 0.67 of eight steps at 8 × 64 and at 0.34 at 32 × 16, above what is wanted, so
that no step at once can be there: a product of 64 tokens runs at 95 GFLOP/s, one of 512 at 100, and nine tenths of the
base are products. Of PEFT's steps it is 0.33 to 0.91. The run before, with PEFT's models in the same rounds, had 0.60
at 8 × 64 and 0.31 at 32 × 16 in bfloat16, where eight steps apart took 462 ms in place of 531. Of 8 × 64 in bfloat16
the base is five sixths; the rest is half the adapters' products, and half joining and casting their factors, AdamW and
Python. Factors that lie in one tensor from the start would save 5 % of a step of 8 × 16 in float32 and 14 % of one of
32 × 16 in bfloat16 (tried by hand, of 10 layers), but have to be laid anew for each choice of adapters that shares a
batch. Memory: 1.05 was wanted, 1.04 and 1.01 came out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import veneer
from candidates import ALPHA, DTYPES, Candidate, llama, make, options, sharing, step, with_products
from plan_errors import GIVES_BACK, give_back
from report import child, measure, show, write
from train_memory import resident, status
from veneer.train.config import make_config
from veneer.train.loss import causal_loss
from veneer.train.plan import memory

RANK = 8
SIZES = ((8, 16), (8, 64), (8, 256), (32, 16))
#: adapters, and tokens of each, whose memory is measured
MEMORY = (8, 64)
#: of the whole model, for memory
LAYERS = 30


def timed(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def config() -> veneer.LoraConfig:
    return veneer.LoraConfig(rank=RANK, alpha=ALPHA)


def case(dtype: str, layers: int, count: int, tokens: int, runs: int, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    plain: Any = llama(layers, tokens, tiny=tiny).to(DTYPES[dtype])
    base: Any = sharing(plain)
    with_products(base)
    names = [f"run-{number}" for number in range(count)]
    batches = {name: torch.randint(0, base.config.vocab_size, (1, tokens)) for name in names}
    batches = {name: {"input_ids": ids, "labels": ids} for name, ids in batches.items()}

    def each(kind: str) -> list[tuple[Candidate, Any, dict[str, Any]]]:
        made = [make(kind, sharing(plain if kind == "peft" else base), "llama", RANK) for _ in names]
        return [(own, own.optimizer(), batches[name]) for own, name in zip(made, names, strict=True)]

    alone = each("veneer")

    def apart(steps: list[tuple[Candidate, Any, dict[str, Any]]]) -> None:
        for own in steps:
            step(*own)

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
        "apart": lambda: timed(lambda: apart(alone)),
        "at once": lambda: timed(at_once),
        "frozen": lambda: timed(lambda: causal_loss(frozen, joined).backward()),
    }
    setting = {"dtype": dtype, "layers": layers, "adapters": count, "tokens": tokens}
    found = measure(calls, floor="apart", runs=runs, **setting)
    # in rounds of their own: PEFT's models in the same cost the others up to 8 %
    theirs = each("peft")
    beside = {name: calls[name] for name in ("apart", "at once")}
    beside["peft, apart"] = lambda: timed(lambda: apart(theirs))
    pairs = {"at once, of peft's": ("at once", "peft, apart")}
    rows = measure(beside, floor="apart", runs=runs, pairs=pairs)["rows"]
    return {**found, "rows": {**found["rows"], **{name: rows[name] for name in ("peft, apart", *pairs)}}}


class Trained:
    """A model of these layers that takes steps: adapters at once, or one with the rows of all in its batch."""

    def __init__(self, kind: str, dtype: str, layers: int, count: int, tokens: int, tiny: bool) -> None:
        torch.manual_seed(0)
        self.model: Any = llama(layers, tokens, tiny=tiny).to(DTYPES[dtype])
        with_products(self.model)
        names = [f"run-{number}" for number in range(count if kind == "at once" else 1)]
        self.runs = veneer.train_many(self.model, {name: config() for name in names})
        ids = torch.randint(0, self.model.config.vocab_size, (count, tokens))
        rows = zip(names, ids.split(count // len(names)), strict=True)
        self.batches = {name: {"input_ids": own, "labels": own} for name, own in rows}
        self.parameters = [parameter for run in self.runs.values() for parameter in run.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self) -> None:
        self.runs.backward(self.batches, causal_loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def predicted(self) -> int:
        """As a sweep predicts it."""
        ids = [batch["input_ids"] for batch in self.batches.values()]
        own = make_config({"base": "", "data": "", "output": "", "batch_size": len(ids[0])}, "a benchmark")
        runs = {name: memory.Run(own, run.parameters(), 0) for name, run in self.runs.items()}
        labelled = ids[0].numel() - len(ids[0])
        return sum(memory.predict_at_once(self.model, runs, ids[0].numel(), labelled).values())


def held(kind: str, dtype: str, layers: int, count: int, tokens: int, tiny: bool) -> dict[str, int]:
    """Bytes of a kind. It is alone in this process."""
    torch.set_num_threads(1)
    first = Trained(kind, dtype, 2, count, tokens, tiny)
    for _ in range(2):  # loads the libraries, and compiles what a step of this many tokens calls
        first.step()
    first.predicted()
    del first
    give_back()
    rest = resident()
    trained = Trained(kind, dtype, layers, count, tokens, tiny)
    found = {"predicted": trained.predicted(), "own": 4 * sum(one.nbytes for one in trained.parameters)}
    trained.step()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on
    trained.step()
    return {"memory": status("VmHWM") - rest, **found}


def memory_case(dtype: str, layers: int, count: int, tokens: int, tiny: bool) -> dict[str, Any]:
    """Ratios to one run with all rows and the other adapters' own."""
    flags = ["--dtype", dtype, "--layers", str(layers), "--sizes", f"{count}x{tokens}", *["--tiny"] * tiny]
    one, many = (child(__file__, "--alone", kind, *flags, env=GIVES_BACK) for kind in ("one", "at once"))
    others = many["own"] - one["own"]
    floor = one["memory"] + others
    numbers = {"one run, and the others' own": floor, "at once": many["memory"], "predicted": many["predicted"]}
    rows = {name: {"ratio": round(value / floor, 3), "mib": round(value / 2**20)} for name, value in numbers.items()}
    return {"dtype": dtype, "layers": layers, "adapters": count, "tokens": tokens, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options(__doc__, layers=4, runs=5)
    parser.add_argument("--sizes", nargs="+", default=[f"{count}x{tokens}" for count, tokens in SIZES])
    parser.add_argument("--alone", choices=("one", "at once"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split("x"))) for size in chosen.sizes]
    if chosen.alone:
        found = held(chosen.alone, chosen.dtype[0], chosen.layers, *sizes[0], chosen.tiny)
        print(json.dumps(found))
        return found
    torch.set_num_threads(1)
    cases = []
    for dtype in chosen.dtype:
        for count, tokens in sizes:
            cases.append(case(dtype, chosen.layers, count, tokens, chosen.runs, chosen.tiny))
            show("many", cases[-1])
    kept = [
        memory_case(dtype, 2 if chosen.tiny else LAYERS, *MEMORY, chosen.tiny)
        for dtype in chosen.dtype
        if MEMORY in sizes
    ]
    for one in kept:
        told = ", ".join(f"{name} {row['mib']:,} MiB ({row['ratio']:.3f})" for name, row in one["rows"].items())
        print(f"many ({one['dtype']}, {one['layers']} layers, {one['adapters']} × {one['tokens']} tokens): {told}")
    usual = chosen.dtype == list(DTYPES) and len(chosen.sizes) == len(SIZES) and not chosen.tiny
    if chosen.out is None and not usual:
        return {"name": "many", "cases": cases, "memory": kept}
    return write("many", {"cases": cases, "memory": kept}, chosen.out)


if __name__ == "__main__":
    main()
