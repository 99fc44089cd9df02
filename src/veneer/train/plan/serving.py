"""Plan a service: the memory of a replica, its speed, and the number of replicas for a load.

A row is a running request. A replica is a copy of the service on ``Load.devices`` devices that
divide the weights among them by tensor parallelism.

    memory   bytes of the base, the adapters in memory, the keys and values of the running rows, and
             of fragmentation; at most the memory of the replica's devices
    step     the time in which each row gets one token: the longer of the time to move bytes and the
             time of the operations. The bytes are the weights once (packed weights also unpacked),
             each adapter of the batch once, and each row's keys and values
    request  the time of its prompt's operations, and for each token of its answer the time of one
             step divided by the number of rows

A replica runs as many rows as fit into its memory, up to ``Load.rows``, each with its own adapter
if there are several; further adapters fill the remaining memory. The load is spread evenly over
replicas. Each is planned to be busy for the share ``BUSY_SHARE`` of the time, since queues grow
without bound as this share nears 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError
from veneer.train.plan.count import count_forward
from veneer.train.plan.hardware import BANDWIDTH_SHARE, FRAGMENTATION_SHARE, PEAK_SHARE, Hardware
from veneer.train.plan.memory import packed_linears, packed_weight_bytes, weight_bytes

#: share of the time in which a replica is busy under the planned load, the rest being a reserve
BUSY_SHARE = 0.7


@dataclass(frozen=True)
class Load:
    """The load of a service, and the size of a replica.

    Fields:
        requests: number of requests a second.
        prompt, answer: number of tokens of a request's prompt and of its answer.
        adapters: number of adapters that are served; each request uses one of them.
        rows: the most rows that a replica runs at once.
        devices: number of devices of a replica.
        quantize: the format of packed weights ("nf4", "fp4", "int8"); None leaves them unpacked.

    Raises:
        ConfigError: ``requests`` is not above 0.
    """

    requests: float = 1.0
    prompt: int = 512
    answer: int = 256
    adapters: int = 1
    rows: int = 64
    devices: int = 1
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.requests <= 0:
            raise ConfigError(
                f"requests={self.requests!r}", "more than 0 requests a second", "correct it"
            )


@dataclass(frozen=True)
class Service:
    """The resources that a load needs.

    Fields:
        hardware: the name of the device.
        base, adapter, row: bytes of the base, of one adapter, and of the keys and values of one row
            with its prompt and complete answer.
        rows: number of rows that run at once in a replica; 0 if the base and one row do not fit.
        in_memory: number of the load's adapters that fit into a replica's memory beside these rows.
        step: seconds for one token of each row.
        answered: number of requests a second that a replica can answer at the most.
        replicas: number of replicas for the load.
        hits: share of the requests that find their adapter in the memory of the devices, if all
            adapters are equally popular and each is assigned to one replica.
        fetch: seconds to read an adapter from main memory into the memory of the devices.
    """

    hardware: str
    load: Load
    base: int
    adapter: int
    row: int
    rows: int
    in_memory: int
    step: float
    answered: float
    replicas: int
    hits: float
    fetch: float


def plan_service(model: Any, load: Load, hardware: Hardware) -> Service:
    """Plan a service for ``load`` on devices of the type ``hardware``. If the base and one row do
    not fit, the result has 0 rows and 0 replicas. ``model``: a result of ``countable_model`` (on
    torch's meta device) with an adapter of the intended shape attached."""
    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    itemsize = model.dtype.itemsize
    adapter_bytes = itemsize * sum(parameter.numel() for parameter in trained_parameters)
    base_bytes = (
        weight_bytes(model) if load.quantize is None else packed_weight_bytes(model, load.quantize)
    )[0]
    linear_weights = packed_linears(model, load.quantize) if load.quantize else []
    # each unpacked weight is written once and read once
    unpacking_bytes = 2 * sum(weight.nbytes for weight, _ in linear_weights)
    row_length = load.prompt + load.answer
    operations, row_bytes = count_forward(model, row_length)
    operations /= row_length
    free_bytes = load.devices * hardware.usable_memory / (1 + FRAGMENTATION_SHARE) - base_bytes
    bytes_per_row = row_bytes + adapter_bytes * (load.adapters > 1)
    row_count = max(0, min(load.rows, math.floor((free_bytes - adapter_bytes) / bytes_per_row)))
    peak_rate = PEAK_SHARE * (hardware.peak16 if itemsize < 4 else hardware.peak32) * load.devices
    bandwidth = BANDWIDTH_SHARE * hardware.memory_bandwidth * load.devices
    common_fields = (hardware.name, load, base_bytes, adapter_bytes, row_bytes)
    if row_count == 0:
        return Service(*common_fields, 0, 0, math.inf, 0.0, 0, 0.0, math.inf)
    adapters_in_memory = min(
        load.adapters, math.floor((free_bytes - row_count * row_bytes) / adapter_bytes)
    )
    distinct_adapters = load.adapters * (1 - (1 - 1 / load.adapters) ** row_count)
    read_bytes = (
        _expected_weight_bytes(model, base_bytes, row_count)
        + unpacking_bytes
        + distinct_adapters * adapter_bytes
        + row_count * row_bytes * (load.prompt + load.answer / 2) / row_length
    )
    step_seconds = max(read_bytes / bandwidth, row_count * operations / peak_rate)
    busy_seconds = load.prompt * operations / peak_rate + load.answer * step_seconds / row_count
    replica_count = math.ceil(load.requests * busy_seconds / BUSY_SHARE)
    adapter_hit_share = min(1.0, adapters_in_memory * replica_count / load.adapters)
    return Service(
        *common_fields,
        row_count,
        adapters_in_memory,
        step_seconds,
        1 / busy_seconds,
        replica_count,
        adapter_hit_share,
        adapter_bytes / hardware.host_bandwidth,
    )


def _expected_weight_bytes(model: Any, base_bytes: int, row_count: int) -> float:
    """Expected bytes of the weights that a step of ``row_count`` rows reads. Of a stack of experts,
    a step reads the experts to which it routes at least one row. ``base_bytes``: bytes of all
    frozen weights."""
    config = model.config.get_text_config()
    expert_count = (
        getattr(config, "num_local_experts", None)
        or getattr(config, "n_routed_experts", None)
        or getattr(config, "num_experts", None)
    )
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    # a step reads only one row of the embedding for each token
    unread_bytes = 0 if head is not None and head.weight is embedding else embedding.nbytes
    if not expert_count or not experts_per_token:
        return base_bytes - unread_bytes
    stack_bytes = sum(
        parameter.nbytes
        for parameter in model.parameters()
        if parameter.dim() == 3 and len(parameter) == expert_count and not parameter.requires_grad
    )
    return (
        base_bytes
        - unread_bytes
        - stack_bytes * (1 - experts_per_token / expert_count) ** row_count
    )
