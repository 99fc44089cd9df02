"""Deployments of Ray Serve, for ``veneer serve --replicas N`` and for ``veneer.serve.cluster:app``
in Ray's config file.

    Gateway   has no model; finds the adapter in a request's body, which Ray's proxy does not read
    Replica   a complete server: the base, and all routes of `veneer serve`

Ray starts the replicas on its nodes, replaces replicas that die, changes their number with the
load, and counts the requests of each (https://docs.ray.io/en/latest/serve/). ``AdapterRouter`` is
the request router in Ray that chooses a replica by the adapter, as routing.py prefers.
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
#: seconds between two health checks of a replica or gateway
HEALTH_CHECK_SECONDS = 2.0


class AdapterRouter(RequestRouter):
    """A request router of Ray that tries replicas in the order of ``routing.replica_groups``. The
    adapter's name arrives as Ray's ``multiplexed_model_id``."""

    def initialize_state(self, rows_per_replica: int = 16) -> None:
        """Called by Ray with ``request_router_kwargs``. ``rows_per_replica``: how many requests a
        replica answers at one time."""
        self._rows_per_replica = rows_per_replica

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Called by Ray: return groups of replicas, which Ray tries one group after the other."""
        replicas_by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queue_lengths = self.replica_queue_len_cache
        request_counts = {
            name: queue_lengths.get(replica.replica_id) or 0
            for name, replica in replicas_by_name.items()
        }
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            # if all replicas are full, let Ray wait before it asks again
            pending_request.routing_context.should_backoff = True
        return [
            [replicas_by_name[name] for name in names]
            for names in routing.replica_groups(adapter, request_counts, self._rows_per_replica)
        ]


