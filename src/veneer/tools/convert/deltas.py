"""Compute the dense changes ΔW = W' - W that an adapter makes, and factor dense changes by SVD into
an adapter.

ΔW = gain ⊙ (W + scale · B A) - W           of a weight with a low-rank change; gain: the factor
                                            of each row in DoRA, else 1
ΔW = W' - W                                 of a parameter trained in full, with the new value W'
ΔW = U S Vᵀ ≈ (U √S) (√S Vᵀ)                the nearest product of a given rank, from the largest
                                            singular values (Eckart and Young 1936)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import (
    ModelIndex,
    TargetSpec,
    adapters,
    changes,
    complete_plans,
    install_adapter,
    output_change_problems,
    plan_low,
)
from veneer.bases import own_parameters, storage_of, weight_of
from veneer.config import LoraConfig
from veneer.distributed import base_class
from veneer.errors import AdapterError, listing, nearest, raise_all, sentence
from veneer.formats._base import LowRankChange
from veneer.layers import GENERAL_KIND, ParamRef, kind_for, parameter_path
from veneer.lowrank import Svd

#: the name of the adapter that a conversion installs on the base
ADAPTER_NAME = "veneer_convert"
#: how large ‖ΔW - B A‖ / ‖ΔW‖ may be if no rank and no energy is given; float32 factors would not
#: allow for a much smaller error
MAX_RELATIVE_ERROR = 1e-6


@torch.no_grad()
def deltas_of_model(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """ΔW of every parameter and buffer that the adapter ``adapter_name`` changes, by path, in the
    shape of the parameter. A tied weight with a low-rank change is listed once, under its first
    name. ΔW is computed in float64 and returned in float32, except that ΔW of an integer buffer has
    the buffer's dtype.

    Raises:
        AdapterError: the adapter changes outputs of modules, which a ΔW cannot describe.
    """
    raise_all(
        AdapterError,
        f"There is no ΔW of {adapter_name!r}",
        list(output_change_problems(model, adapter_name)),
    )
    deltas: dict[str, Tensor] = {}
    for path, module, weight_name, change in changes(model, adapter_name):
        stored_weight = weight_of(module, weight_name)
        low_rank, gain = change.resolve(stored_weight)
        base_weight = change.storage.dense(stored_weight).double()
        if gain is None:  # the product is ΔW; to compute (W + ΔW) − W would lose digits
            delta = change.layer.fold(low_rank.delta(torch.float64), base_weight.shape)
        else:
            delta = (
                change.changed_weight(stored_weight, low_rank, gain, torch.float64) - base_weight
            )
        deltas[parameter_path(path, weight_name)] = delta
    for path, module, layer_adapter in adapters(model, adapter_name):
        for name_in_module, tensor in layer_adapter.full.state_dict().items():
            base_value = {**module._parameters, **module._buffers}[name_in_module]
            deltas[parameter_path(path, name_in_module)] = (
                tensor.double() - base_value.double()
                if tensor.is_floating_point()
                else tensor - base_value
            )
    return {
        path: delta.float() if delta.is_floating_point() else delta
        for path, delta in deltas.items()
    }


def deltas_of_file(
    low_rank_changes: Sequence[LowRankChange], full_parameters: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Compute ΔW of the changes in an adapter folder, without the base's model.

    Args:
        low_rank_changes: the low-rank changes in the folder.
        full_parameters: the parameters that the adapter trains in full, by path of their module. ΔW
            of these is unknown without the base.

    Returns:
        ΔW in float32 by the path of the weight, and an error text for each change whose ΔW cannot
        be computed without the base.
    """
    deltas: dict[str, Tensor] = {}
    unknown_deltas = []
    for change in low_rank_changes:
        kind_name, low_rank = change.kind, change.layer.low
        if change.magnitude is not None:
            unknown_deltas.append((change.weight, "which rescales the weight"))
        elif kind_name == "attention" and change.weight.endswith("out_proj.weight"):
            unknown_deltas.append((change.weight, "which PEFT applies more than once"))
        elif kind_name in ("stack", "parameter"):
            unknown_deltas.append((change.weight, "whose shape the file does not tell"))
        elif kind_name == "linear or Conv1D":
            unknown_deltas.append((change.weight, "which may be stored transposed"))
        else:
            input_shape = (
                change.layer.A.shape[1:]
                if kind_name in ("conv", "grouped conv")
                else low_rank.A.shape[2:]
            )
            # [g, out, in] → [g · out, *input_shape]
            delta = low_rank.delta(torch.float64).reshape(-1, *input_shape).float()
            deltas[change.weight] = delta.mT if kind_name in ("embedding", "Conv1D") else delta
    unknown_deltas += [
        (module_path or "the model", "which is trained in full") for module_path in full_parameters
    ]
    return deltas, [
        sentence(f"a change of {path!r}, {reason}", "the base beside it", "give the base")
        for path, reason in unknown_deltas
    ]


