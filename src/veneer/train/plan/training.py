"""A training run on 1 … n devices, by each strategy: what each device holds, computes and sends, and for how long.

    ddp     every device holds all of it and has rows of its own; the adapter's gradients are summed over all of them
    fsdp    frozen weights are spread over the devices, and gathered block by block, in forward and again in backward;
            the adapter is whole on each, its gradients are summed
    tp      each matrix is cut, by transformers' plan for the model: the devices share the rows; what a block's two
            row-wise layers put out is summed, in forward and in backward

A ring of n devices sends (n - 1) / n of what is gathered, and twice that of what is summed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from veneer.errors import ConfigError, nearest, sentence
from veneer.train.plan.count import Step, Work, count_step
from veneer.train.plan.hardware import SLACK, Hardware
from veneer.train.plan.memory import parts_of, to_be_packed, weights

STRATEGIES = ("ddp", "fsdp", "tp")


@dataclass(frozen=True)
class Run:
    """What does not depend on the devices. ``batch``: rows of ``length`` tokens in one forward pass of a device (of all
    devices together for tp); ``accumulate``: such passes in a step; ``labelled``: share of the tokens with a label."""

    batch: int = 8
    length: int = 2048
    accumulate: int = 1
    labelled: float = 1.0
    optimiser: str = "adamw_torch_fused"
    checkpointing: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        wrong = [name for name in ("batch", "length", "accumulate") if getattr(self, name) < 1]
        if wrong or not 0 < self.labelled <= 1:
            found = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong) or f"labelled={self.labelled!r}"
            raise ConfigError(found, "counts of at least 1, and a share in (0, 1]", "correct it")
        if self.quantize not in (None, "nf4", "fp4", "int8"):
            raise ConfigError(f"quantize={self.quantize!r}", "nf4, fp4 or int8", "choose one, or leave it out")


@dataclass(frozen=True)
class Planned:
    """A run on so many devices.

    Fields:
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

    def step(self, run: Run) -> Step:
        key = run.batch, run.length, run.labelled, run.quantize is None
        if key not in self._steps:
            self._steps[key] = count_step(self.model, *key[:2], labelled=run.labelled, plain=key[3])
        return self._steps[key]

    def plan(self, run: Run, strategy: str = "ddp", devices: int = 1, on: Hardware | None = None) -> Planned:
        """One run. ``ConfigError``: an unknown strategy; tp for a model of which transformers has no plan, or on more
        devices than its heads of keys and values."""
        if strategy not in STRATEGIES or devices < 1:
            found = f"{devices} devices, strategy {strategy!r}{nearest(strategy, STRATEGIES)}"
            raise ConfigError(found, f"at least 1, and {', '.join(STRATEGIES)}", "choose one")
        step = self.step(run)
        cost = step.checkpointed if run.checkpointing else step.whole
        parts = parts_of(
            self.model, run.optimiser, step, checkpointing=run.checkpointing, quantize=run.quantize
        )  # fmt: skip
        spread = {"ddp": self._ddp, "fsdp": self._fsdp, "tp": self._tp}[strategy] if devices > 1 else self._ddp
        parts, sent, share = spread(parts, run, step, cost, devices)
        parts["slack"] = round(SLACK * sum(parts.values()))
        operations = round(cost.operations * run.accumulate * share)
        seconds = None
        if on is not None:
            work = [cost.forward, cost.backward, *([self._unpacking(run)] if run.quantize else [])]
            one = sum(on.seconds(part, self.model.dtype.itemsize) for part in work) * run.accumulate * share
            sending = on.sending(sent, devices)
            # a gather runs ahead of the block that needs it; the others are waited for
            seconds = max(one, sending) if strategy == "fsdp" else one + sending
        tokens = run.batch * run.length * run.accumulate * (1 if strategy == "tp" else devices)
        fits = None if on is None else sum(parts.values()) <= on.usable
        name = None if on is None else on.name
        return Planned(strategy, devices, run, name, parts, operations, sent, tokens, seconds, fits)

    def _ddp(self, parts: dict[str, int], run: Run, step: Step, cost: Any, n: int) -> tuple[dict[str, int], int, float]:
        if n > 1:
            parts["buckets"] = parts["gradients"]  # in which they are sent
        return parts, round(2 * (n - 1) / n * parts["gradients"]), 1.0

    def _fsdp(
        self, parts: dict[str, int], run: Run, step: Step, cost: Any, n: int
    ) -> tuple[dict[str, int], int, float]:
        blocks = [(each.count, self._bytes(each.block, run)) for each in step.blocks]
        inside = sum(count * own for count, own in blocks)
        root = parts["base"] - inside
        parts["base"] = round(parts["base"] / n)
        # the root stays gathered from its forward to its backward, beside the block that runs and the next one
        parts["gathered"] = root + 2 * max((own for _, own in blocks), default=0)
        gathered = (2 * inside + root) * run.accumulate
        return parts, round((n - 1) / n * (gathered + 2 * parts["gradients"])), 1.0

    def _tp(self, parts: dict[str, int], run: Run, step: Step, cost: Any, n: int) -> tuple[dict[str, int], int, float]:
        rules = self._rules(n)
        cut = sum(
            self._bytes(module, run) for path, module in self.model.named_modules()
            if any(rule.fullmatch(path) for rule, _ in rules)
        )  # fmt: skip
        thin = 0
        for path, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                row = next((row for rule, row in rules if rule.match(path)), None)
                # A reads what a row-wise layer's weight reads, B writes what a column-wise one's writes
                shared = row is not None and path.endswith(".A" if row else ".B")
                thin += parameter.nbytes * (n - 1) // n if shared else 0
        own = parts["adapter"]
        left = (own - thin) / own if own else 1.0
        parts |= {name: round(parts[name] * left) for name in ("adapter", "gradients", "optimiser")}
        parts["base"] -= cut * (n - 1) // n
        parts["activations"] = cost.wide + (cost.saved - cost.wide) // n
        sums = sum(each.count for each in step.blocks) * 2 * (3 if run.checkpointing else 2)
        return parts, round(2 * (n - 1) / n * step.hidden * sums * run.accumulate), 1 / n

    def _rules(self, n: int) -> list[tuple[re.Pattern[str], bool]]:
        """(path of what is cut, whether it is row-wise)."""
        config = self.model.config.get_text_config()
        plan, heads = getattr(config, "base_model_tp_plan", None), getattr(config, "num_key_value_heads", None)
        if not plan:
            found = f"strategy tp for {type(self.model).__name__}, for which transformers has no plan"
            raise ConfigError(found, "ddp or fsdp", "choose one of them")
        if heads is not None and heads % n:
            found = f"strategy tp on {n} devices, and {heads} heads of keys and values"
            raise ConfigError(found, "a number of devices that divides them", "take fewer devices")
        cuts = [(path, "row" in how) for path, how in plan.items() if "colwise" in how or "rowwise" in how]
        return [
            (re.compile(rf".*{re.escape(path).replace(chr(92) + '*', '[0-9]+')}(?=$|[.])"), row) for path, row in cuts
        ]

    def _bytes(self, module: nn.Module, run: Run) -> int:
        """Bytes of the frozen weights in a module."""
        head = self.model.get_output_embeddings()
        return (weights(module) if run.quantize is None else to_be_packed(module, run.quantize, head))[0]

    def _unpacking(self, run: Run) -> Work:
        """Of every packed weight, in forward and in backward: to read it, to write it in the products' dtype and to
        read that once."""
        head, passes = self.model.get_output_embeddings(), 3 if run.checkpointing else 2
        work = Work()
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                work[0, round(2.5 * module.weight.nbytes)] += passes
        return work


