"""The memory that a run will take, estimated before it starts.

    base         Σ bytes of the frozen weights. Packed weights count as stored: nf4 takes 0.516
                 bytes for each value, int8 1 + 4 / in for rows of length in
    unpacked     the largest packed weight in the dtype of the matrix products; one weight is
                 unpacked at a time
    adapter      Σ bytes of the trained parameters, and the optimiser's state. Gradients take the
                 bytes of the parameters again while passes accumulate; with a single pass they
                 use memory of activations that backward has freed
    activations  tensors that forward saves for backward
    workspace    bytes beyond the activations at the peak of a step, which is in the loss or in a
                 block's backward

Base, unpacked and adapter are sums over parameters. Activations and workspace are counted in a step
on torch's meta device (``count.py``).

An 8-bit optimiser keeps one byte for each value of its state, and a float32 scale per 256 values.
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

#: By a substring of an optimiser's name, the number of values of state that it keeps for each value
#: of a parameter. Optimisers with none of these substrings keep 2, as Adam does.
STATES_PER_VALUE = {
    "sgd": 0,
    "adafactor": 0.1,
    "adagrad": 1,
    "lion": 1,
    "rmsprop": 1,
    "ademamix": 3,
}
#: VALUES_PER_STATE_SCALE: by the bits of a quantised value of optimiser state, the number of values
#: that share a scale. MIN_QUANTIZED_VALUES: the state of smaller tensors is not quantised.
VALUES_PER_STATE_SCALE, MIN_QUANTIZED_VALUES = {8: 256, 4: 128}, 4096
#: the number of values of a 4-bit weight that share a scale, and the number of such scales that
#: share a second scale (bitsandbytes' double quantisation)
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
    """The bytes that a run holds at the peak of a step, by use: "base", "one weight unpacked" (the
    largest packed weight in the dtype of the matrix products), "adapter", "gradients", "optimiser",
    "activations" (saved for backward) and "workspace" (what the peak needs beyond them).

    Args:
        model: the base with an adapter, possibly on the meta device.
        optimiser: the name of the optimiser, as ``veneer train`` takes it.
        step: the counted step; None leaves out activations and workspace.
        accumulate: number of forward passes in a step.
        buffer_bytes: bytes of the buffers in which several devices send gradients.
        checkpointing: whether activations are recomputed (activation checkpointing).
        offload: whether activations wait in main memory for their backward.
        quantize: the format ("nf4", "fp4", "int8") to which the plain weights of ``model`` will be
            packed; None counts the weights as they are.
    """
    base_bytes, unpacked_bytes = (
        weight_bytes(model) if quantize is None else packed_weight_bytes(model, quantize)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    bytes_by_use = {
        "base": base_bytes,
        **({"one weight unpacked": unpacked_bytes} if unpacked_bytes else {}),
    }
    bytes_by_use |= {
        "adapter": trained_bytes,
        "gradients": trained_bytes,
        "optimiser": round(sum(state_bytes(parameter, optimiser) for parameter in trained)),
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
        # Accumulated gradients take memory during a pass. The gradients of the last pass, and the
        # buffers in which they are sent, use memory of activations that backward has freed, so
        # they count only as far as they exceed it.
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
    """Bytes of the activations of all blocks, which are in main memory if a run offloads them. With
    ``checkpointing``, they are only the inputs of the blocks."""
    return sum(
        group.count * (step.hidden_bytes if checkpointing else group.cost.saved_bytes)
        for group in step.blocks
    )


def shard_base(
    bytes_by_use: dict[str, int], cost: Cost, blocks: Sequence[tuple[int, int]], device_count: int
) -> dict[str, int]:
    """Bytes by use on each of ``device_count`` devices among which FSDP shards the base. Each
    device gathers the weights of one block after another; they are the new use "gathered".

    Args:
        bytes_by_use: the result of ``memory_breakdown`` for a base that is not sharded.
        cost: the cost of the step for which ``bytes_by_use`` was computed.
        blocks: (number of equal blocks, bytes of the frozen weights of each).
    """
    # The weights outside of the blocks stay gathered from forward to backward. While blocks run,
    # the current and the next block are gathered too, so the peak may move out of the loss.
    root_bytes = bytes_by_use["base"] - sum(count * block_bytes for count, block_bytes in blocks)
    two_block_bytes = 2 * max((block_bytes for _, block_bytes in blocks), default=0)
    peaks_at_loss = cost.loss_peak_bytes > cost.backward_peak_bytes + two_block_bytes
    workspace = (
        bytes_by_use["workspace"]
        - cost.peak_bytes
        + (cost.loss_peak_bytes if peaks_at_loss else cost.backward_peak_bytes)
    )
    return bytes_by_use | {
        "base": -(-bytes_by_use["base"] // device_count),
        "workspace": workspace,
        "gathered": root_bytes + (0 if peaks_at_loss else two_block_bytes),
    }


def estimate(model: Any, config: Any, tokens: int, labelled: int) -> str:
    """Describe in words the memory that a step takes. For a model whose step cannot be counted,
    describe the memory without activations.

    Args:
        config: a `TrainConfig`.
        tokens: number of tokens of a forward pass, padding included.
        labelled: number of these tokens that have a label.
    """
    try:
        bytes_by_use, offloaded_size = predict(model, config, tokens, labelled)
    except ConfigError as error:  # the model may train nevertheless
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
    """Describe in words the memory of a step of several runs that train at once on one base.

    Args:
        runs: the runs by their names.
        tokens: number of tokens of a forward pass of one run, padding included.
        labelled: number of these tokens that have a label.
    """
    try:
        return _format_total(predict_at_once(model, runs, tokens, labelled))
    except ConfigError as error:
        return _format_lower_bound(_breakdown_at_once(model, runs, None), error)


def _format_total(bytes_by_use: Mapping[str, int]) -> str:
    """The total memory and its uses in words, such as "about 3 GiB (base 2 GiB, …)", without uses
    of 0 bytes."""
    uses_text = ", ".join(
        f"{name} {format_bytes(size_bytes)}"
        for name, size_bytes in bytes_by_use.items()
        if size_bytes
    )
    return f"about {format_bytes(sum(bytes_by_use.values()))} ({uses_text})"


def _format_lower_bound(bytes_by_use: Mapping[str, int], error: ConfigError) -> str:
    return (
        f"at least {_format_total(bytes_by_use).removeprefix('about ')}; activations are not"
        f" counted: {error.problem}"
    )


class ConcurrentRun(NamedTuple):
    """One of several runs that train at once on one base (``train/many.py``).

    Fields:
        config: the ``TrainConfig`` of the run.
        parameters: the parameters of its adapter.
        rows_key: a key that is equal for runs that train on the same rows in each step; such runs
            share a forward pass.
    """

    config: Any
    parameters: Sequence[nn.Parameter]
    rows_key: Any


def predict_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], tokens: int, labelled: int
) -> dict[str, int]:
    """Bytes by use of one step of all runs. Runs with equal ``rows_key`` share a forward pass whose
    batch holds the rows once for each run. It is counted as a pass of the largest of their adapters
    with as many rows. Takes the arguments of `estimate_at_once`, and raises the errors of
    `count_model_step`."""
    name_groups: dict[Any, list[str]] = {}
    for name, run in runs.items():
        name_groups.setdefault(run.rows_key, []).append(name)
    config = next(iter(runs.values())).config
    row_count = max(1, min(config.batch_size, tokens))
    row_length, breakdowns = max(1, round(tokens / row_count)), []
    for names in name_groups.values():  # the groups run one after another, so the largest counts
        parameter_counts = {
            name: sum(parameter.numel() for parameter in runs[name].parameters) for name in names
        }
        largest_adapter = max(names, key=parameter_counts.__getitem__)
        step = count_model_step(
            model,
            row_count * len(names),
            row_length,
            labelled / max(tokens, 1),
            adapter_name=largest_adapter,
        )
        bytes_by_use = _breakdown_at_once(model, runs, step, gradients_wait=len(name_groups) > 1)
        # each layer's matrices A and B of all runs are concatenated in the dtype of the base, and
        # this copy is saved for backward
        if len(names) > 1:
            bytes_by_use["activations"] += sum(parameter_counts.values()) * model.dtype.itemsize
        breakdowns.append(bytes_by_use)
    return max(breakdowns, key=lambda bytes_by_use: sum(bytes_by_use.values()))


def _breakdown_at_once(
    model: Any, runs: Mapping[str, ConcurrentRun], step: Step | None, gradients_wait: bool = False
) -> dict[str, int]:
    """Bytes by use of several runs that train at once (``estimate_at_once``).

    Args:
        step: the counted step; None leaves out activations and workspace.
        gradients_wait: whether gradients of some runs are held while other runs compute.
    """
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
    """(bytes of a step by use, bytes of activations in main memory: 0 unless the run offloads
    them). Takes the arguments of `estimate`, and raises the errors of `count_model_step`."""
    row_count = max(1, min(config.batch_size, tokens))
    process_count = (
        dist.get_world_size() if config.parallel == "fsdp" and dist.is_initialized() else 1
    )
    step = count_model_step(
        model,
        row_count,
        max(1, round(tokens / row_count)),
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
    row_count: int,
    row_length: int,
    labelled_share: float,
    *,
    chunked_loss: bool = True,
    adapter_name: str | None = None,
) -> Step:
    """Count a step of a model with an adapter, on a copy of the model on torch's meta device.

    Args:
        row_count, row_length: number of rows of a forward pass, and number of tokens of each.
        labelled_share: share of the tokens that have a label.
        chunked_loss: whether the loss computes logits for a few tokens at a time.
        adapter_name: the adapter that trains, if the model has several.

    Raises:
        ConfigError: the model is no decoder of tokens, or cannot run on tensors without data.
    """
    is_plain = all(
        storage is None or storage.name == "plain" for _, _, storage in _frozen_weights(model)
    )
    is_copyable = is_plain and not is_spread(model.modules())  # sharded weights cannot be copied
    applies_by_problem = {
        "reads no tokens": getattr(model, "main_input_name", None) != "input_ids",
        "is an encoder and a decoder": getattr(model.config, "is_encoder_decoder", False),
        "is packed or spread, and has no output head": (
            not is_copyable and model.get_output_embeddings() is None
        ),
    }
    if problems := [reason for reason, applies in applies_by_problem.items() if applies]:
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
            row_count,
            row_length,
            labelled_share=labelled_share,
            is_plain=is_plain,
            chunked_loss=chunked_loss,
        )


def _unpacked_copy(model: Any, adapter_name: str | None) -> Any:
    """A new model with the config of ``model`` on the meta device, with plain weights and an
    adapter with the shapes of ``adapter_name``, for models with packed or sharded weights."""
    config = Handle(model, name_or_default(model, adapter_name)).config
    # initial values that need data cannot be computed here; LoRA's have the same shapes
    variant = config.variant if not VARIANTS[config.variant].needs else "lora"
    meta_model = countable_model(model.config, model.dtype)
    attach(meta_model, replace(config, variant=variant))
    return meta_model


def _copy_without_weights(model: Any) -> Any:
    """A copy of the model on the meta device, in training mode, with attention that can be counted
    there. Tied tensors stay tied."""
    meta_by_id: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta_tensor = torch.empty_like(tensor, device="meta")
        meta_by_id[id(tensor)] = (
            nn.Parameter(meta_tensor, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else meta_tensor
        )
    return count_attention(copy.deepcopy(model, meta_by_id)).train()


def _frozen_weights(model: nn.Module) -> Iterator[tuple[nn.Module, Any, Any]]:
    """(module, frozen weight, its storage format: plain or packed) of each frozen weight. A weight
    that several modules share comes once."""
    visited = set[int]()
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None and not weight.requires_grad and id(weight) not in visited:
                visited.add(id(weight))
                yield module, weight, storage_of(weight)


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of the frozen weights as stored, including the scales of packed weights; bytes of the
    largest packed weight after unpacking, 0 if none is packed)."""
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
    """(bytes of the frozen weights, bytes of the largest packed weight after unpacking) if
    bitsandbytes packed all linear layers except the output head to the format ``quantize``. Stacks
    of experts are not linear layers, so they would remain plain."""
    packed_sizes = packed_linears(model, quantize)
    plain_bytes = sum(weight.nbytes for _, weight, _ in _frozen_weights(model)) - sum(
        weight.nbytes for weight, _ in packed_sizes
    )
    return plain_bytes + sum(packed_bytes for _, packed_bytes in packed_sizes), max(
        (weight.nbytes for weight, _ in packed_sizes), default=0
    )


