"""Install planned adapters in a model. ``uninstall.py`` detaches them.

install_adapter         creates all adapter parameters, then adds them to the layers of a model
build_layer_adapters    the first step of install_adapter: creates the parameters
adapt_modules           its second step: gives modules the class whose forward runs an adapter
open_bank               keeps layers adapted for a ``Bank``, which stores its adapters itself
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach.first_step import watch_first_step
from veneer.attach.invocation import update_invocation_hooks, with_invocation
from veneer.attach.layer.adapted_module import adapt_methods, adapt_module, set_child, state_of
from veneer.attach.layer.change import Change
from veneer.attach.layer.fused_linear import SharedInputLayers
from veneer.attach.layer.layer_adapter import LayerAdapter
from veneer.attach.layer.lookup import adapters_of, foreign_layers_problem
from veneer.attach.layer.model_index import ModelIndex
from veneer.attach.layer.state import (
    MODEL_ADAPTERS_NAME,
    ActiveAdapter,
    LayerState,
    ModelAdapters,
    one_thread_at_a_time,
)
from veneer.attach.layer.token_rows import TOKEN_ROWS, initial_rows
from veneer.attach.planning.plan import LowRankPlan, Plans
from veneer.attach.planning.refusals import name_problems
from veneer.attach.source.source_analysis import shared_input_groups
from veneer.attach.source.weight_readers import (
    bound_methods,
    fast_path_switches,
    modules_with_fast_path,
)
from veneer.bases import BASES, storage_of, weight_of, without_gradient
from veneer.config import LoraConfig, trained_dtype
from veneer.distributed import base_class, full_tensor
from veneer.errors import SelectionError, TargetError, raise_all
from veneer.layers import ParamRef, kind_of, parameter_path
from veneer.layers._base import can_factor
from veneer.precision import at_least_float32
from veneer.variants import VARIANTS, InitContext

#: (plan of a weight) -> {name of the data, such as "inputs": function that returns the tensor}: the
#: calibration data from which the variant initialises the change of this weight
Calibration = Callable[[LowRankPlan], Mapping[str, Callable[[], Tensor]]]


@one_thread_at_a_time
@torch.inference_mode(False)  # parameters that are created in inference mode cannot be trained
def install_adapter(
    model: nn.Module,
    name: str,
    plans: Plans,
    *,
    trainable: bool = True,
    parameters: Mapping[ParamRef, Mapping[str, Tensor]] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Install a planned adapter under ``name`` and freeze the base. All memory is allocated before
    the model is changed, so that the model is intact if memory runs out.

    Args:
        trainable: whether the adapter's parameters require a gradient.
        parameters: {(path, name) of a weight: {name of an adapter parameter: tensor}}. None
            initialises the parameters.
        calibration: reads the data, besides the weight itself, from which a variant is initialised.

    Raises:
        TargetError: no adapter of this name can be added now (``name_problems``), or the variant
            cannot be initialised from some weights.
    """
    # checked again: another thread may have attached an adapter of this name since the plan
    problems = list(name_problems(model, name))
    raise_all(TargetError, "Nothing was attached", problems)
    model_index = ModelIndex(model)
    layer_adapters = build_layer_adapters(
        model_index, plans, trainable=trainable, parameters=parameters, calibration=calibration
    )
    model_adapters = _ensure_adapters(model)
    invocation_tokens = tuple(plans.config.invocation_tokens)
    adapters_by_key: Any = adapt_modules(model_index, layer_adapters)
    if invocation_tokens:
        adapters_by_key = with_invocation(adapters_by_key, name)
    active_adapter = ActiveAdapter(
        name,
        adapters_by_key,
        merged_at_attach=model_adapters.merged,
        invocation_tokens=invocation_tokens,
    )
    for path, layer_adapter in layer_adapters.items():
        layer_state: Any = state_of(model_index.modules[path])
        set_child(layer_state, name, layer_adapter)
    model_adapters.set_adapters(
        {**model_adapters.configs, name: plans.config},
        {**model_adapters.selections, name: active_adapter},
    )
    if invocation_tokens:
        update_invocation_hooks(model, model_adapters)
    watch_first_step(
        model,
        name,
        (
            parameter
            for layer_adapter in layer_adapters.values()
            for parameter in layer_adapter.parameters()
        ),
    )


