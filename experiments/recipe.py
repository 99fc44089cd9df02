"""Are the steps of `veneer train` as good one by one as those of TRL with PEFT?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import small, smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, table

PEER, OWN, SAME = "trl + peft", "veneer train", "veneer train, rows in trl's order"
RANK, ALPHA, RATE, BATCH = 8, 16, 5e-3, 16
ABOUT = ""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [
            {"smoke": True, "side": SAME, "seeds": 1, "steps": 2},
            {"smoke": True, "side": PEER, "seeds": 1, "steps": 2},
        ]
    return [{"side": side, "seeds": 10, "steps": 100} for side in (PEER, OWN, SAME)]


def run(cell: Cell) -> dict[str, Any]:
    with smollm2.place(cell) as (folder, _):
        learnt, _, judging = smollm2.words(cell)
        base = small.base(learnt, folder / "small", steps=1 if cell.get("smoke") else 60)
        from demo.pronounce import write_rows

        rows, losses, first, spent = write_rows(folder / "train.jsonl", learnt[-2000:]), [], [], 0.0
        for seed in range(cell["seeds"]):
            start, steps = _start(base, folder / f"start-{seed}", seed), Losses()
            began = time.process_time()
            with _order_of_trl(cell["side"] == SAME):
                side = _peer if cell["side"] == PEER else _own
                model, tokenizer = side(
                    base, start, rows, folder / f"run-{seed}", seed, cell["steps"], steps.callback()
                )
            spent += time.process_time() - began
            losses.append(smollm2.loss(model, smollm2.examples(judging, tokenizer, folder)))
            first.append(steps.found[0])
    return {"losses": losses, "first": first, "spent": spent / cell["seeds"]}


class Losses:
    """The loss of each step, as either trainer logs it."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        found = self.found

        class Listen(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                found.extend([float(logs["loss"])] if "loss" in logs else [])

        return Listen()


def _start(base: str, folder: Path, seed: int) -> Path:
    """What both sides begin with: the numbers that PEFT draws for the seed."""
    _peft(base, seed).save_pretrained(folder)
    return folder


def _peft(base: str, seed: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _peer(base: str, start: Path, rows: Path, output: Path, seed: int, steps: int, listen: Any) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from veneer import models

    arguments = SFTConfig(
        output_dir=str(output), learning_rate=RATE, per_device_train_batch_size=BATCH, max_steps=steps, seed=seed,
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=_peft(base, seed), args=arguments, processing_class=models.load_tokenizer(base), callbacks=[listen],
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
    )  # fmt: skip
    trainer.train()
    return trainer.model, trainer.processing_class


def _own(base: str, start: Path, rows: Path, output: Path, seed: int, steps: int, listen: Any) -> tuple[Any, Any]:
    from veneer.train.config import make_config
    from veneer.train.run import fit

    settings = {
        "base": base, "data": str(rows), "output": output, "adapter": str(start), "learning_rate": RATE,
        "schedule": "cosine", "warmup": 0.05, "batch_size": BATCH, "max_steps": steps, "save_every": steps,
        "attention": "eager", "seed": seed, "precision": "fp32",
    }  # fmt: skip
    result = fit(make_config(settings), quiet=True, callbacks=[listen])
    return result.model, result.tokenizer


@contextmanager
def _order_of_trl(wanted: bool) -> Iterator[None]:
    """A block in which `veneer train` takes rows in transformers' order, whatever their lengths."""
    from transformers import Trainer

    from veneer.train.trainer import TrainsAdapter

    own = TrainsAdapter._get_train_sampler
    if wanted:
        TrainsAdapter._get_train_sampler = Trainer._get_train_sampler
    try:
        yield
    finally:
        TrainsAdapter._get_train_sampler = own


def tables(runs: Sequence[Run]) -> str:
    return table(("", "losses"), [(run["side"], " ".join(f"{loss:.4f}" for loss in run["losses"])) for run in runs])


def claims(runs: Sequence[Run]) -> list[Claim]:
    return [Claim("x", "y", str([(run["side"], run["losses"], run["first"], run["spent"]) for run in runs]), None)]


EXPERIMENT = Experiment(
    title="Steps as good as TRL's and PEFT's", about=ABOUT, cells=cells, run=run, tables=tables, claims=claims,
    data=smollm2.lacking,
)  # fmt: skip
