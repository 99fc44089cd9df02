"""Eight adapters of rank 16 on all linear layers of SmolLM2-135M's shape (210 layers) made one: the exact sum, and its
best approximation of rank 16. Veneer reads eight folders and writes one; PEFT's adapters are in memory, and so is its
result. CPU time of one thread, ratio to Veneer's svd. PEFT forms each ΔW and decomposes that.

    python benchmarks/compose.py
    python benchmarks/compose.py --quick

Predicted, after Veneer's svd was seen to take 4 s and before PEFT's ran: 15 for PEFT's svd, 0.4 for both exact sums.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from candidates import llama
from report import measure, show, write
from veneer.adapter_files.folder import read
from veneer.tools.compose import compose

ADAPTERS, RANK, LAYERS = 8, 16, 30


def adapters(model: nn.Module, folder: Path, rank: int) -> list[Path]:
    """Folders of adapters that change something."""
    paths = []
    for number in range(ADAPTERS):
        handle = veneer.attach(model, veneer.LoraConfig(rank=rank), f"a{number}")
        for parameter in handle.parameters():
            nn.init.normal_(parameter.data, std=0.02)
        paths.append(handle.save(folder / f"a{number}"))
        handle.detach()
    return paths


def peer(model: nn.Module, paths: Sequence[Path]) -> Any:
    """The same adapters in PEFT."""
    from peft import PeftModel

    made = PeftModel.from_pretrained(model, paths[0], adapter_name="a0")
    for number, path in enumerate(paths[1:], 1):
        made.load_adapter(path, f"a{number}")
    return made


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def off(out: Path, made: Any, name: str) -> float:
    """How far PEFT's result is off Veneer's, as a share of it, in all layers."""
    apart = whole = 0.0
    for path, low in read(out).products.items():
        layer = made.base_model.model.get_submodule(path)
        dense, theirs = low.delta(torch.float64)[0], layer.get_delta_weight(name).double()
        apart, whole = apart + float((dense - theirs).square().sum()), whole + float(dense.square().sum())
    return (apart / whole) ** 0.5


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers of a toy's width; nothing is recorded")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, rank = (2, 4) if options.quick else (LAYERS, RANK)
    model = llama(layers, 256, options.quick, **({} if options.quick else {"vocab_size": 512}))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = adapters(model, Path(folder), rank)
        made, weights, out = peer(model, paths), [1 / ADAPTERS] * ADAPTERS, Path(folder) / "out"
        names = [f"a{number}" for number in range(ADAPTERS)]

        def ours(**how: Any) -> Callable[[], float]:
            return lambda: timed(lambda: compose(paths, out, weights=weights, overwrite=True, **how))

        def theirs(**how: Any) -> Callable[[], float]:
            def call() -> float:
                if "sum" in made.peft_config:  # a name that exists is passed by
                    made.delete_adapter("sum")
                return timed(lambda: made.add_weighted_adapter(names, weights, "sum", **how))

            return call

        candidates = {
            "veneer, svd": ours(rank=rank),
            "veneer, exact": ours(),
            "peft, svd": theirs(combination_type="svd", svd_rank=rank),
            "peft, cat": theirs(combination_type="cat"),
        }
        case = measure(
            candidates,
            floor="veneer, svd",
            runs=options.runs,
            warmup=0,
            adapters=ADAPTERS,
            rank=rank,
            layers=7 * layers,
        )
        show("compose", case)
        case["off"] = {}
        for mine, other in (("veneer, svd", "peft, svd"), ("veneer, exact", "peft, cat")):
            candidates[mine]()
            candidates[other]()
            case["off"][other] = off(out, made, "sum")
            print(f"  {other}: its change is off Veneer's by {case['off'][other]:.1e}")
    if options.quick and options.out is None:
        return {"name": "compose", **case}
    return write("compose", case, options.out)


if __name__ == "__main__":
    main()
