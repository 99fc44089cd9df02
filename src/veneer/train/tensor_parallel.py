"""Tensor parallelism: each process multiplies by its shard of every matrix, as transformers' plan
for the model says. All processes compute the same rows of a batch.

    column-wise   y_p = x W_pᵀ + s (x Aᵀ) B_pᵀ
                  process p keeps some rows of W, and uses those rows of B, of the bias and of
                  DoRA's magnitude; its output y_p has some of the features of y
    row-wise      y = Σ_p [x_p W_pᵀ + s (x_p A_pᵀ) Bᵀ] + bias
                  process p keeps some columns of W, and uses those columns of A; its input x_p has
                  some of the features of x; the base needs the sum over p anyway

W [out, in]; A [r, in] and B [out, r] of rank r; s: the adapter's scale.

Each process holds the full adapter. A call of a layer uses the shard of the adapter that belongs to
the process's shard of W. So each process computes one term of the gradient of A, B and the other
parameters of the layer. The terms are summed once per step, when gradients are averaged over the
processes anyway (``TakeShard``). Rejected: shards of A and B as parameters. The gradient of A in a
column-wise layer, and of B in a row-wise layer, would still need a sum, and checkpoints, optimiser
states and initial values would have to be split and joined.

A layer is not cut if, by the plan, each process has its complete input and output: an embedding, a
head, or a fused projection whose output transformers gathers. Shoeybi et al. 2019, "Megatron-LM",
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

#: The partitions: how the weights of a layer are cut. EXPERTS: a module of stacked experts, for
#: which the plan gives the partition of each weight. BETWEEN: a layer between a column-wise and a
#: row-wise one, such as a norm of queries; its weights are not cut, but its input is a shard.
COLUMN_WISE, ROW_WISE, EXPERTS, BETWEEN = "column-wise", "row-wise", "experts", "between"
#: the partition of each style (the name that transformers' plans give to a way to cut a layer)
PARTITION_BY_STYLE = {
    "colwise": COLUMN_WISE, "packed_colwise": COLUMN_WISE, "rowwise": ROW_WISE,
    "moe_tp_experts": EXPERTS, "replicated_with_grad_allreduce": BETWEEN,
}  # fmt: skip
#: styles of layers that are not cut, because their input and output are complete in each process
UNCUT_STYLES = {
    "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "embedding_rowwise", "embedding_colwise", "replicate",
}  # fmt: skip
#: For each parameter of a LoRA or DoRA adapter, the partition in which it is cut; in the other it
#: stays complete. A has one column per input of the layer, B and the magnitude one row per output.
PARTITION_BY_PARAMETER = {"A": ROW_WISE, "B": COLUMN_WISE, "magnitude": COLUMN_WISE}


class Cut(NamedTuple):
    """The shard of a weight that this process keeps.

    Fields:
        partition: COLUMN_WISE or ROW_WISE.
        axis: the axis that is cut, counted from the end (-2: rows; -1: columns, or the elements of
            a bias).
        indices: the indices along ``axis`` that this process keeps.
    """

    partition: str
    axis: int
    indices: Tensor


@dataclass(eq=False)
class CutLayer:
    """A layer of which this process computes a shard.

    Fields:
        partition: how the layer is cut: COLUMN_WISE, ROW_WISE, EXPERTS or BETWEEN.
        cuts: the cut of each weight of the layer that is cut, by the weight's name.
        local_values: by the ``id`` of each sharded parameter (a DTensor), the plain tensor of this
            process's shard, which replaces the parameter during a call.
    """

    module: Any
    partition: str
    cuts: dict[str, Cut] = field(default_factory=dict)
    local_values: dict[int, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------ cut a model


def cut_model(model: Any, device: torch.device) -> None:
    """Cut the matrices of a model with adapters in place, as transformers' plan for the model says:
    each cut weight becomes a DTensor, and the forward of each cut layer computes on shards. All
    tensors are moved to ``device``, on which the processes communicate.

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
        for tensor_name, cut in layer.cuts.items():
            _keep_shard(layer, tensor_name, cut, mesh, device)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor_name, value in tensors.items():
                if isinstance(value, nn.Parameter) and not is_sharded(value):
                    value.data = value.data.to(device)
                elif value is not None and not is_sharded(value):
                    tensors[tensor_name] = value.to(device)
    for layer in layers:
        layer.cuts = {
            tensor_name: cut._replace(indices=cut.indices.to(device))
            for tensor_name, cut in layer.cuts.items()
        }
        layer.module.__dict__["forward"] = _forward_of(layer, parallel_group)


