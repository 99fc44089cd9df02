"""Between an adapter and the whole changes that it makes: ΔW = W' - W of every parameter, and back
by singular values.

ΔW = gain ⊙ (W + scale · B A) - W           of any variant, on any layer; W' - W of what is trained in full
ΔW = U S Vᵀ ≈ (U √S) (√S Vᵀ)                the best product of a rank (Eckart and Young 1936)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.peft_mapping import kind_for
from veneer.attach.adapted_module import base_class, weight_of
from veneer.attach.install import install
from veneer.attach.lookup import adapters, changes
from veneer.attach.lookup import parameter_path as joined
from veneer.attach.merge import no_weights_change
from veneer.attach.plan import Plans, TargetSpec, full_readers, plan_low
from veneer.attach.refusals import check_full
from veneer.attach.shared_memory import overlaps
from veneer.attach.targets import Names, ParamRef, own_parameters
from veneer.attach.weight_tying import apart
from veneer.bases import storage_of
from veneer.config import LoraConfig
from veneer.errors import AdapterError, listing, nearest, raise_all, sentence
from veneer.formats._base import LowRankChange
from veneer.layers._base import GENERAL
from veneer.lowrank import Svd

#: the name of an adapter that is on a model for the time of a conversion
NAME = "veneer_convert"
#: what is left of ‖ΔW‖ at the rank that a product of float32 factors has
EXACT = 1e-6


@torch.no_grad()
def of_model(model: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW of every parameter that the adapter ``name`` changes, in its own shape, each weight once.
    Computed in float64; in float32 at least."""
    raise_all(AdapterError, f"There is no ΔW of {name!r}", list(no_weights_change(model, name)))
    deltas: dict[str, Tensor] = {}
    for path, module, weight, change in changes(model, name):
        target = weight_of(module, weight)
        low, gain = change.resolve(target)
        dense = change.storage.dense(target).double()
        if gain is None:  # not as a difference of large numbers
            deltas[joined(path, weight)] = change.layer.fold(low.delta(torch.float64), dense.shape)
        else:
            deltas[joined(path, weight)] = (
                change.changed_weight(target, low, gain, torch.float64) - dense
            )
    for path, module, part in adapters(model, name):
        for own, value in part.full.state_dict().items():
            old = {**module._parameters, **module._buffers}[own]
            deltas[joined(path, own)] = (
                value.double() - old.double() if value.is_floating_point() else value - old
            )
    return {
        at: delta.float() if delta.is_floating_point() else delta for at, delta in deltas.items()
    }


