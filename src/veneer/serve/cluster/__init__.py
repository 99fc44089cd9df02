"""Serve with several replicas, on Ray Serve.

    clients ── Ray's proxy ── gateway.py ── a replica: serve/api.py and the rest of the server

The gateway reads the body of a request, chooses a replica by the adapter (routing.py), and forwards
the request. If the replica dies, the gateway sends the request to another one.

Only ``on_ray.py`` imports Ray. A user who puts another reverse proxy (nginx, HAProxy) in front of
several servers needs nothing of this folder: see docs/serving.md.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def app(args: dict[str, Any]) -> Any:
    """The application, for Ray Serve's config file (``import_path: veneer.serve.cluster:app``).

    Args:
        args: the options of `veneer serve` by their names (base, adapters, memory, rows, keys, …),
            and "replicas": a number, or a range such as "1-8" for autoscaling. Without keys, the
            server answers requests to loopback host names only, unless "allow_open" is true. CPUs
            and GPUs of a replica are set by Ray (``ray_actor_options``).

    Raises:
        ConfigError: an unknown argument, or an invalid value.
    """
    from veneer.serve.cluster.on_ray import application_of

    return application_of(args)
