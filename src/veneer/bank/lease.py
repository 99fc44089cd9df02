"""Leases on the adapters of a bank, and the bank's entry for each registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer.attach import require_finite_weights
from veneer.bank.batch_state import Uses
from veneer.bank.resident import ResidentAdapter
from veneer.errors import BankFullError, SelectionError


@dataclass(frozen=True)
class Status:
    """One name of a bank. ``resident``: it is in memory and takes ``bytes`` there; ``users``: the
    number of leases on it. ``rank`` and ``variant`` are None until it was loaded once."""

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
    """One registered adapter. ``rank_and_variant`` is None until it was loaded once."""

    name: str
    path: Path
    pinned: bool = False
    resident: ResidentAdapter | None = None
    rank_and_variant: tuple[int, str] | None = None
    #: leases on it, including those that wait for a load
    users: int = 0
    #: the bank's clock when it was last used
    used: int = 0

    def status(self) -> Status:
        rank, variant = self.rank_and_variant or (None, None)
        return Status(
            self.name,
            self.path,
            resident=self.resident is not None,
            bytes=0 if self.resident is None else self.resident.nbytes,
            pinned=self.pinned,
            users=self.users,
            rank=rank,
            variant=variant,
        )


class Lender(Protocol):
    """The part of a bank that its leases use."""

    def _release(self, entries: Sequence[Entry]) -> None:
        """End one use of each of these entries."""
        ...


class Lease:
    """The right to use adapters, which stay in memory until it is released. ``adapter_weights``:
    the requested weights by name; ``uses``: the same with the resident adapters."""

    def __init__(
        self, bank: Lender, adapter_weights: Mapping[str, float], entries: Sequence[Entry]
    ) -> None:
        self.adapter_weights = dict(adapter_weights)
        uses: Any = [(entry.resident, adapter_weights[entry.name]) for entry in entries]
        self.uses: Uses = tuple(uses)
        self._bank, self._entries = bank, [*entries]

    def release(self) -> None:
        """Release the adapters. Calling it again does nothing."""
        entries, self._entries = self._entries, []
        self._bank._release(entries)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def full_error(count: int, unevictable: int, capacity: int, waited: float | None) -> BankFullError:
    """The error of a load of ``count`` bytes that does not fit. ``waited``: the seconds of waiting
    for leases to be released, if that could have helped."""
    problem = f"{count:,} bytes to load beside {unevictable:,} that are pinned or asked for with it"
    if waited is not None:
        problem += f", and others in use for {waited:g} s"
    do = "give the bank more, unpin adapters, or use fewer at once"
    return BankFullError(problem, f"at most {capacity:,}", do)


def live_lease(bank: Lender, lease: Any) -> Lease:
    """Return ``lease`` if it is a lease of the bank that was not released, else raise
    ``SelectionError``."""
    if (
        not isinstance(lease, Lease)
        or lease._bank is not bank
        or len(lease._entries) != len(lease.uses)
    ):
        problem = "a lease that was released, or of another bank"
        raise SelectionError(problem, "a live one", "acquire one")
    return lease


def uses_of_rows(
    bank: Lender,
    choices: Sequence[Any],
    row_weights: Sequence[Mapping[str, float] | None],
    lease: Lease,
    invoked: bool,
) -> tuple[Uses, ...]:
    """The resident adapters and weights of each row, without weights of 0. ``lease`` holds the
    adapters of all rows whose choice is not itself a lease. ``SelectionError``: an adapter has
    invocation tokens, which a bank's rows do not search, and the tokens are not all ``invoked``."""
    adapters = (adapter for adapter, _ in lease.uses)
    resident = dict(zip(lease.adapter_weights, adapters, strict=True))
    blends = (
        live_lease(bank, choice).uses
        if weights is None
        else [(resident[name], weight) for name, weight in weights.items()]
        for choice, weights in zip(choices, row_weights, strict=True)
    )
    uses = tuple(
        tuple((adapter, weight) for adapter, weight in blend if weight) for blend in blends
    )
    for adapter in () if invoked else (adapter for row in uses for adapter, _ in row):
        if adapter.invocation_tokens:
            problem = f"{adapter.path.name!r} in a bank's rows, which has invocation tokens"
            expected = "adapters that act on every token"
            do = "veneer.load it and use veneer.use, or ask `veneer serve`"
            raise SelectionError(problem, expected, do)
    return uses


def row_weights_of(choices: Sequence[Any]) -> list[dict[str, float] | None]:
    """The weights of each row's adapters; None if the choice is a lease."""
    if isinstance(choices, str | Mapping) or not len(choices):
        problem = f"{choices!r} for the rows" if len(choices) else "no rows"
        do = "name an adapter or None for each row"
        raise SelectionError(problem, "one choice for each row", do)
    return [None if isinstance(choice, Lease) else weights_of(choice) for choice in choices]


def sequences_per_row(model: Any, options: Mapping[str, Any]) -> int:
    """The number of sequences that ``model.generate`` computes for each row of its inputs.
    ``SelectionError``: several for a model with an encoder, which computes each row once."""
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
    """The adapter weights of a choice for one row, by name; empty for the base."""
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
