"""A forward pass without gradients on SmolLM2-135M's shape: the base (the floor), adapted, merged, and PEFT's adapted;
and the Python calls in a forward of one adapted `nn.Linear`. CPU time of one thread, in interleaved rounds. The adapted
model has the attention that `veneer.models.load_base` gives it, and in the row "model's own attention" that of the base
and of all others. A merged model that is still attached, and can be unmerged, looks at what each call selects. In bf16
torch computes the head of one row over frozen weights on a copy of its whole weight, in every candidate alike, so the
ratios of 256 and 1,024 tokens are nearer to one than those of the layers below.

Calls are the events "call" and "c_call" of `sys.setprofile`, the counting's own two among them: a bare `nn.Linear` has
9. (PEFT has 56 counted so, and 80 if returns are counted instead of calls into C.)

    python benchmarks/forward.py
    python benchmarks/forward.py --tokens 1 --dtype float32 --out FOLDER

Predicted: merged 1.00, still attached 1.02 for one token; adapted 1.15 for one token, 1.05 for 256 and 1.03 for 1,024;
PEFT above both; 20 calls; with attention as products 0.9 for 1,024 tokens of bf16.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch

import veneer
from candidates import ALPHA, DTYPES, llama, sharing, with_products
from candidates import options as options_of
from report import measure, show, write

TOKENS = (1, 256, 1024)


def with_peft(model: torch.nn.Module, targets: Any) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=ALPHA, target_modules=targets)).eval()


def models(layers: int, dtype: torch.dtype, tiny: bool) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    base = llama(layers, 0, tiny).to(dtype).eval()
    config = veneer.LoraConfig(rank=8, alpha=ALPHA)
    merged = copy.deepcopy(base)  # merging writes into the weights
    veneer.attach(merged, config).merge(keep=False)
    plain = sharing(merged)
    veneer.detach(plain, keep_merged=True)
    plain.requires_grad_(False)  # as they were attached
    made = {"base": base, "veneer, merged": plain, "veneer, merged and attached": merged, "veneer": sharing(base)}
    veneer.attach(made["veneer"], config)
    with_products(made["veneer"])
    made["veneer, model's own attention"] = sharing(base)
    veneer.attach(made["veneer, model's own attention"], config)
    return {**made, "peft": with_peft(sharing(base), "all-linear")}


def timed(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> float:
    with torch.inference_mode():
        start = time.process_time()
        for _ in range(repeats):
            model(ids, logits_to_keep=1)
        return (time.process_time() - start) / repeats


def calls_of(run: Callable[[], object]) -> int:
    """The calls of Python and of C in `run`."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def calls() -> dict[str, int]:
    """Python calls in one forward of an `nn.Linear`."""
    x = torch.randn(2, 16)
    bare, ours, theirs = (torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(3))
    veneer.attach(ours, veneer.LoraConfig(rank=8))
    with_peft(theirs, ["0"])
    counts = {}
    for name, model in (("bare", bare), ("veneer", ours), ("peft", theirs)):
        layer = model[0]
        layer(x)  # what only a first call does
        counts[name] = calls_of(lambda layer=layer: layer(x))
    return counts


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options_of(__doc__, layers=30, runs=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    for dtype in options.dtype:
        made = models(options.layers, DTYPES[dtype], options.tiny)
        for tokens in options.tokens:
            ids = torch.randint(0, made["base"].config.vocab_size, (1, tokens))
            repeats = 10 if tokens == 1 else 1
            runs = {name: lambda model=model: timed(model, ids, repeats) for name, model in made.items()}  # noqa: B023
            setting = {"dtype": dtype, "tokens": tokens, "layers": options.layers}
            cases.append(measure(runs, floor="base", runs=options.runs, **setting))
            show("forward", cases[-1])
    result = {"cases": cases, "calls": calls()}
    print("forward: Python calls of one linear layer: " + ", ".join(f"{k} {v}" for k, v in result["calls"].items()))
    asked = (options.dtype, options.tokens, options.layers, options.tiny)
    if options.out is None and asked != (list(DTYPES), list(TOKENS), 30, False):
        return {"name": "forward", **result}
    return write("forward", result, options.out)


if __name__ == "__main__":
    main()
