"""What it costs to have the library at all."""

from __future__ import annotations

import subprocess
import sys

from torture_cases.cases._case import case
from torture_cases.library import Library, Result


@case("cost of the import")
def cost_of_the_import(library: Library) -> Result:
    """Beyond that of torch: few modules, and no transformers among them."""
    code = (
        "import sys, time, psutil, torch\n"
        "memory = lambda: psutil.Process().memory_info().rss / 2**20\n"
        "modules, before, start = len(sys.modules), memory(), time.perf_counter()\n"
        f"import {library.package}\n"
        "print(time.perf_counter() - start, len(sys.modules) - modules, memory() - before,"
        " int('transformers' in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    seconds, modules, memory, heavy = map(float, answer.stdout.split())
    text = f"{seconds:.2f} s, {modules:.0f} modules and {memory:.0f} MB more than torch"
    text += ", transformers among them" if heavy else ""
    return Result(not heavy and modules < 200, text, {"modules": modules, "seconds": seconds})
