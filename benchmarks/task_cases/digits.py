"""Digits turned by a quarter, with a small ViT that knows upright ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from task_cases.case import BASE, Case, adapted, plain_trainer, rows_of, rows_to


def needs_sklearn(options: argparse.Namespace) -> str | None:
    from importlib.util import find_spec

    return None if find_spec("sklearn") else "scikit-learn, for its digits"


def write_digits(folder: Path, options: argparse.Namespace) -> None:
    """A small ViT that knows upright digits; the rows are others of them, turned by a quarter."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images, labels = (digits.images[order] * 15).astype("uint8"), digits.target[order]
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = ViTForImageClassification(config).train()
    size, half = {"height": 8, "width": 8}, [0.5] * 3
    processor = ViTImageProcessor(size=size, image_mean=half, image_std=half)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    pixels = torch.from_numpy(images[:900]).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)
    for step in range(10 if options.quick else 400):
        chosen = torch.randint(0, 900, (64,), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(pixels[chosen]).logits, torch.from_numpy(labels)[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.vit.save_pretrained(folder / BASE)
    processor.save_pretrained(folder / BASE)
    turned = np.rot90(images, axes=(1, 2))
    rows = [{"image": one.tolist(), "label": int(label)} for one, label in zip(turned, labels, strict=True)]
    rows_to(folder / "train.jsonl", rows[900:1400])
    rows_to(folder / "test.jsonl", rows[1400:])


def image_batch(processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np
    import torch

    images = [np.repeat(np.asarray(row["image"], dtype="uint8")[..., None], 3, -1) for row in rows]
    pixels = processor(images, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


def begin_digits(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder / BASE, num_labels=10)
    return adapted(model, None, exclude_modules=["classifier"], modules_to_save=["classifier"])


def train_digits(folder: Path, arguments: dict[str, Any], dtype: str, callbacks: list[Any]) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder / BASE)
    model = begin_digits(folder)
    rows = rows_of(folder / "train.jsonl")
    plain_trainer(model, rows, lambda part: image_batch(processor, part), arguments, callbacks).train()
    return model, processor


def judge_digits(model: Any, processor: Any, folder: Path) -> float:
    import torch

    batch = image_batch(processor, rows_of(folder / "test.jsonl"))
    with torch.no_grad():
        found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    names = [int(model.config.id2label[int(one)].removeprefix("LABEL_")) for one in found]
    return float((torch.tensor(names) == batch["labels"]).float().mean())


DIGITS = Case(
    write_digits, train_digits, judge_digits, 400, 32, 3e-3, {"task": "classify"}, needs_sklearn, seeds=12,
    begin=begin_digits,
)  # fmt: skip