def build_layer_adapters(
    model_index: ModelIndex,
    plans: Plans,
    *,
    trainable: bool,
    parameters: Mapping[ParamRef, Mapping[str, Tensor]] | None = None,
    calibration: Calibration | None = None,
) -> dict[str, LayerAdapter]:
    """Create the ``LayerAdapter`` of each module that a planned adapter changes, by the path of the
    module. They are not installed. The model is not changed, except that a packed weight may be
    converted to the layout that Veneer reads (``Storage.prepare``).

    Args:
        trainable, parameters, calibration: as in ``install_adapter``.

    Raises:
        TargetError: the variant cannot be initialised from some weights.
    """
    modules, parameters = model_index.modules, parameters or {}
    for weight_plan in plans.low_rank_plans:
        weight_plan.storage.prepare(modules[weight_plan.path])
    problems: list[str] = []
    layer_adapters: defaultdict[str, LayerAdapter] = defaultdict(LayerAdapter)
    for weight_plan in plans.low_rank_plans:
        try:
            change = make_change(
                weight_plan, modules, plans.config, parameters.get(weight_plan.ref, {}), calibration
            )
        except _InitializationError as error:
            problems.append(str(error))
            continue
        layer_adapters[weight_plan.path].low._modules[weight_plan.weight] = change
        for path, weight_name in weight_plan.holders:
            layer_adapters[path].changes[weight_name] = change
    for weight_plan in plans.low_rank_plans if problems else ():
        if state_of(modules[weight_plan.path]) is None:
            weight_plan.storage.release(modules[weight_plan.path])
    raise_all(TargetError, "Nothing was attached", problems)
    _copy_fully_trained(layer_adapters, modules, plans)
    # A method may read the weight of a module below without calling that module. The reader then
    # gets a reference to the layer adapter of that module, so that it reads the changed weight.
    readers = [
        reader for weight_plan in plans.low_rank_plans for reader in weight_plan.weight_readers
    ]
    for reader in (*readers, *plans.full_readers):
        holder_path = model_index.canonical[".".join((reader.path, *reader.path_below)).strip(".")]
        holder_adapter = layer_adapters[holder_path]
        layer_adapter = layer_adapters[reader.path]
        if reader.method == "forward":
            layer_adapter.submodule_adapters[reader.path_below] = holder_adapter
        else:
            layer_adapter.submodule_adapters_by_method.setdefault(reader.method, {})[
                reader.path_below
            ] = holder_adapter
    # A fused fast path would compute with the base weights of the modules below. A layer adapter
    # of the module that has the fast path turns it off.
    for path in list(layer_adapters):
        for path_above in modules_with_fast_path(model_index, path):
            layer_adapters[path_above]  # creates an entry of the defaultdict
    for path, module in modules.items():
        if without_gradient(module):
            # Creates an entry, so that this module is adapted. Its own forward may have no
            # derivative; the adapted forward passes gradients on to earlier layers, or raises an
            # error if it cannot.
            layer_adapters[path]
    for path, layer_adapter in layer_adapters.items():
        layer_adapter.requires_grad_(trainable).train(modules[path].training)
    return {path: layer_adapters[path] for path in modules if path in layer_adapters}


