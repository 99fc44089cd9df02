"""Read folders of PiSSA and OLoRA that PEFT saved without conversion. Their A and B apply to a base
from which PEFT has subtracted the product of their initial values, s B₀ A₀.

    PEFT, when it loads    W₀ = W − s B₀ A₀        A₀, B₀: computed from W and the rank alone
                           y = op(x; W₀ + s B A)   s: the scale; op: the layer's operation
    Veneer                 ΔW = s (B A − B₀ A₀) = s [B − B₀, B₀] @ [A ; A − A₀]     twice the rank

With the weight W of the base at hand, the adapter of such a folder is thus a plain low-rank change
of W. (In 16 bits, PEFT rounds W₀ to the dtype of W.) The last form of ΔW is computed, because near
the initial values, s B A − s B₀ A₀ is a small difference of large products, which loses digits.

Rejected: to require that PEFT converts the folder. A conversion needs the initial values, which no
such folder has. Initialisations that cannot be recomputed are refused (see
``formats/peft_fields.py``): those by random approximations (``pissa_niter_…``) or from data.

Sources: Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775; ``pissa_init`` and
``olora_init`` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import ModelIndex
from veneer.bases import storage_of, weight_of
from veneer.formats import peft
from veneer.layers import ParamRef
from veneer.lowrank import LowRank


def without_initial_product(
    model_index: ModelIndex,
    ref: ParamRef,
    kind_name: str,
    peft_config: Mapping[str, Any],
    layer: peft.PeftLayer,
) -> LowRank | str:
    """The change of ``layer`` as a low-rank product of twice the rank, relative to the weight W of
    the unchanged base. If it cannot be computed, the reason as text.

    Args:
        ref: (path of the module, name of the weight) of W.
        kind_name: the kind of the module, such as "linear".
        peft_config: PEFT's config, whose ``init_lora_weights`` tells how A and B were initialised.
    """
    init_method = str(peft_config["init_lora_weights"]).lower()
    weight: Any = weight_of(model_index.modules[ref[0]], ref[1])
    storage: Any = storage_of(weight)
    if kind_name not in ("linear", *(("conv1d_transformers",) if init_method == "pissa" else ())):
        return f"PEFT has no {init_method} for a {kind_name} layer"
    if (
        storage is None
        or storage.name != "plain"
        or not isinstance(weight, nn.Parameter)
        or weight.is_meta
    ):
        return (
            f"{init_method} starts from the values of the weight, which is stored packed or is not"
            " here"
        )
    if layer.scale <= 0 or layer.low.rank > min(weight.shape):
        return (
            f"{init_method} has no start of rank {layer.low.rank} and scale {layer.scale:g} in a"
            f" weight {[*weight.shape]}"
        )
    matrix = weight.mT if kind_name != "linear" else weight  # [out, in]
    A0, B0 = _initial_factors(init_method, matrix, layer.low.rank, layer.scale)
    A, B = (factor[0].to(torch.float32) for factor in (layer.low.A, layer.low.B))
    if A.shape != A0.shape or B.shape != B0.shape:
        return f"A {[*A.shape]} and B {[*B.shape]} do not fit the weight {[*weight.shape]}"
    return LowRank(torch.cat([A, A - A0])[None], torch.cat([B - B0, B0], 1)[None], layer.scale)


@torch.no_grad()
def _initial_factors(
    init_method: str, weight: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(A₀ [rank, in], B₀ [out, rank]): the values with which PEFT initialises A and B for a weight
    [out, in], in float32 and on the CPU. ``init_method``: "pissa" or "olora"."""
    W = weight.detach().to("cpu", torch.float32)
    if init_method == "olora":
        # the first columns of Q depend on the first columns of W alone, so no more are decomposed
        Q, _ = torch.linalg.qr(W[:, :rank])
        return Q.mT @ W, Q
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root_S = (S[:rank] / scale).sqrt()
    return root_S[:, None] * Vh[:rank], U[:, :rank] * root_S
