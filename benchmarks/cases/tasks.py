"""Tasks of `veneer train` beside PEFT in transformers' trainer or TRL's: what they learn, and what
that costs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import runner
from runner import Arms
from task_cases.answers import DPO, GRPO, base_alone
from task_cases.case import ALPHA, BASE, RANK, Case
from task_cases.tagging import TAGGING

TASKS = {"tagging": TAGGING, "dpo": DPO, "grpo": GRPO}
ABOUT = {
    "tagging": "Slots of SNIPS sentences with MiniLM ($SNIPS names the folder of its files); "
    "quality is span F1.",
    "dpo": "Of two words, the one that comes first in the alphabet, with SmolLM2 (DPO); held-out "
    "pairs in order.",
    "grpo": "A word that begins with a given letter, with SmolLM2 (GRPO); the reward on letters "
    "held out.",
}
MINUTES = {"tagging": 8, "dpo": 10.5, "grpo": 15}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def step_meter() -> Any:
    """A callback that takes the CPU time of the steps."""
    from transformers import TrainerCallback

    class StepMeter(TrainerCallback):
        cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.cpu = time.process_time() - self.start

    return StepMeter()


def with_veneer(
    case: Case, folder: Path, seed: int, steps: int, dtype: str, meter: Any
) -> tuple[Any, Any]:
    """The adapter is saved by the run."""
    from veneer.train.config import make_config
    from veneer.train.run import fit

    config = make_config(
        {
            "base": str(folder / BASE),
            "data": str(folder / "train.jsonl"),
            "output": str(folder / "run"),
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": case.rate,
            "warmup": 0.05,
            "batch_size": case.batch,
            "max_steps": steps,
            "save_every": steps,
            "seed": seed,
            "precision": PRECISIONS[dtype],
            **case.settings,
            **({"reward": [f"{folder}/rewards.py:begins"]} if case is GRPO else {}),
        }
    )
    result = fit(config, callbacks=[meter], quiet=True)
    return result.model, result.tokenizer


def with_peft(
    case: Case, folder: Path, seed: int, steps: int, dtype: str, meter: Any
) -> tuple[Any, Any]:
    """A checkpoint after the last step as in the other, then the adapter."""
    torch.manual_seed(seed)
    arguments = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": case.batch,
        "learning_rate": case.rate,
        "max_steps": steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": seed,
        "report_to": "none",
        "save_steps": steps,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    model, processor = case.train(folder, arguments, dtype, [meter])
    model.save_pretrained(folder / "adapter")
    return model, processor


def task_arms(stack: Any, seed: int, task: str, steps: int, quick: bool = False) -> Arms:
    case = TASKS[task]
    folder = Path(stack.enter_context(TemporaryDirectory()))

    def run(train: Callable[..., tuple[Any, Any]]) -> dict[str, float]:
        case.write(folder, quick)
        dtype = "float32"
        if case.language:
            from veneer import models

            dtype = str(models.pick_dtype("auto")).split(".")[1]
        meter, start, cpu = step_meter(), time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            model, processor = train(case, folder, seed, steps, dtype, meter)
        numbers = {
            "wall": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "steps": meter.cpu,
        }
        numbers["quality"] = case.judge(model.eval(), processor, folder)
        if case.rises:
            with base_alone(model):
                numbers["before"] = case.judge(model, processor, folder)
        return numbers

    return {"peft": partial(run, with_peft), "veneer": partial(run, with_veneer)}


CASES = tuple(
    runner.Case(
        f"task_{name}",
        ABOUT[name],
        "layers, rank 8, rate, batch, steps, precision, optimiser and schedule; the time is from "
        "the "
        "call of the trainer to the adapter on disk",
        "peft",
        [{"threads": 1, "task": name, "steps": case.steps}],
        task_arms,
        {"steps": 2, "quick": True},
        shown={
            "quality": ("quality", ".3f"),
            "wall": ("wall time", "ratio"),
            "steps": ("CPU time of steps", "ratio"),
            **({"before": ("the base", ".3f")} if case.rises else {}),
        },
        apart=True,
        group="tasks",
        minutes=MINUTES[name],
        lacks=case.needs,
    )
    for name, case in TASKS.items()
)
