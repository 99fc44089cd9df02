"""A training run on 1 … n devices, by each strategy: what each device holds, computes and sends,
and for how long.

A step is of as many examples on n devices as on one, as ``veneer train`` has it under torchrun.

    ddp     every device holds all of it and has its share of the rows
    fsdp    also so, with the frozen weights spread over the devices, and gathered block by block, in forward and again
            in backward; the loss takes the logits of all rows, as the head cannot be called alone
    tp      the blocks' matrices are cut, by transformers' plan for the model: all devices see all rows; what a block's
            two row-wise layers put out is summed, and in backward what its column-wise ones were
            given

The adapter is whole on each device, and its gradients are summed once a step, in float32. A ring of
n devices sends (n - 1) / n of what is gathered, and twice that of what is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.errors import ConfigError, nearest, sentence
from veneer.train.plan.count import Step, Work, count_step
from veneer.train.plan.hardware import SLACK, Hardware
from veneer.train.plan.memory import packed_linears, parts_of, spread, weights
from veneer.train.processes import split_step
from veneer.train.tensor_parallel import COLUMNS, ROWS, STYLES, style_of

STRATEGIES = ("ddp", "fsdp", "tp")
#: bytes of a number in which gradients are summed
WIDE = 4


@dataclass(frozen=True)
class Run:
    """What does not depend on the devices. ``batch``: rows of ``length`` tokens in one forward
    pass, at most; ``accumulate``: such passes in a step of one device; ``labelled``: share of the
    tokens with a label; ``offload``: activations wait in main memory."""

    batch: int = 8
    length: int = 2048
    accumulate: int = 1
    labelled: float = 1.0
    optimiser: str = "adamw_torch_fused"
    checkpointing: bool = False
    offload: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        wrong = [name for name in ("batch", "length", "accumulate") if getattr(self, name) < 1]
        if wrong or not 0 < self.labelled <= 1:
            found = (
                ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
                or f"labelled={self.labelled!r}"
            )
            raise ConfigError(found, "counts of at least 1, and a share in (0, 1]", "correct it")
        if self.quantize not in (None, "nf4", "fp4", "int8"):
            raise ConfigError(
                f"quantize={self.quantize!r}", "nf4, fp4 or int8", "choose one, or leave it out"
            )


@dataclass(frozen=True)
class Planned:
    """A run on so many devices.

    Fields:
        run: of one of the devices: its share of the rows.
        memory: bytes that a device holds at most, by what holds them.
        operations, sent: of a device in a step; bytes.
        tokens: of a step, of all devices.
        seconds: of a step; None without hardware.
        fits: whether a device has that much memory; None without hardware.
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
        """Tokens a second of one device."""
        return None if self.seconds is None else self.tokens / self.seconds / self.devices


