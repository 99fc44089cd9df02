"""Are the steps of `veneer train` as good as those of TRL with PEFT?"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.pronounce import write_rows

from experiments import words
from experiments.study import (
    Cell,
    Claim,
    Experiment,
    Fixed,
    Run,
    all_of,
    differences,
    group_runs,
    mean,
    show,
    show_runs,
    stays_within,
    table,
)

PEER, VENEER, SAME_ORDER = "TRL with PEFT", "veneer train", "veneer train, rows in TRL's order"
SOURCE = "asked here"
RANK, ALPHA, RATE, BATCH, STEPS, BASE_STEPS, SEEDS = 8, 16, 5e-3, 16, 60, 60, range(10)
EQUAL, FREE = 0.002, 0.01
PLAN = Fixed(
    [
        {"side": side, "steps": STEPS, "seed": seed}
        for side in (PEER, VENEER, SAME_ORDER)
        for seed in SEEDS
    ]
)
ABOUT = f"""
`veneer train` and TRL's `SFTTrainer` with PEFT both use AdamW of torch, cosine after 5 % of
warm-up, no weight decay, gradients clipped to 1, a loss that is a mean over the labelled tokens of
a batch, and float32 adapters. They differ in the random start for a seed and in the order of the
rows: TRL takes rows by chance, `veneer train` puts rows of like length into a batch here
(`group_by_length: true`), so that less padding is computed.

Here both start with the numbers that PEFT draws for the seed (`veneer train` trains that adapter
further), and `veneer train` runs in both orders. {len(SEEDS)} seeds; rank {RANK}, alpha {ALPHA},
{STEPS} steps of {BATCH} words of 2,000; letters → phonemes on a Llama of 0.45 million parameters in
float32 that was trained from nothing for {BASE_STEPS} steps of 64 words. All sides have one rate,
{RATE:g}: two programs are compared at one setting, not two methods, so no rate is chosen. The loss
is that of 500 held-out words.

Bars: the steps are as good if the losses of a seed, in the same order, are within {EQUAL} of each
other; the order costs nothing if its paired difference is within {FREE}.
"""


def run(cell: Cell) -> dict[str, Any]:
    toy = bool(cell.get("toy"))
    base = words.small_base(1 if toy else BASE_STEPS, toy)
    train_words, _, test_words = words.load_words(cell)
    with words.workplace(cell) as (folder, _):
        rows = write_rows(folder / "train.jsonl", train_words[-2000:])
        start = folder / "start"
        make_peft_model(base, cell["seed"]).save_pretrained(start)
        output, seed, steps = folder / "run", cell["seed"], cell["steps"]
        if cell["side"] == PEER:
            model, tokenizer = train_with_trl(base, rows, output, seed, steps)
        else:
            with order_of_trl(cell["side"] == SAME_ORDER):
                model, tokenizer = train_with_veneer(base, start, rows, output, seed, steps)
        examples = words.tokenise_words(test_words, tokenizer, folder)
        return {"loss": words.loss_of(model, examples)}


def make_peft_model(base: str, seed: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        return get_peft_model(model, config)


def train_with_trl(base: str, rows: Path, output: Path, seed: int, steps: int) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from veneer import models

    arguments = SFTConfig(
        output_dir=str(output),
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        logging_steps=1,
    )
    dataset = Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])
    trainer = SFTTrainer(
        model=make_peft_model(base, seed),
        args=arguments,
        processing_class=models.load_tokenizer(base),
        train_dataset=dataset,
    )
    trainer.train()
    return trainer.model, trainer.processing_class


def train_with_veneer(
    base: str, start: Path, rows: Path, output: Path, seed: int, steps: int
) -> tuple[Any, Any]:
    from veneer import UnverifiedAdapter
    from veneer.train.config import make_config
    from veneer.train.run import fit

    settings = {
        "base": base,
        "data": str(rows),
        "output": output,
        "adapter": str(start),
        "learning_rate": RATE,
        "schedule": "cosine",
        "warmup": 0.05,
        "batch_size": BATCH,
        "max_steps": steps,
        "save_every": steps,
        "attention": "eager",
        "group_by_length": True,
        "seed": seed,
        "precision": "fp32",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedAdapter)  # PEFT saved the start just now
        result = fit(make_config(settings), quiet=True)
    return result.model, result.tokenizer


@contextmanager
def order_of_trl(enabled: bool) -> Iterator[None]:
    """A block in which `veneer train` takes rows in transformers' order, whatever their lengths."""
    from transformers import Trainer

    from veneer.train.trainer import AdapterTrainerBase

    sampler = AdapterTrainerBase._get_train_sampler
    if enabled:
        AdapterTrainerBase._get_train_sampler = Trainer._get_train_sampler
    try:
        yield
    finally:
        AdapterTrainerBase._get_train_sampler = sampler


def by_side(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {side: results for (side,), results in group_runs(runs, "side").items()}


def tables(runs: Sequence[Run]) -> str:
    sides = by_side(runs)
    rows = [
        (
            side,
            show_runs(results, "loss", 4),
            show(differences(results, sides[PEER], "loss"), 4, "+"),
            f"{mean(results, 'cpu'):.1f} s",
        )
        for side, results in sides.items()
    ]
    head = ("", "held-out loss", f"less {PEER}, seed by seed", "CPU a run")
    note = f"Mean ± half of the 95 % interval over {len(sides[PEER])} seeds."
    return f"{table(head, rows)}\n\n{note}"


def claims(runs: Sequence[Run]) -> list[Claim]:
    sides = by_side(runs)
    same = differences(sides[SAME_ORDER], sides[PEER], "loss")
    order = differences(sides[VENEER], sides[PEER], "loss")
    largest = max(abs(gap) for gap in same)
    return [
        Claim(
            "the steps are as good as those of TRL with PEFT",
            SOURCE,
            f"same start, same order: at most {largest:.4f} apart with any of {len(same)} seeds",
            all_of(stays_within([gap] * len(same), EQUAL) for gap in same),
        ),
        Claim(
            f"batches of rows of like length cost no quality, within {FREE}",
            SOURCE,
            f"{show(order, 4, '+')} of loss in {len(order)} pairs",
            stays_within(order, FREE),
        ),
    ]


EXPERIMENT = Experiment(
    title="Steps beside TRL's with PEFT",
    about=ABOUT,
    plan=PLAN,
    run=run,
    tables=tables,
    claims=claims,
    toy={"steps": 2},
    missing_data=words.missing_data,
)
