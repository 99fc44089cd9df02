"""The right to use adapters of a bank while they stay in memory, and what is known of each
registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.attach import require_finite_weights
from veneer.bank.batch_state import Uses
from veneer.bank.resident import ResidentAdapter
from veneer.errors import SelectionError

if TYPE_CHECKING:
    from veneer.bank.bank import Bank


@dataclass(frozen=True)
class Status:
    """One name of a bank: whether it is in memory, where it takes ``bytes``, and how many leases
    are on it (``users``). ``rank`` and ``variant`` are known once it was loaded."""

    name: str
    path: Path
    resident: bool
    bytes: int
    pinned: bool
    users: int
    rank: int | None
    variant: str | None


@dataclass(eq=False)
class Entry:
    """One registered adapter. ``rank_and_variant`` is known once it was loaded."""

    name: str
    path: Path
    pinned: bool = False
    resident: ResidentAdapter | None = None
    rank_and_variant: tuple[int, str] | None = None
    #: leases on it, and those that are being made
    users: int = 0
    used: int = 0


class Lease:
    """The right to use adapters that stay in memory until it is released: ``adapter_weights`` by
    name, as asked for, and ``uses`` with the adapters in memory."""

    def __init__(
        self, bank: Bank, adapter_weights: Mapping[str, float], entries: Sequence[Entry]
    ) -> None:
        self.adapter_weights = dict(adapter_weights)
        uses: Any = [(entry.resident, adapter_weights[entry.name]) for entry in entries]
        self.uses: Uses = tuple(uses)
        self._bank, self._entries = bank, [*entries]

    def release(self) -> None:
        """Give the right back; again does nothing."""
        entries, self._entries = self._entries, []
        self._bank._release(entries)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def live_lease(bank: Bank, lease: Any) -> Lease:
    """A lease of the bank that was not released. ``SelectionError``: it is none."""
    if (
        not isinstance(lease, Lease)
        or lease._bank is not bank
        or len(lease._entries) != len(lease.uses)
    ):
        problem = "a lease that was released, or of another bank"
        raise SelectionError(problem, "a live one", "acquire one")
    return lease


def row_weights_of(choices: Sequence[Any]) -> list[dict[str, float] | None]:
    """The weights of each row's adapters; None where the choice is a lease."""
    if isinstance(choices, str | Mapping) or not len(choices):
        problem = f"{choices!r} for the rows" if len(choices) else "no rows"
        do = "name an adapter or None for each row"
        raise SelectionError(problem, "one choice for each row", do)
    return [None if isinstance(choice, Lease) else weights_of(choice) for choice in choices]


def sequences_per_row(model: Any, options: Mapping[str, Any]) -> int:
    """How many sequences ``model.generate`` computes for each row of its inputs.
    ``SelectionError``: its encoder sees each row once."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    beams, sequences = (
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    count = max(beams, sequences)
    if count > 1 and getattr(model.config, "is_encoder_decoder", False):
        problem = f"{count} sequences a row from an encoder and a decoder, of which the encoder "
        problem += "sees each row once"
        do = "repeat the rows of the inputs yourself"
        raise SelectionError(problem, "one sequence a row", do)
    return count


def weights_of(choice: Any) -> dict[str, float]:
    """The weights that a choice for one row gives to adapters, by name; none for the base."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        require_finite_weights(choice)
        return dict(choice)
    problem = f"{choice!r} for a row"
    raise SelectionError(
        problem, "None, a name, a blend {name: weight} or a lease", "choose one of these"
    )
