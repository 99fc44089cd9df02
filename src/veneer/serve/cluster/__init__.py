"""Serve with several replicas of the server, on Ray Serve.

    clients ── Ray's proxy ── gateway.py ── a replica: serve/api.py and the rest of the server

The gateway reads from a request's body which adapter it needs, and sends the request to a replica
that is chosen by the adapter (routing.py). If the replica dies, the gateway sends the request to
another one.

Only ``on_ray.py`` imports Ray. Users who put another reverse proxy (nginx, HAProxy) in front of
several servers do not need this folder: see docs/serving.md.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """Make the application for Ray Serve's config file (``import_path: veneer.serve.cluster:app``).

    Args:
        args: the options of `veneer serve` by their names (base, adapters, memory, rows, keys, …),
            and "replicas": a number, or a range such as "1-8" for autoscaling. Without "keys", the
            server answers only requests to loopback host names, unless "allow_open" is true. The
            CPUs and GPUs of a replica are set in Ray's config (``ray_actor_options``).

    Raises:
        ConfigError: an argument is unknown or has an invalid value.
    """
    from veneer.serve.cluster.on_ray import application_of

    return application_of(args)
