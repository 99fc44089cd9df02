"""Run the cells of an experiment, each in a process of its own on one thread, and record what came
out.

A run that ended is kept in build/paper/ until all of its experiment are there, so that `--resume`
goes on where a killed one was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.runner import machine

from experiments import find
from experiments.experiment import Cell, Run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
KEPT = ROOT / "build" / "paper"
#: of each run, before torch is imported there
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def record(
    name: str, *, smoke: bool, resume: bool, at_once: int, out: Path | None = None
) -> dict[str, Any]:
    """Run all cells of `name`; write and return {"name", "runs", machine and versions}. `out`: the
    folder of the result (default: experiments/results, for the recorded size). `at_once`: processes
    at one time."""
    kept = KEPT / f"{name}{'-smoke' if smoke else ''}"
    if not resume:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    cells = find(name).cells(smoke)
    with ThreadPoolExecutor(at_once) as pool:
        runs = [*pool.map(lambda cell: _kept(name, cell, kept), cells)]
    whole = {"name": name, "size": "smoke" if smoke else "recorded", "runs": runs, **machine()}
    folder = out or (kept if smoke else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def _kept(name: str, cell: Cell, folder: Path) -> Run:
    """The run of a cell: the one that was kept, else a new one."""
    text = json.dumps(cell)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.run.json"
    if file.exists():
        return json.loads(file.read_text())
    started = time.perf_counter()
    command = [sys.executable, "-m", "experiments", name, "--cell", text]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ALONE}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    run = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {name} {text}: {time.perf_counter() - started:.0f} s", flush=True)
    written = file.with_suffix(".tmp")
    written.write_text(json.dumps(run))
    written.replace(file)
    return run


def alone(name: str, cell: Cell) -> Run:
    """One run, in this process."""
    import torch

    torch.set_num_threads(1)
    found = find(name).run(cell)
    return {**cell, **found, "cpu": round(time.process_time(), 1)}
