"""Tasks of `veneer train` beside PEFT in transformers' trainer or TRL's: what they learn and what that costs, on real
rows or on ones that can be verified. `tagging`: slots of SNIPS sentences with MiniLM (span F1). `digits`: the 8 × 8
digits of scikit-learn turned by a quarter, with a small ViT that was trained on upright ones (images right). `dpo`: of
two words, the one that comes first in the alphabet, with SmolLM2 (held-out pairs in order). `grpo`: a word that begins
with a given letter, with SmolLM2 (rewards on letters that were held out). `speech`: numbers that espeak-ng speaks, in a
voice that the base, a small Whisper, was not trained on (numbers right). Both train the same layers at the same rank,
rate, batch and steps, in the same precision; means over seeds with their standard errors, and CPU time from the first
step on.

    python benchmarks/tasks.py                          every case that can run here, three seeds
    python benchmarks/tasks.py --case dpo --runs 1
    python benchmarks/tasks.py --case tagging --snips FOLDER
    python benchmarks/tasks.py --quick                  a few steps: does it run

The bar: a mean quality of PEFT's less its standard error, or more, at its CPU time or less. `digits` needs
scikit-learn, `tagging` the SNIPS files (train_*_full.json, validate_*.json), `speech` espeak-ng. A case that ran alone
takes its place in the recorded result.

Predicted: quality alike in every case. CPU time 0.75 × PEFT's for tagging and digits, 0.60 for dpo, 0.80 for grpo (most
of which is the same generation) and 0.85 for speech.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

from report import RESULTS, child, spread, write
from task_cases.answers import DPO, GRPO
from task_cases.case import ALPHA, RANK, SMOLLM
from task_cases.digits import DIGITS
from task_cases.speech import SPEECH
from task_cases.tagging import TAGGING

PEER, OWN = "peft", "veneer"
CASES = {"tagging": TAGGING, "digits": DIGITS, "dpo": DPO, "grpo": GRPO, "speech": SPEECH}


def meter() -> Any:
    """A callback that takes the CPU time of the steps."""
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.process_time() - self.start

    return Meter()


def alone(options: argparse.Namespace) -> dict[str, float]:
    """One run, in this process."""
    import torch

    case, folder, spent = CASES[options.case[0]], Path(options.folder), meter()
    steps = options.steps or case.steps
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        torch.manual_seed(options.seed)
        if options.alone == OWN:
            from veneer.train.config import make_config
            from veneer.train.run import fit

            reward = {"reward": [f"{folder}/rewards.py:begins"]} if options.case == ["grpo"] else {}
            config = make_config({
                "base": case.base or str(folder / "base"), "data": str(folder / "train.jsonl"),
                "output": f"{name}/run", "rank": RANK, "alpha": ALPHA, "learning_rate": case.rate, "warmup": 0.05,
                "batch_size": case.batch, "max_steps": steps, "save_every": steps, "seed": options.seed,
                "precision": "auto" if case.base == SMOLLM else "fp32",
                **({"attention": "eager"} if case.base == SMOLLM else {}), **case.settings, **reward,
            })  # fmt: skip
            result = fit(config, callbacks=[spent], quiet=True)
            model, processor = result.model, result.tokenizer
        else:
            arguments = {
                "per_device_train_batch_size": case.batch, "learning_rate": case.rate, "max_steps": steps,
                "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "seed": options.seed, "report_to": "none",
                "save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
                "callbacks": [spent],
            }  # fmt: skip
            shutil.copytree(folder, f"{name}/own")
            model, processor = case.train(Path(name) / "own", arguments)
        quality = case.judge(model.eval(), processor, folder)
    return {"quality": quality, "cpu": spent.seconds, "whole": time.process_time()}


def of(runs: Mapping[str, Sequence[Mapping[str, float]]], **setting: Any) -> dict[str, Any]:
    """A case of the result: mean qualities with their standard errors, and CPU time as ratios to the peer's."""
    rows: dict[str, Any] = {}
    for name, own in runs.items():
        found = [run["quality"] for run in own]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        ratios = [run["cpu"] / peer["cpu"] for run, peer in zip(own, runs[PEER], strict=True)]
        rows[name] = {
            "quality": round(statistics.mean(found), 4), "error": round(error, 4),
            "qualities": [round(one, 4) for one in found], **spread(ratios),
            "seconds": statistics.median(run["cpu"] for run in own),
        }  # fmt: skip
    bar = rows[PEER]["quality"] - rows[PEER]["error"]
    met = rows[OWN]["quality"] >= bar and rows[OWN]["ratio"] <= 1
    return {"setting": setting, "floor": PEER, "runs": len(runs[PEER]), "rows": rows, "bar": round(bar, 4), "met": met}


def show(case: Mapping[str, Any]) -> None:
    print(f"{case['setting']['task']}, {case['runs']} seeds: {'met' if case['met'] else 'NOT MET'}")
    for name, row in case["rows"].items():
        quality = f"quality {row['quality']:.4f} ± {row['error']:.4f}"
        print(f"  {name:<8} {quality}   CPU time {row['ratio']:.3f} × peft, {row['seconds']:.1f} s", flush=True)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    case, runs = CASES[name], {PEER: [], OWN: []}
    with tempfile.TemporaryDirectory() as folder:
        case.write(Path(folder), options)
        flags = ["--case", name, "--folder", folder, *(["--steps", str(options.steps)] if options.steps else [])]
        for seed in range(options.runs):
            for who in sorted(runs, reverse=bool(seed % 2)):  # each round begins with another
                runs[who].append(child(__file__, "--alone", who, "--seed", str(seed), *flags))
                found = runs[who][-1]
                print(f"  {name}, seed {seed}, {who}: {found['quality']:.4f} in {found['cpu']:.1f} s", flush=True)
    setting = {"task": name, "steps": options.steps or case.steps, "batch": case.batch, "rate": case.rate, "rank": RANK}
    return of(runs, **setting)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, help="default: all that can run here")
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, help="default: the case's own")
    parser.add_argument("--snips", default=os.environ.get("SNIPS"), help="folder of the SNIPS files (default: $SNIPS)")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 steps: does it run")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.steps = 1, 2
    if options.alone:
        found: dict[str, Any] = alone(options)
        print(json.dumps(found))
        return found
    cases = []
    for name in options.case or CASES:
        lacking = CASES[name].needs(options)
        if lacking and options.case:
            raise SystemExit(f"{name} needs {lacking}")
        if lacking:
            print(f"{name} is left out: it needs {lacking}", flush=True)
            continue
        cases.append(run(name, options))
        show(cases[-1])
    if options.quick and not options.out:
        return {"cases": cases}
    file = (options.out or RESULTS) / "tasks.json"
    before = json.loads(file.read_text())["cases"] if file.exists() else []
    known = {case["setting"]["task"]: case for case in [*before, *cases]}
    return write("tasks", {"cases": [known[name] for name in CASES if name in known]}, options.out)


if __name__ == "__main__":
    main()
