"""Every trainer that a model with an adapter is held against: how it is built, started, stopped and resumed.

A `Run` trains a model for six steps in a folder and leaves checkpoints at steps 3 and 6. It knows nothing of adapters,
so PEFT's models go through it as well as ours.
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


# ---------------------------------------------------------------------------------------------- models


def write_bases(folder: Path) -> None:
    """A base with each head, under the head's name."""
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 259}
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


# ---------------------------------------------------------------------------------------------- trainers


@dataclass(frozen=True)
class Run:
    """One trainer. `train(model, folder, resume)` trains to the last step, from the checkpoint at `HALF` in `resume` if
    that is given, and returns what saves the model into a folder."""

    name: str
    head: str
    train: Callable[[Any, Path, Path | None], Callable[[Path], None]]
    checkpoint: str = "checkpoint-{}"
    #: what the trainer keeps is the whole model, whoever made the adapter
    whole: bool = False


def _arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": HALF, "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1,
        "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def _hugging_face(build: Callable[[Any, Path], Any]) -> Callable[..., Callable[[Path], None]]:
    """How everything that is a transformers `Trainer` runs."""

    def train(model: Any, folder: Path, resume: Path | None) -> Callable[[Path], None]:
        trainer = build(model, folder)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume / f"checkpoint-{HALF}"))
        return lambda path: trainer.save_model(str(path))

    return train


def _plain(model: Any, folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(**_arguments(folder))
    rows: Any = token_rows()
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)


def _seq2seq(model: Any, folder: Path) -> Any:
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator

    arguments, rows = Seq2SeqTrainingArguments(**_arguments(folder)), token_rows()
    data: Any = rows
    return Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)


def _sft(model: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    return SFTTrainer(
        model=model, args=SFTConfig(**_arguments(folder)), train_dataset=Dataset.from_list(sums(24)),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def _preferences() -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in sums(24)]


def _dpo(model: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer(
        model=model, args=DPOConfig(**_arguments(folder)), train_dataset=Dataset.from_list(_preferences()),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def _reward(model: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    return RewardTrainer(
        model=model, args=RewardConfig(**_arguments(folder)), train_dataset=Dataset.from_list(_preferences()),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def _grpo(model: Any, folder: Path) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in sums(24)])
    arguments = GRPOConfig(**_arguments(folder), num_generations=2, max_completion_length=6)
    return GRPOTrainer(
        model=model, args=arguments, train_dataset=prompts, reward_funcs=length, processing_class=tiny_tokenizer()
    )


def _batches(count: int) -> Any:
    rows: Any = [{name: torch.tensor(value) for name, value in row.items()} for row in token_rows(count * BATCH)]
    return torch.utils.data.DataLoader(rows, batch_size=BATCH)


def _lightning(model: Any, folder: Path, resume: Path | None) -> Callable[[Path], None]:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Tuned(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            torch.manual_seed(index)  # Lightning does not restore random states
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    # two epochs, as Lightning goes on within an epoch only if the loader keeps its place
    keep = ModelCheckpoint(folder, filename="checkpoint-{step}", save_on_train_epoch_end=True, save_top_k=-1)
    keep.CHECKPOINT_EQUALS_CHAR = "-"
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=STEPS // HALF, callbacks=[keep], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*many workers.*|.*dirpath has changed.*")
        model.train()
        start = None if resume is None else str(resume / f"checkpoint-step-{HALF}.ckpt")
        trainer.fit(Tuned(), _batches(HALF), ckpt_path=start)
    return model.save_pretrained


def _accelerate(model: Any, folder: Path, resume: Path | None) -> Callable[[Path], None]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimiser, loader = accelerator.prepare(model, optimiser, _batches(STEPS))
    if resume is not None:
        accelerator.load_state(str(resume / f"checkpoint-{HALF}"))
        loader = accelerator.skip_first_batches(loader, HALF)
    prepared.train()
    for step, batch in enumerate(loader, 1 if resume is None else HALF + 1):
        torch.manual_seed(step)  # a loader that starts anew draws a number that the first run had drawn before
        accelerator.backward(prepared(**batch).loss)
        optimiser.step()
        optimiser.zero_grad()
        if step % HALF == 0:
            accelerator.save_state(str(folder / f"checkpoint-{step}"))
    state = accelerator.get_state_dict(prepared)
    accelerator.free_memory()
    return lambda path: accelerator.unwrap_model(prepared).save_pretrained(
        path, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )


RUNS = [
    Run("Trainer", "causal", _hugging_face(_plain)),
    Run("Seq2SeqTrainer", "seq2seq", _hugging_face(_seq2seq)),
    Run("SFTTrainer", "causal", _hugging_face(_sft)),
    Run("DPOTrainer", "causal", _hugging_face(_dpo)),
    Run("RewardTrainer", "reward", _hugging_face(_reward)),
    Run("GRPOTrainer", "causal", _hugging_face(_grpo)),
    Run("Lightning", "causal", _lightning, checkpoint="checkpoint-step-{}.ckpt", whole=True),
    Run("accelerate", "causal", _accelerate, whole=True),
]
