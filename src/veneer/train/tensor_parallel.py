"""Tensor parallelism: each process computes a shard of every matrix, by transformers' plan for the
model. All processes see the same rows.

    column-wise   y_p = x W_pᵀ + s (x Aᵀ) B_pᵀ
                  rows p of W, of B, of the bias, of DoRA's magnitude
    row-wise      y = Σ_p [x_p W_pᵀ + s (x_p A_pᵀ) Bᵀ] + bias
                  columns p of W and of A: one sum, as for the base alone

Each process holds the full adapter, and a layer's call uses the shard of it that belongs to the
process's shard of W. In every parameter of a cut layer, the gradient in a process is therefore one
term of a sum. The sum is taken once per step, where gradients are averaged anyway (``Shard``).
Rejected: shards of A and B as parameters. The gradient of A in a column-wise layer and of B in a
row-wise layer would still need a sum, and checkpoints, optimiser states and initial values would
have to be split and joined.

Layers with full input and output in the plan (an embedding, a head, a fused projection that
transformers gathers) are not cut. Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.
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

from veneer.attach import Change, LayerAdapter, state_of, with_values
from veneer.distributed import is_sharded
from veneer.errors import ConfigError, listing
from veneer.kernels.dropout import seed as new_seed
from veneer.layers import Dims
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS
from veneer.variants.dora import gain_of, row_norms

#: how the weights of a layer are cut, by the plan's name for its style
COLUMNS, ROWS, EXPERTS, BETWEEN = "column-wise", "row-wise", "experts", "between"
STYLES = {
    "colwise": COLUMNS, "packed_colwise": COLUMNS, "rowwise": ROWS, "moe_tp_experts": EXPERTS,
    "replicated_with_grad_allreduce": BETWEEN,
}  # fmt: skip
#: styles of layers with full input and output, which are not cut
UNCUT = {
    "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "embedding_rowwise", "embedding_colwise", "replicate",
}  # fmt: skip
#: how the parameters of a variant are cut, by the side of ΔW to which they belong
SIDES = {"A": ROWS, "B": COLUMNS, "magnitude": COLUMNS}


class Cut(NamedTuple):
    """How one weight is cut: along ``axis``, counted from the end. ``indices`` [k] are the rows or
    columns that this process keeps."""

    how: str
    axis: int
    indices: Tensor


@dataclass(eq=False)
class CutLayer:
    """A layer of which this process computes a shard, cut by ``how``. ``weights``: the cuts of the
    layer's weights, by name. ``values``: the local tensors that replace its parameters in a call,
    by the id of the parameter."""

    module: Any
    how: str
    weights: dict[str, Cut] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------ cut a model


def split(model: Any, device: torch.device) -> None:
    """Cut the matrices of a model with adapters by its plan, and move all other tensors to
    ``device``, on which the processes communicate.

    Raises:
        ConfigError: transformers has no plan for the model, or one with an unknown style; the
            number of processes does not divide a size that is cut; a cut layer does not support its
            adapter.
    """
    from torch.distributed.device_mesh import init_device_mesh

    layers = cut_layers(model, dist.get_world_size(), dist.get_rank())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    state = _Mesh(mesh.get_group(), mesh.size(), mesh.get_local_rank())
    for layer in layers:
        for name, cut in layer.weights.items():
            _keep_shard(layer, name, cut, mesh, device)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if isinstance(value, nn.Parameter) and not is_sharded(value):
                    value.data = value.data.to(device)
                elif value is not None and not is_sharded(value):
                    table[name] = value.to(device)
    for layer in layers:
        layer.weights = {
            name: cut._replace(indices=cut.indices.to(device))
            for name, cut in layer.weights.items()
        }
        layer.module.__dict__["forward"] = _forward_of(layer, state)


def cut_layers(model: Any, processes: int, rank: int) -> list[CutLayer]:
    """The layers to cut, with their cuts. Does not change the model; raises as ``split``."""
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    problems = [f"{style!r} in its plan" for style in sorted({*plan.values()} - {*STYLES} - UNCUT)]
    problems += _heads(model.config.get_text_config(), processes)
    layers = []
    for path, module in model.named_modules():
        if (how := STYLES.get(style_of(plan, path))) is None:
            continue
        layers.append(layer := CutLayer(module, how))
        for name, weight in module._parameters.items():
            style = style_of(plan, path, name)
            weight_cut = STYLES.get(style)
            if weight is None or weight_cut == BETWEEN:
                continue
            if weight_cut == ROWS and weight.ndim == 1:
                continue
            if weight_cut not in (COLUMNS, ROWS):
                problems.append(f"{path}.{name}, which its plan leaves out")
                continue
            axis = -1 if weight_cut == ROWS or weight.ndim == 1 else -2
            size, blocks = weight.shape[axis], 2 if style == "packed_colwise" else 1
            if size % (blocks * processes):
                problems.append(f"{size} {'inputs' if weight_cut == ROWS else 'outputs'} of {path}")
                continue
            indices = torch.arange(size).view(blocks, processes, -1)[:, rank]
            layer.weights[name] = Cut(weight_cut, axis, indices.flatten())
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
    """The plan's style for a module, or for its parameter ``name`` if the plan has one; "" if
    neither is in the plan. Plans write ``*`` for numbers."""
    key = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return (plan.get(f"{key}.{name}") if name else None) or plan.get(key, "")


def _heads(config: Any, processes: int) -> Iterator[str]:
    """Problems with cutting attention, which is only possible between heads."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % processes:
            yield f"{name} {heads}"


