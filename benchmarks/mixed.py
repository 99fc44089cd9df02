"""Rows of one batch that use different adapters, on SmolLM2-135M's shape: what a bank adds to the base, and PEFT's
`adapter_names` beside it. 16 sequences; adapters of rank 8 on all linear layers; prefill of 64 tokens a sequence, and
decoding behind 64 tokens. CPU time of one thread, in interleaved rounds. Steps of decoding are those of the server
(`veneer.serve.forward`); PEFT's are transformers' own.

    base            the model without a bank (the floor)
    bank, idle      with a bank whose adapters no row uses
    bank, N         N adapters, the rows in such an order that neighbours differ
    bank, N, DoRA   the same with a gain for each output
    peft, N         N adapters in one call, `adapter_names`

Memory is that of the process (VmRSS), an adapter, with 8 to 40 in a bank, beside the size of its file.

    python benchmarks/mixed.py
    python benchmarks/mixed.py --dtype float32 --layers 4

Predicted, by the bytes that a step reads and two calls more a layer: decoding 0.87 of the base's tokens a second with
8 adapters and 0.78 with 16 (ratios of time 1.15 and 1.28), prefill 0.97 (1.03); idle 1.01; PEFT 1.8 and 1.15.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import veneer
from candidates import ALPHA, DTYPES, llama, sharing
from candidates import options as options_of
from report import child, measure, show, untuned, write
from veneer.serve.forward import Forward
from veneer.serve.slots import Slots

ROWS, PROMPT, RANK = 16, 64, 8
#: by name: a model, its bank's rows (None: no bank), and further arguments of its calls
Made = dict[str, tuple[nn.Module, Any, dict[str, Any]]]
COUNTS = (8, 16)


def adapters(base: nn.Module, folder: Path, count: int, variant: str = "lora") -> list[str]:
    """Folders of random adapters of `base`; their names."""
    names = []
    for number in range(count):
        model = sharing(base)
        handle = veneer.attach(model, veneer.LoraConfig(rank=RANK, alpha=ALPHA, variant=variant))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        names.append(f"{variant}-{number}")
        handle.save(folder / names[-1])
    return names


def cycle(names: Sequence[str]) -> list[str]:
    return [names[row % len(names)] for row in range(ROWS)]


class Decoding:
    """A step of each row behind so many tokens, as the server computes it: on slots (see ``veneer.serve.slots``)."""

    def __init__(self, forward: Forward, length: int) -> None:
        self.forward, self.length = forward, length
        self.slots = Slots(ROWS, length + 1, torch.device("cpu"))
        ids = torch.randint(0, forward.logits, (ROWS, length)).tolist()
        with torch.inference_mode():
            forward.fill(self.slots, 0, ids)

    def __call__(self) -> None:
        self.forward.decode(self.slots, [1] * ROWS, [self.length] * ROWS)


class Theirs:
    """The same with transformers' own cache, which is all that PEFT has."""

    def __init__(self, model: nn.Module, length: int) -> None:
        self.model, self.ids = model, torch.randint(0, model.config.vocab_size, (ROWS, length))
        with torch.inference_mode():
            self.cache = model(self.ids, use_cache=True, logits_to_keep=1).cache

    def __call__(self, **names: Any) -> None:
        self.model(self.ids[:, :1], cache=self.cache, use_cache=True, **names)
        self.cache.crop(-1)


def timed(run: Callable[[], object], repeats: int) -> float:
    with torch.inference_mode():
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / repeats


def with_peft(base: nn.Module, folder: Path, names: Sequence[str]) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(sharing(base), str(folder / names[0]), adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(str(folder / name), adapter_name=name)
    return model.eval()


def candidates(base: nn.Module, folder: Path, counts: Sequence[int]) -> Made:
    names, gained = adapters(base, folder, max(counts)), adapters(base, folder, counts[0], "dora")
    found: Made = {"base": (sharing(base), None, {})}

    def banked(own: Sequence[str]) -> veneer.Bank:
        bank = veneer.Bank(sharing(base))
        for name in own:
            bank.add(folder / name)
        return bank

    idle = banked(names[:1])
    found["bank, idle"] = idle.model, None, {}
    for count in counts:
        bank = banked(names[:count])
        found[f"bank, {count}"] = bank.model, (bank, cycle(names[:count])), {}
    bank = banked(gained)
    found[f"bank, {counts[0]}, DoRA"] = bank.model, (bank, cycle(gained)), {}
    theirs = with_peft(base, folder, names[: counts[0]])
    found[f"peft, {counts[0]}"] = theirs, None, {"adapter_names": cycle(names[: counts[0]])}
    return found


def calls(made: dict[str, Any], kind: str, length: int, repeats: int) -> dict[str, Callable[[], float]]:
    def call(name: str, model: Any, rows: Any, more: dict[str, Any]) -> Callable[[], float]:
        if kind == "decode":
            run: Callable[..., object] = Theirs(model, length) if more else Decoding(Forward(model), length)
        else:
            ids = torch.randint(0, model.config.vocab_size, (ROWS, length))

            def run(**names: Any) -> object:
                return model(ids, use_cache=False, logits_to_keep=1, **names)

        def once() -> float:
            if rows is None:
                return timed(lambda: run(**more), repeats)
            bank, choice = rows
            with bank.rows(choice):
                return timed(run, repeats)

        return once

    return {name: call(name, *one) for name, one in made.items()}


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def memory(layers: int, dtype: str, tiny: bool) -> dict[str, float]:
    """Bytes of a further adapter in a bank, and of its file."""
    base = llama(layers, 0, tiny).to(DTYPES[dtype]).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = adapters(base, folder, 40)
        size = sum(one.stat().st_size for one in (folder / names[0]).iterdir())
        bank = veneer.Bank(base)
        for one in names[:8]:
            bank.add(folder / one)
        gc.collect()
        before = resident()
        for one in names[8:]:
            bank.add(folder / one)
        gc.collect()
        return {"bytes": (resident() - before) / (len(names) - 8), "file": size}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = options_of(__doc__, layers=30, runs=7)
    parser.add_argument("--length", type=int, default=PROMPT)
    parser.add_argument("--memory", choices=DTYPES, help="only what an adapter takes; prints JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory:
        import json

        found = memory(options.layers, options.memory, options.tiny)
        print(json.dumps(found))
        return found
    cases, sizes = [], {}
    for dtype in options.dtype:
        torch.manual_seed(0)
        base = llama(options.layers, 0, options.tiny).to(DTYPES[dtype]).eval()
        with tempfile.TemporaryDirectory() as name:
            made = candidates(base, Path(name), COUNTS)
            for kind, repeats in (("prefill", 1), ("decode", 4)):  # slots change how a model attends
                setting = {"dtype": dtype, "call": kind, "layers": options.layers}
                runs = calls(made, kind, options.length, repeats)
                cases.append(measure(runs, floor="base", runs=options.runs, **setting))
                show("mixed", cases[-1])
        more = [*(["--tiny"] if options.tiny else []), "--layers", str(options.layers)]
        with untuned():  # memory that the allocator keeps is nobody's
            sizes[dtype] = child(str(Path(__file__)), "--memory", dtype, *more)
        print(
            f"mixed: {dtype}, an adapter takes {sizes[dtype]['bytes'] / sizes[dtype]['file']:.2f} × its file",
            flush=True,
        )
    return write("mixed", {"cases": cases, "memory": sizes}, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
