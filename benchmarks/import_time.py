"""What attaching needs, `import torch; from veneer import attach`, beside `import torch` (the floor) and `import peft`
(the peer): wall time around the import, in fresh interpreters, interleaved. `import veneer` alone loads
next to nothing: a name of it is loaded when it is first used.

    python benchmarks/import_time.py --memory     instead, what a process holds more after its first step: 256 tokens
                                                  through layers of a size, with and without compiled loops

Predicted before the first run: 1.02 × torch, since the core adds jaxtyping, safetensors and 25 small files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import compare

CODE = {
    "torch": "import torch",
    "veneer": "import torch; from veneer import attach, LoraConfig",
    "veneer, nothing used": "import torch, veneer",
    "peft": "import peft",
}


#: what `attach`, one step forward and backward and one call without a graph add to a process, in MiB, and whether numba
#: was loaded
STEP = """
import sys, torch, veneer
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
width, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
model = torch.nn.Sequential(torch.nn.Linear(width, 3 * width), torch.nn.SiLU(), torch.nn.Linear(3 * width, width))
model, x = model.to(dtype), torch.randn(2, 128, width, dtype=dtype)
veneer.attach, veneer.LoraConfig; before = held()
veneer.attach(model, veneer.LoraConfig(rank=8, targets="all-linear"))
model(x).square().mean().backward()
with torch.no_grad():
    model(x)
print(held() - before, "numba" in sys.modules)
"""
SIZES = ((32, "float32"), (32, "bfloat16"), (576, "float32"), (576, "float64"))


def memory() -> None:
    """Print what a first step adds to a process, by the width of the layers, with compiled loops and without."""
    print(f"{'width':>5} {'dtype':9} {'loops':>9} {'none':>9}")
    for width, dtype in SIZES:
        cells = []
        for loops in "10":
            command, env = [sys.executable, "-c", STEP, str(width), dtype], {**os.environ, "VENEER_COMPILED": loops}
            words = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()
            cells.append(f"{float(words[0]):6.0f}{' +n' if words[1] == 'True' else '   '}")
        print(f"{width:5} {dtype:9} {cells[0]} {cells[1]}")
    print("MiB; +n: numba was loaded")


def run(name: str) -> float:
    code = f"import time; start = time.perf_counter(); {CODE[name]}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    if options.memory:
        memory()
        return {}
    modules = {name: lambda name=name: run(name) for name in CODE}
    return compare("import_time", modules, floor="torch", runs=options.runs, out=options.out)


if __name__ == "__main__":
    main()
