"""A training step on torch's meta device, counted: what it holds, what it computes and what it
moves.

The model's own forward and backward run, with tensors that have shapes and no numbers, and every
operation is seen. So nothing is assumed of an architecture but that its blocks repeat: of blocks
that are alike one runs, and a second one tells what each more of them costs.

    step = edges + Σ count · block          for bytes held, operations and bytes moved

Saved bytes are exact where the device does as torch's meta device says. Not seen: workspaces inside
a kernel, and the slack of an allocator. Attention is causal: its kernels compute the half below the
diagonal, and that is counted.
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

#: rows of logits at a time, as the loss of ``veneer train`` has them
ROWS = 256

#: (operations, bytes moved, whether tensor parallelism leaves it whole) of a call -> how many such
#: calls
Work = Counter[tuple[int, int, bool]]


@dataclass(frozen=True)
class Cost:
    """What a part of a step costs.

    Fields:
        saved: bytes that wait for backward.
        wide: bytes of these that are as wide as the hidden state, so that tensor parallelism does
            not split them.
        peak_loss, peak_backward: bytes that are held at most until the loss and its gradient are
            known, and from then on, gradients of parameters aside.
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
        works = (
            _plus(getattr(self, name), getattr(other, name), times)
            for name in ("forward", "backward")
        )
        return Cost(*sizes, *works)

    @property
    def peak(self) -> int:
        """Bytes that the step holds at most."""
        return max(self.peak_loss, self.peak_backward)

    @property
    def operations(self) -> int:
        return sum(
            operations * count
            for work in (self.forward, self.backward)
            for (operations, _, _), count in work.items()
        )

    def cut(self, devices: int) -> Cost:
        """What a part costs each of several devices that share its matrices, and heads of
        attention: all of them hold and read what is as wide as the hidden state."""
        less = (self.saved - self.wide) * (devices - 1) // devices
        sizes = self.saved - less, self.wide, self.peak_loss - less, self.peak_backward - less
        return Cost(*sizes, cut(self.forward, devices), cut(self.backward, devices))


_BYTES = ("saved", "wide", "peak_loss", "peak_backward")