def cut_layers(model: Any, process_count: int, rank: int) -> list[CutLayer]:
    """The layers of the model that are to be cut, with the shards of their weights that process
    ``rank`` will keep. Does not change the model. Raises the ``ConfigError`` of ``cut_model``."""
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    unknown_styles = {*plan.values()} - {*PARTITION_BY_STYLE} - UNCUT_STYLES
    problems = [f"{style!r} in its plan" for style in sorted(unknown_styles)]
    problems += _indivisible_heads(model.config.get_text_config(), process_count)
    layers = []
    for module_path, module in model.named_modules():
        if (partition := PARTITION_BY_STYLE.get(style_of(plan, module_path))) is None:
            continue
        layers.append(layer := CutLayer(module, partition))
        for weight_name, weight in module._parameters.items():
            style = style_of(plan, module_path, weight_name)
            weight_partition = PARTITION_BY_STYLE.get(style)
            if weight is None or weight_partition == BETWEEN:
                continue
            if weight_partition == ROW_WISE and weight.ndim == 1:
                continue
            if weight_partition not in (COLUMN_WISE, ROW_WISE):
                problems.append(f"{module_path}.{weight_name}, which its plan leaves out")
                continue
            axis = -1 if weight_partition == ROW_WISE or weight.ndim == 1 else -2
            axis_size, matrix_count = weight.shape[axis], 2 if style == "packed_colwise" else 1
            if axis_size % (matrix_count * process_count):
                axis_name = "inputs" if weight_partition == ROW_WISE else "outputs"
                problems.append(f"{axis_size} {axis_name} of {module_path}")
                continue
            indices = torch.arange(axis_size).view(matrix_count, process_count, -1)[:, rank]
            layer.cuts[weight_name] = Cut(weight_partition, axis, indices.flatten())
        problems += _unsupported_adapters(module_path, layer)
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


def style_of(plan: Mapping[str, str], module_path: str, parameter_name: str | None = None) -> str:
    """The style, such as "colwise", that a plan of transformers gives to a parameter of a module,
    or else to the module; "" if the plan has neither. Plans write ``*`` for the numbers in a path,
    as in "layers.*.mlp.up_proj".

    Args:
        plan: styles by pattern (``model.tp_plan``).
        parameter_name: the parameter's name in the module; None asks for the module's style.
    """
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", module_path)
    return (plan.get(f"{pattern}.{parameter_name}") if parameter_name else None) or plan.get(
        pattern, ""
    )


def _indivisible_heads(config: Any, process_count: int) -> Iterator[str]:
    """A text for the error for each number of attention heads that ``process_count`` does not
    divide. Such a model cannot be cut, because attention can only be cut between heads. ``config``:
    the text config of transformers."""
    for field_name in ("num_attention_heads", "num_key_value_heads"):
        head_count = getattr(config, field_name, None)
        if isinstance(head_count, int) and head_count % process_count:
            yield f"{field_name} {head_count}"


def _layer_adapters(module: nn.Module) -> Iterator[LayerAdapter]:
    """The layer adapters (the changes of one adapter at one layer) attached to a module."""
    layer_state = state_of(module)
    if layer_state is not None:
        yield from (cast(LayerAdapter, adapter) for adapter in layer_state._modules.values())


def _unsupported_adapters(module_path: str, layer: CutLayer) -> Iterator[str]:
    """A text for the error for each property of an adapter of a cut layer that tensor parallelism
    does not support. ``module_path``: the path of the layer."""
    for adapter in _layer_adapters(layer.module):
        if adapter.submodule_adapters or adapter.submodule_adapters_by_method:
            yield f"{module_path}, of which other methods than forward read adapted weights"
        for weight_name, change in adapter.changes.items():
            unknown_parameters = {*change._parameters, *change._buffers} - {*PARTITION_BY_PARAMETER}
            supported_resolves = (VARIANTS["lora"].resolve, VARIANTS["dora"].resolve)
            applies_by_problem = {
                f"variant {change.variant.name!r} at {module_path}": (
                    unknown_parameters or change.variant.resolve not in supported_resolves
                ),
                f"an adapter of some rows of {module_path}": (
                    change.rows is not None
                    or change.tokens is not None
                    or change.frozen_input is not None
                ),
                f"{module_path}, whose {weight_name} is no plain matrix [out, in]": (
                    change.storage.name != "plain"
                    or change.layer.out_axis
                    or weight_name not in (layer.cuts or {weight_name})
                ),
                f"dropout at {module_path}: each process would drop the same places of its part": (
                    layer.partition == EXPERTS and change.dropout
                ),
            }
            yield from (problem for problem, applies in applies_by_problem.items() if applies)


