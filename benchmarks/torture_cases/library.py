"""What a case may ask of a library, and what a case returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Selection = str | None | Sequence[str | None]


class NotOffered(Exception):  # noqa: N818  (an answer, no failure)
    """The library has no such thing, for the reason given: the case does not apply to it."""


@dataclass(frozen=True)
class Result:
    """What happened. ``ok`` is None where the case does not apply; ``measures`` are the numbers
    behind the text."""

    ok: bool | None
    text: str
    measures: Mapping[str, float] = field(default_factory=dict)


class Adapter(ABC):
    """One adapter on one model. ``model`` is what to call."""

    model: nn.Module

    def ready(self) -> None:
        """Make the model one to be called: unmerged, and without dropout."""
        self.model.eval()

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The trained numbers, in the order of the layers."""

    @abstractmethod
    def merge(self, *, safe: bool = False) -> None:
        """Fold it into the weights; ``safe`` asks for whatever the library has to make that exact
        or checked."""

    @abstractmethod
    def unmerge(self) -> None: ...

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The base's parameters under the names that they had before anything was attached, ties
        included."""

    @abstractmethod
    def delta(self, path: str) -> Tensor:
        """ΔW [out, in] of the layer at ``path``, in float64 from the trained numbers."""


class Library(ABC):
    """A library. What not every library has raises NotOffered here."""

    name: str
    package: str
    distribution: str
    #: what it raises when it refuses; anything else that is raised is a crash
    refusal: tuple[type[Exception], ...] = (Exception,)
    #: the targets that mean all of a MultiheadAttention named ``layer``
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
        """Attach an adapter of scale 2 (rsLoRA: times √rank) to a plain model, or another one to an
        adapter's model.

        Args:
            targets: paths of modules, or suffixes of them at a dot; or "all-linear".
            options: ``dropout``; ``layers``, indices of blocks; ``variant``, "lora", "rslora" or
                "dora"; ``tied``, to ask for one change of a tied weight where a library has to be
                asked.
        """

    def call(
        self,
        model: nn.Module,
        x: Tensor,
        selection: Selection,
        through: Callable[..., Any] | None = None,
    ):
        """Run an adapter's model with the adapter ``selection``: a name, None for the base, or one
        of these for each row of the batch. ``through`` is the model compiled."""
        raise NotOffered("has no adapters to select by name")

    def combine(
        self, adapter: Adapter, names: Sequence[str], weights: Sequence[float], how: str, into: str
    ) -> Adapter:
        """A new adapter ``into``, whose ΔW is the weighted sum of those of ``names``; ``how`` is
        "cat" or "svd"."""
        raise NotOffered("does not combine adapters")

    @abstractmethod
    def save(self, adapter: Adapter, folder: Path) -> None: ...

    @abstractmethod
    def load(self, model: nn.Module, folder: Path) -> Adapter: ...

    @abstractmethod
    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Change the tensors in an adapter's folder."""

    @abstractmethod
    def forget_alpha(self, folder: Path) -> None:
        """Remove what says how ΔW is scaled from an adapter's folder."""

    def disguises(self, folder: Path) -> list[Path]:
        """The folder, and copies of it that hold less of what the library could notice a change
        by."""
        return [folder]
