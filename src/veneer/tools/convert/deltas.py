"""Between an adapter and the whole changes that it makes: ΔW = W' - W of every parameter, and back by singular values.

    ΔW = gain ⊙ (W + scale · B A) - W           of any variant, on any layer; W' - W of what is trained in full
    ΔW = U S Vᵀ ≈ (U √S) (√S Vᵀ)                the best product of a rank (Eckart and Young 1936)

With the base this is what a merge would add, in float64. Without it the file alone tells, for plain products on layers
whose shape shows in their factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter_files.peft_mapping import kind_for
from veneer.attach.adapted_module import own_class, weight_of
from veneer.attach.install import install
from veneer.attach.lookup import adapters, changes
from veneer.attach.lookup import parameter_path as joined
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

#: the name of an adapter that is on a model for the time of a conversion
NAME = "veneer_convert"
#: what is left of ‖ΔW‖ at the rank that a product of float32 factors has
EXACT = 1e-6


@torch.no_grad()
def of_model(model: nn.Module, name: str) -> dict[str, Tensor]:
    """ΔW of every parameter that the adapter ``name`` changes, in its own shape, each weight once. Computed in float64;
    in float32 at least."""
    deltas: dict[str, Tensor] = {}
    for path, module, weight, change in changes(model, name):
        target = weight_of(module, weight)
        low, gain = change.resolve(target)
        dense = change.storage.dense(target).double()
        if gain is None:  # not as a difference of large numbers
            deltas[joined(path, weight)] = change.layer.fold(low.delta(torch.float64), dense.shape)
        else:
            deltas[joined(path, weight)] = change.changed(target, low, gain, torch.float64) - dense
    for path, module, part in adapters(model, name):
        for own, value in part.full.state_dict().items():
            old = {**module._parameters, **module._buffers}[own]
            deltas[joined(path, own)] = value.double() - old.double() if value.is_floating_point() else value - old
    return {at: delta.float() if delta.is_floating_point() else delta for at, delta in deltas.items()}


def of_file(low_rank: Sequence[LowRankChange], full: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """As ``of_model`` without a model, with the reasons for what cannot be told so."""
    deltas: dict[str, Tensor] = {}
    problems = []
    for change in low_rank:
        low = change.layer.low
        if change.magnitude is not None:
            problems.append(_needs_base(change.weight, "which rescales the weight"))
        elif change.kind == "attention" and change.weight.endswith("out_proj.weight"):
            problems.append(_needs_base(change.weight, "which PEFT applies more than once"))
        elif change.kind in ("stack", "parameter"):
            problems.append(_needs_base(change.weight, "whose shape the file does not tell"))
        else:
            delta = low.delta(torch.float64)  # [g, out, in]
            shape = {"conv": (-1, *change.layer.A.shape[1:]), "grouped conv": (-1, *change.layer.A.shape[1:])}
            flat = delta.reshape(shape.get(change.kind, (-1, delta.shape[2])))
            deltas[change.weight] = flat.mT if change.kind in ("embedding", "Conv1D") else flat
    problems += [_needs_base(at or "the model", "which is trained in full") for at in full]
    return {at: delta.float() for at, delta in deltas.items()}, problems


def _needs_base(at: str, why: str) -> str:
    return sentence(f"a change of {at!r}, {why}", "the base beside it", "give the base")


@dataclass(frozen=True)
class Factored:
    """How one ΔW became a product: its rank, and ‖ΔW - product‖ / ‖ΔW‖."""

    weight: str
    rank: int
    error: float


def put(
    model: nn.Module,
    deltas: Mapping[str, Tensor],
    whole: frozenset[str],
    *,
    rank: int | None,
    energy: float | None,
) -> list[Factored]:
    """Install the adapter ``NAME`` that makes these changes. Vectors, and what ``whole`` names, are trained in full.

    Raises:
        AdapterError: names or shapes that the model does not have. Nothing was changed.
    """
    names, problems = Names(model), []
    refs = {name: ref for name in deltas if (ref := _ref_of(names, name, deltas[name], problems)) is not None}
    full: dict[str, dict[str, Tensor]] = {}
    factors: dict[ParamRef, dict[str, Tensor]] = {}
    wanted: dict[ParamRef, TargetSpec] = {}
    report = []
    for name, (path, weight) in refs.items():
        module, delta = names.modules[path], deltas[name]
        kind = kind_for(module, weight)
        vector = (
            delta.dim() < 2
            or weight in module._buffers
            or (kind.name == GENERAL and weight not in kind.weights(module))
        )
        if name in whole or vector:
            old = {**module._parameters, **module._buffers}[weight]
            full.setdefault(path, {})[weight] = (old.double() + delta.double()).to(old.dtype)
            continue
        flat = kind.unfold(delta.double(), kind.dims(module, delta.shape))
        A, B, error = factor(flat, rank, energy)
        factors[path, weight] = {"A": A, "B": B}
        wanted[path, weight] = TargetSpec(A.shape[1], float(A.shape[1]))
        report.append(Factored(name, A.shape[1], error))
    low = plan_low(names, wanted, problems)
    own = {
        path: tuple(key for key in tensors if key in names.modules[path]._parameters) for path, tensors in full.items()
    }
    check_full(names, own, problems)
    problems += overlaps(names, [*factors, *((path, key) for path, keys in own.items() for key in keys)])
    raise_all(AdapterError, f"These changes do not fit this {own_class(model).__name__}", problems)
    for plan in low:  # a plan goes by the first module that has the weight
        first = next(ref for ref in plan.holders if ref in factors)
        factors[plan.ref] = factors[first]
    buffers = frozenset(path for path, tensors in full.items() if set(tensors) & set(names.modules[path]._buffers))
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
    return report


def _ref_of(names: Names, name: str, delta: Tensor, problems: list[str]) -> ParamRef | None:
    above, _, weight = name.rpartition(".")
    path = names.canonical.get(above)
    module = names.modules.get(path) if path is not None else None
    known = module is not None and (weight in own_parameters(module) or module._buffers.get(weight) is not None)
    if module is None or path is None or not known:
        found = f"a change of {name!r}, which this model lacks{nearest(above, names.canonical)}"
        problems.append(sentence(found, "the same modules", "use the model that it was made for"))
        return None
    stored = weight_of(module, weight) if weight in own_parameters(module) else module._buffers[weight]
    shape = tuple(storage_of(stored).shape(stored)) if weight in own_parameters(module) else tuple(stored.shape)
    if shape != tuple(delta.shape):
        found = f"a change of {name!r} of shape {tuple(delta.shape)}"
        problems.append(sentence(found, f"{shape}", "use the model that it was made for"))
        return None
    return path, weight


def factor(delta: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """A [g, r, in], B [g, out, r] in float32, and the relative error, of ΔW [g, out, in] in float64.

    Args:
        rank: r, at most min(out, in); None takes the least that keeps the share ``energy`` of ‖ΔW‖², or with None there
            too that leaves at most 1e-6 · ‖ΔW‖.
    """
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    rest = S.square().flip(-1).cumsum(-1).flip(-1).sum(0)  # [min]: what is left when only the first i are kept
    total = rest[0].item()
    if rank is None:
        allowed = EXACT**2 * total if energy is None else (1 - energy) * total
        rank = max(1, int((rest > allowed).sum()))
    rank = min(rank, S.shape[-1])
    root = S[:, :rank].sqrt()
    A, B = root[:, :, None] * Vh[:, :rank], U[:, :, :rank] * root[:, None, :]
    A, B = A.float(), B.float()
    off = (torch.bmm(B.double(), A.double()) - delta).norm().item()
    return A, B, off / total**0.5 if total else 0.0


def check_rank_options(rank: int | None, energy: float | None, whole: bool) -> None:
    """Raise AdapterError for a choice of the rank that means nothing."""
    given = [
        name for name, value in (("rank", rank), ("energy", energy), ("whole", whole or None)) if value is not None
    ]
    problems = []
    if len(given) > 1:
        problems.append(sentence(listing(given), "one of them", "leave the others out"))
    if rank is not None and (type(rank) is not int or rank < 1):
        problems.append(sentence(f"rank={rank!r}", "a number of at least 1", "choose one"))
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        problems.append(sentence(f"energy={energy!r}", "a share in (0, 1]", "choose one"))
    raise_all(AdapterError, "This cannot be made a product", problems)
