"""Tasks of `veneer train` beside PEFT in transformers' trainer or TRL's: what they learn and what that costs, on real
rows or on ones that can be verified. `tagging`: slots of SNIPS sentences with MiniLM (span F1). `digits`: the 8 × 8
digits of scikit-learn turned by a quarter, with a small ViT that was trained on upright ones (images right). `dpo`: of
two words, the one that comes first in the alphabet, with SmolLM2 (held-out pairs in order). `grpo`: a word that begins
with a given letter, with SmolLM2 (the reward on letters that were held out, and the base's before). `speech`: numbers
that espeak-ng speaks, in a voice that the base, a small Whisper, was not trained on (numbers right). Both sides train
the same layers at the same rank, rate, batch, steps and precision, on one thread, with the optimiser and schedule of
transformers, and end with a checkpoint and an adapter on disk; in `digits` and `speech` they begin with the same
numbers, too. Means over seeds with their standard errors, and CPU time of the whole process from its start to the saved
adapter: imports, loading, what either does before the first step, the steps, the files; the judging is outside, and so
is what a machine does once, to compile Veneer's loops.

    python benchmarks/tasks.py                          every case that can run here
    python benchmarks/tasks.py --case dpo --runs 1
    python benchmarks/tasks.py --case tagging --snips FOLDER
    python benchmarks/tasks.py --quick                  a few steps: does it run

Three seeds a side. Twelve for `digits` and `speech`, where runs of a side differ by a point or more and are judged by
400 rows; and there both sides begin with the same numbers, those that PEFT draws for the seed, which Veneer trains
further (`adapter`). With a start of its own it had, over twelve seeds, 0.8997 ± 0.0029 of the digits beside 0.8955 ±
0.0031, and 0.9014 ± 0.0033 of the numbers that are spoken beside 0.9069 ± 0.0031. The two sides of a seed run at the
same time, a core each. The bar: a mean quality of PEFT's less its standard error, or more, at its CPU time or less, by
the median of the seeds; and for `grpo`, more reward than the base's. It is judged here: "holds" or "misses", and the
exit status is 1 if a case misses. `digits` needs scikit-learn, `tagging` the SNIPS files (train_*_full.json,
validate_*.json), `speech` espeak-ng. A case that ran alone takes its place in the recorded result.

Predicted: quality alike in every case. CPU time of the steps 0.75 × PEFT's for tagging and digits, 0.60 for dpo, 0.80
for grpo (most of which is the same generation) and 0.85 for speech. When the whole process was counted, after a look at
steps alone (0.62 dpo, 0.83 grpo, 0.88 speech, 0.99 digits): 0.97 for tagging and digits, 0.75 for dpo, 0.85 for grpo,
1.00 for speech, as some six seconds of imports are the same on both sides, and Veneer's check of the base and its
record cost it the better part of another. Since attaching reads less source and Whisper's config is read once: 0.95 for
digits and speech, seen in two seeds before the run of twelve. With one start for both sides: the same losses within
rounding at first, the same quality but for a few rows, and 0.97 of the time, as there is a folder to read. What came
out: losses that agree to the last digits of float32 at first; rounding grows over the steps, so that the two runs of a
seed end up to 0.028 apart, and either side may be ahead; the means are 0.006 and 0.002 apart; 0.95 and 0.98 of the
time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub

os.environ["OMP_NUM_THREADS"] = "1"  # of each run, before torch is imported there

from report import RESULTS, child, spread, write
from task_cases.answers import DPO, GRPO, base_alone
from task_cases.case import ALPHA, BASE, RANK, Case
from task_cases.digits import DIGITS
from task_cases.speech import SPEECH
from task_cases.tagging import TAGGING

PEER, OWN, BEGIN = "peft", "veneer", "begin"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
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
    torch.set_num_threads(1)
    if options.alone == BEGIN:
        begin(case, folder, options.seed)
        return {}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        train = own if options.alone == OWN else peer
        model, processor = train(case, folder, Path(name), options, spent)
        whole = time.process_time()
        found = {"cpu": whole, "steps": spent.seconds, "quality": case.judge(model.eval(), processor, folder)}
        if case.rises and options.alone == PEER:
            with base_alone(model):
                found["before"] = case.judge(model, processor, folder)
    return found


def own(case: Case, folder: Path, output: Path, options: argparse.Namespace, spent: Any) -> tuple[Any, Any]:
    """Veneer's run. The adapter is saved by it."""
    from veneer.train.config import make_config
    from veneer.train.run import fit

    reward = {"reward": [f"{folder}/rewards.py:begins"]} if options.case == ["grpo"] else {}
    shape = {"rank": RANK, "alpha": ALPHA} if case.begin is None else {"adapter": str(start(folder, options.seed))}
    config = make_config({
        "base": str(folder / BASE), "data": str(folder / "train.jsonl"), "output": str(output / "run"), **shape,
        "learning_rate": case.rate, "warmup": 0.05, "batch_size": case.batch,
        "max_steps": options.steps, "save_every": options.steps, "seed": options.seed, "precision": options.precision,
        **case.settings, **reward,
    })  # fmt: skip
    result = fit(config, callbacks=[spent], quiet=True)
    return result.model, result.tokenizer


def begin(case: Case, folder: Path, seed: int) -> None:
    """Save the numbers that the peer's run begins with."""
    import torch

    torch.manual_seed(seed)
    assert case.begin is not None
    case.begin(folder).save_pretrained(start(folder, seed))


def start(folder: Path, seed: int) -> Path:
    return folder / f"start-{seed}"