def _copy_fully_trained(
    layer_adapters: defaultdict[str, LayerAdapter], modules: Mapping[str, nn.Module], plans: Plans
) -> None:
    """Add copies of the parameters that are trained in full to the layer adapters, in
    ``LayerAdapter.full``. Tied parameters share one copy, unless they are in ``plans.split_ties``.
    Running statistics are copied too, because training would change those of the frozen base."""
    modules_with_statistics = {
        path: ()
        for path, module in modules.items()
        if not isinstance(module, torch.jit.ScriptModule)
        and module._buffers.get("running_mean") is not None
    }
    copies_by_key: dict[Any, nn.Parameter] = {}
    for path, trained_names in {**modules_with_statistics, **plans.full}.items():
        full_copies, module = layer_adapters[path].full, modules[path]
        # in the module's order, because an optimiser's state depends on the order of parameters
        for name, parameter in module._parameters.items():
            if name not in trained_names:
                continue
            has_own_copy = parameter is None or (path, name) in plans.split_ties
            copy_key: Any = (path, name) if has_own_copy else id(parameter)
            source_tensor: Any = _zero_bias(module) if parameter is None else parameter
            if copy_key not in copies_by_key:
                copies_by_key[copy_key] = nn.Parameter(
                    full_tensor(source_tensor.detach()).to(
                        trained_dtype(plans.config, source_tensor.dtype), copy=True
                    )
                )
            full_copies.register_parameter(name, copies_by_key[copy_key])
        copies_buffers = path in plans.full_modules or path in modules_with_statistics
        for name, buffer in module._buffers.items() if copies_buffers else ():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full_copies.register_buffer(name, buffer.detach().clone())


def _zero_bias(module: nn.Module) -> Tensor:
    """A bias of zeros, [groups · out], for a layer that has none, so that an adapter can train
    one."""
    kind: Any = kind_of(module)
    weight: Any = weight_of(module, kind.weight)
    dims = kind.dims(module, weight.shape)
    return weight.detach().new_zeros(dims.groups * dims.out)


@one_thread_at_a_time
def open_bank(model: nn.Module) -> ModelAdapters:
    """Register a ``Bank``, which stores many adapters outside of the model, and return the
    ``ModelAdapters``. Until ``close_bank``, layers stay adapted even if no adapter is attached.

    Raises:
        SelectionError: layers have adapters that were attached through another model object.
    """
    if problem := foreign_layers_problem(model):
        raise SelectionError(problem)
    model_adapters = _ensure_adapters(model)
    model_adapters.bank_count += 1
    return model_adapters


def _ensure_adapters(model: nn.Module) -> ModelAdapters:
    """The ``ModelAdapters`` of a model. If the model has none, they are created and the base is
    frozen."""
    model_adapters = adapters_of(model)
    if model_adapters is None:
        model_adapters = ModelAdapters()
        model_adapters.original_requires_grad = {
            path: parameter.requires_grad for path, parameter in model.named_parameters()
        }
        model.__dict__[MODEL_ADAPTERS_NAME] = model_adapters
        model_adapters.claim(model)
        for parameter in model.parameters():
            # not ``requires_grad_``, which fails on a parameter of a lazy module
            parameter.requires_grad = False
    return model_adapters


@one_thread_at_a_time
def adapt_modules(
    model_index: ModelIndex, layer_adapters: Mapping[str, LayerAdapter]
) -> dict[Any, LayerAdapter]:
    """Give the modules at the paths of ``layer_adapters`` their adapted class, whose forward runs
    the selected adapter. The layer adapters are not stored in the modules; ``install_adapter`` does
    that afterwards. Returns them by ``LayerState.key``, or by (key, method) for adapted methods
    besides forward, as ``ActiveAdapter.layer_adapters`` holds them."""
    model_adapters, modules = _ensure_adapters(model_index.model), model_index.modules
    adapters_by_key: dict[Any, LayerAdapter] = {}
    for path, layer_adapter in layer_adapters.items():
        module = modules[path]
        layer_state = state_of(module)
        if layer_state is None:
            layer_state = _create_layer_state(model_adapters, module)
            model_adapters.layer_paths[layer_state.key] = path
            adapt_module(module, layer_state)
            layer_state.bound_methods = tuple(bound_methods(module))
        layer_adapter.set_fused_change(module, layer_state)
        adapt_methods(module, layer_adapter.submodule_adapters_by_method)
        adapters_by_key.update(dict.fromkeys(layer_adapter.keys(layer_state), layer_adapter))
    group_shared_inputs(model_index, layer_adapters)
    return adapters_by_key


