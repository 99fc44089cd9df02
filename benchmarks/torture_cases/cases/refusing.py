"""What is to be refused: files that are not what they were, and requests that cannot be met."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torture_cases.cases._case import case
from torture_cases.judges import (
    randomise,
    refused,
)
from torture_cases.library import Adapter, Library, Result
from torture_cases.models import Stack

FILES = "other base with the same shapes, flipped byte, NaN weights, extra keys, missing alpha"


def flip_a_byte(library: Library, adapter: Adapter, folder: Path) -> None:
    """The lowest bit of the first byte of a trained number."""
    for file in folder.rglob("*"):
        for parameter in adapter.parameters():
            content, needle = (
                bytearray(file.read_bytes() if file.is_file() else b""),
                parameter.detach().numpy(),
            )
            position = content.find(needle.tobytes())
            if position >= 0:
                content[position] ^= 1
                file.write_bytes(content)
                return
    raise AssertionError("no file holds a trained tensor")


def poison_a_tensor(tensors: dict[str, Tensor]) -> None:
    next(tensor for key, tensor in tensors.items() if tensor.dim() == 2).view(-1)[0] = float("nan")


def add_a_layer(tensors: dict[str, Tensor]) -> None:
    tensors |= {key.replace("linear", "ghost"): tensor.clone() for key, tensor in tensors.items()}


def edited(change: Callable[[dict[str, Tensor]], None]):
    return lambda library, _, folder: library.edit(folder, change)


def forget_alpha(library: Library, adapter: Adapter, folder: Path) -> None:
    library.forget_alpha(folder)


@case(
    FILES,
    load_on_another_base={"same_base": False},
    load_after_a_flipped_byte={"damage": flip_a_byte},
    load_of_nan={"damage": edited(poison_a_tensor), "disguised": True},
    load_of_extra_keys={"damage": edited(add_a_layer), "disguised": True},
    load_without_alpha={"damage": forget_alpha, "disguised": True},
)
def load(
    library: Library,
    damage: Callable[[Library, Adapter, Path], None] | None = None,
    same_base: bool = True,
    disguised: bool = False,
) -> Result:
    base = Stack()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    adapter = library.attach(base, ["linear"])
    randomise(adapter)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        library.save(adapter, folder)
        if damage is not None:
            damage(library, adapter, folder)
        results = []
        for variant in library.disguises(folder) if disguised else [folder]:
            model = Stack()
            if same_base:
                model.load_state_dict(state)
            results.append(refused(library, lambda: library.load(model, variant)))  # noqa: B023
    return next((result for result in results if not result.ok), results[0])


ASKED = "dropout −0.5, rank 1000 on 16×16, one of two targets unmatched, layer index out of range"


@case(
    ASKED,
    dropout_below_zero={"dropout": -0.5},
    rank_1000_on_16_by_16={"rank": 1000},
    one_of_two_targets_unmatched={"targets": ["linear", "missing"]},
    layer_index_out_of_range={"layers": [0, 99]},
)
def asked(library: Library, targets: Sequence[str] = ("linear",), **options: Any) -> Result:
    return refused(library, lambda: library.attach(Stack(), targets, **options))
