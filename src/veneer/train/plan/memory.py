"""The memory that a run will take, estimated before it starts.

    base         Σ bytes of the frozen weights. Packed weights count as stored: nf4 takes 0.516
                 bytes for each value, int8 1 + 4 / in
    unpacked     the largest packed weight in the dtype of the products; one weight is unpacked at a
                 time
    adapter      Σ bytes of the trained parameters, and the optimiser's state. Gradients take the
                 bytes of the parameters again while passes accumulate; with a single pass they
                 replace activations that backward has freed
    activations  tensors that forward saves for backward
    workspace    what the peak of a step, in the loss or in a block's backward, needs in addition

Base, unpacked and adapter are sums over parameters. Activations and workspace are counted in a step
on the meta device (``count.py``).

An 8-bit optimiser keeps one byte for each value of its state, and a float32 scale for 256 values.
The state of a tensor with fewer than 4,096 values is float32 (bitsandbytes) or in the parameter's
dtype (torchao). A paged optimiser keeps the same state, which a GPU without free memory moves to
main memory. Offloaded activations are in main memory, except those of one block.
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

from veneer.attach import name_or_default, state_of, use
from veneer.bases import storage_of
from veneer.distributed import base_class, is_spread
from veneer.errors import ConfigError, format_bytes
from veneer.handle import Handle, attach
from veneer.models.meta import count_attention, countable_model
from veneer.train.plan.count import Cost, Step, count_step
from veneer.train.sharding import gathered_blocks
from veneer.variants import VARIANTS

#: how many values of state an optimiser keeps for each value of a parameter, by a substring of the
#: optimiser's name; other optimisers keep 2, as Adam does
STATES_PER_VALUE = {
    "sgd": 0,
    "adafactor": 0.1,
    "adagrad": 1,
    "lion": 1,
    "rmsprop": 1,
    "ademamix": 3,
}
#: VALUES_PER_STATE_SCALE: how many values of optimiser state share a scale, by the bits of a value.
#: MIN_QUANTIZED_VALUES: the number of values of the smallest tensor whose state is quantised
VALUES_PER_STATE_SCALE, MIN_QUANTIZED_VALUES = {8: 256, 4: 128}, 4096
#: how many values of a 4-bit weight share a scale, and how many of these scales share another scale
#: (bitsandbytes' double quantisation)
WEIGHTS_PER_SCALE, SCALES_PER_SCALE = 64, 256


def memory_breakdown(
    model: nn.Module,
    optimiser: str,
    step: Step | None,
    *,
    accumulate: int = 1,
    buffer_bytes: int = 0,
    checkpointing: bool = False,
    offload: bool = False,
    quantize: str | None = None,
) -> dict[str, int]:
    """The most bytes that a run holds, by use.

    Args:
        model: the base with an adapter, possibly on the meta device.
        optimiser: the name of the optimiser, as ``veneer train`` takes it.
        step: the counted step; without it, activations and workspace are left out.
        accumulate: number of forward passes in a step.
        buffer_bytes: bytes of the buffers in which several devices send gradients.
        checkpointing: whether activations are recomputed (activation checkpointing).
        offload: whether activations are in main memory (``offloaded_bytes``).
        quantize: the format to which the plain weights of ``model`` will be packed.
    """
    base_bytes, unpacked_bytes = (
        weight_bytes(model) if quantize is None else packed_weight_bytes(model, quantize)
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trainable)
    bytes_by_use = {
        "base": base_bytes,
        **({"one weight unpacked": unpacked_bytes} if unpacked_bytes else {}),
    }
    bytes_by_use |= {
        "adapter": trained_bytes,
        "gradients": trained_bytes,
        "optimiser": round(sum(state_bytes(p, optimiser) for p in trainable)),
    }
    if step is not None:
        cost = step.with_checkpointing if checkpointing else step.total
        bytes_by_use |= {
            "activations": cost.saved_bytes,
            "workspace": cost.peak_bytes - cost.saved_bytes,
        }
        if offload:  # the running block's activations stay on the device
            bytes_by_use["activations"] -= offloaded_bytes(step, checkpointing)
            if not checkpointing:
                bytes_by_use["workspace"] += max(
                    (group.cost.saved_bytes for group in step.blocks), default=0
                )
        # accumulated gradients exist during a pass; the gradients of the last pass, and the
        # buffers in which they are sent, replace activations that backward has freed
        accumulated_bytes = trained_bytes if accumulate > 1 else 0
        bytes_by_use["gradients"] = accumulated_bytes + max(
            0,
            trained_bytes
            - accumulated_bytes
            + buffer_bytes
            - bytes_by_use["activations"]
            - bytes_by_use["workspace"],
        )
    return bytes_by_use


def offloaded_bytes(step: Step, checkpointing: bool) -> int:
    """Bytes of the activations that are in main memory if they are offloaded."""
    return sum(
        group.count * (step.hidden_bytes if checkpointing else group.cost.saved_bytes)
        for group in step.blocks
    )


def shard_base(
    bytes_by_use: dict[str, int], cost: Cost, blocks: Sequence[tuple[int, int]], devices: int
) -> dict[str, int]:
    """Bytes by use on each of ``devices`` devices among which FSDP shards the base. Each device
    gathers the weights of one block after another.

    Args:
        bytes_by_use: the result of ``memory_breakdown``, for a base that is not sharded.
        cost: the cost of the same step.
        blocks: (number of equal blocks, bytes of the frozen weights of each).
    """
    # the root module stays gathered from its forward to its backward; while blocks run, the
    # current and the next block are gathered too
    root_bytes = bytes_by_use["base"] - sum(count * block_bytes for count, block_bytes in blocks)
    two_block_bytes = 2 * max((block_bytes for _, block_bytes in blocks), default=0)
    peaks_at_loss = cost.loss_peak_bytes > cost.backward_peak_bytes + two_block_bytes
    workspace = (
        bytes_by_use["workspace"]
        - cost.peak_bytes
        + (cost.loss_peak_bytes if peaks_at_loss else cost.backward_peak_bytes)
    )
    return bytes_by_use | {
        "base": -(-bytes_by_use["base"] // devices),
        "workspace": workspace,
        "gathered": root_bytes + (0 if peaks_at_loss else two_block_bytes),
    }


def estimate(model: Any, config: Any, tokens: int, labelled: int) -> str:
    """Describe in words the memory that a step takes.

    Args:
        config: a `TrainConfig`.
        tokens: number of tokens of a forward pass, padding included.
        labelled: number of these tokens that have a label.
    """
    try:
        bytes_by_use, offloaded_size = predict(model, config, tokens, labelled)
    except ConfigError as error:  # a model that cannot be counted may still train
        return _format_lower_bound(memory_breakdown(model, config.optimiser, None), error)
    description = _format_total(bytes_by_use)
    return (
        f"{description}, and activations of {format_bytes(offloaded_size)} in main memory"
        if config.offload_activations
        else description
    )


def estimate_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], tokens: int, labelled: int
) -> str:
    """Describe in words the memory of a step of runs that train at once, each with ``tokens``
    tokens."""
    try:
        return _format_total(predict_at_once(model, runs, tokens, labelled))
    except ConfigError as error:
        return _format_lower_bound(_breakdown_at_once(model, runs, None), error)


def _format_total(bytes_by_use: Mapping[str, int]) -> str:
    """The total memory and its uses in words, without uses of 0 bytes."""
    use_list = ", ".join(
        f"{name} {format_bytes(size_bytes)}"
        for name, size_bytes in bytes_by_use.items()
        if size_bytes
    )
    return f"about {format_bytes(sum(bytes_by_use.values()))} ({use_list})"


def _format_lower_bound(bytes_by_use: Mapping[str, int], error: ConfigError) -> str:
    return (
        f"at least {_format_total(bytes_by_use).removeprefix('about ')}; activations are not"
        f" counted: {error.problem}"
    )


class ConcurrentRun(NamedTuple):
    """One of several runs that train at once (``train/many.py``). ``config``: its ``TrainConfig``;
    ``parameters``: its adapter's parameters. Runs with equal ``rows_key`` train on the same rows in
    each step, and share forwards."""

    config: Any
    parameters: Sequence[nn.Parameter]
    rows_key: Any


def predict_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], tokens: int, labelled: int
) -> dict[str, int]:
    """Bytes by use of one step of all runs. Runs with equal ``rows_key`` share a forward, which
    holds the activations of the rows of each run. They are counted as one step of the largest
    adapter among them with as many rows. Arguments and errors are those of `estimate_at_once` and
    `count_model_step`."""
    groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run.rows_key, []).append(name)
    config = next(iter(runs.values())).config
    rows = max(1, min(config.batch_size, tokens))
    length, breakdowns = max(1, round(tokens / rows)), []
    for names in groups.values():  # groups run one after another
        parameter_counts = {
            name: sum(parameter.numel() for parameter in runs[name].parameters) for name in names
        }
        largest_adapter = max(names, key=parameter_counts.__getitem__)
        step = count_model_step(
            model,
            rows * len(names),
            length,
            labelled / max(tokens, 1),
            adapter_name=largest_adapter,
        )
        bytes_by_use = _breakdown_at_once(model, runs, step, gradients_wait=len(groups) > 1)
        # each layer's factors are concatenated in the dtype of the base and saved for backward
        if len(names) > 1:
            bytes_by_use["activations"] += sum(parameter_counts.values()) * model.dtype.itemsize
        breakdowns.append(bytes_by_use)
    return max(breakdowns, key=lambda bytes_by_use: sum(bytes_by_use.values()))


def _breakdown_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], step: Step | None, gradients_wait: bool = False
) -> dict[str, int]:
    """Bytes by use of runs that train at once. ``gradients_wait``: whether gradients of some runs
    already exist while other runs compute their forward."""
    config = next(iter(runs.values())).config
    bytes_by_use = memory_breakdown(
        model,
        config.optimiser,
        step,
        accumulate=2 if gradients_wait else config.grad_accum,
        checkpointing=config.activation_checkpointing,
    )
    optimiser_bytes = sum(
        state_bytes(parameter, run.config.optimiser)
        for run in runs.values()
        for parameter in run.parameters
    )
    return bytes_by_use | {"optimiser": round(optimiser_bytes)}


def predict(model: Any, config: Any, tokens: int, labelled: int) -> tuple[dict[str, int], int]:
    """(bytes by use, bytes of activations in main memory). Arguments as `estimate`; raises as
    `count_model_step`."""
    rows = max(1, min(config.batch_size, tokens))
    process_count = (
        dist.get_world_size() if config.parallel == "fsdp" and dist.is_initialized() else 1
    )
    step = count_model_step(
        model,
        rows,
        max(1, round(tokens / rows)),
        labelled / max(tokens, 1),
        chunked_loss=process_count == 1,
    )
    checkpointing = config.activation_checkpointing
    bytes_by_use = memory_breakdown(
        model,
        config.optimiser,
        step,
        accumulate=config.grad_accum,
        checkpointing=checkpointing,
        offload=config.offload_activations,
    )
    if process_count > 1:
        blocks = [(1, weight_bytes(block)[0]) for block in gathered_blocks(model)]
        bytes_by_use = shard_base(
            bytes_by_use,
            step.with_checkpointing if checkpointing else step.total,
            blocks,
            process_count,
        )
    return bytes_by_use, offloaded_bytes(step, checkpointing) if config.offload_activations else 0


def count_model_step(
    model: Any,
    batch: int,
    length: int,
    labelled_share: float,
    *,
    chunked_loss: bool = True,
    adapter_name: str | None = None,
) -> Step:
    """Count a step of a model with an adapter, on a copy of the model without data.

    Args:
        adapter_name: the adapter, if the model has several.

    Raises:
        ConfigError: the model is no decoder of tokens, or cannot run on tensors without data.
    """
    is_plain = all(
        storage is None or storage.name == "plain" for _, _, storage in _frozen_weights(model)
    )
    is_copyable = is_plain and not is_spread(model.modules())  # sharded weights cannot be copied
    reasons = {
        "reads no tokens": getattr(model, "main_input_name", None) != "input_ids",
        "is an encoder and a decoder": getattr(model.config, "is_encoder_decoder", False),
        "is packed or spread, and has no output head": (
            not is_copyable and model.get_output_embeddings() is None
        ),
    }
    if problems := [reason for reason, applies in reasons.items() if applies]:
        raise ConfigError(
            f"{base_class(model).__name__}, which {problems[0]}",
            "a decoder of tokens",
            "plan a like one",
        )
    meta_model = (
        _copy_without_weights(model) if is_copyable else _unpacked_copy(model, adapter_name)
    )
    with (
        nullcontext() if adapter_name is None or not is_copyable else use(meta_model, adapter_name)
    ):
        return count_step(
            meta_model,
            batch,
            length,
            labelled_share=labelled_share,
            is_plain=is_plain,
            chunked_loss=chunked_loss,
        )


def _unpacked_copy(model: Any, adapter_name: str | None) -> Any:
    """A model of the same config on the meta device, with unpacked weights and an adapter of the
    same shapes."""
    config = Handle(model, name_or_default(model, adapter_name)).config
    # a variant whose initial values need data is replaced by one with the same shapes
    variant = config.variant if not VARIANTS[config.variant].needs else "lora"
    meta_model = countable_model(model.config, model.dtype)
    attach(meta_model, replace(config, variant=variant))
    return meta_model


def _copy_without_weights(model: Any) -> Any:
    """A copy of the model on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta_tensor = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(meta_tensor, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else meta_tensor
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
    """(bytes of the frozen weights as stored, with scales; bytes of the largest packed weight once
    its layer has unpacked it)."""
    stored_bytes, largest_unpacked = 0, 0
    dtype = getattr(model, "dtype", torch.float32)
    for module, weight, storage in _frozen_weights(model):
        if storage is None or storage.name == "plain":
            stored_bytes += weight.nbytes
            continue
        storage.prepare(module)
        try:
            stored_bytes += sum(tensor.nbytes for tensor in storage.stored_tensors(weight).values())
        finally:
            if state_of(module) is None:
                storage.release(module)
        largest_unpacked = max(largest_unpacked, storage.shape(weight).numel() * dtype.itemsize)
    return stored_bytes, largest_unpacked


def packed_weight_bytes(model: nn.Module, quantize: str) -> tuple[int, int]:
    """The result that ``weight_bytes`` would have after bitsandbytes has packed all linear layers
    except the output head. Stacks of experts are not linear layers and remain unpacked."""
    linears = packed_linears(model, quantize)
    plain_bytes = sum(weight.nbytes for _, weight, _ in _frozen_weights(model)) - sum(
        weight.nbytes for weight, _ in linears
    )
    return plain_bytes + sum(packed_bytes for _, packed_bytes in linears), max(
        (weight.nbytes for weight, _ in linears), default=0
    )


def packed_linears(model: Any, quantize: str) -> list[tuple[Tensor, int]]:
    """(weight, its bytes once packed) of each linear layer except the output head."""
    head = model.get_output_embeddings()
    return [
        (weight, packed_size(weight.shape[0], weight.shape[1], quantize))
        for module, weight, _ in _frozen_weights(model)
        if isinstance(module, nn.Linear) and module is not head and weight.dim() == 2
    ]


def packed_size(out: int, in_: int, quantize: str) -> int:
    """Bytes of a weight [out, in] in "nf4", "fp4" or "int8", including its scales and, in 4 bits,
    the tables and the offset of bitsandbytes."""
    count = out * in_
    if quantize == "int8":
        return count + 4 * out
    scales = -(-count // WEIGHTS_PER_SCALE)
    return -(-count // 2) + scales + 4 * -(-scales // SCALES_PER_SCALE) + 4 * 257


def state_bytes(parameter: Tensor, optimiser: str) -> float:
    """Bytes of state that the optimiser of this name keeps for a parameter."""
    name, value_count = optimiser.lower(), parameter.numel()
    states = next((states for key, states in STATES_PER_VALUE.items() if key in name), 2)
    bits_in_name = re.search(r"(?<!\d)([48])bit", name)
    if bits_in_name is not None and value_count >= MIN_QUANTIZED_VALUES:
        bits = int(bits_in_name[1])
        return states * (
            value_count * bits / 8 + 4 * -(-value_count // VALUES_PER_STATE_SCALE[bits])
        )
    # bitsandbytes keeps all other states in float32
    is_bitsandbytes = "torch" not in name and (
        bits_in_name is not None or "32bit" in name or "bnb" in name
    )
    return states * value_count * (4 if is_bitsandbytes else parameter.element_size())


def peak_memory() -> int:
    """The peak memory so far in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
