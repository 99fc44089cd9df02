"""The adapters that the mutations damage: adapters of Veneer and of PEFT, of every kind that is
stored differently in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer


class Text(nn.Module):
    """A model of texts: embedding, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 6), "up": nn.Linear(6, 6)}) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["up"](torch.tanh(layer["q"](x)))
        return self.head(self.norm(x))


class Image(nn.Module):
    """A model of images: convolutions with and without groups, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=2)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.deep(self.conv(x)))).mean((-2, -1)))


#: the input of each model
INPUTS: dict[type, Callable[[], torch.Tensor]] = {
    Text: lambda: torch.tensor([[1, 5, 3], [2, 0, 6]]),
    Image: lambda: torch.linspace(-1, 1, 100).view(2, 2, 5, 5),
}


@dataclass(frozen=True)
class Seed:
    """An adapter of a model. ``fields``: those of its config. ``ours``: whether Veneer makes it, or
    PEFT."""

    name: str
    model: type[nn.Module]
    fields: dict[str, Any]
    ours: bool = True

    def base(self, other: bool = False) -> nn.Module:
        """The model of the adapter, or another model with the same shapes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 if other else 1)
            return self.model().eval()

    def write(self, folder: Path, number: int) -> None:
        """Write an adapter. Adapters with another ``number`` differ in their values alone."""
        model = self.base()
        torch.manual_seed(10 + number)
        if self.ours:
            handle = veneer.attach(
                model, veneer.LoraConfig(**{"rank": 2, "alpha": 3, **self.fields})
            )
            _add_noise(handle.parameters())
            handle.save(folder, provenance={"steps": 3, "loss": 1.5})
            return
        import peft

        peft_model = peft.get_peft_model(
            model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **self.fields})
        )
        _add_noise(parameter for parameter in peft_model.parameters() if parameter.requires_grad)
        peft_model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)


def _add_noise(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)


LINEAR = ["q", "up"]
SEEDS = {
    seed.name: seed
    for seed in (
        Seed("lora", Text, {}),
        Seed(
            "lora in bfloat16", Text, {"dtype": "bfloat16", "ranks": {"q": 1}, "alphas": {"up": 5}}
        ),
        Seed(
            "rslora of rows",
            Text,
            {"targets": ["q"], "slices": {"q": [True, False]}, "variant": "rslora"},
        ),
        Seed("dora", Text, {"targets": LINEAR, "variant": "dora"}),
        Seed("vera", Text, {"targets": ["0.q"], "variant": "vera"}),
        Seed("loha", Text, {"targets": ["0.up"], "variant": "loha"}),
        Seed("everything", Text, {"targets": "all"}),
        Seed(
            "embedding and head",
            Text,
            {"targets": ["embed"], "train_also": ["head"], "bias": "all"},
        ),
        Seed("convolutions", Image, {"targets": ["conv", "deep"], "train_also": ["norm"]}),
        Seed("peft", Text, {"target_modules": LINEAR}, False),
        Seed(
            "peft with patterns",
            Text,
            {
                "target_modules": r".*\.(q|up)",
                "rank_pattern": {"q": 1},
                "alpha_pattern": {r"layers\.1\.up": 5},
                "modules_to_save": ["head"],
            },
            False,
        ),
        Seed(
            "peft's dora of one layer",
            Text,
            {
                "target_modules": ["q"],
                "use_dora": True,
                "layers_to_transform": [1],
                "layers_pattern": "layers",
            },
            False,
        ),
        Seed(
            "peft's embedding",
            Text,
            {"target_modules": ["embed"], "target_parameters": ["0.up.weight"]},
            False,
        ),
        Seed(
            "peft's convolution",
            Image,
            {"target_modules": ["conv"], "modules_to_save": ["norm"]},
            False,
        ),
    )
}


def write_all(folder: Path) -> None:
    """Write two adapters of each seed, and the names of the seeds."""
    for number, seed in enumerate(SEEDS.values()):
        for copy_number in range(2):
            seed.write(folder / f"{number}-{copy_number}", 2 * number + copy_number)
    (folder / "seeds.json").write_text(json.dumps(list(SEEDS)))
