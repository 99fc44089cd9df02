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
        path: the adapter folder.
        resident: whether the adapter is in memory.
        bytes: the adapter's size in memory; 0 if it is not in memory.
        pinned: whether the adapter must stay in memory.
        users: the number of leases on the adapter, including those that wait until it is loaded.
        rank, variant: the adapter's largest rank and its variant; None before it is first loaded.
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
    """The bank's state of one registered adapter. ``resident`` is None while the adapter is not in
    memory, and ``rank_and_variant`` is None before it is first loaded."""

    name: str
    path: Path
    pinned: bool = False
    resident: ResidentAdapter | None = None
    rank_and_variant: tuple[int, str] | None = None
    #: number of leases on the adapter, including leases that wait for it to be loaded
    users: int = 0
    #: when the adapter was last leased, as a value of the bank's counter of leases; the idle
    #: adapter with the lowest value is evicted first
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
        adapter_weights: the requested blend, {name of an adapter: weight}.
        uses: the same blend, as pairs (adapter in memory, weight).
    """

    def __init__(
        self, bank: Any, adapter_weights: Mapping[str, float], entries: Sequence[Entry]
    ) -> None:
        self.adapter_weights = dict(adapter_weights)
        uses: Any = [(entry.resident, adapter_weights[entry.name]) for entry in entries]
        self.uses: WeightedAdapters = tuple(uses)
        self._bank, self._entries = bank, [*entries]

    def release(self) -> None:
        """Release the adapters, so that they may be evicted. Calling it again does nothing."""
        entries, self._entries = self._entries, []
        self._bank._release(entries)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def full_error(
    byte_count: int, unevictable_bytes: int, capacity_bytes: int, waited_seconds: float | None
) -> BankFullError:
    """The error for a load of ``byte_count`` bytes that do not fit into the bank's memory.

    Args:
        unevictable_bytes: bytes of the adapters that are pinned, or leased together with the one
            to load.
        capacity_bytes: the bank's limit.
        waited_seconds: how long the load waited for other leases to be released; None if it did not
            wait, because their memory would not have been enough.
    """
    problem = (
        f"{byte_count:,} bytes to load beside {unevictable_bytes:,} that are pinned or asked for"
        " with it"
    )
    if waited_seconds is not None:
        problem += f", and others in use for {waited_seconds:g} s"
    do = "give the bank more, unpin adapters, or use fewer at once"
    error = BankFullError(problem, f"at most {capacity_bytes:,}", do)
    if waited_seconds is not None:
        error.needed_bytes = byte_count + unevictable_bytes
    return error


def require_live_lease(bank: Any, lease: Any) -> Lease:
    """Return ``lease`` if it is a ``Lease`` of this bank that has not been released yet; otherwise,
    raise ``SelectionError``."""
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
    """For each row of a batch, the adapters in memory that it uses, as pairs (adapter, weight).
    Adapters with a weight of 0 are left out.

    Args:
        choices: the choice for each row, as in ``Bank.rows``.
        row_weights: ``row_weights_of(choices)``.
        lease: a lease on the adapters of all rows whose choice is not itself a lease.
        invoked: whether the caller asserts that every token of a row comes after the invocation
            tokens of the row's adapter (``LoraConfig.invocation_tokens``). An adapter that has such
            tokens changes only what follows them.

    Raises:
        SelectionError: a lease of ``choices`` was released or is of another bank, or an adapter
            has invocation tokens and ``invoked`` is False (a bank does not search for the tokens).
    """
    adapters = (adapter for adapter, _ in lease.uses)
    adapter_by_name = dict(zip(lease.adapter_weights, adapters, strict=True))
    row_blends = (
        require_live_lease(bank, choice).uses
        if weights is None
        else [(adapter_by_name[name], weight) for name, weight in weights.items()]
        for choice, weights in zip(choices, row_weights, strict=True)
    )
    row_adapters = tuple(
        tuple((adapter, weight) for adapter, weight in blend if weight) for blend in row_blends
    )
    for adapter in () if invoked else (adapter for row in row_adapters for adapter, _ in row):
        if adapter.invocation_tokens:
            raise SelectionError(
                f"{adapter.path.name!r} in a bank's rows, which has invocation tokens",
                "adapters that act on every token",
                "veneer.load it and use veneer.use, or ask `veneer serve`",
            )
    return row_adapters


def row_weights_of(choices: Sequence[Any]) -> list[dict[str, float] | None]:
    """For each row's choice (see ``Bank.rows``), {name of an adapter: weight}; None for a lease.

    Raises:
        SelectionError: ``choices`` is empty or no sequence of choices, or a choice is invalid.
    """
    if isinstance(choices, str | Mapping) or not len(choices):
        raise SelectionError(
            f"{choices!r} for the rows" if len(choices) else "no rows",
            "one choice for each row",
            "name an adapter or None for each row",
        )
    return [None if isinstance(choice, Lease) else weights_of(choice) for choice in choices]


def sequences_per_row(model: Any, generate_arguments: Mapping[str, Any]) -> int:
    """The number of sequences that ``model.generate(**generate_arguments)`` computes for each row
    of its inputs: the number of beams or of returned sequences, whichever is larger.

    Raises:
        SelectionError: several sequences from an encoder-decoder model. Its encoder runs on each
            input row once, before ``generate`` repeats the rows, so one list of adapters cannot
            fit the rows of both encoder and decoder.
    """
    config = generate_arguments.get("generation_config") or getattr(
        model, "generation_config", None
    )
    beam_count, returned_count = (
        generate_arguments.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    sequence_count = max(beam_count, returned_count)
    if sequence_count > 1 and getattr(model.config, "is_encoder_decoder", False):
        raise SelectionError(
            f"{sequence_count} sequences a row from an encoder and a decoder, of which the encoder"
            " sees each row once",
            "one sequence a row",
            "repeat the rows of the inputs yourself",
        )
    return sequence_count


def weights_of(choice: Any) -> dict[str, float]:
    """The choice for one row as {name of an adapter: weight}; an empty dict for the base alone.
    ``SelectionError``: the choice has another type, or a weight is not finite."""
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