def packed_linears(model: Any, quantize: str) -> list[tuple[Tensor, int]]:
    """(weight, its bytes if packed to the format ``quantize``) of each linear layer except the
    output head."""
    head = model.get_output_embeddings()
    return [
        (weight, packed_size(weight.shape[0], weight.shape[1], quantize))
        for module, weight, _ in _frozen_weights(model)
        if isinstance(module, nn.Linear) and module is not head and weight.dim() == 2
    ]


def packed_size(out: int, in_: int, quantize: str) -> int:
    """Bytes of a weight [out, in] in "nf4", "fp4" or "int8", including its scales and, in 4 bits,
    the tables and the offset of bitsandbytes."""
    value_count = out * in_
    if quantize == "int8":
        return value_count + 4 * out
    scale_count = -(-value_count // WEIGHTS_PER_SCALE)
    return -(-value_count // 2) + scale_count + 4 * -(-scale_count // SCALES_PER_SCALE) + 4 * 257


def state_bytes(parameter: Tensor, optimiser: str) -> float:
    """Bytes of state that the optimiser of this name keeps for a parameter."""
    optimiser_name, value_count = optimiser.lower(), parameter.numel()
    ratio = next((ratio for key, ratio in STATES_PER_VALUE.items() if key in optimiser_name), 2)
    bits_in_name = re.search(r"(?<!\d)([48])bit", optimiser_name)
    if bits_in_name is not None and value_count >= MIN_QUANTIZED_VALUES:
        bits = int(bits_in_name[1])
        return ratio * (
            value_count * bits / 8 + 4 * -(-value_count // VALUES_PER_STATE_SCALE[bits])
        )
    # bitsandbytes keeps unquantised state in float32, torch keeps it in the parameter's dtype
    is_bitsandbytes = "torch" not in optimiser_name and (
        bits_in_name is not None or "32bit" in optimiser_name or "bnb" in optimiser_name
    )
    return ratio * value_count * (4 if is_bitsandbytes else parameter.element_size())


def peak_memory() -> int:
    """The peak memory so far in bytes: the GPU's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
