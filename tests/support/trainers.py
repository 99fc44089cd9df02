"""Build, run, stop and resume every trainer that Veneer's adapters are tested with.

A `Run` trains a model for six steps in a folder and leaves checkpoints at steps 3 and 6. It knows
nothing about adapters, so PEFT's models go through it as well as Veneer's (`trainer_cells.py`
compares both).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.tiny import sums, tiny_config, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    LlamaForSequenceClassification,
)

STEPS, HALF, BATCH = 6, 3, 2
LINEAR = ["q_proj", "k_proj", "v_proj"]


# ----------------------------------------------------------------------------------------------
# models


def write_bases(folder: Path) -> None:
    """Write a tiny base for each head into the folder of the head's name."""
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "vocab_size": 259,
    }
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "causal")
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(folder / "reward")
    seq2seq = BartConfig(**sizes, **special, max_position_embeddings=64, forced_eos_token_id=None)
    BartForConditionalGeneration(seq2seq).save_pretrained(folder / "seq2seq")
    for head in HEADS:
        tiny_tokenizer().save_pretrained(folder / head)


HEADS: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "reward": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def token_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows of 12 tokens, which are their own labels."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 259, (count, 12), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": row} for row in rows]


# ----------------------------------------------------------------------------------------------
# trainers

Watch = Callable[[Any], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `save` writes the model into a folder by the trainer's own means;
    `model` is the trained model; `reference` is the model that the policy is compared with
    (None: it uses none, or switches PEFT's adapter off).
    """

    save: Callable[[Path], None]
    model: Any
    reference: Any = None


@dataclass(frozen=True)
class Run:
    """One trainer.

    `train(model, folder, resume=None, best=None, integration=None)` trains to the last step. With
    `resume`, it starts from the checkpoint at step `HALF` in the folder `resume`. With `best`, the
    model at step `HALF` counts as the best: `best` is called with it, and the trainer must return
    to it at the end. `integration` is a callback for the trainer. For accelerate it is a function,
    called with the accelerator; for a trainer of TRL it may be a dictionary of arguments.
    """

    name: str
    head: str
    train: Callable[..., Outcome]
    checkpoint: str = "checkpoint-{}"
    of_trl: bool = False
    #: whether it compares the policy with a reference model
    compares: bool = False
    #: cells of the table that do not apply to this trainer
    lacks: tuple[str, ...] = ()


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """The settings of every run, as `TrainingArguments` and its subclasses take them."""
    return {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": HALF,
        "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False,
        "logging_steps": 1, "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def _best_at_half(watch: Watch) -> Any:
    """A callback that makes the model at step `HALF` the best, and calls `watch` with it."""
    from transformers import TrainerCallback

    class BestAtHalf(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == HALF:
                watch(kwargs["model"])

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["metrics"]["eval_steps_from_half"] = abs(state.global_step - HALF)

    return BestAtHalf()


BEST = {
    "eval_strategy": "steps", "eval_steps": HALF, "load_best_model_at_end": True,
    "metric_for_best_model": "eval_steps_from_half", "greater_is_better": False,
}  # fmt: skip


def _hugging_face(build: Callable[..., Any]) -> Callable[..., Outcome]:
    """The `train` of a trainer that subclasses transformers' `Trainer`. `build(model, folder,
    callbacks, more_arguments)` makes the trainer."""

    def train(
        model: Any,
        folder: Path,
        resume: Path | None = None,
        best: Watch | None = None,
        integration: Any = None,
    ) -> Outcome:
        options = integration if isinstance(integration, dict) else {}
        report_to = [] if integration is None or options else [integration]
        callbacks = report_to + [_best_at_half(best)] * (best is not None)
        trainer = build(model, folder, callbacks, {} if best is None else BEST, **options)
        trainer.train(
            resume_from_checkpoint=None if resume is None else str(resume / f"checkpoint-{HALF}")
        )
        save = lambda path: trainer.save_model(str(path))  # noqa: E731
        return Outcome(save, trainer.model, getattr(trainer, "ref_model", None))

    return train


def _of_transformers(trainer: str, settings: str) -> Callable[..., Any]:
    def build(model: Any, folder: Path, callbacks: list[Any], more: dict[str, Any]) -> Any:
        import transformers

        rows = token_rows()
        return getattr(transformers, trainer)(
            model=model, args=getattr(transformers, settings)(**arguments(folder, **more)),
            train_dataset=rows, eval_dataset=rows[:4],
            data_collator=transformers.default_data_collator, callbacks=callbacks,
        )  # fmt: skip

    return build


def of_trl(
    name: str, rows: Callable[[], list[dict[str, Any]]], **settings: Any
) -> Callable[..., Any]:
    """A function that builds the trainer of TRL with this short name."""

    def build(
        model: Any, folder: Path, callbacks: list[Any], more: dict[str, Any], **options: Any
    ) -> Any:
        import importlib

        from datasets import Dataset

        config = importlib.import_module(f"trl.trainer.{name.lower()}_config")
        module = importlib.import_module(f"trl.trainer.{name.lower()}_trainer")
        scored = {"reward_funcs": _odd_sum} if "num_generations" in settings else {}
        return getattr(module, f"{name}Trainer")(
            model=model,
            args=getattr(config, f"{name}Config")(**arguments(folder, **settings, **more)),
            train_dataset=Dataset.from_list(rows()),
            eval_dataset=Dataset.from_list(rows()[:4]),
            processing_class=tiny_tokenizer(),
            callbacks=callbacks,
            **scored,
            **options,
        )

    return build


def _odd_sum(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def _preferences() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"}
        for row in sums(24)
    ]


def _labelled_prompts() -> list[dict[str, Any]]:
    rows = enumerate(sums(24))
    return [
        {
            "prompt": row["prompt"],
            "completion": row["completion"] if i % 2 else " no",
            "label": bool(i % 2),
        }
        for i, row in rows
    ]


def _prompts() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in sums(24)]


def _sums() -> list[dict[str, Any]]:
    return [dict(row) for row in sums(24)]


DRAWN: dict[str, Any] = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
BUILD = {
    "DPO": of_trl("DPO", _preferences),
    "KTO": of_trl("KTO", _labelled_prompts),
    "GRPO": of_trl("GRPO", _prompts, **DRAWN),
    "RLOO": of_trl("RLOO", _prompts, **DRAWN),
    "Reward": of_trl("Reward", _preferences),
}


def batches(count: int) -> Any:
    rows: Any = [
        {name: torch.tensor(value) for name, value in row.items()}
        for row in token_rows(count * BATCH)
    ]
    return torch.utils.data.DataLoader(rows, batch_size=BATCH)


def _lightning(precision: str) -> Callable[..., Outcome]:
    def train(
        model: Any,
        folder: Path,
        resume: Path | None = None,
        best: Watch | None = None,
        integration: Any = None,
    ) -> Outcome:
        import pytorch_lightning as lightning
        from pytorch_lightning.callbacks import ModelCheckpoint

        class Tuned(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, index: int) -> Any:
                return self.model(**batch).loss

            def on_train_epoch_end(self) -> None:
                self.log("steps_from_half", float(abs(self.global_step - HALF)))
                if best is not None and self.global_step == HALF:
                    best(self.model)

            def validation_step(self, batch: Any, index: int) -> None:
                self.model(**batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

        # two epochs: Lightning resumes within an epoch only if the loader saves its position
        keep = ModelCheckpoint(
            folder,
            filename="checkpoint-{step}",
            save_on_train_epoch_end=True,
            save_top_k=-1,
            monitor="steps_from_half",
        )
        keep.CHECKPOINT_EQUALS_CHAR = "-"
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=STEPS // HALF, precision=precision, logger=False,
            enable_progress_bar=False, callbacks=[keep] + [integration] * (integration is not None),
            enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
            num_sanity_val_steps=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*many workers.*|.*dirpath has changed.*|.*val_dataloader.*"
            )
            torch.manual_seed(4)
            model.train()
            start = None if resume is None else str(resume / f"checkpoint-step-{HALF}.ckpt")
            trainer.fit(Tuned(), batches(HALF), ckpt_path=start)
            if best is not None:
                trainer.limit_val_batches = 1.0
                trainer.validate(
                    trainer.lightning_module, batches(1), ckpt_path="best", verbose=False
                )
        return Outcome(model.save_pretrained, model)

    return train


def _accelerate(
    model: Any,
    folder: Path,
    resume: Path | None = None,
    best: Watch | None = None,
    integration: Any = None,
) -> Outcome:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    if integration is not None:
        integration(accelerator)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimiser, loader = accelerator.prepare(model, optimiser, batches(STEPS))
    if resume is not None:
        accelerator.load_state(str(resume / f"checkpoint-{HALF}"))
        loader = accelerator.skip_first_batches(loader, HALF)
    prepared.train()
    for step, batch in enumerate(loader, 1 if resume is None else HALF + 1):
        torch.manual_seed(
            step
        )  # a new loader draws a random number that the first run drew earlier
        accelerator.backward(prepared(**batch).loss)
        optimiser.step()
        optimiser.zero_grad()
        if step % HALF == 0:
            accelerator.save_state(str(folder / f"checkpoint-{step}"))
    state = accelerator.get_state_dict(prepared)
    accelerator.free_memory()
    return Outcome(
        lambda path: accelerator.unwrap_model(prepared).save_pretrained(
            path,
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=state,
        ),
        model,
    )


CKPT = "checkpoint-step-{}.ckpt"
RUNS = [
    Run("Trainer", "causal", _hugging_face(_of_transformers("Trainer", "TrainingArguments"))),
    Run(
        "Seq2SeqTrainer",
        "seq2seq",
        _hugging_face(_of_transformers("Seq2SeqTrainer", "Seq2SeqTrainingArguments")),
    ),
    Run("SFTTrainer", "causal", _hugging_face(of_trl("SFT", _sums)), of_trl=True),
    Run("RewardTrainer", "reward", _hugging_face(BUILD["Reward"]), of_trl=True),
    *(
        Run(f"{name}Trainer", "causal", _hugging_face(BUILD[name]), of_trl=True, compares=True)
        for name in ("DPO", "KTO", "GRPO", "RLOO")
    ),
    Run("Lightning", "causal", _lightning("32-true"), checkpoint=CKPT),
    Run("Lightning, bf16-mixed", "causal", _lightning("bf16-mixed"), checkpoint=CKPT),
    # accelerate loads checkpoints into an existing optimiser, and does not know which one is best
    Run("accelerate", "causal", _accelerate, lacks=("bare", "best")),
]
