"""The low-rank factors A and B of a LoRA, LoHa or LoKr as kohya's and LyCORIS's tools store it.

    read_factors(tensors, shape)  ->  (A, B, alpha)

ΔW = alpha / rank · B A, as [out, in · kernel size]. The files are untrusted: the shape of a change
is compared with that of the base's weight before any product, so that no product takes more memory
than a few times the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.formats._base import scalar_value

#: the suffixes of the tensors of a LoRA, a LoHa and a LoKr
LORA_SUFFIXES = {"lora_down.weight", "lora_up.weight"}
LOHA_SUFFIXES = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR_SUFFIXES = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}


def read_factors(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, float | None] | None:
    """(A, B, alpha) of one module's change; None if one of its factors is missing. ``shape``: that
    of the base's weight. ``ValueError``: the change has another one, of which the products could
    take more memory than the file."""
    suffixes = set(tensors)
    alpha = scalar_value(tensors["alpha"], "alpha") if "alpha" in tensors else None
    alpha = alpha or None  # sd-scripts and LyCORIS treat alpha 0 as no alpha
    if suffixes >= LORA_SUFFIXES:
        A, B = tensors["lora_down.weight"], tensors["lora_up.weight"]
        mid_factor = tensors.get("lora_mid.weight")
        if mid_factor is not None:  # A [r, in, 1…] is pointwise; M A is [r, in, *k]
            _must_have_shape((B.shape[0], A[0].numel() * mid_factor[0, 0].numel()), shape)
            _must_have_one_rank(mid_factor.shape[0], B.shape[1])
            if B.shape[1] > min(shape[0], math.prod(shape[1:])):
                raise ValueError(f"the rank {B.shape[1]} of a weight {shape}")
            dtype = torch.promote_types(A.dtype, torch.float32)
            A = torch.einsum(
                "mn...,ni->mi...", mid_factor.double(), A.reshape(A.shape[0], -1).double()
            ).to(dtype)
        return A, B, alpha
    if suffixes >= LOHA_SUFFIXES:
        return _loha_factors(tensors, alpha, shape)
    return _lokr_factors(tensors, alpha, shape)


def _must_have_shape(change_shape: tuple[int, int], shape: tuple[int, ...]) -> None:
    """``ValueError``: a change [out, in · kernel size] is not of the weight's ``shape``."""
    if change_shape != (weight_shape := (shape[0], math.prod(shape[1:]))):
        raise ValueError(f"a change {change_shape} of a weight {weight_shape}")


def _must_have_one_rank(*ranks: int) -> None:
    if len({*ranks}) > 1:
        raise ValueError(f"factors of the ranks {ranks}")


def _to_float32(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to float32, in which products of 16-bit numbers are exact; keep float64."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _loha_factors(
    tensors: Mapping[str, Tensor], alpha: float | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, float]:
    w1_a, w1_b, w2_a, w2_b = _to_float32(*(tensors[name] for name in sorted(LOHA_SUFFIXES)))
    for a, b in ((w1_a, w1_b), (w2_a, w2_b)):
        _must_have_shape((a.shape[0], b[0].numel()), shape)
        _must_have_one_rank(a[0].numel(), b.shape[0])
    scale = 1.0 if alpha is None else alpha / w1_b.shape[0]
    if w1_b.shape[0] * w2_b.shape[0] > min(w1_a.shape[0], w1_b.shape[1]):
        delta = (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double())
        return _full_rank_factors(delta.to(w1_a.dtype), scale)
    A = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)  # [r·r, in·k]
    B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1, 2)  # [out, r·r]
    return A, B, scale * len(A)


def _lokr_factors(
    tensors: Mapping[str, Tensor], alpha: float | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, alpha) of a LoKr; None if a factor is missing.

    With w2 [k, n, …] = w2_a [k, q] w2_b [q, n, …] and an identity I, w1 [l, m] ⊗ w2 is both
    (w1 ⊗ w2_a) (I ⊗ w2_b), of rank m q, and (I ⊗ w2_a) (w1 ⊗ w2_b), of rank l q. The result is
    the product of lower rank; or ΔW and an identity, if that rank is above min(out, in)."""
    alternatives = [({f"lokr_{w}"}, {f"lokr_{w}_a", f"lokr_{w}_b"}) for w in ("w1", "w2")]
    if not all(
        matrix_suffix <= set(tensors) or pair_suffixes <= set(tensors)
        for matrix_suffix, pair_suffixes in alternatives
    ):
        return None
    rank_keys = [key for key in ("lokr_w1_b", "lokr_w2_b") if key in tensors]
    rank = tensors[rank_keys[0]].shape[0] if rank_keys else None
    # LyCORIS does not scale if neither w1 nor w2 is decomposed
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    w1_factors, w2_factors = (
        _to_float32(*(tensors[key] for key in ([name] if name in tensors else pair)))
        for name, pair in ((w, (f"{w}_a", f"{w}_b")) for w in ("lokr_w1", "lokr_w2"))
    )
    k = w2_factors[0].shape[0]
    out, in_ = w1_factors[0].shape[0] * k, w1_factors[-1][0].numel() * w2_factors[-1][0].numel()
    _must_have_shape((out, in_), shape)
    for first, *second in (w1_factors, w2_factors):
        if second:
            _must_have_one_rank(first[0].numel(), second[0].shape[0])
    w1, w2_b = w1_factors[0], w2_factors[-1].flatten(1)  # n and the kernel vary fastest in w2_b
    if len(w1_factors) > 1:
        w1 = (w1.double() @ w1_factors[1].double()).to(w1.dtype)
    (l, m), q = w1.shape, k if len(w2_factors) == 1 else len(w2_b)  # noqa: E741
    if min(l, m) * q > min(out, in_):
        w2 = w2_b.double() if len(w2_factors) == 1 else w2_factors[0].double() @ w2_b.double()
        return _full_rank_factors(torch.kron(w1.double(), w2).to(w1.dtype), scale)
    w2_a = torch.eye(k, dtype=w2_b.dtype) if len(w2_factors) == 1 else w2_factors[0]
    eye = torch.eye(min(l, m), dtype=w1.dtype)
    left_factor, right_factor = (w1, eye) if m <= l else (eye, w1)
    A, B = torch.kron(right_factor, w2_b), torch.kron(left_factor, w2_a)
    return A, B, scale * len(A)


def _full_rank_factors(delta: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) of a change ``scale`` · ``delta`` [out, in · kernel size]: one factor is
    ``delta``, the other an identity."""
    eye = torch.eye(min(delta.shape), dtype=delta.dtype)
    A, B = (eye, delta) if delta.shape[1] <= len(delta) else (delta, eye)
    return A, B, scale * len(eye)
