"""How much memory a run will take, before it takes it.

    base         Σ frozen weights · their bytes; packed ones as they lie: nf4 takes 0.516 bytes a number, int8
                 1 + 4 / in
    unpacked     the largest packed weight in the dtype of the products: one at a time is unpacked for its product
    adapter      Σ trained parameters · their bytes, and what the optimiser keeps; as much again for gradients while
                 passes accumulate: of a single one they take the place of activations that are gone
    activations  what forward leaves for backward
    workspace    what a step holds beyond that at its highest: of the loss, or of a block's backward

The first three are summed from the parameters; the others are counted in a step on the meta device
(``count.py``).

An optimiser in 8 bits keeps a byte for each state of a number and a float32 scale for 256 of them;
of a tensor with fewer than 4,096 numbers it keeps float32 (bitsandbytes, and torchao in the
parameter's dtype). A paged one keeps as much, which a GPU that runs out moves to main memory.
Offloaded activations lie in main memory, all but one block's.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.attach.adapted_module import base_class, state_of
from veneer.attach.lookup import only_name
from veneer.attach.select import use
from veneer.attach.summary import size
from veneer.bases import storage_of
from veneer.distributed import is_spread
from veneer.errors import ConfigError
from veneer.handle import Handle, attach
from veneer.models.meta import count_attention, countable_model
from veneer.train.plan.count import Cost, Step, count_step
from veneer.train.sharding import blocks as gathered_blocks
from veneer.variants import VARIANTS

#: numbers kept a parameter, by a part of the optimiser's name; Adam's is 2
STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3}
#: numbers that share a scale, and from how many on a tensor's state has few bits
BLOCK, FEW = {8: 256, 4: 128}, 4096
#: numbers of a 4-bit weight that share a scale, and scales that share one (bitsandbytes' double
#: quantisation)
SCALED, SCALES = 64, 256


def parts_of(
    model: nn.Module,
    optimiser: str,
    step: Step | None,
    *,
    accumulate: int = 1,
    sent: int = 0,
    checkpointing: bool = False,
    offload: bool = False,
    quantize: str | None = None,
) -> dict[str, int]:
    """Bytes that a run holds at most, by what holds them then.

    Args:
        step: None leaves out what a step holds.
        accumulate: forward passes of a step.
        sent: bytes in which several devices send gradients.
        offload: what ``offloaded`` says is not there.
        quantize: what the plain weights of ``model`` are to be packed to.
    """
    base, unpacked = weights(model) if quantize is None else to_be_packed(model, quantize)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = sum(parameter.nbytes for parameter in trained)
    parts = {"base": base, **({"one weight unpacked": unpacked} if unpacked else {})}
    parts |= {
        "adapter": own,
        "gradients": own,
        "optimiser": round(sum(states(p, optimiser) for p in trained)),
    }
    if step is not None:
        cost = step.checkpointed if checkpointing else step.whole
        parts |= {"activations": cost.saved, "workspace": cost.peak - cost.saved}
        if offload:  # all but those of the block that runs
            parts["activations"] -= offloaded(step, checkpointing)
            if not checkpointing:
                parts["workspace"] += max((blocks.cost.saved for blocks in step.blocks), default=0)
        # gradients of earlier passes wait beside a pass; those of the last come, and are sent, as
        # activations go
        waiting = own if accumulate > 1 else 0
        parts["gradients"] = waiting + max(
            0, own - waiting + sent - parts["activations"] - parts["workspace"]
        )
    return parts


def offloaded(step: Step, checkpointing: bool) -> int:
    """Bytes of the activations that wait in main memory."""
    return sum(
        blocks.count * (step.hidden if checkpointing else blocks.cost.saved)
        for blocks in step.blocks
    )


def spread(
    parts: dict[str, int], cost: Cost, blocks: Sequence[tuple[int, int]], devices: int
) -> dict[str, int]:
    """The parts on each of several devices over which fsdp spreads the base, of which each gathers
    a block at a time. ``blocks``: (how many are alike, bytes of the frozen weights of one)."""
    # the root stays gathered from its forward to its backward; beside it, while blocks run, this
    # one and the next
    root, pair = (
        parts["base"] - sum(count * own for count, own in blocks),
        2 * max((own for _, own in blocks), default=0),
    )
    at_loss = cost.peak_loss > cost.peak_backward + pair
    workspace = parts["workspace"] - cost.peak + (cost.peak_loss if at_loss else cost.peak_backward)
    gathered = {"gathered": root + (0 if at_loss else pair)}
    return parts | {"base": -(-parts["base"] // devices), "workspace": workspace} | gathered


def estimate(model: Any, config: Any, tokens: int, labelled: int) -> str:
    """What one step of `tokens` tokens (padding included) will hold, `labelled` of which carry a
    label; in words. `config`: a `TrainConfig`."""
    try:
        parts, elsewhere = predict(model, config, tokens, labelled)
    except ConfigError as error:  # no reason not to train
        return _at_least(parts_of(model, config.optimiser, None), error)
    text = _about(parts)
    return (
        f"{text}, and activations of {size(elsewhere)} in main memory"
        if config.offload_activations
        else text
    )


def estimate_at_once(model: Any, runs: Mapping[str, Run], tokens: int, labelled: int) -> str:
    """The same of runs that are trained at once, with so many tokens each."""
    try:
        return _about(predict_at_once(model, runs, tokens, labelled))
    except ConfigError as error:
        return _at_least(_of_runs(model, runs, None), error)


def _about(parts: Mapping[str, int]) -> str:
    """Without what is nothing, as gradients are that come where activations go."""
    told = ", ".join(f"{name} {size(number)}" for name, number in parts.items() if number)
    return f"about {size(sum(parts.values()))} ({told})"


def _at_least(parts: Mapping[str, int], error: ConfigError) -> str:
    return (
        f"at least {_about(parts).removeprefix('about ')}; activations are not counted:"
        f" {error.found}"
    )


class Run(NamedTuple):
    """One of the runs that are trained at once (``train/many``). ``rows``: who has the same shares
    forwards with it."""

    config: Any
    parameters: Sequence[nn.Parameter]
    rows: Any


def predict_at_once(
    model: Any, runs: Mapping[str, Run], tokens: int, labelled: int
) -> dict[str, int]:
    """Bytes by what holds them. Runs that share a forward hold the activations of the rows of all;
    a step is counted of the largest adapter among them, on so many rows. Errors as `step_of`."""
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run.rows, []).append(name)
    config = next(iter(runs.values())).config
    rows = max(1, min(config.batch_size, tokens))
    length, found = max(1, round(tokens / rows)), []
    for names in groups.values():  # one after another
        numbers = {
            name: sum(parameter.numel() for parameter in runs[name].parameters) for name in names
        }
        largest = max(names, key=numbers.__getitem__)
        step = step_of(model, rows * len(names), length, labelled / max(tokens, 1), name=largest)
        parts = _of_runs(model, runs, step, waits=len(groups) > 1)
        # what is joined of each layer's factors, in the dtype of the base, is there until backward
        if len(names) > 1:
            parts["activations"] += sum(numbers.values()) * model.dtype.itemsize
        found.append(parts)
    return max(found, key=lambda parts: sum(parts.values()))


def _of_runs(
    model: Any, runs: Mapping[str, Run], step: Step | None, waits: bool = False
) -> dict[str, int]:
    """``waits``: gradients of some wait while forwards of others run."""
    config = next(iter(runs.values())).config
    how = {
        "accumulate": 2 if waits else config.grad_accum,
        "checkpointing": config.activation_checkpointing,
    }
    parts = parts_of(model, config.optimiser, step, **how)
    kept = sum(
        states(parameter, run.config.optimiser)
        for run in runs.values()
        for parameter in run.parameters
    )
    return parts | {"optimiser": round(kept)}


def predict(model: Any, config: Any, tokens: int, labelled: int) -> tuple[dict[str, int], int]:
    """Bytes by what holds them, and those of the activations that wait in main memory. Arguments
    and errors as `estimate` and `step_of`."""
    rows = max(1, min(config.batch_size, tokens))
    processes = dist.get_world_size() if config.parallel == "fsdp" and dist.is_initialized() else 1
    step = step_of(
        model, rows, max(1, round(tokens / rows)), labelled / max(tokens, 1), chunked=processes == 1
    )
    again = config.activation_checkpointing
    how = {"checkpointing": again, "offload": config.offload_activations}
    parts = parts_of(model, config.optimiser, step, accumulate=config.grad_accum, **how)
    if processes > 1:
        blocks = [(1, weights(block)[0]) for block in gathered_blocks(model)]
        parts = spread(parts, step.checkpointed if again else step.whole, blocks, processes)
    return parts, offloaded(step, again) if config.offload_activations else 0


def step_of(
    model: Any,
    batch: int,
    length: int,
    labelled: float,
    *,
    chunked: bool = True,
    name: str | None = None,
) -> Step:
    """A step of a model with an adapter, or of several that of this name, counted on a copy without
    weights.

    Raises:
        ConfigError: the model reads no tokens, is no decoder, or does what cannot be counted
            without numbers.
    """
    plain = all(storage is None or storage.name == "plain" for _, _, storage in _stored(model))
    like = plain and not is_spread(model.modules())  # what is spread cannot be copied
    reasons = {
        "reads no tokens": getattr(model, "main_input_name", None) != "input_ids",
        "is an encoder and a decoder": getattr(model.config, "is_encoder_decoder", False),
        "is packed or spread, and has no output head": (
            not like and model.get_output_embeddings() is None
        ),
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise ConfigError(
            f"{base_class(model).__name__}, which {found[0]}",
            "a decoder of tokens",
            "plan a like one",
        )
    twin = _without_weights(model) if like else _repacked(model, name)
    with nullcontext() if name is None or not like else use(twin, name):
        return count_step(twin, batch, length, labelled=labelled, plain=plain, chunked=chunked)


def _repacked(model: Any, name: str | None) -> Any:
    """A like model with plain weights on the meta device, and a like adapter."""
    config = Handle(model, only_name(model, name)).config
    # whose shapes are the same
    start = config.variant if not VARIANTS[config.variant].needs else "lora"
    twin = countable_model(model.config, model.dtype)
    attach(twin, replace(config, variant=start))
    return twin


def _without_weights(model: Any) -> Any:
    """A copy on the meta device."""
    memo: dict[int, Any] = {}
    for one in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(one, device="meta")
        memo[id(one)] = (
            nn.Parameter(empty, one.requires_grad) if isinstance(one, nn.Parameter) else empty
        )
    return count_attention(copy.deepcopy(model, memo)).train()


def _stored(model: nn.Module) -> Iterator[tuple[nn.Module, Any, Any]]:
    """(module, frozen weight, its storage) of each weight, once."""
    seen = set[int]()
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None and not weight.requires_grad and id(weight) not in seen:
                seen.add(id(weight))
                yield module, weight, storage_of(weight)


def weights(model: nn.Module) -> tuple[int, int]:
    """(bytes of the frozen weights as they lie, scales included; bytes of the largest packed one as
    its layer unpacks it)."""
    total, largest = 0, 0
    dtype = getattr(model, "dtype", torch.float32)
    for module, weight, storage in _stored(model):
        if storage is None or storage.name == "plain":
            total += weight.nbytes
            continue
        storage.prepare(module)
        try:
            total += sum(tensor.nbytes for tensor in storage.stored_tensors(weight).values())
        finally:
            if state_of(module) is None:
                storage.release(module)
        largest = max(largest, storage.shape(weight).numel() * dtype.itemsize)
    return total, largest


def to_be_packed(model: nn.Module, quantize: str) -> tuple[int, int]:
    """``weights``, once the linear layers but the output head are packed as bitsandbytes does.
    Stacks of experts are no linear layers: they stay as they are."""
    found = packed_linears(model, quantize)
    plain = sum(weight.nbytes for _, weight, _ in _stored(model)) - sum(
        weight.nbytes for weight, _ in found
    )
    return plain + sum(own for _, own in found), max(
        (weight.nbytes for weight, _ in found), default=0
    )


def packed_linears(model: Any, quantize: str) -> list[tuple[Tensor, int]]:
    """(weight, bytes once it is packed) of each linear layer but the output head."""
    head = model.get_output_embeddings()
    return [
        (weight, packed(weight.shape[0], weight.shape[1], quantize))
        for module, weight, _ in _stored(model)
        if isinstance(module, nn.Linear) and module is not head and weight.dim() == 2
    ]


def packed(out: int, in_: int, quantize: str) -> int:
    """Bytes of a weight [out, in] in "nf4", "fp4" or "int8", with scales, tables and offsets."""
    numbers = out * in_
    if quantize == "int8":
        return numbers + 4 * out
    scales = -(-numbers // SCALED)
    return -(-numbers // 2) + scales + 4 * -(-scales // SCALES) + 4 * 257


def states(parameter: Tensor, optimiser: str) -> float:
    """Bytes that an optimiser of this name keeps for a parameter."""
    name, numbers = optimiser.lower(), parameter.numel()
    count = next((count for part, count in STATES.items() if part in name), 2)
    few = re.search(r"(?<!\d)([48])bit", name)
    if few is not None and numbers >= FEW:
        bits = int(few[1])
        return count * (numbers * bits / 8 + 4 * -(-numbers // BLOCK[bits]))
    # bitsandbytes keeps float32 of all others
    library = few is not None or "32bit" in name or "bnb" in name
    return count * numbers * (4 if library and "torch" not in name else parameter.element_size())


def peak() -> int:
    """The most memory held so far, in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
