"""What a training step holds: bytes saved for backward, and the peak of the process; ratios to the floor.

Each candidate of `train_step` runs in a process of its own. Saved for backward counts what the nodes of the graph hold
at the end of forward, each storage once, the model's parameters and buffers not; what a function hides from autograd
it would miss, so the peak of resident memory stands beside it. The peak is of one step, model, libraries and
optimiser's state included, as each of `--steps` steps had it after a first; beside it stands how much more that is than
the process had with the model made and no step taken.

    python benchmarks/train_memory.py                       SmolLM2-135M's shape, 4 × 256 tokens, rank 8
    python benchmarks/train_memory.py --arch vit --out FOLDER

Predicted, saved: full fine-tuning 1.43 (fp32) and 1.33 (bf16), PEFT 1.30 and 1.85, with dropout 2.1 and 2.7, loralib
1.30 and 1.23, Veneer at most 1.00; the peak of Veneer 0.7 × PEFT's.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from candidates import ARCHITECTURES, DTYPES, Candidate, make, names, step
from report import child, spread, write

MIB = 2**20
#: each number and what it is called in a table
NUMBERS = {"saved": "saved for backward", "peak": "peak of the process", "above": "above the model at rest"}


def saved(candidate: Candidate, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd holds between forward and backward, besides the model's own."""
    loss = candidate.loss(candidate.model, batch)
    own = set(storages([*candidate.model.parameters(), *candidate.model.buffers()]))
    found = storages(kept(loss))
    loss.backward()
    return sum(size for place, size in found.items() if place not in own)


def kept(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that a node of the graph below `output` has saved."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        values = [held(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*values, getattr(node, "saved_tensors", ())]:
            yield from (
                one for one in (value if isinstance(value, list | tuple) else (value,)) if isinstance(one, Tensor)
            )


def held(node: Any, name: str) -> Any:
    """What a node holds under a name; of what goes through hooks, what they have made of it."""
    raw = getattr(node, f"_raw{name}", None)
    try:
        return raw.data  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # no tensors, or no hooks
        return getattr(node, name)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of what lies under the tensors."""
    under = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in under}


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident() -> int:
    """Bytes of memory that this process has now."""
    try:
        return status("VmRSS")
    except OSError:  # not Linux: the most that it ever had
        return most()


def most() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(candidate: Candidate, optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor]) -> int:
    """The most bytes that this process has during a step."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on
    except OSError:  # elsewhere: the peak is of the whole process
        step(candidate, optimizer, batch)
        return most()
    step(candidate, optimizer, batch)
    return status("VmHWM")


def alone(name: str, arch: str, dtype: str, tokens: int, rank: int, layers: int, steps: int, tiny: bool) -> dict:
    """What one candidate holds. It is alone in this process."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[arch]
    base = architecture.build(layers, min(tokens, 256), tiny=tiny).to(DTYPES[dtype])
    batch = architecture.batch(base, tokens)
    candidate = make(name, base, arch, rank)
    optimizer = candidate.optimizer()
    gc.collect()
    rest = resident()
    step(candidate, optimizer, batch)
    kept = saved(candidate, batch)
    peaks = [peak_of(candidate, optimizer, batch) for _ in range(steps)]
    return {"saved": kept, "peak": peaks, "above": [peak - rest for peak in peaks]}


def case(measured: Mapping[str, Mapping[str, Any]], steps: int, **setting: Any) -> dict[str, Any]:
    """Ratios of each number to the floor's, and its median in MiB."""
    floor = measured["floor"]
    rows: dict[str, Any] = {}
    for name, own in measured.items():
        row: dict[str, Any] = {}
        for number in NUMBERS:
            values, bases = (value if isinstance(value, list) else [value] for value in (own[number], floor[number]))
            ratios = spread(value / max(base, 1) for value, base in zip(values, bases, strict=True))
            row[number] = {**ratios, "mib": round(spread(values)["ratio"] / MIB, 1)}
        rows[name] = row
    return {"setting": setting, "floor": "floor", "runs": steps, "rows": rows}


def show(case: Mapping[str, Any]) -> None:
    print("train_memory (" + ", ".join(f"{key} {value}" for key, value in case["setting"].items()), end="): ")
    print(f"MiB, and ratio to the floor, medians of {case['runs']} steps")
    width = max(map(len, case["rows"]))
    print(f"  {'':<{width}}  " + "  ".join(f"{title:>22}" for title in NUMBERS.values()))
    for name, row in case["rows"].items():
        cells = (f"{row[number]['mib']:13,.1f}  ({row[number]['ratio']:.3f})" for number in NUMBERS)
        print(f"  {name:<{width}}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, help="default: those of the whole model")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each candidate")
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="these rows, besides the floor")
    parser.add_argument("--tiny", action="store_true", help="models of a toy's width")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    layers = options.layers or ARCHITECTURES[options.arch].layers
    shape = {"tokens": options.tokens, "rank": options.rank, "layers": layers}
    if options.alone:
        kind = {"arch": options.arch, "dtype": options.dtype[0], "steps": options.steps, "tiny": options.tiny}
        found = alone(options.alone, **kind, **shape)
        print(json.dumps(found))
        return found
    cases = []
    for dtype in options.dtype:
        flags = ["--arch", options.arch, "--dtype", dtype, "--steps", str(options.steps)]
        flags += [part for name, value in shape.items() for part in (f"--{name}", str(value))]
        flags += ["--tiny"] * options.tiny
        chosen = [name for name in names(options.arch, dtype) if not options.only or name in ("floor", *options.only)]
        measured = {name: child(__file__, "--alone", name, *flags) for name in chosen}
        cases.append(case(measured, options.steps, architecture=options.arch, dtype=dtype, **shape))
        show(cases[-1])
    asked = (options.arch, options.dtype, *shape.values(), options.tiny, options.only)
    if options.out is None and asked != ("llama", list(DTYPES), 1024, 8, 30, False, ()):
        return {"name": "train_memory", "cases": cases}
    return write("train_memory", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
