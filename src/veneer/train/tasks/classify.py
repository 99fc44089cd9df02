"""Train classifiers of texts, of the words of a sentence, or of images.

    text, label              one label for each text     (with text_pair: for each pair of texts)
    words, labels            one label for each word     (two lists of equal length)
    image, label             one label for each image    (or a folder: data/LABEL/FILE.png)

    loss = -log p(label)                                 a mean over labels

A base without a classification head for the kind of rows gets a new head, which is trained in full.
A base with such a head keeps it. If the labels of the head include all labels of the data, they are
used; else the data must have as many labels as the head. Labels are texts, whole numbers or
booleans, and are saved with the adapter as texts. For words, only the first token of each word has
a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from veneer import models
from veneer.errors import ConfigError, DataError, listing
from veneer.models.load import padding_token
from veneer.models.locate import config_of, find_base
from veneer.models.messages import loading
from veneer.models.remote_code import code_options
from veneer.train import data
from veneer.train.config import TrainConfig
from veneer.train.tasks._base import (
    Base,
    Rows,
    RowSegment,
    Task,
    TaskLoss,
    apply_max_length,
    labelled_loss,
    pad_rows,
    read_text_column,
    register,
    retained_positions,
    token_batch,
)
from veneer.train.tasks._media import list_labelled_images, read_image
from veneer.train.tokens import IGNORED

#: by kind of rows, the auto class of transformers that loads the base with a head
HEADS = {
    "text": "AutoModelForSequenceClassification",
    "words": "AutoModelForTokenClassification",
    "image": "AutoModelForImageClassification",
}


@register
class Classify(Task):
    auto_class = HEADS["text"]  # changed by `load` for words and images
    loss_unit, evaluates_base = "label", False  # the base may lack a trained head
    uses_single_forward = True

    def __init__(
        self,
        config: TrainConfig,
        task_settings: Mapping[str, Any] | None = None,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, task_settings, load_options)
        row_kind = self.recorded_settings.get("kind", "")
        labels = self.recorded_settings.get("labels", [])
        if (
            row_kind not in ("", *HEADS)
            or not isinstance(labels, list)
            or not all(isinstance(label, str) for label in labels)
        ):
            raise ConfigError(
                f"an adapter that says of its task {dict(self.recorded_settings)}"[:300],
                "a kind of rows and a list of labels",
                "name an adapter of the task classify",
            )
        self.row_kind: str = row_kind
        self.labels: list[str] = labels

    def open_base(self) -> Any:
        """Check that the base has a config. Returns None instead of a processor: `encode` loads it,
        since only the columns of the data decide between a tokenizer and an image processor."""
        config_of(self.config.base)

    def settings(self) -> dict[str, Any]:
        return {"kind": self.row_kind, "labels": self.labels}

    def read(self, source: str, split: str) -> data.Records:
        folder = Path(source).expanduser()
        if folder.is_dir():
            located_rows, digest = list_labelled_images(folder)
        else:
            located_rows, digest = data.raw_rows(source, split)
        columns_by_role, column_names = self.config.columns, [*located_rows[0][1]]
        row_kinds = [
            row_kind
            for row_kind in HEADS
            if row_kind in columns_by_role or row_kind in column_names
        ]
        if len(row_kinds) != 1 or (self.row_kind and row_kinds != [self.row_kind]):
            problem = f"{source} has the columns {listing(map(repr, column_names))}"
            expected_columns = "`text` and `label`, `words` and `labels`, or `image` and `label`"
            raise DataError(
                problem,
                self.row_kind or expected_columns,
                "name them, for instance --columns text=sentence,label=intent",
            )
        self.row_kind = row_kinds[0]
        required_columns = (
            ("words", "labels") if self.row_kind == "words" else (self.row_kind, "label")
        )
        return data.select_fields(
            located_rows,
            source,
            digest,
            required_columns,
            ("text_pair",) if self.row_kind == "text" else (),
            columns_by_role,
        )

    def _load_processor(self) -> Any:
        if self.row_kind != "image":
            return models.load_tokenizer(self.config.base)
        from transformers import AutoImageProcessor

        with loading(self.config.base):
            return AutoImageProcessor.from_pretrained(
                find_base(self.config.base), **code_options(self.config.base)
            )

    def encode(self, records: data.Records) -> Rows:
        if self.processor is None:
            self.processor = self._load_processor()
        locations = [f"{records.source}, {location}" for location in records.locations]
        label_names = [
            _label_names(row["labels"], location)
            if self.row_kind == "words"
            else [_label_name(row["label"], location)]
            for row, location in zip(records.rows, locations, strict=True)
        ]
        self._choose_labels(label_names, locations)
        index_by_label = {label: i for i, label in enumerate(self.labels)}
        label_indices = [[index_by_label[label] for label in labels] for labels in label_names]
        return getattr(self, f"_encode_{self.row_kind}")(records, locations, label_indices)

    def _choose_labels(self, label_names: list[list[str]], locations: list[str]) -> None:
        """Set `self.labels` if it is empty: to the labels of the base's head if they include all
        labels of the data, else to the labels of the data. Raises `DataError` if there is a single
        label, or if a row has a label that is not in `self.labels`.

        Args:
            label_names: by row, the names of its labels.
            locations: by row, where it is in the data, for errors.
        """
        if not self.labels:
            labels_in_data = {label for labels in label_names for label in labels}
            id2label = getattr(config_of(self.config.base), "id2label", None) or {}
            base_labels = [str(id2label[index]) for index in sorted(id2label)]
            all_numeric = all(label.lstrip("-").isdecimal() for label in labels_in_data)
            self.labels = (
                base_labels
                if self._has_head and labels_in_data <= {*base_labels}
                else sorted(labels_in_data, key=int if all_numeric else str)
            )
            if len(self.labels) < 2:
                raise DataError(
                    f"one label alone, {self.labels[0]!r}", "two or more", "check the label column"
                )
        valid_labels = {*self.labels}
        for labels, location in zip(label_names, locations, strict=True):
            if unknown_labels := [label for label in labels if label not in valid_labels]:
                raise DataError(
                    f"{location}: the label {unknown_labels[0]!r}",
                    f"one of {listing(self.labels)}, as in the training data",
                    "fix or remove that row",
                )

    @cached_property
    def _has_head(self) -> bool:
        """Whether the base has a classification head for this kind of rows, as its config says."""
        architectures = getattr(config_of(self.config.base), "architectures", None) or ()
        return any(
            architecture.endswith(HEADS[self.row_kind].removeprefix("AutoModel"))
            for architecture in architectures
        )

    def _encode_text(
        self, records: data.Records, locations: list[str], label_indices: list[list[int]]
    ) -> Rows:
        text_columns = [
            read_text_column(records, column)
            for column in ("text", "text_pair")
            if column in records.rows[0]
        ]
        encodings = self.processor(*text_columns)
        rows = [
            {"ids": list(token_ids), "labels": labels}
            for token_ids, labels in zip(encodings["input_ids"], label_indices, strict=True)
        ]
        if len(text_columns) == 2 and "token_type_ids" in encodings:
            # the type of a token tells from which of the two texts it is
            for row, token_types in zip(rows, encodings["token_type_ids"], strict=True):
                row["token_types"] = list(token_types)
        return self._build_token_rows(records, rows)

    def _encode_words(
        self, records: data.Records, locations: list[str], label_indices: list[list[int]]
    ) -> Rows:
        rows = []
        for row, location, labels in zip(records.rows, locations, label_indices, strict=True):
            words = row["words"]
            if (
                not isinstance(words, list)
                or not words
                or not all(isinstance(word, str) for word in words)
            ):
                raise DataError(
                    f"{location}: words are {words!r}"[:300],
                    "a list of texts",
                    "fix or remove that row",
                )
            if len(words) != len(labels):
                raise DataError(
                    f"{location}: {len(words)} words and {len(labels)} labels",
                    "as many",
                    "fix that row",
                )
            # a tokenizer of bytes (GPT-2's, RoBERTa's) tells a new word from the rest of the one
            # before by the space
            spaced_words = [words[0], *(f" {word}" for word in words[1:])]
            encoding = self.processor(
                spaced_words, is_split_into_words=True, return_offsets_mapping=True
            )
            seen_word_indices: set[int | None] = {None}
            token_labels = [IGNORED] * len(encoding["input_ids"])
            for i, (word_index, (start, end)) in enumerate(
                zip(encoding.word_ids(), encoding["offset_mapping"], strict=True)
            ):
                # a token that is only the space before a word comes before the word is read
                if (
                    word_index not in seen_word_indices
                    and spaced_words[word_index][start:end].strip()
                ):
                    seen_word_indices.add(word_index)
                    token_labels[i] = labels[word_index]
            rows.append({"ids": list(encoding["input_ids"]), "labels": token_labels})
        return self._build_token_rows(records, rows)

    def _build_token_rows(self, records: data.Records, rows: list[dict[str, Any]]) -> Rows:
        """Truncate or drop encoded rows that are too long, or raise `DataError`, as
        `config.too_long` says."""
        token_limit = self.max_length()

        def truncate(row: dict[str, Any]) -> dict[str, Any]:
            positions = retained_positions(row["ids"], token_limit, self.processor)
            return {  # the single label of a text is shorter than any limit
                name: values if len(values) <= token_limit else [values[i] for i in positions]
                for name, values in row.items()
            }

        lengths = [len(row["ids"]) for row in rows]
        retained_indices, rows, truncated_count = apply_max_length(
            records,
            rows,
            lengths,
            self.config,
            token_limit,
            truncate,
        )
        return Rows(
            rows,
            [len(row["ids"]) for row in rows],
            retained_indices,
            dropped=len(records) - len(rows),
            truncated=truncated_count,
        )

    def _encode_image(
        self, records: data.Records, locations: list[str], label_indices: list[list[int]]
    ) -> Rows:
        """Read each image once, so that an unreadable one is reported before training. `collate`
        reads the images again, because all of them together might not fit in memory."""
        folder = Path(records.source).expanduser().parent
        rows = [
            {"image": row["image"], "location": location, "folder": folder, "labels": labels}
            for row, location, labels in zip(records.rows, locations, label_indices, strict=True)
        ]
        for row in rows:
            read_image(row["image"], row["location"], folder)
        return Rows(rows, [0] * len(rows), [*range(len(rows))])

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        row_labels = [self.labels[label] for label in row["labels"] if label != IGNORED]
        if self.row_kind == "image":
            height, width, _ = read_image(row["image"], row["location"], row["folder"]).shape
            file_name = f"{row['image']}, " if isinstance(row["image"], str) else ""
            return [
                RowSegment(False, "image", f"{file_name}{width} × {height} pixels"),
                RowSegment(True, "label", row_labels[0]),
            ]
        text_segment = RowSegment(False, self.row_kind, self.processor.decode(row["ids"]))
        if self.row_kind == "text":
            return [text_segment, RowSegment(True, "label", row_labels[0])]
        word_starts = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
        token_ids_by_word = [
            row["ids"][start:end] for start, end in pairwise([*word_starts, len(row["ids"])])
        ]
        word_texts = [
            self.processor.decode(token_ids, skip_special_tokens=True).strip()
            for token_ids in token_ids_by_word
        ]
        return [
            text_segment,
            RowSegment(
                True,
                "labels",
                ", ".join(
                    f"{word} → {label}" for word, label in zip(word_texts, row_labels, strict=True)
                ),
            ),
        ]

    def load(self) -> Base:
        self.auto_class = HEADS[self.row_kind]
        label_names = dict(enumerate(self.labels))
        config_fields: dict[str, Any] = {
            "id2label": label_names,
            "label2id": {label: index for index, label in label_names.items()},
        }
        if self.row_kind != "image":
            config_fields["pad_token_id"] = padding_token(self.processor)
        head_label_count = getattr(config_of(self.config.base), "num_labels", None)
        if self._has_head and head_label_count != len(self.labels):
            raise DataError(
                f"{self.config.base}, whose head knows {head_label_count} labels, and data with"
                f" {len(self.labels)}",
                "the labels of the head, or no head",
                "name a base without a head, or change the labels of the data",
            )
        model = self.load_model(**config_fields)
        model.config.use_cache = False
        return Base(model, self.processor, self.config.base)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.row_kind == "image":
            images = [read_image(row["image"], row["location"], row["folder"]) for row in rows]
            pixels = self.processor(images, input_data_format="channels_last", return_tensors="pt")[
                "pixel_values"
            ]
            return {
                "pixel_values": pixels,
                "labels": torch.tensor([row["labels"][0] for row in rows]),
            }
        ids, labels = [row["ids"] for row in rows], [row["labels"] for row in rows]
        batch = token_batch(ids, labels, padding_token(self.processor))
        if "token_types" in rows[0]:
            batch["token_type_ids"] = pad_rows([row["token_types"] for row in rows], 0)
        return batch if self.row_kind == "words" else {**batch, "labels": batch["labels"][:, 0]}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        return labelled_loss(model(**self.inputs(batch)).logits, batch["labels"])


def _label_names(labels: Any, row_location: str) -> list[str]:
    """The names of the labels of a row of words. Raises `DataError` if `labels` is no list, is
    empty, or holds another value than `_label_name` takes."""
    if not isinstance(labels, list) or not labels:
        raise DataError(
            f"{row_location}: labels are {labels!r}"[:300],
            "a list with a label for each word",
            "fix or remove that row",
        )
    return [_label_name(label, row_location) for label in labels]


def _label_name(label: Any, row_location: str) -> str:
    """The name of a label that is a text, a boolean or a whole number, such as "3" for 3.0. Raises
    `DataError` for any other value. `row_location`: where the row is in the data, for the error."""
    if isinstance(label, bool | int | str):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    raise DataError(
        f"{row_location}: the label {label!r}"[:300],
        "text or a whole number",
        "fix or remove that row",
    )
