"""The memory that a run will take, estimated before it starts.

    base         Σ frozen weights · their bytes; packed weights in packed form: nf4 takes 0.516
                 bytes a number, int8 1 + 4 / in
    unpacked     the largest packed weight in the dtype of the products; one is unpacked at a time
    adapter      Σ trained parameters · their bytes, and the optimiser's state. Gradients take as
                 much again while passes accumulate; with a single pass they replace activations
                 that backward has freed
    activations  tensors that forward saves for backward
    workspace    the peak of a step beyond that: in the loss, or in a block's backward

The first three are sums over parameters; the others are counted in a step on the meta device
(``count.py``).

An 8-bit optimiser keeps one byte for each number of its state, and a float32 scale for 256 of them;
the state of a tensor with fewer than 4,096 numbers is float32 (bitsandbytes) or in the parameter's
dtype (torchao). A paged optimiser keeps as much, but a GPU that runs out moves it to main memory.
Offloaded activations lie in main memory, except those of one block.
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

from veneer.attach import only_name, state_of, use
from veneer.bases import storage_of
from veneer.distributed import base_class, is_spread
from veneer.errors import ConfigError, format_bytes
from veneer.handle import Handle, attach
from veneer.models.meta import count_attention, countable_model
from veneer.train.plan.count import Cost, Step, count_step
from veneer.train.sharding import blocks as gathered_blocks
from veneer.variants import VARIANTS

#: numbers of optimiser state for each parameter, by a substring of the optimiser's name; others
#: have 2, as Adam
STATES = {"sgd": 0, "adafactor": 0.1, "adagrad": 1, "lion": 1, "rmsprop": 1, "ademamix": 3}
#: by bits, how many numbers of optimiser state share a scale; the smallest tensor whose state is
#: quantised
BLOCK, FEW = {8: 256, 4: 128}, 4096
#: how many numbers of a 4-bit weight share a scale, and how many scales share another scale
#: (bitsandbytes' double quantisation)
SCALED, SCALES = 64, 256


def memory_breakdown(
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
    """The most bytes that a run holds, by use.

    Args:
        step: None leaves out activations and workspace.
        accumulate: forward passes of a step.
        sent: bytes of the buffers in which several devices send gradients.
        offload: whether activations (``offloaded_bytes``) lie in main memory.
        quantize: the format to which the plain weights of ``model`` will be packed.
    """
    base, unpacked = (
        weight_bytes(model) if quantize is None else packed_weight_bytes(model, quantize)
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trainable)
    sizes = {"base": base, **({"one weight unpacked": unpacked} if unpacked else {})}
    sizes |= {
        "adapter": trained_bytes,
        "gradients": trained_bytes,
        "optimiser": round(sum(state_bytes(p, optimiser) for p in trainable)),
    }
    if step is not None:
        cost = step.with_checkpointing if checkpointing else step.total
        sizes |= {"activations": cost.saved, "workspace": cost.peak - cost.saved}
        if offload:  # the running block's activations stay on the device
            sizes["activations"] -= offloaded_bytes(step, checkpointing)
            if not checkpointing:
                sizes["workspace"] += max((blocks.cost.saved for blocks in step.blocks), default=0)
        # accumulated gradients exist during a pass; the gradients of the last pass, and the
        # buffers in which they are sent, replace activations that backward has freed
        accumulated = trained_bytes if accumulate > 1 else 0
        sizes["gradients"] = accumulated + max(
            0, trained_bytes - accumulated + sent - sizes["activations"] - sizes["workspace"]
        )
    return sizes


def offloaded_bytes(step: Step, checkpointing: bool) -> int:
    """Bytes of the activations that lie in main memory."""
    return sum(
        blocks.count * (step.hidden_bytes if checkpointing else blocks.cost.saved)
        for blocks in step.blocks
    )


def shard_base(
    sizes: dict[str, int], cost: Cost, blocks: Sequence[tuple[int, int]], devices: int
) -> dict[str, int]:
    """Memory by use on each of several devices among which FSDP shards the base; each gathers one
    block at a time. ``blocks``: (number of equal blocks, bytes of the frozen weights of each)."""
    # the root module stays gathered from its forward to its backward; while blocks run, the
    # current and the next block are gathered too
    root = sizes["base"] - sum(count * block_bytes for count, block_bytes in blocks)
    two_blocks = 2 * max((block_bytes for _, block_bytes in blocks), default=0)
    at_loss = cost.peak_loss > cost.peak_backward + two_blocks
    workspace = sizes["workspace"] - cost.peak + (cost.peak_loss if at_loss else cost.peak_backward)
    gathered = {"gathered": root + (0 if at_loss else two_blocks)}
    return sizes | {"base": -(-sizes["base"] // devices), "workspace": workspace} | gathered


def estimate(model: Any, config: Any, tokens: int, labelled: int) -> str:
    """Describe the memory of one step in words.

    Args:
        config: a `TrainConfig`.
        tokens: number of tokens of a forward pass, padding included.
        labelled: number of these that have a label.
    """
    try:
        sizes, offloaded_size = predict(model, config, tokens, labelled)
    except ConfigError as error:  # a model that cannot be counted may still train
        return _format_lower_bound(memory_breakdown(model, config.optimiser, None), error)
    text = _format_total(sizes)
    return (
        f"{text}, and activations of {format_bytes(offloaded_size)} in main memory"
        if config.offload_activations
        else text
    )


def estimate_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], tokens: int, labelled: int
) -> str:
    """Describe the memory of a step of runs that train at once, each with ``tokens`` tokens, in
    words."""
    try:
        return _format_total(predict_at_once(model, runs, tokens, labelled))
    except ConfigError as error:
        return _format_lower_bound(_breakdown_at_once(model, runs, None), error)


def _format_total(sizes: Mapping[str, int]) -> str:
    """The total and its uses in words, without uses of 0 bytes."""
    listing = ", ".join(
        f"{name} {format_bytes(size_bytes)}" for name, size_bytes in sizes.items() if size_bytes
    )
    return f"about {format_bytes(sum(sizes.values()))} ({listing})"


def _format_lower_bound(sizes: Mapping[str, int], error: ConfigError) -> str:
    return (
        f"at least {_format_total(sizes).removeprefix('about ')}; activations are not counted:"
        f" {error.problem}"
    )


class ConcurrentRun(NamedTuple):
    """One of several runs that train at once (``train/many``). Runs with equal ``rows`` share
    forwards."""

    config: Any
    parameters: Sequence[nn.Parameter]
    rows: Any


def predict_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], tokens: int, labelled: int
) -> dict[str, int]:
    """Bytes by use. Runs that share a forward hold the activations of all their rows, so a step of
    the largest adapter among them is counted on that many rows. Raises as `count_model_step`."""
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run.rows, []).append(name)
    config = next(iter(runs.values())).config
    rows = max(1, min(config.batch_size, tokens))
    length, sizes_of_groups = max(1, round(tokens / rows)), []
    for names in groups.values():  # groups run in turn
        trained_counts = {
            name: sum(parameter.numel() for parameter in runs[name].parameters) for name in names
        }
        largest = max(names, key=trained_counts.__getitem__)
        step = count_model_step(
            model, rows * len(names), length, labelled / max(tokens, 1), name=largest
        )
        sizes = _breakdown_at_once(model, runs, step, waits=len(groups) > 1)
        # each layer's factors are concatenated in the dtype of the base and saved for backward
        if len(names) > 1:
            sizes["activations"] += sum(trained_counts.values()) * model.dtype.itemsize
        sizes_of_groups.append(sizes)
    return max(sizes_of_groups, key=lambda sizes: sum(sizes.values()))


def _breakdown_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], step: Step | None, waits: bool = False
) -> dict[str, int]:
    """Bytes by use of runs that train at once. ``waits``: whether gradients of some runs exist
    while others run their forward."""
    config = next(iter(runs.values())).config
    options = {
        "accumulate": 2 if waits else config.grad_accum,
        "checkpointing": config.activation_checkpointing,
    }
    sizes = memory_breakdown(model, config.optimiser, step, **options)
    state_total = sum(
        state_bytes(parameter, run.config.optimiser)
        for run in runs.values()
        for parameter in run.parameters
    )
    return sizes | {"optimiser": round(state_total)}


def predict(model: Any, config: Any, tokens: int, labelled: int) -> tuple[dict[str, int], int]:
    """(bytes by use, bytes of activations in main memory). Arguments as `estimate`; raises as
    `count_model_step`."""
    rows = max(1, min(config.batch_size, tokens))
    processes = dist.get_world_size() if config.parallel == "fsdp" and dist.is_initialized() else 1
    step = count_model_step(
        model, rows, max(1, round(tokens / rows)), labelled / max(tokens, 1), chunked=processes == 1
    )
    checkpointing = config.activation_checkpointing
    options = {"checkpointing": checkpointing, "offload": config.offload_activations}
    sizes = memory_breakdown(model, config.optimiser, step, accumulate=config.grad_accum, **options)
    if processes > 1:
        blocks = [(1, weight_bytes(block)[0]) for block in gathered_blocks(model)]
        sizes = shard_base(
            sizes, step.with_checkpointing if checkpointing else step.total, blocks, processes
        )
    return sizes, offloaded_bytes(step, checkpointing) if config.offload_activations else 0


def count_model_step(
    model: Any,
    batch: int,
    length: int,
    labelled: float,
    *,
    chunked: bool = True,
    name: str | None = None,
) -> Step:
    """Count a step of a model with an adapter on a copy without data.

    Args:
        name: the adapter, if the model has several.

    Raises:
        ConfigError: the model is no decoder of tokens, or cannot run on tensors without data.
    """
    plain = all(
        storage is None or storage.name == "plain" for _, _, storage in _frozen_weights(model)
    )
    copyable = plain and not is_spread(model.modules())  # sharded weights cannot be copied
    reasons = {
        "reads no tokens": getattr(model, "main_input_name", None) != "input_ids",
        "is an encoder and a decoder": getattr(model.config, "is_encoder_decoder", False),
        "is packed or spread, and has no output head": (
            not copyable and model.get_output_embeddings() is None
        ),
    }
    if problems := [reason for reason, applies in reasons.items() if applies]:
        raise ConfigError(
            f"{base_class(model).__name__}, which {problems[0]}",
            "a decoder of tokens",
            "plan a like one",
        )
    meta_model = _copy_without_weights(model) if copyable else _unpacked_copy(model, name)
    with nullcontext() if name is None or not copyable else use(meta_model, name):
        return count_step(
            meta_model, batch, length, labelled=labelled, plain=plain, chunked=chunked
        )


def _unpacked_copy(model: Any, name: str | None) -> Any:
    """A model of the same config with plain weights on the meta device, and an adapter of the same
    shapes."""
    config = Handle(model, only_name(model, name)).config
    # a start that needs data is replaced: its parameters have the same shapes
    variant = config.variant if not VARIANTS[config.variant].needs else "lora"
    meta_model = countable_model(model.config, model.dtype)
    attach(meta_model, replace(config, variant=variant))
    return meta_model


def _copy_without_weights(model: Any) -> Any:
    """A copy of the model on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return count_attention(copy.deepcopy(model, memo)).train()


