"""Slots of SNIPS sentences with MiniLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # experiments/

from experiments.snips import read, span_f1

from task_cases.case import BASE, MINILM, Case, adapted, link_base, plain_trainer, rows_of, rows_to


def needs_snips() -> str | None:
    return (
        None
        if Path(os.environ.get("SNIPS", "-")).is_dir()
        else "$SNIPS, the folder of the SNIPS files"
    )


def write_snips(folder: Path, quick: bool) -> None:
    link_base(folder, MINILM)
    for part, rows in read(Path(os.environ["SNIPS"])).items():
        rows_to(folder / f"{part}.jsonl", rows)


def train_tagging(
    folder: Path, arguments: dict[str, Any], dtype: str, callbacks: list[Any]
) -> tuple[Any, Any]:
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
    )

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / BASE)
    rows = rows_of(folder / "train.jsonl")
    names = sorted({label for row in rows for label in row["labels"]})
    encoded = []
    for row in rows:
        own = tokenizer(row["words"], is_split_into_words=True)
        at = own.word_ids()
        first = [
            word is not None and word != before
            for word, before in zip(at, [None, *at], strict=False)
        ]
        labels = [
            names.index(row["labels"][word]) if there else -100
            for word, there in zip(at, first, strict=True)
        ]
        encoded.append(
            {
                "input_ids": own["input_ids"],
                "attention_mask": own["attention_mask"],
                "labels": labels,
            }
        )
    model = AutoModelForTokenClassification.from_pretrained(
        folder / BASE,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = adapted(model, "TOKEN_CLS", exclude_modules=["classifier"])
    collator = DataCollatorForTokenClassification(tokenizer)
    arguments = {**arguments, "train_sampling_strategy": "group_by_length"}
    plain_trainer(model, encoded, collator, arguments, callbacks).train()
    return model, tokenizer


def judge_tagging(model: Any, tokenizer: Any, folder: Path) -> float:
    import torch

    names = model.config.id2label
    pairs: list[tuple[list[str], list[str]]] = []
    rows = rows_of(folder / "test.jsonl")
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        words = [row["words"] for row in part]
        batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            best = model(**inputs).logits.argmax(-1).tolist()
        for i, row in enumerate(part):
            at = batch.word_ids(i)
            own = [names[best[i][at.index(word)]] for word in range(len(row["words"]))]
            pairs.append((own, row["labels"]))
    return span_f1(pairs)


TAGGING = Case(
    write_snips, train_tagging, judge_tagging, 120, 32, 1e-3, {"task": "classify"}, needs_snips
)
