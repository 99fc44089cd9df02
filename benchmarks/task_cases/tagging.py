"""Slots of SNIPS sentences with MiniLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # experiments/

from experiments.snips import read, span_f1

from task_cases.case import BASE, MINILM, Case, adapt, link_base, plain_trainer, rows_of, rows_to


def needs_snips() -> str | None:
    return (
        None
        if Path(os.environ.get("SNIPS", "-")).is_dir()
        else "$SNIPS, the folder of the SNIPS files"
    )


def write_snips(folder: Path, quick: bool) -> None:
    link_base(folder, MINILM)
    for split, rows in read(Path(os.environ["SNIPS"])).items():
        rows_to(folder / f"{split}.jsonl", rows)


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
        encoding = tokenizer(row["words"], is_split_into_words=True)
        word_ids = encoding.word_ids()
        first = [
            word is not None and word != before
            for word, before in zip(word_ids, [None, *word_ids], strict=False)
        ]
        labels = [
            names.index(row["labels"][word]) if is_first else -100
            for word, is_first in zip(word_ids, first, strict=True)
        ]
        encoded.append(
            {
                "input_ids": encoding["input_ids"],
                "attention_mask": encoding["attention_mask"],
                "labels": labels,
            }
        )
    model = AutoModelForTokenClassification.from_pretrained(
        folder / BASE,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = adapt(model, "TOKEN_CLS", exclude_modules=["classifier"])
    collator = DataCollatorForTokenClassification(tokenizer)
    plain_trainer(model, encoded, collator, arguments, callbacks).train()
    return model, tokenizer


def judge_tagging(model: Any, tokenizer: Any, folder: Path) -> float:
    import torch

    names = model.config.id2label
    pairs: list[tuple[list[str], list[str]]] = []
    rows = rows_of(folder / "test.jsonl")
    for start in range(0, len(rows), 32):
        batch_rows = rows[start : start + 32]
        words = [row["words"] for row in batch_rows]
        batch = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            best = model(**inputs).logits.argmax(-1).tolist()
        for i, row in enumerate(batch_rows):
            word_ids = batch.word_ids(i)
            labels = [names[best[i][word_ids.index(word)]] for word in range(len(row["words"]))]
            pairs.append((labels, row["labels"]))
    return span_f1(pairs)


TAGGING = Case(
    write_snips, train_tagging, judge_tagging, 60, 32, 1e-3, {"task": "classify"}, needs_snips
)
