"""Deployments of Ray Serve, for ``veneer serve --replicas N`` and for ``veneer.serve.cluster:app``
in Ray's config file.

    Gateway   has no model; reads the bodies of requests, since Ray's proxy routes by headers alone
    Replica   a complete server: the base, and all routes of `veneer serve`

Ray starts the replicas on its nodes, replaces replicas that die, scales their number, and counts
the requests of each (https://docs.ray.io/en/latest/serve/). Its request router asks routing.py
which replica should answer for an adapter.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from veneer.errors import ConfigError, listing
from veneer.serve import limits
from veneer.serve.access import Keyring, KeyWatch, read_keys
from veneer.serve.cluster import gateway, routing
from veneer.serve.guard import LOOPBACK
from veneer.serve.request_log import formatter_of
from veneer.serve.settings import (
    QUEUE,
    ROWS,
    Settings,
    must_have_keys_for_any_origin,
    settings_of,
)

APPLICATION_NAME = "veneer"
#: seconds between two health checks of a replica
HEALTH_CHECK_SECONDS = 2.0


class AdapterRouter(RequestRouter):
    """A request router of Ray that uses ``routing.replica_groups``. Ray passes the adapter as the
    id of a multiplexed model."""

    def initialize_state(self, rows_per_replica: int = 16) -> None:
        self._rows_per_replica = rows_per_replica

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queue_lengths = self.replica_queue_len_cache
        running = {
            name: queue_lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()
        }
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # wait if all replicas are full
        return [
            [by_name[name] for name in group]
            for group in routing.replica_groups(adapter, running, self._rows_per_replica)
        ]


class Replica:
    """A server of the base without sockets: Ray calls its methods."""

    def __init__(self, settings: Settings, keys: str | None, hosts: tuple[str, ...] | None) -> None:
        from veneer.serve import page
        from veneer.serve.api import create
        from veneer.serve.start import prepare_process, start

        _log_to_stderr(settings.log_format)
        prepare_process()
        self.name = serve.get_replica_context().replica_id.unique_id
        self.service = start(replace(settings, cors=()), _keyring(keys))  # the gateway does CORS
        if keys is not None:
            self.service.key_watch = KeyWatch(self.service, Path(keys))
        self.service.hosts = hosts
        self.application = create(self.service, page.router)

    async def stream(self, request: dict[str, Any], body: bytes) -> AsyncGenerator[dict[str, Any]]:
        """Yield the ASGI messages of the answer to a request."""
        async with aclosing(gateway.answer_messages(self.application, request, body)) as messages:
            async for message in messages:
                yield message

    async def complete_answer(self, request: dict[str, Any], body: bytes) -> gateway.CompleteAnswer:
        return await gateway.complete_answer(self.name, self.application, request, body)

    def check_health(self) -> None:
        """Ray calls this, and replaces the replica if it raises."""
        if not self.service.ready:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        service = getattr(self, "service", None)  # absent if loading failed
        if service is not None:
            service.close()


class Gateway:
    """The deployment to which Ray's proxy sends all requests."""

    def __init__(
        self, replicas: Any, settings: Settings, keys: str | None, hosts: tuple[str, ...] | None
    ) -> None:
        _log_to_stderr(settings.log_format)
        self._replicas = replicas
        self.gateway = gateway.Gateway(
            settings.name,
            _keyring(keys),
            hosts,
            self._ask_replica,
            self._ask_all_replicas,
            (RayActorError, DeploymentUnavailableError),
            settings.cors,
        )
        if keys is not None:
            KeyWatch(self.gateway, Path(keys))  # until this process ends

    def __serve_build_asgi_app__(self) -> Any:
        return self.gateway.app

    async def _ask_replica(
        self, adapter: str, request: dict[str, Any], body: bytes
    ) -> AsyncGenerator[dict[str, Any]]:
        answer = self._replicas.options(stream=True, multiplexed_model_id=adapter).stream.remote(
            request, body
        )
        try:
            async for message in answer:
                yield message
        except BaseException:
            answer.cancel()  # the client has disconnected, so cancel its request
            raise

    async def _ask_all_replicas(
        self, request: dict[str, Any], body: bytes
    ) -> list[gateway.CompleteAnswer]:
        responses = self._replicas.broadcast("complete_answer", request, body)
        return await asyncio.to_thread(responses.results, timeout_s=limits.BODY_SECONDS)


def application_of(args: Mapping[str, Any]) -> serve.Application:
    """Make the application for the arguments of ``veneer.serve.cluster.app``."""
    options = dict(args)
    replicas, grace = str(options.pop("replicas", 1)), options.pop("grace", 30.0)
    if type(grace) not in (int, float) or not 0 <= grace < math.inf:
        raise ConfigError(
            f"grace {grace!r}", "a number of seconds", "write, for instance, grace: 30"
        )
    keys, open_to_all = options.pop("keys", None), bool(options.pop("allow_open", False))
    field_names = {field.name for field in fields(Settings)}
    if unknown := sorted(options.keys() - field_names):
        expected = listing(sorted(field_names | {"replicas", "grace", "keys", "allow_open"}))
        raise ConfigError(
            f"the argument {listing(unknown)}", f"some of {expected}", "check the spelling"
        )
    if not options.get("base"):
        raise ConfigError("no base", "one", "give args: {base: …}")
    hosts = None if keys is not None or open_to_all else LOOPBACK
    return application(settings_of(**options), keys, hosts, replicas, float(grace))