def install_deltas(
    model: nn.Module,
    deltas: Mapping[str, Tensor],
    full_names: frozenset[str],
    *,
    rank: int | None,
    energy: float | None,
) -> dict[str, float]:
    """Install an adapter, named ``ADAPTER_NAME``, that makes the changes ``deltas`` on ``model``.
    ``deltas`` holds ΔW by the path of the parameter or buffer. Vectors, buffers and the parameters
    in ``full_names`` are stored in full, as W + ΔW. The others become products with the rank that
    ``factor_delta`` chooses by ``rank`` and ``energy``. Returns ‖ΔW − B A‖ / ‖ΔW‖ of each product,
    by path.

    Raises:
        AdapterError: the model lacks a path or has a parameter of another shape there. The model is
            unchanged.
    """
    model_index, problems = ModelIndex(model), []
    full_values, factors, relative_errors = _split_deltas(
        model_index, deltas, full_names, rank, energy, problems
    )
    ranks_by_ref = {ref: factor_pair["A"].shape[1] for ref, factor_pair in factors.items()}
    low_rank_plans = plan_low(
        model_index,
        {ref: TargetSpec(rank, float(rank)) for ref, rank in ranks_by_ref.items()},
        problems,
    )
    full_parameter_names = {
        path: tuple(name for name in tensors if name in model_index.modules[path]._parameters)
        for path, tensors in full_values.items()
    }
    buffer_modules = frozenset(
        path
        for path, tensors in full_values.items()
        if set(tensors) & set(model_index.modules[path]._buffers)
    )
    highest_rank = max((plan.rank for plan in low_rank_plans), default=1)
    config = LoraConfig(
        rank=highest_rank,
        alpha=float(highest_rank),
        targets=tuple(parameter_path(*plan.ref) for plan in low_rank_plans) or "all",
        train_also=tuple(full_values),
        dtype="float32",
    )
    plans = complete_plans(
        model_index,
        config,
        low_rank_plans,
        full_parameter_names,
        problems,
        full_modules=buffer_modules,
        split_ties=model_index.split_ties(full_values),
    )
    raise_all(AdapterError, f"These changes do not fit this {base_class(model).__name__}", problems)
    # ``deltas`` may list a tied weight under another of its names than the plan does
    for plan in low_rank_plans:
        factors[plan.ref] = next(factors[ref] for ref in plan.holders if ref in factors)
    install_adapter(model, ADAPTER_NAME, plans, trainable=False, parameters=factors)
    with torch.no_grad():
        for module_path, _, layer_adapter in adapters(model, ADAPTER_NAME):
            for name, tensor in full_values.get(module_path, {}).items():
                {**layer_adapter.full._parameters, **layer_adapter.full._buffers}[name].copy_(
                    tensor
                )
    return relative_errors