def _keep_shard(
    layer: CutLayer, weight_name: str, cut: Cut, mesh: Any, device: torch.device
) -> None:
    """Replace a weight of a layer by a DTensor that holds this process's shard, as ``cut`` says.
    Code that needs the full weight, such as saving, can gather the DTensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as ShardPlacement
    from torch.distributed.tensor.placement_types import _StridedShard

    weight: Any = layer.module._parameters[weight_name]
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
    layer.module._parameters[weight_name] = parameter
    layer.local_values[id(parameter)] = nn.Parameter(local_weight, requires_grad=False)


# ------------------------------------------------------------------------------ call a cut layer


class _ParallelGroup:
    """The group of processes of a cut model, and the last input of a column-wise layer. Consecutive
    column-wise layers with the same input (the projections of q, k and v) share one node of the
    autograd graph, so that backward adds their gradients before a single all-reduce."""

    def __init__(self, group: Any, count: int, rank: int) -> None:
        self.group, self.count, self.rank = group, count, rank
        #: (the last input, the result of ``_SumGradientOverProcesses`` for it)
        self.last_input: tuple[Tensor, Tensor] | None = None

    def sum_gradient_of(self, x: Any) -> Any:
        """Return the input ``x`` of a cut layer, as a tensor whose gradient backward sums over the
        processes. Anything but a tensor that needs a gradient is returned unchanged."""
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
        """Sum the output of a row-wise layer over the processes. Forget the last input, because the
        column-wise layers that follow have another."""
        self.last_input = None
        return cast(Tensor, _SumOverProcesses.apply(y, self.group))


class _SumGradientOverProcesses(torch.autograd.Function):
    """The identity, with a backward that sums the gradient over the processes."""

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
    """The sum over the processes. Its backward is the identity, since each process has the full
    gradient of the sum."""

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
    ``indices`` None, the full parameter. Each process computes one term of the parameter's
    gradient. Backward multiplies the term by ``process_count``, so that the average over the
    processes, which the trainer takes later, is the sum of the terms."""

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
    """The forward of a cut layer: it runs the forward of the layer's class on the shards of this
    process, and does the communication that the layer's partition needs."""
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
def use_local_shards(layer: CutLayer, parallel_group: _ParallelGroup) -> Iterator[None]:
    """A context in which the parameters of a layer and of its adapters are replaced by the shards
    of this process."""
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
            local_values[id(bias)] = None  # only rank 0 adds the bias, since outputs are summed
        stack.enter_context(replaced_tensors(modules, local_values))
        if has_dropout and layer.partition == ROW_WISE:
            stack.enter_context(_local_seed(parallel_group))
        yield


def _shards_of_full_parameters(
    adapter: LayerAdapter, layer: CutLayer, parallel_group: _ParallelGroup
) -> dict[int, Any]:
    """The shards of the parameters that an adapter trains in full (not as A and B), such as biases,
    by the ``id`` of the full parameter."""
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


def _shards_of_change(
    change: Change, cut: Cut | None, parallel_group: _ParallelGroup
) -> dict[int, Any]:
    """The shards of the parameters of a change (one adapter's change of one weight), by the ``id``
    of the full parameter. The full parameters are A [g, r, in], B [g, out, r] and DoRA's magnitude
    [g · out], with g: number of matrices in the weight, 1 for a linear layer; r: rank. ``cut``: the
    cut of the weight; None keeps all parameters complete."""
    local_values: dict[int, Any] = {}
    tensor_by_name: Mapping[str, Any] = {**change._parameters, **change._buffers}
    for name, value in tensor_by_name.items():
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
def _with_local_dims(
    change: Change, cut: Cut | None, parallel_group: _ParallelGroup
) -> Iterator[None]:
    """A context in which a change (one adapter's change of one weight) has the dimensions of the
    process's shard of the weight, and in a row-wise layer sums DoRA's norms over the processes."""
    if cut is None:
        yield
        return
    full_dims, full_variant = change.dims, change.variant
    local_size = len(cut.indices)
    groups, out_size, in_size = full_dims
    change.dims = (
        Dims(groups, out_size, local_size)
        if cut.partition == ROW_WISE
        else Dims(groups, local_size, in_size)
    )
    if cut.partition == ROW_WISE and full_variant.resolve is VARIANTS["dora"].resolve:
        change.variant = replace(full_variant, resolve=_dora_resolve(parallel_group.group))
    try:
        yield
    finally:
        change.dims, change.variant = full_dims, full_variant


def _dora_resolve(group: Any) -> Callable[..., Any]:
    """The ``resolve`` of the variant DoRA (parameters -> low-rank change, gain of each output) for
    a process that holds some columns of W. The gain needs the norms of whole rows of W + ΔW, so the
    processes sum the squared norms of their parts of the rows, one number per output."""

    def resolve(parameters: Mapping[str, Tensor], scale: float, base: Callable[[], Tensor]) -> Any:
        low_rank = LowRank(parameters["A"], parameters["B"], scale)
        squared_norms = row_norms(base(), low_rank).square()
        dist.all_reduce(squared_norms, group=group)
        return low_rank, gain_of(parameters["magnitude"], squared_norms.sqrt())

    return resolve


@contextmanager
def _local_seed(parallel_group: _ParallelGroup) -> Iterator[None]:
    """A context with a different random stream in each process, for dropout on shards of an input.
    After the context, all processes continue the stream that they share, so that dropout on full
    inputs has the same mask in all of them."""
    local_seed = (new_seed() + parallel_group.rank) % 2**62
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(local_seed)
        yield
