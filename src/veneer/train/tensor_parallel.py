"""A base of which each process computes a part of every matrix, by transformers' own plan for the
model (tensor parallelism). All processes see the same rows.

    column-wise   y_p = x W_pᵀ + s (x Aᵀ) B_pᵀ                rows p of W, of B, of the bias, of DoRA's magnitude
    row-wise      y = Σ_p [x_p W_pᵀ + s (x_p A_pᵀ) Bᵀ] + bias      columns p of W and of A: one sum, that of the base

The adapter is whole in each process, as without: a layer's call sees the part of it that belongs to
the process's part of W. So what a process has of a gradient is one term of a sum, in every
parameter of a layer that is cut, and that sum is taken where gradients are averaged anyway, once a
step (``Part``). Rejected: parts of A and B as parameters. A's gradient in a column-wise layer and
B's in a row-wise one would still be summed, and checkpoints, optimiser states and starts would have
to be put together and taken apart.

Layers whose input and output are whole by the plan (an embedding, a head, a fused projection that
transformers gathers) stay whole here. Base: Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.attach.adapted_module import state_of, with_values
from veneer.attach.change import Change
from veneer.attach.dtypes import is_float
from veneer.attach.layer_adapter import LayerAdapter
from veneer.distributed import is_sharded
from veneer.errors import ConfigError, listing
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Dims
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS
from veneer.variants.dora import gain_of, row_norms

#: what the plan calls a layer: how its weights are cut
COLUMNS, ROWS, EXPERTS, BETWEEN = "column-wise", "row-wise", "experts", "between"
STYLES = {
    "colwise": COLUMNS, "packed_colwise": COLUMNS, "rowwise": ROWS, "moe_tp_experts": EXPERTS,
    "replicated_with_grad_allreduce": BETWEEN,
}  # fmt: skip
#: of layers whose input and output are whole
WHOLE = {
    "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "embedding_rowwise",
    "embedding_colwise", "replicate",
}  # fmt: skip
#: parameters of a variant, by the side of ΔW on which they lie
SIDES = {"A": ROWS, "B": COLUMNS, "magnitude": COLUMNS}


class Cut(NamedTuple):
    """How one weight is cut: along ``axis``, counted from the end; ``kept`` [k] are the places that
    this process keeps of it."""

    how: str
    axis: int
    kept: Tensor


@dataclass(eq=False)
class CutLayer:
    """A layer of which this process computes a part, by ``how``. ``weights`` are the cuts of its
    own, by name; ``values`` what stands for its own parameters in a call, by their identity."""

    module: Any
    how: str
    weights: dict[str, Cut] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------ what is
# cut


def split(model: Any, device: torch.device) -> None:
    """Cut the matrices of a model with adapters by its plan, and put all else on ``device``, where
    the processes meet.

    Raises:
        ConfigError: transformers has no plan for the model, or one that is not understood; a number
            of processes that does not divide what is cut; an adapter that a cut layer cannot carry.
    """
    from torch.distributed.device_mesh import init_device_mesh

    layers = cut_layers(model, dist.get_world_size(), dist.get_rank())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    state = _Mesh(mesh.get_group(), mesh.size(), mesh.get_local_rank())
    for layer in layers:
        for name, cut in layer.weights.items():
            _keep_part(layer, name, cut, mesh, device)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if isinstance(value, nn.Parameter) and not is_sharded(value):
                    value.data = value.data.to(device)
                elif value is not None and not is_sharded(value):
                    table[name] = value.to(device)
    for layer in layers:
        layer.weights = {
            name: cut._replace(kept=cut.kept.to(device)) for name, cut in layer.weights.items()
        }
        layer.module.__dict__["forward"] = _forward_of(layer, state)


def cut_layers(model: Any, processes: int, rank: int) -> list[CutLayer]:
    """The layers that are cut, and how. Changes nothing; raises as ``split``."""
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    problems = [f"{style!r} in its plan" for style in sorted({*plan.values()} - {*STYLES} - WHOLE)]
    problems += _heads(model.config.get_text_config(), processes)
    layers = []
    for path, module in model.named_modules():
        if (how := STYLES.get(style_of(plan, path))) is None:
            continue
        layers.append(layer := CutLayer(module, how))
        for name, weight in module._parameters.items():
            style = style_of(plan, path, name)
            own = STYLES.get(style)
            if weight is None or own == BETWEEN or (own == ROWS and weight.ndim == 1):
                continue
            if own not in (COLUMNS, ROWS):
                problems.append(f"{path}.{name}, which its plan leaves out")
                continue
            axis = -1 if own == ROWS or weight.ndim == 1 else -2
            size, blocks = weight.shape[axis], 2 if style == "packed_colwise" else 1
            if size % (blocks * processes):
                problems.append(f"{size} {'inputs' if own == ROWS else 'outputs'} of {path}")
                continue
            kept = torch.arange(size).view(blocks, processes, -1)[:, rank]
            layer.weights[name] = Cut(own, axis, kept.flatten())
        problems += _misfits(path, layer)
    if not problems and not any(layer.weights for layer in layers):
        problems.append("no plan of transformers that cuts matrices")
    if problems:
        problem = (
            f"parallel tp over {processes} processes of {type(model).__name__}, with"
            f" {listing(problems)}"
        )
        do = "set parallel to fsdp or ddp"
        raise ConfigError(
            problem, "a model that transformers' plan cuts evenly, and adapters A, B", do
        )
    return layers


def style_of(plan: Mapping[str, str], path: str, name: str | None = None) -> str:
    """What a plan says of a module, or of its parameter ``name``: then what it says of that, if it
    does. Plans write ``*`` for numbers."""
    key = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return (plan.get(f"{key}.{name}") if name else None) or plan.get(key, "")


def _heads(config: Any, processes: int) -> Iterator[str]:
    """Attention is cut between heads."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % processes:
            yield f"{name} {heads}"


