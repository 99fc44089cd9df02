"""`import veneer` beside `import torch` (the floor) and `import peft` (the peer): wall time of fresh interpreters,
interleaved.

Predicted before the first run: 1.02 × torch, since the core adds jaxtyping, safetensors and 25 small files.
"""

from __future__ import annotations

import subprocess
import sys
import time

from report import compare


def run(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    compare(
        "import_time",
        {name: lambda name=name: run(name) for name in ("torch", "veneer", "peft")},
        floor="torch",
        runs=11,
    )
