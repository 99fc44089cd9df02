"""Tensor parallelism: each process computes a shard of every matrix, by transformers' plan for the
model. All processes compute the same rows of a batch.

    column-wise   y_p = x W_pᵀ + s (x Aᵀ) B_pᵀ
                  rows p of W, of B, of the bias, of DoRA's magnitude
    row-wise      y = Σ_p [x_p W_pᵀ + s (x_p A_pᵀ) Bᵀ] + bias
                  columns p of W and of A; the sum over p is the one that the base needs anyway

p: a process; W_p: the rows or columns of W that process p keeps; s: the adapter's scale.

Each process holds the full adapter. A call of a layer uses the shard of the adapter that belongs to
the process's shard of W. So each process computes one term of the gradient of A, B and the other
parameters of the layer. The terms are summed once per step, when gradients are averaged over the
processes anyway (``TakeShard``). Rejected: shards of A and B as parameters. The gradient of A in a
column-wise layer, and of B in a row-wise layer, would still need a sum, and checkpoints, optimiser
states and initial values would have to be split and joined.

A layer is not cut if its input and output are complete in each process by the plan: an embedding, a
head, or a fused projection that transformers gathers. Shoeybi et al. 2019, "Megatron-LM",
arXiv:1909.08053.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.attach import Change, LayerAdapter, replaced_tensors, state_of
from veneer.distributed import is_sharded
from veneer.errors import ConfigError, listing
from veneer.kernels.dropout import new_seed
from veneer.layers import Dims
from veneer.lowrank import LowRank
from veneer.variants import VARIANTS
from veneer.variants.dora import gain_of, row_norms

#: The partitions: how the weights of a layer are cut. EXPERTS: stacked experts; the plan gives the
#: partition of each weight. BETWEEN: a layer between a column-wise and a row-wise one, such as a
#: norm of queries; its weights are not cut, but it computes on a shard.
COLUMN_WISE, ROW_WISE, EXPERTS, BETWEEN = "column-wise", "row-wise", "experts", "between"
#: the partition of each style in transformers' plans
PARTITION_BY_STYLE = {
    "colwise": COLUMN_WISE, "packed_colwise": COLUMN_WISE, "rowwise": ROW_WISE,
    "moe_tp_experts": EXPERTS, "replicated_with_grad_allreduce": BETWEEN,
}  # fmt: skip
#: styles of layers that are not cut, because their input and output are complete in each process
UNCUT_STYLES = {
    "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "embedding_rowwise", "embedding_colwise", "replicate",
}  # fmt: skip
#: by parameter of a variant, the partition in which it is cut, because A belongs to the inputs of
#: the layer, and B and the magnitude belong to its outputs
PARTITION_BY_PARAMETER = {"A": ROW_WISE, "B": COLUMN_WISE, "magnitude": COLUMN_WISE}


class Cut(NamedTuple):
    """The shard of a weight that this process keeps: the rows or columns ``indices`` [k] along
    ``axis``, which is negative (counted from the end). ``partition``: as in
    ``PARTITION_BY_STYLE``."""

    partition: str
    axis: int
    indices: Tensor


@dataclass(eq=False)
class CutLayer:
    """A layer of which this process computes a shard.

    Fields:
        partition: how the layer is cut, as in ``PARTITION_BY_STYLE``.
        cuts: the cuts of the layer's weights, by name.
        local_values: the local tensors that replace the layer's parameters in a call, by the id of
            the parameter.
    """

    module: Any
    partition: str
    cuts: dict[str, Cut] = field(default_factory=dict)
    local_values: dict[int, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------ cut a model


def cut_model(model: Any, device: torch.device) -> None:
    """Cut the matrices of a model with adapters by its plan, and move all other tensors to
    ``device``, on which the processes communicate.

    Raises:
        ConfigError: transformers has no plan for the model, or a plan with an unknown style; the
            number of processes does not divide a size that is cut; or a cut layer does not support
            its adapter.
    """
    from torch.distributed.device_mesh import init_device_mesh

    layers = cut_layers(model, dist.get_world_size(), dist.get_rank())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallel_group = _ParallelGroup(mesh.get_group(), mesh.size(), mesh.get_local_rank())
    for layer in layers:
        for name, cut in layer.cuts.items():
            _keep_shard(layer, name, cut, mesh, device)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if isinstance(value, nn.Parameter) and not is_sharded(value):
                    value.data = value.data.to(device)
                elif value is not None and not is_sharded(value):
                    tensors[name] = value.to(device)
    for layer in layers:
        layer.cuts = {
            name: cut._replace(indices=cut.indices.to(device)) for name, cut in layer.cuts.items()
        }
        layer.module.__dict__["forward"] = _forward_of(layer, parallel_group)


def cut_layers(model: Any, process_count: int, rank: int) -> list[CutLayer]:
    """The layers of the model that are cut, with their cuts for process ``rank``. Does not change
    the model. Raises ``ConfigError`` as ``cut_model`` does."""
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    unknown_styles = {*plan.values()} - {*PARTITION_BY_STYLE} - UNCUT_STYLES
    problems = [f"{style!r} in its plan" for style in sorted(unknown_styles)]
    problems += _indivisible_heads(model.config.get_text_config(), process_count)
    layers = []
    for path, module in model.named_modules():
        if (partition := PARTITION_BY_STYLE.get(style_of(plan, path))) is None:
            continue
        layers.append(layer := CutLayer(module, partition))
        for name, weight in module._parameters.items():
            style = style_of(plan, path, name)
            weight_partition = PARTITION_BY_STYLE.get(style)
            if weight is None or weight_partition == BETWEEN:
                continue
            if weight_partition == ROW_WISE and weight.ndim == 1:
                continue
            if weight_partition not in (COLUMN_WISE, ROW_WISE):
                problems.append(f"{path}.{name}, which its plan leaves out")
                continue
            axis = -1 if weight_partition == ROW_WISE or weight.ndim == 1 else -2
            axis_size, matrix_count = weight.shape[axis], 2 if style == "packed_colwise" else 1
            if axis_size % (matrix_count * process_count):
                axis_name = "inputs" if weight_partition == ROW_WISE else "outputs"
                problems.append(f"{axis_size} {axis_name} of {path}")
                continue
            indices = torch.arange(axis_size).view(matrix_count, process_count, -1)[:, rank]
            layer.cuts[name] = Cut(weight_partition, axis, indices.flatten())
        problems += _unsupported_adapters(path, layer)
    if not problems and not any(layer.cuts for layer in layers):
        problems.append("no plan of transformers that cuts matrices")
    if problems:
        raise ConfigError(
            f"parallel tp over {process_count} processes of {type(model).__name__}, with"
            f" {listing(problems)}",
            "a model that transformers' plan cuts evenly, and adapters A, B",
            "set parallel to fsdp or ddp",
        )
    return layers


def style_of(plan: Mapping[str, str], path: str, name: str | None = None) -> str:
    """The plan's style for the parameter ``name`` of the module at ``path``, or else for the
    module; "" if the plan has neither. Plans write ``*`` for the numbers in a path."""
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return (plan.get(f"{pattern}.{name}") if name else None) or plan.get(pattern, "")


def _indivisible_heads(config: Any, process_count: int) -> Iterator[str]:
    """Texts for the error, for numbers of attention heads that ``process_count`` does not divide:
    attention can only be cut between heads."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % process_count:
            yield f"{name} {heads}"