def _parts(module: nn.Module) -> Iterator[LayerAdapter]:
    """What each adapter does at a layer."""
    layer_state = state_of(module)
    return (
        iter(())
        if layer_state is None
        else (cast(LayerAdapter, part) for part in layer_state._modules.values())
    )


def _misfits(path: str, layer: CutLayer) -> Iterator[str]:
    """What an adapter does at a layer that is cut, and cannot."""
    for part in _parts(layer.module):
        if part.read_below or part.entries:
            yield f"{path}, of which other methods than forward read adapted weights"
        for name, change in part.changes.items():
            names = {*change._parameters, *change._buffers} - {*SIDES}
            resolves = (VARIANTS["lora"].resolve, VARIANTS["dora"].resolve)
            if names or change.variant.resolve not in resolves:
                yield f"variant {change.variant.name!r} at {path}"
            if (
                change.rows is not None
                or change.tokens is not None
                or change.frozen_input is not None
            ):
                yield f"an adapter of some rows of {path}"
            if (
                change.storage.name != "plain"
                or change.layer.out_axis
                or name not in (layer.weights or {name})
            ):
                yield f"{path}, whose {name} is no plain matrix [out, in]"
            if layer.how == EXPERTS and change.dropout:
                yield f"dropout at {path}: each process would drop the same places of its part"


