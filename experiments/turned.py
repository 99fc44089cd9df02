"""Digits turned by a quarter, for a small ViT that was trained on upright ones: a real task of
seconds.

Of the 1,797 images of scikit-learn's `load_digits` the base sees 700, upright; the others are
turned: 400 to train on, 200 aside, by which rates are chosen, 497 that judge. The head is the
base's own, and frozen in every method.

    train, aside, test = turned(smoke)
    model = base(smoke)
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import veneer
import veneer.optim
from experiments.experiment import Cell, Run, grouped, mean
from experiments.loop import batches_of, begin, train, trained

WIDTH, INNER, LAYERS, HEADS = 64, 192, 4, 4
SEEN, TRAIN, ASIDE = 700, 400, 200
ABOUT = """The task: the 1,797 handwritten digits of scikit-learn, for a ViT of four blocks (64 wide, feed-forward 192)
that was trained on 700 of them upright and is adapted to others, turned by a quarter: 400 to train on, 200 aside, by
which rates are chosen, 497 that judge. Its head is frozen. One loop for all: AdamW without weight decay, a rate that
rises over a tenth of the steps and then falls to 0, gradients clipped to a norm of 1, the same rows in the same order
for a seed."""


class Rows(NamedTuple):
    """`pixels` [rows, 3, 8, 8] from -1 to 1, `labels` [rows]."""

    pixels: Tensor
    labels: Tensor


def lacking() -> str | None:
    if find_spec("sklearn"):
        return None
    return (
        "Found: no sklearn. Expected: scikit-learn, for its digits. Do: pip install scikit-learn."
    )


def _digits(smoke: bool) -> Rows:
    """Upright, in an order of their own."""
    if smoke:
        return Rows(torch.arange(120.0 * 192).reshape(120, 3, 8, 8).sin(), torch.arange(120) % 10)
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(found.images).float()[order, None] / 8 - 1
    return Rows(pixels.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target)[order])


def turned(smoke: bool) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, aside, and those that judge."""
    pixels, labels = _digits(smoke)
    pixels = pixels.rot90(1, (2, 3)).contiguous()
    ends = (40, 80, 100, 120) if smoke else (SEEN, SEEN + TRAIN, SEEN + TRAIN + ASIDE, len(labels))
    parts = [Rows(pixels[start:end], labels[start:end]) for start, end in itertools.pairwise(ends)]
    return parts[0], parts[1], parts[2]


def base(smoke: bool) -> Any:
    """The ViT, trained on upright digits: the same one in every run."""
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = _digits(smoke)
    rows = 40 if smoke else SEEN
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if not smoke:
        shape = dict(zip(shape, (WIDTH, LAYERS, HEADS, INNER), strict=True))
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=2, num_labels=10, **shape, **none)
        )
    train(
        model.parameters(), batches_of(rows, 64, 0), lambda own: loss_of(model, Rows(pixels[own], labels[own])),
        steps=3 if smoke else 300, rate=1e-3,
    )  # fmt: skip
    return model


def loss_of(model: Any, rows: Rows) -> Tensor:
    return torch.nn.functional.cross_entropy(model(rows.pixels).logits, rows.labels)


@torch.no_grad()
def judge(model: Any, rows: Rows) -> dict[str, float]:
    logits = model(rows.pixels).logits
    right = (logits.argmax(-1) == rows.labels).float().mean().item()
    return {"loss": torch.nn.functional.cross_entropy(logits, rows.labels).item(), "right": right}


def write(folder: Path, model: Any, **parts: Rows) -> None:
    """`base/` and a file of rows each, as `veneer train` reads them."""
    from transformers import ViTImageProcessor

    model.save_pretrained(folder / "base")
    half, size = [0.5] * 3, {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=half, image_std=half).save_pretrained(folder / "base")
    for name, (pixels, labels) in parts.items():
        images = (pixels + 1).mul(127.5).round().int().permute(0, 2, 3, 1).tolist()
        rows = [
            {"image": image, "label": label}
            for image, label in zip(images, labels.tolist(), strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def swept(
    folder: Path, axes: Mapping[str, list[Any]], *, steps: int, batch: int = 32, **settings: Any
) -> list[dict]:
    """`veneer sweep` of the axes, each candidate to its end, on what `write` left in `folder` (rows
    `train`, and `judge`): the changes of each, what it trains (`numbers`), and how it did on the
    rows that judge."""
    from veneer.train.config import make_config
    from veneer.train.sweep.sweep_run import sweep
    from veneer.train.sweep.sweep_settings import Sweep

    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = make_config({
            "base": str(folder / "base"), "data": str(folder / "train.jsonl"), "eval_data": str(folder / "judge.jsonl"),
            "output": output, "task": "classify", "max_steps": steps, "batch_size": batch, "eval_every": steps,
            "save_every": steps, "schedule": "linear", "warmup": 0.1, "precision": "fp32", **settings,
        })  # fmt: skip
        facts = sweep(config, Sweep(axes=dict(axes), rungs=[], at_once=20), quiet=True).facts
    found = []
    for one in facts["candidates"]:
        if one["status"] != "finished":
            raise RuntimeError(f"{one['changes']}: {one['note']}")
        last = one["evaluations"][-1][1]
        found.append(
            {
                **one["changes"],
                "numbers": one["parameters"],
                "loss": last["loss"],
                "right": last["accuracy"],
            }
        )
    return found


def fitted(
    model: Any, method: str, *, rate: float, seed: int, steps: int, smoke: bool, batch: int = 32,
    lora: veneer.LoraConfig | None = None, plus: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A copy of `model`, trained by `method` (see `experiments.loop`) with its head frozen: `rate`,
    `seed`, what it trained (`numbers`), and how it did on the rows aside (`aside_loss`) and on
    those that judge (`loss`, `right`). `plus`: LoRA+, B at 16 times the rate of A."""
    rows, aside, test = turned(smoke)
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    begin(model, method, lora=lora)
    model.classifier.requires_grad_(False)
    own = trained(model)
    train(
        own, batches_of(len(rows.labels), batch, seed),
        lambda chosen: loss_of(model, Rows(rows.pixels[chosen], rows.labels[chosen])), steps=steps, rate=rate,
        groups=veneer.optim.lora_plus(model, rate) if plus else None,
    )  # fmt: skip
    numbers = sum(parameter.numel() for parameter in own)
    about = {"rate": rate, "seed": seed, "numbers": numbers}
    return {**about, "aside_loss": judge(model, aside)["loss"], **judge(model, test)}


def tried(cell: Cell, model: Any, method: str, steps: int, **settings: Any) -> list[dict[str, Any]]:
    """`fitted` at all rates and seeds of a cell."""
    rates_seeds = itertools.product(cell["rates"], cell["seeds"])
    return [
        fitted(model, method, rate=rate, seed=seed, steps=steps, smoke=cell["smoke"], **settings)
        for rate, seed in rates_seeds
    ]


def by_rate(runs: Sequence[Run], key: str) -> list[tuple[float, float]]:
    """Points of a drawing: log10 of each rate, and the mean of what was measured there."""
    return [(math.log10(rate), mean(own, key)) for (rate,), own in grouped(runs, "rate").items()]


def tuned(runs: Sequence[Run]) -> list[Run]:
    """Of the runs of a setting at several rates and seeds, those at the rate with the least mean
    loss aside."""
    by_rate = grouped(runs, "rate")
    return min(by_rate.values(), key=lambda own: mean(own, "aside_loss"))
