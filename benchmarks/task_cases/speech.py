"""Numbers that espeak-ng speaks, in a voice that the base, a small Whisper, has not heard. There are few rows to learn
from, fewer than there are numbers: with more, any adapter gets all of them right."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from task_cases.case import BASE, Case, adapted, plain_trainer, rows_of, rows_to

HERTZ = 16000
VOICES = {"base": ("en-us", "en-us+m3"), "new": ("en-gb-scotland+f2",)}


def needs_espeak(options: argparse.Namespace) -> str | None:
    return None if shutil.which("espeak-ng") else "espeak-ng (apt-get install espeak-ng)"


def spoken(number: int, voice: str, speed: int, pitch: int, file: Path) -> list[float]:
    """espeak-ng's 22,050 samples a second as 16,000, by the spectrum."""
    import numpy as np

    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(file), str(number)]
    subprocess.run(command, check=True, capture_output=True)
    with wave.open(str(file)) as sound:
        rate = sound.getframerate()
        samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2") / 32768
    loud = np.flatnonzero(np.abs(samples) > 0.005)
    samples = samples[loud[0] : loud[-1] + 1]
    length = round(len(samples) * HERTZ / rate)
    spectrum = np.fft.rfft(samples)
    cut = spectrum[: length // 2 + 1]
    return (np.fft.irfft(cut, length) * length / len(samples))[: 2 * HERTZ - 1].round(4).tolist()


def write_speech(folder: Path, options: argparse.Namespace) -> None:
    """A small Whisper that has learnt numbers in some voices; the rows are in another."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    draw, file = random.Random(0), folder / "one.wav"
    count = {"base": 12, "new": 8} if options.quick else {"base": 1200, "new": 420}
    sets: dict[str, list[dict[str, Any]]] = {}
    for part, voices in VOICES.items():
        sets[part] = []
        for _ in range(count[part]):
            number, voice = draw.randint(0, 99), draw.choice(voices)
            sound = spoken(number, voice, draw.randint(130, 210), draw.randint(30, 70), file)
            sets[part].append({"audio": sound, "text": str(number)})
    file.unlink()
    held = len(sets["new"]) * 6 // 7
    rows_to(folder / "train.jsonl", sets["new"][held:])
    rows_to(folder / "test.jsonl", sets["new"][:held])
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *"0123456789"])}
    backend = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 256))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary), num_mel_bins=40, d_model=96, max_source_positions=100, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=None,
        suppress_tokens=None, dropout=0.0, **sizes,
    )  # fmt: skip
    hearing = transformers.WhisperFeatureExtractor(feature_size=40, chunk_length=2)
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).train()
    optimiser, steps = torch.optim.AdamW(model.parameters(), 1e-3), 4 if options.quick else 900
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    ready = sound_batch(hearing, tokenizer, sets["base"])
    for step in range(steps):
        chosen = torch.randint(0, len(sets["base"]), (32,), generator=torch.Generator().manual_seed(step))
        loss = model(**{name: value[chosen] for name, value in ready.items()}).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    for one in (model.eval(), tokenizer, hearing):
        one.save_pretrained(folder / BASE)


def sound_batch(hearing: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np
    import torch

    sounds = [np.asarray(row["audio"], dtype=np.float32) for row in rows]
    features = hearing(sounds, sampling_rate=HERTZ, return_tensors="pt")["input_features"]
    labels = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([row["text"] for row in rows])["input_ids"]]
    width = max(map(len, labels))
    return {
        "input_features": features,
        "labels": torch.tensor([[*own, *[-100] * (width - len(own))] for own in labels]),
    }


def begin_speech(folder: Path) -> Any:
    from transformers import AutoModelForSpeechSeq2Seq

    return adapted(AutoModelForSpeechSeq2Seq.from_pretrained(folder / BASE), None)


def train_speech(folder: Path, arguments: dict[str, Any], dtype: str, callbacks: list[Any]) -> tuple[Any, Any]:
    from transformers import AutoFeatureExtractor, AutoTokenizer

    tokenizer, hearing = (one.from_pretrained(folder / BASE) for one in (AutoTokenizer, AutoFeatureExtractor))
    model = begin_speech(folder)
    rows = rows_of(folder / "train.jsonl")
    plain_trainer(model, rows, lambda part: sound_batch(hearing, tokenizer, part), arguments, callbacks).train()
    return model, tokenizer


def judge_speech(model: Any, tokenizer: Any, folder: Path) -> float:
    """The share of numbers that are exactly right, by the likeliest digit each time."""
    import torch
    from transformers import AutoFeatureExtractor

    rows = rows_of(folder / "test.jsonl")
    features = sound_batch(AutoFeatureExtractor.from_pretrained(folder / BASE), tokenizer, rows)["input_features"]
    ids = torch.ones(len(rows), 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_features=features, decoder_input_ids=ids, use_cache=False).logits[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], dim=1)
    told = [own[1 : own.index(2)] if 2 in own else own[1:] for own in ids.tolist()]
    right = [tokenizer(row["text"])["input_ids"] for row in rows]
    return sum(one == other for one, other in zip(told, right, strict=True)) / len(rows)


SPEECH = Case(
    write_speech, train_speech, judge_speech, 120, 16, 2e-3, {"task": "seq2seq"}, needs_espeak, seeds=12,
    begin=begin_speech,
)  # fmt: skip
