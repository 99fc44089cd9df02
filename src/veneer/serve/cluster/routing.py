"""Chooses the replica of a request: the one that has its adapter in memory, unless that one has no
row left.

Each pair of an adapter and a replica has a number, a hash; the replica with an adapter's largest
number is its home (rendezvous hashing: Thaler and Ravishankar 1998). Nobody need know what a
replica holds: its adapters are those that it was asked for. A replica that goes takes only its own
adapters' home away, to their next largest; one that comes takes its share of each. Who finds the
home full goes to the next in the same order, so that an adapter that is asked for more than one
replica can answer lives on two, and on the same two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from veneer.fileio.untrusted import parse
from veneer.serve.scheduler import counted_as

# : where a request goes that asks for no answer: always to the same replica, so that its answers
# fit together
OPERATOR = "/"


def order(adapter: str, replicas: Iterable[str]) -> list[str]:
    """The replicas in the order in which they are to hold an adapter."""
    return sorted(
        replicas,
        key=lambda name: xxhash.xxh3_64_intdigest(f"{adapter}\0{name}".encode()),
        reverse=True,
    )


def groups(adapter: str, running: Mapping[str, int], rows: int) -> list[list[str]]:
    """Whom to try, one group after the other, and in a group the one with the least to do.
    ``running``: requests that each replica has; ``rows``: how many of them it answers at one time.
    The base ("") is in every replica."""
    everybody = list(running)
    if not adapter:
        return [everybody]
    return [[name] for name in order(adapter, everybody) if running[name] < rows] + [everybody]


def adapter_of(body: bytes, base: str) -> str:
    """The adapter that a request asks for; of a blend, the one with the largest weight. The base is
    "", and so is what cannot be read: the replica says what is wrong with it."""
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