def table(
    planner: Planner, run: Run, counts: Sequence[int], strategies: Iterable[str], on: Hardware | None
) -> tuple[list[Planned], list[str]]:
    """The plans for all numbers of devices and strategies, and why some are left out."""
    plans, left_out = [], []
    for devices in counts:
        for strategy in [*strategies][:1] if devices == 1 else strategies:
            try:
                plans.append(planner.plan(run, strategy, devices, on))
            except ConfigError as error:
                if strategy != "tp":
                    raise
                left_out.append(str(error))
    if not plans:
        raise ConfigError(left_out[0])
    return plans, [*dict.fromkeys(left_out)]


def recommend(planner: Planner, run: Run, counts: Sequence[int], strategies: Sequence[str], on: Hardware) -> str:
    """What to do: the fewest devices that suffice, and the fastest way to use them; where nothing fits, what would."""
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
            best = max((one for one in enough if one.devices == fewest), key=lambda one: one.speed or 0)
            where = f"{best.devices} × {on.name}, {best.strategy}" if best.devices > 1 else f"one {on.name}"
            room = f"{best.total / 2**30:.1f} GiB of {on.usable / 2**30:.1f}"
            return f"{where}{how}: {room}, {best.speed:,.0f} tokens/s a device"
    smallest = min(table(planner, changes[-1][1], counts, strategies, on)[0], key=lambda one: one.total)
    least = f"{smallest.total / 2**30:.1f} GiB at the least"
    found = f"nothing fits: {least}, on {smallest.devices} devices by {smallest.strategy}"
    return sentence(found, f"{on.usable / 2**30:.1f} GiB of {on.name}", "take more or larger devices")
