"""Count a training step on torch's meta device: bytes held, operations, bytes moved.

The model's own forward and backward run on tensors that have shapes and no data, and a dispatch
mode records every operation. The only assumption about the architecture is that its blocks repeat:
one block of each kind runs, and a second run with one more block gives the cost of each repetition.

    step = edges + Σ count · block          for bytes held, operations and bytes moved

Saved bytes are exact if the device saves the same tensors as torch's meta device. Workspaces inside
a kernel and the slack of an allocator are not counted. Attention is taken as causal: its kernels
compute only the half below the diagonal, so half of the operations are counted.
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

from veneer.errors import ConfigError
from veneer.kernels.device import count_on_meta
from veneer.models.messages import first_line

#: number of rows whose logits exist at once, as in the loss of ``veneer train``
ROWS = 256

#: (operations, bytes moved, whether tensor parallelism replicates the call on each device) ->
#: number of such calls
Work = Counter[tuple[int, int, bool]]


@dataclass(frozen=True)
class Cost:
    """The cost of a step or of a block.

    Fields:
        saved: bytes that forward keeps for backward.
        replicated: bytes of these in tensors as wide as the hidden state, which tensor parallelism
            keeps whole on each device.
        peak_loss, peak_backward: the most bytes held until the gradient of the loss is computed,
            and from then on, without the gradients of parameters.
        forward, backward: the calls of operations.
    """

    saved: int = 0
    replicated: int = 0
    peak_loss: int = 0
    peak_backward: int = 0
    forward: Work = field(default_factory=Counter)
    backward: Work = field(default_factory=Counter)

    def plus(self, added: Cost, times: int = 1) -> Cost:
        """The sum of this cost and ``times`` the ``added`` one."""
        sizes = (getattr(self, name) + times * getattr(added, name) for name in _BYTES)
        calls = (
            _add_work(getattr(self, name), getattr(added, name), times)
            for name in ("forward", "backward")
        )
        return Cost(*sizes, *calls)

    @property
    def peak(self) -> int:
        """The most bytes that the step holds."""
        return max(self.peak_loss, self.peak_backward)

    @property
    def operations(self) -> int:
        return sum(
            operations * count
            for work in (self.forward, self.backward)
            for (operations, _, _), count in work.items()
        )

    def shard(self, devices: int) -> Cost:
        """The cost on each of ``devices`` devices that divide matrices and attention heads. Each
        holds and reads all tensors as wide as the hidden state."""
        saved_elsewhere = (self.saved - self.replicated) * (devices - 1) // devices
        sizes = (
            self.saved - saved_elsewhere,
            self.replicated,
            self.peak_loss - saved_elsewhere,
            self.peak_backward - saved_elsewhere,
        )
        return Cost(*sizes, shard_work(self.forward, devices), shard_work(self.backward, devices))


_BYTES = ("saved", "replicated", "peak_loss", "peak_backward")


def shard_work(work: Work, devices: int) -> Work:
    """The work of one of several devices."""
    shares = Work()
    for (operations, moved, replicated), count in work.items():
        divisor = 1 if replicated else devices
        shares[operations // divisor, moved // divisor, replicated] += count
    return shares


def _add_work(work: Work, added: Work, times: int) -> Work:
    return Counter({call: work[call] + times * added[call] for call in {*work, *added}})


@dataclass(frozen=True)
class BlockGroup:
    """``count`` equal blocks: one of them, and the cost of each."""

    count: int
    block: nn.Module
    cost: Cost


@dataclass(frozen=True)
class Step:
    """The step of one batch.

    Fields:
        total: its cost.
        blocks: the repeated blocks, whose costs ``total`` includes.
        hidden_bytes: size of a hidden state of the batch.
    """

    total: Cost
    blocks: tuple[BlockGroup, ...]
    hidden_bytes: int

    @property
    def with_checkpointing(self) -> Cost:
        """The cost with activation checkpointing: each block saves only its input and runs again
        before its backward."""
        cost = self.total
        for blocks in self.blocks:
            block_cost = blocks.cost
            freed = self.hidden_bytes - block_cost.saved
            recomputed = Cost(
                freed,
                self.hidden_bytes - block_cost.replicated,
                freed,
                freed,
                backward=block_cost.forward,
            )
            cost = cost.plus(recomputed, blocks.count)
        return cost.plus(
            Cost(peak_backward=max((blocks.cost.saved for blocks in self.blocks), default=0))
        )

    def shard(self, devices: int) -> Step:
        """The step of one of several devices that divide the blocks' matrices; each has the whole
        embedding and output head."""
        blocks = tuple(replace(group, cost=group.cost.shard(devices)) for group in self.blocks)
        total = self.total
        for full, shard in zip(self.blocks, blocks, strict=True):
            total = total.plus(full.cost, -full.count).plus(shard.cost, shard.count)
        return Step(total, blocks, self.hidden_bytes)


def count_step(
    model: Any,
    batch: int,
    length: int,
    *,
    labelled: float = 1.0,
    plain: bool = True,
    chunked: bool = True,
) -> Step:
    """Count a step of ``batch`` rows of ``length`` tokens: forward, loss and backward.

    Args:
        model: a result of ``countable_model``, with an adapter attached.
        labelled: share of the tokens that have a label; only these pass through the output head.
        plain: whether the frozen weights are plain, so that an adapted linear layer is one autograd
            function. A packed weight (4 or 8 bits) is multiplied by its library, and the adapter
            saves its inputs in addition.
        chunked: whether the loss computes the logits of ``ROWS`` rows at a time. False: of all rows
            at once, as for a base that FSDP shards.

    Raises:
        ConfigError: the model has no repeated blocks, or cannot run on tensors without data.
    """
    embedding = model.get_input_embeddings().weight
    with count_on_meta() if plain else nullcontext():
        total, blocks = _count_by_block_kind(
            model, lambda: _run_step(model, batch, length, labelled, chunked)
        )
    return Step(total, blocks, batch * length * embedding.shape[-1] * embedding.element_size())


def count_forward(model: Any, length: int) -> tuple[int, int]:
    """Count a forward without gradients of one row of ``length`` tokens: (operations, bytes of the
    cached keys and values). Raises ``ConfigError`` as ``count_step``."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")

    def run() -> Cost:
        with torch.no_grad(), count_on_meta(), _OperationCounter(model, 0) as counter:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            cache: Any = next(value for value in output.values() if hasattr(value, "layers"))
        tensors = [
            value
            for layer in cache.layers
            for value in vars(layer).values()
            if isinstance(value, Tensor)
        ]
        # integer tensors of a cache are counters, not keys or values
        cache_bytes = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return Cost(saved=cache_bytes, forward=counter.work)

    total, _ = _count_by_block_kind(model, run)
    return total.operations, total.saved


