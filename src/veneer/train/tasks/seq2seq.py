"""Encoder-decoder models: text to text, or speech to text.

prompt, completion    T5, BART, …            prompt: what the encoder reads
audio, text           Whisper, Moonshine, …  audio: a .wav file or its numbers (`_media.py`)

loss = -log p(token of the answer)           a mean over tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from veneer import models
from veneer.attach.dtypes import at_least_float32
from veneer.errors import ConfigError, DataError
from veneer.models.locate import config_of, find_base
from veneer.models.messages import loading
from veneer.models.remote_code import code_options
from veneer.train import data, prepare
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
from veneer.train.tasks._media import sound_of
from veneer.train.tokens import IGNORED


@register
class Seq2seq(Task):
    auto, item = "AutoModelForSeq2SeqLM", "token"
    one_pass = True

    def read_data(self) -> None:
        """Which columns are read hangs on the base, so that the files are looked at without
        them."""
        for source in filter(None, (self.config.data, self.config.eval_data)):
            if data.is_local(source):
                data.raw_rows(source)

    def open(self) -> Any:
        config = config_of(self.config.base)
        if not getattr(config, "is_encoder_decoder", False):
            problem = f"{self.config.base}, a {config.model_type} model"
            raise ConfigError(
                problem,
                "an encoder with a decoder, such as T5 or Whisper",
                "choose another base or task",
            )
        from transformers.models.auto import modeling_auto as auto

        self.speech = config.model_type in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        self.auto = "AutoModelForSpeechSeq2Seq" if self.speech else "AutoModelForSeq2SeqLM"
        self.processor = models.load_tokenizer(self.config.base)
        if self.speech:
            from transformers import AutoFeatureExtractor

            with loading(self.config.base):
                self.features = AutoFeatureExtractor.from_pretrained(
                    find_base(self.config.base), **code_options(self.config.base)
                )
        return self.processor

    def max_length(self) -> int:
        """Of an answer, and of a text that the encoder reads."""
        config = config_of(self.config.base)
        limit = getattr(config, "max_target_positions", None)
        return (
            min(prepare.max_length(self.config), limit)
            if limit
            else prepare.max_length(self.config)
        )

    def read(self, source: str, split: str) -> data.Records:
        raw, digest = data.raw_rows(source, split)
        parts = ("audio", "text") if self.speech else ("prompt", "completion")
        return data.select_fields(raw, source, digest, parts, (), self.config.columns)

    def encode(self, records: data.Records) -> Rows:
        answers = self._answers(texts_of(records, "text" if self.speech else "completion"))
        if self.speech:
            folder, rate = (
                Path(records.source).expanduser().parent,
                int(self.features.sampling_rate),
            )
            limit = getattr(self.features, "n_samples", None)  # what Whisper hears at once
            rows = []
            for row, place, labels in zip(records.rows, records.places, answers, strict=True):
                sound = sound_of(row["audio"], f"{records.source}, {place}", folder, rate)
                if limit is not None and len(sound) > limit:
                    problem = f"{records.source}, {place}: {len(sound) / rate:.1f} s of audio"
                    raise DataError(
                        problem,
                        f"at most {limit / rate:.1f} s, what the base hears at once",
                        "cut it",
                    )
                about = {"place": f"{records.source}, {place}", "folder": folder}
                rows.append({"audio": row["audio"], "labels": labels, **about})
        else:
            ids = self.processor(texts_of(records, "prompt"))["input_ids"]
            rows = [
                {"ids": list(own), "labels": labels}
                for own, labels in zip(ids, answers, strict=True)
            ]
        limit = self.max_length()
        longest = [max(len(row["labels"]), len(row.get("ids", ()))) for row in rows]

        def cut(row: dict[str, Any]) -> dict[str, Any]:  # both end with the end-of-text token
            names = [name for name in ("ids", "labels") if name in row and len(row[name]) > limit]
            return {**row, **{name: [*row[name][: limit - 1], row[name][-1]] for name in names}}

        kept, rows, count = limited(records, rows, longest, self.config, limit, cut)
        # sounds of similar length share a batch; what they take is not counted in tokens
        lengths = [len(row["labels"]) + len(row.get("ids", ())) for row in rows]
        learnt = [len(row["labels"]) for row in rows]
        return Rows(rows, lengths, kept, learnt, len(records) - len(rows), count)

    def _answers(self, texts: list[str]) -> list[list[int]]:
        end, made = self.processor.eos_token_id, []
        for ids in self.processor(text_target=texts)["input_ids"]:
            ids = ids[1:] if ids[:1] == [self.start] else ids  # `inputs` begins with it
            made.append(list(ids) if end is None or ids[-1:] == [end] else [*ids, end])
        return made

    def shown(self, row: dict[str, Any]) -> list[Shown]:
        answer = Shown(
            True, "text" if self.speech else "completion", self.processor.decode(row["labels"])
        )
        if not self.speech:
            return [Shown(False, "prompt", self.processor.decode(row["ids"])), answer]
        rate = int(self.features.sampling_rate)
        seconds = len(sound_of(row["audio"], row["place"], row["folder"], rate)) / rate
        about = f"{row['audio']}, " if isinstance(row["audio"], str) else ""
        return [
            Shown(False, "audio", f"{about}{seconds:.2f} s at {rate:,} samples a second"),
            answer,
        ]

    def load(self) -> Base:
        base = super().load()
        config: Any = base.model.config
        if getattr(config, "decoder_start_token_id", None) is None:
            problem = f"{self.config.base}, whose config has no decoder_start_token_id"
            raise ConfigError(problem, "the token that answers begin with", "add it to config.json")
        self.dtype = next(
            value.dtype for value in base.model.parameters() if value.is_floating_point()
        )
        return base

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        labels = padded([row["labels"] for row in rows], IGNORED)
        if not self.speech:
            ids = [row["ids"] for row in rows]
            mask = padded([[1] * len(own) for own in ids], 0)
            return {
                "input_ids": padded(ids, pad_of(self.processor)),
                "attention_mask": mask,
                "labels": labels,
            }
        rate = int(self.features.sampling_rate)
        sounds = [sound_of(row["audio"], row["place"], row["folder"], rate) for row in rows]
        whole = "max_length" if hasattr(self.features, "n_samples") else True
        inputs = self.features(
            sounds,
            sampling_rate=rate,
            padding=whole,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {**inputs, "labels": labels}

    def items(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The answers one to the right, begun with the start token: what the decoder reads. Sounds
        are in the type of the base, which Whisper does not see to."""
        labels: Tensor = batch["labels"]
        start = torch.full_like(labels[:, :1], self.start)
        read = torch.cat(
            [start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad_of(self.processor))],
            dim=1,
        )
        heard = {
            name: (
                value.to(self.dtype)
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
            )
            for name, value in super().inputs(batch).items()
        }
        return {**heard, "decoder_input_ids": read, "use_cache": False}

    @cached_property
    def start(self) -> int:
        """The token that answers begin with."""
        return int(config_of(self.config.base).decoder_start_token_id)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        logits: Tensor = model(**self.inputs(batch)).logits  # [b, s, v]
        labels = batch["labels"].to(logits.device)
        there = labels != IGNORED
        chosen, right = logits[there], labels[there]
        total = cross_entropy(chosen.to(at_least_float32(chosen.dtype)), right, reduction="sum")
        return TaskLoss(
            total, len(right), {"accuracy": (chosen.detach().argmax(dim=-1) == right).sum()}
        )
