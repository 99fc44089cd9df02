"""What the proof of a base costs, beside reading its weights once: the fingerprints of every tensor of SmolLM2-135M's
shape (30 layers) / reading the same safetensors file from the page cache into memory of its own. Wall time of
one thread, in interleaved rounds. `hash`: as the first save or load of a model does. `again`: as every further one.

    python benchmarks/fingerprints.py
    python benchmarks/fingerprints.py --dtype bfloat16 --runs 21

Predicted, with SHA-256 on two cores: bf16 0.85, float32 1.08 (half as many bytes to hash, which have to be rounded
first), again 0.01. It took longer than that; hence XXH3, and one core.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import nn

from candidates import DTYPES, llama
from candidates import options as options_of
from report import measure, show, write
from veneer.adapter_files import base_proof
from veneer.attach.targets import Names


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def calls(model: nn.Module, file: Path) -> dict[str, Callable[[], float]]:
    """Reading `file`, which holds the weights of `model`, and hashing these."""
    tensors = base_proof.base_tensors(Names(model))

    def read() -> Any:
        return [tensor.clone() for tensor in load_file(file).values()]  # loading maps the file; a copy reads it

    def hashed() -> float:
        base_proof.forget()
        return timed(lambda: base_proof.fingerprints_of(tensors))

    def again() -> float:
        base_proof.fingerprints_of(tensors)
        return timed(lambda: base_proof.fingerprints_of(tensors))

    return {"read": lambda: timed(read), "hash": hashed, "again": again}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, layers=30, runs=11).parse_args(arguments)
    torch.set_num_threads(1)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtype:
            model = llama(options.layers, 256, options.tiny).to(DTYPES[dtype])
            file = Path(folder) / "model.safetensors"
            save_model(model, str(file))
            case = measure(calls(model, file), floor="read", runs=options.runs, dtype=dtype, layers=options.layers)
            show("fingerprints", case)
            cases.append(case)
    return write("fingerprints", {"cases": cases}, options.out)


if __name__ == "__main__":
    main()