def _create_layer_state(model_adapters: ModelAdapters, module: nn.Module) -> LayerState:
    """The ``LayerState`` of a module that is not adapted yet. The module is not changed."""
    kind = kind_of(module)
    storage = storage_of(weight_of(module, kind.weight)) if kind is not None else None
    storage_modules = storage.modules() if storage is not None else ()
    supports_factored = kind is not None and can_factor(kind, module, type(module), storage_modules)
    has_plain_weight = storage is not None and storage.name == "plain"
    is_plain_product = supports_factored and kind.product and has_plain_weight
    layer_state = LayerState(
        model_adapters, kind, supports_factored, fast_path_switches(module), is_plain_product
    )
    layer_state.is_stock_class = kind is not None and base_class(module) in kind.types()
    layer_state.train(module.training)
    is_opaque = storage is not None and storage.opaque
    if is_opaque or without_gradient(module):
        layer_state.opaque_storage = BASES["opaque"]
    return layer_state


def group_shared_inputs(
    model_index: ModelIndex, layer_adapters: Mapping[str, LayerAdapter]
) -> None:
    """Set ``LayerAdapter.shared_input_layers`` of layers that read the same input, such as q_proj,
    k_proj and v_proj, so that the call of the first layer computes the outputs of all of them."""
    for path, module in model_index.modules.items():
        for children in shared_input_groups(base_class(module)):
            groups: defaultdict[Any, list[tuple[nn.Module, LayerAdapter]]] = defaultdict(list)
            for child_path in dict.fromkeys(
                model_index.canonical.get(parameter_path(path, child), "") for child in children
            ):
                layer_adapter = layer_adapters.get(child_path) if child_path != path else None
                if (
                    layer_adapter is not None
                    and layer_adapter.fused_change is not None
                    and layer_adapter.shared_input_layers is None
                ):
                    change = layer_adapter.fused_change.change
                    groups[change.dims.in_, change.dropout].append(
                        (model_index.modules[child_path], layer_adapter)
                    )
            for members in groups.values():
                shared_layers = SharedInputLayers(members) if len(members) > 1 else None
                for _, layer_adapter in members:
                    layer_adapter.shared_input_layers = shared_layers


class _InitializationError(TargetError):
    """A variant cannot be initialised from a weight or its calibration data, because their values
    are not finite, or their decomposition (such as an SVD) failed."""


def _read_initial_data(
    weight_plan: LowRankPlan, variant_name: str, data_name: str, read_data: Callable[[], Tensor]
) -> Tensor:
    """Read a weight or its calibration data for the initialisation of a variant. ``data_name`` is
    "base" for the weight, else the name of the calibration data, such as "inputs".

    Raises:
        _InitializationError: some values are not finite.
    """
    values = read_data()
    if values.is_meta or values.isfinite().all():
        return values
    problem = (
        f"the {'weight' if data_name == 'base' else f'{data_name} of'} {weight_plan.full_path!r}"
    )
    advice = (
        "repair the base or the data, exclude the layer, or use a variant that starts from neither,"
        " such as lora"
    )
    raise _InitializationError(
        f"{problem} with NaN or infinity",
        f"finite numbers, from which variant {variant_name!r} starts",
        advice,
    )


