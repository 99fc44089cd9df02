"""Plan a training run on 1 … n devices by each strategy: the bytes that each device holds, and the
work and transfers of a step, which ``hardware.py`` times.

A step has as many examples on n devices as on one device, as in ``veneer train`` under torchrun. A
row is an example of the batch.

    ddp     each device has all weights, and computes its share of the rows
    fsdp    each device computes its share of the rows, and holds its share of the frozen weights.
            It gathers the weights of a block before the block's forward and again before its
            backward. The loss computes the logits of all tokens at once, since the output head of
            a sharded model cannot be called on chunks of tokens
    tp      each device computes all rows, with its share of the blocks' matrices by transformers'
            plan for the model. Forward sums the outputs of a block's two row-wise layers over the
            devices; backward sums the gradients at the inputs of its column-wise layers

Each device has the full adapter, whose gradients are summed once a step in float32. Devices
communicate in a ring. To gather b bytes on each of n devices, each sends b · (n - 1) / n bytes; to
sum b bytes over the devices, it sends twice as many.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.errors import ConfigError, sentence
from veneer.train.plan.count import Cost, Step, Work, count_step
from veneer.train.plan.hardware import FRAGMENTATION_SHARE, Hardware
from veneer.train.plan.memory import memory_breakdown, packed_linears, shard_base, weight_bytes
from veneer.train.processes import split_step
from veneer.train.tensor_parallel import COLUMN_WISE, PARTITION_BY_STYLE, ROW_WISE, style_of

STRATEGIES = ("ddp", "fsdp", "tp")
#: bytes of each value of a gradient that is summed over the devices: float32
GRADIENT_ITEMSIZE = 4


@dataclass(frozen=True)
class Run:
    """The properties of a run that do not depend on the devices.

    Fields:
        batch: number of rows in a forward pass.
        length: number of tokens of a row.
        accumulate: number of forward passes in a step on one device.
        labelled: share of the tokens that have a label.
        optimiser: the name of the optimiser, as ``veneer train`` takes it.
        checkpointing: whether backward recomputes the activations (activation checkpointing).
        offload: whether activations wait in main memory for their backward.
        quantize: the format of the packed base ("nf4", "fp4", "int8"); None leaves it unpacked.
    """

    batch: int = 8
    length: int = 2048
    accumulate: int = 1
    labelled: float = 1.0
    optimiser: str = "adamw_torch_fused"
    checkpointing: bool = False
    offload: bool = False
    quantize: str | None = None


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run on ``devices`` devices.

    Fields:
        strategy: how the devices divide the work: "ddp", "fsdp" or "tp".
        run: the run, with ``batch`` and ``accumulate`` of one device.
        hardware: the name of the device, or None.
        memory: the bytes that a device holds at the peak of a step, by use.
        operations, sent: floating-point operations of a device in a step, and the bytes that it
            sends.
        tokens: tokens of a step on all devices together.
        seconds: seconds of a step; None if no hardware is named.
        fits: whether a device has enough memory; None if no hardware is named.
    """

    strategy: str
    devices: int
    run: Run
    hardware: str | None
    memory: dict[str, int]
    operations: int
    sent: int
    tokens: int
    seconds: float | None
    fits: bool | None

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def speed(self) -> float | None:
        """Tokens a second of the run, divided by the number of devices; None if no hardware is
        named."""
        return None if self.seconds is None else self.tokens / self.seconds / self.devices


