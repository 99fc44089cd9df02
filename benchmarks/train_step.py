"""One training step, from forward to optimiser: the floor, full fine-tuning, PEFT, loralib and Veneer. CPU time of one
thread, in interleaved rounds.

The floor is what any step over a frozen base must do: forward, and the gradient carried back to the embedded input. It
and the peers take loss, attention and layout from the model, as their documentation does; Veneer takes its own loss
and its own attention, as `veneer train` does, and of convolutions the channels last, as docs/python.md says; the rows
"model's own …" tell the gains apart. Dropout is 0.05. "bf16 adapters" is PEFT with autocast_adapter_dtype=False.

    python benchmarks/train_step.py --apart                 SmolLM2-135M's shape, 4 × 256 tokens, rank 8
    python benchmarks/train_step.py --apart --layers 12     the same, of 12 layers
    python benchmarks/train_step.py --arch vit --rank 64    another case
    python benchmarks/train_step.py --others                8 layers of BERT, of ViT, and of ResNet-50's blocks
    python benchmarks/train_step.py --all                   every architecture, 64 to 4,096 tokens, rank 8 to 256

The first two and the last two write their result; another case is printed, and written only where --out says. AdamW's
step counts.

``--apart`` measures two or three rows a process, each process with a floor of its own: the more memory a process holds,
the more fresh memory costs it, and the floor takes its logits from fresh memory in every step. With all rows in one
process a float32 step of Veneer was 0.95 of the floor, alone with PEFT and the floor 1.03.

Predicted: full fine-tuning 1.48 (fp32) and 1.37 (bf16); PEFT 1.16 and 1.3, with dropout 1.4 and 1.65, with bf16
adapters 1.08; loralib 1.19 and 1.08; Veneer 1.03 and 0.95, with dropout 1.06 and 1.0, with the model's own attention
0.02 and 0.1 more, and with its own loss too 1.10 and 1.08; on the other architectures 1.06.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from candidates import ARCHITECTURES, DTYPES, make, names, sharing, timed
from report import child, machine, measure, show, write

OTHERS = ["bert", "vit", "resnet"]
SMALL = 12
#: with --apart, the rows of a process besides the floor
PROCESSES = (
    ("peft", "veneer"),
    ("peft, dropout", "veneer, dropout"),
    ("peft, bf16 adapters", "peft, bf16 adapters, dropout"),
    ("full fine-tuning", "loralib"),
    ("veneer, model's own attention", "veneer, model's own attention and loss"),
)
TOKENS, RANKS = (64, 256, 1024, 4096), (8, 64, 256)
#: of the whole grid: few, for its 96 cases to end in minutes
GRID_LAYERS = {64: 2, 256: 2, 1024: 1, 4096: 1}


def case(
    arch: str, dtype: str, tokens: int, rank: int, layers: int, runs: int, tiny: bool = False, only: Sequence[str] = ()
) -> dict[str, Any]:
    """One table: every candidate, interleaved."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[arch]
    base = architecture.build(layers, min(tokens, 256), tiny=tiny).to(DTYPES[dtype])
    batch = architecture.batch(base, tokens)
    chosen = [name for name in names(arch, dtype) if not only or name in ("floor", *only)]
    # Full fine-tuning changes its weights; all others share the frozen ones.
    made = {
        name: make(name, copy.deepcopy(base) if name.startswith("full") else sharing(base), arch, rank)
        for name in chosen
    }
    optimizers = {name: candidate.optimizer() for name, candidate in made.items()}

    calls = {name: lambda name=name: timed(made[name], optimizers[name], batch) for name in made}
    setting = {"architecture": arch, "dtype": dtype, "tokens": tokens, "rank": rank, "layers": layers}
    return measure(calls, floor="floor", runs=runs, **setting)


def case_apart(arch: str, dtype: str, tokens: int, rank: int, layers: int, runs: int, tiny: bool) -> dict[str, Any]:
    """One table: a few candidates a process, each a ratio to the floor of the same round of its own process."""
    whole: dict[str, Any] = {}
    for rows in PROCESSES:
        known = [row for row in rows if row in names(arch, dtype)]
        if not known:
            continue
        sizes = ["--tokens", str(tokens), "--rank", str(rank), "--layers", str(layers), "--runs", str(runs)]
        setting = ["--arch", arch, "--dtype", dtype, *sizes, *(["--tiny"] if tiny else [])]
        own = child(__file__, *setting, "--only", *known, "--json")
        whole = {**own, "rows": {**own["rows"], **whole.get("rows", {})}}
    order = {name: whole["rows"][name] for name in ("floor", *names(arch, dtype)) if name in whole["rows"]}
    return {**whole, "rows": order}


def grid(architectures: Sequence[str], dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    for arch in architectures:
        for dtype in dtypes:
            for tokens in TOKENS:
                for rank in RANKS:
                    layers = GRID_LAYERS[tokens] if arch != "resnet" else 4  # a block in each stage
                    yield {"arch": arch, "dtype": dtype, "tokens": tokens, "rank": rank, "layers": layers}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default: llama; with --all every one")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--rank", type=int, nargs="+", default=[8])
    parser.add_argument("--layers", type=int, help="default: those of the whole model")
    parser.add_argument("--runs", type=int, help="rounds; default: 5, with --all 3")
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="these rows, besides the floor")
    parser.add_argument("--apart", action="store_true", help="two rows a process, besides the floor")
    parser.add_argument("--json", action="store_true", help="print the case as JSON, and write nothing")
    parser.add_argument("--others", action="store_true", help="the other architectures, with 8 layers")
    parser.add_argument("--all", action="store_true", help="the whole grid, of few layers")
    parser.add_argument("--tiny", action="store_true", help="models of a toy's width")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.others:
        options.layers = options.layers or 8
    usual_arch = OTHERS if options.others else list(ARCHITECTURES) if options.all else ["llama"]
    chosen = options.arch or usual_arch
    if options.all:
        todo = list(grid(chosen, options.dtype))
    else:
        todo = [
            {"arch": arch, "dtype": dtype, "tokens": tokens, "rank": rank,
             "layers": options.layers or ARCHITECTURES[arch].layers}
            for arch in chosen for dtype in options.dtype for tokens in options.tokens for rank in options.rank
        ]  # fmt: skip
    cases = []
    for one in todo:
        runs = options.runs or (3 if options.all else 5)
        if options.apart:
            cases.append(case_apart(**one, runs=runs, tiny=options.tiny))
        else:
            cases.append(case(**one, runs=runs, tiny=options.tiny, only=options.only))
        if options.json:
            print(json.dumps(cases[-1]))
            return {"name": "train_step", "cases": cases}
        show("train_step", cases[-1])
    asked = (chosen, options.dtype, options.tokens, options.rank, options.tiny, options.only)
    sizes = (8,) if options.others else (None, SMALL)
    usual = asked == (usual_arch, list(DTYPES), [1024], [8], False, ()) and options.layers in sizes
    usual = usual and options.apart is not options.others
    name = "train_step_grid" if options.all else "train_step_others" if options.others else "train_step"
    if options.apart and options.layers == SMALL:
        name += "_small"
    if machine()["allocator"] != "as it comes":
        name += "_tuned"
    if options.out is None and not (options.all or usual):
        return {"name": name, "cases": cases}
    return write(name, {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
