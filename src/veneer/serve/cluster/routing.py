"""Choose the replica of a request: the one that has its adapter in memory, unless that replica has
no free row.

Each pair of an adapter and a replica has a hash; the replica with the largest hash is the adapter's
home (rendezvous hashing: Thaler and Ravishankar 1998). No table of the adapters in memory is
needed, because a replica holds the adapters that it was asked for. If a replica goes, only its own
adapters move, each to the replica with the next largest hash; a new replica takes over some
adapters of each other one. A request whose home is full goes to the next replica in the same order.
An adapter with more requests than one replica can answer is therefore in memory on two, always the
same two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from veneer.fileio.untrusted import parse
from veneer.serve.scheduler import counted_as

#: the routing key of requests that need no model: they always go to the same replica, so that their
#: answers are consistent
OPERATOR = "/"


def order(adapter: str, replicas: Iterable[str]) -> list[str]:
    """The replicas in the order in which they are preferred for an adapter."""
    return sorted(
        replicas,
        key=lambda name: xxhash.xxh3_64_intdigest(f"{adapter}\0{name}".encode()),
        reverse=True,
    )


def groups(adapter: str, running: Mapping[str, int], rows: int) -> list[list[str]]:
    """Groups of replicas to try, one group after the other; within a group, take the one with the
    fewest requests. ``running``: the number of requests of each replica; ``rows``: how many it
    answers at one time. The base ("") is in every replica."""
    everybody = list(running)
    if not adapter:
        return [everybody]
    return [[name] for name in order(adapter, everybody) if running[name] < rows] + [everybody]


def adapter_of(body: bytes, base: str) -> str:
    """The adapter of a request; of a blend, the one with the largest weight. "" for the base, and
    for a body that cannot be parsed, since the replica explains the error."""
    try:
        content: Any = parse(body)
    except ValueError:
        return ""
    if not isinstance(content, dict):
        return ""
    model, blend = content.get("model"), content.get("adapters")
    if isinstance(blend, dict):
        return counted_as(
            {name: weight for name, weight in blend.items() if isinstance(weight, int | float)}
        )
    if not isinstance(model, str) or model == base:
        return ""
    return model.removeprefix(f"{base}:")
