"""Leases on the adapters of a bank, and the bank's entry for each registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.attach import require_finite_coefficients
from veneer.bank.batch_state import WeightedAdapters
from veneer.bank.resident import ResidentAdapter
from veneer.errors import BankFullError, SelectionError


@dataclass(frozen=True)
class Status:
    """The state of one registered name.

    Fields:
        resident: whether the adapter is in memory.
        bytes: the adapter's size in memory, 0 if it is not there.
        pinned: whether the adapter is never evicted.
        users: the number of leases on it.
        rank, variant: those of the adapter; None before the adapter is first loaded.
    """

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
    """One registered adapter. ``resident`` is None while the adapter is not in memory, and
    ``rank_and_variant`` before it is first loaded."""

    name: str
    path: Path
    pinned: bool = False
    resident: ResidentAdapter | None = None
    rank_and_variant: tuple[int, str] | None = None
    #: number of leases on the adapter, including leases that wait for it to be loaded
    users: int = 0
    #: the value that the bank's use counter, which each lease increments, had at the last use
    last_use: int = 0

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


class Lease:
    """The right to use adapters, which stay in memory until the lease is released.

    Attributes:
        adapter_weights: the requested weights, by the name of the adapter.
        uses: the same weights, each with its adapter in memory.
    """

    def __init__(
        self, bank: Any, adapter_weights: Mapping[str, float], entries: Sequence[Entry]
    ) -> None:
        self.adapter_weights = dict(adapter_weights)
        uses: Any = [(entry.resident, adapter_weights[entry.name]) for entry in entries]
        self.uses: WeightedAdapters = tuple(uses)
        self._bank, self._entries = bank, [*entries]

    def release(self) -> None:
        """Release the adapters. Calling it again does nothing."""
        entries, self._entries = self._entries, []
        self._bank._release(entries)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def full_error(
    byte_count: int, unevictable: int, capacity: int, waited: float | None
) -> BankFullError:
    """The error if an adapter of ``byte_count`` bytes does not fit into the bank's memory.

    Args:
        unevictable: bytes of adapters that are pinned or requested together with the new one.
        capacity: the bank's limit in bytes.
        waited: seconds for which the load waited for leases to be released; None if that could not
            have helped.
    """
    problem = (
        f"{byte_count:,} bytes to load beside {unevictable:,} that are pinned or asked for with it"
    )
    if waited is not None:
        problem += f", and others in use for {waited:g} s"
    do = "give the bank more, unpin adapters, or use fewer at once"
    return BankFullError(problem, f"at most {capacity:,}", do)


def require_live_lease(bank: Any, lease: Any) -> Lease:
    """Return ``lease`` if it is a lease of the bank that was not released; else raise
    ``SelectionError``."""
    if (
        not isinstance(lease, Lease)
        or lease._bank is not bank
        or len(lease._entries) != len(lease.uses)
    ):
        raise SelectionError(
            "a lease that was released, or of another bank", "a live one", "acquire one"
        )
    return lease


def adapters_of_rows(
    bank: Any,
    choices: Sequence[Any],
    row_weights: Sequence[Mapping[str, float] | None],
    lease: Lease,
    invoked: bool,
) -> tuple[WeightedAdapters, ...]:
    """For each row, its adapters (in memory), each with its weight. Adapters with a weight of 0 are
    left out.

    Args:
        choices: the choice for each row, as in ``Bank.rows``.
        row_weights: ``row_weights_of(choices)``.
        lease: holds the adapters of all rows whose choice is not itself a lease.
        invoked: whether every token comes after the invocation tokens of its row's adapter, from
            which on such an adapter acts (``LoraConfig.invocation_tokens``).

    Raises:
        SelectionError: an adapter has invocation tokens and ``invoked`` is False, because a bank
            does not search the rows for these tokens.
    """
    adapters = (adapter for adapter, _ in lease.uses)
    adapter_by_name = dict(zip(lease.adapter_weights, adapters, strict=True))
    blends = (
        require_live_lease(bank, choice).uses
        if weights is None
        else [(adapter_by_name[name], weight) for name, weight in weights.items()]
        for choice, weights in zip(choices, row_weights, strict=True)
    )
    rows = tuple(
        tuple((adapter, weight) for adapter, weight in blend if weight) for blend in blends
    )
    for adapter in () if invoked else (adapter for row in rows for adapter, _ in row):
        if adapter.invocation_tokens:
            raise SelectionError(
                f"{adapter.path.name!r} in a bank's rows, which has invocation tokens",
                "adapters that act on every token",
                "veneer.load it and use veneer.use, or ask `veneer serve`",
            )
    return rows


def row_weights_of(choices: Sequence[Any]) -> list[dict[str, float] | None]:
    """The adapter weights of each row, by name; None for a row whose choice is a lease."""
    if isinstance(choices, str | Mapping) or not len(choices):
        raise SelectionError(
            f"{choices!r} for the rows" if len(choices) else "no rows",
            "one choice for each row",
            "name an adapter or None for each row",
        )
    return [None if isinstance(choice, Lease) else weights_of(choice) for choice in choices]


def sequences_per_row(model: Any, options: Mapping[str, Any]) -> int:
    """The number of sequences that ``model.generate`` computes for each row of its inputs.
    ``options``: the arguments of ``generate``. ``SelectionError``: several sequences from a model
    with an encoder, which is called with fewer rows, before ``generate`` repeats them."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    beams, sequences = (
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    sequence_count = max(beams, sequences)
    if sequence_count > 1 and getattr(model.config, "is_encoder_decoder", False):
        raise SelectionError(
            f"{sequence_count} sequences a row from an encoder and a decoder, of which the encoder"
            " sees each row once",
            "one sequence a row",
            "repeat the rows of the inputs yourself",
        )
    return sequence_count


def weights_of(choice: Any) -> dict[str, float]:
    """The adapter weights of one row's choice, by name; an empty dict for the base."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    if isinstance(choice, Mapping):
        require_finite_coefficients(choice)
        return dict(choice)
    raise SelectionError(
        f"{choice!r} for a row",
        "None, a name, a blend {name: weight} or a lease",
        "choose one of these",
    )