def _layer_adapters(module: nn.Module) -> Iterator[LayerAdapter]:
    """The adapters of a layer."""
    layer_state = state_of(module)
    if layer_state is not None:
        yield from (cast(LayerAdapter, adapter) for adapter in layer_state._modules.values())


def _misfits(path: str, layer: CutLayer) -> Iterator[str]:
    """Problems with adapters that a cut layer does not support."""
    for adapter in _layer_adapters(layer.module):
        if adapter.read_below or adapter.read_below_by_method:
            yield f"{path}, of which other methods than forward read adapted weights"
        for name, change in adapter.changes.items():
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


def _keep_shard(layer: CutLayer, name: str, cut: Cut, mesh: Any, device: torch.device) -> None:
    """Replace a weight by a DTensor of which this process holds its shard. A reader of the full
    weight can gather it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import _StridedShard

    weight: Any = layer.module._parameters[name]
    axis = cut.axis % weight.ndim
    local = weight.detach().index_select(axis, cut.indices.to(weight.device)).to(device)
    jumps = int((cut.indices.diff() != 1).sum()) if mesh.size() > 1 else 0
    placement = _StridedShard(axis, split_factor=jumps + 1) if jumps else ShardPlacement(axis)
    sharded = DTensor.from_local(
        local, mesh, [placement], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    parameter = nn.Parameter(sharded, requires_grad=False)
    layer.module._parameters[name] = parameter
    layer.values[id(parameter)] = nn.Parameter(local, requires_grad=False)


# ------------------------------------------------------------------------------ call a cut layer


class _Mesh:
    """The processes, and the last input of a column-wise layer. Layers with the same input share
    one entry of the graph, so that their gradients are added before the all-reduce."""

    def __init__(self, group: Any, count: int, rank: int) -> None:
        self.group, self.count, self.rank = group, count, rank
        #: the last input, and the tensor that stands for it in the graph
        self.last_input: tuple[Tensor, Tensor] | None = None

    def enter(self, x: Any) -> Any:
        """An input of a cut layer: the backward sums its gradient over the processes."""
        if not (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.requires_grad
            and torch.is_grad_enabled()
        ):
            return x
        if self.last_input is None or self.last_input[0] is not x:
            self.last_input = x, cast(Tensor, _SummedGradient.apply(x, self.group))
        return self.last_input[1]

    def leave(self, y: Tensor) -> Tensor:
        """The output of a row-wise layer: the sum over the processes."""
        self.last_input = None
        return cast(Tensor, _Summed.apply(y, self.group))


class _SummedGradient(torch.autograd.Function):
    """The identity, with a gradient that is summed over the processes."""

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
    """The sum over the processes, with the identity as its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class Shard(torch.autograd.Function):
    """The shard at ``indices`` (None: all) of a parameter that each process holds in full. The
    incoming gradient is one of ``n`` terms, one per process. Backward multiplies it by n, so that
    the later average over the processes is the sum of the terms."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, axis: int, indices: Tensor | None, n: int) -> Tensor:
        ctx.shape, ctx.axis, ctx.indices, ctx.n = parameter.shape, axis, indices, n
        if indices is None:
            return parameter.view_as(parameter)
        return parameter.index_select(axis, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient * ctx.n
        if ctx.indices is not None:
            gradient = gradient.new_zeros(ctx.shape).index_copy_(ctx.axis, ctx.indices, gradient)
        return gradient, None, None, None


def _forward_of(layer: CutLayer, mesh: _Mesh) -> Callable[..., Any]:
    """The forward of a cut layer: the forward of its class, on the shards of this process."""
    module = layer.module

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.how in (COLUMNS, EXPERTS):
            args = tuple(map(mesh.enter, args))
            kwargs = {name: mesh.enter(value) for name, value in kwargs.items()}
        with shards_in_place(layer, mesh):
            y = type(module).forward(module, *args, **kwargs)
        return mesh.leave(y) if layer.how in (ROWS, EXPERTS) else y

    return forward


@contextmanager
def shards_in_place(layer: CutLayer, mesh: Any) -> Iterator[None]:
    """A block in which a layer and its adapters hold the shards of this process."""
    module, values = layer.module, dict(layer.values)
    modules, drops = [module], False
    with ExitStack() as stack:
        for adapter in _layer_adapters(module):
            values |= _shards_of_full_parameters(adapter, layer, mesh)
            modules.append(adapter.full)
            for name, change in adapter.changes.items():
                values |= _shards_of_change(change, layer.weights.get(name), mesh)
                modules.append(change)
                drops = drops or bool(change.training and change.dropout)
                stack.enter_context(_with_local_dims(change, layer.weights.get(name), mesh))
        bias = module._parameters.get("bias")
        if layer.how == ROWS and bias is not None and mesh.rank:
            values[id(bias)] = None  # only the first process adds it
        stack.enter_context(with_values(modules, values))
        stack.enter_context(_local_seed(mesh) if drops and layer.how == ROWS else nullcontext())
        yield


def _shards_of_full_parameters(adapter: LayerAdapter, layer: CutLayer, mesh: Any) -> dict[int, Any]:
    """Shards of the parameters that an adapter trains in full, by the id of the parameter."""
    values: dict[int, Any] = {}
    for name, value in adapter.full._parameters.items():
        if value is None:
            continue
        cut = layer.weights.get(name)
        # a bias that the base's layer lacks
        if cut is None and name == "bias" and layer.how == COLUMNS:
            cut = next(iter(layer.weights.values()))._replace(axis=-1)
        if layer.how == ROWS and name == "bias" and mesh.rank:
            values[id(value)] = torch.zeros_like(value)
        elif cut is None:
            values[id(value)] = Shard.apply(value, 0, None, mesh.count)
        else:
            values[id(value)] = Shard.apply(value, cut.axis % value.ndim, cut.indices, mesh.count)
    return values


def _shards_of_change(change: Change, cut: Cut | None, mesh: Any) -> dict[int, Any]:
    """Shards of the parameters of a change, by the id of the parameter: A [g, r, in], B [g, out,
    r], magnitude [g · out]."""
    values: dict[int, Any] = {}
    tables: Mapping[str, Any] = {**change._parameters, **change._buffers}
    for name, value in tables.items():
        indices = cut.indices if cut is not None and SIDES[name] == cut.how else None
        if name == "magnitude":
            grouped = value.view(change.dims.groups, -1)
            values[id(value)] = cast(Tensor, Shard.apply(grouped, 1, indices, mesh.count)).flatten()
        else:
            values[id(value)] = Shard.apply(value, 2 if name == "A" else 1, indices, mesh.count)
    return values


@contextmanager
def _with_local_dims(change: Change, cut: Cut | None, mesh: Any) -> Iterator[None]:
    """A block in which a change has the dimensions of the process's shard of the weight."""
    if cut is None:
        yield
        return
    dims, variant = change.dims, change.variant
    size = len(cut.indices)
    groups, out, in_ = dims
    change.dims = Dims(groups, out, size) if cut.how == ROWS else Dims(groups, size, in_)
    if cut.how == ROWS and variant.resolve is VARIANTS["dora"].resolve:
        change.variant = replace(variant, resolve=_dora_resolve(mesh.group))
    try:
        yield
    finally:
        change.dims, change.variant = dims, variant


def _dora_resolve(group: Any) -> Callable[..., Any]:
    """``resolve`` of DoRA for a process that holds some columns of W: the squared row norms are
    summed over the processes, one number per output."""

    def resolve(parameters: Mapping[str, Tensor], scale: float, base: Callable[[], Tensor]) -> Any:
        low = LowRank(parameters["A"], parameters["B"], scale)
        squares = row_norms(base(), low).square()
        dist.all_reduce(squares, group=group)
        return low, gain_of(parameters["magnitude"], squares.sqrt())

    return resolve


@contextmanager
def _local_seed(mesh: Any) -> Iterator[None]:
    """A block with a different random stream in each process, for dropout on shards of an input.
    After it, all processes continue the common stream, for dropout on full inputs."""
    local_seed = (new_seed() + mesh.rank) % 2**62
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(local_seed)
        yield
