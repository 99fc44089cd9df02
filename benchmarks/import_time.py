"""What attaching needs, `import torch; from veneer import attach`, beside `import torch` (the floor) and `import peft`
(the peer): wall time around the import, in fresh interpreters, interleaved. `import veneer` alone loads
next to nothing: a name of it is loaded when it is first used.

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

CODE = {
    "torch": "import torch",
    "veneer": "import torch; from veneer import attach, LoraConfig",
    "veneer, nothing used": "import torch, veneer",
    "peft": "import peft",
}


def run(name: str) -> float:
    code = f"import time; start = time.perf_counter(); {CODE[name]}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args(arguments)
    modules = {name: lambda name=name: run(name) for name in CODE}
    return compare("import_time", modules, floor="torch", runs=options.runs, out=options.out)


if __name__ == "__main__":
    main()
