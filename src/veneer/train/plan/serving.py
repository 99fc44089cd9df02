"""A service: what lies in a replica's memory, how fast it answers, and how many replicas a load
takes.

    memory   base + adapters in memory + keys and values of the running rows + slack ≤ what the devices have
    step     max(bytes read, operations) of one token for each row: the weights once (packed ones also as they are
             unpacked), each adapter of the batch once, each row's keys and values
    request  its prompt's operations, and a row's share of one step for each token of its answer

A replica is ``devices`` devices with the weights cut between them (tensor parallelism). Rows fill
what memory the adapters leave, up to ``rows``. The load is spread evenly; a replica is meant to be
busy ``BUSY`` of the time, since queues grow without bound as that comes near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError
from veneer.train.plan.count import count_forward
from veneer.train.plan.hardware import BYTES, PRODUCTS, SLACK, Hardware
from veneer.train.plan.memory import packed_linears, to_be_packed, weights

#: share of the time that a replica is busy at the load
BUSY = 0.7


@dataclass(frozen=True)
class Load:
    """``requests`` a second, each of a ``prompt`` and an ``answer`` of so many tokens, by one of
    ``adapters`` adapters. At most ``rows`` run at once in a replica, of ``devices`` devices."""

    requests: float = 1.0
    prompt: int = 512
    answer: int = 256
    adapters: int = 1
    rows: int = 64
    devices: int = 1
    quantize: str | None = None

    def __post_init__(self) -> None:
        whole = ("prompt", "answer", "adapters", "rows", "devices")
        wrong = [name for name in whole if getattr(self, name) < 1] + ["requests"] * (
            self.requests <= 0
        )
        if wrong:
            found = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ConfigError(
                found, "counts of at least 1, and more than 0 requests a second", "correct it"
            )


@dataclass(frozen=True)
class Service:
    """What a load takes.

    Fields:
        base, adapter, row: bytes of the base, of one adapter, and of the keys and values of one row
            at its longest.
        rows: that run at once in a replica. 0: the base and one row do not fit.
        in_memory: adapters in a replica's memory beside these rows, at most all.
        step: seconds for one token of each row.
        answered: requests a second that a replica can answer.
        replicas: for the load.
        hits: share of the requests whose adapter is in the memory of its replica, if each adapter
            is asked for alike and goes to one replica alone.
        fetch: seconds to read an adapter that is not, from main memory.
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


def plan_service(model: Any, load: Load, on: Hardware) -> Service:
    """What ``load`` takes on this hardware. ``model``: as ``countable_model`` makes it, with a like
    adapter on it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    itemsize = model.dtype.itemsize
    adapter = itemsize * sum(parameter.numel() for parameter in trained)
    base = (weights(model) if load.quantize is None else to_be_packed(model, load.quantize))[0]
    linears = packed_linears(model, load.quantize) if load.quantize else []
    # written for their products, and read there
    unpacked = 2 * sum(weight.nbytes for weight, _ in linears)
    length = load.prompt + load.answer
    operations, row = count_forward(model, length)
    operations /= length
    room = load.devices * on.usable / (1 + SLACK) - base
    rows = max(
        0, min(load.rows, math.floor((room - adapter) / (row + adapter * (load.adapters > 1))))
    )
    peak = PRODUCTS * (on.peak16 if itemsize < 4 else on.peak32) * load.devices
    bandwidth = BYTES * on.bandwidth * load.devices
    if rows == 0:
        return Service(on.name, load, base, adapter, row, 0, 0, math.inf, 0.0, 0, 0.0, math.inf)
    in_memory = min(load.adapters, math.floor((room - rows * row) / adapter))
    different = load.adapters * (1 - (1 - 1 / load.adapters) ** rows)
    read = (
        _read(model, base, rows)
        + unpacked
        + different * adapter
        + rows * row * (load.prompt + load.answer / 2) / length
    )
    step = max(read / bandwidth, rows * operations / peak)
    busy = load.prompt * operations / peak + load.answer * step / rows
    replicas = math.ceil(load.requests * busy / BUSY)
    hits = min(1.0, in_memory * replicas / load.adapters)
    return Service(
        on.name,
        load,
        base,
        adapter,
        row,
        rows,
        in_memory,
        step,
        1 / busy,
        replicas,
        hits,
        adapter / on.host,
    )


def _read(model: Any, base: int, rows: int) -> float:
    """Bytes of the weights that one step reads: of a stack of experts, those that any of the rows
    is sent to."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(
        config, "n_routed_experts", None
    )
    experts = experts or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    # a row for each token
    looked_up = 0 if head is not None and head.weight is table else table.nbytes
    if not experts or not chosen:
        return base - looked_up
    stacks = sum(
        one.nbytes
        for one in model.parameters()
        if one.dim() == 3 and len(one) == experts and not one.requires_grad
    )
    return base - looked_up - stacks * (1 - chosen / experts) ** rows