def _split_deltas(
    model_index: ModelIndex,
    deltas: Mapping[str, Tensor],
    full_names: frozenset[str],
    rank: int | None,
    energy: float | None,
    problems: list[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[ParamRef, dict[str, Tensor]], dict[str, float]]:
    """Split changes into those that are stored in full (vectors, buffers, and the parameters in
    ``full_names``) and those that are factored by ``factor_delta``. ``deltas``: ΔW by the path of
    the parameter or buffer. Paths that the model lacks are left out, with an error text in
    ``problems``.

    Returns:
        the new values of parameters and buffers that are stored in full, by module path and then by
        name; the factors A and B of the other changes, by parameter; ‖ΔW − B A‖ / ‖ΔW‖ of each
        product, by path.
    """
    refs_by_path = {
        delta_path: ref
        for delta_path in deltas
        if (ref := _ref_of(model_index, delta_path, deltas[delta_path], problems)) is not None
    }
    full_values: dict[str, dict[str, Tensor]] = {}
    factors: dict[ParamRef, dict[str, Tensor]] = {}
    relative_errors: dict[str, float] = {}
    for delta_path, (path, tensor_name) in refs_by_path.items():
        module, delta = model_index.modules[path], deltas[delta_path].double()
        layer_kind = kind_for(module, tensor_name)
        is_vector_or_buffer = delta.dim() < 2 or tensor_name in module._buffers
        if (
            delta_path in full_names
            or is_vector_or_buffer
            or (layer_kind is GENERAL_KIND and tensor_name not in layer_kind.weights(module))
        ):
            base_value = {**module._parameters, **module._buffers}[tensor_name]
            full_values.setdefault(path, {})[tensor_name] = (base_value.double() + delta).to(
                base_value.dtype
            )
        else:
            A, B, relative_errors[delta_path] = factor_delta(
                layer_kind.unfold(delta, layer_kind.dims(module, delta.shape)), rank, energy
            )
            factors[path, tensor_name] = {"A": A, "B": B}
    return full_values, factors, relative_errors


def _ref_of(
    model_index: ModelIndex, delta_path: str, delta: Tensor, problems: list[str]
) -> ParamRef | None:
    """The reference (module path, name) of the parameter or buffer at ``delta_path``. None, with
    the reason added to ``problems``, if the model lacks it or has it in another shape than its
    change ``delta``."""
    module_path, _, tensor_name = delta_path.rpartition(".")
    canonical_path = model_index.canonical.get(module_path, "")
    module = (
        model_index.modules[canonical_path] if module_path in model_index.canonical else nn.Module()
    )
    is_parameter = tensor_name in own_parameters(module)
    stored_tensor: Any = (
        weight_of(module, tensor_name) if is_parameter else module._buffers.get(tensor_name)
    )
    if stored_tensor is None:
        problem = (
            f"a change of {delta_path!r}, which this model"
            f" lacks{nearest(module_path, model_index.canonical)}"
        )
        problems.append(sentence(problem, "the same modules", "use the model that it was made for"))
        return None
    shape = tuple(
        storage_of(stored_tensor).shape(stored_tensor) if is_parameter else stored_tensor.shape
    )
    if shape != tuple(delta.shape):
        problem = f"a change of {delta_path!r} of shape {tuple(delta.shape)}"
        problems.append(sentence(problem, f"{shape}", "use the model that it was made for"))
        return None
    return canonical_path, tensor_name


def factor_delta(
    delta: Tensor, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, float]:
    """Factor ΔW [g, out, in], float64, into A [g, r, in] and B [g, out, r], float32; g: matrices in
    the weight, 1 for a linear layer. The third result is the error ‖ΔW − B A‖ / ‖ΔW‖.

    r is ``rank``, at most min(out, in). If ``rank`` is None, r is the lowest rank that keeps the
    share ``energy`` of ‖ΔW‖². If both are None, r is the lowest rank with an error of at most
    1e-6 · ‖ΔW‖."""
    svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
    # [min(out, in)]: at index i, the squared error of keeping only the first i singular values
    tail_energy = svd.S.square().sum(0).flip(0).cumsum(0).flip(0)
    max_energy_lost = (MAX_RELATIVE_ERROR**2 if energy is None else 1 - energy) * tail_energy[0]
    rank = max(1, int((tail_energy > max_energy_lost).sum())) if rank is None else rank
    low_rank = svd.cut(rank)[0].to(torch.float32)
    norm = delta.norm().item()
    error_norm = (low_rank.delta(torch.float64) - delta).norm().item()
    return low_rank.A, low_rank.B, error_norm / norm if norm else 0.0


def check_rank_options(rank: int | None, energy: float | None, whole: bool) -> None:
    """Raise AdapterError if more than one of the options is given, or if a value is invalid."""
    options = {"rank": rank, "energy": energy, "whole": whole or None}
    used_options = [name for name, option in options.items() if option is not None]
    checks = [
        (len(used_options) > 1, listing(used_options), "one of them", "leave the others out"),
        (
            rank is not None and (type(rank) is not int or rank < 1),
            f"rank={rank!r}",
            "a number of at least 1",
            "choose one",
        ),
        (
            energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1),
            f"energy={energy!r}",
            "a share in (0, 1]",
            "choose one",
        ),
    ]
    problems = [sentence(*error_texts) for failed, *error_texts in checks if failed]
    raise_all(AdapterError, "This cannot be made a product", problems)
