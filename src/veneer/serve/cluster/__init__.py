"""Several replicas of a server, on Ray Serve.

    clients ── Ray's proxy ── gateway.py ── routing.py ── a replica: serve/api.py and all that is
    behind it
                              reads the body, sends on,   which one, by the adapter
                              and again if a replica dies

Only ``on_ray.py`` knows Ray. A front that is not ours (nginx, HAProxy) needs nothing of this
folder: docs/serving.md.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """The application, for Ray Serve's config file (``import_path: veneer.serve.cluster:app``).

    Args:
        args: the options of `veneer serve` by their names (base, adapters, memory, rows, keys, …),
            and "replicas", a number, or "1-8" for as many as are needed. Without keys it answers
            loopback names alone, unless "allow_open" is true. CPUs and GPUs of a replica are Ray's
            to say (``ray_actor_options``).

    Raises:
        ConfigError: an argument that there is not, or one that cannot be.
    """
    from veneer.serve.cluster.on_ray import application_of

    return application_of(args)