def peer(case: Case, folder: Path, output: Path, options: argparse.Namespace, spent: Any) -> tuple[Any, Any]:
    """The peer's run: a checkpoint after the last step as in the other, then the adapter."""
    import torch

    torch.manual_seed(options.seed)
    arguments = {
        "output_dir": str(output / "run"), "per_device_train_batch_size": case.batch, "learning_rate": case.rate,
        "max_steps": options.steps, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "seed": options.seed,
        "report_to": "none", "save_steps": options.steps, "disable_tqdm": True, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    model, processor = case.train(folder, arguments, PRECISIONS[options.precision], [spent])
    model.save_pretrained(output / "adapter")
    return model, processor


def of(runs: Mapping[str, Sequence[Mapping[str, float]]], **setting: Any) -> dict[str, Any]:
    """A case of the result: mean qualities with their standard errors, and CPU time as ratios to the peer's."""
    rows: dict[str, Any] = {}
    for name, side in runs.items():
        found = [run["quality"] for run in side]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
        pairs = [*zip(side, runs[PEER], strict=True)]
        rows[name] = {
            "quality": statistics.mean(found), "error": error, "qualities": [round(one, 4) for one in found],
            **spread(run["cpu"] / other["cpu"] for run, other in pairs),
            "seconds": statistics.median(run["cpu"] for run in side),
            "steps": spread(run["steps"] / other["steps"] for run, other in pairs),
        }  # fmt: skip
    bar = rows[PEER]["quality"] - rows[PEER]["error"]
    before = [run["before"] for run in runs[PEER] if "before" in run]
    risen = not before or rows[OWN]["quality"] > statistics.mean(before)
    verdict = {"quality": rows[OWN]["quality"] >= bar, "cpu": rows[OWN]["ratio"] <= 1, "rises": risen}
    more = {"before": statistics.mean(before)} if before else {}
    return {"setting": setting, "floor": PEER, "runs": len(runs[PEER]), "rows": rows, "bar": bar, **more,
            "verdict": verdict, "holds": all(verdict.values())}  # fmt: skip


def show(case: Mapping[str, Any]) -> None:
    lacking = ", ".join(name for name, met in case["verdict"].items() if not met)
    print(f"{case['setting']['task']}, {case['runs']} seeds: {f'MISSES {lacking}' if lacking else 'holds'}")
    for name, row in case["rows"].items():
        quality = f"quality {row['quality']:.4f} ± {row['error']:.4f}"
        cost = f"CPU time {row['ratio']:.3f} × peft ({row['low']:.3f} to {row['high']:.3f}), {row['seconds']:.1f} s"
        print(f"  {name:<8} {quality}   {cost}; steps {row['steps']['ratio']:.3f}")
    if "before" in case:
        print(f"  base     quality {case['before']:.4f}")
    sys.stdout.flush()


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    case, runs = CASES[name], {PEER: [], OWN: []}
    steps = options.steps or case.steps
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        case.write(Path(folder), options)
        flags = ["--case", name, "--folder", folder, "--steps", str(steps), "--precision", precision_of(case)]
        if case.begin is not None:
            for seed in range(options.runs or case.seeds):
                child(__file__, "--alone", BEGIN, "--seed", str(seed), *flags)
        if not options.quick:  # Veneer compiles its loops once for a machine
            child(__file__, "--alone", OWN, *flags, "--steps", "2")
        for seed in range(options.runs or case.seeds):
            order = sorted(runs, reverse=bool(seed % 2))  # each round begins with another
            asked = [["--alone", who, "--seed", str(seed), *flags] for who in order]
            for who, found in zip(order, pool.map(lambda more: child(__file__, *more), asked), strict=True):
                runs[who].append(found)
                print(f"  {name}, seed {seed}, {who}: {found['quality']:.4f} in {found['cpu']:.1f} s", flush=True)
    setting = {"task": name, "steps": steps, "batch": case.batch, "rate": case.rate, "rank": RANK}
    return of(runs, **setting)


def precision_of(case: Case) -> str:
    """Language models in what Veneer would choose for them here, the others in float32."""
    if not case.language:
        return "fp32"
    from veneer import models

    return {str(dtype): name for name, dtype in PRECISIONS.items()}[str(models.pick_dtype("auto")).split(".")[1]]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--case", nargs="+", choices=CASES, help="default: all that can run here")
    made.add_argument("--runs", type=int, help="seeds (default: the case's own)")
    made.add_argument("--steps", type=int, help="default: the case's own")
    made.add_argument("--snips", default=os.environ.get("SNIPS"), help="folder of the SNIPS files (default: $SNIPS)")
    made.add_argument("--at-once", type=int, default=min(2, os.cpu_count() or 1), help="runs at the same time")
    made.add_argument("--quick", action="store_true", help="one seed, 2 steps: does it run")
    made.add_argument("--out", type=Path, help="folder for the result")
    made.add_argument("--alone", help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--folder", help=argparse.SUPPRESS)
    made.add_argument("--precision", choices=PRECISIONS, default="fp32", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
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
    if options.out or not options.quick:
        file = (options.out or RESULTS) / "tasks.json"
        before = json.loads(file.read_text())["cases"] if file.exists() else []
        known = {case["setting"]["task"]: case for case in [*before, *cases]}
        write("tasks", {"cases": [known[name] for name in CASES if name in known]}, options.out)
    return {"cases": cases}


if __name__ == "__main__":
    judged = main().get("cases", [])
    raise SystemExit("--quick" not in sys.argv and not all(case["holds"] for case in judged))