class Planner:
    """Plans for one model with its adapter, which is counted once for each shape of a batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in self.trained)
        self.total = sum(parameter.numel() for parameter in model.parameters()) - self.trainable
        self._steps: dict[Any, Step] = {}

    def step(self, run: Run, chunked: bool = True) -> Step:
        key = run.batch, run.length, run.labelled, run.quantize is None, chunked
        if key not in self._steps:
            self._steps[key] = count_step(
                self.model, *key[:2], labelled=run.labelled, plain=key[3], chunked=chunked
            )
        return self._steps[key]

    def plan(
        self, run: Run, strategy: str = "ddp", devices: int = 1, on: Hardware | None = None
    ) -> Planned:
        """One run.

        Raises:
            ConfigError: an unknown strategy, or one that cannot be: rows that do not divide; packed
                weights that would be spread; tp for a model of which transformers has no plan, or
                on more devices than it has heads.
        """
        if strategy not in STRATEGIES or devices < 1:
            problem = f"{devices} devices, strategy {strategy!r}{nearest(strategy, STRATEGIES)}"
            raise ConfigError(problem, f"at least 1, and {', '.join(STRATEGIES)}", "choose one")
        if run.quantize is not None and devices > 1 and strategy != "ddp":
            problem = (
                f"strategy {strategy} with quantize {run.quantize}, and packed weights are not"
                " spread"
            )
            raise ConfigError(problem, "ddp", "choose it, or leave out quantize")
        tokens, fsdp, tp = (
            run.batch * run.length * run.accumulate,
            *(strategy == one for one in STRATEGIES[1:]),
        )
        if not tp:
            rows, passes = split_step(run.batch, run.accumulate, devices)
            run = replace(run, batch=rows, accumulate=passes)
        step = self.step(run, chunked=not fsdp or devices == 1)
        step = step.cut(devices) if tp else step
        cost = step.checkpointed if run.checkpointing else step.whole
        buckets = WIDE * self.trainable if devices > 1 else 0
        parts = parts_of(
            self.model, run.optimiser, step, accumulate=run.accumulate, sent=buckets, checkpointing=run.checkpointing,
            offload=run.offload, quantize=run.quantize,
        )  # fmt: skip
        gathered = summed = 0  # bytes that a device sends for the base
        if devices > 1:
            ring = (devices - 1) / devices
            if fsdp:
                blocks = [(one.count, weights(one.block)[0]) for one in step.blocks]
                inside = sum(count * own for count, own in blocks)
                gathered = ring * (2 * inside + parts["base"] - inside) * run.accumulate
                parts = spread(parts, cost, blocks, devices)
            if tp:
                parts["base"] -= self._cut(devices) * (devices - 1) // devices
                sums = sum(one.count for one in step.blocks) * 2 * (3 if run.checkpointing else 2)
                summed = 2 * ring * step.hidden * sums * run.accumulate
            summed += 2 * ring * buckets
        parts["slack"] = round(SLACK * sum(parts.values()))
        seconds = fits = None
        if on is not None:
            work = [cost.forward, cost.backward, *([self._unpacking(run)] if run.quantize else [])]
            own = sum(on.seconds(part, self.model.dtype.itemsize) for part in work) * run.accumulate
            # a gather runs ahead of the block that needs it; sums are waited for
            seconds = max(own, on.sending(gathered, devices)) + on.sending(summed, devices)
            fits = sum(parts.values()) <= on.usable
        return Planned(
            strategy, devices, run, None if on is None else on.name, parts, cost.operations * run.accumulate,
            round(gathered + summed), tokens, seconds, fits,
        )  # fmt: skip

    def _cut(self, n: int) -> int:
        """Bytes of the frozen weights that tensor parallelism cuts, in all."""
        plan = getattr(self.model, "tp_plan", None) or {}
        cut = 0
        for path, parameter in self.model.named_parameters():
            module, _, name = path.rpartition(".")
            if not parameter.requires_grad and STYLES.get(style_of(plan, module, name)) in (
                COLUMNS,
                ROWS,
            ):
                cut += parameter.nbytes
        if not cut:
            problem = (
                f"strategy tp for {type(self.model).__name__}, for which transformers has no plan"
            )
            raise ConfigError(problem, "ddp or fsdp", "choose one of them")
        heads = getattr(self.model.config.get_text_config(), "num_key_value_heads", None)
        if heads is not None and heads % n:
            problem = f"strategy tp on {n} devices, and {heads} heads of keys and values"
            raise ConfigError(
                problem, "a number of devices that divides them", "take fewer devices"
            )
        return cut

    def _unpacking(self, run: Run) -> Work:
        """Of every packed weight, in forward and in backward: to read it, and to write it in the
        products' dtype."""
        passes, work = 3 if run.checkpointing else 2, Work()
        for weight, own in packed_linears(self.model, str(run.quantize)):
            work[0, weight.nbytes + own, False] += passes
        return work


def table(
    planner: Planner,
    run: Run,
    counts: Sequence[int],
    strategies: Iterable[str],
    on: Hardware | None,
) -> tuple[list[Planned], list[str]]:
    """The plans for all numbers of devices and strategies, and why some are left out."""
    plans, left_out = [], []
    for devices in counts:
        for strategy in [*strategies][:1] if devices == 1 else strategies:
            try:
                plans.append(planner.plan(run, strategy, devices, on))
            except ConfigError as error:
                left_out.append(str(error))
    if not plans:
        raise ConfigError(left_out[0])
    return plans, [*dict.fromkeys(left_out)]


def recommend(
    planner: Planner, run: Run, counts: Sequence[int], strategies: Sequence[str], on: Hardware
) -> str:
    """What to do: the fewest devices that suffice, and the fastest way to use them; where nothing
    fits, what would."""
    changes: list[tuple[str, Run]] = [("", run)]
    if not run.checkpointing:
        changes.append((" with activation checkpointing", replace(run, checkpointing=True)))
    last = replace(run, checkpointing=True)
    if run.batch > 1:
        last = replace(last, batch=1, accumulate=run.accumulate * run.batch)
        changes.append((" with checkpointing and a row at a time, accumulated", last))
    if run.quantize is None:
        also = " with checkpointing, a row at a time," if last != run else ""
        changes.append((f"{also} in nf4", replace(last, quantize="nf4")))
    for how, changed in changes:
        enough = [one for one in table(planner, changed, counts, strategies, on)[0] if one.fits]
        if enough:
            fewest = min(one.devices for one in enough)
            best = max(
                (one for one in enough if one.devices == fewest), key=lambda one: one.speed or 0
            )
            where = (
                f"{best.devices} × {on.name}, {best.strategy}"
                if best.devices > 1
                else f"one {on.name}"
            )
            room = f"{best.total / 2**30:.1f} GiB of {on.usable / 2**30:.1f}"
            return f"{where}{how}: {room}, {best.speed:,.0f} tokens/s a device"
    smallest = min(
        table(planner, changes[-1][1], counts, strategies, on)[0], key=lambda one: one.total
    )
    least = f"{smallest.total / 2**30:.1f} GiB at the least"
    problem = f"nothing fits: {least}, on {smallest.devices} devices by {smallest.strategy}"
    return sentence(
        problem, f"{on.usable / 2**30:.1f} GiB of {on.name}", "take more or larger devices"
    )