class Planner:
    """Plans runs of a model with its adapter. Counted steps are cached by the shape of the batch.

    Args:
        model: a result of ``countable_model`` (on torch's meta device) with an adapter attached.

    Attributes:
        trained, trainable: the trained parameters, and the number of their values.
        total: the number of values of the other parameters, those of the base.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in self.trained)
        self.total = sum(parameter.numel() for parameter in model.parameters()) - self.trainable
        self._count_step = functools.cache(functools.partial(count_step, model))

    def step(self, run: Run, chunked_loss: bool = True) -> Step:
        return self._count_step(
            run.batch,
            run.length,
            labelled_share=run.labelled,
            is_plain=run.quantize is None,
            chunked_loss=chunked_loss,
        )

    def plan(
        self, run: Run, strategy: str = "ddp", devices: int = 1, hardware: Hardware | None = None
    ) -> RunPlan:
        """Plan one run.

        Args:
            run: the run, as on one device.
            strategy: "ddp", "fsdp" or "tp".
            devices: the number of devices.
            hardware: the type of the devices; None leaves out the time and whether the run fits.

        Raises:
            ConfigError: the strategy is impossible: the rows cannot be divided evenly, packed
                weights would have to be sharded, or for tp, transformers has no plan for the model
                or the number of devices does not divide the number of heads.
        """
        _check_packed_weights(run, strategy, devices)
        tokens = run.batch * run.length * run.accumulate
        if strategy != "tp":
            row_count, pass_count = split_step(run.batch, run.accumulate, devices)
            run = replace(run, batch=row_count, accumulate=pass_count)
        step = self.step(run, chunked_loss=strategy != "fsdp" or devices == 1)
        if strategy == "tp":
            step = step.shard(devices)
        cost = step.with_checkpointing if run.checkpointing else step.total
        gradient_bytes = GRADIENT_ITEMSIZE * self.trainable if devices > 1 else 0
        bytes_by_use = memory_breakdown(
            self.model,
            run.optimiser,
            step,
            accumulate=run.accumulate,
            buffer_bytes=gradient_bytes,
            checkpointing=run.checkpointing,
            offload=run.offload,
            quantize=run.quantize,
        )
        gathered_bytes = summed_bytes = 0  # bytes that a device sends in a step
        if devices > 1:
            ring_share = (devices - 1) / devices
            if strategy == "fsdp":
                block_sizes = [(group.count, weight_bytes(group.block)[0]) for group in step.blocks]
                all_block_bytes = sum(count * block_bytes for count, block_bytes in block_sizes)
                # blocks are gathered in forward and in backward, the other weights once
                gathered_once = ring_share * (all_block_bytes + bytes_by_use["base"])
                gathered_bytes = gathered_once * run.accumulate
                bytes_by_use = shard_base(bytes_by_use, cost, block_sizes, devices)
            if strategy == "tp":
                bytes_by_use["base"] -= self._sharded_bytes(devices) * (devices - 1) // devices
                block_count = sum(group.count for group in step.blocks)
                reduction_count = block_count * 2 * (3 if run.checkpointing else 2)
                summed_bytes = 2 * ring_share * step.hidden_bytes * reduction_count * run.accumulate
            summed_bytes += 2 * ring_share * gradient_bytes
        bytes_by_use["slack"] = round(FRAGMENTATION_SHARE * sum(bytes_by_use.values()))
        seconds = fits = None
        if hardware is not None:
            compute_seconds = self._compute_seconds(run, cost, hardware)
            # the longer of the two, since gathers run during computation; sums of gradients and
            # outputs do not, so their time is added
            seconds = max(compute_seconds, hardware.transfer_seconds(gathered_bytes, devices))
            seconds += hardware.transfer_seconds(summed_bytes, devices)
            fits = sum(bytes_by_use.values()) <= hardware.usable_memory
        return RunPlan(
            strategy=strategy,
            devices=devices,
            run=run,
            hardware=None if hardware is None else hardware.name,
            memory=bytes_by_use,
            operations=cost.operations * run.accumulate,
            sent=round(gathered_bytes + summed_bytes),
            tokens=tokens,
            seconds=seconds,
            fits=fits,
        )

    def _compute_seconds(self, run: Run, cost: Cost, hardware: Hardware) -> float:
        """Seconds in which a device computes a step of cost ``cost`` per pass, without
        communication."""
        work = [cost.forward_work, cost.backward_work]
        if run.quantize:
            work.append(self._unpacking_work(run))
        itemsize = self.model.dtype.itemsize
        return sum(hardware.seconds(pass_work, itemsize) for pass_work in work) * run.accumulate

    def _sharded_bytes(self, device_count: int) -> int:
        """Bytes of the frozen weights that tensor parallelism divides among the devices. Raises
        ``ConfigError`` if there are none, or if ``device_count`` does not divide the heads."""
        style_by_pattern = getattr(self.model, "tp_plan", None) or {}
        sharded_bytes = 0
        for parameter_path, parameter in self.model.named_parameters():
            module_path, _, parameter_name = parameter_path.rpartition(".")
            partition = PARTITION_BY_STYLE.get(
                style_of(style_by_pattern, module_path, parameter_name)
            )
            if not parameter.requires_grad and partition in (COLUMN_WISE, ROW_WISE):
                sharded_bytes += parameter.nbytes
        if not sharded_bytes:
            raise ConfigError(
                f"strategy tp for {type(self.model).__name__}, for which transformers has no plan",
                "ddp or fsdp",
                "choose one of them",
            )
        head_count = getattr(self.model.config.get_text_config(), "num_key_value_heads", None)
        if head_count is not None and head_count % device_count:
            raise ConfigError(
                f"strategy tp on {device_count} devices, and {head_count} heads of keys and values",
                "a number of devices that divides them",
                "take fewer devices",
            )
        return sharded_bytes

    def _unpacking_work(self, run: Run) -> Work:
        """The work of unpacking every packed weight in each pass over it: in forward, in backward,
        and with activation checkpointing in the second forward. Unpacking reads the packed weight
        and writes it in the dtype of the matrix products."""
        pass_count, work = 3 if run.checkpointing else 2, Work()
        for weight, packed_bytes in packed_linears(self.model, str(run.quantize)):
            work[0, weight.nbytes + packed_bytes, False] += pass_count
        return work


def _check_packed_weights(run: Run, strategy: str, devices: int) -> None:
    """Raise ``ConfigError`` if the strategy would shard packed weights."""
    if run.quantize is not None and devices > 1 and strategy != "ddp":
        raise ConfigError(
            f"strategy {strategy} with quantize {run.quantize}, and packed weights are not spread",
            "ddp",
            "choose it, or leave out quantize",
        )


def plan_all(
    planner: Planner,
    run: Run,
    device_counts: Sequence[int],
    strategies: Iterable[str],
    hardware: Hardware | None,
) -> tuple[list[RunPlan], list[str]]:
    """Plan a run for each combination of a number of devices and a strategy ("ddp", "fsdp", "tp").
    On one device, where strategies do not differ, only the first is planned.

    Returns:
        (the plans of the possible combinations, the reasons why other combinations are impossible).

    Raises:
        ConfigError: no combination is possible.
    """
    plans, rejections = [], []
    for device_count in device_counts:
        for strategy in [*strategies][:1] if device_count == 1 else strategies:
            try:
                plans.append(planner.plan(run, strategy, device_count, hardware))
            except ConfigError as error:
                rejections.append(str(error))
    if not plans:
        raise ConfigError(rejections[0])
    return plans, [*dict.fromkeys(rejections)]


def recommend(
    planner: Planner,
    run: Run,
    device_counts: Sequence[int],
    strategies: Sequence[str],
    hardware: Hardware,
) -> str:
    """Recommend in words the fewest devices that have enough memory, and the fastest strategy on
    them. If the run fits on none of ``device_counts``, try it with less memory: recomputed
    activations, one row at a time, a packed base. If that does not fit either, return an advice
    with the least memory that is needed."""
    variations: list[tuple[str, Run]] = [("", run)]
    if not run.checkpointing:
        variations.append((" with activation checkpointing", replace(run, checkpointing=True)))
    smallest_run = replace(run, checkpointing=True)
    if run.batch > 1:
        smallest_run = replace(smallest_run, batch=1, accumulate=run.accumulate * run.batch)
        variations.append((" with checkpointing and a row at a time, accumulated", smallest_run))
    if run.quantize is None:
        variation_prefix = " with checkpointing, a row at a time," if smallest_run != run else ""
        variations.append((f"{variation_prefix} in nf4", replace(smallest_run, quantize="nf4")))
    for variation_text, variation in variations:
        fitting_plans = [
            plan
            for plan in plan_all(planner, variation, device_counts, strategies, hardware)[0]
            if plan.fits
        ]
        if fitting_plans:
            best = min(fitting_plans, key=lambda plan: (plan.devices, -(plan.speed or 0)))
            devices_text = (
                f"{best.devices} × {hardware.name}, {best.strategy}"
                if best.devices > 1
                else f"one {hardware.name}"
            )
            memory_text = f"{best.total / 2**30:.1f} GiB of {hardware.usable_memory / 2**30:.1f}"
            return (
                f"{devices_text}{variation_text}: {memory_text},"
                f" {best.speed:,.0f} tokens/s a device"
            )
    smallest = min(
        plan_all(planner, variations[-1][1], device_counts, strategies, hardware)[0],
        key=lambda plan: plan.total,
    )
    return sentence(
        f"nothing fits: {smallest.total / 2**30:.1f} GiB at the least, on {smallest.devices}"
        f" devices by {smallest.strategy}",
        f"{hardware.usable_memory / 2**30:.1f} GiB of {hardware.name}",
        "take more or larger devices",
    )
