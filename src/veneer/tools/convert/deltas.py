"""Dense changes ΔW = W' - W of an adapter's parameters, and an adapter from dense changes by
singular values.

ΔW = gain ⊙ (W + scale · B A) - W           any variant, any layer; W' - W of parameters trained in full
ΔW = U S Vᵀ ≈ (U √S) (√S Vᵀ)                the nearest product of a rank (Eckart and Young 1936)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.peft_mapping import kind_for
from veneer.attach import (
    Names,
    ParamRef,
    Plans,
    TargetSpec,
    adapters,
    base_class,
    changes,
    check_full,
    full_readers,
    install_adapter,
    output_change_problems,
    overlaps,
    own_parameters,
    parameter_path,
    plan_low,
    split_tie_refs,
    weight_of,
)
from veneer.bases import storage_of
from veneer.config import LoraConfig
from veneer.errors import AdapterError, listing, nearest, raise_all, sentence
from veneer.formats._base import LowRankChange
from veneer.layers._base import GENERAL
from veneer.lowrank import Svd

#: the name of the adapter that a conversion installs on a model
NAME = "veneer_convert"
#: default bound on ‖ΔW - product‖ / ‖ΔW‖: the precision of float32 factors
EXACT = 1e-6


@torch.no_grad()
def deltas_of_model(model: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW of every parameter that the adapter ``name`` changes, in the parameter's shape, each
    weight once. Computed in float64, returned in float32.

    Raises:
        AdapterError: the adapter changes outputs of modules, which no ΔW describes.
    """
    raise_all(
        AdapterError, f"There is no ΔW of {name!r}", list(output_change_problems(model, name))
    )
    deltas: dict[str, Tensor] = {}
    for path, module, weight, change in changes(model, name):
        target = weight_of(module, weight)
        low, gain = change.resolve(target)
        dense = change.storage.dense(target).double()
        if gain is None:  # W + ΔW - W would lose digits
            deltas[parameter_path(path, weight)] = change.layer.fold(
                low.delta(torch.float64), dense.shape
            )
        else:
            deltas[parameter_path(path, weight)] = (
                change.changed_weight(target, low, gain, torch.float64) - dense
            )
    for path, module, parameters in adapters(model, name):
        for key, value in parameters.full.state_dict().items():
            base_value = {**module._parameters, **module._buffers}[key]
            deltas[parameter_path(path, key)] = (
                value.double() - base_value.double()
                if value.is_floating_point()
                else value - base_value
            )
    return {
        path: delta.float() if delta.is_floating_point() else delta
        for path, delta in deltas.items()
    }


