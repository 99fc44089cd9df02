"""Choose the replica for a request: the replica that has the request's adapter in memory, unless it
already answers as many requests as it can at one time.

Each pair of an adapter and a replica has a hash. The replica with the largest hash is the home of
the adapter (rendezvous hashing: Thaler and Ravishankar 1998). A replica loads the adapters of the
requests that it gets, so the gateway need not track which adapters are in memory where. If a
replica is removed, only the adapters whose home it was move, each to the replica with the next
largest hash. A new replica takes over some adapters of every other replica. If the home of an
adapter is busy, a request goes to the replica with the next largest hash. So an adapter with more
requests than one replica can answer is in memory on two replicas, always the same two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from veneer.fileio.untrusted import parse
from veneer.serve.scheduler import counted_as

#: the adapter name by which requests without a body, such as GET /v1/models, are routed. So all of
#: them go to one replica, and their answers are consistent. No adapter can have this name.
NO_MODEL_KEY = "/"


def preferred_replicas(adapter: str, replicas: Iterable[str]) -> list[str]:
    """The names of ``replicas``, sorted by preference for an adapter: first the adapter's home, the
    replica with the largest hash of the adapter's and the replica's name."""
    return sorted(
        replicas,
        key=lambda name: xxhash.xxh3_64_intdigest(f"{adapter}\0{name}".encode()),
        reverse=True,
    )


def replica_groups(
    adapter: str, request_counts: Mapping[str, int], rows_per_replica: int
) -> list[list[str]]:
    """Groups of replica names to try, one group after the other. Within a group, the caller takes
    the replica with the fewest requests.

    Args:
        adapter: the name of the request's adapter; "" for the base, which every replica has in
            memory.
        request_counts: by the name of each replica, how many requests it answers or has waiting.
        rows_per_replica: how many requests a replica answers at one time.
    """
    all_replicas = list(request_counts)
    if not adapter:
        return [all_replicas]
    preferred = [
        [name]
        for name in preferred_replicas(adapter, all_replicas)
        if request_counts[name] < rows_per_replica
    ]
    return [*preferred, all_replicas]


def adapter_of(body: bytes, base_name: str) -> str:
    """The name of the adapter that a request body asks for. If it asks for a blend of several, this
    is the adapter whose weight has the largest magnitude. Returns "" for the base, and for a body
    that is not a valid JSON object, since every replica can answer it with the error.
    ``base_name``: the model name of the base."""
    try:
        request_fields: Any = parse(body)
    except ValueError:
        return ""
    if not isinstance(request_fields, dict):
        return ""
    model, blend = request_fields.get("model"), request_fields.get("adapters")
    if isinstance(blend, dict):
        return counted_as(
            {name: weight for name, weight in blend.items() if isinstance(weight, int | float)}
        )
    if not isinstance(model, str) or model == base_name:
        return ""
    return model.removeprefix(f"{base_name}:")
