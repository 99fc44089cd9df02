"""Count a training step on torch's meta device: bytes held, operations, bytes moved.

The model's own forward and backward run on tensors that have shapes and no data, and a dispatch
mode records every operation. The only assumption about the architecture is that its blocks repeat.
So one block of each kind runs, and for each kind a second run with one more block of the kind gives
the cost of such a block.

    cost of a step = cost outside of the blocks (embedding, output head, loss)
                     + Σ over kinds: number of blocks · cost of a block

The saved bytes are exact if the device saves the same tensors as torch's meta device. Memory that a
kernel takes while it runs, and unused memory of an allocator, are not counted. Attention is assumed
causal. Its kernels compute only the half below the diagonal, so half of its operations are counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from veneer.errors import ConfigError, first_line
from veneer.kernels.device import count_on_meta
from veneer.train.loss import MAX_LOGIT_ROWS

#: Number of calls by (floating-point operations of a call, bytes that it reads and writes, whether
#: tensor parallelism repeats the call on each device instead of dividing it).
Work = Counter[tuple[int, int, bool]]


@dataclass(frozen=True)
class Cost:
    """The cost of a step or of a block.

    Fields:
        saved_bytes: bytes that forward saves for backward.
        replicated_bytes: the share of `saved_bytes` in tensors as wide as the hidden state, which
            tensor parallelism keeps in full on each device.
        loss_peak_bytes: the most bytes of activations and temporary tensors that are held until the
            gradient of the loss is computed.
        backward_peak_bytes: the most such bytes from then on, without gradients of parameters.
        forward_work, backward_work: the calls of operations in forward and in backward.
    """

    saved_bytes: int = 0
    replicated_bytes: int = 0
    loss_peak_bytes: int = 0
    backward_peak_bytes: int = 0
    forward_work: Work = field(default_factory=Counter)
    backward_work: Work = field(default_factory=Counter)

    def plus(self, addend: Cost, times: int = 1) -> Cost:
        """This cost + ``times`` · ``addend``; ``times`` may be negative."""
        byte_values = (getattr(self, name) + times * getattr(addend, name) for name in _BYTE_FIELDS)
        calls = (
            _add_work(getattr(self, name), getattr(addend, name), times)
            for name in ("forward_work", "backward_work")
        )
        return Cost(*byte_values, *calls)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the step holds."""
        return max(self.loss_peak_bytes, self.backward_peak_bytes)

    @property
    def operations(self) -> int:
        return sum(
            operations * count
            for work in (self.forward_work, self.backward_work)
            for (operations, _, _), count in work.items()
        )

    def shard(self, device_count: int) -> Cost:
        """The cost on each of ``device_count`` devices that divide matrices and attention heads
        (tensor parallelism). Each holds and reads tensors as wide as the hidden state in full."""
        remote_bytes = (
            (self.saved_bytes - self.replicated_bytes) * (device_count - 1) // device_count
        )
        return Cost(
            self.saved_bytes - remote_bytes,
            self.replicated_bytes,
            self.loss_peak_bytes - remote_bytes,
            self.backward_peak_bytes - remote_bytes,
            shard_work(self.forward_work, device_count),
            shard_work(self.backward_work, device_count),
        )


_BYTE_FIELDS = ("saved_bytes", "replicated_bytes", "loss_peak_bytes", "backward_peak_bytes")


