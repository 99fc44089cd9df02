"""Classify: texts, words of a sentence, or images.

    text, label              one label a text       (text_pair besides: of two texts)
    words, labels            one label a word       words: a list of texts, labels: as many
    image, label             one label an image     or a folder: data/LABEL/FILE.png

    loss = -log p(label)                            a mean over labels

The head is new, and trains in full, unless the base has one that knows all labels of the data.
Labels are texts or whole numbers; their names go with the adapter. A word of several tokens carries
its label on the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from veneer import models
from veneer.attach.dtypes import at_least_float32
from veneer.errors import ConfigError, DataError, listing
from veneer.models.locate import config_of, find_base
from veneer.models.messages import loading
from veneer.models.remote_code import code_options
from veneer.train import data
from veneer.train.tasks._base import (
    Base,
    Rows,
    Shown,
    Task,
    TaskLoss,
    limited,
    pad_of,
    padded,
    register,
    texts_of,
)
from veneer.train.tasks._media import folder_of_images, image_of
from veneer.train.tokens import IGNORED

HEADS = {
    "text": "AutoModelForSequenceClassification",
    "words": "AutoModelForTokenClassification",
    "image": "AutoModelForImageClassification",
}


@register
class Classify(Task):
    auto = HEADS["text"]  # unless the data are words or images
    item, compares = "label", False  # a new head tells nothing
    one_pass = True

    def __init__(self, config: Any, known: Any = None, loading: Any = None) -> None:
        super().__init__(config, known, loading)
        kind, labels = self.known.get("kind", ""), self.known.get("labels", [])
        if (
            kind not in ("", *HEADS)
            or not isinstance(labels, list)
            or not all(isinstance(one, str) for one in labels)
        ):
            found = f"an adapter that says of its task {dict(self.known)}"[:300]
            raise ConfigError(
                found, "a kind of rows and a list of labels", "name an adapter of the task classify"
            )
        self.kind: str = kind
        self.labels: list[str] = labels

    def open(self) -> Any:
        """The processor comes with the data, which tell texts from images."""
        config_of(self.config.base)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "labels": self.labels}

    def read(self, source: str, split: str) -> data.Records:
        folder = Path(source).expanduser()
        if folder.is_dir():
            raw, digest = folder_of_images(folder)
        else:
            raw, digest = data.raw_rows(source, split)
        renamed, names = self.config.columns, [*raw[0][1]]
        kinds = [kind for kind in HEADS if kind in renamed or kind in names]
        if len(kinds) != 1 or (self.kind and kinds != [self.kind]):
            problem = f"{source} has the columns {listing(map(repr, names))}"
            wanted = "`text` and `label`, `words` and `labels`, or `image` and `label`"
            raise DataError(
                problem,
                self.kind or wanted,
                "name them, for instance --columns text=sentence,label=intent",
            )
        self.kind = kinds[0]
        parts = ("words", "labels") if self.kind == "words" else (self.kind, "label")
        return data.select_fields(
            raw, source, digest, parts, ("text_pair",) if self.kind == "text" else (), renamed
        )

    def _processor(self) -> Any:
        if self.kind != "image":
            return models.load_tokenizer(self.config.base)
        from transformers import AutoImageProcessor

        with loading(self.config.base):
            return AutoImageProcessor.from_pretrained(
                find_base(self.config.base), **code_options(self.config.base)
            )

    def encode(self, records: data.Records) -> Rows:
        if self.processor is None:
            self.processor = self._processor()
        column = "labels" if self.kind == "words" else "label"
        places = [f"{records.source}, {place}" for place in records.places]
        named = [
            [
                _name(label, place)
                for label in (row[column] if self.kind == "words" else [row[column]])
            ]
            for row, place in zip(records.rows, places, strict=True)
        ]
        self._know(named, places)
        number = {label: i for i, label in enumerate(self.labels)}
        numbers = [[number[label] for label in labels] for labels in named]
        return getattr(self, f"_{self.kind}")(records, places, numbers)

    def _know(self, named: list[list[str]], places: list[str]) -> None:
        """The labels that there are: the base's own if its head knows them all, else those of the
        training data."""
        if not self.labels:
            found = {label for labels in named for label in labels}
            own = getattr(config_of(self.config.base), "id2label", None) or {}
            base = [str(own[number]) for number in sorted(own)]
            counted = all(label.lstrip("-").isdecimal() for label in found)
            self.labels = (
                base
                if self._has_head and found <= {*base}
                else sorted(found, key=int if counted else str)
            )
            if len(self.labels) < 2:
                raise DataError(
                    f"one label alone, {self.labels[0]!r}", "two or more", "check the label column"
                )
        known_labels = {*self.labels}
        for labels, place in zip(named, places, strict=True):
            if strange := [label for label in labels if label not in known_labels]:
                found, known = (
                    f"{place}: the label {strange[0]!r}",
                    f"one of {listing(self.labels)}",
                )
                raise DataError(
                    found, f"{known}, as in the training data", "fix or remove that row"
                )

    @cached_property
    def _has_head(self) -> bool:
        """Whether the base comes with a head of this kind."""
        named = getattr(config_of(self.config.base), "architectures", None) or ()
        return any(one.endswith(HEADS[self.kind].removeprefix("AutoModel")) for one in named)

    def _text(self, records: data.Records, places: list[str], numbers: list[list[int]]) -> Rows:
        texts = [
            texts_of(records, part) for part in ("text", "text_pair") if part in records.rows[0]
        ]
        ids = self.processor(*texts)["input_ids"]
        rows = [
            {"ids": list(own), "labels": label} for own, label in zip(ids, numbers, strict=True)
        ]
        return self._tokens(records, rows, texts)

    def _words(self, records: data.Records, places: list[str], numbers: list[list[int]]) -> Rows:
        rows = []
        for row, place, labels in zip(records.rows, places, numbers, strict=True):
            words = row["words"]
            if (
                not isinstance(words, list)
                or not words
                or not all(isinstance(word, str) for word in words)
            ):
                raise DataError(
                    f"{place}: words are {words!r}"[:300],
                    "a list of texts",
                    "fix or remove that row",
                )
            if len(words) != len(labels):
                raise DataError(
                    f"{place}: {len(words)} words and {len(labels)} labels",
                    "as many",
                    "fix that row",
                )
            encoded = self.processor(words, is_split_into_words=True)
            at = encoded.word_ids()
            seen: set[int | None] = {None}
            own = [IGNORED] * len(at)
            for i, word in enumerate(at):
                if word not in seen:
                    seen.add(word)
                    own[i] = labels[word]
            rows.append({"ids": list(encoded["input_ids"]), "labels": own})
        return self._tokens(records, rows, [])

    def _tokens(self, records: data.Records, rows: list[dict[str, Any]], texts: list[Any]) -> Rows:
        limit = self.max_length()

        def cut(row: dict[str, Any]) -> dict[str, Any]:
            # encoders end with a token of their own
            ids = [
                *row["ids"][: limit - 1],
                row["ids"][-1],
            ]
            labels = (
                row["labels"]
                if len(row["labels"]) == 1
                else [*row["labels"][: limit - 1], row["labels"][-1]]
            )
            return {"ids": ids, "labels": labels}

        lengths = [len(row["ids"]) for row in rows]
        kept, rows, count = limited(records, rows, lengths, self.config, limit, cut)
        if len(texts) == 2:  # which text each token is of, where the base tells them apart
            kinds = self.processor(*([part[i] for i in kept] for part in texts)).get(
                "token_type_ids"
            )
            if kinds is not None:
                rows = [
                    {**row, "kinds": own[: len(row["ids"])]}
                    for row, own in zip(rows, kinds, strict=True)
                ]
        return Rows(
            rows,
            [len(row["ids"]) for row in rows],
            kept,
            dropped=len(records) - len(rows),
            truncated=count,
        )

    def _image(self, records: data.Records, places: list[str], numbers: list[list[int]]) -> Rows:
        """Each is read once here, for its errors, and again for its batch: as tensors they would
        fill the memory."""
        folder = Path(records.source).expanduser().parent
        rows = [
            {"image": row["image"], "place": place, "folder": folder, "labels": labels}
            for row, place, labels in zip(records.rows, places, numbers, strict=True)
        ]
        for row in rows:
            image_of(row["image"], row["place"], folder)
        return Rows(rows, [0] * len(rows), [*range(len(rows))])

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        names = [self.labels[label] for label in row["labels"] if label != IGNORED]
        if self.kind == "image":
            height, width, _ = image_of(row["image"], row["place"], row["folder"]).shape
            about = f"{row['image']}, " if isinstance(row["image"], str) else ""
            return [
                Shown(False, "image", f"{about}{width} × {height} pixels"),
                Shown(True, "label", names[0]),
            ]
        text = Shown(False, self.kind, self.processor.decode(row["ids"]))
        if self.kind == "text":
            return [text, Shown(True, "label", names[0])]
        starts = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        words = [row["ids"][start:end] for start, end in pairwise([*starts, len(row["ids"])])]
        told = [self.processor.decode(ids, skip_special_tokens=True).strip() for ids in words]
        return [
            text,
            Shown(
                True,
                "labels",
                ", ".join(f"{word} → {name}" for word, name in zip(told, names, strict=True)),
            ),
        ]

    def load(self) -> Base:
        self.auto = HEADS[self.kind]
        names = dict(enumerate(self.labels))
        fields: dict[str, Any] = {
            "id2label": names,
            "label2id": {label: number for number, label in names.items()},
        }
        if self.kind != "image":
            fields["pad_token_id"] = pad_of(self.processor)
        own = getattr(config_of(self.config.base), "num_labels", None)
        if self._has_head and own != len(self.labels):
            problem = (
                f"{self.config.base}, whose head knows {own} labels, and data with"
                f" {len(self.labels)}"
            )
            do = "name a base without a head, or change the labels of the data"
            raise DataError(problem, "the labels of the head, or no head", do)
        model = self.model(**fields)
        model.config.use_cache = False
        return Base(model, self.processor, self.config.base)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.kind == "image":
            images = [image_of(row["image"], row["place"], row["folder"]) for row in rows]
            pixels = self.processor(images, input_data_format="channels_last", return_tensors="pt")[
                "pixel_values"
            ]
            return {
                "pixel_values": pixels,
                "labels": torch.tensor([row["labels"][0] for row in rows]),
            }
        ids = [row["ids"] for row in rows]
        mask = padded([[1] * len(own) for own in ids], 0)
        batch = {"input_ids": padded(ids, pad_of(self.processor)), "attention_mask": mask}
        if "kinds" in rows[0]:
            batch["token_type_ids"] = padded([row["kinds"] for row in rows], 0)
        labels = padded([row["labels"] for row in rows], IGNORED)
        return {**batch, "labels": labels if self.kind == "words" else labels[:, 0]}

    def items(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        logits: Tensor = model(**self.inputs(batch)).logits  # [b, labels] or [b, s, labels]
        labels = batch["labels"].to(logits.device)
        there = labels != IGNORED
        chosen, right = logits[there], labels[there]
        total = cross_entropy(chosen.to(at_least_float32(chosen.dtype)), right, reduction="sum")
        return TaskLoss(
            total, len(right), {"accuracy": (chosen.detach().argmax(dim=-1) == right).sum()}
        )


def _name(label: Any, place: str) -> str:
    """A label as its name: text, a whole number or a truth value."""
    if isinstance(label, bool | int | str):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    raise DataError(
        f"{place}: the label {label!r}"[:300], "text or a whole number", "fix or remove that row"
    )