def make_change(
    weight_plan: LowRankPlan,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    parameters: Mapping[str, Tensor],
    calibration: Calibration | None,
) -> Change:
    """The change of one weight, with its parameters on the device of the weight.

    Args:
        parameters: the adapter parameters by name. If it is empty, they are initialised.
        calibration: the data from which the variant is initialised, besides the weight.

    Raises:
        _InitializationError: the weight or the data are not finite, or have no decomposition.
    """
    module = modules[weight_plan.path]
    weight = weight_of(module, weight_plan.weight)
    change_parameters: dict[str, Tensor] = {}
    if weight_plan.rank:
        loaded_parameters = {
            name: value for name, value in parameters.items() if name != TOKEN_ROWS
        }
        change_parameters = _variant_parameters(
            weight_plan, weight, config, loaded_parameters, calibration
        )
    tokens = None if weight_plan.tokens is None else torch.tensor(weight_plan.tokens, device="cpu")
    if tokens is not None:
        token_rows = (
            parameters[TOKEN_ROWS]
            if TOKEN_ROWS in parameters
            else initial_rows(weight_plan.storage.dense(weight), tokens)
        )
        dtype = trained_dtype(config, weight_plan.storage.dtype(weight))
        change_parameters[TOKEN_ROWS] = token_rows.to(
            weight_plan.storage.device(weight), dtype, copy=True
        )
    return Change(
        change_parameters,
        layer=weight_plan.layer,
        variant=VARIANTS[config.variant],
        storage=weight_plan.storage,
        dims=weight_plan.dims,
        rank=weight_plan.rank,
        alpha=weight_plan.alpha,
        dropout=0.0 if tokens is not None else config.dropout,
        rows=_row_indices(weight_plan),
        tokens=tokens,
        frozen_input=weight_plan.layer.frozen_input(module),
        module_only=weight_plan.module_only,
    )


def _row_indices(weight_plan: LowRankPlan) -> Tensor | None:
    return None if weight_plan.rows is None else torch.tensor(weight_plan.rows, device="cpu")


def _variant_parameters(
    weight_plan: LowRankPlan,
    weight: Any,
    config: LoraConfig,
    loaded_parameters: Mapping[str, Tensor],
    calibration: Calibration | None,
) -> dict[str, Tensor]:
    """The variant's parameters of one weight, trained and frozen: ``loaded_parameters``, or newly
    initialised ones if that is empty. Adapter files do not contain frozen parameters whose values
    follow from the sizes of the weight (``Variant.derived``), so these are initialised even if the
    others were loaded. Raises an _InitializationError if the variant cannot be initialised from the
    weight or its calibration data."""
    layer, variant, rows = weight_plan.layer, VARIANTS[config.variant], _row_indices(weight_plan)

    def read_base() -> Tensor:
        dense = weight_plan.storage.dense(weight)
        dense = layer.unfold(dense.to(at_least_float32(dense.dtype)), weight_plan.dims)
        return dense if rows is None else dense[:, rows.to(dense.device)]

    dims = weight_plan.start_dims
    calibration_data = (
        calibration(weight_plan) if calibration is not None and not loaded_parameters else {}
    )
    data_readers: Any = {
        name: partial(_read_initial_data, weight_plan, variant.name, name, read_data)
        for name, read_data in {"base": read_base, **calibration_data}.items()
    }
    init_context = InitContext(
        dims.groups,
        dims.out,
        dims.in_,
        weight_plan.rank,
        layer.fan_in(weight_plan.dims),
        **data_readers,
    )
    device = weight_plan.storage.device(weight)
    parameters = {name: value.to(device) for name, value in loaded_parameters.items()}
    if not loaded_parameters or variant.derived:
        try:
            with torch.no_grad(), torch.device(device):
                # The results may be on another device, so they are moved below: float64 data are
                # on the CPU if the device of the weight has no float64.
                initial_parameters = variant.init(init_context)
            parameters = {
                name: value.to(device) for name, value in initial_parameters.items()
            } | parameters
        # ``_read_initial_data`` found finite numbers, but the variant could not decompose them.
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise _InitializationError(
                f"{weight_plan.full_path!r}, from which variant {variant.name!r} cannot start"
                f" ({error})",
                "numbers that have a decomposition",
                "exclude the layer, or use a variant that does not start from it, such as lora",
            ) from error
    dtype = trained_dtype(config, weight_plan.storage.dtype(weight))
    for name in parameters.keys() - variant.derived:
        parameters[name] = parameters[name].to(
            dtype, copy=bool(loaded_parameters), memory_format=torch.contiguous_format
        )
    return parameters