def shard_work(work: Work, device_count: int) -> Work:
    """The work of each of ``device_count`` devices that divide every call, except those that tensor
    parallelism repeats on each device."""
    sharded_work = Work()
    for (operations, bytes_moved, is_replicated), count in work.items():
        divisor = 1 if is_replicated else device_count
        sharded_work[operations // divisor, bytes_moved // divisor, is_replicated] += count
    return sharded_work


def _add_work(work: Work, addend: Work, times: int) -> Work:
    return Counter({call: work[call] + times * addend[call] for call in {*work, *addend}})


@dataclass(frozen=True)
class BlockGroup:
    """A group of ``count`` equal blocks: one of them, and the cost of each."""

    count: int
    block: nn.Module
    cost: Cost


@dataclass(frozen=True)
class Step:
    """The counted step of a batch.

    Fields:
        total: the cost of the step.
        blocks: the groups of repeated blocks; ``total`` includes their costs.
        hidden_bytes: bytes of the output of one block for all tokens of the batch.
    """

    total: Cost
    blocks: tuple[BlockGroup, ...]
    hidden_bytes: int

    @property
    def with_checkpointing(self) -> Cost:
        """The cost with activation checkpointing: each block saves only its input and runs again
        before its backward."""
        cost = self.total
        for group in self.blocks:
            block_cost = group.cost
            saved_change = self.hidden_bytes - block_cost.saved_bytes
            change_per_block = Cost(
                saved_change,
                self.hidden_bytes - block_cost.replicated_bytes,
                saved_change,
                saved_change,
                backward_work=block_cost.forward_work,
            )
            cost = cost.plus(change_per_block, group.count)
        # when a block runs again, its own activations are held too, one block at a time
        return cost.plus(
            Cost(
                backward_peak_bytes=max(
                    (group.cost.saved_bytes for group in self.blocks), default=0
                )
            )
        )

    def shard(self, device_count: int) -> Step:
        """The step of each of ``device_count`` devices that divide the matrices of the blocks
        (tensor parallelism). Each has the full embedding and output head."""
        blocks = tuple(replace(group, cost=group.cost.shard(device_count)) for group in self.blocks)
        total = self.total
        for full_group, group in zip(self.blocks, blocks, strict=True):
            total = total.plus(full_group.cost, -full_group.count).plus(group.cost, group.count)
        return Step(total, blocks, self.hidden_bytes)


def count_step(
    model: Any,
    row_count: int,
    row_length: int,
    *,
    labelled_share: float = 1.0,
    is_plain: bool = True,
    chunked_loss: bool = True,
) -> Step:
    """Count a step of ``row_count`` rows of ``row_length`` tokens: forward, loss and backward.

    Args:
        model: a result of ``countable_model``, with an adapter attached.
        labelled_share: share of the tokens that have a label. Only the hidden states of these
            tokens pass through the output head.
        is_plain: whether the frozen weights are plain tensors, for which an adapted linear layer is
            a single autograd function that saves its input once. A packed weight (4 or 8 bits) is
            multiplied by the library that packed it, and the adapter saves the input once more.
        chunked_loss: whether the loss computes the logits of ``MAX_LOGIT_ROWS`` tokens at a time.
            False: of all tokens at once, as for a base that FSDP shards.

    Raises:
        ConfigError: the model has no repeated blocks, or cannot run on tensors without data.
    """
    embedding = model.get_input_embeddings().weight
    with count_on_meta() if is_plain else nullcontext():
        total, blocks = _count_distinct_blocks(
            model, lambda: _run_step(model, row_count, row_length, labelled_share, chunked_loss)
        )
    return Step(
        total, blocks, row_count * row_length * embedding.shape[-1] * embedding.element_size()
    )


def count_forward(model: Any, row_length: int) -> tuple[int, int]:
    """Count a forward without gradients of one row of ``row_length`` tokens. Returns
    (floating-point operations, bytes of the cached keys and values). Raises the ``ConfigError`` of
    ``count_step``."""
    ids = torch.zeros(1, row_length, dtype=torch.long, device="meta")

    def run() -> Cost:
        with torch.no_grad(), count_on_meta(), _OperationCounter(model, 0) as counter:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            cache: Any = next(value for value in output.values() if hasattr(value, "layers"))
        # integer tensors of a cache are counters, not keys or values
        cache_bytes = sum(
            value.nbytes
            for layer in cache.layers
            for value in vars(layer).values()
            if isinstance(value, Tensor) and value.is_floating_point()
        )
        return Cost(saved_bytes=cache_bytes, forward_work=counter.work)

    total, _ = _count_distinct_blocks(model, run)
    return total.operations, total.saved_bytes


def _count_distinct_blocks(
    model: Any, run: Callable[[], Cost]
) -> tuple[Cost, tuple[BlockGroup, ...]]:
    """(cost of ``run`` on the model with all blocks, groups of equal blocks). ``run`` runs the
    model and returns the cost. It is called on the model with one block of each kind, and again for
    each kind with a second block of that kind; the difference is the cost of such a block. The
    model's blocks are restored afterwards."""
    path, block_list = _block_list(model)
    blocks_by_signature: dict[Any, list[nn.Module]] = {}
    # forward saves nothing below the lowest adapted block, so blocks there are kinds of their own
    is_frozen = True
    for block in block_list:
        is_frozen &= not any(p.requires_grad for p in block.parameters())
        blocks_by_signature.setdefault((is_frozen, *_block_signature(block)), []).append(block)
    distinct_blocks = [equal_blocks[0] for equal_blocks in blocks_by_signature.values()]
    block_counts = [(config, config.num_hidden_layers) for config in _block_count_configs(model)]

    def cost_of(blocks: Sequence[nn.Module]) -> Cost:
        # transformers runs at most `num_hidden_layers` blocks of the list, so raise it if necessary
        for config, block_count in block_counts:
            config.num_hidden_layers = max(block_count, len(blocks))
        _set_block_list(model, path, nn.ModuleList(blocks))
        return run()

    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws seeds from the generator
            total, groups = cost_of(distinct_blocks), []
            for equal_blocks in blocks_by_signature.values():
                second_block = equal_blocks[:2][-1]
                repeated_blocks = [
                    repetition
                    for block in distinct_blocks
                    for repetition in (
                        [block, second_block] if block is equal_blocks[0] else [block]
                    )
                ]
                groups.append(
                    BlockGroup(
                        len(equal_blocks), equal_blocks[0], cost_of(repeated_blocks).plus(total, -1)
                    )
                )
    except Exception as error:  # the model's own code may fail on tensors without data
        raise ConfigError(
            f"{type(model).__name__}, which cannot run without numbers ({first_line(error)[:160]})",
            "a model whose shapes do not depend on its data",
            "plan a like one",
        ) from error
    finally:
        _set_block_list(model, path, block_list)
        model.zero_grad()
        for config, block_count in block_counts:
            config.num_hidden_layers = block_count
    for group in groups:
        total = total.plus(group.cost, group.count - 1)
    return total, tuple(groups)


def _run_step(
    model: Any, row_count: int, row_length: int, labelled_share: float, chunked_loss: bool = True
) -> Cost:
    """The cost of a step (forward, loss, backward) with the blocks that the model has now; the
    arguments are those of ``count_step``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # gradients are created before the counting, so that the counter leaves them out: `memory.py`
    # counts their bytes
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    head: Any = model.get_output_embeddings()
    hidden_size = model.get_input_embeddings().weight.shape[-1]
    ids = torch.zeros(row_count, row_length, dtype=torch.long, device="meta")
    body = model.base_model if model.base_model is not model else model
    with _OperationCounter(model, hidden_size) as counter:
        hidden_states = body(input_ids=ids, use_cache=False)[0]
        saved_bytes, replicated_bytes = counter.measure_live_bytes()
        labelled_states = hidden_states.flatten(0, 1)[
            : max(1, round(row_count * row_length * labelled_share))
        ]
        state_gradient = (
            torch.zeros_like(labelled_states)
            if head is None
            else (_chunked_loss_gradient if chunked_loss else _full_loss_gradient)(
                head, labelled_states.detach()
            )
        )
        forward_work, counter.work = counter.work, Counter()
        loss_peak_bytes, counter.peak_bytes = counter.peak_bytes, counter.live_bytes
        labelled_states.backward(state_gradient)
        del hidden_states, labelled_states, state_gradient
        return Cost(
            saved_bytes,
            replicated_bytes,
            loss_peak_bytes,
            counter.peak_bytes,
            forward_work,
            counter.work,
        )


def _chunked_loss_gradient(head: Any, states: Tensor) -> Tensor:
    """The gradient of the cross-entropy with respect to ``states``, the hidden states [tokens,
    hidden size] of the labelled tokens, computed in chunks of tokens as in ``train/loss.py``."""
    return torch.cat(
        [_chunk_gradient(head, chunk.requires_grad_()) for chunk in states.split(MAX_LOGIT_ROWS)]
    )


def _chunk_gradient(head: Any, states: Tensor) -> Tensor:
    logits = head(states)
    float_logits = logits.detach().float()  # held until the function returns, so the peak counts it
    return torch.autograd.grad(logits, states, float_logits.softmax(-1).to(logits.dtype))[0]


def _full_loss_gradient(head: Any, states: Tensor) -> Tensor:
    """The gradient of ``_chunked_loss_gradient``, but from the logits of all tokens at once, as
    ``train/loss.py`` computes it if the output head cannot be called separately."""
    return torch.autograd.grad(_summed_loss(head, states.requires_grad_()), states)[0]


def _summed_loss(head: Any, states: Tensor) -> Tensor:
    labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    logits = head(states)  # held until the function returns, so the peak counts it
    return torch.nn.functional.cross_entropy(logits[labels].float(), labels, reduction="sum")


def _block_count_configs(model: nn.Module) -> list[Any]:
    """The configs of the model and its submodules that have a ``num_hidden_layers``, each once."""
    configs = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    return [
        config
        for config in configs.values()
        if isinstance(getattr(config, "num_hidden_layers", None), int)
    ]


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, module list) of the repeated blocks, assumed to be the list with the most parameters.
    Raises ``ConfigError`` if the model has no module list."""
    module_lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if module_lists:
        return max(
            module_lists, key=lambda entry: sum(weight.numel() for weight in entry[1].parameters())
        )
    raise ConfigError(
        f"{type(model).__name__}, which has no list of blocks",
        "a transformer of transformers, whose blocks repeat",
        "plan one",
    )


def _set_block_list(model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = blocks


def _block_signature(block: nn.Module) -> tuple[Any, ...]:
    """The properties by which blocks count as equal: classes of modules, attention windows, and
    shapes of parameters and whether they train."""
    modules = tuple(
        (name, type(module).__qualname__, getattr(module, "sliding_window", None))
        for name, module in block.named_modules()
    )
    return modules, tuple(
        (name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()
    )


class _OperationCounter(TorchDispatchMode):
    """A dispatch mode that records the work of each operation (``work``), the bytes of all storages
    that operations created and that are not freed yet (``live_bytes``), and the maximum of these
    bytes (``peak_bytes``). Storages of the model's own tensors and gradients are not counted.

    Args:
        hidden_size: number of features of hidden states.
    """

    def __init__(self, model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.work: Work = Counter()
        self.hidden_size, self.live_bytes, self.peak_bytes = hidden_size, 0, 0
        self.storages: dict[int, tuple[Any, int, bool]] = {}
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.model_storages = {
            tensor.untyped_storage()._cdata
            for tensor in (*model.parameters(), *model.buffers(), *gradients)
        }

    def measure_live_bytes(self) -> tuple[int, int]:
        """(bytes of the live storages, the part of these bytes in tensors as wide as a hidden
        state, which tensor parallelism keeps in full on each device)."""
        return self.live_bytes, sum(
            size_bytes for _, size_bytes, is_replicated in self.storages.values() if is_replicated
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        outputs = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        for tensor in outputs:
            self._track_storage(tensor)
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        returns_views = not func._schema.is_mutable and all(
            tensor.untyped_storage()._cdata in input_storages for tensor in outputs
        )
        if outputs and not returns_views and "empty" not in func._schema.name:
            bytes_moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            operations = count_operations(func, args, kwargs, output)
            is_replicated = not operations and all(
                tensor.dim() > 1 and tensor.shape[-1] == self.hidden_size for tensor in outputs
            )
            self.work[operations, bytes_moved, is_replicated] += 1
        return output

    def _track_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not tensor.is_meta or key in self.storages or key in self.model_storages:
            return
        size_bytes = storage.nbytes()
        weak_reference = weakref.ref(storage, lambda _: self._untrack_storage(key))
        self.storages[key] = (
            weak_reference,
            size_bytes,
            tensor.dim() > 1 and tensor.shape[-1] == self.hidden_size,
        )
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _untrack_storage(self, key: int) -> None:
        _, size_bytes, _ = self.storages.pop(key)
        self.live_bytes -= size_bytes


def count_operations(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Floating-point operations of a matrix product or attention, where a multiplication and its
    addition are two; 0 for any other operation."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
        left_factor, right_factor = (args[1], args[2]) if "add" in name else (args[0], args[1])
        # The formula below also holds for _grouped_mm. In forward, each row is multiplied by the
        # matrix of its group only. For the gradient of the stack of matrices, both factors are
        # matrices whose summed axis is divided among the groups.
        return 2 * left_factor.numel() * right_factor.shape[-1]
    flop_formula = flop_registry.get(func._overloadpacket)
    operations = (
        int(flop_formula(*args, **kwargs, out_val=output)) if flop_formula is not None else 0
    )
    if "attention" in name and _call_argument(func, "is_causal", args, kwargs):
        query_length = args[1].shape[-2] if "backward" in name else args[0].shape[-2]
        operations = operations * (query_length + 1) // (2 * query_length)
    return operations


def _call_argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The argument of a call of ``func`` for the parameter ``name``; None if it is not passed."""
    parameter_names = [argument.name for argument in func._schema.arguments]
    position = parameter_names.index(name) if name in parameter_names else len(args)
    return kwargs.get(name, args[position] if position < len(args) else None)