def _layer_adapters(module: nn.Module) -> Iterator[LayerAdapter]:
    """The adapters of a layer."""
    layer_state = state_of(module)
    if layer_state is not None:
        yield from (cast(LayerAdapter, adapter) for adapter in layer_state._modules.values())


def _unsupported_adapters(path: str, layer: CutLayer) -> Iterator[str]:
    """Texts for the error, for adapters of a cut layer that tensor parallelism does not support."""
    for adapter in _layer_adapters(layer.module):
        if adapter.submodule_adapters or adapter.submodule_adapters_by_method:
            yield f"{path}, of which other methods than forward read adapted weights"
        for name, change in adapter.changes.items():
            unknown_parameters = {*change._parameters, *change._buffers} - {*PARTITION_BY_PARAMETER}
            supported_resolves = (VARIANTS["lora"].resolve, VARIANTS["dora"].resolve)
            problems = {
                f"variant {change.variant.name!r} at {path}": (
                    unknown_parameters or change.variant.resolve not in supported_resolves
                ),
                f"an adapter of some rows of {path}": (
                    change.rows is not None
                    or change.tokens is not None
                    or change.frozen_input is not None
                ),
                f"{path}, whose {name} is no plain matrix [out, in]": (
                    change.storage.name != "plain"
                    or change.layer.out_axis
                    or name not in (layer.cuts or {name})
                ),
                f"dropout at {path}: each process would drop the same places of its part": (
                    layer.partition == EXPERTS and change.dropout
                ),
            }
            yield from (problem for problem, applies in problems.items() if applies)


