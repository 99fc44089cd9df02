"""Choose the replica for a request: the replica that has the request's adapter in memory, unless it
has no free row.

Each pair of an adapter and a replica has a hash. The replica with the largest hash is the home of
the adapter (rendezvous hashing: Thaler and Ravishankar 1998). The adapters in memory need not be
tracked, because a replica loads the adapters of the requests that it gets. If a replica is removed,
only the adapters whose home it was move, each to the replica with the next largest hash. A new
replica takes over some adapters of every other replica. A request whose home has no free row goes
to the replica with the next largest hash. So an adapter with more requests than one replica can
answer is in memory on two replicas, always the same two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from veneer.fileio.untrusted import parse
from veneer.serve.scheduler import counted_as

#: stands for the adapter in requests without a body, such as lists of models. All of them go to one
#: replica, so that their answers are consistent.
NO_MODEL_KEY = "/"


def preferred_replicas(adapter: str, replicas: Iterable[str]) -> list[str]:
    """The names of replicas by preference for an adapter, the adapter's home first."""
    return sorted(
        replicas,
        key=lambda name: xxhash.xxh3_64_intdigest(f"{adapter}\0{name}".encode()),
        reverse=True,
    )


def replica_groups(
    adapter: str, running: Mapping[str, int], rows_per_replica: int
) -> list[list[str]]:
    """Groups of replicas to try, one group after the other. Within a group, the caller takes the
    replica with the fewest requests. ``adapter``: "" for the base, which every replica has.
    ``running``: the number of running and waiting requests of each replica, by its name.
    ``rows_per_replica``: how many requests a replica answers at one time."""
    all_replicas = list(running)
    if not adapter:
        return [all_replicas]
    preferred = [
        [name]
        for name in preferred_replicas(adapter, all_replicas)
        if running[name] < rows_per_replica
    ]
    return [*preferred, all_replicas]


def adapter_of(body: bytes, base: str) -> str:
    """The adapter that a request body names; for a blend, the adapter whose weight has the largest
    magnitude. Returns "" for the base, and for a body that cannot be parsed, because every replica
    can answer it with the error."""
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
