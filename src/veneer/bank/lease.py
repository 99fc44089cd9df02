"""The right to use adapters of a bank while they stay in memory, and what is known of each
registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.attach.blend import finite_weights
from veneer.bank.batch_state import Uses
from veneer.bank.resident import ResidentAdapter
from veneer.errors import SelectionError, sentence

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
    """One registered adapter. ``seen`` is (rank, variant), once it was loaded."""

    name: str
    path: Path
    pinned: bool = False
    resident: ResidentAdapter | None = None
    seen: tuple[int, str] | None = None
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


def weights_of(choice: Any) -> dict[str, float]:
    """The weights that a choice for one row gives to adapters, by name; none for the base."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        finite_weights(choice)
        return dict(choice)
    found = f"{choice!r} for a row"
    raise SelectionError(
        sentence(found, "None, a name, a blend {name: weight} or a lease", "choose one of these")
    )
