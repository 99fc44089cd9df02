"""The interface of a library in the cases, and the result of a case."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RIGHT, WRONG, CRASHES = "right", "wrong without a word", "crashes"
REFUSES, UNCHECKED = "refuses with words", "does not check"
#: the columns of the table
OUTCOMES = (RIGHT, WRONG, CRASHES, REFUSES, UNCHECKED)

Selection = str | None | Sequence[str | None]


class NotOffered(Exception):  # noqa: N818  (an answer, no failure)
    """The library has no such function, as its documentation shows: nobody gets a wrong number."""


@dataclass(frozen=True)
class Result:
    """The outcome of a case, the number that the library gave and the right one.

    ``measures`` are the numbers behind the text.
    """

    outcome: str
    text: str
    got: str = ""
    right: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)


class Adapter(ABC):
    """One adapter on one model. ``model`` is what to call."""

    model: nn.Module

    def prepare(self) -> None:
        """Make the model one to be called: unmerged, and without dropout."""
        self.model.eval()

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The adapter parameters, in the order of the layers."""

    @abstractmethod
    def merge(self, *, safe: bool = False) -> None:
        """Fold it into the weights; ``safe`` asks for the checks that the library has for that."""

    @abstractmethod
    def unmerge(self) -> None: ...

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The base's parameters under the names that they had before, ties included."""

    @abstractmethod
    def delta(self, path: str) -> Tensor:
        """ΔW [out, in] of the layer at ``path``, in float64 from the adapter parameters."""


class Library(ABC):
    """A library at its defaults. A function that it does not have raises NotOffered."""

    name: str
    package: str
    distribution: str
    #: the targets that mean all weights of a MultiheadAttention named ``layer``
    attention: tuple[str, ...] = ("layer",)

    @abstractmethod
    def attach(
        self,
        model: nn.Module,
        targets: Sequence[str] | str,
        *,
        rank: int = 2,
        name: str = "one",
        **options: Any,
    ) -> Adapter:
        """Attach an adapter of scale 2 (rsLoRA: times √rank) to a plain model or an adapted one.

        Args:
            targets: paths of modules, or suffixes of them at a dot; or "all-linear".
            options: ``dropout``; ``layers``, indices of blocks; ``variant``, "lora", "rslora" or
                "dora".
        """

    def call(self, model: nn.Module, x: Tensor, selection: Selection) -> Tensor:
        """Run an adapted model with ``selection``: a name, None for the base, or one of these for
        each row of the batch."""
        raise NotOffered("has no adapters to select by name")

    def combine(
        self, adapter: Adapter, names: Sequence[str], weights: Sequence[float], into: str
    ) -> Adapter:
        """A new adapter ``into``, whose ΔW is the weighted sum of those of ``names``."""
        raise NotOffered("does not combine adapters")

    @abstractmethod
    def save(self, adapter: Adapter, folder: Path) -> None: ...

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> Adapter: ...

    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors in an adapter's folder."""
        (file,) = folder.rglob("*.safetensors")
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, header)

    def remove_alpha(self, folder: Path) -> None:
        """Remove the scale of ΔW from an adapter's folder."""
        (file,) = folder.rglob("adapter_config.json")
        config = json.loads(file.read_text())
        del config["lora_alpha"]
        file.write_text(json.dumps(config))

    def disguises(self, folder: Path) -> list[Path]:
        """The folder, and copies of it without the records that would show a change."""
        return [folder]


def linear_paths(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """The targets as a list, with the paths of all linear layers for "all-linear"."""
    if targets != "all-linear":
        return list(targets)
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