def _count_by_block_kind(
    model: Any, run: Callable[[], Cost]
) -> tuple[Cost, tuple[BlockGroup, ...]]:
    """The cost of ``run`` for all blocks, measured with one block of each kind, and once more for
    each kind with a second block of it. Also returns the groups of equal blocks."""
    path, block_list = _block_list(model)
    kinds: dict[Any, list[nn.Module]] = {}
    frozen = True  # forward saves nothing below the lowest adapted block
    for block in block_list:
        frozen &= not any(p.requires_grad for p in block.parameters())
        kinds.setdefault((frozen, *_block_signature(block)), []).append(block)
    one_of_each = [equal_blocks[0] for equal_blocks in kinds.values()]
    depths = [(config, config.num_hidden_layers) for config in _depth_configs(model)]

    def cost_of(blocks: Sequence[nn.Module]) -> Cost:
        for config, number in depths:  # transformers runs at most `num_hidden_layers` blocks
            config.num_hidden_layers = max(number, len(blocks))
        _set_block_list(model, path, nn.ModuleList(blocks))
        return run()

    try:
        with torch.random.fork_rng(devices=[]):  # dropout draws a seed
            total, blocks = cost_of(one_of_each), []
            for equal_blocks in kinds.values():
                another = equal_blocks[:2][-1]
                with_another = [
                    repeated
                    for block in one_of_each
                    for repeated in ([block, another] if block is equal_blocks[0] else [block])
                ]
                blocks.append(
                    BlockGroup(
                        len(equal_blocks), equal_blocks[0], cost_of(with_another).plus(total, -1)
                    )
                )
    except Exception as error:  # the model's own code may fail on tensors without data
        problem = (
            f"{type(model).__name__}, which cannot run without numbers ({first_line(error)[:160]})"
        )
        raise ConfigError(
            problem, "a model whose shapes do not depend on its data", "plan a like one"
        ) from error
    finally:
        _set_block_list(model, path, block_list)
        model.zero_grad()
        for config, depth in depths:
            config.num_hidden_layers = depth
    for group in blocks:
        total = total.plus(group.cost, group.count - 1)
    return total, tuple(blocks)


