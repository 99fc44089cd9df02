"""A training step on torch's meta device, counted: what it holds, what it computes and what it moves.

The model's own forward and backward run, with tensors that have shapes and no numbers, and every operation is seen.
So nothing is assumed of an architecture but that its blocks repeat: of blocks that are alike one runs, and a second
one tells what each more of them costs.

    step = edges + Σ count · block          for bytes held, operations and bytes moved

Saved bytes are exact where the device does as torch's meta device says. Not seen: workspaces inside a kernel, and the
slack of an allocator.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from veneer.errors import ConfigError
from veneer.kernels.device import counted

#: rows of logits at a time, as the loss of ``veneer train`` has them
ROWS = 256

#: (operations, bytes moved) of a call -> how many such calls
Work = Counter[tuple[int, int]]


@dataclass(frozen=True)
class Cost:
    """What a part of a step costs.

    Fields:
        saved: bytes that wait for backward.
        wide: bytes of these that are as wide as the hidden state, so that tensor parallelism does not split them.
        peak_loss, peak_backward: bytes that are held at most until the loss and its gradient are known, and from then
            on, gradients of parameters aside.
        forward, backward: calls of operations.
    """

    saved: int = 0
    wide: int = 0
    peak_loss: int = 0
    peak_backward: int = 0
    forward: Work = field(default_factory=Counter)
    backward: Work = field(default_factory=Counter)

    def plus(self, other: Cost, times: int = 1) -> Cost:
        sizes = (getattr(self, name) + times * getattr(other, name) for name in _BYTES)
        works = (_plus(getattr(self, name), getattr(other, name), times) for name in ("forward", "backward"))
        return Cost(*sizes, *works)

    @property
    def peak(self) -> int:
        """Bytes that the step holds at most."""
        return max(self.peak_loss, self.peak_backward)

    @property
    def operations(self) -> int:
        return sum(
            operations * count for work in (self.forward, self.backward) for (operations, _), count in work.items()
        )


_BYTES = ("saved", "wide", "peak_loss", "peak_backward")


def _plus(work: Work, other: Work, times: int) -> Work:
    return Counter({call: work[call] + times * other[call] for call in {*work, *other}})


@dataclass(frozen=True)
class Blocks:
    """``count`` repeated blocks that are alike: one of them, and what each costs."""

    count: int
    block: nn.Module
    cost: Cost


@dataclass(frozen=True)
class Step:
    """A step of one batch: ``whole``, and of that the repeated blocks. ``hidden``: bytes of a hidden state."""

    whole: Cost
    blocks: tuple[Blocks, ...]
    hidden: int

    @property
    def checkpointed(self) -> Cost:
        """The step where a block keeps its input alone, and runs again before its backward."""
        cost = self.whole
        for blocks in self.blocks:
            own = blocks.cost
            less = self.hidden - own.saved
            again = Cost(less, self.hidden - own.wide, less, less, backward=own.forward)
            cost = cost.plus(again, blocks.count)
        largest, wide = (max((getattr(one.cost, name) for one in self.blocks), default=0) for name in ("saved", "wide"))
        return cost.plus(Cost(wide=wide, peak_backward=largest))


def count_step(model: Any, batch: int, length: int, *, labelled: float = 1.0, plain: bool = True) -> Step:
    """A step of ``batch`` rows of ``length`` tokens, forward, loss and backward.

    Args:
        model: as ``countable_model`` makes it, with an adapter on it.
        labelled: the share of the tokens that have a label: the output head sees no others.
        plain: the frozen weights are plain, so that adapted linear layers are one function each; packed ones (4 and 8
            bits) are products of their library, beside which the adapter keeps its inputs whole.

    Raises:
        ConfigError: the model has no repeated blocks, or does what cannot be counted without numbers.
    """
    table = model.get_input_embeddings().weight
    with counted() if plain else nullcontext():
        whole, blocks = _by_kind(model, lambda: _run(model, batch, length, labelled))
    return Step(whole, blocks, batch * length * table.shape[-1] * table.element_size())


def count_forward(model: Any, length: int) -> tuple[int, int]:
    """(operations, bytes of keys and values that stay) of one row of so many tokens, without a graph. ``ConfigError``:
    as ``count_step``."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")

    def run() -> Cost:
        with torch.no_grad(), counted(), _Counter(model, 0) as seen:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            kept: Any = next(value for value in output.values() if hasattr(value, "layers"))
        tensors = [value for layer in kept.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        held = sum(one.nbytes for one in tensors if one.is_floating_point())  # not how many there are
        return Cost(saved=held, forward=seen.work)

    whole, _ = _by_kind(model, run)
    return whole.operations, whole.saved


def _by_kind(model: Any, run: Callable[[], Cost]) -> tuple[Cost, tuple[Blocks, ...]]:
    """What ``run`` costs with all repeated blocks, from runs with one or two of each kind in their place."""
    path, stack = _blocks(model)
    kinds: dict[Any, list[nn.Module]] = {}
    frozen = True  # below the lowest adapted block nothing is kept
    for block in stack:
        frozen &= not any(p.requires_grad for p in block.parameters())
        kinds.setdefault((frozen, *_shape(block)), []).append(block)
    first = [alike[0] for alike in kinds.values()]
    depths = [(config, config.num_hidden_layers) for config in _configs(model)]

    def cost_of(blocks: Sequence[nn.Module]) -> Cost:
        for config, number in depths:  # transformers runs no block beyond it
            config.num_hidden_layers = max(number, len(blocks))
        _put(model, path, nn.ModuleList(blocks))
        return run()

    try:
        whole, blocks = cost_of(first), []
        for alike in kinds.values():
            second = alike[:2][-1]
            more = [one for block in first for one in ([block, second] if block is alike[0] else [block])]
            blocks.append(Blocks(len(alike), alike[0], cost_of(more).plus(whole, -1)))
    except (NotImplementedError, RuntimeError) as error:
        found = f"{type(model).__name__}, which cannot run without numbers ({str(error).splitlines()[0][:160]})"
        raise ConfigError(found, "a model whose shapes do not depend on its data", "plan a like one") from error
    finally:
        _put(model, path, stack)
        model.zero_grad()
        for config, number in depths:
            config.num_hidden_layers = number
    for each in blocks:
        whole = whole.plus(each.cost, each.count - 1)
    return whole, tuple(blocks)


def _run(model: Any, batch: int, length: int, labelled: float) -> Cost:
    """One step of the model as it is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # they are counted elsewhere, and all are there while batches accumulate
        parameter.grad = torch.zeros_like(parameter)
    head: Any = model.get_output_embeddings()
    width = model.get_input_embeddings().weight.shape[-1]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    body = model.base_model if model.base_model is not model else model
    with _Counter(model, width) as seen:
        states = body(input_ids=ids, use_cache=False)[0]
        saved, wide = seen.held()
        rows = states.flatten(0, 1)[: max(1, round(batch * length * labelled))]
        gradients = _loss(head, rows)
        forward, seen.work = seen.work, Counter()
        loss, seen.peak = seen.peak, seen.live
        rows.backward(gradients)
        del states, rows, gradients
        return Cost(saved, wide, loss, seen.peak, forward, seen.work)


def _loss(head: Any, rows: Tensor) -> Tensor:
    """The gradient of the cross-entropy in the rows, a chunk of them at a time, as ``train/loss.py`` has it."""
    if head is None:
        return torch.zeros_like(rows)
    gradients = [_chunk(head, piece.requires_grad_()) for piece in rows.detach().split(ROWS)]
    return torch.cat(gradients)


def _chunk(head: Any, rows: Tensor) -> Tensor:
    logits = head(rows)
    shares = logits.detach().float().softmax(-1)
    return torch.autograd.grad(logits, rows, shares.to(logits.dtype))[0]


def _configs(model: nn.Module) -> list[Any]:
    """Those of the model and of the models in it that say how many blocks run, each once."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if isinstance(getattr(config, "num_hidden_layers", None), int)]


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of repeated blocks, and its path: the first list of several modules that is in no other one."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            return path, module
    found = f"{type(model).__name__}, which has no list of blocks"
    raise ConfigError(found, "a transformer of transformers, whose blocks repeat", "plan one")


def _put(model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = blocks


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """What makes blocks alike: their modules, how far back these look, and the shapes of their parameters."""
    modules = tuple(
        (name, type(module).__qualname__, getattr(module, "sliding_window", None))
        for name, module in block.named_modules()
    )
    return modules, tuple((name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters())


class _Counter(TorchDispatchMode):
    """Sees each operation: the storages that it makes, until they are freed, those of the model's own tensors aside;
    its work. ``width``: of hidden states."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.work: Work = Counter()
        self.width, self.live, self.peak = width, 0, 0
        self.storages: dict[int, tuple[Any, int, bool]] = {}
        self.own = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
        self.own |= {p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None}

    def held(self) -> tuple[int, int]:
        """Bytes that are held now, and those of tensors as wide as a hidden state."""
        return self.live, sum(size for _, size, wide in self.storages.values() if wide)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        for one in outputs:
            self._made(one)
        own = {one.untyped_storage()._cdata for one in inputs}
        views = not func._schema.is_mutable and all(one.untyped_storage()._cdata in own for one in outputs)
        if outputs and not views and "empty" not in func._schema.name:
            moved = sum(one.nbytes for one in (*inputs, *outputs))
            self.work[operations_of(func, args, kwargs, out), moved] += 1
        return out

    def _made(self, one: Tensor) -> None:
        storage = one.untyped_storage()
        key = storage._cdata
        if not one.is_meta or key in self.storages or key in self.own:
            return
        size = storage.nbytes()
        gone = weakref.ref(storage, lambda _: self._freed(key))
        self.storages[key] = gone, size, one.dim() > 1 and one.shape[-1] == self.width
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        _, size, _ = self.storages.pop(key)
        self.live -= size


def operations_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of a product, two for each multiplication; 0 for what is none."""
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"):
        left, right = (args[1], args[2]) if "add" in name else (args[0], args[1])
        if name != "_grouped_mm":
            return 2 * left.numel() * right.shape[-1]
        if right.dim() == 3:  # rows, each times the matrix of its group
            return 2 * left.numel() * right.shape[-1]
        return 2 * left.shape[0] * left.shape[1] * right.shape[-1]  # a gradient: groups of columns
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
