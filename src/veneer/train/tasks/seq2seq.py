"""Train encoder-decoder models: text to text, or speech to text.

columns               models                 the encoder reads
prompt, completion    T5, BART, …            the prompt
audio, text           Whisper, Moonshine, …  the audio: a .wav file or its samples (`_media.py`)

loss = -log p(token of the answer), as a mean over the tokens of the completion or of the text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import models
from veneer.errors import ConfigError, DataError
from veneer.models.load import padding_token
from veneer.models.locate import config_of, find_base
from veneer.models.messages import loading
from veneer.models.remote_code import code_options
from veneer.train import data, prepare
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
    token_batch,
    truncate_ids,
)
from veneer.train.tasks._media import read_audio
from veneer.train.tokens import IGNORED


@register
class Seq2seq(Task):
    auto_class, loss_unit = "AutoModelForSeq2SeqLM", "token"
    uses_single_forward = True

    def read_data(self) -> None:
        """Check that local files can be parsed. `read` reads them again and checks the columns once
        the base is open, because speech models need other columns than text models."""
        for source in filter(None, (self.config.data, self.config.eval_data)):
            if data.is_local(source):
                data.raw_rows(source)

    def open_base(self) -> Any:
        config = config_of(self.config.base)
        if not getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{self.config.base}, a {config.model_type} model",
                "an encoder with a decoder, such as T5 or Whisper",
                "choose another base or task",
            )
        from transformers.models.auto import modeling_auto

        self.is_speech = config.model_type in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        self.auto_class = "AutoModelForSpeechSeq2Seq" if self.is_speech else "AutoModelForSeq2SeqLM"
        self.processor = models.load_tokenizer(self.config.base)
        if self.is_speech:
            from transformers import AutoFeatureExtractor

            with loading(self.config.base):
                self.feature_extractor = AutoFeatureExtractor.from_pretrained(
                    find_base(self.config.base), **code_options(self.config.base)
                )
        return self.processor

    def max_length(self) -> int:
        """The maximal number of tokens of an answer, and of a prompt that the encoder reads: that
        of the configuration, or less if the decoder has fewer positions."""
        config = config_of(self.config.base)
        position_limit = getattr(config, "max_target_positions", None)
        return (
            min(prepare.max_length(self.config), position_limit)
            if position_limit
            else prepare.max_length(self.config)
        )

    def read(self, source: str, split: str) -> data.Records:
        located_rows, digest = data.raw_rows(source, split)
        columns = ("audio", "text") if self.is_speech else ("prompt", "completion")
        return data.select_fields(located_rows, source, digest, columns, (), self.config.columns)

    def encode(self, records: data.Records) -> Rows:
        answer_ids = self._answer_ids(
            read_text_column(records, "text" if self.is_speech else "completion")
        )
        if self.is_speech:
            folder = Path(records.source).expanduser().parent
            sample_rate = int(self.feature_extractor.sampling_rate)
            # Whisper reads a window of n_samples samples; other extractors have no such limit
            max_samples = getattr(self.feature_extractor, "n_samples", None)
            rows = []
            for row, location, labels in zip(
                records.rows, records.locations, answer_ids, strict=True
            ):
                samples = read_audio(
                    row["audio"], f"{records.source}, {location}", folder, sample_rate
                )
                if max_samples is not None and len(samples) > max_samples:
                    seconds = len(samples) / sample_rate
                    raise DataError(
                        f"{records.source}, {location}: {seconds:.1f} s of audio",
                        f"at most {max_samples / sample_rate:.1f} s, what the base hears at once",
                        "cut it",
                    )
                location_fields = {"location": f"{records.source}, {location}", "folder": folder}
                rows.append({"audio": row["audio"], "labels": labels, **location_fields})
        else:
            prompt_ids = self.processor(read_text_column(records, "prompt"))["input_ids"]
            rows = [
                {"ids": list(token_ids), "labels": labels}
                for token_ids, labels in zip(prompt_ids, answer_ids, strict=True)
            ]
        token_limit = self.max_length()
        text_lengths = [max(len(row["labels"]), len(row.get("ids", ()))) for row in rows]
        truncated_fields = {"labels"} if self.is_speech else {"ids", "labels"}
        retained_indices, rows, truncated_count = apply_max_length(
            records,
            rows,
            text_lengths,
            self.config,
            token_limit,
            lambda row: (
                row
                | {
                    name: truncate_ids(row[name], token_limit, self.processor)
                    for name in truncated_fields
                }
            ),
        )
        # the lengths by which `group_by_length` groups rows; audio is not counted
        lengths = [len(row["labels"]) + len(row.get("ids", ())) for row in rows]
        head_token_counts = [len(row["labels"]) for row in rows]
        return Rows(
            rows,
            lengths,
            retained_indices,
            head_token_counts,
            len(records) - len(rows),
            truncated_count,
        )

    def _answer_ids(self, texts: list[str]) -> list[list[int]]:
        end_id, answer_ids = self.processor.eos_token_id, []
        for ids in self.processor(text_target=texts)["input_ids"]:
            # remove the start token, because `inputs` prepends it
            ids = ids[1:] if ids[:1] == [self.start_id] else ids
            answer_ids.append(
                list(ids) if end_id is None or ids[-1:] == [end_id] else [*ids, end_id]
            )
        return answer_ids

    def segments(self, row: dict[str, Any]) -> list[RowSegment]:
        answer = RowSegment(
            True, "text" if self.is_speech else "completion", self.processor.decode(row["labels"])
        )
        if not self.is_speech:
            return [RowSegment(False, "prompt", self.processor.decode(row["ids"])), answer]
        sample_rate = int(self.feature_extractor.sampling_rate)
        seconds = (
            len(read_audio(row["audio"], row["location"], row["folder"], sample_rate)) / sample_rate
        )
        file_name = f"{row['audio']}, " if isinstance(row["audio"], str) else ""
        return [
            RowSegment(
                False,
                "audio",
                f"{file_name}{seconds:.2f} s at {sample_rate:,} samples a second",
            ),
            answer,
        ]

    def load(self) -> Base:
        base = super().load()
        config: Any = base.model.config
        if getattr(config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"{self.config.base}, whose config has no decoder_start_token_id",
                "the token that answers begin with",
                "add it to config.json",
            )
        self.dtype = next(
            parameter.dtype
            for parameter in base.model.parameters()
            if parameter.is_floating_point()
        )
        return base

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        labels = [row["labels"] for row in rows]
        if not self.is_speech:
            return token_batch([row["ids"] for row in rows], labels, padding_token(self.processor))
        sample_rate = int(self.feature_extractor.sampling_rate)
        clips = [
            read_audio(row["audio"], row["location"], row["folder"], sample_rate) for row in rows
        ]
        padding = "max_length" if hasattr(self.feature_extractor, "n_samples") else True
        audio_features = self.feature_extractor(
            clips,
            sampling_rate=sample_rate,
            padding=padding,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {**audio_features, "labels": pad_rows(labels, IGNORED)}

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of the model's forward. `decoder_input_ids` are the labels, shifted
        right by one position after the start token. Audio features are cast to the dtype of the
        base, because Whisper requires it."""
        labels: Tensor = batch["labels"]
        start_tokens = torch.full_like(labels[:, :1], self.start_id)
        decoder_ids = torch.cat(
            [
                start_tokens,
                labels[:, :-1].masked_fill(
                    labels[:, :-1] == IGNORED, padding_token(self.processor)
                ),
            ],
            dim=1,
        )
        encoder_inputs = {
            name: (
                value.to(self.dtype)
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
            )
            for name, value in super().inputs(batch).items()
        }
        return {**encoder_inputs, "decoder_input_ids": decoder_ids, "use_cache": False}

    @cached_property
    def start_id(self) -> int:
        """The id of the token with which the decoder's input begins."""
        return int(config_of(self.config.base).decoder_start_token_id)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> TaskLoss:
        return labelled_loss(model(**self.inputs(batch)).logits, batch["labels"])