def application(
    settings: Settings,
    keys: str | None,
    hosts: tuple[str, ...] | None,
    replicas: str,
    grace: float,
    replica_resources: Mapping[str, float] | None = None,
) -> serve.Application:
    """Make the application with the gateway and the replicas.

    Args:
        keys: the file of the API keys; None for a server without keys.
        hosts: host names that are accepted in the Host header; None for all.
        replicas: the number of replicas, or a range (``scale``).
        grace: seconds for which running requests may go on when the application ends.
        replica_resources: CPUs and GPUs of each replica; None takes Ray's default.

    Raises:
        ConfigError: the keys or ``replicas`` are invalid.
    """
    rows_per_replica, queue = settings.rows or ROWS, settings.queue or QUEUE
    # read the keys here, so that an invalid file is reported now and not in the log of a replica
    must_have_keys_for_any_origin(settings, _keyring(keys).is_open)
    router_config: dict[str, Any] = {
        "request_router_class": AdapterRouter,
        "request_router_kwargs": {"rows_per_replica": rows_per_replica},
    }
    shared_options = {
        "health_check_period_s": HEALTH_CHECK_SECONDS,
        "graceful_shutdown_timeout_s": grace,
    }
    replica_deployment = serve.deployment(Replica, name="Replica").options(
        **shared_options,
        **scale(replicas, rows_per_replica),
        request_router_config=RequestRouterConfig(**router_config),
        max_ongoing_requests=rows_per_replica + queue,
        ray_actor_options=dict(replica_resources or {}),
    )
    gateway_deployment = serve.deployment(serve.ingress()(Gateway), name="Gateway").options(
        **shared_options, max_ongoing_requests=limits.CONNECTIONS, ray_actor_options={"num_cpus": 0}
    )
    replicas_app = replica_deployment.bind(settings, keys, hosts)
    return gateway_deployment.bind(replicas_app, settings, keys, hosts)


def scale(replicas: str, rows_per_replica: int) -> dict[str, Any]:
    """Ray's options for a number of replicas such as "3", or for a range such as "1-8", within
    which Ray scales with the load. ``rows_per_replica``: how many requests a replica answers at one
    time. ``ConfigError``: ``replicas`` is neither."""
    match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", replicas)
    min_replicas, max_replicas = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= min_replicas <= max_replicas:
        raise ConfigError(f"--replicas {replicas!r}", "a number, or two such as 1-8", "change it")
    if min_replicas == max_replicas:
        return {"num_replicas": min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "initial_replicas": min_replicas,
            "target_ongoing_requests": rows_per_replica,
        }
    }


def run(
    settings: Settings,
    *,
    keys: str | None,
    hosts: tuple[str, ...] | None,
    host: str,
    port: int,
    replicas: str,
    grace: float,
    started: Callable[[], None],
    until: Callable[[], Any],
) -> None:
    """Serve on the Ray cluster of $RAY_ADDRESS. Without this variable, start a Ray cluster on this
    machine that ends with the server. ``started`` is called when all replicas are ready. Then
    ``until`` is called, and the server ends when it returns."""
    scaling = scale(replicas, settings.rows or ROWS)  # raises before Ray is started
    max_replicas = scaling.get("num_replicas") or scaling["autoscaling_config"]["max_replicas"]
    owns_cluster = "RAY_ADDRESS" not in os.environ
    ray.init(
        include_dashboard=False if owns_cluster else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
    try:
        resources = resource_share(ray.cluster_resources(), max_replicas, settings.device)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(
            application(settings, keys, hosts, replicas, grace, resources),
            name=APPLICATION_NAME,
            route_prefix="/",
        )
        started()
        until()
    finally:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C must not interrupt the shutdown
            if owns_cluster:
                serve.shutdown()
            else:
                serve.delete(APPLICATION_NAME)
        ray.shutdown()


def resource_share(
    resources: Mapping[str, float], replicas: int, device: str | None
) -> dict[str, float]:
    """The CPUs and GPUs of each replica: an equal share of the cluster's CPUs, and one GPU if the
    cluster has enough of them."""
    cpus = resources.get("CPU", 1.0) / replicas
    gpus = 1.0 if resources.get("GPU", 0.0) >= replicas and device != "cpu" else 0.0
    return {"num_cpus": float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100, "num_gpus": gpus}


def _keyring(keys: str | None) -> Keyring:
    return Keyring() if keys is None else read_keys(keys)


def _log_to_stderr(log_format: str) -> None:
    """Log to stderr, which Ray shows to the user; other logs of its processes are hidden."""
    logger = logging.getLogger("veneer")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(formatter_of(log_format))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
