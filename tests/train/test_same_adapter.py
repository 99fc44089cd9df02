"""A plain loop, a transformers Trainer and our run train the same adapter from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.support.tiny import sums, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import veneer
from veneer.train import data, tokens
from veneer.train.evaluate import collate, evaluate
from veneer.train.loss import causal_loss, token_loss
from veneer.train.order import EpochSampler
from veneer.train.prepare import Rows, pack, split
from veneer.train.run import fit

STEPS, BATCH, RATE = 8, 4, 5e-3


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sums.jsonl", sums(32))


def examples(rows: Path) -> Rows:
    return tokens.tokenise(data.read(rows), tiny_tokenizer(), max_length=64)


def order(rows: Path, grouped: bool = True) -> list[list[int]]:
    """The batches of the first epoch, as our trainer draws them."""
    indices = list(EpochSampler(examples(rows).lengths, BATCH, seed=0, grouped=grouped))
    return [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]


def attach(base: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    return veneer.attach(model, veneer.LoraConfig(rank=4))


def plain_loop(
    base: Path, rows: Path, grouped: bool = True
) -> tuple[list[float], dict[str, torch.Tensor]]:
    handle = attach(base)
    optimiser = torch.optim.AdamW(handle.parameters(), lr=RATE, weight_decay=0.0)
    found, losses = examples(rows), []
    handle.model.train()
    for batch in order(rows, grouped):
        loss = causal_loss(handle.model, collate(found, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses, numbers(handle)


def plain_trainer(
    base: Path, rows: Path, folder: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """transformers' own Trainer with the model's own loss; the examples are laid out in the order
    of our batches."""
    handle, found = attach(base), examples(rows)
    laid = [found[i] for batch in order(rows) for i in batch]

    def collator(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        indices, lengths = list(range(len(batch))), [len(row["input_ids"]) for row in batch]
        return collate(Rows(batch, lengths, indices), indices)

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, use_cpu=True,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=handle.model, args=arguments, train_dataset=laid, data_collator=collator
    )  # type: ignore[arg-type]
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], numbers(handle)


def numbers(handle: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in handle.named_parameters()}


def test_three_ways_one_adapter(
    base: Path, rows: Path, make: Callable[..., Any], tmp_path: Path
) -> None:
    run = fit(
        make("run", data=str(rows), max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, schedule="constant",
             warmup=0.0, dropout=0.0, eval_fraction=0.0, optimiser="adamw_torch", group_by_length=True),
        quiet=True,
    )  # fmt: skip
    ours = numbers(run.handle)
    for losses, theirs in (plain_loop(base, rows), plain_trainer(base, rows, tmp_path / "trainer")):
        assert losses == pytest.approx(run.losses, rel=2e-4)  # the Trainer logs rounded losses
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=2e-4, atol=2e-5)
    moved = [float(tensor.abs().max()) for name, tensor in ours.items() if name.endswith("B")]
    assert min(moved) > 1e-3, "every B has left zero"


def test_rows_by_chance_are_those_of_a_plain_loop(
    base: Path, rows: Path, make: Callable[..., Any]
) -> None:
    run = fit(
        make("run", data=str(rows), max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, schedule="constant",
             warmup=0.0, dropout=0.0, eval_fraction=0.0, optimiser="adamw_torch"),
        quiet=True,
    )  # fmt: skip
    losses, _ = plain_loop(base, rows, grouped=False)
    assert losses == pytest.approx(run.losses, rel=2e-4)
    assert sorted(row for batch in order(rows, False) for row in batch) == [
        *range(len(examples(rows)))
    ]
    assert order(rows, False) != order(rows)


def test_a_run_learns_and_its_evaluation_is_a_mean_over_tokens(make: Callable[..., Any]) -> None:
    run = fit(make("run", dropout=0.0, epochs=12, learning_rate=5e-3), quiet=True)
    assert sum(run.losses[-5:]) / 5 < sum(run.losses[:5]) / 5 - 0.2
    _, held_rows = split(data.read(make("run").data), 0.1, seed=0)
    found = tokens.tokenise(held_rows, run.tokenizer, max_length=256)
    for size in (1, 3):  # whatever the batch size
        assert evaluate(run.model, found, batch_size=size).loss == pytest.approx(
            run.eval_losses[-1][1], rel=1e-5
        )


def test_packing_keeps_examples_apart(base: Path, rows: Path) -> None:
    """The loss of a packed row is that of its examples: no example sees its neighbour."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    handle, found = attach(base), examples(rows)
    columns = {name: [row[name] for row in found.rows] for name in ("input_ids", "labels")}
    packed = pack(Dataset.from_dict(columns), 64)
    assert len(packed) < len(found) / 2
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    results = [token_loss(handle.model, collator([packed[i]])) for i in range(len(packed))]
    whole = token_loss(handle.model, collate(found, list(range(len(found)))))
    assert sum(int(result.items) for result in results) == int(whole.items)
    assert sum(float(result.total.detach()) for result in results) == pytest.approx(
        float(whole.total.detach()), rel=1e-4
    )


def test_a_packed_run_says_what_a_step_has(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make("run", packing=True, max_length=64, batch_size=2, max_steps=1, eval_every=None))
    assert "Steps    1 of 2 packed rows, of at most 64 tokens\n" in capsys.readouterr().err
