"""Digits turned by a quarter, for a small ViT that was trained on upright digits: a real task whose
runs take seconds. The pages on weights, rates and variants share it.

Of the 1,797 images of scikit-learn's `load_digits` the base sees 700, upright; the others are
turned: 400 to train on, 200 aside, 497 for results. The head is the base's, and frozen in every
method.
"""

from __future__ import annotations

import copy
import itertools
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import veneer
import veneer.optim
from experiments import training
from experiments.study import Cell
from veneer.errors import sentence

WIDTH, INNER, LAYERS, HEADS = 64, 192, 4, 4
SEEN, TRAIN, ASIDE = 700, 400, 200
#: rows that a run sees
ROWS, BATCH = 2560, 32
#: a run takes 2 seconds, so more seeds than the three that the rule asks for
SEEDS = tuple(range(10))
COLUMNS = {"right": "right", "loss": "loss"}
ABOUT = f"""
The task: the 1,797 handwritten digits of scikit-learn, for a ViT of four blocks (64 wide,
feed-forward 192) that was trained on {SEEN} of them upright and is adapted to others, turned by a
quarter: {TRAIN} to train on, {ASIDE} aside, 497 for results. Its head is frozen. One loop for all:
AdamW without weight decay, a rate that rises over a tenth of the steps and then falls to 0,
gradients clipped to a norm of 1, the same rows in the same order for a seed. A rate is chosen by
the loss on the rows aside.
""".strip()


class Rows(NamedTuple):
    """`pixels` [rows, 3, 8, 8] from -1 to 1, `labels` [rows]."""

    pixels: Tensor
    labels: Tensor


def missing_data() -> str | None:
    if find_spec("sklearn"):
        return None
    return sentence("no sklearn", "scikit-learn, for its digits", "run pip install scikit-learn")


@cache
def load_digits(toy: bool) -> Rows:
    """Upright digits, shuffled."""
    if toy:
        return Rows(torch.arange(120.0 * 192).reshape(120, 3, 8, 8).sin(), torch.arange(120) % 10)
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(digits.images).float()[order, None] / 8 - 1
    labels = torch.from_numpy(digits.target)[order]
    return Rows(pixels.expand(-1, 3, -1, -1).contiguous(), labels)


@cache
def load_turned(toy: bool) -> tuple[Rows, Rows, Rows]:
    """Turned rows: to train on, aside, and for results."""
    pixels, labels = load_digits(toy)
    pixels = pixels.rot90(1, (2, 3)).contiguous()
    ends = (40, 80, 100, 120) if toy else (SEEN, SEEN + TRAIN, SEEN + TRAIN + ASIDE, len(labels))
    splits = [Rows(pixels[start:end], labels[start:end]) for start, end in itertools.pairwise(ends)]
    return splits[0], splits[1], splits[2]


@cache
def load_base(toy: bool) -> Any:
    """The ViT, trained on upright digits."""
    from transformers import ViTConfig, ViTForImageClassification

    pixels, labels = load_digits(toy)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_labels=10,
        hidden_size=WIDTH,
        num_hidden_layers=1 if toy else LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = ViTForImageClassification(config)
    training.train(
        model.parameters(),
        training.draw_batches(40 if toy else SEEN, 64, 0),
        lambda batch: loss_of(model, Rows(pixels[batch], labels[batch])),
        steps=3 if toy else 300,
        rate=1e-3,
    )
    return model


def loss_of(model: Any, rows: Rows) -> Tensor:
    return torch.nn.functional.cross_entropy(model(rows.pixels).logits, rows.labels)


def adapt(cell: Cell, lora: veneer.LoraConfig | None, *, plus: bool = False) -> dict[str, Any]:
    """Train a copy of the base in full, or by `lora`, on the rows, batch, rate and seed of a cell.
    `plus`: LoRA+, with B at 16 times the rate of A. Returns the count of trained numbers, the loss
    aside, and the loss and the share of right answers of the results."""
    toy = bool(cell.get("toy"))
    rows, aside, test = load_turned(toy)
    model = copy.deepcopy(load_base(toy))
    torch.manual_seed(cell["seed"])
    training.make_trainable(model, "lora" if lora else "full", lora=lora)
    model.classifier.requires_grad_(False)
    parameters = training.trainable(model)
    training.train(
        parameters,
        training.draw_batches(len(rows.labels), cell["batch"], cell["seed"]),
        lambda batch: loss_of(model, Rows(rows.pixels[batch], rows.labels[batch])),
        steps=cell["rows"] // cell["batch"],
        rate=cell["rate"],
        groups=veneer.optim.lora_plus(model, cell["rate"]) if plus else None,
    )
    with torch.no_grad():
        aside_loss = loss_of(model, aside).item()
        logits = model(test.pixels).logits
        test_loss = torch.nn.functional.cross_entropy(logits, test.labels).item()
        right = (logits.argmax(-1) == test.labels).float().mean().item()
    numbers = sum(parameter.numel() for parameter in parameters)
    return {"numbers": numbers, "aside": aside_loss, "loss": test_loss, "right": right}