def _frozen_weights(model: nn.Module) -> Iterator[tuple[nn.Module, Any, Any]]:
    """(module, frozen weight, its storage format) of each frozen weight, once."""
    visited = set[int]()
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None and not weight.requires_grad and id(weight) not in visited:
                visited.add(id(weight))
                yield module, weight, storage_of(weight)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of the frozen weights as stored, with scales; bytes of the largest packed weight after
    its layer has unpacked it)."""
    total, largest = 0, 0
    dtype = getattr(model, "dtype", torch.float32)
    for module, weight, storage in _frozen_weights(model):
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


def packed_weight_bytes(model: nn.Module, quantize: str) -> tuple[int, int]:
    """``weight_bytes`` after bitsandbytes has packed all linear layers but the output head. Stacks
    of experts are not linear layers and stay plain."""
    linears = packed_linears(model, quantize)
    plain = sum(weight.nbytes for _, weight, _ in _frozen_weights(model)) - sum(
        weight.nbytes for weight, _ in linears
    )
    return plain + sum(packed_bytes for _, packed_bytes in linears), max(
        (weight.nbytes for weight, _ in linears), default=0
    )


def packed_linears(model: Any, quantize: str) -> list[tuple[Tensor, int]]:
    """(weight, its bytes when packed) of each linear layer but the output head."""
    head = model.get_output_embeddings()
    return [
        (weight, packed_size(weight.shape[0], weight.shape[1], quantize))
        for module, weight, _ in _frozen_weights(model)
        if isinstance(module, nn.Linear) and module is not head and weight.dim() == 2
    ]


def packed_size(out: int, in_: int, quantize: str) -> int:
    """Bytes of a weight [out, in] in "nf4", "fp4" or "int8", with scales, tables and offsets."""
    count = out * in_
    if quantize == "int8":
        return count + 4 * out
    scales = -(-count // SCALED)
    return -(-count // 2) + scales + 4 * -(-scales // SCALES) + 4 * 257


def state_bytes(parameter: Tensor, optimiser: str) -> float:
    """Bytes of state that the optimiser of this name keeps for a parameter."""
    name, count_of_numbers = optimiser.lower(), parameter.numel()
    count = next((count for key, count in STATES.items() if key in name), 2)
    bits_in_name = re.search(r"(?<!\d)([48])bit", name)
    if bits_in_name is not None and count_of_numbers >= FEW:
        bits = int(bits_in_name[1])
        return count * (count_of_numbers * bits / 8 + 4 * -(-count_of_numbers // BLOCK[bits]))
    # bitsandbytes keeps all other states in float32
    library = bits_in_name is not None or "32bit" in name or "bnb" in name
    return (
        count
        * count_of_numbers
        * (4 if library and "torch" not in name else parameter.element_size())
    )


def peak_memory() -> int:
    """The peak memory so far in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