def _run_step(model: Any, batch: int, length: int, labelled: float, chunked: bool = True) -> Cost:
    """The cost of one step of the model as it is."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # gradients exist beforehand, as while batches accumulate; `memory.py` counts their bytes
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    head: Any = model.get_output_embeddings()
    width = model.get_input_embeddings().weight.shape[-1]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    decoder = model.base_model if model.base_model is not model else model
    with _OperationCounter(model, width) as counter:
        states = decoder(input_ids=ids, use_cache=False)[0]
        saved, replicated = counter.live_bytes()
        rows = states.flatten(0, 1)[: max(1, round(batch * length * labelled))]
        gradients = (
            torch.zeros_like(rows)
            if head is None
            else (_chunked_loss_gradient if chunked else _full_loss_gradient)(head, rows.detach())
        )
        forward, counter.work = counter.work, Counter()
        peak_loss, counter.peak = counter.peak, counter.live
        rows.backward(gradients)
        del states, rows, gradients
        return Cost(saved, replicated, peak_loss, counter.peak, forward, counter.work)


def _chunked_loss_gradient(head: Any, rows: Tensor) -> Tensor:
    """Gradient of the cross-entropy with respect to the rows, computed in chunks as in
    ``train/loss.py``."""
    return torch.cat([_chunk_gradient(head, chunk.requires_grad_()) for chunk in rows.split(ROWS)])


def _chunk_gradient(head: Any, rows: Tensor) -> Tensor:
    logits = head(rows)
    float_logits = logits.detach().float()  # alive until the function returns
    return torch.autograd.grad(logits, rows, float_logits.softmax(-1).to(logits.dtype))[0]


def _full_loss_gradient(head: Any, rows: Tensor) -> Tensor:
    """The same from the logits of all rows at once, as ``train/loss.py`` does if the output head
    cannot be called separately."""
    return torch.autograd.grad(_summed_loss(head, rows.requires_grad_()), rows)[0]


def _summed_loss(head: Any, rows: Tensor) -> Tensor:
    labels = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    logits = head(rows)  # alive until the function returns
    return torch.nn.functional.cross_entropy(logits[labels].float(), labels, reduction="sum")


def _depth_configs(model: nn.Module) -> list[Any]:
    """The distinct configs, of the model and of models inside it, that set the number of blocks."""
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
    """(path, list) of the repeated blocks: the module list with the most parameters."""
    module_lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if module_lists:
        return max(
            module_lists, key=lambda entry: sum(weight.numel() for weight in entry[1].parameters())
        )
    problem = f"{type(model).__name__}, which has no list of blocks"
    raise ConfigError(problem, "a transformer of transformers, whose blocks repeat", "plan one")


def _set_block_list(model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = blocks


def _block_signature(block: nn.Module) -> tuple[Any, ...]:
    """The properties that equal blocks share: classes of modules, attention windows, shapes of
    parameters."""
    modules = tuple(
        (name, type(module).__qualname__, getattr(module, "sliding_window", None))
        for name, module in block.named_modules()
    )
    return modules, tuple(
        (name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()
    )


class _OperationCounter(TorchDispatchMode):
    """Dispatch mode that records each operation's work, and the bytes of the storages that
    operations create, until these are freed. Storages of the model's own tensors are not counted.

    Args:
        width: number of features of hidden states.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.work: Work = Counter()
        self.width, self.live, self.peak = width, 0, 0
        self.storages: dict[int, tuple[Any, int, bool]] = {}
        tensors = [*model.parameters(), *model.buffers()]
        self.model_storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.model_storages |= {
            p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None
        }

    def live_bytes(self) -> tuple[int, int]:
        """(bytes that are held now, bytes of these in tensors as wide as a hidden state)."""
        return self.live, sum(size for _, size, replicated in self.storages.values() if replicated)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        outputs = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        for tensor in outputs:
            self._track_storage(tensor)
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        views = not func._schema.is_mutable and all(
            tensor.untyped_storage()._cdata in input_storages for tensor in outputs
        )
        if outputs and not views and "empty" not in func._schema.name:
            moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            operations = count_operations(func, args, kwargs, out)
            replicated = not operations and all(
                tensor.dim() > 1 and tensor.shape[-1] == self.width for tensor in outputs
            )
            self.work[operations, moved, replicated] += 1
        return out

    def _track_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if not tensor.is_meta or key in self.storages or key in self.model_storages:
            return
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._untrack_storage(key))
        self.storages[key] = reference, size, tensor.dim() > 1 and tensor.shape[-1] == self.width
        self.live += size
        self.peak = max(self.peak, self.live)

    def _untrack_storage(self, key: int) -> None:
        _, size, _ = self.storages.pop(key)
        self.live -= size


def count_operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of a matrix product or attention, two for each multiplication; 0
    for any other operation."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
        left_factor, right_factor = (args[1], args[2]) if "add" in name else (args[0], args[1])
        if name != "_grouped_mm":
            return 2 * left_factor.numel() * right_factor.shape[-1]
        if right_factor.dim() == 3:  # each row times the matrix of its group
            return 2 * left_factor.numel() * right_factor.shape[-1]
        return 2 * left_factor.shape[0] * left_factor.shape[1] * right_factor.shape[-1]  # gradient
    formula = flop_registry.get(func._overloadpacket)
    operations = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    if "attention" in name and _call_argument(func, "is_causal", args, kwargs):
        length = args[1].shape[-2] if "backward" in name else args[0].shape[-2]
        operations = operations * (length + 1) // (2 * length)
    return operations


def _call_argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The argument of a call with this name; None if the function has no such parameter."""
    names = [argument.name for argument in func._schema.arguments]
    position = names.index(name) if name in names else None
    return kwargs.get(
        name, args[position] if position is not None and position < len(args) else None
    )
