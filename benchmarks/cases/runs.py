"""Whole training runs: to a held-out loss, and sweeps. A process a run, a seed a run.

What was tuned by looking at results (the target, which steps a sweep ends candidates after, by
which loss, and how many go on) was tuned on the seeds of ``CHOSEN_ON``; what is recorded is of
``REPORTED_ON``, which nothing was tuned on.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from cases.files import BASE, predictions, pronunciations
from runner import Arms, Case

CHOSEN_ON, REPORTED_ON = (0, 1, 2), (10, 11, 12, 13, 14)
RANK, ALPHA, RATE, WARMUP = 8, 16, 2e-3, 0.05
#: the highest loss that an arm had after 15 steps with a seed of CHOSEN_ON, rounded up
TARGET = 2.1


def read_clocks() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def watch_loss(curve: list[dict[str, float]], examples: Any, every: int) -> Any:
    """A callback that judges before the first step, every so many steps and after the last, outside
    of the time."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def judge(self, step: int, model: Any) -> None:
            paused = read_clocks()
            training = model.training
            predicted, wanted = predictions(model, examples)
            model.train(training)
            right = (predicted.argmax(-1) == wanted).float().mean().item()
            loss = F.nll_loss(predicted, wanted).item()
            spent = {name: value - self.start[name] for name, value in paused.items()}
            curve.append({"step": step, "loss": loss, "right": right, **spent})
            for name, value in read_clocks().items():
                self.start[name] += value - paused[name]

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            self.start = read_clocks()
            self.judge(0, model)

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.judge(state.global_step, model)

    return Watch()


def cost_until(curve: Sequence[Mapping[str, float]], target: float, cost: str) -> float | None:
    """The cost until the loss was at `target`, or None if it never was."""
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / max(before["loss"] - after["loss"], 1e-9)
            return before[cost] + min(max(share, 0.0), 1.0) * (after[cost] - before[cost])
    return None


def with_veneer(
    rows: Path, folder: Path, watch: Any, seed: int, base: str, steps: int, batch: int
) -> None:
    from veneer.train.config import TrainConfig
    from veneer.train.run import fit

    config = TrainConfig(
        base=base,
        data=str(rows),
        output=folder / "run",
        rank=RANK,
        alpha=ALPHA,
        learning_rate=RATE,
        schedule="cosine",
        warmup=WARMUP,
        batch_size=batch,
        attention="eager",
        seed=seed,
        max_steps=steps,
    )
    fit(config, callbacks=[watch], quiet=True)


TUNED = {
    "bf16": False,
    "gradient_checkpointing": False,
    "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"},
    "lr_scheduler_type": "cosine",
    "warmup_steps": WARMUP,
}