def _keep_shard(layer: CutLayer, name: str, cut: Cut, mesh: Any, device: torch.device) -> None:
    """Replace a weight by a DTensor that holds this process's shard. Code that reads the full
    weight can gather it."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import _StridedShard

    weight: Any = layer.module._parameters[name]
    axis = cut.axis % weight.ndim
    local_weight = weight.detach().index_select(axis, cut.indices.to(weight.device)).to(device)
    gap_count = int((cut.indices.diff() != 1).sum()) if mesh.size() > 1 else 0
    placement = (
        _StridedShard(axis, split_factor=gap_count + 1) if gap_count else ShardPlacement(axis)
    )
    sharded_weight = DTensor.from_local(
        local_weight, mesh, [placement], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    parameter = nn.Parameter(sharded_weight, requires_grad=False)
    layer.module._parameters[name] = parameter
    layer.local_values[id(parameter)] = nn.Parameter(local_weight, requires_grad=False)


# ------------------------------------------------------------------------------ call a cut layer


class _ParallelGroup:
    """The group of processes of a cut model, and the last input of a column-wise layer. Column-wise
    layers with the same input share one node of the autograd graph, so that their gradients are
    added before the all-reduce."""

    def __init__(self, group: Any, count: int, rank: int) -> None:
        self.group, self.count, self.rank = group, count, rank
        #: the last input, and the tensor that replaces it in the autograd graph
        self.last_input: tuple[Tensor, Tensor] | None = None

    def sum_gradient_of(self, x: Any) -> Any:
        """Return an input of a cut layer so that backward sums its gradient over the processes."""
        if not (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and x.requires_grad
            and torch.is_grad_enabled()
        ):
            return x
        if self.last_input is None or self.last_input[0] is not x:
            self.last_input = x, cast(Tensor, _SumGradientOverProcesses.apply(x, self.group))
        return self.last_input[1]

    def sum_output(self, y: Tensor) -> Tensor:
        """Sum the output of a row-wise layer over the processes."""
        self.last_input = None
        return cast(Tensor, _SumOverProcesses.apply(y, self.group))


class _SumGradientOverProcesses(torch.autograd.Function):
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


class _SumOverProcesses(torch.autograd.Function):
    """The sum over the processes, with the identity as its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class TakeShard(torch.autograd.Function):
    """The shard at ``indices`` along ``axis`` of a parameter that each process holds in full; with
    ``indices`` None, the full parameter. The incoming gradient is one of ``process_count`` terms,
    one per process. Backward multiplies it by ``process_count``, so that the later average over the
    processes is the sum of the terms."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, axis: int, indices: Tensor | None, process_count: int
    ) -> Tensor:
        ctx.shape, ctx.axis, ctx.indices = parameter.shape, axis, indices
        ctx.process_count = process_count
        if indices is None:
            return parameter.view_as(parameter)
        return parameter.index_select(axis, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient * ctx.process_count
        if ctx.indices is not None:
            gradient = gradient.new_zeros(ctx.shape).index_copy_(ctx.axis, ctx.indices, gradient)
        return gradient, None, None, None


def _forward_of(layer: CutLayer, parallel_group: _ParallelGroup) -> Callable[..., Any]:
    """The forward of a cut layer: the forward of its class, on the shards of this process."""
    module = layer.module

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.partition in (COLUMN_WISE, EXPERTS):
            args = tuple(map(parallel_group.sum_gradient_of, args))
            kwargs = {name: parallel_group.sum_gradient_of(value) for name, value in kwargs.items()}
        with use_local_shards(layer, parallel_group):
            y = type(module).forward(module, *args, **kwargs)
        return parallel_group.sum_output(y) if layer.partition in (ROW_WISE, EXPERTS) else y

    return forward


@contextmanager
def use_local_shards(layer: CutLayer, parallel_group: Any) -> Iterator[None]:
    """A context in which a layer and its adapters hold the shards of this process."""
    module, local_values = layer.module, dict(layer.local_values)
    modules, has_dropout = [module], False
    with ExitStack() as stack:
        for adapter in _layer_adapters(module):
            local_values |= _shards_of_full_parameters(adapter, layer, parallel_group)
            modules.append(adapter.full)
            for name, change in adapter.changes.items():
                local_values |= _shards_of_change(change, layer.cuts.get(name), parallel_group)
                modules.append(change)
                has_dropout = has_dropout or bool(change.training and change.dropout)
                stack.enter_context(_with_local_dims(change, layer.cuts.get(name), parallel_group))
        bias = module._parameters.get("bias")
        if layer.partition == ROW_WISE and bias is not None and parallel_group.rank:
            local_values[id(bias)] = None  # only the first process adds it
        stack.enter_context(replaced_tensors(modules, local_values))
        if has_dropout and layer.partition == ROW_WISE:
            stack.enter_context(_local_seed(parallel_group))
        yield


def _shards_of_full_parameters(
    adapter: LayerAdapter, layer: CutLayer, parallel_group: Any
) -> dict[int, Any]:
    """The shards of the parameters that an adapter trains in full, by the id of the parameter."""
    local_values: dict[int, Any] = {}
    for name, value in adapter.full._parameters.items():
        if value is None:
            continue
        cut = layer.cuts.get(name)
        # a bias that the adapter adds to a layer without one is cut like the outputs
        if cut is None and name == "bias" and layer.partition == COLUMN_WISE:
            cut = next(iter(layer.cuts.values()))._replace(axis=-1)
        if layer.partition == ROW_WISE and name == "bias" and parallel_group.rank:
            local_values[id(value)] = torch.zeros_like(value)
        elif cut is None:
            local_values[id(value)] = TakeShard.apply(value, 0, None, parallel_group.count)
        else:
            local_values[id(value)] = TakeShard.apply(
                value, cut.axis % value.ndim, cut.indices, parallel_group.count
            )
    return local_values


def _shards_of_change(change: Change, cut: Cut | None, parallel_group: Any) -> dict[int, Any]:
    """The shards of the parameters of a change, by the id of the parameter. The full parameters are
    A [g, r, in], B [g, out, r] and magnitude [g · out], with g: matrices in the weight, 1 for a
    linear layer; r: rank."""
    local_values: dict[int, Any] = {}
    tensors: Mapping[str, Any] = {**change._parameters, **change._buffers}
    for name, value in tensors.items():
        indices = (
            cut.indices
            if cut is not None and PARTITION_BY_PARAMETER[name] == cut.partition
            else None
        )
        if name == "magnitude":
            grouped_magnitude = value.view(change.dims.groups, -1)
            local_values[id(value)] = cast(
                Tensor, TakeShard.apply(grouped_magnitude, 1, indices, parallel_group.count)
            ).flatten()
        else:
            local_values[id(value)] = TakeShard.apply(
                value, 2 if name == "A" else 1, indices, parallel_group.count
            )
    return local_values


@contextmanager
def _with_local_dims(change: Change, cut: Cut | None, parallel_group: Any) -> Iterator[None]:
    """A context in which a change has the dimensions of the process's shard of the weight."""
    if cut is None:
        yield
        return
    dims, variant = change.dims, change.variant
    local_size = len(cut.indices)
    groups, out, in_ = dims
    change.dims = (
        Dims(groups, out, local_size)
        if cut.partition == ROW_WISE
        else Dims(groups, local_size, in_)
    )
    if cut.partition == ROW_WISE and variant.resolve is VARIANTS["dora"].resolve:
        change.variant = replace(variant, resolve=_dora_resolve(parallel_group.group))
    try:
        yield
    finally:
        change.dims, change.variant = dims, variant


def _dora_resolve(group: Any) -> Callable[..., Any]:
    """``resolve`` of the variant DoRA for a process that holds some columns of W. It sums the
    squared row norms over the processes, one number per output."""

    def resolve(parameters: Mapping[str, Tensor], scale: float, base: Callable[[], Tensor]) -> Any:
        low_rank = LowRank(parameters["A"], parameters["B"], scale)
        squared_norms = row_norms(base(), low_rank).square()
        dist.all_reduce(squared_norms, group=group)
        return low_rank, gain_of(parameters["magnitude"], squared_norms.sqrt())

    return resolve


@contextmanager
def _local_seed(parallel_group: Any) -> Iterator[None]:
    """A context with a different random stream in each process, for dropout on shards of an input.
    After the context, all processes continue their common stream, so that dropout on full inputs is
    equal in all."""
    local_seed = (new_seed() + parallel_group.rank) % 2**62
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(local_seed)
        yield