def cut(work: Work, devices: int) -> Work:
    """The share of the work that one of several devices does."""
    shares = Work()
    for (operations, moved, whole), count in work.items():
        shares[
            (
                (operations, moved, whole)
                if whole
                else (operations // devices, moved // devices, whole)
            )
        ] += count
    return shares


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
    """A step of one batch: ``whole``, and of that the repeated blocks. ``hidden``: bytes of a
    hidden state."""

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
        return cost.plus(
            Cost(peak_backward=max((blocks.cost.saved for blocks in self.blocks), default=0))
        )

    def cut(self, devices: int) -> Step:
        """The step of one of several devices that share the blocks' matrices; embedding and head
        are whole on each."""
        blocks = tuple(replace(one, cost=one.cost.cut(devices)) for one in self.blocks)
        whole = self.whole
        for before, after in zip(self.blocks, blocks, strict=True):
            whole = whole.plus(before.cost, -before.count).plus(after.cost, after.count)
        return Step(whole, blocks, self.hidden)


def count_step(
    model: Any,
    batch: int,
    length: int,
    *,
    labelled: float = 1.0,
    plain: bool = True,
    chunked: bool = True,
) -> Step:
    """A step of ``batch`` rows of ``length`` tokens, forward, loss and backward.

    Args:
        model: as ``countable_model`` makes it, with an adapter on it.
        labelled: the share of the tokens that have a label: the output head sees no others.
        plain: the frozen weights are plain, so that adapted linear layers are one function each;
            packed ones (4 and 8 bits) are products of their library, beside which the adapter keeps
            its inputs whole.
        chunked: the loss takes ``ROWS`` rows of logits at a time; on a base that fsdp spreads, all
            of them.

    Raises:
        ConfigError: the model has no repeated blocks, or does what cannot be counted without
            numbers.
    """
    table = model.get_input_embeddings().weight
    with count_on_meta() if plain else nullcontext():
        whole, blocks = _by_kind(model, lambda: _run(model, batch, length, labelled, chunked))
    return Step(whole, blocks, batch * length * table.shape[-1] * table.element_size())


def count_forward(model: Any, length: int) -> tuple[int, int]:
    """(operations, bytes of keys and values that stay) of one row of so many tokens, without a
    graph. ``ConfigError``: as ``count_step``."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")

    def run() -> Cost:
        with torch.no_grad(), count_on_meta(), _Counter(model, 0) as seen:
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            kept: Any = next(value for value in output.values() if hasattr(value, "layers"))
        tensors = [
            value
            for layer in kept.layers
            for value in vars(layer).values()
            if isinstance(value, Tensor)
        ]
        # not how many there are
        held = sum(one.nbytes for one in tensors if one.is_floating_point())
        return Cost(saved=held, forward=seen.work)

    whole, _ = _by_kind(model, run)
    return whole.operations, whole.saved


def _by_kind(model: Any, run: Callable[[], Cost]) -> tuple[Cost, tuple[Blocks, ...]]:
    """What ``run`` costs with all repeated blocks, from runs with one or two of each kind in their
    place."""
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
        with torch.random.fork_rng(devices=[]):  # dropout draws a seed
            whole, blocks = cost_of(first), []
            for alike in kinds.values():
                second = alike[:2][-1]
                more = [
                    one
                    for block in first
                    for one in ([block, second] if block is alike[0] else [block])
                ]
                blocks.append(Blocks(len(alike), alike[0], cost_of(more).plus(whole, -1)))
    except Exception as error:  # of the model's own code, on tensors that it may not expect
        problem = (
            f"{type(model).__name__}, which cannot run without numbers ({first_line(error)[:160]})"
        )
        raise ConfigError(
            problem, "a model whose shapes do not depend on its data", "plan a like one"
        ) from error
    finally:
        _put(model, path, stack)
        model.zero_grad()
        for config, number in depths:
            config.num_hidden_layers = number
    for each in blocks:
        whole = whole.plus(each.cost, each.count - 1)
    return whole, tuple(blocks)


def _run(model: Any, batch: int, length: int, labelled: float, chunked: bool = True) -> Cost:
    """One step of the model as it is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for (
        parameter
    ) in trained:  # they are counted elsewhere, and all are there while batches accumulate
        parameter.grad = torch.zeros_like(parameter)
    head: Any = model.get_output_embeddings()
    width = model.get_input_embeddings().weight.shape[-1]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    body = model.base_model if model.base_model is not model else model
    with _Counter(model, width) as seen:
        states = body(input_ids=ids, use_cache=False)[0]
        saved, wide = seen.held()
        rows = states.flatten(0, 1)[: max(1, round(batch * length * labelled))]
        gradients = (
            torch.zeros_like(rows)
            if head is None
            else (_in_chunks if chunked else _at_once)(head, rows.detach())
        )
        forward, seen.work = seen.work, Counter()
        loss, seen.peak = seen.peak, seen.live
        rows.backward(gradients)
        del states, rows, gradients
        return Cost(saved, wide, loss, seen.peak, forward, seen.work)


def _in_chunks(head: Any, rows: Tensor) -> Tensor:
    """The gradient of the cross-entropy in the rows, a chunk of them at a time, as
    ``train/loss.py`` has it."""
    return torch.cat([_chunk(head, piece.requires_grad_()) for piece in rows.split(ROWS)])


def _chunk(head: Any, rows: Tensor) -> Tensor:
    logits = head(rows)
    wide = logits.detach().float()  # held until this returns
    return torch.autograd.grad(logits, rows, wide.softmax(-1).to(logits.dtype))[0]


def _at_once(head: Any, rows: Tensor) -> Tensor:
    """The same by the logits of all rows, as ``train/loss.py`` has it where the head cannot be
    called alone."""
    return torch.autograd.grad(_total(head, rows.requires_grad_()), rows)[0]


def _total(head: Any, rows: Tensor) -> Tensor:
    labels = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    logits = head(rows)  # held until this returns
    return torch.nn.functional.cross_entropy(logits[labels].float(), labels, reduction="sum")


def _configs(model: nn.Module) -> list[Any]:
    """Those of the model and of the models in it that say how many blocks run, each once."""
    found = {
        id(config): config
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    return [
        config
        for config in found.values()
        if isinstance(getattr(config, "num_hidden_layers", None), int)
    ]


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of repeated blocks, and its path: of all lists of modules the one with the most
    parameters."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if lists:
        return max(
            lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters())
        )
    problem = f"{type(model).__name__}, which has no list of blocks"
    raise ConfigError(problem, "a transformer of transformers, whose blocks repeat", "plan one")


def _put(model: nn.Module, path: str, blocks: nn.ModuleList) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = blocks


def _shape(block: nn.Module) -> tuple[Any, ...]:
    """What makes blocks alike: their modules, how far back these look, and the shapes of their
    parameters."""
    modules = tuple(
        (name, type(module).__qualname__, getattr(module, "sliding_window", None))
        for name, module in block.named_modules()
    )
    return modules, tuple(
        (name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()
    )


class _Counter(TorchDispatchMode):
    """Sees each operation: the storages that it makes, until they are freed, those of the model's
    own tensors aside; its work. ``width``: of hidden states."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.work: Work = Counter()
        self.width, self.live, self.peak = width, 0, 0
        self.storages: dict[int, tuple[Any, int, bool]] = {}
        self.own = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
        self.own |= {
            p.grad.untyped_storage()._cdata for p in model.parameters() if p.grad is not None
        }

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
        views = not func._schema.is_mutable and all(
            one.untyped_storage()._cdata in own for one in outputs
        )
        if outputs and not views and "empty" not in func._schema.name:
            moved, operations = (
                sum(one.nbytes for one in (*inputs, *outputs)),
                operations_of(func, args, kwargs, out),
            )
            whole = not operations and all(
                one.dim() > 1 and one.shape[-1] == self.width for one in outputs
            )
            self.work[operations, moved, whole] += 1
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
    found = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
    if "attention" in name and _argument(func, "is_causal", args, kwargs):
        length = args[1].shape[-2] if "backward" in name else args[0].shape[-2]
        found = found * (length + 1) // (2 * length)
    return found


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What a call gives for an argument of this name; None if the function has none."""
    places = [argument.name for argument in func._schema.arguments]
    place = places.index(name) if name in places else None
    return kwargs.get(name, args[place] if place is not None and place < len(args) else None)