def with_trl(
    rows: Path, folder: Path, watch: Any, seed: int, base: str, steps: int, batch: int, tuned: bool
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from veneer import models

    config = SFTConfig(
        output_dir=str(folder / "run"),
        learning_rate=RATE,
        per_device_train_batch_size=batch,
        max_steps=steps,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **(TUNED if tuned else {}),
    )
    trainer = SFTTrainer(
        model=models.load_tokenizer(base).name_or_path,  # the folder that holds the model
        args=config,
        train_dataset=Dataset.from_list(
            [json.loads(line) for line in rows.read_text().splitlines()]
        ),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[watch],
    )
    trainer.train()


def target_arms(
    stack: Any,
    seed: int,
    steps: int,
    batch: int,
    every: int = 4,
    base: str = BASE,
    held_out: int = 48,
    target: float = TARGET,
) -> Arms:
    folder = Path(stack.enter_context(TemporaryDirectory()))

    def run(train: Callable[..., None], **options: Any) -> dict[str, Any]:
        from veneer import models

        curve: list[dict[str, float]] = []
        _, examples = pronunciations(folder, models.load_tokenizer(base), 2000, held_out)
        watch = watch_loss(curve, examples, every)
        # what a trainer prints is not what this process answers
        with contextlib.redirect_stdout(sys.stderr):
            train(folder / "train.jsonl", folder, watch, seed, base, steps, batch, **options)
        return {
            **{name: curve[-1][name] for name in ("loss", "right", "wall", "cpu")},
            **{f"{cost} to target": cost_until(curve, target, cost) for cost in ("wall", "cpu")},
            "curve": curve,
        }

    return {
        "trl + peft": partial(run, with_trl, tuned=False),
        "trl + peft, tuned": partial(run, with_trl, tuned=True),
        "veneer": partial(run, with_veneer),
    }


AXES = {"learning_rate": [2e-4, 1e-3, 4e-3, 1.6e-2], "rank": [4, 16]}
#: tuned on the seeds of CHOSEN_ON
HALVING = {"judged_by": "training", "keep": 0.4}


def sweep_arms(
    stack: Any,
    seed: int,
    steps: int,
    batch: int,
    drawn: int,
    base: str = BASE,
    rows: int = 2000,
    held_out: int = 64,
) -> Arms:
    folder = Path(stack.enter_context(TemporaryDirectory()))

    def run(**settings: Any) -> dict[str, Any]:
        from veneer import models
        from veneer.train.config import TrainConfig
        from veneer.train.sweep.sweep_run import sweep
        from veneer.train.sweep.sweep_settings import make_sweep

        pronunciations(folder, models.load_tokenizer(base), rows, held_out)
        config = TrainConfig(
            base=base,
            data=str(folder / "train.jsonl"),
            eval_data=str(folder / "held-out.jsonl"),
            output=folder / "sweep",
            alpha=16,
            max_steps=steps,
            batch_size=batch,
            attention="eager",
            seed=seed,
            warmup=WARMUP,
            save_every=steps,
        )
        with contextlib.redirect_stdout(sys.stderr):
            facts = sweep(config, make_sweep({"axes": AXES, **settings}), quiet=True).facts
        best = next(row for row in facts["candidates"] if row["name"] == facts["best"])
        trained = sum(len(row["losses"]) for row in facts["candidates"])
        return {"loss": best["loss"], "steps": trained, "cpu": facts["cpu_seconds"]}

    return {
        "full grid": partial(run, rungs=[]),
        "some of the grid, drawn": partial(run, rungs=[], candidates=drawn, seed=seed),
        "halving": partial(run, **HALVING),
    }


TIME_TO_TARGET = Case(
    "time_to_target",
    "The same number of steps by `veneer train` and by TRL's SFTTrainer with PEFT "
    "(SmolLM2-135M, spelling → phonemes): the held-out loss, the time, and the time until that "
    f"loss is at {TARGET}.",
    "layers, rank, peak rate, batch, rows and number of steps; the order of rows is each library's "
    "own. `tuned`: bf16 weights, plain attention, no gradient checkpointing, Veneer's schedule. "
    f"The target was chosen on seeds {CHOSEN_ON}",
    "trl + peft",
    [{"threads": "default", "steps": 16, "batch": 16}],
    target_arms,
    {"steps": 2, "batch": 2, "every": 1, "held_out": 2},
    shown={
        "loss": ("held-out loss", ".3f"),
        "right": ("tokens right", ".1%"),
        "wall": ("wall time", "ratio"),
        "cpu": ("CPU time", "ratio"),
        "wall to target": ("s to the target", ".1f"),
    },
    seeds=REPORTED_ON,
    apart=True,
    group="tasks",
    minutes=22,
)
SWEEP = Case(
    "sweep",
    "A sweep of 8 candidates (SmolLM2-135M, spelling → phonemes): each trained to its end; as many "
    "of "
    "them, drawn, as take the steps of halving; and successive halving.",
    f"base, rows, rows that judge, steps of a candidate; halving's rule ({HALVING}) was chosen on "
    f"seeds {CHOSEN_ON}",
    "full grid",
    [{"threads": "default", "steps": 12, "batch": 4, "drawn": 3}],
    sweep_arms,
    {"steps": 9, "batch": 2, "drawn": 2, "rows": 32, "held_out": 2},
    shown={
        "loss": ("the winner's held-out loss", ".3f"),
        "steps": ("steps in all", ",.0f"),
        "wall": ("wall time", "ratio"),
        "cpu": ("CPU time", "ratio"),
    },
    seeds=REPORTED_ON,
    apart=True,
    group="tasks",
    minutes=8,
)
CASES = (TIME_TO_TARGET, SWEEP)