def deltas_of_file(
    low_rank: Sequence[LowRankChange], full: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """As ``deltas_of_model``, without a model: (ΔW by name, problems with the changes that need the
    base)."""
    deltas: dict[str, Tensor] = {}
    unknown = []
    for change in low_rank:
        kind, low = change.kind, change.layer.low
        if change.magnitude is not None:
            unknown.append((change.weight, "which rescales the weight"))
        elif kind == "attention" and change.weight.endswith("out_proj.weight"):
            unknown.append((change.weight, "which PEFT applies more than once"))
        elif kind in ("stack", "parameter"):
            unknown.append((change.weight, "whose shape the file does not tell"))
        else:
            inner = (
                change.layer.A.shape[1:] if kind in ("conv", "grouped conv") else low.A.shape[2:]
            )
            flat = low.delta(torch.float64).reshape(-1, *inner).float()  # of [g, out, in]
            deltas[change.weight] = flat.mT if kind in ("embedding", "Conv1D") else flat
    unknown += [(weight or "the model", "which is trained in full") for weight in full]
    problems = [
        sentence(f"a change of {weight!r}, {reason}", "the base beside it", "give the base")
        for weight, reason in unknown
    ]
    return deltas, problems


def install_deltas(
    model: nn.Module,
    deltas: Mapping[str, Tensor],
    full_names: frozenset[str],
    *,
    rank: int | None,
    energy: float | None,
) -> dict[str, float]:
    """Install the adapter ``NAME`` that makes these changes. Vectors and the parameters in
    ``full_names`` are stored in full, the rest as products of ``rank``, or of the lowest rank that
    keeps the share ``energy`` of ‖ΔW‖². Returns ‖ΔW - product‖ / ‖ΔW‖ of each product, by name.

    Raises:
        AdapterError: the model lacks a name or has another shape. The model is unchanged.
    """
    names, problems = Names(model), []
    full, factors, errors = _split_deltas(names, deltas, full_names, rank, energy, problems)
    ranks = {ref: pair["A"].shape[1] for ref, pair in factors.items()}
    low = plan_low(
        names, {ref: TargetSpec(rank, float(rank)) for ref, rank in ranks.items()}, problems
    )
    full_keys = {
        path: tuple(key for key in full[path] if key in names.modules[path]._parameters)
        for path in full
    }
    check_full(names, full_keys, problems)
    problems += overlaps(
        names, [*factors, *((path, key) for path, keys in full_keys.items() for key in keys)]
    )
    raise_all(AdapterError, f"These changes do not fit this {base_class(model).__name__}", problems)
    for plan in low:  # the plan of a shared weight names the first of its modules
        first = next(ref for ref in plan.holders if ref in factors)
        factors[plan.ref] = factors[first]
    buffers = frozenset(
        path for path, tensors in full.items() if set(tensors) & set(names.modules[path]._buffers)
    )
    highest_rank = max((plan.rank for plan in low), default=1)
    config = LoraConfig(
        rank=highest_rank,
        alpha=float(highest_rank),
        targets=tuple(parameter_path(*plan.ref) for plan in low) or "all",
        train_also=tuple(full),
        dtype="float32",
    )
    readers, split_ties = full_readers(names, full_keys), split_tie_refs(names, full)
    plans = Plans(config, tuple(low), full_keys, buffers, readers, split_ties)
    install_adapter(model, NAME, plans, trainable=False, parameters=factors)
    with torch.no_grad():
        for module_path, _, module_parameters in adapters(model, NAME):
            for key, value in full.get(module_path, {}).items():
                {**module_parameters.full._parameters, **module_parameters.full._buffers}[
                    key
                ].copy_(value)
    return errors


def _split_deltas(
    names: Names,
    deltas: Mapping[str, Tensor],
    full_names: frozenset[str],
    rank: int | None,
    energy: float | None,
    problems: list[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[ParamRef, dict[str, Tensor]], dict[str, float]]:
    """Split changes into parameters stored in full (path -> name -> new value) and factors A and B
    of the others; also return the relative error of each product, by name."""
    refs = {
        name: ref
        for name in deltas
        if (ref := _ref_of(names, name, deltas[name], problems)) is not None
    }
    full: dict[str, dict[str, Tensor]] = {}
    factors: dict[ParamRef, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for name, (path, weight) in refs.items():
        module, delta = names.modules[path], deltas[name].double()
        kind = kind_for(module, weight)
        is_vector = delta.dim() < 2 or weight in module._buffers
        if (
            name in full_names
            or is_vector
            or (kind.name == GENERAL and weight not in kind.weights(module))
        ):
            base_value = {**module._parameters, **module._buffers}[weight]
            full.setdefault(path, {})[weight] = (base_value.double() + delta).to(base_value.dtype)
        else:
            A, B, errors[name] = factor_delta(
                kind.unfold(delta, kind.dims(module, delta.shape)), rank, energy
            )
            factors[path, weight] = {"A": A, "B": B}
    return full, factors, errors


def _ref_of(names: Names, name: str, delta: Tensor, problems: list[str]) -> ParamRef | None:
    module_path, _, weight = name.rpartition(".")
    path = names.canonical.get(module_path, "")
    module = names.modules[path] if module_path in names.canonical else nn.Module()
    parameter = weight in own_parameters(module)
    stored: Any = weight_of(module, weight) if parameter else module._buffers.get(weight)
    if stored is None:
        problem = (
            f"a change of {name!r}, which this model lacks{nearest(module_path, names.canonical)}"
        )
        problems.append(sentence(problem, "the same modules", "use the model that it was made for"))
        return None
    shape = tuple(storage_of(stored).shape(stored) if parameter else stored.shape)
    if shape != tuple(delta.shape):
        problem = f"a change of {name!r} of shape {tuple(delta.shape)}"
        problems.append(sentence(problem, f"{shape}", "use the model that it was made for"))
        return None
    return path, weight


def factor_delta(
    delta: Tensor, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, float]:
    """A [g, r, in] and B [g, out, r] in float32, and their relative error, for ΔW [g, out, in] in
    float64. r is ``rank``, at most min(out, in). If that is None, r is the lowest rank that keeps
    the share ``energy`` of ‖ΔW‖²; if both are None, the lowest with an error of at most
    1e-6 · ‖ΔW‖."""
    svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
    # [min(out, in)]: the squared error if only the first i singular values are kept
    tail_energy = svd.S.square().sum(0).flip(0).cumsum(0).flip(0)
    max_energy_lost = (EXACT**2 if energy is None else 1 - energy) * tail_energy[0]
    rank = max(1, int((tail_energy > max_energy_lost).sum())) if rank is None else rank
    low = svd.cut(rank)[0].to(torch.float32)
    norm = delta.norm().item()
    return low.A, low.B, (low.delta(torch.float64) - delta).norm().item() / norm if norm else 0.0


def check_rank_options(rank: int | None, energy: float | None, whole: bool) -> None:
    """``AdapterError`` unless at most one of the three options is given and its value is valid."""
    options = {"rank": rank, "energy": energy, "whole": whole or None}
    used_options = [name for name, value in options.items() if value is not None]
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1)
    checks = [
        (len(used_options) > 1, listing(used_options), "one of them", "leave the others out"),
        (bad_rank, f"rank={rank!r}", "a number of at least 1", "choose one"),
        (bad_energy, f"energy={energy!r}", "a share in (0, 1]", "choose one"),
    ]
    problems = [sentence(*error_texts) for failed, *error_texts in checks if failed]
    raise_all(AdapterError, "This cannot be made a product", problems)
