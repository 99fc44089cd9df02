"""`import veneer` beside `import torch` (the floor) and `import peft` (the peer): wall time around the import, in fresh
interpreters, interleaved.

Predicted before the first run: 1.02 × torch, since the core adds jaxtyping, safetensors and 25 small files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import compare


def run(module: str) -> float:
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    modules = {name: lambda name=name: run(name) for name in ("torch", "veneer", "peft")}
    return compare("import_time", modules, floor="torch", runs=options.runs, out=options.out)


if __name__ == "__main__":
    main()