def _keep_part(layer: CutLayer, name: str, cut: Cut, mesh: Any, device: torch.device) -> None:
    """Put this process's part of a weight in the place of all of it, as a DTensor: whoever needs
    the whole gathers."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    weight: Any = layer.module._parameters[name]
    own = (
        weight.detach().index_select(cut.axis % weight.ndim, cut.kept.to(weight.device)).to(device)
    )
    jumps = int((cut.kept.diff() != 1).sum()) if mesh.size() > 1 else 0
    axis = cut.axis % weight.ndim
    placement = _StridedShard(axis, split_factor=jumps + 1) if jumps else Shard(axis)
    whole = DTensor.from_local(
        own, mesh, [placement], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    whole = nn.Parameter(whole, requires_grad=False)
    layer.module._parameters[name] = whole
    layer.values[id(whole)] = nn.Parameter(own, requires_grad=False)


# ------------------------------------------------------------------------------------------ one
# call


class _Mesh:
    """The processes, and the input of column-wise layers that was seen last: those that read the
    same one share it, so that its gradients are added up before they travel."""

    def __init__(self, group: Any, count: int, rank: int) -> None:
        self.group, self.count, self.rank = group, count, rank
        self.seen: tuple[Tensor, Tensor] | None = None

    def enter(self, x: Any) -> Any:
        """A whole tensor that goes into a cut layer: its gradient is a sum over the processes."""
        if not (
            isinstance(x, Tensor) and is_float(x) and x.requires_grad and torch.is_grad_enabled()
        ):
            return x
        if self.seen is None or self.seen[0] is not x:
            self.seen = x, cast(Tensor, _SummedGradient.apply(x, self.group))
        return self.seen[1]

    def leave(self, y: Tensor) -> Tensor:
        self.seen = None
        return cast(Tensor, _Summed.apply(y, self.group))


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class Part(torch.autograd.Function):
    """The part ``kept`` (None: all) of a parameter that is whole in each process. What backward
    finds is one of ``n`` terms of its gradient; n times that, averaged over the processes, is their
    sum."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, axis: int, kept: Tensor | None, n: int) -> Tensor:
        ctx.shape, ctx.axis, ctx.kept, ctx.n = whole.shape, axis, kept, n
        return whole.view_as(whole) if kept is None else whole.index_select(axis, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient * ctx.n
        if ctx.kept is not None:
            gradient = gradient.new_zeros(ctx.shape).index_copy_(ctx.axis, ctx.kept, gradient)
        return gradient, None, None, None


def _forward_of(layer: CutLayer, mesh: _Mesh) -> Callable[..., Any]:
    """The forward of a layer that is cut: its class's own, or its adapter's, on the parts that
    belong to the process."""
    module = layer.module

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.how in (COLUMNS, EXPERTS):
            args = tuple(map(mesh.enter, args))
            kwargs = {name: mesh.enter(value) for name, value in kwargs.items()}
        with parts_in_place(layer, mesh):
            y = type(module).forward(module, *args, **kwargs)
        return mesh.leave(y) if layer.how in (ROWS, EXPERTS) else y

    return forward


@contextmanager
def parts_in_place(layer: CutLayer, mesh: Any) -> Iterator[None]:
    """A block in which a layer and its adapters hold this process's parts."""
    module, values = layer.module, dict(layer.values)
    modules, drops = [module], False
    with ExitStack() as stack:
        for part in _parts(module):
            values |= _full(part, layer, mesh)
            modules.append(part.full)
            for name, change in part.changes.items():
                values |= _factors(change, layer.weights.get(name), mesh)
                modules.append(change)
                drops = drops or bool(change.training and change.dropout)
                stack.enter_context(_as_part(change, layer.weights.get(name), mesh))
        bias = module._parameters.get("bias")
        if layer.how == ROWS and bias is not None and mesh.rank:
            values[id(bias)] = None  # added once: by the first process
        stack.enter_context(with_values(modules, values))
        stack.enter_context(_draws(mesh) if drops and layer.how == ROWS else nullcontext())
        yield


def _full(part: LayerAdapter, layer: CutLayer, mesh: Any) -> dict[int, Any]:
    """What stands for parameters that are trained in full."""
    values: dict[int, Any] = {}
    for name, value in part.full._parameters.items():
        if value is None:
            continue
        cut = layer.weights.get(name)
        # of a layer that has none of its own
        if cut is None and name == "bias" and layer.how == COLUMNS:
            cut = next(iter(layer.weights.values()))._replace(axis=-1)
        if layer.how == ROWS and name == "bias" and mesh.rank:
            values[id(value)] = torch.zeros_like(value)
        elif cut is None:
            values[id(value)] = Part.apply(value, 0, None, mesh.count)
        else:
            values[id(value)] = Part.apply(value, cut.axis % value.ndim, cut.kept, mesh.count)
    return values


def _factors(change: Change, cut: Cut | None, mesh: Any) -> dict[int, Any]:
    """What stands for the parameters of a change: A [g, r, in], B [g, out, r], magnitude [g ·
    out]."""
    values: dict[int, Any] = {}
    tables: Mapping[str, Any] = {**change._parameters, **change._buffers}
    for name, value in tables.items():
        kept = cut.kept if cut is not None and SIDES[name] == cut.how else None
        if name == "magnitude":
            grouped = value.view(change.dims.groups, -1)
            values[id(value)] = cast(Tensor, Part.apply(grouped, 1, kept, mesh.count)).flatten()
        else:
            values[id(value)] = Part.apply(value, 2 if name == "A" else 1, kept, mesh.count)
    return values


@contextmanager
def _as_part(change: Change, cut: Cut | None, mesh: Any) -> Iterator[None]:
    """A block in which a change is that of a part of its weight."""
    if cut is None:
        yield
        return
    dims, variant = change.dims, change.variant
    size = len(cut.kept)
    groups, out, in_ = dims
    change.dims = Dims(groups, out, size) if cut.how == ROWS else Dims(groups, size, in_)
    if cut.how == ROWS and variant.resolve is VARIANTS["dora"].resolve:
        change.variant = replace(variant, resolve=_dora_of(mesh.group))
    try:
        yield
    finally:
        change.dims, change.variant = dims, variant


def _dora_of(group: Any) -> Callable[..., Any]:
    """DoRA where each process has some columns of W: the norm of a row is known once all have said
    theirs, one number an output."""

    def resolve(parameters: Mapping[str, Tensor], scale: float, base: Callable[[], Tensor]) -> Any:
        low = LowRank(parameters["A"], parameters["B"], scale)
        squares = row_norms(base(), low).square()
        dist.all_reduce(squares, group=group)
        return low, gain_of(parameters["magnitude"], squares.sqrt())

    return resolve


@contextmanager
def _draws(mesh: Any) -> Iterator[None]:
    """A block in which each process draws other numbers: it drops places of another part of the
    input. After it, all go on with the same ones, of which whole inputs are dropped."""
    own = (new_seed() + mesh.rank) % 2**62
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(own)
        yield
