"""Are the steps of `veneer train` as good one by one as those of TRL with PEFT?"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import small, smollm2
from experiments.experiment import Cell, Claim, Experiment, Run, table

PEER, OWN, SAME = "trl + peft", "veneer train", "veneer train, rows in trl's order"
SOURCE = "this project: the case `time_to_target` of `benchmarks/`"
RANK, ALPHA, RATE, BATCH = 8, 16, 5e-3, 16
ABOUT = """
The case `time_to_target` of `benchmarks/` once showed a held-out loss of 0.972 for `veneer train` beside 0.852 and
0.927 for TRL's `SFTTrainer` with PEFT after as many steps. What do the two do differently? Both use AdamW of torch,
cosine after 5 % of warm-up, no weight decay, gradients clipped to 1, a loss that is a mean over the labelled tokens of
a batch, and float32 adapters. They differ in what they begin with (the seed is spent otherwise), and in the order of
the rows: TRL takes them by chance, `veneer train` puts rows of like length into a batch, so that less padding is
computed.

So both begin with the same numbers here, those that PEFT draws for the seed (`veneer train` trains that adapter
further), and `veneer train` runs in both orders. Ten seeds; rank 8, alpha 16, rate 5e-3, 60 steps of 16 words of 2,000;
letters → phonemes, on a small Llama of ours (0.45 million numbers, float32, trained from nothing for 60 steps of 64
words), because ten seeds of SmolLM2 are too dear here. The loss is that of 500 held-out words.

Decided before the run: the steps are as good if the losses of a seed, in the same order, are within 0.002 of each other
for each seed; the order costs nothing if the mean of its paired differences is less than two of its standard errors.
Two seeds were seen before these bars were set.
"""


def cells(smoke: bool) -> list[Cell]:
    if smoke:
        return [
            {"smoke": True, "side": SAME, "seeds": 1, "steps": 2},
            {"smoke": True, "side": PEER, "seeds": 1, "steps": 2},
        ]
    return [{"side": side, "seeds": 10, "steps": 60} for side in (PEER, OWN, SAME)]


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
            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
            ) -> None:
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
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        return get_peft_model(model, config)


def _peer(
    base: str, start: Path, rows: Path, output: Path, seed: int, steps: int, listen: Any
) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from veneer import models

    arguments = SFTConfig(
        output_dir=str(output), learning_rate=RATE, per_device_train_batch_size=BATCH, max_steps=steps, seed=seed,
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, activation_checkpointing=False,
        lr_scheduler_type="cosine", warmup_steps=0.05, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=_peft(base, seed), args=arguments, processing_class=models.load_tokenizer(base), callbacks=[listen],
        train_dataset=Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()]),
    )  # fmt: skip
    trainer.train()
    return trainer.model, trainer.processing_class


def _own(
    base: str, start: Path, rows: Path, output: Path, seed: int, steps: int, listen: Any
) -> tuple[Any, Any]:
    from veneer import UnverifiedAdapter
    from veneer.train.config import make_config
    from veneer.train.run import fit

    settings = {
        "base": base, "data": str(rows), "output": output, "adapter": str(start), "learning_rate": RATE,
        "schedule": "cosine", "warmup": 0.05, "batch_size": BATCH, "max_steps": steps, "save_every": steps,
        "attention": "eager", "seed": seed, "precision": "fp32",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UnverifiedAdapter
        )  # the start is a folder of PEFT's, made here
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
    rows, peer = [], _losses(runs, PEER)
    for run in runs:
        apart, error = _apart(run["losses"], peer)
        told = (
            f"{statistics.mean(run['losses']):.4f} ± {statistics.stdev(run['losses']):.4f}"
            if peer[1:]
            else "one seed"
        )
        rows.append((run["side"], told, f"{apart:+.4f} ± {error:.4f}", f"{run['spent']:.1f} s"))
    head = (
        "",
        "held-out loss, mean ± deviation",
        "paired with trl + peft, ± standard error",
        "CPU time of a run",
    )
    each = [(seed, *(f"{run['losses'][seed]:.4f}" for run in runs)) for seed in range(len(peer))]
    return f"{table(head, rows)}\n\n{table(('seed', *(run['side'] for run in runs)), each)}"


def _losses(runs: Sequence[Run], side: str) -> list[float]:
    return next(run["losses"] for run in runs if run["side"] == side)


def _apart(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of the paired differences, and its standard error."""
    each = [mine - theirs for mine, theirs in zip(own, other, strict=True)]
    return statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5 if len(
        each
    ) > 1 else 0.0


def claims(runs: Sequence[Run]) -> list[Claim]:
    peer, same = _losses(runs, PEER), _losses(runs, SAME)
    most = max(abs(mine - theirs) for mine, theirs in zip(same, peer, strict=True))
    said = f"same start, same order: at most {most:.4f} apart in any of {len(peer)} seeds"
    found = [
        Claim("steps as good one by one as those of TRL with PEFT", SOURCE, said, most <= 0.002)
    ]
    own = [run["losses"] for run in runs if run["side"] == OWN]
    if own:
        apart, error = _apart(own[0], peer)
        said = f"{apart:+.4f} ± {error:.4f} (standard error) in {len(peer)} pairs"
        found.append(
            Claim(
                "batches of rows of like length cost no quality",
                SOURCE,
                said,
                abs(apart) < 2 * error,
            )
        )
    return found


EXPERIMENT = Experiment(
    title="Steps as good as TRL's and PEFT's", about=ABOUT, cells=cells, run=run, tables=tables, claims=claims,
    data=smollm2.lacking,
)  # fmt: skip