class Replica:
    """A complete server without sockets: Ray calls its methods with requests.

    Args:
        keys_path: the file of the API keys; None for a server without keys.
        hosts: host names that are accepted in the Host header; None accepts all.
    """

    def __init__(
        self, settings: Settings, keys_path: str | None, hosts: tuple[str, ...] | None
    ) -> None:
        from veneer.serve import page
        from veneer.serve.api import create
        from veneer.serve.start import prepare_process, start

        _log_to_stderr(settings.log_format)
        prepare_process()
        self.name = serve.get_replica_context().replica_id.unique_id
        # without origins for CORS, because the gateway adds the headers for them
        self.service = start(replace(settings, cors=()), _read_keyring(keys_path))
        if keys_path is not None:
            self.service.key_watch = KeyWatch(self.service, Path(keys_path))
        self.service.hosts = hosts
        self.application = create(self.service, page.router)

    async def stream(
        self, request_scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the ASGI messages of the answer to a request, which is an ASGI scope and a body."""
        async with aclosing(
            gateway.answer_messages(self.application, request_scope, body)
        ) as messages:
            async for message in messages:
                yield message

    async def complete_answer(
        self, request_scope: dict[str, Any], body: bytes
    ) -> gateway.CompleteAnswer:
        """The complete answer to a request, which is an ASGI scope and a body."""
        return await gateway.complete_answer(self.name, self.application, request_scope, body)

    def check_health(self) -> None:
        """Ray calls this method regularly. If it raises, Ray replaces the replica."""
        if not self.service.ready:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        service = getattr(self, "service", None)  # absent if loading failed
        if service is not None:
            service.close()


class Gateway:
    """The deployment to which Ray's proxy sends all requests.

    Args:
        replica_handle: Ray's handle of the deployment of replicas.
        keys_path: the file of the API keys; None for a server without keys.
        hosts: host names that are accepted in the Host header; None accepts all.
    """

    def __init__(
        self,
        replica_handle: Any,
        settings: Settings,
        keys_path: str | None,
        hosts: tuple[str, ...] | None,
    ) -> None:
        _log_to_stderr(settings.log_format)
        self._replica_handle = replica_handle
        self.gateway = gateway.Gateway(
            settings.name,
            _read_keyring(keys_path),
            hosts,
            self._ask_replica,
            self._ask_all_replicas,
            (RayActorError, DeploymentUnavailableError),
            settings.cors,
        )
        if keys_path is not None:
            KeyWatch(self.gateway, Path(keys_path))  # watches the file until this process ends

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve: the ASGI application that answers the requests of the proxy."""
        return self.gateway.app

    async def _ask_replica(
        self, adapter: str, request_scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[dict[str, Any]]:
        """Send a request to the replica that ``AdapterRouter`` chooses for ``adapter``, and yield
        the ASGI messages of its answer."""
        answer = self._replica_handle.options(
            stream=True, multiplexed_model_id=adapter
        ).stream.remote(request_scope, body)
        try:
            async for message in answer:
                yield message
        except BaseException:
            answer.cancel()  # for instance, the client has disconnected: cancel its request
            raise

    async def _ask_all_replicas(
        self, request_scope: dict[str, Any], body: bytes
    ) -> list[gateway.CompleteAnswer]:
        """Send a request to every replica, and return their complete answers."""
        responses = self._replica_handle.broadcast("complete_answer", request_scope, body)
        return await asyncio.to_thread(responses.results, timeout_s=limits.BODY_SECONDS)


def application_of(args: Mapping[str, Any]) -> serve.Application:
    """The application for ``args``, the arguments of ``veneer.serve.cluster.app``. Raises
    ``ConfigError`` if an argument is unknown or invalid."""
    options = dict(args)
    replica_range, grace_seconds = str(options.pop("replicas", 1)), options.pop("grace", 30.0)
    if type(grace_seconds) not in (int, float) or not 0 <= grace_seconds < math.inf:
        raise ConfigError(
            f"grace {grace_seconds!r}", "a number of seconds", "write, for instance, grace: 30"
        )
    keys_path, is_open_to_all = options.pop("keys", None), bool(options.pop("allow_open", False))
    setting_names = {field.name for field in fields(Settings)}
    if unknown_names := sorted(options.keys() - setting_names):
        expected = listing(sorted(setting_names | {"replicas", "grace", "keys", "allow_open"}))
        raise ConfigError(
            f"the argument {listing(unknown_names)}", f"some of {expected}", "check the spelling"
        )
    if not options.get("base"):
        raise ConfigError("no base", "one", "give args: {base: …}")
    hosts = None if keys_path is not None or is_open_to_all else LOOPBACK
    return application(
        settings_of(**options), keys_path, hosts, replica_range, float(grace_seconds)
    )


def application(
    settings: Settings,
    keys_path: str | None,
    hosts: tuple[str, ...] | None,
    replica_range: str,
    grace_seconds: float,
    replica_resources: Mapping[str, float] | None = None,
) -> serve.Application:
    """The application of Ray Serve that consists of the gateway and the replicas.

    Args:
        keys_path: the file of the API keys; None for a server without keys.
        hosts: host names that are accepted in the Host header; None accepts all.
        replica_range: the number of replicas, such as "3", or a range, such as "1-8".
        grace_seconds: for how long running requests may go on when the application ends.
        replica_resources: Ray's options "num_cpus" and "num_gpus" for each replica; None takes
            Ray's defaults.

    Raises:
        ConfigError: the file of keys or ``replica_range`` is invalid, or ``settings.cors`` has "*"
            and there are no keys.
    """
    rows_per_replica, queue_length = settings.rows or ROWS, settings.queue or QUEUE
    # read the keys here, so that an invalid file is reported now and not in the log of a replica
    must_have_keys_for_any_origin(settings, _read_keyring(keys_path).is_open)
    router_config: dict[str, Any] = {
        "request_router_class": AdapterRouter,
        "request_router_kwargs": {"rows_per_replica": rows_per_replica},
    }
    shared_options = {
        "health_check_period_s": HEALTH_CHECK_SECONDS,
        "graceful_shutdown_timeout_s": grace_seconds,
    }
    replica_deployment = serve.deployment(Replica, name="Replica").options(
        **shared_options,
        **scaling_options(replica_range, rows_per_replica),
        request_router_config=RequestRouterConfig(**router_config),
        max_ongoing_requests=rows_per_replica + queue_length,
        ray_actor_options=dict(replica_resources or {}),
    )
    gateway_deployment = serve.deployment(serve.ingress()(Gateway), name="Gateway").options(
        **shared_options, max_ongoing_requests=limits.CONNECTIONS, ray_actor_options={"num_cpus": 0}
    )
    replicas_app = replica_deployment.bind(settings, keys_path, hosts)
    return gateway_deployment.bind(replicas_app, settings, keys_path, hosts)


def scaling_options(replica_range: str, rows_per_replica: int) -> dict[str, Any]:
    """Ray's options for ``replica_range``: a fixed number of replicas for a number such as "3", and
    autoscaling for a range such as "1-8". ``rows_per_replica``: how many requests a replica answers
    at one time; Ray adds replicas if there are more. Raises ``ConfigError`` if ``replica_range`` is
    neither."""
    match = re.fullmatch(r"\s*([0-9]{1,4})\s*(?:-\s*([0-9]{1,4})\s*)?", replica_range)
    min_replicas, max_replicas = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= min_replicas <= max_replicas:
        raise ConfigError(
            f"--replicas {replica_range!r}", "a number, or two such as 1-8", "change it"
        )
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
    keys_path: str | None,
    hosts: tuple[str, ...] | None,
    host: str,
    port: int,
    replica_range: str,
    grace_seconds: float,
    on_ready: Callable[[], None],
    wait_for_stop: Callable[[], Any],
) -> None:
    """Serve until ``wait_for_stop`` returns, on the Ray cluster of $RAY_ADDRESS. Without this
    variable, start a Ray cluster on this machine, which ends with the server.

    Args:
        keys_path: the file of the API keys; None for a server without keys.
        hosts: host names that are accepted in the Host header; None accepts all.
        host, port: the address on which Ray's proxy listens.
        replica_range: the number of replicas, such as "3", or a range, such as "1-8".
        grace_seconds: for how long running requests may go on when the server ends.
        on_ready: called once, when all replicas are ready.
        wait_for_stop: called after ``on_ready``; the server ends when it returns.

    Raises:
        ConfigError: the file of keys or ``replica_range`` is invalid, or ``settings.cors`` has "*"
            and there are no keys.
    """
    # an invalid range raises here, before Ray is started
    scaling = scaling_options(replica_range, settings.rows or ROWS)
    max_replicas = scaling.get("num_replicas") or scaling["autoscaling_config"]["max_replicas"]
    owns_cluster = "RAY_ADDRESS" not in os.environ
    ray.init(
        # without an address, Ray would join a cluster that ``ray start`` began on this machine
        address="local" if owns_cluster else None,
        include_dashboard=False if owns_cluster else None,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
    try:
        replica_resources = resource_share(ray.cluster_resources(), max_replicas, settings.device)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(
            application(
                settings, keys_path, hosts, replica_range, grace_seconds, replica_resources
            ),
            name=APPLICATION_NAME,
            route_prefix="/",
        )
        on_ready()
        wait_for_stop()
    finally:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C must not interrupt the shutdown
            if owns_cluster:
                serve.shutdown()
            else:
                serve.delete(APPLICATION_NAME)
        ray.shutdown()


def resource_share(
    cluster_resources: Mapping[str, float], replica_count: int, device: str | None
) -> dict[str, float]:
    """Ray's options "num_cpus" and "num_gpus" for each of ``replica_count`` replicas: an equal
    share of the cluster's CPUs, rounded down, and one GPU if the cluster has enough for all and
    ``device`` is not "cpu". ``cluster_resources``: the cluster's numbers of "CPU" and "GPU"."""
    cpus = cluster_resources.get("CPU", 1.0) / replica_count
    gpus = 1.0 if cluster_resources.get("GPU", 0.0) >= replica_count and device != "cpu" else 0.0
    return {"num_cpus": float(int(cpus)) if cpus >= 1 else int(cpus * 100) / 100, "num_gpus": gpus}


def _read_keyring(keys_path: str | None) -> Keyring:
    """The API keys in a file; without a file, a keyring that accepts requests without a key."""
    return Keyring() if keys_path is None else read_keys(keys_path)


def _log_to_stderr(log_format: str) -> None:
    """Let this process write its log to stderr, which Ray shows to the user. ``log_format``: the
    setting of this name, such as "json"."""
    logger = logging.getLogger("veneer")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(formatter_of(log_format))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