def of_file(
    low_rank: Sequence[LowRankChange], full: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """As ``of_model`` without a model, with the reasons for what cannot be told so."""
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
    unknown += [(at or "the model", "which is trained in full") for at in full]
    problems = [
        sentence(f"a change of {at!r}, {why}", "the base beside it", "give the base")
        for at, why in unknown
    ]
    return deltas, problems


def put(
    model: nn.Module,
    deltas: Mapping[str, Tensor],
    whole: frozenset[str],
    *,
    rank: int | None,
    energy: float | None,
) -> dict[str, float]:
    """Install the adapter ``NAME`` that makes these changes. Vectors, and what ``whole`` names, are
    trained in full. Returns, for each change that became a product, ‖ΔW - product‖ / ‖ΔW‖.
    ``AdapterError``: names or shapes that the model does not have. Nothing was changed."""
    names, problems = Names(model), []
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
        vector = delta.dim() < 2 or weight in module._buffers
        if name in whole or vector or (kind.name == GENERAL and weight not in kind.weights(module)):
            old = {**module._parameters, **module._buffers}[weight]
            full.setdefault(path, {})[weight] = (old.double() + delta).to(old.dtype)
        else:
            A, B, errors[name] = factor(
                kind.unfold(delta, kind.dims(module, delta.shape)), rank, energy
            )
            factors[path, weight] = {"A": A, "B": B}
    ranks = {ref: pair["A"].shape[1] for ref, pair in factors.items()}
    low = plan_low(
        names, {ref: TargetSpec(rank, float(rank)) for ref, rank in ranks.items()}, problems
    )
    own = {
        path: tuple(key for key in full[path] if key in names.modules[path]._parameters)
        for path in full
    }
    check_full(names, own, problems)
    problems += overlaps(
        names, [*factors, *((path, key) for path, keys in own.items() for key in keys)]
    )
    raise_all(AdapterError, f"These changes do not fit this {base_class(model).__name__}", problems)
    for plan in low:  # a plan goes by the first module that has the weight
        first = next(ref for ref in plan.holders if ref in factors)
        factors[plan.ref] = factors[first]
    buffers = frozenset(
        path for path, tensors in full.items() if set(tensors) & set(names.modules[path]._buffers)
    )
    most = max((plan.rank for plan in low), default=1)
    config = LoraConfig(
        rank=most, alpha=float(most), targets=tuple(joined(*plan.ref) for plan in low) or "all",
        train_also=tuple(full), dtype="float32",
    )  # fmt: skip
    plans = Plans(config, tuple(low), own, buffers, full_readers(names, own), apart(names, full))
    install(model, NAME, plans, trainable=False, parameters=factors)
    with torch.no_grad():
        for at, _, part in adapters(model, NAME):
            for key, value in full.get(at, {}).items():
                {**part.full._parameters, **part.full._buffers}[key].copy_(value)
    return errors


def _ref_of(names: Names, name: str, delta: Tensor, problems: list[str]) -> ParamRef | None:
    above, _, weight = name.rpartition(".")
    path = names.canonical.get(above, "")
    module = names.modules[path] if above in names.canonical else nn.Module()
    parameter = weight in own_parameters(module)
    stored: Any = weight_of(module, weight) if parameter else module._buffers.get(weight)
    if stored is None:
        problem = f"a change of {name!r}, which this model lacks{nearest(above, names.canonical)}"
        problems.append(sentence(problem, "the same modules", "use the model that it was made for"))
        return None
    shape = tuple(storage_of(stored).shape(stored) if parameter else stored.shape)
    if shape != tuple(delta.shape):
        problem = f"a change of {name!r} of shape {tuple(delta.shape)}"
        problems.append(sentence(problem, f"{shape}", "use the model that it was made for"))
        return None
    return path, weight


def factor(delta: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """A [g, r, in], B [g, out, r] in float32, and the relative error, of ΔW [g, out, in] in
    float64. ``rank``: r, at most min(out, in); None takes the least that keeps the share ``energy``
    of ‖ΔW‖², or with None there too that leaves at most 1e-6 · ‖ΔW‖."""
    svd = Svd(*torch.linalg.svd(delta, full_matrices=False))
    # [min]: what is left when only the first i are kept
    rest = svd.S.square().sum(0).flip(0).cumsum(0).flip(0)
    allowed = (EXACT**2 if energy is None else 1 - energy) * rest[0]
    rank = max(1, int((rest > allowed).sum())) if rank is None else rank
    low = svd.cut(rank)[0].to(torch.float32)
    norm = delta.norm().item()
    return low.A, low.B, (low.delta(torch.float64) - delta).norm().item() / norm if norm else 0.0


def check_rank_options(rank: int | None, energy: float | None, whole: bool) -> None:
    """AdapterError for a choice of the rank that means nothing."""
    options = {"rank": rank, "energy": energy, "whole": whole or None}
    given = [name for name, value in options.items() if value is not None]
    bad_rank = rank is not None and (type(rank) is not int or rank < 1)
    bad_energy = energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1)
    checks = [
        (len(given) > 1, listing(given), "one of them", "leave the others out"),
        (bad_rank, f"rank={rank!r}", "a number of at least 1", "choose one"),
        (bad_energy, f"energy={energy!r}", "a share in (0, 1]", "choose one"),
    ]
    problems = [sentence(*said) for wrong, *said in checks if wrong]
    raise_all(AdapterError, "This cannot be made a product", problems)
